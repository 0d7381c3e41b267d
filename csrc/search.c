/* SPDX-License-Identifier: MIT */
/*
 * Searches: the next dirty or clean item, areas, iterators.
 *
 * They take no lock and remember nothing but a position, so whatever happens
 * to the bitmap between two calls they go on from there with what is set by
 * then.  A summary bit over a zero word sends them down in vain, no more.
 */
#include "block.h"
#include "locks.h"

/* A word that is not zero: which, or HB_NONE, and the bits that count. */
struct hb_found {
    uint64_t word, bits;
};

/* The first such word of level k behind `word`. */
__attribute__((noinline))
static struct hb_found hb_find_behind(const struct hb_block *b, unsigned k, uint64_t word)
{
    const struct hb_found none = { .word = HB_NONE };
    const unsigned lowest = k;
    uint64_t value;

    do {
        /* Up, until a level has something further on ... */
        do {
            uint64_t bit = word + 1;

            word = bit / HB_BITS;
            if (++k == b->nlevels || word >= b->nwords[k]) {
                return none;
            }
            value = atomic_load(&b->level[k][word]) & hb_mask_from(bit);
        } while (!value);
        /* ... and down to it, or to the zero word under a stale bit. */
        do {
            uint64_t more = value & (value - 1), below = word * HB_BITS;

            word = below + hb_lowest(value);
            value = atomic_load(&b->level[--k][word]);
            /* The next search will want the next one. */
            more = more ? below + hb_lowest(more) : word;
            __builtin_prefetch((const void *)&b->level[k][more]);
        } while (value && k > lowest);
    } while (!value);
    return (struct hb_found){ .word = word, .bits = value };
}

/* The first word of level k with a bit set at or after `bit`, and such bits. */
static inline struct hb_found hb_find(const struct hb_block *b, unsigned k, uint64_t bit)
{
    struct hb_found found = { .word = bit / HB_BITS };

    if (found.word >= b->nwords[k]) {
        found.word = HB_NONE;
        return found;
    }
    found.bits = atomic_load(&b->level[k][found.word]) & hb_mask_from(bit);
    return found.bits ? found : hb_find_behind(b, k, found.word);
}

/* The first clean group at or after `group` and below `limit`; `limit` if there
 * is none. */
static inline uint64_t hb_next_clean(const struct hb_block *b, uint64_t group,
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

/* ---- many words at once ------------------------------------------------- */

/*
 * Who wants many groups makes a list of leaf words first, from the bits of
 * summary words, and goes through the list then.  So one look at memory does not
 * wait for another; and bits become numbers some at a time, without a branch for
 * each, since where words have few bits no processor foresees which is the last.
 *
 * A list holds what was named when it was made.  What is marked meanwhile may be
 * passed over, as by a search that began earlier; a word that was emptied is
 * seen empty.  Words are listed in order and looked at once, so what is found is
 * in order whatever changes.
 */
enum {
    HB_AT_ONCE = 4,         /* the summary's bits that are listed without a branch */
    HB_ENOUGH = 8,          /* words that have a list, where one summary word names so many */
    HB_LIST = 16,           /* or else so many */
    HB_GROUPS_AT_ONCE = 2,
};

/* Those leaf words up to `last` that were not listed yet. */
struct hb_names {
    const struct hb_block *b;
    uint64_t last;
    uint64_t parent;        /* a summary word */
    uint64_t named;         /* its bits that were not listed yet */
};

/* Takes bits from *word, the lowest first, `most` if there are so many, and
 * writes their numbers, counted from `base`.  Returns how many, but writes
 * `most` in all. */
static inline size_t hb_unpack(uint64_t *to, size_t most, uint64_t base,
                               uint64_t *word)
{
    uint64_t rest = *word;
    size_t n = 0;

    for (size_t i = 0; i < most; i++) {
        /* If none is left, the highest bit is as good as any. */
        to[i] = base + hb_lowest(rest | hb_bit(HB_BITS - 1));
        n += rest != 0;
        rest &= rest - 1;
    }
    *word = rest;
    return n;
}

/* To the summary word `parent`, of which `named` was seen. */
static inline void hb_names_in(struct hb_names *names, uint64_t parent,
                               uint64_t named)
{
    names->parent = parent;
    names->named = named;
    if (parent == names->last / HB_BITS) {
        names->named &= hb_mask_to(names->last);
    }
}

/* Those behind `word`. */
static inline struct hb_names hb_names_behind(const struct hb_block *b,
                                              uint64_t word, uint64_t last)
{
    struct hb_names names = { .b = b, .last = last };
    uint64_t parent = word / HB_BITS;

    hb_names_in(&names, parent, atomic_load(&b->level[1][parent]) &
                                hb_mask_from(word) & ~hb_bit(word));
    return names;
}

/* The next words, hardly more than `wanted`, and HB_LIST + HB_AT_ONCE at most;
 * returns how many, 0: there are no more. */
static inline size_t hb_list(struct hb_names *names, uint64_t *list, size_t wanted)
{
    const struct hb_block *b = names->b;
    size_t n = 0;

    do {
        if (!names->named) {
            struct hb_found found;

            if (names->parent >= names->last / HB_BITS) {
                break;
            }
            found = hb_find(b, 1, (names->parent + 1) * HB_BITS);
            if (found.word > names->last / HB_BITS) {
                break;
            }
            hb_names_in(names, found.word, found.bits);
        }
        n += hb_unpack(list + n, HB_AT_ONCE, names->parent * HB_BITS, &names->named);
    } while (n < wanted && n < (names->named ? HB_ENOUGH : HB_LIST));
    for (size_t i = 0; i < n; i++) {
        __builtin_prefetch((const void *)&b->level[0][list[i]]);
    }
    return n;
}

/* ---- groups ---------------------------------------------------------- */

int64_t hbitmap_iter_next(HBitmapIter *hbi)
{
    struct hb_found found = hb_find(hb_block_of(hbi->hb), 0, hbi->group);
    uint64_t group;

    if (found.word == HB_NONE) {
        return -1;
    }
    group = found.word * HB_BITS + hb_lowest(found.bits);
    hbi->group = group + 1;
    return (int64_t)(group << hbi->hb->granularity);
}

/* Up to n dirty groups from `group` on. */
static inline size_t hb_groups(const struct hb_block *b, uint64_t group, uint64_t *groups,
                               size_t n)
{
    uint64_t list[HB_LIST + HB_AT_ONCE], mask = hb_mask_from(group);
    struct hb_names names = hb_names_behind(b, group / HB_BITS, b->nwords[0] - 1);
    size_t found = 0, listed = 1;

    list[0] = group / HB_BITS;
    do {
        for (size_t i = 0; i < listed; i++) {
            uint64_t base = list[i] * HB_BITS;
            uint64_t value = atomic_load(&b->level[0][list[i]]) & mask;

            mask = UINT64_MAX;
            if (n - found >= HB_GROUPS_AT_ONCE) {
                found += hb_unpack(groups + found, HB_GROUPS_AT_ONCE, base, &value);
            }
            while (value) {
                if (found == n) {
                    return n;
                }
                groups[found++] = base + hb_lowest(value);
                value &= value - 1;
            }
        }
        listed = found < n ? hb_list(&names, list, n - found) : 0;
    } while (listed);
    return found;
}

size_t hbitmap_iter_fill(HBitmapIter *hbi, uint64_t *items, size_t n)
{
    const struct hb_block *b = hb_block_of(hbi->hb);
    const int granularity = hbi->hb->granularity;
    size_t filled = 0;

    if (n == 1) {
        /* For one, no list is worth it. */
        int64_t item = hbitmap_iter_next(hbi);

        if (item < 0) {
            return 0;
        }
        items[0] = (uint64_t)item;
        return 1;
    }
    if (n > 0 && hbi->group < b->ngroups) {
        filled = hb_groups(b, hbi->group, items, n);
    }
    if (filled) {
        hbi->group = items[filled - 1] + 1;
    }
    for (size_t i = 0; granularity && i < filled; i++) {
        items[i] <<= granularity;
    }
    return filled;
}

/* ---- runs --------------------------------------------------------------- */

/*
 * The first run of [*from, *to), at most `most` items of it: false, or the run
 * in *from and *to.  It is followed for no more groups than were asked for.
 */
static inline bool hb_first_run(const struct hb_block *b, int granularity, uint64_t most,
                                uint64_t *from, uint64_t *to)
{
    struct hb_found found = hb_find(b, 0, *from >> granularity);
    uint64_t first, stop, end = *to;

    if (found.word == HB_NONE) {
        return false;
    }
    first = (found.word * HB_BITS + hb_lowest(found.bits)) << granularity;
    first = first > *from ? first : *from;
    if (first >= end) {
        return false;
    }
    *from = first;
    stop = hb_behind_run(found.bits);
    if (stop) {
        stop = (found.word * HB_BITS + hb_lowest(stop)) << granularity;
        /* As a rule nothing cuts it.  (A branch, so that who goes on from its
         * end waits for nothing else.) */
        if (stop <= end && stop - first <= most) {
            *to = stop;
            return true;
        }
    }
    end = first + hb_min(most, end - first);
    if (!stop) {
        uint64_t limit = ((end - 1) >> granularity) + 1;

        stop = hb_next_clean(b, (found.word + 1) * HB_BITS, limit) << granularity;
    }
    *to = hb_min(stop, end);
    return true;
}

/*
 * The groups where the runs of [group, limit) begin and where they end, in turn,
 * `room` in all (an even number).  An end that is found in the word of `limit`
 * may lie beyond it.
 */
static inline size_t hb_run_ends(const struct hb_block *b, uint64_t group, uint64_t limit,
                                 uint64_t *ends, size_t room)
{
    uint64_t list[HB_LIST + HB_AT_ONCE], mask = hb_mask_from(group);
    struct hb_names names = hb_names_behind(b, group / HB_BITS, (limit - 1) / HB_BITS);
    uint64_t open = 0, next = 0;    /* 1: a run may go on in word `next` */
    size_t found = 0, listed = 1;

    list[0] = group / HB_BITS;
    do {
        for (size_t i = 0; i < listed; i++) {
            uint64_t base = list[i] * HB_BITS, edges;
            uint64_t value = atomic_load(&b->level[0][list[i]]) & mask;

            mask = UINT64_MAX;
            if (!(open | value >> (HB_BITS - 1))) {
                /* All runs are inside the word. */
                while (value) {
                    uint64_t stop = hb_behind_run(value);

                    if (found == room) {
                        goto full;
                    }
                    ends[found++] = base + hb_lowest(value);
                    ends[found++] = base + hb_lowest(stop);
                    value &= stop;
                }
                continue;
            }
            if (open && list[i] != next) {
                ends[found++] = next * HB_BITS;
                open = 0;
            }
            /* Where a bit is not what the one before is, a run begins or ends. */
            edges = value ^ (value << 1 | open);
            open = value >> (HB_BITS - 1);
            next = list[i] + 1;
            while (edges) {
                if (found == room) {
                    goto full;
                }
                ends[found++] = base + hb_lowest(edges);
                edges &= edges - 1;
            }
        }
        listed = found < room ? hb_list(&names, list, (room - found + 1) / 2) : 0;
    } while (listed);
full:
    if (found % 2) {
        ends[found++] = next * HB_BITS;
    }
    /* The last word was taken whole. */
    while (found && ends[found - 2] >= limit) {
        found -= 2;
    }
    return found;
}

size_t hbitmap_areas(const HBitmap *hb, uint64_t start, uint64_t end,
                     uint64_t *areas, size_t max_areas, uint64_t *next)
{
    const struct hb_block *b = hb_block_of(hb);
    const int granularity = hb->granularity;
    size_t found = 0;

    end = hb_min(end, b->size);
    if (start < end && max_areas == 1) {
        /* For one, no list is worth it. */
        uint64_t from = start, to = end;

        if (hb_first_run(b, granularity, UINT64_MAX, &from, &to)) {
            areas[0] = from;
            areas[1] = to - from;
            start = to;
            found = 1;
        }
    } else if (start < end && max_areas > 1) {
        const uint64_t limit = ((end - 1) >> granularity) + 1;
        uint64_t stop = 0;

        found = hb_run_ends(b, start >> granularity, limit, areas,
                            2 * max_areas) / 2;
        for (size_t i = 0; i < found; i++) {
            uint64_t first = areas[2 * i];

            stop = areas[2 * i + 1];
            areas[2 * i] = first << granularity;
            areas[2 * i + 1] = (stop - first) << granularity;
        }
        /* Only the first and the last can be cut. */
        if (found && areas[0] < start) {
            areas[1] -= start - areas[0];
            areas[0] = start;
        }
        if (found) {
            start = stop < limit ? stop << granularity : end;
            areas[2 * found - 1] = start - areas[2 * found - 2];
        }
    }
    *next = found < max_areas ? end : hb_min(start, end);
    return found;
}

bool hbitmap_next_dirty_area(const HBitmap *hb, int64_t start, int64_t end,
                             int64_t max_dirty_count,
                             int64_t *dirty_start, int64_t *dirty_count)
{
    const struct hb_block *b = hb_block_of(hb);
    uint64_t from, to;

    if (start < 0 || end <= start || max_dirty_count <= 0) {
        return false;
    }
    from = (uint64_t)start;
    to = hb_min((uint64_t)end, b->size);
    if (from >= to || !hb_first_run(b, hb->granularity, (uint64_t)max_dirty_count,
                                    &from, &to)) {
        return false;
    }
    *dirty_start = (int64_t)from;
    *dirty_count = (int64_t)(to - from);
    return true;
}

/* ---- one bit or item ---------------------------------------------------- */

uint64_t hb_next_bit(const struct hb_block *b, unsigned k, uint64_t bit)
{
    struct hb_found found = hb_find(b, k, bit);

    return found.word == HB_NONE ? HB_NONE
                                 : found.word * HB_BITS + hb_lowest(found.bits);
}

void hbitmap_iter_init(HBitmapIter *hbi, const HBitmap *hb, uint64_t first)
{
    hbi->hb = hb;
    HB_AT_HOME_VOID(hb, hbitmap_iter_init, hbi, hb, first);
    /* Beyond the size there is nothing, also where the last group is cut and
     * so holds items beyond it. */
    hbi->group = first < hb_block_of(hb)->size ? first >> hb->granularity
                                               : HB_NONE;
}


/* A function of its own, so that hbitmap_get has nothing to keep for it. */
__attribute__((noinline))
static bool hb_get_elsewhere(const HBitmap *hb, uint64_t item)
{
    HB_AT_HOME(hb, false, hbitmap_get, hb, item);
    return false;
}

bool hbitmap_get(const HBitmap *hb, uint64_t item)
{
    if (!hb_at_home(hb)) {
        return hb_get_elsewhere(hb, item);
    }
    const struct hb_block *b = hb_block_of(hb);
    uint64_t group = item >> hb->granularity;

    return item < b->size &&
           (atomic_load(&b->level[0][group / HB_BITS]) & hb_bit(group)) != 0;
}

bool hbitmap_empty(const HBitmap *hb)
{
    HB_AT_HOME(hb, false, hbitmap_empty, hb);
    bool empty = hb_next_bit(hb_block_of(hb), 0, 0) == HB_NONE;

    if (empty) {
        /* Or a clear was about to restore a summary that this search missed. */
        hb_lock(hb, HB_READ);
        empty = hb_next_bit(hb_block_of(hb), 0, 0) == HB_NONE;
        hb_unlock(hb);
    }
    return empty;
}

typedef uint64_t hb_search(const struct hb_block *b, uint64_t group, uint64_t limit);

/* The first dirty group, as hb_next_clean finds the first clean one. */
static uint64_t hb_next_dirty(const struct hb_block *b, uint64_t group,
                              uint64_t limit)
{
    return hb_min(hb_next_bit(b, 0, group), limit);
}

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
    HB_AT_HOME(hb, -1, hbitmap_next_dirty, hb, start, count);
    return hb_next_item(hb, hb_block_of(hb), start, count, hb_next_dirty);
}

int64_t hbitmap_next_zero(const HBitmap *hb, int64_t start, int64_t count)
{
    HB_AT_HOME(hb, -1, hbitmap_next_zero, hb, start, count);
    return hb_next_item(hb, hb_block_of(hb), start, count, hb_next_clean);
}

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

bool hbitmap_status(const HBitmap *hb, int64_t start, int64_t count,
                    int64_t *pnum)
{
    HB_AT_HOME(hb, (*pnum = 0, false), hbitmap_status, hb, start, count, pnum);
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

/* ---- counting runs ------------------------------------------------------ */

/*
 * Runs begin where a bit is set and the one before is not.  Words under a summary
 * word that names none are zero.  Plain loads (words.h): of what is marked
 * meanwhile there is no right number.
 */
uint64_t hbitmap_count_areas(const HBitmap *hb, uint64_t start, uint64_t end)
{
    HB_AT_HOME(hb, 0, hbitmap_count_areas, hb, start, end);
    const struct hb_block *b = hb_block_of(hb);
    const hb_plain *leaf = (const hb_plain *)b->level[0];
    uint64_t first, last, runs = 0, before = 0, expected = HB_NONE;

    end = hb_min(end, b->size);
    if (start >= end) {
        return 0;
    }
    first = start >> hb->granularity;
    last = (end - 1) >> hb->granularity;
    for (uint64_t word = hb_next_bit(b, 1, first / HB_BITS); word <= last / HB_BITS;
         word = hb_next_bit(b, 1, word)) {
        uint64_t at = word / HB_BITS * HB_BITS;
        uint64_t n = hb_min(HB_BITS, b->nwords[0] - at);
        uint64_t words[HB_BITS + 1], begins[HB_BITS];

        words[0] = at == expected ? before : 0;
        for (uint64_t i = 0; i < n; i++) {
            words[i + 1] = leaf[at + i];
        }
        if (first / HB_BITS >= at) {
            memset(&words[1], 0, (size_t)(first / HB_BITS - at) * sizeof(words[0]));
            words[first / HB_BITS - at + 1] &= hb_mask_from(first);
        }
        if (last / HB_BITS < at + n) {
            n = last / HB_BITS - at + 1;
            words[n] &= hb_mask_to(last);
        }
        for (uint64_t i = 0; i < n; i++) {
            begins[i] = words[i + 1] & ~(words[i + 1] << 1 | words[i] >> (HB_BITS - 1));
        }
        runs += hb_popcount_words((const hb_word *)begins, n);
        before = words[n];
        word = expected = at + HB_BITS;
    }
    return runs;
}
