/* SPDX-License-Identifier: MIT */
/*
 * What a set is asked and told beyond whole operations: its order (rank,
 * select), the counts of operations that nobody carries out, and a flip.
 *
 * All of these hold the locks of the bitmaps that they must see whole.  They go
 * through the words that the summaries name; so the counts of a thin bitmap cost
 * what is dirty, and not the size.
 */
#include <errno.h>

#include "count.h"
#include "locks.h"

/* ---- order --------------------------------------------------------------- */

uint64_t hbitmap_rank(const HBitmap *hb, uint64_t item)
{
    HB_AT_HOME(hb, 0, hbitmap_rank, hb, item);
    uint64_t group = hb_min(item, INT64_MAX) >> hb->granularity;
    uint64_t items = hbitmap_count_range(hb, 0, (group + 1) << hb->granularity);

    /* The last group may be cut. */
    return hb_round_up(hb, items) >> hb->granularity;
}

int64_t hbitmap_select(const HBitmap *hb, uint64_t n)
{
    HB_AT_HOME(hb, -1, hbitmap_select, hb, n);
    /* What is counted at a time: less, once the group is in it. */
    uint64_t step = HB_BITS * HB_BITS;
    const struct hb_block *b;
    int64_t item = -1;

    hb_lock(hb, HB_READ);
    b = hb_block_of(hb);
    for (uint64_t word = hb_next_bit(b, 1, 0); word != HB_NONE;
         word = hb_next_bit(b, 1, word)) {
        uint64_t stop = hb_many_end(b, HB_SOME, word, hb_min(word + step, b->nwords[0]));
        uint64_t nwords = stop > word ? stop - word : 1;
        uint64_t groups = hb_popcount_words(&b->level[0][word], nwords);

        if (n >= groups) {
            n -= groups;
            word += nwords;
        } else if (nwords > 1) {
            step = nwords / 2;
        } else {
            uint64_t bits = atomic_load(&b->level[0][word]);

            for (; n; n--) {
                bits &= bits - 1;
            }
            item = (int64_t)((word * HB_BITS + hb_lowest(bits)) << hb->granularity);
            break;
        }
    }
    hb_unlock(hb);
    return item;
}

/* ---- counts of operations ------------------------------------------------ */

enum hb_kind { HB_BOTH, HB_EITHER, HB_FIRST_ONLY, HB_ONE_ONLY };

#define HB_INLINE static inline __attribute__((always_inline))

HB_INLINE uint64_t hb_of_kind(enum hb_kind kind, uint64_t a, uint64_t b)
{
    switch (kind) {
    case HB_BOTH:
        return a & b;
    case HB_EITHER:
        return a | b;
    case HB_FIRST_ONLY:
        return a & ~b;
    case HB_ONE_ONLY:
        return a ^ b;
    }
    return 0;
}

/* Which words a summary of a and one of b say may have such groups. */
HB_INLINE uint64_t hb_may_have(enum hb_kind kind, uint64_t a, uint64_t b)
{
    return kind == HB_BOTH ? a & b : kind == HB_FIRST_ONLY ? a : a | b;
}

/* The first leaf word at or after `word` under a summary word of such. */
HB_INLINE uint64_t hb_next_of_kind(enum hb_kind kind, const struct hb_block *x,
                                   const struct hb_block *y, uint64_t word)
{
    uint64_t a = hb_next_bit(x, 1, word), b;

    if (kind == HB_FIRST_ONLY) {
        return a;
    }
    b = hb_next_bit(y, 1, word);
    if (kind != HB_BOTH) {
        return hb_min(a, b);
    }
    while (a != HB_NONE && b != HB_NONE && a / HB_BITS != b / HB_BITS) {
        if (a < b) {
            a = hb_next_bit(x, 1, b / HB_BITS * HB_BITS);
        } else {
            b = hb_next_bit(y, 1, a / HB_BITS * HB_BITS);
        }
    }
    return a == HB_NONE || b == HB_NONE ? HB_NONE : a;
}

HB_INLINE int64_t hb_count_kind(enum hb_kind kind, const HBitmap *a, const HBitmap *b)
{
    int64_t groups = -EINVAL;

    hb_lock_all(a, b, NULL);
    if (hb_same_shape(a, b)) {
        const struct hb_block *x = hb_block_of(a), *y = hb_block_of(b);

        groups = 0;
        for (uint64_t word = hb_next_of_kind(kind, x, y, 0); word != HB_NONE;
             word = hb_next_of_kind(kind, x, y, word)) {
            uint64_t parent = word / HB_BITS, at = parent * HB_BITS;
            uint64_t named = hb_may_have(kind, atomic_load(&x->level[1][parent]),
                                         atomic_load(&y->level[1][parent]));
            uint64_t found[HB_BITS], n = 0;

            if (hb_many(named, HB_MANY)) {
                /* Plain loads (words.h): of what is marked meanwhile there is no
                 * right number. */
                const hb_plain *p = (const hb_plain *)&x->level[0][at];
                const hb_plain *q = (const hb_plain *)&y->level[0][at];

                n = hb_min(HB_BITS, x->nwords[0] - at);
                for (uint64_t i = 0; i < n; i++) {
                    found[i] = hb_of_kind(kind, p[i], q[i]);
                }
            } else {
                for (; named; named &= named - 1) {
                    uint64_t i = at + hb_lowest(named);

                    found[n++] = hb_of_kind(kind, atomic_load(&x->level[0][i]),
                                            atomic_load(&y->level[0][i]));
                }
            }
            groups += (int64_t)hb_popcount_words((const hb_word *)found, n);
            word = at + HB_BITS;
        }
    }
    hb_unlock_all(a, b, NULL);
    return groups;
}

int64_t hbitmap_intersection_count(const HBitmap *a, const HBitmap *b)
{
    HB_TOGETHER((a, b), -EXDEV, hbitmap_intersection_count, a, b);
    return hb_count_kind(HB_BOTH, a, b);
}

int64_t hbitmap_union_count(const HBitmap *a, const HBitmap *b)
{
    HB_TOGETHER((a, b), -EXDEV, hbitmap_union_count, a, b);
    return hb_count_kind(HB_EITHER, a, b);
}

/* A mark that reaches both between the two loads must not show a bitmap as
 * different from itself. */

int64_t hbitmap_difference_count(const HBitmap *a, const HBitmap *b)
{
    HB_TOGETHER((a, b), -EXDEV, hbitmap_difference_count, a, b);
    return a == b ? 0 : hb_count_kind(HB_FIRST_ONLY, a, b);
}

int64_t hbitmap_symmetric_difference_count(const HBitmap *a, const HBitmap *b)
{
    HB_TOGETHER((a, b), -EXDEV, hbitmap_symmetric_difference_count, a, b);
    return a == b ? 0 : hb_count_kind(HB_ONE_ONLY, a, b);
}

/* ---- flip ---------------------------------------------------------------- */

/*
 * Each word is changed by its difference, as in hb_combine (ops.c): bits to set
 * are or'ed in, bits to go are and'ed out.  So a mark of a group that was clean
 * when its word was looked at stays.
 */
static void hb_flip_words(const struct hb_block *b, uint64_t first, uint64_t last)
{
    struct hb_gone gone = { 0, 0 };
    uint64_t word = first / HB_BITS, tail = last / HB_BITS;

    while (word <= tail) {
        uint64_t parent = word / HB_BITS, set = 0, empty = 0;

        for (; word <= tail && word / HB_BITS == parent; word++) {
            hb_word *leaf = &b->level[0][word];
            uint64_t mask = hb_mask(word, first, last), old = atomic_load(leaf);

            if (old & mask) {
                atomic_fetch_and(leaf, ~(old & mask));
            }
            if (mask & ~old) {
                atomic_fetch_or(leaf, mask & ~old);
            }
            if (old ^ mask) {
                set |= hb_bit(word);
            } else {
                empty |= hb_bit(word);
            }
        }
        hb_test_delay();
        empty &= atomic_load(&b->level[1][parent]);
        if (set) {
            hb_summarise_words(b, parent, set);
        }
        if (empty) {
            hb_unsummarise(b, parent, empty, &gone);
        }
        hb_note(b, parent);
    }
    hb_unsummarise_above(b, &gone);
}

/* What the words under word `parent` of level 1 have: nothing, everything, or
 * both clean groups and dirty ones. */
enum hb_content { HB_CLEAN, HB_FULL, HB_MIXED };

static enum hb_content hb_content(const struct hb_block *b, uint64_t parent)
{
    uint64_t named = atomic_load(&b->level[1][parent]), at = parent * HB_BITS;

    if (!named) {
        return HB_CLEAN;
    }
    return named == UINT64_MAX && hb_all_ones(&b->level[0][at], HB_BITS) ? HB_FULL
                                                                         : HB_MIXED;
}

/* The same for the groups [first, last]: what is clean in one go, what is full too. */
static void hb_flip(const struct hb_block *b, uint64_t first, uint64_t last)
{
    const uint64_t under = HB_BITS * HB_BITS, end = last / under;

    for (uint64_t parent = first / under, stop; parent <= end; parent = stop) {
        enum hb_content content = hb_content(b, parent);
        uint64_t from, to;

        for (stop = parent + 1; stop <= end && hb_content(b, stop) == content; stop++) {
        }
        from = parent * under > first ? parent * under : first;
        to = hb_min(stop * under - 1, last);
        if (content == HB_CLEAN) {
            (void)hb_mark(b, from, to);
        } else if (content == HB_FULL) {
            hb_clear(b, from, to);
        } else {
            hb_flip_words(b, from, to);
        }
    }
}

int hbitmap_flip(HBitmap *hb, uint64_t start, uint64_t count)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_flip, hb, start, count);
    const struct hb_block *b;
    uint64_t first, last;
    int err;

    if (count == 0) {
        return 0;
    }
    hb_lock(hb, HB_CHANGE);
    b = hb_block_of(hb);
    err = hb_whole_groups(hb, b, start, count, &first, &last);
    if (!err) {
        hb_flip(b, first, last);
    }
    hb_unlock(hb);
    return err;
}
