/* SPDX-License-Identifier: MIT */
/*
 * Searches: the next dirty or clean item, areas, iterators.
 *
 * They take no lock and what they remember is a position, so whatever happens
 * to the bitmap between two calls they go on from there with what is set by
 * then.  A summary bit over a zero word sends them down in vain, no more.
 *
 * Workload: a call for each item or run, and the next one begins where this one
 * ended.  So what counts is how soon the result is there once the position is; what
 * only has to be checked is a branch, which the processor foresees.
 */
#include "block.h"
#include "locks.h"

/* ---- the next word that is not zero -------------------------------------- */

/* Which, or HB_NONE, and the bits that count. */
struct hb_found {
    uint64_t word, bits;
};

/* The first such word of level k behind `word`, however far. */
__attribute__((noinline))
static struct hb_found hb_find_far(const struct hb_block *b, unsigned k, uint64_t word)
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

/* The first leaf word behind `word`: as a rule the same word of level 1 names it. */
static inline struct hb_found hb_find_behind(const struct hb_block *b, uint64_t word)
{
    uint64_t parent = word / HB_BITS;
    uint64_t named = atomic_load(&b->level[1][parent]) &
                     hb_mask_from(word) & ~hb_bit(word);

    if (named) {
        struct hb_found found = { .word = parent * HB_BITS + hb_lowest(named) };

        found.bits = atomic_load(&b->level[0][found.word]);
        if (found.bits) {
            return found;
        }
    }
    return hb_find_far(b, 0, word);
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
    return found.bits ? found : hb_find_far(b, k, found.word);
}

uint64_t hb_next_bit(const struct hb_block *b, unsigned k, uint64_t bit)
{
    struct hb_found found = hb_find(b, k, bit);

    return found.word == HB_NONE ? HB_NONE
                                 : found.word * HB_BITS + hb_lowest(found.bits);
}

/* ---- one item ------------------------------------------------------------ */

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

    return item < b->size && (atomic_load(&b->level[0][group / HB_BITS]) >> (group % HB_BITS) & 1);
}

/* Was no clear under way since `changes` was read?  (Nor is there something left
 * from before a fork, which the lock sees to.) */
static inline bool hb_undisturbed(const HBitmap *hb, uint64_t changes)
{
#ifdef HB_BREAK_UNDISTURBED
    return true;    /* for the stress test */
#endif
    return changes % 2 == 0 && atomic_load(&hb->changes) == changes && !hb_unfinished(hb);
}

/* Is there nothing?  Where there is something is noted. */
static bool hb_finds_nothing(const HBitmap *hb)
{
    HBitmap *own = (HBitmap *)(uintptr_t)hb;
    uint64_t group = hb_next_bit(hb_block_of(hb), 0, 0);

    if (group == HB_NONE) {
        return true;
    }
    atomic_store_explicit(&own->dirty_word, group / HB_BITS, memory_order_relaxed);
    return false;
}

__attribute__((noinline))
static bool hb_search_all(const HBitmap *hb)
{
    uint64_t changes = atomic_load(&hb->changes);
    bool empty = hb_finds_nothing(hb);

    if (empty && !hb_undisturbed(hb, changes)) {
        hb_lock(hb, HB_READ);
        empty = hb_finds_nothing(hb);
        hb_unlock(hb);
    }
    return empty;
}

/*
 * As a rule one look, at a word that was not zero or at the top, which is.
 *
 * A search that finds nothing may have missed what a clear is about to restore.  So
 * it counts only if none was under way: then every mark that has returned has its
 * bit of level 1, and all bits above that.  Else the lock is taken.
 */
bool hbitmap_empty(const HBitmap *hb)
{
    HB_AT_HOME(hb, false, hbitmap_empty, hb);
    uint64_t changes = atomic_load(&hb->changes);
    const struct hb_block *b = hb_block_of(hb);
    /* A hint, of whatever block there was. */
    uint64_t word = atomic_load_explicit(&hb->dirty_word, memory_order_relaxed);

    if (word < b->nwords[0] && atomic_load(&b->level[0][word])) {
        return false;
    }
    if (!atomic_load(&b->level[b->nlevels - 1][0]) && hb_undisturbed(hb, changes)) {
        return true;
    }
    return hb_search_all(hb);
}

/* The first dirty group in the leaf words behind `word`, or HB_NONE. */
static uint64_t hb_dirty_behind(const struct hb_block *b, uint64_t word)
{
    struct hb_found found = hb_find_behind(b, word);

    return found.word == HB_NONE ? HB_NONE
                                 : found.word * HB_BITS + hb_lowest(found.bits);
}

/* The first clean one there, up to the word of group `last`, or HB_NONE. */
static uint64_t hb_clean_behind(const struct hb_block *b, uint64_t word, uint64_t last)
{
    while (word < last / HB_BITS) {
        uint64_t clean = ~atomic_load(&b->level[0][++word]);

        if (clean) {
            return word * HB_BITS + hb_lowest(clean);
        }
    }
    return HB_NONE;
}

/* The group of the lowest of `bits`, which are the dirty (clean) ones that count in
 * word `word`, or else the first such group behind it, as far as `last`. */
static inline uint64_t hb_lowest_or_behind(const struct hb_block *b, uint64_t word,
                                           uint64_t bits, bool dirty, uint64_t last)
{
    if (bits) {
        return word * HB_BITS + hb_lowest(bits);
    }
    return dirty ? hb_dirty_behind(b, word) : hb_clean_behind(b, word, last);
}

/* Where [start, start + count) ends, clamped; 0: nothing of it is inside. */
static inline uint64_t hb_search_end(const struct hb_block *b, int64_t start, int64_t count)
{
    uint64_t first = (uint64_t)start;       /* a negative one is beyond any size */

    if (count <= 0 || first >= b->size) {
        return 0;
    }
    return first + hb_min((uint64_t)count, b->size - first);
}

/* The first item of [start, start + count) that is dirty (clean), or -1. */
static inline int64_t hb_next_item(const HBitmap *hb, int64_t start, int64_t count,
                                   bool dirty)
{
    const struct hb_block *b = hb_block_of(hb);
    uint64_t first = (uint64_t)start, end = hb_search_end(b, start, count);
    uint64_t group = first >> hb->granularity, last = (end - 1) >> hb->granularity;
    uint64_t bits;

    if (!end) {
        return -1;
    }
    bits = atomic_load(&b->level[0][group / HB_BITS]);
    bits = (dirty ? bits : ~bits) & hb_mask_from(group);
    group = hb_lowest_or_behind(b, group / HB_BITS, bits, dirty, last);
    if (group > last) {
        return -1;
    }
    group <<= hb->granularity;
    return (int64_t)(group > first ? group : first);
}

int64_t hbitmap_next_dirty(const HBitmap *hb, int64_t start, int64_t count)
{
    HB_AT_HOME(hb, -1, hbitmap_next_dirty, hb, start, count);
    return hb_next_item(hb, start, count, true);
}

int64_t hbitmap_next_zero(const HBitmap *hb, int64_t start, int64_t count)
{
    HB_AT_HOME(hb, -1, hbitmap_next_zero, hb, start, count);
    return hb_next_item(hb, start, count, false);
}

/* The last dirty group at or before `group`, or HB_NONE. */
static uint64_t hb_prev_dirty(const struct hb_block *b, uint64_t group)
{
    unsigned k = 0;
    uint64_t word = group / HB_BITS;
    uint64_t value = atomic_load(&b->level[0][word]) & hb_mask_to(group);

    while (k > 0 || !value) {
        if (value) {
            /* Down, maybe to the zero word under a stale bit. */
            word = word * HB_BITS + hb_highest(value);
            value = atomic_load(&b->level[--k][word]);
        } else if (word) {
            /* Up: this word has nothing; what is before it? */
            uint64_t bit = word - 1;

            word = bit / HB_BITS;
            value = atomic_load(&b->level[++k][word]) & hb_mask_to(bit);
        } else {
            return HB_NONE;
        }
    }
    return word * HB_BITS + hb_highest(value);
}

int64_t hbitmap_prev_dirty(const HBitmap *hb, int64_t start, int64_t count)
{
    HB_AT_HOME(hb, -1, hbitmap_prev_dirty, hb, start, count);
    const struct hb_block *b = hb_block_of(hb);
    uint64_t last, group, item;

    if (start < 0 || count <= 0 || !b->size) {
        return -1;
    }
    last = hb_min((uint64_t)start, b->size - 1);
    group = hb_prev_dirty(b, last >> hb->granularity);
    if (group == HB_NONE) {
        return -1;
    }
    item = hb_min(((group + 1) << hb->granularity) - 1, last);
    return count > start || count == INT64_MAX || item > (uint64_t)(start - count)
               ? (int64_t)item : -1;
}

bool hbitmap_status(const HBitmap *hb, int64_t start, int64_t count,
                    int64_t *pnum)
{
    HB_AT_HOME(hb, (*pnum = 0, false), hbitmap_status, hb, start, count, pnum);
    const struct hb_block *b = hb_block_of(hb);
    uint64_t end = hb_search_end(b, start, count);
    uint64_t group = (uint64_t)start >> hb->granularity;
    uint64_t last = (end - 1) >> hb->granularity;
    uint64_t bits;
    bool dirty;

    if (!end) {
        *pnum = 0;
        return false;
    }
    bits = atomic_load(&b->level[0][group / HB_BITS]);
    dirty = bits >> (group % HB_BITS) & 1;
    /* Those of the other kind.  The group itself is none, so a run has an item in it
     * whatever happens meanwhile. */
    bits = (bits ^ (0 - (uint64_t)dirty)) & hb_mask_from(group);
    group = hb_lowest_or_behind(b, group / HB_BITS, bits, !dirty, last);
    if (group <= last) {
        end = group << hb->granularity;
    }
    *pnum = (int64_t)end - start;
    return dirty;
}

/* ---- iterating ------------------------------------------------------------ */

/*
 * An iterator is in a leaf word, of which it has seen `seen`.  `rest` are the bits of
 * that from the group given last on, so its lowest bit says how far the iterator has
 * come; 0: nothing of the word was given.  As long as the word is what was seen, the
 * next group is in `rest`, and there is nothing to be found out.
 *
 * The word is looked at each time, where the bitmap has it now: what was reset is not
 * given, what was set ahead is.
 */

/* The bits of its word that are ahead of it. */
static inline uint64_t hb_iter_ahead(const HBitmapIter *hbi)
{
    return hbi->rest ? hbi->rest ^ (0 - hbi->rest) : UINT64_MAX;
}

/* To the group of the lowest of `bits` of its word, and gives its start. */
static inline int64_t hb_iter_to(HBitmapIter *hbi, uint64_t word, uint64_t bits)
{
    hbi->rest = bits;
    return (int64_t)((word * HB_BITS + hb_lowest(bits)) << hbi->hb->granularity);
}

void hbitmap_iter_init(HBitmapIter *hbi, const HBitmap *hb, uint64_t first)
{
    hbi->hb = hb;
    HB_AT_HOME_VOID(hb, hbitmap_iter_init, hbi, hb, first);
    uint64_t group = first >> hb->granularity;

    /* Beyond the size there is nothing, also where the last group is cut and
     * so holds items beyond it. */
    hbi->word = first < hb_block_of(hb)->size ? group / HB_BITS : HB_NONE;
    hbi->seen = 0;
    hbi->rest = hb_bit(group) >> 1;
}

/* The next, where the word has no more or has changed. */
__attribute__((noinline))
static int64_t hb_iter_search(HBitmapIter *hbi, const struct hb_block *b)
{
    struct hb_found found = { .word = hbi->word };

    if (found.word >= b->nwords[0]) {
        return -1;
    }
    found.bits = atomic_load(&b->level[0][found.word]);
    if (found.bits != hbi->seen) {
        uint64_t ahead = found.bits & hb_iter_ahead(hbi);

        if (ahead) {
            hbi->seen = found.bits;
            return hb_iter_to(hbi, found.word, ahead);
        }
    }
    found = hb_find_behind(b, found.word);
    if (found.word == HB_NONE) {
        return -1;
    }
    hbi->word = found.word;
    /* Else compilers make a vector of what is stored, and the next call's loads wait
     * for it: the time of the call doubles. */
    atomic_signal_fence(memory_order_seq_cst);
    hbi->seen = found.bits;
    atomic_signal_fence(memory_order_seq_cst);
    return hb_iter_to(hbi, found.word, found.bits);
}

int64_t hbitmap_iter_next(HBitmapIter *hbi)
{
    HB_AT_HOME(hbi->hb, -1, hbitmap_iter_next, hbi);
    const struct hb_block *b = hb_block_of(hbi->hb);
    uint64_t word = hbi->word, rest = hbi->rest & (hbi->rest - 1);

    if (word < b->nwords[0] && atomic_load(&b->level[0][word]) == hbi->seen && rest) {
        return hb_iter_to(hbi, word, rest);
    }
    return hb_iter_search(hbi, b);
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

/* ---- many groups ---------------------------------------------------------- */

/* Up to n dirty groups: of word `word` those in `mask`, and from there on. */
static inline size_t hb_groups(const struct hb_block *b, uint64_t word, uint64_t mask,
                               uint64_t *groups, size_t n)
{
    uint64_t list[HB_LIST + HB_AT_ONCE];
    struct hb_names names = hb_names_behind(b, word, b->nwords[0] - 1);
    size_t found = 0, listed = 1;

    list[0] = word;
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
    HB_AT_HOME(hbi->hb, 0, hbitmap_iter_fill, hbi, items, n);
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
    if (n > 0 && hbi->word < b->nwords[0]) {
        filled = hb_groups(b, hbi->word, hb_iter_ahead(hbi), items, n);
    }
    if (filled) {
        uint64_t last = items[filled - 1];

        hbi->word = last / HB_BITS;
        hbi->seen = 0;
        hbi->rest = hb_bit(last);
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
    uint64_t group = *from >> granularity, first, stop, end = *to;
    struct hb_found found = { .word = group / HB_BITS };

    found.bits = atomic_load(&b->level[0][found.word]) & hb_mask_from(group);
    if (!found.bits) {
        found = hb_find_behind(b, found.word);
        if (found.word == HB_NONE) {
            return false;
        }
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
        uint64_t last = (end - 1) >> granularity;

        stop = hb_clean_behind(b, found.word, last);
        stop = stop > last ? end : stop << granularity;
    }
    *to = hb_min(stop, end);
    return true;
}

/* Groups where runs begin and end, in turn, as they are found. */
struct hb_ends {
    uint64_t *at;
    size_t found, room;     /* an even number */
    uint64_t open, next;    /* 1: a run may go on in word `next` */
};

/* Those in leaf word `word`; false: there is no room for all of them. */
static inline bool hb_ends_in(struct hb_ends *ends, uint64_t word, uint64_t value)
{
    uint64_t base = word * HB_BITS, edges;

    if (!(ends->open | value >> (HB_BITS - 1))) {
        /* All runs are inside the word. */
        while (value) {
            uint64_t stop = hb_behind_run(value);

            if (ends->found == ends->room) {
                return false;
            }
            ends->at[ends->found++] = base + hb_lowest(value);
            ends->at[ends->found++] = base + hb_lowest(stop);
            value &= stop;
        }
        return true;
    }
    if (ends->open && word != ends->next) {
        ends->at[ends->found++] = ends->next * HB_BITS;
        ends->open = 0;
    }
    /* Where a bit is not what the one before is, a run begins or ends. */
    edges = value ^ (value << 1 | ends->open);
    ends->open = value >> (HB_BITS - 1);
    ends->next = word + 1;
    while (edges) {
        if (ends->found == ends->room) {
            return false;
        }
        ends->at[ends->found++] = base + hb_lowest(edges);
        edges &= edges - 1;
    }
    return true;
}

/*
 * The groups where the runs of [group, limit) begin and where they end, in turn,
 * `room` in all (an even number).  An end that is found in the word of `limit`
 * may lie beyond it.
 */
static inline size_t hb_run_ends(const struct hb_block *b, uint64_t group, uint64_t limit,
                                 uint64_t *at, size_t room)
{
    uint64_t list[HB_LIST + HB_AT_ONCE], mask = hb_mask_from(group);
    struct hb_names names = hb_names_behind(b, group / HB_BITS, (limit - 1) / HB_BITS);
    struct hb_ends ends = { .at = at, .room = room };
    size_t listed = 1;

    list[0] = group / HB_BITS;
    do {
        for (size_t i = 0; i < listed; i++) {
            if (!hb_ends_in(&ends, list[i], atomic_load(&b->level[0][list[i]]) & mask)) {
                break;
            }
            mask = UINT64_MAX;
        }
        listed = ends.found < room
                     ? hb_list(&names, list, (room - ends.found + 1) / 2) : 0;
    } while (listed);
    if (ends.found % 2) {
        at[ends.found++] = ends.next * HB_BITS;
    }
    /* The last word was taken whole. */
    while (ends.found && at[ends.found - 2] >= limit) {
        ends.found -= 2;
    }
    return ends.found;
}

size_t hbitmap_areas(const HBitmap *hb, uint64_t start, uint64_t end,
                     uint64_t *areas, size_t max_areas, uint64_t *next)
{
    HB_AT_HOME(hb, (*next = end, (size_t)0),
               hbitmap_areas, hb, start, end, areas, max_areas, next);
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
    HB_AT_HOME(hb, false,
               hbitmap_next_dirty_area, hb, start, end, max_dirty_count, dirty_start, dirty_count);
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
