/* SPDX-License-Identifier: MIT */
/*
 * Marks.
 */
#include <errno.h>
#include <string.h>

#include "protocol.h"

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
     * A mark's words come before the look at level 1, as in hb_mark_group,
     * which is sequentially consistent throughout.  Stored words need a full
     * fence for that.  Where all was found set there are loads only; loads stay
     * in order behind an acquire fence, which costs nothing on x86 where the
     * full one takes as long as the rest of the mark.
     */
    if (gained) {
        hb_fence();
    } else {
        hb_read_fence();
    }
    hb_test_delay();
    hb_summarise_range(b, first / HB_BITS, last / HB_BITS);
    return gained;
}

/* The same for one group, which is what most writes are. */
static inline bool hb_mark_group(const struct hb_block *b, uint64_t group)
{
    uint64_t word = group / HB_BITS;
    bool gained = true;

    if (hb_maybe_dirty(b, word)) {
        gained = hb_or_bit(b->level[0], group);
    } else {
        atomic_fetch_or(&b->level[0][word], hb_bit(group));
    }
    HB_MAYBE_BREAK(gained);
    hb_test_delay();
    hb_summarise(b, word);
    return gained;
}

static inline bool hb_mark_items(const HBitmap *hb, const struct hb_block *b,
                                 uint64_t start, uint64_t count)
{
    uint64_t first = start >> hb->granularity;
    uint64_t last = (start + count - 1) >> hb->granularity;

    return first == last ? hb_mark_group(b, first) : hb_mark(b, first, last);
}

/* hbitmap_set ends with a call of one of these, or with none, so it has nothing
 * to keep meanwhile. */
__attribute__((noinline))
static int hb_set_groups(HBitmap *hb, const struct hb_block *b,
                         uint64_t first, uint64_t last)
{
    if (hb_mark(b, first, last)) {
        hb_count_changed(hb);
    }
    return 0;
}

/* The leaf bit was set already, or was not and is now. */
__attribute__((noinline))
static int hb_set_summarise(HBitmap *hb, const struct hb_block *b, uint64_t word)
{
    hb_summarise_words(b, word / HB_BITS, hb_bit(word));
    hb_count_changed(hb);
    return 0;
}

int hbitmap_set(HBitmap *hb, uint64_t start, uint64_t count)
{
    const struct hb_block *b = hb_block_of(hb);
    uint64_t last_item = start + count - 1, first, last, word;

    /* Also where the sum is too large, or count is 0. */
    if (last_item >= b->size || start > last_item) {
        return count ? -ERANGE : 0;
    }
    first = start >> hb->granularity;
    last = last_item >> hb->granularity;
    if (first != last) {
        return hb_set_groups(hb, b, first, last);
    }
    /* What most writes are: hb_mark_group, written out. */
    word = first / HB_BITS;
    if (hb_maybe_dirty(b, word) && hb_is_set(b->level[0], first)) {
        HB_MAYBE_BREAK(false);
        return hb_is_set(b->level[1], word) ? 0 : hb_set_summarise(hb, b, word);
    }
    atomic_fetch_or(&b->level[0][word], hb_bit(first));
    hb_test_delay();
    if (!hb_is_set(b->level[1], word)) {
        return hb_set_summarise(hb, b, word);
    }
    hb_count_changed(hb);
    return 0;
}

/* ---- many --------------------------------------------------------------- */

/*
 * How many ranges set_many takes at a time: one loop makes groups of them, the
 * next looks whether all are dirty, which is the common case.  Neither waits for
 * what it loads, so many loads are under way.
 */
enum { HB_BATCH = 32 };

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

        leaves |= starts[i] | counts[i] | rest | (rest - counts[i]);
    }
    return leaves;
}

/* HB_BATCH ranges of the caller's, of one group each, as groups.  False: some
 * are none of these, or leave the bitmap. */
static inline bool hb_single_groups(const HBitmap *hb, const struct hb_block *b,
                                    const uint64_t *starts, const uint64_t *counts,
                                    uint64_t *groups)
{
    uint64_t own[HB_BATCH], bad, more = 0;

    /* Our copies, since somebody may be changing the arrays. */
    memcpy(groups, starts, sizeof(own));
    memcpy(own, counts, sizeof(own));
    bad = hb_may_leave(b->size, groups, own, HB_BATCH);
    for (unsigned i = 0; i < HB_BATCH; i++) {
        uint64_t last = (groups[i] + own[i] - 1) >> hb->granularity;

        bad |= own[i] - 1;
        groups[i] >>= hb->granularity;
        more |= groups[i] ^ last;
    }
    return !(bad >> 63) && !more;
}

/* Are these groups set, and their words named?  If so this was a mark of each of
 * them, all of it loads. */
static inline bool hb_all_set(const struct hb_block *b, const uint64_t *groups)
{
    bool all = true;

    for (unsigned i = 0; i < HB_BATCH; i++) {
        all &= hb_is_set(b->level[0], groups[i]);
        all &= hb_is_set(b->level[1], groups[i] / HB_BITS);
    }
    return all;
}

/* Marks HB_BATCH groups; *dirty: those before were set already, as a rule these
 * are, too.  (If not, that costs a look at the leaf, see hb_maybe_dirty.) */
static bool hb_mark_batch(const struct hb_block *b, const uint64_t *groups,
                          bool *dirty)
{
    bool gained = false;

    if (*dirty && hb_all_set(b, groups)) {
        return false;
    }
    for (unsigned i = 0; i < HB_BATCH; i++) {
        __builtin_prefetch(&b->level[1][groups[i] / HB_BITS / HB_BITS]);
        __builtin_prefetch(&b->level[0][groups[i] / HB_BITS], 1);
    }
    for (unsigned i = 0; i < HB_BATCH; i++) {
        gained |= hb_mark_group(b, groups[i]);
    }
    *dirty = !gained;
    return gained;
}

int hbitmap_set_many(HBitmap *hb, const uint64_t *starts,
                     const uint64_t *counts, size_t n)
{
    const struct hb_block *b = hb_block_of(hb);
    bool gained = false, dirty = false;
    int err = 0;

    if (hb_may_leave(b->size, starts, counts, n) >> 63) {
        for (size_t i = 0; i < n; i++) {
            if (counts[i] && !hb_in_range(b, starts[i], counts[i])) {
                return -ERANGE;
            }
        }
    }
    for (size_t i = 0; i < n;) {
        uint64_t groups[HB_BATCH];
        size_t end = i + 1;

        if (n - i >= HB_BATCH) {
            end = i + HB_BATCH;
            if (hb_single_groups(hb, b, &starts[i], &counts[i], groups)) {
                gained |= hb_mark_batch(b, groups, &dirty);
                i = end;
                continue;
            }
        }
        for (; !err && i < end; i++) {
            uint64_t start = starts[i], count = counts[i];

            if (count == 0) {
                continue;
            }
            /* Again: the arrays are the caller's, who may be changing them. */
            if (hb_in_range(b, start, count)) {
                gained |= hb_mark_items(hb, b, start, count);
            } else {
                err = -ERANGE;
            }
        }
        if (err) {
            break;
        }
    }
    if (gained) {
        hb_count_changed(hb);
    }
    return err;
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

bool hb_mark_words(const struct hb_block *to, uint64_t parent, const hb_word *source,
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
    /* Loads only, if nothing was gained, some of them plain. */
    hb_read_fence();
    for (uint64_t bits = named & ~atomic_load(&to->level[1][parent]); bits;
         bits &= bits - 1) {
        if (atomic_load(&target[hb_lowest(bits)])) {
            set |= bits & (0 - bits);
        }
    }
    hb_summarise_words(to, parent, set);
    return gained;
}
