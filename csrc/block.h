/* SPDX-License-Identifier: MIT */
/*
 * The block of levels, and the arithmetic over it.
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
 */
#ifndef PYBITMAP_BLOCK_H
#define PYBITMAP_BLOCK_H

#include <pthread.h>
#include <stdalign.h>
#include <stdatomic.h>

#include "copies.h"
#include "hbitmap.h"
#include "threads.h"
#include "words.h"

#pragma GCC visibility push(hidden)

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

    hb_word *notes;                     /* of pieces, see count.h */
    unsigned top_shift;

    uint64_t ngroups;                   /* bits of the leaf in use */
    uint64_t nwords[HB_MAX_LEVELS];
    struct hb_block *older;             /* what truncate has replaced */
    void *memory;                       /* what holds the block, from malloc or mapped */
    size_t mapped;                      /* bytes to unmap; 0: from malloc */
    size_t leaf_mapped;                 /* those of a leaf that is elsewhere */
    bool paged;                         /* the leaf is mapped, and ours: see pages.h */
    atomic_ushort *touched;             /* of each 2 MiB of it, see hb_first_named */

    /* Written when a piece changes for the first time since it was counted, and by
     * who counts: on a line of its own. */
    alignas(HB_CACHE_LINE) hb_word top;
    uint16_t *counts;                   /* of pieces */
    _Atomic uint64_t count;             /* their sum */
    atomic_bool counting;
};

struct HBitmap {
    /* Read by every mark and hardly ever written. */
    const struct pybitmap_api *home;    /* first: see copies.h */
    _Atomic(struct hb_block *) block;
    int granularity;
    bool foreign_leaf;                  /* the leaf is the caller's memory */

    /* What clears write: on a line of its own, out of the marks' way. */
    alignas(HB_CACHE_LINE) pthread_mutex_t lock;
    unsigned pins;                      /* under the lock */
    void *memory;                       /* what holds this, from malloc */
    bool unwanted;                      /* freed, so the last pin deletes it */
    bool torn;                          /* see hbitmap_torn */
    _Atomic uint64_t changes;           /* odd: bits are being cleared, see locks.h */
    _Atomic uint64_t dirty_word;        /* where hbitmap_empty last found something */
    atomic_uint forks;                  /* see hb_finish_marks */
};

/* ---- arithmetic --------------------------------------------------------- */

static inline struct hb_block *hb_block_of(const HBitmap *hb)
{
    return atomic_load(&hb->block);
}

static inline bool hb_same_shape(const HBitmap *a, const HBitmap *b)
{
    return a->granularity == b->granularity &&
           hb_block_of(a)->size == hb_block_of(b)->size;
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

/* The run that begins with the lowest of `bits` (not 0) ends where the result
 * has its lowest bit: the addition carries through it.  0: it may go on in the
 * next word. */
static inline uint64_t hb_behind_run(uint64_t bits)
{
    return bits + (bits & (0 - bits));
}

static inline unsigned hb_highest(uint64_t word)
{
    return (unsigned)(HB_BITS - 1 - __builtin_clzll(word));
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

/* ---- searching ---------------------------------------------------------- */

/*
 * The first set bit of level k at or after `bit`, or HB_NONE.  On level 0 that
 * is a dirty group; above, a word of level k - 1 that may be non-zero.
 */
uint64_t hb_next_bit(const struct hb_block *b, unsigned k, uint64_t bit);

/*
 * The words of level 2 that are not zero, from `above` on, or HB_NONE; and what such a
 * one has.  Where there are but two levels, word 0 stands for all.
 */
static inline uint64_t hb_next_above(const struct hb_block *b, uint64_t above)
{
    uint64_t bit;

    if (b->nlevels == HB_MIN_LEVELS) {
        return above == 0 ? 0 : HB_NONE;
    }
    bit = hb_next_bit(b, 2, above * HB_BITS);
    return bit == HB_NONE ? HB_NONE : bit / HB_BITS;
}

static inline uint64_t hb_pieces_under(const struct hb_block *b, uint64_t above)
{
    return b->nlevels > HB_MIN_LEVELS ? atomic_load(&b->level[2][above])
                                      : atomic_load(&b->level[1][0]) != 0;
}

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

/* ---- memory ------------------------------------------------------------- */

/* A new bitmap of the shape of `like`, whose lock the caller holds.  `full`: it
 * will be overwritten at once, nearly all of it, so it may hold anything.  NULL
 * with errno. */
HBitmap *hb_new_like(const HBitmap *like, bool full);

/* Sets the summaries from level `least` on over what is there; nobody else sees the
 * bitmap yet, so they need no protocol. */
void hb_build_summaries(const struct hb_block *b, unsigned least);

static inline size_t hb_align(size_t nbytes, size_t to)
{
    return (nbytes + (to - 1)) & ~(to - 1);
}

#ifdef HB_TEST_ALLOC
int hb_test_alloc_fails(void);
#else
#define hb_test_alloc_fails() 0
#endif

#pragma GCC visibility pop

#endif
