/* SPDX-License-Identifier: MIT */
/*
 * What a program finds of its pages where another one plays its processor, or
 * its system: a library for LD_PRELOAD (Linux, glibc).  EMULATED says which:
 *
 *   qemu       user-mode QEMU 7.2: MREMAP_DONTUNMAP moves pages and is taken for
 *              having unmapped them, so that mincore knows no pages there any
 *              more, and madvise does nothing to those that are
 *   old-qemu   before 7.1: madvise does nothing to any
 *   old-linux  before 5.7: there is no MREMAP_DONTUNMAP, which is an error
 *
 * The first two say that they did what they were asked for.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

enum { MOST = 256 };

/* What is taken for unmapped; end 0: nothing. */
static struct range {
    uintptr_t start, end;
} lost[MOST];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool moves_badly, gives_nothing_back, moves_nothing;

__attribute__((constructor)) static void from_environment(void)
{
    const char *which = getenv("EMULATED");

    if (!which) {
        return;
    }
    moves_badly = strcmp(which, "qemu") == 0;
    gives_nothing_back = strcmp(which, "old-qemu") == 0;
    moves_nothing = strcmp(which, "old-linux") == 0;
    if (!moves_badly && !gives_nothing_back && !moves_nothing) {
        abort();
    }
}

/* ISO C has no conversion from the one pointer to the other. */
static void find(const char *name, void *function)
{
    void *symbol = dlsym(RTLD_NEXT, name);

    if (!symbol) {
        abort();
    }
    memcpy(function, &symbol, sizeof(symbol));
}

static bool is_lost(const void *address, size_t nbytes)
{
    uintptr_t start = (uintptr_t)address, end = start + nbytes;
    bool found = false;

    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST; i++) {
        found |= start < lost[i].end && end > lost[i].start;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

/* From now on, or no more: somebody has mapped or unmapped all or part of it. */
static void lose(const void *address, size_t nbytes, bool is)
{
    uintptr_t start = (uintptr_t)address, end = start + nbytes;
    struct range *room = NULL;

    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST; i++) {
        if (start < lost[i].end && end > lost[i].start) {
            lost[i].end = 0;
        }
        room = lost[i].end ? room : &lost[i];
    }
    if (is) {
        if (!room) {
            abort();
        }
        *room = (struct range){ start, end };
    }
    pthread_mutex_unlock(&lock);
}

void *mmap(void *address, size_t nbytes, int protection, int flags, int fd, off_t offset)
{
    void *(*call)(void *, size_t, int, int, int, off_t);
    void *mapped;

    find("mmap", &call);
    mapped = call(address, nbytes, protection, flags, fd, offset);
    if (mapped != MAP_FAILED) {
        lose(mapped, nbytes, false);
    }
    return mapped;
}

int munmap(void *address, size_t nbytes)
{
    int (*call)(void *, size_t);

    find("munmap", &call);
    lose(address, nbytes, false);
    return call(address, nbytes);
}

void *mremap(void *old, size_t old_nbytes, size_t nbytes, int flags, ...)
{
    void *(*call)(void *, size_t, size_t, int, ...);
    void *to = NULL, *moved;
    va_list arguments;

    if (flags & MREMAP_DONTUNMAP && moves_nothing) {
        errno = EINVAL;
        return MAP_FAILED;
    }
    if (flags & MREMAP_FIXED) {
        va_start(arguments, flags);
        to = va_arg(arguments, void *);
        va_end(arguments);
    }
    find("mremap", &call);
    moved = call(old, old_nbytes, nbytes, flags, to);
    if (moved != MAP_FAILED) {
        lose(moved, nbytes, false);
        if (flags & MREMAP_DONTUNMAP && moves_badly) {
            lose(old, old_nbytes, true);
        }
    }
    return moved;
}

int mincore(void *address, size_t nbytes, unsigned char *pages)
{
    int (*call)(void *, size_t, unsigned char *);

    find("mincore", &call);
    if (is_lost(address, nbytes)) {
        errno = ENOMEM;
        return -1;
    }
    return call(address, nbytes, pages);
}

int madvise(void *address, size_t nbytes, int advice)
{
    int (*call)(void *, size_t, int);

    find("madvise", &call);
    if (advice == MADV_DONTNEED && (gives_nothing_back || is_lost(address, nbytes))) {
        return 0;
    }
    return call(address, nbytes, advice);
}
