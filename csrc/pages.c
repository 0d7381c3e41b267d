/* SPDX-License-Identifier: MIT */
/*
 * What is done with whole pages, most of it by what only Linux has: mapped without
 * being reserved, taken at once, moved away, given back.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* MAP_NORESERVE, MADV_NOHUGEPAGE, mremap */
#endif

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pages.h"
#include "probe.h"
#include "protocol.h"

/* From here on a leaf that is emptied is given back, and not stored to: then
 * that is faster also for whoever marks all of it again. */
#ifndef HB_GIVE_BACK_MIN
#define HB_GIVE_BACK_MIN ((size_t)16 << 20)
#endif

/* Since Linux 6.1. */
#if defined(__linux__) && !defined(MADV_COLLAPSE)
#define MADV_COLLAPSE 25
#endif

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

/* Linux has it since 5.7, some C libraries still have not. */
#if defined(__linux__) && !defined(MREMAP_DONTUNMAP)
#define MREMAP_DONTUNMAP 4
#endif

void *hb_map(size_t nbytes)
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

bool hb_will_fill(const struct hb_block *b, uint64_t words, uint64_t pages)
{
    size_t nbytes = (size_t)words * sizeof(hb_word);

    if (!b->paged || b->leaf_mapped || nbytes < HB_HUGE || !hb_nearly_all(pages, words) ||
        atomic_load(&b->level[b->nlevels - 1][0])) {
        return false;
    }
#ifdef MADV_HUGEPAGE
    (void)madvise((void *)b->level[0], nbytes, MADV_HUGEPAGE);      /* no more than advice */
#endif
    return true;
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
hb_word *hb_move_leaf(const struct hb_block *b, size_t *nbytes)
{
#ifdef __linux__
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *moved;

    if (!b->paged || !hb_moves_pages()) {
        return NULL;
    }
    *nbytes = hb_align((size_t)b->nwords[0] * sizeof(hb_word), page);
    hb_drop_summaries(b);
    hb_fence();     /* with those of hb_mark: leaf, then level 1 */
    hb_test_delay();
    moved = hb_test_alloc_fails()
                ? MAP_FAILED : mremap((void *)b->level[0], *nbytes, *nbytes,
                                      HB_MOVE_FLAGS, hb_move_to(*nbytes));
    if (moved != MAP_FAILED) {
        return moved;
    }
    for (uint64_t word = 0; word < b->nwords[0]; word++) {
        if (atomic_load(&b->level[0][word])) {
            hb_summarise(b, word);
        }
    }
#else
    (void)b;
    (void)nbytes;
#endif
    return NULL;
}

uint64_t hb_move_pages(const struct hb_block *from, const struct hb_block *to,
                       uint64_t words)
{
#ifdef __linux__
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t nbytes = (size_t)words * sizeof(hb_word) / page * page;

    if (nbytes && from->paged && to->paged && hb_moves_pages() &&
        !hb_test_alloc_fails() &&
        mremap((void *)from->level[0], nbytes, nbytes,
               MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED,
               (void *)to->level[0]) != MAP_FAILED) {
        return nbytes / sizeof(hb_word);
    }
#else
    (void)from;
    (void)to;
    (void)words;
#endif
    return 0;
}

/*
 * As in hb_empty_pieces: first the summary, then the leaf.  Once madvise has
 * returned no processor reaches the old pages, so a mark is either in them, and
 * was taken, or in a new one, and then it comes after the summary went.
 */
void hb_give_back(const struct hb_block *b)
{
#ifdef __linux__
    /* The words of level 1 over 2 MiB of the leaf, which are done at a time. */
    const uint64_t step = HB_BITS * HB_BITS;

    if (!b->paged || b->nlevels < 3 ||
        b->nwords[0] * sizeof(hb_word) < HB_GIVE_BACK_MIN || !hb_gives_back_pages()) {
        return;
    }
    for (uint64_t word = hb_next_bit(b, 2, 0); word != HB_NONE;) {
        uint64_t at = word / step * step * HB_BITS;
        uint64_t n = hb_min(b->nwords[0] - at, step * HB_BITS);

        for (; word < at / HB_BITS + step;
             word = hb_next_bit(b, 2, (word / HB_BITS + 1) * HB_BITS)) {
            hb_drop_summaries_under(b, word / HB_BITS);
        }
        hb_fence();     /* with those of hb_mark: leaf, then level 1 */
        if (madvise((void *)&b->level[0][at], (size_t)n * sizeof(hb_word),
                    MADV_DONTNEED) != 0) {
            /* Locked memory.  What comes after this is better emptied word by
             * word: much of it may never have been touched. */
            hb_fill_words(&b->level[0][at], 0, n);
            break;
        }
    }
#else
    (void)b;
#endif
}

/*
 * A fresh page costs as much as some hundred marks, a huge one a third of what it
 * replaces.  So 2 MiB of the leaf become one when the 32nd of their 512 pages is
 * touched.  What is marked densely soon has all; a few scattered marks take what they
 * did, and nothing takes more than 16 times that.
 */
void hb_first_named(const struct hb_block *b, uint64_t parent)
{
#ifdef MADV_COLLAPSE
    enum { DENSE = 32 };
    /* Other words of level 1 over the same page. */
    const uint64_t others = UINT64_C(0xff) << (parent % HB_BITS / 8 * 8) & ~hb_bit(parent);
    const uint64_t huge = parent / HB_HUGE_PARENTS;

    if (!b->paged || b->leaf_mapped ||
        (huge + 1) * HB_HUGE > b->nwords[0] * sizeof(hb_word) ||
        (atomic_load(&b->level[2][parent / HB_BITS]) & others)) {
        return;
    }
    if (atomic_fetch_add_explicit(&b->touched[huge], 1, memory_order_relaxed) + 1 == DENSE) {
        void *at = (char *)b->level[0] + huge * HB_HUGE;
        int err = errno;

        /* All of this is advice, which marks do not speak of. */
        (void)madvise(at, HB_HUGE, MADV_HUGEPAGE);
        (void)madvise(at, HB_HUGE, MADV_COLLAPSE);
        (void)madvise(at, HB_HUGE, MADV_NOHUGEPAGE);
        errno = err;
    }
#else
    (void)b;
    (void)parent;
#endif
}
