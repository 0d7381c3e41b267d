/* SPDX-License-Identifier: MIT */
/*
 * Which process this is, for what is its own and not that of a child that a fork makes.
 * getpid does not tell: a child that is the first of another PID namespace has the
 * number of a parent that is the first of its own.  Nor does pthread_atfork: clone(2)
 * calls nothing.  Not part of the core: programs that bring their own bitmaps need none
 * of it.
 *
 * The invariant: a number that was given before a fork is none that the child gets.
 */
#ifndef PYBITMAP_PROCESS_H
#define PYBITMAP_PROCESS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

/*
 * The number of this process, another than those of all that it descends from.  Two
 * that do not descend from each other may have the same: it is for what is in memory.
 * Costs a load.  Threads and signal handlers may call it at any time.
 *
 * By a page that the kernel wipes in a child (MADV_WIPEONFORK, Linux 4.14).  Where there
 * is no such page it is getpid's, with what is said above.  What shares its parent's
 * memory (vfork) is its parent.
 */
uint64_t hbprocess_number(void);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif
