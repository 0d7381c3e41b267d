/* SPDX-License-Identifier: MIT */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* mincore, mremap */
#endif

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

#include "probe.h"

#ifdef __linux__
/* Linux has it since 5.7, some C libraries still have not. */
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

enum answer { HB_UNKNOWN, HB_YES, HB_NO };

static bool hb_ask_once(_Atomic(enum answer) *known, enum answer (*ask)(void))
{
    enum answer answer = atomic_load(known);

    if (answer == HB_UNKNOWN) {
        answer = ask();
        atomic_store(known, answer);
    }
    return answer == HB_YES;
}

static size_t hb_page(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

/* Anonymous ones, of zeroes; NULL: there is no memory. */
static volatile char *hb_some_pages(size_t n)
{
    void *pages = mmap(NULL, n * hb_page(), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return pages == MAP_FAILED ? NULL : pages;
}

/*
 * The first of two pages onto the second one.  To look at the first one may be a
 * fault, so mincore is asked before: user-mode QEMU takes it for unmapped.  Then
 * it is not ours any more, and may be somebody else's by now.
 */
static enum answer hb_try_move(void)
{
    volatile char *from = hb_some_pages(2), *to;
    enum answer answer = HB_NO;
    unsigned char resident;
    bool left = true;

    if (!from) {
        return HB_UNKNOWN;
    }
    to = from + hb_page();
    *from = 1;
    if (mremap((void *)from, hb_page(), hb_page(),
               MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, (void *)to) == MAP_FAILED) {
        answer = errno == EINVAL ? HB_NO : HB_UNKNOWN;
    } else {
        left = mincore((void *)from, hb_page(), &resident) == 0;
        if (left && *from == 0 && *to == 1) {
            answer = HB_YES;
        }
    }
    if (left) {
        (void)munmap((void *)from, hb_page());
    }
    (void)munmap((void *)to, hb_page());
    return answer;
}

static enum answer hb_try_give_back(void)
{
    volatile char *page = hb_some_pages(1);
    enum answer answer = HB_NO;

    if (!page) {
        return HB_UNKNOWN;
    }
    *page = 1;
    /* Whom it tells that it has not, as where all memory is locked, knows it. */
    if (madvise((void *)page, hb_page(), MADV_DONTNEED) != 0 || *page == 0) {
        answer = HB_YES;
    }
    (void)munmap((void *)page, hb_page());
    return answer;
}

bool hb_moves_pages(void)
{
    static _Atomic(enum answer) known;

    return hb_ask_once(&known, hb_try_move);
}

bool hb_gives_back_pages(void)
{
    static _Atomic(enum answer) known;

    return hb_ask_once(&known, hb_try_give_back);
}
#else
bool hb_moves_pages(void)
{
    return false;
}

bool hb_gives_back_pages(void)
{
    return false;
}
#endif
