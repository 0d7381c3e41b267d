/* SPDX-License-Identifier: MIT */
/*
 * Does this system do with pages what it says?
 *
 * User-mode QEMU answers mremap and madvise as Linux does, and leaves undone what
 * it was asked for; marks would be seen twice, and come back after a clear.  So
 * each is tried once per process, on a page that nobody else has.
 *
 * Any thread may ask: each that finds no answer yet tries by itself, and all come
 * to the same one.  The child of a fork knows what its parent knew.  Where there
 * is no memory to try with the answer is no, for now.
 */
#ifndef PYBITMAP_PROBE_H
#define PYBITMAP_PROBE_H

#include <stdbool.h>

#pragma GCC visibility push(hidden)

/* Are pages that mremap moves with MREMAP_DONTUNMAP at the new address then, and
 * zeroes at the old one?  (In Linux from 5.7 on.) */
bool hb_moves_pages(void);

/* Are there zeroes where madvise says that it gave pages back (MADV_DONTNEED)? */
bool hb_gives_back_pages(void);

#pragma GCC visibility pop

#endif
