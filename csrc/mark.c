/* SPDX-License-Identifier: MIT */
/*
 * Marks.
 */
#include <errno.h>
#include <string.h>

#include "count.h"

/* For the stress test: the mistake that protocol.h warns of. */
#ifdef HB_BREAK_EARLY_EXIT
#define HB_MAYBE_BREAK(gained) do { if (!(gained)) return false; } while (0)
#else
#define HB_MAYBE_BREAK(gained) ((void)0)
#endif

bool hb_mark(const struct hb_block *b, uint64_t first, uint64_t last)
{
    bool gained = hb_mark_level(b, 0, first, last);

    HB_MAYBE_BREAK(gained);
    /*
     * A mark's words come before the look at level 1, as in hb_mark_word,
     * which is sequentially consistent throughout.  Stored words need a full
     * fence for that.  Where all was found set there are loads only; these stay
     * in order behind hb_read_fence(), which costs nothing on x86 where the full
     * one takes as long as the rest of the mark.  With the fences of hb_empty_pieces,
     * hb_give_back and hb_move_leaf (level 1, then leaf), and of hb_count_noted.
     */
    if (gained) {
        hb_fence();
    } else {
        hb_read_fence();
    }
    hb_test_delay();
    hb_summarise_range(b, first / HB_BITS, last / HB_BITS);
    if (gained) {
        hb_note_range(b, first / HB_BITS / HB_BITS, last / HB_BITS / HB_BITS);
    }
    return gained;
}

/*
 * The same for groups of one leaf word, which is what most writes are.  Where all
 * was set already this is nothing but loads.
 */
static inline bool hb_mark_word(const struct hb_block *b, uint64_t word, uint64_t mask)
{
    bool gained = hb_mark_part(b, 0, word, mask);

    HB_MAYBE_BREAK(gained);
    hb_test_delay();
    hb_summarise(b, word);
    if (gained) {
        hb_note(b, word / HB_BITS);
    }
    return gained;
}

/* hbitmap_set ends with a call of one of these, or with none, so it has nothing
 * to keep meanwhile. */
__attribute__((noinline))
static int hb_set_words(const struct hb_block *b, uint64_t first, uint64_t last)
{
    (void)hb_mark(b, first, last);
    return 0;
}

__attribute__((noinline))
static int hb_set_rest(const struct hb_block *b, uint64_t word)
{
    hb_summarise(b, word);
    hb_note(b, word / HB_BITS);
    return 0;
}

/* As above: hbitmap_set has nothing to keep for what it may call instead. */
__attribute__((noinline))
static int hb_set_elsewhere(HBitmap *hb, uint64_t start, uint64_t count)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_set, hb, start, count);
    return 0;
}

int hbitmap_set(HBitmap *hb, uint64_t start, uint64_t count)
{
    if (!hb_at_home(hb)) {
        return hb_set_elsewhere(hb, start, count);
    }
    const struct hb_block *b = hb_block_of(hb);
    uint64_t last_item = start + count - 1, first, last, word, mask;

    /* Also where the sum is too large, or count is 0. */
    if (last_item >= b->size || start > last_item) {
        return count ? -ERANGE : 0;
    }
    first = start >> hb->granularity;
    last = last_item >> hb->granularity;
    word = first / HB_BITS;
    if (word != last / HB_BITS) {
        return hb_set_words(b, first, last);
    }
    /* hb_mark_word, written out. */
    mask = hb_mask_from(first) & hb_mask_to(last);
    if (hb_maybe_dirty(b, word) && (atomic_load(&b->level[0][word]) & mask) == mask) {
        HB_MAYBE_BREAK(false);
        return hb_is_set(b->level[1], word) ? 0 : hb_set_rest(b, word);
    }
    atomic_fetch_or(&b->level[0][word], mask);
    hb_test_delay();
    return hb_is_set(b->level[1], word) && hb_is_set(b->notes, word / HB_BITS)
               ? 0 : hb_set_rest(b, word);
}

/* ---- many --------------------------------------------------------------- */

/*
 * How many ranges set_many takes at a time: one loop makes groups of them, the
 * next looks whether all are dirty, which is the common case.  Neither waits for
 * what it loads, so many loads are under way.
 */
enum { HB_BATCH = 32 };

/* How many items range i has; without counts, one. */
static inline uint64_t hb_count_of(const uint64_t *counts, size_t i)
{
    return counts ? counts[i] : 1;
}

/*
 * Top bit: one of the n ranges may leave [0, size).  Exact but for ranges of 0
 * items, for which it may be set without need.  Written so that compilers
 * vectorise it: as size < 2^63, a difference that is negative shows in its top
 * bit if what it is made of shows none.
 */
static inline uint64_t hb_may_leave(uint64_t size, const uint64_t *starts,
                                    const uint64_t *counts, size_t n)
{
    uint64_t leaves = 0;

    for (size_t i = 0; i < n; i++) {
        uint64_t rest = size - starts[i];

        leaves |= starts[i] | hb_count_of(counts, i) | rest |
                  (rest - hb_count_of(counts, i));
    }
    return leaves;
}

/* The leaf words of some ranges, and their bits in these. */
struct hb_batch {
    uint64_t words[HB_BATCH];
    uint64_t masks[HB_BATCH];
};

/* HB_BATCH ranges of the caller's, each within a leaf word.  False: some are none
 * of these, or leave the bitmap. */
static inline bool hb_within_words(const HBitmap *hb, const struct hb_block *b,
                                   const uint64_t *starts, const uint64_t *counts,
                                   struct hb_batch *batch)
{
    uint64_t own[HB_BATCH], bad, more = 0;

    /* Our copies, since somebody may be changing the arrays. */
    memcpy(batch->words, starts, sizeof(own));
    if (counts) {
        memcpy(own, counts, sizeof(own));
    }
    for (unsigned i = 0; !counts && i < HB_BATCH; i++) {
        own[i] = 1;
    }
    bad = hb_may_leave(b->size, batch->words, own, HB_BATCH);
    for (unsigned i = 0; i < HB_BATCH; i++) {
        uint64_t first = batch->words[i] >> hb->granularity;
        uint64_t last = (batch->words[i] + own[i] - 1) >> hb->granularity;

        bad |= own[i] - 1;
        more |= first ^ last;
        batch->words[i] = first / HB_BITS;
        batch->masks[i] = hb_mask_from(first) & hb_mask_to(last);
    }
    return !(bad >> 63) && more < HB_BITS;
}

/* Are these bits set, and their words named?  If so this was a mark of each of
 * them, all of it loads. */
static inline bool hb_all_set(const struct hb_block *b, const struct hb_batch *batch)
{
    uint64_t missing = 0;

    for (unsigned i = 0; i < HB_BATCH; i++) {
        uint64_t word = batch->words[i];

        missing |= batch->masks[i] & ~atomic_load(&b->level[0][word]);
        missing |= !hb_is_set(b->level[1], word);
    }
    return !missing;
}

/* Marks a batch; *dirty: the one before was set already, as a rule this is, too.
 * (If not, that costs a look at the leaf, see hb_maybe_dirty.) */
static void hb_mark_batch(const struct hb_block *b, const struct hb_batch *batch,
                          bool *dirty)
{
    bool gained = false;

    if (*dirty && hb_all_set(b, batch)) {
        return;
    }
    for (unsigned i = 0; i < HB_BATCH; i++) {
        __builtin_prefetch(&b->level[1][batch->words[i] / HB_BITS]);
        __builtin_prefetch(&b->level[0][batch->words[i]], 1);
    }
    for (unsigned i = 0; i < HB_BATCH; i++) {
        gained |= hb_mark_word(b, batch->words[i], batch->masks[i]);
    }
    *dirty = !gained;
}

static inline void hb_mark_items(const HBitmap *hb, const struct hb_block *b,
                                 uint64_t start, uint64_t count)
{
    uint64_t first = start >> hb->granularity;
    uint64_t last = (start + count - 1) >> hb->granularity;

    if (first / HB_BITS == last / HB_BITS) {
        (void)hb_mark_word(b, first / HB_BITS, hb_mask_from(first) & hb_mask_to(last));
    } else {
        (void)hb_mark(b, first, last);
    }
}

/* Compiled twice: with counts, and for NULL. */
static inline __attribute__((always_inline))
int hb_set_many(HBitmap *hb, const uint64_t *starts, const uint64_t *counts, size_t n)
{
    const struct hb_block *b = hb_block_of(hb);
    bool dirty = false;
    int err = 0;

    if (hb_may_leave(b->size, starts, counts, n) >> 63) {
        for (size_t i = 0; i < n; i++) {
            uint64_t count = hb_count_of(counts, i);

            if (count && !hb_in_range(b, starts[i], count)) {
                return -ERANGE;
            }
        }
    }
    for (size_t i = 0; i < n;) {
        struct hb_batch batch;
        size_t end = i + 1;

        if (n - i >= HB_BATCH) {
            end = i + HB_BATCH;
            if (hb_within_words(hb, b, &starts[i], counts ? &counts[i] : NULL, &batch)) {
                hb_mark_batch(b, &batch, &dirty);
                i = end;
                continue;
            }
        }
        for (; !err && i < end; i++) {
            uint64_t start = starts[i], count = hb_count_of(counts, i);

            if (count == 0) {
                continue;
            }
            /* Again: the arrays are the caller's, who may be changing them. */
            if (hb_in_range(b, start, count)) {
                hb_mark_items(hb, b, start, count);
            } else {
                err = -ERANGE;
            }
        }
        if (err) {
            break;
        }
    }
    return err;
}

int hbitmap_set_many(HBitmap *hb, const uint64_t *starts,
                     const uint64_t *counts, size_t n)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_set_many, hb, starts, counts, n);
    return counts ? hb_set_many(hb, starts, counts, n) : hb_set_many(hb, starts, NULL, n);
}

/* ---- what another bitmap has ------------------------------------------------ */

/* One word of hb_mark_words; has it gained something? */
static inline bool hb_or_word(hb_word *target, uint64_t more, bool alone)
{
    if (!more) {
        return false;
    }
    if (alone) {
        /* Relaxed: nobody else is there. */
        more |= atomic_load_explicit(target, memory_order_relaxed);
        atomic_store_explicit(target, more, memory_order_relaxed);
    } else {
        atomic_fetch_or(target, more);
    }
    return true;
}

void hb_mark_words(const struct hb_block *to, uint64_t parent, const hb_word *source,
                   uint64_t named)
{
    const bool alone = hb_alone();
    uint64_t at = parent * HB_BITS, set = 0;
    uint64_t n = hb_min(HB_BITS, to->nwords[0] - at);
    hb_word *target = &to->level[0][at];
    /* What says it is empty is not looked at: on fresh memory the look would
     * cost a page fault of its own.  Only a hint, so a relaxed load. */
    uint64_t empty = named & ~atomic_load_explicit(&to->level[1][parent],
                                                   memory_order_relaxed);
    bool gained = false;

    if (alone && hb_many(named, HB_MANY)) {
        if (hb_gain_words(target, source, n)) {
            hb_note(to, parent);
        }
        /* A bit over a word that is zero does no harm. */
        hb_summarise_words(to, parent, named);
        return;
    }
    for (uint64_t bits = empty; bits; bits &= bits - 1) {
        unsigned i = hb_lowest(bits);

        gained |= hb_or_word(&target[i], atomic_load(&source[i]), alone);
    }
    for (uint64_t bits = named & ~empty; bits;) {
        unsigned i = hb_lowest(bits);

        /* A cache line at a time, where there is a lot. */
        if (i % 8 == 0 && i + 8 <= n && (bits >> i & 0xff) == 0xff &&
            !hb_has_more(&source[i], &target[i], 8)) {
            bits &= ~(UINT64_C(0xff) << i);
            continue;
        }
        bits &= bits - 1;
        gained |= hb_or_word(&target[i], atomic_load(&source[i]) &
                                         ~atomic_load(&target[i]), alone);
    }
    hb_test_delay();
    /* Loads only, if nothing was gained, some of them plain; as in hb_mark. */
    hb_read_fence();
    for (uint64_t bits = named & ~atomic_load(&to->level[1][parent]); bits;
         bits &= bits - 1) {
        if (atomic_load(&target[hb_lowest(bits)])) {
            set |= bits & (0 - bits);
        }
    }
    hb_summarise_words(to, parent, set);
    if (gained) {
        hb_note(to, parent);
    }
}
