/* SPDX-License-Identifier: MIT */
/*
 * What the files of the core share: the block of levels, the arithmetic over
 * them, and the two movements of the protocol, marking upwards and clearing
 * upwards.
 *
 * A bitmap's size, leaf and summaries sit in one block behind an atomic
 * pointer.  Each call loads that pointer once and works on what it got:
 * truncate publishes a new block and keeps the old one until hbitmap_free.
 *
 *     level 2   1                                one word: the top
 *     level 1   1 0 1 ... 0                      bit N: word N of level 0 is not 0
 *     level 0   0..010  0..0  1..1  ...  0..0    the leaf: bit N is group N
 *
 * Invariant, once all calls have returned: a bit of level k + 1 is set if its
 * word of level k is not zero.  (The reverse may fail: a stale summary bit over
 * a zero word costs a search one look, and goes with the next clear.)
 *
 * PROTOCOL.  Every access is sequentially consistent unless the comment beside
 * it argues otherwise.
 *   A mark sets its leaf bits, then sees to it that level 1 names their words,
 * whether or not its leaf bits were set already: the marker that set them may
 * not have come there yet, and a drain that began now would pass the word over
 * although this mark has returned.
 *   With level 1 it ends, as a rule: what is above a bit of level 1 is set while
 * that bit is.  So whoever has to set one sets first all bits above it, on every
 * level, and then the bit; meanwhile its thread's slot says so (slots.h).
 *   A clear (one at a time: it holds the lock) empties leaf words, then takes
 * the bits of level 1 over those it saw empty, then looks at the words again.  A
 * mark that came in between either found its bit of level 1 taken and sets it
 * again, or found it still set; then its leaf bit was there before the clear
 * took that, so the second look finds it.
 *   If a word of level 1 has become zero, the clear takes the bit above it, and
 * so on upwards.  Then it waits until those who were setting summary bits have
 * finished, and looks at the words below all that it took again: one who found a
 * bit above still set has put the bit of level 1 there by then, one who comes
 * later finds what is missing.  Marks never wait.
 *   Where leaf words are emptied whatever they hold, the order is the other one:
 * the bits above them go first, then the words.  A mark that the words' going
 * leaves alone came after it, so it finds its bit of level 1 gone and sets it
 * again; no second look at the leaf is needed.
 */
#ifndef PYBITMAP_INTERNAL_H
#define PYBITMAP_INTERNAL_H

#include <pthread.h>
#include <stdalign.h>
#include <stdatomic.h>

#include "hbitmap.h"
#include "slots.h"
#include "words.h"

enum {
    HB_BITS = 64,           /* bits in a word, and words under a summary word */
    HB_SHIFT = 6,
    HB_MIN_LEVELS = 2,      /* there is always a summary over the leaf */
    HB_MAX_LEVELS = 7,      /* 2^41 groups: 2^35 2^29 2^23 2^17 2^11 2^5 1 words */
};

/* No such bit or word. */
#define HB_NONE UINT64_MAX

struct hb_block {
    /* What a mark reads, in one cache line. */
    uint64_t size;                      /* items */
    unsigned nlevels;
    hb_word *level[HB_MAX_LEVELS];      /* [0] is the leaf */

    uint64_t ngroups;                   /* bits of the leaf in use */
    uint64_t nwords[HB_MAX_LEVELS];
    struct hb_block *older;             /* what truncate has replaced */
    size_t mapped;                      /* bytes to unmap; 0: from malloc */
    size_t leaf_mapped;                 /* those of a leaf that is elsewhere */
};

/* What the remembered count is worth. */
enum {
    HB_COUNT_STALE,         /* something changed since */
    HB_COUNT_RUNNING,       /* somebody counts, and nothing changed so far */
    HB_COUNT_VALID,
};

struct HBitmap {
    /* Read by every mark and hardly ever written. */
    _Atomic(struct hb_block *) block;
    int granularity;
    bool foreign_leaf;                  /* the leaf is the caller's memory */
    atomic_int count_state;

    /* What clears write: on a line of its own, out of the marks' way. */
    alignas(HB_CACHE_LINE) pthread_mutex_t lock;
    _Atomic uint64_t count;             /* dirty groups, see count_state */
    unsigned pins;                      /* under the lock */
    bool unwanted;                      /* freed, so the last pin deletes it */
    bool torn;                          /* see hbitmap_torn */
    atomic_uint forks;                  /* see hb_finish_marks */
};

/* ---- arithmetic --------------------------------------------------------- */

static inline struct hb_block *hb_block_of(const HBitmap *hb)
{
    return atomic_load(&hb->block);
}

/* Bits from `first % 64` upwards; bits up to and including `last % 64`. */
static inline uint64_t hb_mask_from(uint64_t first)
{
    return UINT64_MAX << (first % HB_BITS);
}

static inline uint64_t hb_mask_to(uint64_t last)
{
    return UINT64_MAX >> (HB_BITS - 1 - last % HB_BITS);
}

/* The bits of word `word` that lie in the bit range [first, last]; the word
 * holds at least one of them. */
static inline uint64_t hb_mask(uint64_t word, uint64_t first, uint64_t last)
{
    uint64_t mask = UINT64_MAX;

    if (word == first / HB_BITS) {
        mask &= hb_mask_from(first);
    }
    if (word == last / HB_BITS) {
        mask &= hb_mask_to(last);
    }
    return mask;
}

static inline uint64_t hb_bit(uint64_t bit)
{
    return UINT64_C(1) << (bit % HB_BITS);
}

static inline unsigned hb_lowest(uint64_t word)
{
    return (unsigned)__builtin_ctzll(word);
}

static inline uint64_t hb_min(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* size rounded up to whole groups; fits, as size <= INT64_MAX. */
static inline uint64_t hb_round_up(const HBitmap *hb, uint64_t size)
{
    uint64_t group = UINT64_C(1) << hb->granularity;

    return (size + (group - 1)) & ~(group - 1);
}

static inline bool hb_in_range(const struct hb_block *b,
                               uint64_t start, uint64_t count)
{
    return start <= b->size && count <= b->size - start;
}

/* The bits of a leaf word that stand for groups. */
static inline uint64_t hb_used(const struct hb_block *b, uint64_t word)
{
    if (word < b->ngroups / HB_BITS) {
        return UINT64_MAX;
    }
    return word > b->ngroups / HB_BITS ? 0 : hb_bit(b->ngroups) - 1;
}

/* What reset and drain take: whole groups, see hbitmap_reset.  The groups in
 * [*first, *last]; count is not 0.  0, -ERANGE or -EINVAL. */
int hb_whole_groups(const HBitmap *hb, const struct hb_block *b,
                    uint64_t start, uint64_t count,
                    uint64_t *first, uint64_t *last);

/* Relaxed stores of single words that hb_fence() follows, see words.h. */
#ifdef HB_TSAN
#define HB_BULK memory_order_seq_cst
#else
#define HB_BULK memory_order_relaxed
#endif

/* ---- marking upwards ---------------------------------------------------- */

/*
 * Sets `mask` in a word; false only if its bits were set already.  The test
 * before the read-modify-write keeps the line shared where nothing is to be
 * done, which is the common case.  It takes nothing from the protocol: what it
 * saw set was set by somebody at that moment, a clear that takes it comes later,
 * and the caller goes on either way.
 */
static inline bool hb_or(hb_word *word, uint64_t mask)
{
    if ((atomic_load(word) & mask) == mask) {
        return false;
    }
    /* Nobody asks what the word was: with the answer it would be a loop around
     * a compare-and-exchange. */
    atomic_fetch_or(word, mask);
    return true;
}

/* The same for one bit, which the test needs no mask for. */
static inline bool hb_or_bit(hb_word *words, uint64_t bit)
{
    hb_word *word = &words[bit / HB_BITS];

    if (atomic_load(word) >> (bit % HB_BITS) & 1) {
        return false;
    }
    atomic_fetch_or(word, hb_bit(bit));
    return true;
}

/* Is bit `bit` of these words set? */
static inline bool hb_is_set(const hb_word *words, uint64_t bit)
{
    return atomic_load(&words[bit / HB_BITS]) >> (bit % HB_BITS) & 1;
}

/* Level 1 is to name these words under its word `parent`. */
__attribute__((noinline))
void hb_name_some(const struct hb_block *b, uint64_t parent, uint64_t words);

/*
 * The same for one leaf word.  As a rule it is named, so here is one load; what a
 * read-modify-write needs stands elsewhere, so that more marks fit into what
 * the processor does at a time.
 */
static inline void hb_name(const struct hb_block *b, uint64_t word)
{
    if (!hb_is_set(b->level[1], word)) {
        hb_name_some(b, word / HB_BITS, hb_bit(word));
    }
}

/* The same for the words [first, last]. */
void hb_name_range(const struct hb_block *b, uint64_t first, uint64_t last);

/* Marks the groups [first, last]; false only if all of them were set already. */
bool hb_mark(const struct hb_block *b, uint64_t first, uint64_t last);

/*
 * To be called after leaf bits have changed.
 *
 * Pairs with hbitmap_count, which stores RUNNING before it reads the leaf.  If
 * the load here comes before that store, so does the change, and the count
 * includes it; if it comes after, the state is seen and made stale.
 */
static inline void hb_count_changed(HBitmap *hb)
{
    if (atomic_load(&hb->count_state) != HB_COUNT_STALE) {
        atomic_store(&hb->count_state, HB_COUNT_STALE);
    }
}

/* ---- clearing upwards: the caller holds the lock ------------------------ */

/* Bits of one word of level 2, over words of level 1 that have become empty. */
struct hb_gone {
    uint64_t word;
    uint64_t bits;
};

/*
 * `words` under word `parent` of level 1 were seen empty: takes their bits and
 * looks again.  What that has emptied on level 1 is collected in *gone (which
 * begins as zero) for hb_unsummarise, so that this waits once for many.
 */
void hb_unname(const struct hb_block *b, uint64_t parent, uint64_t words,
               struct hb_gone *gone);

/* Takes the bits that were collected and what is above, as far as that is empty,
 * waits and looks again. */
void hb_unsummarise(const struct hb_block *b, struct hb_gone *gone);

/* Clears the groups [first, last], and marks in `into`, unless that is NULL,
 * those that were dirty.  Was there one?  fresh: nobody else sees `into`, and
 * it is clean. */
bool hb_clear(const struct hb_block *b, uint64_t first, uint64_t last,
              const struct hb_block *into, bool fresh);

/*
 * Empties the bitmap by moving its pages, all at once.  They are the caller's
 * then, *nbytes from where this says; what b marks from now on goes to fresh
 * ones.  NULL: it is not to be had, nothing has changed.
 */
hb_word *hb_move_leaf(const HBitmap *hb, const struct hb_block *b, size_t *nbytes);

/* Level-1 words over 4 KiB of leaf; how many such pieces have something named. */
enum { HB_PAGE_PARENTS = 4096 / sizeof(hb_word) / HB_BITS };

uint64_t hb_pages_named(const struct hb_block *b);

static inline uint64_t hb_pages(const struct hb_block *b)
{
    return (b->nwords[1] + (HB_PAGE_PARENTS - 1)) / HB_PAGE_PARENTS;
}

/*
 * Somebody is about to fill b, and will touch this many of those pieces at least:
 * if b is clean and that is nearly all, its pages are taken at once, huge ones
 * where the leaf is large.  True: hb_filled is to be called behind it, so that
 * a single mark does not take a huge page later on, when these have been given
 * back.
 */
bool hb_will_fill(const HBitmap *hb, const struct hb_block *b, uint64_t pages);
void hb_filled(const struct hb_block *b);

/* A new bitmap of the shape of `like`, whose lock the caller holds.  `full`: it
 * will be overwritten at once, nearly all of it, so it may hold anything.  NULL
 * with errno. */
HBitmap *hb_new_like(const HBitmap *like, bool full);

/* Are that many of those pieces nearly all? */
static inline bool hb_nearly_all(const struct hb_block *b, uint64_t pages)
{
    return pages >= hb_pages(b) - hb_pages(b) / 8;
}

/* Sets the summaries over a leaf that is not empty; nobody else sees the bitmap
 * yet, so they need no protocol. */
void hb_summarise_leaf(const struct hb_block *b);

/* ---- searching ---------------------------------------------------------- */

/*
 * The first set bit of level k at or after `bit`, or HB_NONE.  On level 0 that
 * is a dirty group; above, a word of level k - 1 that may be non-zero.
 */
uint64_t hb_next_bit(const struct hb_block *b, unsigned k, uint64_t bit);

/*
 * Where the summary names many of the words under each of its own, a loop over
 * all of them is faster than going from one named word to the next, and touches
 * no page that is not touched anyway.  How many that takes depends on the work:
 * HB_SOME for counting and emptying, which are nothing but such loops, HB_MANY
 * for what two words are read for.
 */
enum { HB_SOME = 3, HB_MANY = 12 };

static inline bool hb_many(uint64_t named, unsigned least)
{
    return named == UINT64_MAX || hb_popcount(named) >= least;
}

/* The end of such words from `word` on, at most `end`; `word` itself: there are
 * few. */
static inline uint64_t hb_many_end(const struct hb_block *b, unsigned least,
                                   uint64_t word, uint64_t end)
{
    const uint64_t step = HB_BITS * HB_BITS;
    const hb_word *named = b->level[1];
    uint64_t stop = word;

    while (stop < end) {
        if (stop % step == 0 && stop + step <= end &&
            hb_all_ones(&named[stop / HB_BITS], HB_BITS)) {
            stop += step;
        } else if (hb_many(atomic_load(&named[stop / HB_BITS]), least)) {
            stop = (stop / HB_BITS + 1) * HB_BITS;
        } else {
            break;
        }
    }
    return hb_min(stop, end);
}

/* ---- locks -------------------------------------------------------------- */

/*
 * What a lock is taken for.  The child of a fork has no thread that would release
 * a lock of another one's, so threads say in their slots which they have:
 *
 *     the slot        0   hb       hb + 1                hb         0
 *     the lock                  got        changes           free
 *
 * A lock that a lost thread has named is free for the child; where it was changing
 * the bitmap, that is torn.
 */
enum hb_purpose { HB_READ, HB_CHANGE };

/* The lock is not part of what a caller means by const. */
static inline pthread_mutex_t *hb_lock_of(const HBitmap *hb)
{
    return (pthread_mutex_t *)(uintptr_t)&hb->lock;
}

/* After a fork: what threads that are lost have marked, or were about to restore in a
 * clear, gets its summary bits. */
__attribute__((noinline))
void hb_finish_marks(const HBitmap *hb);

static inline bool hb_unfinished(const HBitmap *hb)
{
    return atomic_load_explicit(&hb->forks, memory_order_relaxed) != hb_forks;
}

static inline void hb_locked(const HBitmap *hb)
{
    if (hb_unfinished(hb)) {
        hb_finish_marks(hb);
    }
}

static inline void hb_lock(const HBitmap *hb, enum hb_purpose purpose)
{
    struct hb_slot *slot = hb_slot();
    _Atomic uintptr_t *entry;

    if (!slot) {
        pthread_mutex_lock(hb_lock_of(hb));
        hb_locked(hb);
        return;
    }
    entry = slot->locked;
    while (atomic_load_explicit(entry, memory_order_relaxed)) {
        entry++;
    }
    atomic_store_explicit(entry, (uintptr_t)hb, memory_order_relaxed);
    hb_write_fence();       /* before the lock's own stores, in what a fork copies */
    pthread_mutex_lock(hb_lock_of(hb));
    atomic_store_explicit(entry, (uintptr_t)hb + purpose, memory_order_relaxed);
    hb_write_fence();       /* before those of the call */
    hb_locked(hb);
}

static inline void hb_unlock(const HBitmap *hb)
{
    struct hb_slot *slot = hb_own_slot;
    _Atomic uintptr_t *entry = NULL;

    for (unsigned i = 0; slot && i < HB_MOST_LOCKS; i++) {
        if ((atomic_load_explicit(&slot->locked[i], memory_order_relaxed) | 1) ==
            ((uintptr_t)hb | 1)) {
            entry = &slot->locked[i];
            break;
        }
    }
    if (!entry) {       /* there was no memory for a slot when it locked */
        pthread_mutex_unlock(hb_lock_of(hb));
        return;
    }
    atomic_store_explicit(entry, (uintptr_t)hb, memory_order_release);
    pthread_mutex_unlock(hb_lock_of(hb));
    atomic_store_explicit(entry, 0, memory_order_release);
}

/* Two bitmaps to read, which may be the same, and one to change, which may be one
 * of these; NULL: there is none. */
void hb_lock_all(const HBitmap *a, const HBitmap *b, const HBitmap *changed);
void hb_unlock_all(const HBitmap *a, const HBitmap *b, const HBitmap *changed);

#endif
