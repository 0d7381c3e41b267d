/* SPDX-License-Identifier: MIT */
/*
 * What is asked of a set, and what is made of one or of two: its order (rank,
 * select); the counts of operations that nobody carries out; operations whose
 * result is a new bitmap; a flip.  (Operations into a bitmap that is there are in
 * ops.c.)
 *
 * All of these hold the locks of the bitmaps that they must see whole.  They go
 * through the words that the summaries name; so what is thin costs what is dirty,
 * and not the size.
 */
#include <errno.h>

#include "count.h"
#include "locks.h"
#include "pages.h"

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

/* ---- two bitmaps, word by word ------------------------------------------- */

/* Where one of them may be, as a summary of a and one of b tell. */
#define HB_INLINE static inline __attribute__((always_inline))

HB_INLINE uint64_t hb_may_be(enum hb_kind kind, uint64_t a, uint64_t b)
{
    return kind == HB_BOTH ? a & b : kind == HB_FIRST_ONLY ? a : a | b;
}

/* Goes over the words of level 1, of both bitmaps at once, and over level 2 to find
 * them; what is to be done at each word costs little more than this. */
struct hb_walk {
    const struct hb_block *a, *b;
    uint64_t above;             /* a word of level 2 */
    uint64_t parents;           /* what is left of it: words of level 1 */
    uint64_t parent;            /* such a word, what it names in a and in b, */
    uint64_t in_a, in_b;
    uint64_t named;             /* and where some of the kind may be */
};

HB_INLINE bool hb_walk_above(enum hb_kind kind, struct hb_walk *walk)
{
    if (walk->a->nlevels == HB_MIN_LEVELS) {
        walk->parents = walk->above++ == HB_NONE;
        return walk->parents != 0;
    }
    while (++walk->above < walk->a->nwords[2]) {
        uint64_t first = walk->above * HB_BITS;
        uint64_t next = hb_next_bit(walk->a, 2, first);

        /* The next one that may have some; of b, too, unless it does not count. */
        if (kind != HB_FIRST_ONLY && next / HB_BITS > walk->above) {
            uint64_t other = hb_next_bit(walk->b, 2, first);

            next = kind == HB_BOTH ? (next > other ? next : other) : hb_min(next, other);
        }
        if (next == HB_NONE) {
            break;
        }
        walk->above = next / HB_BITS;
        walk->parents = hb_may_be(kind, atomic_load(&walk->a->level[2][walk->above]),
                                  atomic_load(&walk->b->level[2][walk->above]));
        if (walk->parents) {
            return true;
        }
    }
    return false;
}

HB_INLINE bool hb_walk_on(enum hb_kind kind, struct hb_walk *walk)
{
    do {
        if (!walk->parents && !hb_walk_above(kind, walk)) {
            return false;
        }
        walk->parent = (walk->a->nlevels == HB_MIN_LEVELS ? 0 : walk->above * HB_BITS) +
                       hb_lowest(walk->parents);
        walk->parents &= walk->parents - 1;
        walk->in_a = atomic_load(&walk->a->level[1][walk->parent]);
        walk->in_b = atomic_load(&walk->b->level[1][walk->parent]);
        walk->named = hb_may_be(kind, walk->in_a, walk->in_b);
    } while (!walk->named);
    return true;
}

static struct hb_walk hb_walk_over(const HBitmap *a, const HBitmap *b)
{
    return (struct hb_walk){ .a = hb_block_of(a), .b = hb_block_of(b), .above = HB_NONE };
}

/*
 * The leaf words of that kind where the walk is, and their number: all of those under
 * the summary word, or the named ones alone.  (Plain loads, see words.h: of what is
 * marked meanwhile there is no right answer.)
 */
HB_INLINE uint64_t hb_walk_words(enum hb_kind kind, const struct hb_walk *walk, bool many,
                                 uint64_t *words)
{
    const uint64_t at = walk->parent * HB_BITS;
    const hb_plain *a = (const hb_plain *)&walk->a->level[0][at];
    const hb_plain *b = (const hb_plain *)&walk->b->level[0][at];
    uint64_t n = 0;

    if (many) {
        /* Memory comes faster the fewer lines are left out. */
        n = hb_min(HB_BITS, walk->a->nwords[0] - at);
        for (uint64_t i = 0; i < n; i++) {
            words[i] = hb_of_kind(kind, a[i], b[i]);
        }
        return n;
    }
    for (uint64_t named = walk->named; named; named &= named - 1) {
        const unsigned i = hb_lowest(named);

        /* What is not named is zero, and to look would cost a cache line, or a page. */
        words[n++] = hb_of_kind(kind, walk->in_a >> i & 1 ? a[i] : 0,
                                walk->in_b >> i & 1 ? b[i] : 0);
    }
    return n;
}

/* ---- counts of operations ------------------------------------------------ */

HB_INLINE int64_t hb_count_kind(enum hb_kind kind, const HBitmap *a, const HBitmap *b)
{
    int64_t groups = -EINVAL;

    hb_lock_all(a, b, NULL);
    if (hb_same_shape(a, b)) {
        struct hb_walk walk = hb_walk_over(a, b);
        uint64_t words[16 * HB_BITS], n = 0;

        groups = 0;
        while (hb_walk_on(kind, &walk)) {
            n += hb_walk_words(kind, &walk, hb_many(walk.named, HB_SOME), &words[n]);
            if (n > 15 * HB_BITS) {
                groups += (int64_t)hb_popcount_words((const hb_word *)words, n);
                n = 0;
            }
        }
        groups += (int64_t)hb_popcount_words((const hb_word *)words, n);
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

/* ---- new bitmaps --------------------------------------------------------- */

/* Into a clean bitmap that nobody else sees yet, so no protocol is needed. */
HB_INLINE void hb_fill_kind(enum hb_kind kind, struct hb_walk *walk, const struct hb_block *to)
{
    while (hb_walk_on(kind, walk)) {
        bool many = hb_many(walk->named, HB_SOME);
        uint64_t words[HB_BITS], set = 0, bit = walk->parent;
        uint64_t n = hb_walk_words(kind, walk, many, words);
        hb_word *leaf = &to->level[0][walk->parent * HB_BITS];

        if (many) {
            set = hb_nonzero(words, n);
            if (set) {
                hb_copy_words(leaf, words, n);
            }
        } else {
            uint64_t named = walk->named;

            /* A word that stays zero takes no memory. */
            for (uint64_t i = 0; i < n; i++, named &= named - 1) {
                if (words[i]) {
                    atomic_store_explicit(&leaf[hb_lowest(named)], words[i],
                                          memory_order_relaxed);
                    set |= named & (0 - named);
                }
            }
        }
        if (!set) {
            continue;
        }
        atomic_store_explicit(&to->level[1][bit], set, memory_order_relaxed);
        for (unsigned k = 2; k < to->nlevels; k++, bit /= HB_BITS) {
            hb_word *above = &to->level[k][bit / HB_BITS];

            atomic_store_explicit(above, hb_bit(bit) |
                                         atomic_load_explicit(above, memory_order_relaxed),
                                  memory_order_relaxed);
        }
    }
    hb_note_named(to);
}

/* How many leaf words may have some of that kind. */
HB_INLINE uint64_t hb_words_that_may(enum hb_kind kind, const struct hb_block *a,
                                     const struct hb_block *b)
{
    const hb_plain *in_a = (const hb_plain *)a->level[1];
    const hb_plain *in_b = (const hb_plain *)b->level[1];
    uint64_t words = 0, named[HB_BITS];

    for (uint64_t at = 0; at < a->nwords[1]; at += HB_BITS) {
        uint64_t n = hb_min(HB_BITS, a->nwords[1] - at);

        for (uint64_t i = 0; i < n; i++) {
            named[i] = hb_may_be(kind, in_a[at + i], in_b[at + i]);
        }
        words += hb_popcount_words((const hb_word *)named, n);
    }
    return words;
}

/*
 * In how many pieces of 4 KiB the result will have something, more or less: all, where
 * at least half of the words may have some.  Else, where an operand has something,
 * that goes only by groups that are in both.
 */
HB_INLINE uint64_t hb_least_pages(enum hb_kind kind, const HBitmap *a, const HBitmap *b)
{
    struct hb_walk walk = hb_walk_over(a, b);
    uint64_t pages = hb_pages_named(walk.a), words[HB_BITS], both = 0;

    if (!hb_nearly_all(pages, walk.a->nwords[0])) {     /* then it is of no use, see hb_will_fill */
        return 0;
    }
    if (hb_words_that_may(kind, walk.a, walk.b) >= walk.a->nwords[0] / 2) {
        return hb_pages(walk.a->nwords[0]);
    }
    while (kind != HB_BOTH && both < pages && hb_walk_on(HB_BOTH, &walk)) {
        uint64_t n = hb_walk_words(HB_BOTH, &walk, false, words);

        both += hb_popcount_words((const hb_word *)words, n);
    }
    return kind != HB_BOTH && both < pages ? pages - both : 0;
}

HB_INLINE HBitmap *hb_make_kind(enum hb_kind kind, const HBitmap *a, const HBitmap *b)
{
    HBitmap *result = NULL;
    int err = EINVAL;

    hb_lock_all(a, b, NULL);
    if (hb_same_shape(a, b)) {
        result = hb_new_like(a, false);
        err = errno;
        if (result && a != b) {
            struct hb_walk walk = hb_walk_over(a, b);
            const struct hb_block *to = hb_block_of(result);
            bool filling = hb_will_fill(to, to->nwords[0], hb_least_pages(kind, a, b));

            hb_fill_kind(kind, &walk, to);
            if (filling) {
                hb_filled(to);
            }
        } else if (result && kind == HB_BOTH) {
            struct hb_walk walk = hb_walk_over(a, a);

            hb_fill_kind(HB_BOTH, &walk, hb_block_of(result));
        }
    }
    hb_unlock_all(a, b, NULL);
    if (!result) {
        errno = err;
    }
    return result;
}

HBitmap *hbitmap_intersection(const HBitmap *a, const HBitmap *b)
{
    HB_TOGETHER((a, b), NULL, hbitmap_intersection, a, b);
    return hb_make_kind(HB_BOTH, a, b);
}

HBitmap *hbitmap_difference(const HBitmap *a, const HBitmap *b)
{
    HB_TOGETHER((a, b), NULL, hbitmap_difference, a, b);
    return hb_make_kind(HB_FIRST_ONLY, a, b);
}

HBitmap *hbitmap_symmetric_difference(const HBitmap *a, const HBitmap *b)
{
    HB_TOGETHER((a, b), NULL, hbitmap_symmetric_difference, a, b);
    return hb_make_kind(HB_ONE_ONLY, a, b);
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
        hb_note(b, parent);
        if (empty) {
            hb_unsummarise(b, parent, empty, &gone);
        }
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
    return hb_change_groups(hb, start, count, hb_flip);
}
