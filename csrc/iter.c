/* SPDX-License-Identifier: MIT */
/*
 * Searches: the next dirty or clean item, areas, iterators.
 *
 * They take no lock and remember nothing but a position, so whatever happens
 * to the bitmap between two calls they go on from there with what is set by
 * then.  A summary bit over a zero word sends them down in vain, no more.
 */
#include "internal.h"

uint64_t hb_next_bit(const struct hb_block *b, unsigned k, uint64_t bit)
{
    const unsigned lowest = k;
    uint64_t word = bit / HB_BITS, value;

    if (word >= b->nwords[k]) {
        return HB_NONE;
    }
    value = atomic_load(&b->level[k][word]) & hb_mask_from(bit);
    while (!value) {
        /* Up, until a level has something further on ... */
        do {
            bit = word + 1;
            word = bit / HB_BITS;
            if (++k == b->nlevels || word >= b->nwords[k]) {
                return HB_NONE;
            }
            value = atomic_load(&b->level[k][word]) & hb_mask_from(bit);
        } while (!value);
        /* ... and down to it, or to the zero word under a stale bit. */
        do {
            word = word * HB_BITS + hb_lowest(value);
            value = atomic_load(&b->level[--k][word]);
        } while (value && k > lowest);
    }
    return word * HB_BITS + hb_lowest(value);
}

/* The first dirty, or clean, group at or after `group` and below `limit`;
 * `limit` if there is none. */
static uint64_t hb_next_dirty(const struct hb_block *b, uint64_t group,
                              uint64_t limit)
{
    return hb_min(hb_next_bit(b, 0, group), limit);
}

static uint64_t hb_next_clean(const struct hb_block *b, uint64_t group,
                              uint64_t limit)
{
    uint64_t mask = hb_mask_from(group);

    for (uint64_t word = group / HB_BITS; word * HB_BITS < limit; word++) {
        uint64_t clean = ~atomic_load(&b->level[0][word]) & mask;

        if (clean) {
            return hb_min(word * HB_BITS + hb_lowest(clean), limit);
        }
        mask = UINT64_MAX;
    }
    return limit;
}

/* ---- iterators ---------------------------------------------------------- */

void hbitmap_iter_init(HBitmapIter *hbi, const HBitmap *hb, uint64_t first)
{
    hbi->hb = hb;
    /* Beyond the size there is nothing, also where the last group is cut and
     * so holds items beyond it. */
    hbi->group = first < hb_block_of(hb)->size ? first >> hb->granularity
                                               : HB_NONE;
}

int64_t hbitmap_iter_next(HBitmapIter *hbi)
{
    uint64_t group = hb_next_bit(hb_block_of(hbi->hb), 0, hbi->group);

    if (group == HB_NONE) {
        return -1;
    }
    hbi->group = group + 1;
    return (int64_t)(group << hbi->hb->granularity);
}

size_t hbitmap_iter_fill(HBitmapIter *hbi, uint64_t *items, size_t n)
{
    const struct hb_block *b = hb_block_of(hbi->hb);
    int granularity = hbi->hb->granularity;
    uint64_t group = hbi->group;
    size_t filled = 0;

    while (filled < n) {
        uint64_t word, value;

        group = hb_next_bit(b, 0, group);
        if (group == HB_NONE) {
            break;
        }
        /* The rest of the word in one go. */
        word = group / HB_BITS;
        value = atomic_load(&b->level[0][word]) & hb_mask_from(group);
        group = (word + 1) * HB_BITS;
        for (; value; value &= value - 1) {
            uint64_t found = word * HB_BITS + hb_lowest(value);

            if (filled == n) {
                group = found;
                break;
            }
            items[filled++] = found << granularity;
        }
        hbi->group = group;
    }
    return filled;
}

/* ---- items -------------------------------------------------------------- */

typedef uint64_t hb_search(const struct hb_block *b, uint64_t group, uint64_t limit);

/* The first item of [start, start + count) in a group that `search` finds. */
static int64_t hb_next_item(const HBitmap *hb, const struct hb_block *b,
                            int64_t start, int64_t count, hb_search *search)
{
    uint64_t first, end, limit, group, item;

    if (start < 0 || count <= 0 || (uint64_t)start >= b->size) {
        return -1;
    }
    first = (uint64_t)start;
    end = first + hb_min((uint64_t)count, b->size - first);
    limit = ((end - 1) >> hb->granularity) + 1;
    group = search(b, first >> hb->granularity, limit);
    if (group == limit) {
        return -1;
    }
    item = group << hb->granularity;
    return (int64_t)(item > first ? item : first);
}

int64_t hbitmap_next_dirty(const HBitmap *hb, int64_t start, int64_t count)
{
    return hb_next_item(hb, hb_block_of(hb), start, count, hb_next_dirty);
}

int64_t hbitmap_next_zero(const HBitmap *hb, int64_t start, int64_t count)
{
    return hb_next_item(hb, hb_block_of(hb), start, count, hb_next_clean);
}

/* ---- runs --------------------------------------------------------------- */

/*
 * Where the run that holds `start` ends, at most at `end`; `search` finds the
 * other kind.  The group of `start` itself is not looked at again, so a run
 * has an item in it whatever happens meanwhile.
 */
static uint64_t hb_run_end(const HBitmap *hb, const struct hb_block *b,
                           uint64_t start, uint64_t end, hb_search *search)
{
    uint64_t limit = ((end - 1) >> hb->granularity) + 1;
    uint64_t group = search(b, (start >> hb->granularity) + 1, limit);

    return hb_min(group << hb->granularity, end);
}

size_t hbitmap_areas(const HBitmap *hb, uint64_t start, uint64_t end,
                     uint64_t *areas, size_t max_areas, uint64_t *next)
{
    const struct hb_block *b = hb_block_of(hb);
    size_t found = 0;

    end = hb_min(end, b->size);
    while (start < end && found < max_areas) {
        int64_t dirty = hb_next_item(hb, b, (int64_t)start,
                                     (int64_t)(end - start), hb_next_dirty);

        if (dirty < 0) {
            break;
        }
        start = hb_run_end(hb, b, (uint64_t)dirty, end, hb_next_clean);
        areas[2 * found] = (uint64_t)dirty;
        areas[2 * found + 1] = start - (uint64_t)dirty;
        found++;
    }
    *next = found < max_areas ? end : hb_min(start, end);
    return found;
}

bool hbitmap_next_dirty_area(const HBitmap *hb, int64_t start, int64_t end,
                             int64_t max_dirty_count,
                             int64_t *dirty_start, int64_t *dirty_count)
{
    const struct hb_block *b = hb_block_of(hb);
    uint64_t run_end;

    if (start < 0 || end <= start || max_dirty_count <= 0) {
        return false;
    }
    end = (int64_t)hb_min((uint64_t)end, b->size);
    start = hb_next_item(hb, b, start, end - start, hb_next_dirty);
    if (start < 0) {
        return false;
    }
    run_end = (uint64_t)start + hb_min((uint64_t)(end - start),
                                       (uint64_t)max_dirty_count);
    run_end = hb_run_end(hb, b, (uint64_t)start, run_end, hb_next_clean);
    *dirty_start = start;
    *dirty_count = (int64_t)run_end - start;
    return true;
}

bool hbitmap_status(const HBitmap *hb, int64_t start, int64_t count,
                    int64_t *pnum)
{
    const struct hb_block *b = hb_block_of(hb);
    uint64_t end;
    bool dirty;

    if (start < 0 || count <= 0 || (uint64_t)start >= b->size) {
        *pnum = 0;
        return false;
    }
    end = (uint64_t)start + hb_min((uint64_t)count, b->size - (uint64_t)start);
    dirty = hb_next_item(hb, b, start, 1, hb_next_dirty) == start;
    end = hb_run_end(hb, b, (uint64_t)start, end,
                     dirty ? hb_next_clean : hb_next_dirty);
    *pnum = (int64_t)end - start;
    return dirty;
}
