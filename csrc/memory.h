/* SPDX-License-Identifier: MIT */
/*
 * Which pages of this process's memory were written to, by the kernel's own account:
 * asynchronous write protection (userfaultfd) and an atomic fetch-and-clear of it (the
 * ioctl PAGEMAP_SCAN).  Linux 6.7 or newer.  Not part of the core: programs that bring
 * their own bitmaps need none of it.
 *
 * The invariant: what is taken from the page tables is marked before the call returns,
 * and nothing of Python's runs in between.
 *
 * THREADS.  One of them at a time calls these for a given HBMemory; others may write to
 * the memory meanwhile.
 */
#ifndef PYBITMAP_MEMORY_H
#define PYBITMAP_MEMORY_H

#include <stddef.h>
#include <stdint.h>

#include "hbitmap.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

/* What hbmem_open failed at. */
#define HBMEM_SYSTEM   1    /* this is not Linux */
#define HBMEM_PAGEMAP  2    /* /proc/self/pagemap cannot be opened */
#define HBMEM_SCAN     3    /* its ioctl PAGEMAP_SCAN is not there */
#define HBMEM_FAULTFD  4    /* neither userfaultfd(2) nor /dev/userfaultfd gives one */
#define HBMEM_FEATURES 5    /* it cannot do what `lacking` has */
#define HBMEM_MAPPED   6    /* not all of the memory is mapped */
#define HBMEM_REGISTER 7    /* the kernel does not take this memory */
#define HBMEM_PROTECT  8    /* it cannot be protected */

/* Bits of `lacking`, as the kernel has them. */
#define HBMEM_WP_UNPOPULATED 8192
#define HBMEM_WP_ASYNC       32768

typedef struct HBMemory {
    int uffd;               /* a descriptor, or -1 */
    int pagemap;            /* likewise */
    int step;               /* one of the above */
    uint64_t process;       /* whose memory it is, by hbprocess_number */
    uint64_t lacking;
    uint64_t address;
    uint64_t nbytes;
} HBMemory;

/*
 * From now on the writes to `nbytes` at `address` are recorded, by whole pages: the last
 * one may go beyond the end.  `address` is a multiple of a page; both descriptors of `m`
 * are -1.  0, or a negative errno and `step`: nothing is held then.
 */
int hbmem_open(HBMemory *m, uint64_t address, uint64_t nbytes);

/*
 * What was written to since the last call is marked in `log`, whose items are bytes from
 * `address` on.  With `same`, not marked are pages that have the bytes now that `same` has
 * at their place: what was written to them is forgotten, and a write from here on is
 * recorded.  `same` has as many bytes as the memory, or is NULL.
 *
 * 0, or a negative errno: -EBADF if it is closed, -ESRCH in another process than the one
 * that opened it (the child of a fork would take its parent's writes), -ENXIO where some
 * of the memory is mapped no longer, -EPERM where something else is mapped there now.
 */
int hbmem_collect(HBMemory *m, HBitmap *log, const void *same);

/* What was written to since the last collect is marked in `log`, and is in the next collect
 * all the same.  Errors as above. */
int hbmem_look(HBMemory *m, HBitmap *log);

/* Record no longer.  May be called again.  In the child of a fork it lets the descriptors
 * go, and the parent's go on. */
void hbmem_close(HBMemory *m);

/* Copies to `dst`, which is all zero, what is not zero in `src`: pages that are zero are
 * not touched there. */
void hbmem_copy_sparse(void *dst, const void *src, uint64_t nbytes);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif
