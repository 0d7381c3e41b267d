/* SPDX-License-Identifier: MIT */
/*
 * The levels of a bitmap: its memory, marks, clears, counts and truncation.
 * The protocol that lets marks run without a lock stands in internal.h.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* MAP_NORESERVE, MADV_NOHUGEPAGE, mremap */
#endif

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

/* ---- memory ------------------------------------------------------------- */

/* From here on levels are mapped, so that what is never marked takes no
 * memory. */
#ifndef HB_MAP_MIN
#define HB_MAP_MIN ((size_t)256 << 10)
#endif

/* From here on a leaf that is emptied is given back, and not stored to: then
 * that is faster also for whoever marks all of it again. */
#ifndef HB_GIVE_BACK_MIN
#define HB_GIVE_BACK_MIN ((size_t)16 << 20)
#endif

/* Up to here a block that was full is kept when its bitmap goes. */
#define HB_SPARE_MAX ((size_t)8 << 20)

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

/* From here on a leaf begins where a huge page can. */
#define HB_HUGE ((size_t)2 << 20)

/* Linux has it since 5.7, some C libraries still have not. */
#if defined(__linux__) && !defined(MREMAP_DONTUNMAP)
#define MREMAP_DONTUNMAP 4
#endif

#ifdef HB_TEST_ALLOC
int hb_test_alloc_fails(void);
#else
#define hb_test_alloc_fails() 0
#endif

static void *hb_zalloc(size_t nbytes)
{
    void *memory = NULL;

    if (hb_test_alloc_fails() ||
        posix_memalign(&memory, HB_CACHE_LINE, nbytes) != 0) {
        return NULL;
    }
    return memset(memory, 0, nbytes);
}

static void *hb_map(size_t nbytes)
{
    void *memory;

    if (hb_test_alloc_fails()) {
        return NULL;
    }
    memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        return NULL;
    }
#ifdef MADV_NOHUGEPAGE
    /* A huge page for a single mark would undo the sparseness.  Only advice:
     * a kernel that knows no huge pages refuses it, and is right. */
    (void)madvise(memory, nbytes, MADV_NOHUGEPAGE);
#endif
    return memory;
}

static size_t hb_align(size_t nbytes, size_t to)
{
    return (nbytes + (to - 1)) & ~(to - 1);
}

bool hb_will_fill(const HBitmap *hb, const struct hb_block *b, uint64_t pages)
{
    size_t nbytes = (size_t)b->nwords[0] * sizeof(hb_word);

    if (hb->foreign_leaf || !b->mapped || b->leaf_mapped ||
        !hb_nearly_all(b, pages) ||
        atomic_load(&b->level[b->nlevels - 1][0])) {
        return false;
    }
    /* All of this is advice. */
#ifdef MADV_HUGEPAGE
    if (nbytes >= HB_HUGE) {
        (void)madvise((void *)b->level[0], nbytes, MADV_HUGEPAGE);
        return true;
    }
#endif
#ifdef MADV_POPULATE_WRITE
    (void)madvise((void *)b->level[0], nbytes, MADV_POPULATE_WRITE);
#endif
    return false;
}

void hb_filled(const struct hb_block *b)
{
#ifdef MADV_NOHUGEPAGE
    (void)madvise((void *)b->level[0], (size_t)b->nwords[0] * sizeof(hb_word),
                  MADV_NOHUGEPAGE);
#else
    (void)b;
#endif
}

/* A block for `size` items, all clean, over `leaf` unless that is NULL.  NULL
 * with errno. */
static struct hb_block *hb_block_new(uint64_t size, int granularity,
                                     uint64_t *leaf, size_t nleaf)
{
    struct hb_block shape = { .size = size };
    struct hb_block *b;
    uint64_t nwords;
    size_t nbytes, leaf_at = 0, page = HB_CACHE_LINE, slack = 0;
    char *memory;

    if (granularity < 0 || granularity > 63 || size > INT64_MAX) {
        errno = EINVAL;
        return NULL;
    }
    shape.ngroups = size ? ((size - 1) >> granularity) + 1 : 0;
    if (shape.ngroups > UINT64_C(1) << HBITMAP_LOG_MAX_SIZE) {
        errno = EINVAL;
        return NULL;
    }
    nwords = shape.ngroups ? (shape.ngroups - 1) / HB_BITS + 1 : 1;
    if (leaf && nwords > nleaf) {
        errno = EINVAL;
        return NULL;
    }
    nbytes = hb_align(sizeof(shape), HB_CACHE_LINE);
    do {
        shape.nwords[shape.nlevels++] = nwords;
        if (shape.nlevels > 1) {
            nbytes += hb_align((size_t)nwords * sizeof(hb_word), HB_CACHE_LINE);
        }
        nwords = (nwords - 1) / HB_BITS + 1;
    } while (shape.nlevels < HB_MIN_LEVELS ||
             shape.nwords[shape.nlevels - 1] > 1);
    if (!leaf) {
        if (nbytes + (size_t)shape.nwords[0] * sizeof(hb_word) >= HB_MAP_MIN) {
            page = (size_t)sysconf(_SC_PAGESIZE);
        }
        leaf_at = hb_align(nbytes, page);
        if ((size_t)shape.nwords[0] * sizeof(hb_word) >= HB_HUGE) {
            slack = HB_HUGE;
        }
        nbytes = hb_align(leaf_at + slack +
                          (size_t)shape.nwords[0] * sizeof(hb_word), HB_CACHE_LINE);
    }
    if (nbytes >= HB_MAP_MIN) {
        shape.mapped = nbytes;
        memory = hb_map(nbytes);
    } else {
        memory = hb_zalloc(nbytes);
    }
    if (!memory) {
        errno = ENOMEM;
        return NULL;
    }

    b = (struct hb_block *)memory;
    *b = shape;
    /* _Atomic uint64_t has the size and the alignment of uint64_t wherever it
     * is lock-free, which the assertion below makes sure of. */
    b->level[0] = leaf ? (hb_word *)leaf : (hb_word *)(memory + leaf_at);
    if (slack) {
        /* Huge pages are for leaves that begin where one can. */
        b->level[0] = (hb_word *)hb_align((uintptr_t)b->level[0], HB_HUGE);
    }
    memory += hb_align(sizeof(shape), HB_CACHE_LINE);
    for (unsigned k = 1; k < b->nlevels; k++) {
        b->level[k] = (hb_word *)memory;
        memory += hb_align((size_t)b->nwords[k] * sizeof(hb_word), HB_CACHE_LINE);
    }
    return b;
}

_Static_assert(sizeof(size_t) == sizeof(uint64_t), "HBitmap needs 64-bit addresses");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && sizeof(hb_word) == sizeof(uint64_t),
               "HBitmap needs lock-free 64-bit atomics");

static void hb_block_free(struct hb_block *b)
{
    while (b) {
        struct hb_block *older = b->older;

        if (b->leaf_mapped) {
            munmap((void *)b->level[0], b->leaf_mapped);
        }
        if (b->mapped) {
            munmap(b, b->mapped);
        } else {
            free(b);
        }
        b = older;
    }
}

/* ---- life --------------------------------------------------------------- */

/* Over a block, unless that is NULL; it goes if there is no memory. */
static HBitmap *hb_new_over(struct hb_block *b, int granularity, bool foreign_leaf)
{
    HBitmap *hb;

    if (!b) {
        return NULL;
    }
    hb_slots_ready();
    hb = hb_zalloc(sizeof(*hb));
    if (!hb || pthread_mutex_init(&hb->lock, NULL) != 0) {
        free(hb);
        hb_block_free(b);
        errno = ENOMEM;
        return NULL;
    }
    atomic_init(&hb->block, b);
    hb->granularity = granularity;
    hb->foreign_leaf = foreign_leaf;
    atomic_init(&hb->count_state, HB_COUNT_STALE);
    atomic_init(&hb->count, 0);
    atomic_init(&hb->forks, hb_forks);
    return hb;
}

static HBitmap *hb_new(uint64_t size, int granularity,
                       uint64_t *leaf, size_t nleaf)
{
    return hb_new_over(hb_block_new(size, granularity, leaf, nleaf), granularity,
                       leaf != NULL);
}

/*
 * The block of a bitmap that was freed, with all that it held, or NULL.  Fresh
 * pages for a union take longer than the union; what malloc hands out again has
 * its pages.  Only for what is going to be full, since what is sparse is not to
 * have them.
 */
static _Atomic(struct hb_block *) hb_spare;

HBitmap *hb_new_like(const HBitmap *like, bool full)
{
    const struct hb_block *shape = hb_block_of(like);
    struct hb_block *spare = full ? atomic_exchange(&hb_spare, NULL) : NULL;

    if (spare && spare->size == shape->size && spare->ngroups == shape->ngroups) {
        return hb_new_over(spare, like->granularity, false);
    }
    hb_block_free(spare);
    return hb_new(shape->size, like->granularity, NULL, 0);
}

void hb_summarise_leaf(const struct hb_block *b)
{
    for (unsigned k = 1; k < b->nlevels; k++) {
        for (uint64_t above = 0; above < b->nwords[k]; above++) {
            uint64_t first = above * HB_BITS;
            uint64_t bits = hb_nonzero(&b->level[k - 1][first],
                                       hb_min(HB_BITS, b->nwords[k - 1] - first));

            if (bits) {     /* a word that stays zero takes no memory */
                atomic_store_explicit(&b->level[k][above], bits, memory_order_relaxed);
            }
        }
    }
}

HBitmap *hbitmap_alloc(uint64_t size, int granularity)
{
    return hb_new(size, granularity, NULL, 0);
}

HBitmap *hbitmap_alloc_on(uint64_t size, int granularity,
                          uint64_t *words, size_t nwords)
{
    HBitmap *hb;
    const struct hb_block *b;
    uint64_t last;

    if (!words || (uintptr_t)words % sizeof(uint64_t) != 0) {
        errno = EINVAL;
        return NULL;
    }
    hb = hb_new(size, granularity, words, nwords);
    if (!hb) {
        return NULL;
    }
    b = hb_block_of(hb);
    last = b->nwords[0] - 1;
    if (atomic_load(&b->level[0][last]) & ~hb_used(b, last)) {
        atomic_fetch_and(&b->level[0][last], hb_used(b, last));
    }
    hb_summarise_leaf(b);
    return hb;
}

static void hb_delete(HBitmap *hb)
{
    struct hb_block *b = hb_block_of(hb);

    if (b->mapped && b->mapped <= HB_SPARE_MAX && !b->leaf_mapped && !b->older &&
        !hb->foreign_leaf && hb_nearly_all(b, hb_pages_named(b))) {
        b = atomic_exchange(&hb_spare, b);
    }
    hb_block_free(b);
    pthread_mutex_destroy(&hb->lock);
    free(hb);
}

void hbitmap_free(HBitmap *hb)
{
    bool pinned;

    if (!hb) {
        return;
    }
    hb_lock(hb, HB_READ);
    hb->unwanted = true;
    pinned = hb->pins != 0;
    hb_unlock(hb);
    if (!pinned) {
        hb_delete(hb);
    }
}

int hbitmap_truncate(HBitmap *hb, uint64_t size)
{
    struct hb_block *old, *b;
    int err = 0;

    hb_lock(hb, HB_CHANGE);
    old = hb_block_of(hb);
    if (size == old->size) {
        goto out;
    }
    if (hb->foreign_leaf || hb->pins) {
        err = -EBUSY;
        goto out;
    }
    b = hb_block_new(size, hb->granularity, NULL, 0);
    if (!b) {
        err = -errno;
        goto out;
    }
    for (uint64_t word = hb_next_bit(old, 1, 0); word < b->nwords[0];
         word = hb_next_bit(old, 1, word + 1)) {
        uint64_t value = atomic_load(&old->level[0][word]) & hb_used(b, word);

        if (value) {
            atomic_store(&b->level[0][word], value);
            hb_name(b, word);
        }
    }
    b->older = old;
    atomic_store(&hb->block, b);
    hb_count_changed(hb);
out:
    hb_unlock(hb);
    return err;
}

void hbitmap_pin(HBitmap *hb)
{
    hb_lock(hb, HB_READ);
    hb->pins++;
    hb_unlock(hb);
}

void hbitmap_unpin(HBitmap *hb)
{
    bool last;

    hb_lock(hb, HB_READ);
    hb->pins--;
    last = hb->unwanted && hb->pins == 0;
    hb_unlock(hb);
    if (last) {
        hb_delete(hb);
    }
}

/* ---- marks -------------------------------------------------------------- */

/* For the stress test: the mistake that internal.h warns of. */
#ifdef HB_BREAK_EARLY_EXIT
#define HB_MAYBE_BREAK(gained) do { if (!(gained)) return false; } while (0)
#else
#define HB_MAYBE_BREAK(gained) ((void)0)
#endif

/*
 * May word `word` of the leaf hold something?  Where the summary says no, a mark
 * does not look before it writes: on fresh memory the look would cost a page
 * fault of its own.  Nothing depends on the answer being right, so this is a
 * relaxed load.
 */
static inline bool hb_maybe_dirty(const struct hb_block *b, uint64_t word)
{
    return atomic_load_explicit(&b->level[1][word / HB_BITS],
                                memory_order_relaxed) >> (word % HB_BITS) & 1;
}

/* Sets `mask` in a word of level k; false only if its bits were set already. */
static inline bool hb_mark_part(const struct hb_block *b, unsigned k,
                                uint64_t word, uint64_t mask)
{
    if (k > 0 || hb_maybe_dirty(b, word)) {
        return hb_or(&b->level[k][word], mask);
    }
    atomic_fetch_or(&b->level[0][word], mask);
    return true;
}

/*
 * Sets all bits of the words [first, end) of level k; false only if they were
 * set already.  The caller's fence stands between this and the next level.
 *
 * A clear that empties a word after the store has taken the mark; one that did
 * so before it left the word to the store.
 */
static bool hb_mark_whole(const struct hb_block *b, unsigned k,
                          uint64_t first, uint64_t end)
{
    bool changed = false;

    /* Those under one summary word at a time, so that a few that are clear do
     * not cause stores to all.  As above, no look where all are empty. */
    while (first < end) {
        uint64_t stop = hb_min(end, (first / HB_BITS + 1) * HB_BITS);
        hb_word *words = &b->level[k][first];

        if ((k == 0 && !atomic_load_explicit(&b->level[1][first / HB_BITS],
                                             memory_order_relaxed)) ||
            !hb_all_ones(words, stop - first)) {
            hb_fill_words(words, 0xff, stop - first);
            changed = true;
        }
        first = stop;
    }
    return changed;
}

/* Sets the bits [first, last] of level k; false only if they were set already. */
static bool hb_mark_level(const struct hb_block *b, unsigned k,
                          uint64_t first, uint64_t last)
{
    uint64_t head = first / HB_BITS, tail = last / HB_BITS;
    bool changed;

    if (head == tail) {
        return hb_mark_part(b, k, head, hb_mask_from(first) & hb_mask_to(last));
    }
    __builtin_prefetch(&b->level[k][head], 1);
    __builtin_prefetch(&b->level[k][tail], 1);
    changed = hb_mark_whole(b, k, head + 1, tail);
    changed |= hb_mark_part(b, k, head, hb_mask_from(first));
    changed |= hb_mark_part(b, k, tail, hb_mask_to(last));
    return changed;
}

void hb_name_some(const struct hb_block *b, uint64_t parent, uint64_t words)
{
    hb_word *named = &b->level[1][parent];

    if (words & ~atomic_load(named)) {
        struct hb_slot *slot = hb_summarising_begins();
        uint64_t bit = parent;

        for (unsigned k = 2; k < b->nlevels; k++) {
            hb_test_delay();
            hb_or_bit(b->level[k], bit);
            bit /= HB_BITS;
        }
        hb_test_delay();
        atomic_fetch_or(named, words);
        hb_summarising_ends(slot);
    }
}

void hb_name_range(const struct hb_block *b, uint64_t first, uint64_t last)
{
    uint64_t head = first / HB_BITS, tail = last / HB_BITS;
    const hb_word *named = b->level[1];

    if (head == tail) {
        hb_name_some(b, head, hb_mask_from(first) & hb_mask_to(last));
        return;
    }
    if ((~atomic_load(&named[head]) & hb_mask_from(first)) ||
        (~atomic_load(&named[tail]) & hb_mask_to(last)) ||
        !hb_all_ones(&named[head + 1], tail - head - 1)) {
        struct hb_slot *slot = hb_summarising_begins();
        uint64_t lo = head, hi = tail;

        /* Loads and stores follow that are plain.  If they came before what says
         * so, a clear that takes the bits they saw or set would not wait. */
        hb_fence();
        for (unsigned k = 2; k < b->nlevels; k++) {
            hb_test_delay();
            (void)hb_mark_level(b, k, lo, hi);
            lo /= HB_BITS;
            hi /= HB_BITS;
        }
        /* Whoever sees a bit of level 1 relies on those above, some of which
         * may have been stored: they come first. */
        hb_fence();
        hb_test_delay();
        (void)hb_mark_level(b, 1, first, last);
        hb_summarising_ends(slot);
    } else {
        /* Plain loads; what is above these bits was set by others. */
        hb_read_fence();
    }
}

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
    hb_name_range(b, first / HB_BITS, last / HB_BITS);
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
    hb_name(b, word);
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
static int hb_set_name(HBitmap *hb, const struct hb_block *b, uint64_t word)
{
    hb_name_some(b, word / HB_BITS, hb_bit(word));
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
        return hb_is_set(b->level[1], word) ? 0 : hb_set_name(hb, b, word);
    }
    atomic_fetch_or(&b->level[0][word], hb_bit(first));
    hb_test_delay();
    if (!hb_is_set(b->level[1], word)) {
        return hb_set_name(hb, b, word);
    }
    hb_count_changed(hb);
    return 0;
}

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

/* ---- clears ------------------------------------------------------------- */

void hb_unname(const struct hb_block *b, uint64_t parent, uint64_t words,
               struct hb_gone *gone)
{
    uint64_t left, again = 0;

    hb_test_delay();
    left = atomic_fetch_and(&b->level[1][parent], ~words) & ~words;
    hb_test_delay();
    /* The second look.  A mark of such a word that came after the first look and
     * still found it named came before the fetch_and in the one order of all
     * these accesses, so it is seen here. */
    for (; words; words &= words - 1) {
        if (atomic_load(&b->level[0][parent * HB_BITS + hb_lowest(words)])) {
            again |= words & (0 - words);
        }
    }
    if (again) {
        hb_name_some(b, parent, again);
    } else if (!left && b->nlevels > 2) {
        /* This word was emptied in its turn. */
        if (gone->word != parent / HB_BITS) {
            hb_unsummarise(b, gone);
            gone->word = parent / HB_BITS;
        }
        gone->bits |= hb_bit(parent);
    }
}

void hb_unsummarise(const struct hb_block *b, struct hb_gone *gone)
{
    uint64_t taken[HB_MAX_LEVELS];
    uint64_t word = gone->word, bits = gone->bits;
    unsigned end = 2;

    if (!bits) {
        return;
    }
    gone->bits = 0;
    while (end < b->nlevels) {
        uint64_t left;

        hb_test_delay();
        left = atomic_fetch_and(&b->level[end][word], ~bits) & ~bits;

        taken[end++] = bits;
        if (left) {
            break;
        }
        bits = hb_bit(word);
        word /= HB_BITS;
    }
    /* Who found a bit set that is gone now has said before that it is naming
     * words.  Behind this it has named them, and the plain loads below come
     * after the loads that have seen so. */
    hb_wait_for_summarising();
    hb_test_delay();
    word = gone->word;
    for (unsigned k = 2; k < end; k++) {
        uint64_t at = word * HB_BITS;

        bits = taken[k] & hb_nonzero(&b->level[k - 1][at],
                                     hb_min(HB_BITS, b->nwords[k - 1] - at));
        for (; bits; bits &= bits - 1) {
            uint64_t below = at + hb_lowest(bits);

            for (unsigned up = k; up < b->nlevels; up++) {
                hb_or_bit(b->level[up], below);
                below /= HB_BITS;
            }
        }
        word /= HB_BITS;
    }
}

/*
 * Empties the leaf words [word, end), whole ones under summary words, at most
 * those under one word of level 2.
 *
 * Summary first, see internal.h.  What is stored is relaxed; the fence pairs
 * with the accesses of a mark, leaf then summary, which are sequentially
 * consistent or have the same fence between them: if the mark's leaf word comes
 * after ours, its look at the summary comes after our store.  A mark by loads
 * alone has less between them, an acquire fence.  Should it find what another
 * mark stored after ours, and the summary as it was before, then it did not
 * begin after this clear, so it counts as taken; the other one sees to the
 * summary.  Above it is the usual order, with the second look, at 64 times fewer
 * words.
 */
static void hb_empty_words(const struct hb_block *b, uint64_t word, uint64_t end)
{
    uint64_t first = word / HB_BITS, last = (end - 1) / HB_BITS;
    struct hb_gone gone = { first / HB_BITS, hb_mask_from(first) & hb_mask_to(last) };

    hb_fill_words(&b->level[1][first], 0, last - first + 1);
    hb_fence();
    hb_test_delay();
    hb_fill_words(&b->level[0][word], 0, end - word);
    hb_unsummarise(b, &gone);
}

/* Where such words end, if they begin at `word`; else `word`. */
static uint64_t hb_whole_end(const struct hb_block *b, uint64_t word,
                             uint64_t first, uint64_t last)
{
    const uint64_t under = HB_BITS * HB_BITS;
    /* Behind the last word that is in the range with all its bits: the last of
     * the bitmap is one, whatever it has. */
    uint64_t end = last + 1 == b->ngroups ? b->nwords[0] : (last + 1) / HB_BITS;

    if (word % HB_BITS || word * HB_BITS < first) {
        return word;
    }
    if (end < b->nwords[0]) {
        end = end / HB_BITS * HB_BITS;
    }
    end = hb_min(end, (word / under + 1) * under);
    return word < end ? hb_many_end(b, HB_SOME, word, end) : word;
}

/* Clears `mask` in a word; had it such a bit? */
static bool hb_clear_word(const struct hb_block *b, uint64_t word, uint64_t mask)
{
    struct hb_gone gone = { 0, 0 };
    uint64_t old = atomic_load(&b->level[0][word]);

    if (!(old & mask)) {
        return false;
    }
    old = atomic_fetch_and(&b->level[0][word], ~mask);
    if (!(old & ~mask)) {
        hb_unname(b, word / HB_BITS, hb_bit(word), &gone);
        hb_unsummarise(b, &gone);
    }
    return (old & mask) != 0;
}

bool hb_clear(const struct hb_block *b, uint64_t first, uint64_t last,
              const struct hb_block *into, bool fresh)
{
    hb_word *leaf = b->level[0];
    uint64_t head = first / HB_BITS, tail = last / HB_BITS;
    struct hb_gone gone = { 0, 0 };
    bool changed = false;

    if (head == tail && !into) {
        return hb_clear_word(b, head, hb_mask_from(first) & hb_mask_to(last));
    }
    /* One word of level 1, so up to 64 leaf words, at a time. */
    for (uint64_t next = hb_next_bit(b, 1, head); next <= tail;
         next = hb_next_bit(b, 1, next)) {
        uint64_t parent = next / HB_BITS;
        uint64_t named = atomic_load(&b->level[1][parent]) &
                         hb_mask(parent, next, tail);
        uint64_t empty = 0, moved = 0;
        uint64_t whole = into ? 0 : hb_whole_end(b, parent * HB_BITS, first, last);

        if (whole > parent * HB_BITS) {
            hb_empty_words(b, parent * HB_BITS, whole);
            changed = true;
            next = whole;
            continue;
        }
        for (uint64_t bits = named; bits; bits &= bits - 1) {
            uint64_t word = parent * HB_BITS + hb_lowest(bits);
            uint64_t mask = hb_mask(word, first, last);
            uint64_t old = atomic_load(&leaf[word]);

            if (old & mask) {
                if (mask == UINT64_MAX && !into) {
                    /* Relaxed: a mark that this store overwrites overlaps this
                     * clear, one that comes after it is found by the second
                     * look, and that comes after a read-modify-write, which
                     * keeps this store before it. */
                    atomic_store_explicit(&leaf[word], 0, HB_BULK);
                    old = 0;
                    changed = true;
                } else {
                    uint64_t taken;

                    /* An exchange is one instruction everywhere. */
                    old = mask == UINT64_MAX
                              ? atomic_exchange(&leaf[word], 0)
                              : atomic_fetch_and(&leaf[word], ~mask);
                    taken = old & mask;
                    old &= ~mask;
                    if (taken) {
                        changed = true;
                        if (into && fresh) {
                            atomic_store_explicit(&into->level[0][word], taken,
                                                  memory_order_relaxed);
                        } else if (into) {
                            (void)hb_mark_part(into, 0, word, taken);
                        }
                        moved |= hb_bit(word);
                    }
                }
            }
            if (!old) {
                empty |= hb_bit(word);
            }
        }
        if (into && moved) {
            hb_name_some(into, parent, moved);
        }
        if (empty) {
            hb_unname(b, parent, empty, &gone);
        }
        next = (parent + 1) * HB_BITS;
    }
    hb_unsummarise(b, &gone);
    return changed;
}

int hb_whole_groups(const HBitmap *hb, const struct hb_block *b,
                    uint64_t start, uint64_t count,
                    uint64_t *first, uint64_t *last)
{
    uint64_t inside = (UINT64_C(1) << hb->granularity) - 1;
    uint64_t end = start + count;

    /* A start in the last group, and an end at the size rounded up, are both
     * within the rounded size, which fits 64 bits. */
    if (start >= b->size || count > hb_round_up(hb, b->size) - start) {
        return -ERANGE;
    }
    if (start & inside) {
        return -EINVAL;
    }
    if ((end & inside) && end != b->size) {
        return end > b->size ? -ERANGE : -EINVAL;
    }
    *first = start >> hb->granularity;
    *last = (end - 1) >> hb->granularity;
    return 0;
}

int hbitmap_reset(HBitmap *hb, uint64_t start, uint64_t count)
{
    const struct hb_block *b;
    uint64_t first, last;
    int err;

    if (count == 0) {
        return 0;
    }
    hb_lock(hb, HB_CHANGE);
    b = hb_block_of(hb);
    err = hb_whole_groups(hb, b, start, count, &first, &last);
    if (!err && hb_clear(b, first, last, NULL, false)) {
        hb_count_changed(hb);
    }
    hb_unlock(hb);
    return err;
}

/*
 * The first part of what empties leaf words by their pages: no word of level 1
 * under word `word` of level 2 names any.  (Below two summaries, word 0.)
 */
static void hb_drop_summaries_under(const struct hb_block *b, uint64_t word)
{
    struct hb_gone gone = { word, b->nlevels > 2 ? atomic_load(&b->level[2][word]) : 1 };

    for (uint64_t bits = gone.bits; bits; bits &= bits - 1) {
        atomic_store_explicit(&b->level[1][word * HB_BITS + hb_lowest(bits)], 0,
                              HB_BULK);
    }
    hb_fence();
    hb_unsummarise(b, &gone);
}

static void hb_drop_summaries(const struct hb_block *b)
{
    if (b->nlevels == HB_MIN_LEVELS) {
        hb_drop_summaries_under(b, 0);
        return;
    }
    for (uint64_t at = hb_next_bit(b, 2, 0); at != HB_NONE;
         at = hb_next_bit(b, 2, (at / HB_BITS + 1) * HB_BITS)) {
        hb_drop_summaries_under(b, at / HB_BITS);
    }
}

#ifdef HB_TSAN
/* It does not see mremap, and would take the pages for what was there before. */
#define HB_MOVE_FLAGS (MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED)
#define hb_move_to(nbytes) hb_map(nbytes)
#else
#define HB_MOVE_FLAGS (MREMAP_MAYMOVE | MREMAP_DONTUNMAP)
#define hb_move_to(nbytes) NULL
#endif

/*
 * As in hb_give_back: when mremap has returned no processor reaches the pages
 * by their old address, so a mark is either in them, or in a new one, and then
 * it comes after the summary went.  What is in them and was not named yet is in
 * them all the same, so whoever gets them has to look at every word.
 */
hb_word *hb_move_leaf(const HBitmap *hb, const struct hb_block *b, size_t *nbytes)
{
#ifdef __linux__
    /* By an older Linux, or by what only looks like one. */
    static atomic_bool refused;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *moved;

    if (hb->foreign_leaf || !b->mapped || (uintptr_t)b->level[0] % page != 0 ||
        atomic_load(&refused)) {
        return NULL;
    }
    *nbytes = hb_align((size_t)b->nwords[0] * sizeof(hb_word), page);
    hb_drop_summaries(b);
    hb_fence();
    hb_test_delay();
    errno = 0;
    moved = hb_test_alloc_fails()
                ? MAP_FAILED : mremap((void *)b->level[0], *nbytes, *nbytes,
                                      HB_MOVE_FLAGS, hb_move_to(*nbytes));
    if (moved != MAP_FAILED) {
        return moved;
    }
    if (errno == EINVAL) {
        atomic_store(&refused, true);
    }
    for (uint64_t word = 0; word < b->nwords[0]; word++) {
        if (atomic_load(&b->level[0][word])) {
            hb_name(b, word);
        }
    }
#else
    (void)hb;
    (void)b;
    (void)nbytes;
#endif
    return NULL;
}

uint64_t hb_pages_named(const struct hb_block *b)
{
    uint64_t pages = 0;

    if (b->nlevels == HB_MIN_LEVELS) {
        return atomic_load(&b->level[1][0]) != 0;
    }
    for (uint64_t word = hb_next_bit(b, 2, 0); word != HB_NONE;
         word = hb_next_bit(b, 2, (word / HB_PAGE_PARENTS + 1) * HB_PAGE_PARENTS)) {
        pages++;
    }
    return pages;
}

/*
 * Empties a large bitmap by giving its pages back, as far as that can be done;
 * false: nothing was emptied.
 *
 * As in hb_empty_words: first the summary, then the leaf.  Once madvise has
 * returned no processor reaches the old pages, so a mark is either in them, and
 * was taken, or in a new one, and then it comes after the summary went.
 */
static bool hb_give_back(const HBitmap *hb, const struct hb_block *b)
{
    bool changed = false;

#ifdef __linux__
    /* The words of level 1 over 2 MiB of the leaf, which are done at a time. */
    const uint64_t step = HB_BITS * HB_BITS;

    if (hb->foreign_leaf || !b->mapped || b->nlevels < 3 ||
        b->nwords[0] * sizeof(hb_word) < HB_GIVE_BACK_MIN) {
        return false;
    }
    for (uint64_t word = hb_next_bit(b, 2, 0); word != HB_NONE;) {
        uint64_t at = word / step * step * HB_BITS;
        uint64_t n = hb_min(b->nwords[0] - at, step * HB_BITS);

        for (; word < at / HB_BITS + step;
             word = hb_next_bit(b, 2, (word / HB_BITS + 1) * HB_BITS)) {
            hb_drop_summaries_under(b, word / HB_BITS);
        }
        changed = true;
        hb_fence();
        if (madvise((void *)&b->level[0][at], (size_t)n * sizeof(hb_word),
                    MADV_DONTNEED) != 0) {
            /* Locked memory.  What comes after this is better emptied word by
             * word: much of it may never have been touched. */
            hb_fill_words(&b->level[0][at], 0, n);
            break;
        }
    }
#else
    (void)hb;
    (void)b;
#endif
    return changed;
}

void hbitmap_reset_all(HBitmap *hb)
{
    const struct hb_block *b;

    hb_lock(hb, HB_CHANGE);
    b = hb_block_of(hb);
    if (b->ngroups) {
        bool changed = hb_give_back(hb, b);

        changed |= hb_clear(b, 0, b->ngroups - 1, NULL, false);
        if (changed) {
            hb_count_changed(hb);
        }
    }
    hb_unlock(hb);
}

int hbitmap_take(HBitmap *hb, uint64_t item)
{
    const struct hb_block *b;
    int taken = -ERANGE;

    hb_lock(hb, HB_CHANGE);
    b = hb_block_of(hb);
    if (item < b->size) {
        uint64_t group = item >> hb->granularity;

        taken = hb_clear(b, group, group, NULL, false);
        if (taken) {
            hb_count_changed(hb);
        }
    }
    hb_unlock(hb);
    return taken;
}

/* ---- questions ---------------------------------------------------------- */

uint64_t hbitmap_size(const HBitmap *hb)
{
    return hb_block_of(hb)->size;
}

int hbitmap_granularity(const HBitmap *hb)
{
    return hb->granularity;
}

bool hbitmap_get(const HBitmap *hb, uint64_t item)
{
    const struct hb_block *b = hb_block_of(hb);
    uint64_t group = item >> hb->granularity;

    return item < b->size &&
           (atomic_load(&b->level[0][group / HB_BITS]) & hb_bit(group)) != 0;
}

bool hbitmap_empty(const HBitmap *hb)
{
    bool empty = hb_next_bit(hb_block_of(hb), 0, 0) == HB_NONE;

    if (empty) {
        /* Or a clear was about to restore a summary that this search missed. */
        hb_lock(hb, HB_READ);
        empty = hb_next_bit(hb_block_of(hb), 0, 0) == HB_NONE;
        hb_unlock(hb);
    }
    return empty;
}

const uint64_t *hbitmap_words(const HBitmap *hb, size_t *nwords)
{
    const struct hb_block *b = hb_block_of(hb);

    *nwords = (size_t)b->nwords[0];
    return (const uint64_t *)b->level[0];
}

/* ---- locks -------------------------------------------------------------- */

static void hb_order(const HBitmap **a, const HBitmap **b)
{
    if ((uintptr_t)*a > (uintptr_t)*b) {
        const HBitmap *t = *a;

        *a = *b;
        *b = t;
    }
}

void hb_lock_all(const HBitmap *a, const HBitmap *b, const HBitmap *changed)
{
    const HBitmap *c = changed;

    hb_order(&a, &b);
    hb_order(&b, &c);
    hb_order(&a, &b);
    if (a) {
        hb_lock(a, a == changed ? HB_CHANGE : HB_READ);
    }
    if (b != a) {
        hb_lock(b, b == changed ? HB_CHANGE : HB_READ);
    }
    if (c != b) {
        hb_lock(c, c == changed ? HB_CHANGE : HB_READ);
    }
}

void hb_unlock_all(const HBitmap *a, const HBitmap *b, const HBitmap *changed)
{
    const HBitmap *c = changed;

    hb_order(&a, &b);
    hb_order(&b, &c);
    hb_order(&a, &b);
    if (c != b) {
        hb_unlock(c);
    }
    if (b != a) {
        hb_unlock(b);
    }
    if (a) {
        hb_unlock(a);
    }
}

static bool hb_any_torn;

void hb_locks_forget(struct hb_slot *slot)
{
#ifdef HB_BREAK_KEEP_LOCKS
    return;     /* for the stress test */
#endif
    for (unsigned i = 0; i < HB_MOST_LOCKS; i++) {
        uintptr_t said = atomic_load(&slot->locked[i]);
        HBitmap *hb = (HBitmap *)(said & ~(uintptr_t)1);

        if (hb) {
            (void)pthread_mutex_init(&hb->lock, NULL);
            hb->torn |= said & 1;
            hb_any_torn |= said & 1;
            atomic_store(&slot->locked[i], 0);
        }
    }
}

void hb_finish_marks(const HBitmap *hb)
{
    HBitmap *own = (HBitmap *)(uintptr_t)hb;
    const struct hb_block *b = hb_block_of(hb);

#ifdef HB_BREAK_UNFINISHED_MARKS
    return;     /* for the stress test */
#endif
    for (uint64_t word = 0; word < b->nwords[0]; word++) {
        if (atomic_load(&b->level[0][word])) {
            hb_name(b, word);
        }
    }
    /* And what a clear had taken above level 1, and did not come to look at again. */
    for (unsigned k = 1; k + 1 < b->nlevels; k++) {
        for (uint64_t word = 0; word < b->nwords[k]; word++) {
            if (atomic_load(&b->level[k][word])) {
                (void)hb_or_bit(b->level[k + 1], word);
            }
        }
    }
    hb_count_changed(own);
    atomic_store(&own->forks, hb_forks);
}

bool hbitmap_torn(const HBitmap *hb)
{
    return hb ? hb->torn : hb_any_torn;
}

/* ---- threads ------------------------------------------------------------- */

int hbitmap_thread_init(void)
{
    return hb_slot() ? 0 : -ENOMEM;
}
