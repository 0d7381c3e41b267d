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

#include "locks.h"
#include "pages.h"
#include "protocol.h"

/* ---- blocks ------------------------------------------------------------- */

/* From here on levels are mapped, so that what is never marked takes no
 * memory. */
#ifndef HB_MAP_MIN
#define HB_MAP_MIN ((size_t)256 << 10)
#endif

/* Up to here a block that was full is kept when its bitmap goes. */
#define HB_SPARE_MAX ((size_t)8 << 20)

_Static_assert(sizeof(size_t) == sizeof(uint64_t), "HBitmap needs 64-bit addresses");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && sizeof(hb_word) == sizeof(uint64_t),
               "HBitmap needs lock-free 64-bit atomics");

static void *hb_zalloc(size_t nbytes)
{
    void *memory = NULL;

    if (hb_test_alloc_fails() ||
        posix_memalign(&memory, HB_CACHE_LINE, nbytes) != 0) {
        return NULL;
    }
    return memset(memory, 0, nbytes);
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

void hb_build_summaries(const struct hb_block *b)
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
    hb_build_summaries(b);
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
            hb_summarise(b, word);
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

/* ---- questions ---------------------------------------------------------- */

uint64_t hbitmap_size(const HBitmap *hb)
{
    return hb_block_of(hb)->size;
}

int hbitmap_granularity(const HBitmap *hb)
{
    return hb->granularity;
}

const uint64_t *hbitmap_words(const HBitmap *hb, size_t *nwords)
{
    const struct hb_block *b = hb_block_of(hb);

    *nwords = (size_t)b->nwords[0];
    return (const uint64_t *)b->level[0];
}
