/* SPDX-License-Identifier: MIT */
/*
 * Workload: asked once by each collect of memory, and by each operation of a store.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* madvise, MAP_ANONYMOUS */
#endif

#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

#include "process.h"

#if defined(__linux__) && !defined(MADV_WIPEONFORK)
#define MADV_WIPEONFORK 18  /* headers may be older than the kernel */
#endif

/* 0: this process has not asked yet.  NULL: there is no such page. */
static _Atomic uint64_t *hb_number;

/* As large as the largest that was given; a child goes on with a copy. */
static _Atomic uint64_t hb_last;

/* When the library is loaded: so a signal handler may be the first to ask. */
__attribute__((constructor))
static void hb_map_number(void)
{
#ifdef MADV_WIPEONFORK
    size_t nbytes = (size_t)sysconf(_SC_PAGESIZE);
    void *page = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (page == MAP_FAILED) {
        return;
    }
    if (madvise(page, nbytes, MADV_WIPEONFORK) < 0) {
        (void)munmap(page, nbytes);
        return;
    }
    hb_number = page;
#endif
}

uint64_t hbprocess_number(void)
{
    uint64_t number, next;

    if (!hb_number) {
        return (uint64_t)getpid();
    }
    number = atomic_load(hb_number);
    if (number) {
        return number;
    }
    /* Counted first: whoever is forked from here on has it, and gets a larger one.  Of
     * two threads the first one says which it is. */
    next = atomic_fetch_add(&hb_last, 1) + 1;
    return atomic_compare_exchange_strong(hb_number, &number, next) ? next : number;
}
