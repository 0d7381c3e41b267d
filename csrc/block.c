/* SPDX-License-Identifier: MIT */
/*
 * The block of levels: its shape and memory; bitmaps over it, from allocation to
 * the last unpin; truncation.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* posix_memalign */
#endif

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "count.h"
#include "locks.h"
#include "pages.h"

/* ---- blocks ------------------------------------------------------------- */

/* From here on levels are mapped, so that what is never marked takes no
 * memory. */
#ifndef HB_MAP_MIN
#define HB_MAP_MIN ((size_t)512 << 10)
#endif

/* Up to here a block that was full is kept when its bitmap goes. */
#define HB_SPARE_MAX ((size_t)8 << 20)

_Static_assert(sizeof(size_t) == sizeof(uint64_t), "HBitmap needs 64-bit addresses");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && sizeof(hb_word) == sizeof(uint64_t),
               "HBitmap needs lock-free 64-bit atomics");

/* Zeroes that begin at a cache line; *memory is what to free. */
static void *hb_zalloc(size_t nbytes, void **memory)
{
    /* calloc knows what is zero already, which no other function of its kind does. */
    *memory = hb_test_alloc_fails() ? NULL : calloc(1, nbytes + HB_CACHE_LINE);
    return *memory ? (void *)hb_align((uintptr_t)*memory, HB_CACHE_LINE) : NULL;
}

/* Size and levels of a block.  False: there is no such bitmap. */
static bool hb_shape(struct hb_block *b, uint64_t size, int granularity)
{
    uint64_t nwords;

    if (granularity < 0 || granularity > 63 || size > INT64_MAX) {
        return false;
    }
    b->size = size;
    b->ngroups = size ? ((size - 1) >> granularity) + 1 : 0;
    if (b->ngroups > UINT64_C(1) << HBITMAP_LOG_MAX_SIZE) {
        return false;
    }
    nwords = b->ngroups ? (b->ngroups - 1) / HB_BITS + 1 : 1;
    do {
        b->nwords[b->nlevels++] = nwords;
        nwords = (nwords - 1) / HB_BITS + 1;
    } while (b->nlevels < HB_MIN_LEVELS || b->nwords[b->nlevels - 1] > 1);
    while ((b->nwords[1] - 1) / HB_BITS >> b->top_shift >= HB_BITS) {
        b->top_shift++;
    }
    return true;
}

/* The next nbytes of `memory` (NULL: they are only counted), from *at on. */
static void *hb_place(char *memory, size_t *at, uint64_t nbytes)
{
    void *place = memory ? memory + *at : NULL;

    *at += hb_align((size_t)nbytes, HB_CACHE_LINE);
    return place;
}

/* All that a block has but its leaf; returns how many bytes that are. */
static size_t hb_place_all(struct hb_block *b, char *memory)
{
    size_t at = hb_align(sizeof(*b), HB_CACHE_LINE);

    for (unsigned k = 1; k < b->nlevels; k++) {
        b->level[k] = hb_place(memory, &at, b->nwords[k] * sizeof(hb_word));
    }
    b->notes = hb_place(memory, &at, ((b->nwords[1] - 1) / HB_BITS + 1) * sizeof(hb_word));
    b->counts = hb_place(memory, &at, b->nwords[1] * sizeof(b->counts[0]));
    b->touched = hb_place(memory, &at, (b->nwords[1] / HB_HUGE_PARENTS + 1) *
                                       sizeof(b->touched[0]));
    return at;
}

/* A block for `size` items, all clean, over `leaf` unless that is NULL.  NULL
 * with errno. */
static struct hb_block *hb_block_new(uint64_t size, int granularity,
                                     uint64_t *leaf, size_t nleaf)
{
    struct hb_block shape = { .size = 0 }, *b;
    size_t nbytes, leaf_nbytes, leaf_at = 0, page, slack = 0;
    char *at;

    if (!hb_shape(&shape, size, granularity) || (leaf && shape.nwords[0] > nleaf)) {
        errno = EINVAL;
        return NULL;
    }
    nbytes = hb_place_all(&shape, NULL);
    leaf_nbytes = (size_t)shape.nwords[0] * sizeof(hb_word);
    if (!leaf) {
        page = nbytes + leaf_nbytes >= HB_MAP_MIN ? (size_t)sysconf(_SC_PAGESIZE)
                                                  : HB_CACHE_LINE;
        leaf_at = hb_align(nbytes, page);
        slack = leaf_nbytes >= HB_HUGE ? HB_HUGE : 0;
        nbytes = hb_align(leaf_at + slack + leaf_nbytes, HB_CACHE_LINE);
    }
    if (nbytes >= HB_MAP_MIN) {
        shape.mapped = nbytes;
        shape.memory = at = hb_map(nbytes);
        shape.paged = !leaf;
    } else {
        at = hb_zalloc(nbytes, &shape.memory);
    }
    if (!at) {
        errno = ENOMEM;
        return NULL;
    }
    b = (struct hb_block *)at;
    *b = shape;
    (void)hb_place_all(b, at);
    /* _Atomic uint64_t has the size and the alignment of uint64_t wherever it
     * is lock-free, which the assertion above makes sure of. */
    b->level[0] = leaf ? (hb_word *)leaf : (hb_word *)(at + leaf_at);
    if (slack) {
        /* Huge pages are for leaves that begin where one can. */
        b->level[0] = (hb_word *)hb_align((uintptr_t)b->level[0], HB_HUGE);
    }
    return b;
}

static void hb_block_free(struct hb_block *b)
{
    while (b) {
        struct hb_block *older = b->older;

        if (b->leaf_mapped) {
            munmap((void *)b->level[0], b->leaf_mapped);
        }
        if (b->mapped) {
            munmap(b->memory, b->mapped);
        } else {
            free(b->memory);
        }
        b = older;
    }
}

/* ---- life --------------------------------------------------------------- */

/* Over a block, unless that is NULL; it goes if there is no memory. */
static HBitmap *hb_new_over(struct hb_block *b, int granularity, bool foreign_leaf)
{
    HBitmap *hb;
    void *memory;

    if (!b) {
        return NULL;
    }
    hb_slots_ready();
    hb = hb_zalloc(sizeof(*hb), &memory);
    if (!hb || pthread_mutex_init(&hb->lock, NULL) != 0) {
        free(memory);
        hb_block_free(b);
        errno = ENOMEM;
        return NULL;
    }
    hb->home = &hb_home;
    atomic_init(&hb->block, b);
    hb->granularity = granularity;
    hb->foreign_leaf = foreign_leaf;
    hb->memory = memory;
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
 * pages for a union take several times as long as the union; what malloc hands out
 * again has its pages.  Only for what is going to be full, since what is sparse is
 * not to have them.
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

void hb_build_summaries(const struct hb_block *b, unsigned least)
{
    for (unsigned k = least; k < b->nlevels; k++) {
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
    hb_build_summaries(b, 1);
    hb_note_named(b);
    return hb;
}

static void hb_delete(HBitmap *hb)
{
    struct hb_block *b = hb_block_of(hb);

    if (b->paged && b->mapped <= HB_SPARE_MAX && !b->leaf_mapped && !b->older &&
        hb_nearly_all(hb_pages_named(b), b->nwords[0])) {
        b = atomic_exchange(&hb_spare, b);
    }
    hb_block_free(b);
    pthread_mutex_destroy(&hb->lock);
    free(hb->memory);
}

void hbitmap_free(HBitmap *hb)
{
    bool pinned;

    if (!hb) {
        return;
    }
    HB_AT_HOME_VOID(hb, hbitmap_free, hb);
    hb_lock(hb, HB_READ);
    hb->unwanted = true;
    pinned = hb->pins != 0;
    hb_unlock(hb);
    if (!pinned) {
        hb_delete(hb);
    }
}

/*
 * What `old` has goes into b, which nobody else sees yet, as far as it reaches: leaf,
 * levels 1 and 2.  For one thread alone the pages move.  Beside others a word could
 * be marked in `old` and not be named yet, so what is copied is looked at.
 */
static void hb_copy_leaf(const struct hb_block *old, const struct hb_block *b)
{
    uint64_t end = hb_min(old->nwords[0], b->nwords[0]), parent = 0, last = end - 1;
    bool filling;

    if (hb_alone()) {
        parent = hb_move_pages(old, b, end) / HB_BITS;
        /* Where no piece is named, level 1 takes no memory. */
        for (uint64_t above = hb_next_above(old, 0);
             above != HB_NONE && above * HB_BITS < parent;
             above = hb_next_above(old, above + 1)) {
            uint64_t at = above * HB_BITS;

            hb_copy_words(&b->level[1][at], (const void *)&old->level[1][at],
                          hb_min(HB_BITS, parent - at));
        }
    }
    filling = parent * HB_BITS < end && hb_will_fill(b, end, hb_pages_named(old));
    for (; parent * HB_BITS < end; parent++) {
        uint64_t at = parent * HB_BITS;

        if (atomic_load(&old->level[1][parent])) {
            atomic_store(&b->level[1][parent],
                         hb_copy_nonzero(&b->level[0][at], (const void *)&old->level[0][at],
                                         hb_min(HB_BITS, end - at)));
        }
    }
    if (filling) {
        hb_filled(b);
    }
    if (hb_is_set(b->level[1], last)) {
        atomic_fetch_and(&b->level[0][last], hb_used(b, last));
    }
    /* What was just found named in `old` is so on all of its levels: the lock is held. */
    for (uint64_t above = hb_next_above(old, 0);
         b->nlevels > HB_MIN_LEVELS && above < b->nwords[2];
         above = hb_next_above(old, above + 1)) {
        uint64_t at = above * HB_BITS;

        atomic_store_explicit(&b->level[2][above],
                              hb_nonzero(&b->level[1][at], hb_min(HB_BITS, b->nwords[1] - at)),
                              memory_order_relaxed);
    }
}

int hbitmap_truncate(HBitmap *hb, uint64_t size)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_truncate, hb, size);
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
    hb_copy_leaf(old, b);
    hb_build_summaries(b, 3);
    hb_note_named(b);
    b->older = old;
    atomic_store(&hb->block, b);
out:
    hb_unlock(hb);
    return err;
}

void hbitmap_pin(HBitmap *hb)
{
    HB_AT_HOME_VOID(hb, hbitmap_pin, hb);
    hb_lock(hb, HB_READ);
    hb->pins++;
    hb_unlock(hb);
}

void hbitmap_unpin(HBitmap *hb)
{
    HB_AT_HOME_VOID(hb, hbitmap_unpin, hb);
    bool last;

    hb_lock(hb, HB_READ);
    hb->pins--;
    last = hb->unwanted && hb->pins == 0;
    hb_unlock(hb);
    if (last) {
        hb_delete(hb);
    }
}

void hbitmap_pin_into(HBitmap *hb, HBitmap **pin)
{
    hbitmap_pin(hb);
    *pin = hb;
}

void hbitmap_drop_pin(HBitmap **pin)
{
    HBitmap *pinned = __atomic_exchange_n(pin, NULL, __ATOMIC_SEQ_CST);

    if (pinned) {
        hbitmap_unpin(pinned);
    }
}

/* ---- questions ---------------------------------------------------------- */

uint64_t hbitmap_size(const HBitmap *hb)
{
    HB_AT_HOME(hb, 0, hbitmap_size, hb);
    return hb_block_of(hb)->size;
}

int hbitmap_granularity(const HBitmap *hb)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_granularity, hb);
    return hb->granularity;
}

const uint64_t *hbitmap_words(const HBitmap *hb, size_t *nwords)
{
    HB_AT_HOME(hb, (*nwords = 0, NULL), hbitmap_words, hb, nwords);
    const struct hb_block *b = hb_block_of(hb);

    *nwords = (size_t)b->nwords[0];
    return (const uint64_t *)b->level[0];
}
