/* SPDX-License-Identifier: MIT */
/*
 * Whole bitmaps: comparing, merging and the other set operations.
 *
 * They go through the words that the summaries name, so their cost follows
 * what is dirty and not the size.  They hold the locks of all bitmaps that they
 * must see whole: beside a clear a word may for a moment lack its summary bit.
 * Marks run on meanwhile, and none is lost.
 */
#include <errno.h>

#include "count.h"
#include "locks.h"
#include "pages.h"

/* ---- two bitmaps, word by word ------------------------------------------ */

/* The first leaf word at or after `word` that one of them has a summary bit
 * for (NULL: is not asked), or HB_NONE.  Same shape. */
static uint64_t hb_next_word(const struct hb_block *a, const struct hb_block *b,
                             const struct hb_block *c, uint64_t word)
{
    uint64_t next = hb_next_bit(a, 1, word);

    if (b && next != word) {
        next = hb_min(next, hb_next_bit(b, 1, word));
    }
    if (c && next != word) {
        next = hb_min(next, hb_next_bit(c, 1, word));
    }
    return next;
}

int hbitmap_equal(const HBitmap *a, const HBitmap *b)
{
    HB_TOGETHER((a, b), -EXDEV, hbitmap_equal, a, b);
    bool equal;

    hb_lock_all(a, b, NULL);
    equal = hb_same_shape(a, b);
    if (equal && a != b) {
        const struct hb_block *x = hb_block_of(a), *y = hb_block_of(b);

        for (uint64_t word = hb_next_word(x, y, NULL, 0);
             equal && word != HB_NONE;
             word = hb_next_word(x, y, NULL, word + 1)) {
            equal = atomic_load(&x->level[0][word]) ==
                    atomic_load(&y->level[0][word]);
        }
    }
    hb_unlock_all(a, b, NULL);
    return equal;
}

/* Is no bit of a among b's bits, each flipped by `flip`? */
static int hb_none_in(const HBitmap *a, const HBitmap *b, uint64_t flip)
{
    int none = -EINVAL;

    hb_lock_all(a, b, NULL);
    if (hb_same_shape(a, b)) {
        const struct hb_block *x = hb_block_of(a), *y = hb_block_of(b);

        none = 1;
        for (uint64_t word = hb_next_bit(x, 1, 0); none && word != HB_NONE;
             word = hb_next_bit(x, 1, word + 1)) {
            none = !(atomic_load(&x->level[0][word]) &
                     (atomic_load(&y->level[0][word]) ^ flip));
        }
    }
    hb_unlock_all(a, b, NULL);
    return none;
}

int hbitmap_is_subset(const HBitmap *a, const HBitmap *b)
{
    HB_TOGETHER((a, b), -EXDEV, hbitmap_is_subset, a, b);
    /* A mark that reaches both between the two loads must not show a bitmap
     * as no subset of itself. */
    return a == b ? 1 : hb_none_in(a, b, UINT64_MAX);
}

int hbitmap_is_disjoint(const HBitmap *a, const HBitmap *b)
{
    HB_TOGETHER((a, b), -EXDEV, hbitmap_is_disjoint, a, b);
    return hb_none_in(a, b, 0);
}

/* ---- set operations ----------------------------------------------------- */

/*
 * result = those of a kind, for the words `named` under word `parent` of level 1.
 *
 * Each word of the result is changed by its difference: bits to set are or'ed
 * in, bits to go are and'ed out.  So a mark that comes in between stays, also
 * where the result is a or b.
 */
static void hb_combine_piece(enum hb_kind kind, const struct hb_block *a,
                             const struct hb_block *b, const struct hb_block *result,
                             uint64_t parent, uint64_t named, struct hb_gone *gone)
{
    uint64_t set = 0, empty = 0;
    bool changed = false;

    for (; named; named &= named - 1) {
        uint64_t word = parent * HB_BITS + hb_lowest(named);
        hb_word *leaf = &result->level[0][word];
        uint64_t old = atomic_load(leaf);
        /* One load each: the same word must not differ from itself. */
        uint64_t va = a == result ? old : atomic_load(&a->level[0][word]);
        uint64_t vb = b == result ? old : b == a ? va : atomic_load(&b->level[0][word]);
        uint64_t new = hb_of_kind(kind, va, vb);

        changed |= old != new;
        if (old & ~new) {
            old = atomic_fetch_and(leaf, ~(old & ~new)) & new;
        }
        if (new & ~old) {
            atomic_fetch_or(leaf, new & ~old);
        }
        set |= new ? hb_bit(word) : 0;
        empty |= new ? 0 : hb_bit(word);
    }
    empty &= atomic_load(&result->level[1][parent]);
    if (set) {
        hb_summarise_words(result, parent, set);
    }
    if (changed) {
        hb_note(result, parent);
    }
    if (empty) {
        hb_unsummarise(result, parent, empty, gone);
    }
}

/* result = the groups of a kind in a and b, all of one shape; the caller holds the locks. */
static void hb_combine(enum hb_kind kind, const struct hb_block *a,
                       const struct hb_block *b, const struct hb_block *result)
{
    /* Words that only the result names change too, unless it is an operand and
     * so has them named by it; words that only one operand names stay as they
     * are where the other operand is the result. */
    const struct hb_block *x = a, *y = b, *z = result;
    struct hb_gone gone = { 0, 0 };

    if (result == a) {
        x = kind == HB_BOTH ? a : b;
        y = z = NULL;
    } else if (result == b) {
        x = kind == HB_BOTH ? b : a;
        y = kind == HB_FIRST_ONLY ? b : NULL;
        z = NULL;
    }
    for (uint64_t next = hb_next_word(x, y, z, 0); next != HB_NONE;
         next = hb_next_word(x, y, z, next)) {
        uint64_t parent = next / HB_BITS;
        uint64_t named = atomic_load(&x->level[1][parent]);

        named |= y ? atomic_load(&y->level[1][parent]) : 0;
        named |= z ? atomic_load(&z->level[1][parent]) : 0;
        hb_combine_piece(kind, a, b, result, parent, named, &gone);
        next = (parent + 1) * HB_BITS;
    }
    hb_unsummarise_above(result, &gone);
}

/*
 * hb_mark_words from `word` on, the first under its summary word, as far as there
 * are many; for one thread alone.  Where it ended: at `word`, if there are few.
 */
static uint64_t hb_merge_alone(const struct hb_block *from, const struct hb_block *to,
                               uint64_t word)
{
    uint64_t most = hb_min(from->nwords[0], word + HB_BITS * HB_BITS);
    uint64_t end = hb_many_end(from, HB_MANY, word, most);

    if (end > word &&
        hb_gain_words(&to->level[0][word], &from->level[0][word], end - word)) {
        hb_note_range(to, word / HB_BITS, (end - 1) / HB_BITS);
    }
    for (uint64_t at = word; at < end; at += HB_BITS) {
        uint64_t parent = at / HB_BITS, named = atomic_load(&from->level[1][parent]);

        if (named & ~atomic_load(&to->level[1][parent])) {
            /* A bit over a word that is zero does no harm. */
            hb_summarise_words(to, parent, named);
        }
    }
    return end;
}

/* Marks in `to` what is dirty in `from`, of one shape; the caller holds the lock
 * of `from`. */
static void hb_or_into(const struct hb_block *from, const struct hb_block *to)
{
    const bool alone = hb_alone();

    for (uint64_t next = hb_next_bit(from, 1, 0); next != HB_NONE;
         next = hb_next_bit(from, 1, next)) {
        uint64_t parent = next / HB_BITS, at = parent * HB_BITS;

        next = alone ? hb_merge_alone(from, to, at) : at;
        if (next == at) {
            hb_mark_words(to, parent, &from->level[0][at],
                          atomic_load(&from->level[1][parent]));
            next = at + HB_BITS;
        }
    }
}

/* How far from leaf word `word`, the first under its summary word, a and b name
 * all words together, at most 4096 words. */
static uint64_t hb_full_end(const struct hb_block *a, const struct hb_block *b,
                            uint64_t word)
{
    uint64_t end = hb_min(word + HB_BITS * HB_BITS, a->nwords[0]), stop = word;

    while (stop + HB_BITS <= end &&
           (atomic_load(&a->level[1][stop / HB_BITS]) |
            atomic_load(&b->level[1][stop / HB_BITS])) == UINT64_MAX) {
        stop += HB_BITS;
    }
    return stop;
}

/* The words under `parent`: those that a or b name, and those that only the
 * result does.  Answers which of them are not zero now. */
static uint64_t hb_overwrite_few(const struct hb_block *a, const struct hb_block *b,
                                 const struct hb_block *result, uint64_t parent,
                                 uint64_t named, uint64_t stale)
{
    uint64_t at = parent * HB_BITS, set = 0;
    const hb_word *x = &a->level[0][at], *y = &b->level[0][at];
    hb_word *words = &result->level[0][at];

    if (hb_many(named, HB_MANY)) {
        uint64_t n = hb_min(HB_BITS, result->nwords[0] - at);

        hb_or_words(words, x, y, n);
        /* Also where a mark has not come to the summary of a or b yet. */
        return hb_nonzero(words, n);
    }
    for (uint64_t bits = named; bits; bits &= bits - 1) {
        unsigned i = hb_lowest(bits);
        uint64_t value = atomic_load(&x[i]) | atomic_load(&y[i]);

        atomic_store_explicit(&words[i], value, HB_BULK);
        set |= value ? hb_bit(i) : 0;
    }
    for (uint64_t bits = stale; bits; bits &= bits - 1) {
        atomic_store_explicit(&words[hb_lowest(bits)], 0, HB_BULK);
    }
    return set;
}

/*
 * result = a or b, another one, all of one shape; the caller holds the locks.
 *
 * What the result had is overwritten, so its words are stored: a mark that is
 * wiped out came before, one that comes after finds its way as after any clear.
 * The bits above follow, without a fence, since the second look is at the word
 * that was stored: those of words that are not zero are set, the others taken.
 */
static void hb_overwrite(const struct hb_block *a, const struct hb_block *b,
                         const struct hb_block *result)
{
    struct hb_gone gone = { 0, 0 };

    for (uint64_t next = hb_next_word(a, b, result, 0); next != HB_NONE;
         next = hb_next_word(a, b, result, next)) {
        uint64_t parent = next / HB_BITS, at = parent * HB_BITS;
        uint64_t stop = hb_full_end(a, b, at);
        uint64_t set[HB_BITS], stale[HB_BITS];
        unsigned n = 0;

        if (stop > at) {
            hb_or_words(&result->level[0][at], &a->level[0][at], &b->level[0][at],
                        stop - at);
            /* A bit over a word that is zero by now does no harm. */
            hb_summarise_range(result, at, stop - 1);
            hb_note_range(result, parent, (stop - 1) / HB_BITS);
            next = stop;
            continue;
        }
        /* Up to 4096 words, then their summaries. */
        for (; n < HB_BITS && parent + n < result->nwords[1]; n++) {
            uint64_t named = atomic_load(&a->level[1][parent + n]) |
                             atomic_load(&b->level[1][parent + n]);

            stale[n] = atomic_load(&result->level[1][parent + n]) | named;
            set[n] = stale[n] ? hb_overwrite_few(a, b, result, parent + n, named,
                                                 stale[n] & ~named) : 0;
        }
        hb_test_delay();
        for (unsigned i = 0; i < n; i++) {
            uint64_t empty;

            if (!stale[i]) {
                continue;
            }
            if (set[i]) {
                hb_summarise_words(result, parent + i, set[i]);
            }
            empty = atomic_load(&result->level[1][parent + i]) & stale[i] & ~set[i];
            if (empty) {
                hb_unsummarise(result, parent + i, empty, &gone);
            }
        }
        hb_note_range(result, parent, parent + n - 1);
        next = at + n * HB_BITS;
    }
    hb_unsummarise_above(result, &gone);
}

/* How many pages their union has something in, at least. */
static uint64_t hb_pages_of_union(const struct hb_block *a, const struct hb_block *b)
{
    uint64_t pages = hb_pages_named(a);
    uint64_t more = b != a ? hb_pages_named(b) : 0;

    return more > pages ? more : pages;
}

/* result = a or b, all of one shape; the caller holds the locks. */
static void hb_merge_words(const struct hb_block *a, const struct hb_block *b,
                           const HBitmap *result)
{
    const struct hb_block *r = hb_block_of(result);
    const struct hb_block *more = r == a ? b : a;
    bool filling;

    if (r == a && r == b) {
        return;
    }
    if (r == a || r == b) {
        filling = hb_will_fill(r, r->nwords[0], hb_pages_named(more));
        hb_or_into(more, r);
    } else {
        filling = hb_will_fill(r, r->nwords[0], hb_pages_of_union(a, b));
        hb_overwrite(a, b, r);
    }
    if (filling) {
        hb_filled(r);
    }
}

/* Marks in `to` what is dirty in `from`, of any granularity; the caller holds
 * the lock of `from`. */
static void hb_or_areas(const HBitmap *from, const HBitmap *to)
{
    const struct hb_block *b = hb_block_of(to);
    uint64_t next = 0, areas[2 * HB_BITS];
    size_t n;

    while ((n = hbitmap_areas(from, next, UINT64_MAX, areas, HB_BITS, &next)) != 0) {
        for (size_t i = 0; i < n; i++) {
            uint64_t start = areas[2 * i], last = start + areas[2 * i + 1] - 1;

            (void)hb_mark(b, start >> to->granularity, last >> to->granularity);
        }
    }
}

/* result = a or b, of any granularities; the caller holds the locks. */
static void hb_merge_areas(const HBitmap *a, const HBitmap *b, const HBitmap *result)
{
    const struct hb_block *r = hb_block_of(result);

    if (a != result && b != result && r->ngroups) {
        hb_clear(r, 0, r->ngroups - 1);
    }
    if (a != result) {
        hb_or_areas(a, result);
    }
    if (b != result && b != a) {
        hb_or_areas(b, result);
    }
}

/* result = a or b, of one size; the caller holds the locks. */
static void hb_merge(const HBitmap *a, const HBitmap *b, const HBitmap *result)
{
    if (hb_same_shape(a, result) && hb_same_shape(b, result)) {
        hb_merge_words(hb_block_of(a), hb_block_of(b), result);
    } else {
        hb_merge_areas(a, b, result);
    }
}

int hbitmap_merge(const HBitmap *a, const HBitmap *b, HBitmap *result)
{
    HB_TOGETHER((a, b, result), -EXDEV, hbitmap_merge, a, b, result);
    uint64_t size;
    int err = 0;

    hb_lock_all(a, b, result);
    size = hbitmap_size(result);
    if (hbitmap_size(a) != size || hbitmap_size(b) != size) {
        err = -EINVAL;
    } else {
        hb_merge(a, b, result);
    }
    hb_unlock_all(a, b, result);
    return err;
}

void hbitmap_put_back(HBitmap **pair)
{
    HBitmap *into = pair[0];
    int64_t start = 0, count;

    pair[0] = NULL;
    if (!into || hbitmap_merge(into, pair[1], into) == 0) {
        return;
    }
    /* It was truncated meanwhile. */
    while (hbitmap_next_dirty_area(pair[1], start, (int64_t)hbitmap_size(into), INT64_MAX,
                                   &start, &count)) {
        (void)hbitmap_set(into, (uint64_t)start, (uint64_t)count);
        start += count;
    }
}

HBitmap *hbitmap_union(const HBitmap *a, const HBitmap *b)
{
    HB_TOGETHER((a, b), NULL, hbitmap_union, a, b);
    HBitmap *result = NULL;
    int err = EINVAL;

    hb_lock_all(a, b, NULL);
    if (hbitmap_size(a) == hbitmap_size(b)) {
        const struct hb_block *x = hb_block_of(a);
        uint64_t pages = hb_pages_of_union(x, hb_block_of(b));

        result = hb_new_like(a, hb_same_shape(a, b) && hb_nearly_all(pages, x->nwords[0]));
        err = errno;
        if (result) {
            hb_merge(a, b, result);
        }
    }
    hb_unlock_all(a, b, NULL);
    if (!result) {
        errno = err;
    }
    return result;
}

static int hb_operate(enum hb_kind kind, const HBitmap *a, const HBitmap *b,
                      HBitmap *result)
{
    int err = -EINVAL;

    hb_lock_all(a, b, result);
    if (hb_same_shape(a, result) && hb_same_shape(b, result)) {
        err = 0;
        hb_combine(kind, hb_block_of(a), hb_block_of(b), hb_block_of(result));
    }
    hb_unlock_all(a, b, result);
    return err;
}

int hbitmap_and(const HBitmap *a, const HBitmap *b, HBitmap *result)
{
    HB_TOGETHER((a, b, result), -EXDEV, hbitmap_and, a, b, result);
    return hb_operate(HB_BOTH, a, b, result);
}

int hbitmap_andnot(const HBitmap *a, const HBitmap *b, HBitmap *result)
{
    HB_TOGETHER((a, b, result), -EXDEV, hbitmap_andnot, a, b, result);
    return hb_operate(HB_FIRST_ONLY, a, b, result);
}

int hbitmap_xor(const HBitmap *a, const HBitmap *b, HBitmap *result)
{
    HB_TOGETHER((a, b, result), -EXDEV, hbitmap_xor, a, b, result);
    return hb_operate(HB_ONE_ONLY, a, b, result);
}
