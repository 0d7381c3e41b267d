/* SPDX-License-Identifier: MIT */
/*
 * What stores need of files in one call, and Python has in several: between two of
 * them a signal handler may raise, and a descriptor that nobody has yet is lost.
 * Not part of the core: programs that bring their own bitmaps need none of it.
 */
#ifndef PYBITMAP_FILES_H
#define PYBITMAP_FILES_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

/* What names are in a directory is on the disk when this returns: 0, or a negative
 * errno. */
int hbfile_sync_directory(const char *path);

/*
 * For the child of a fork: what it has mapped of a file of its parent's, for both to
 * see, becomes its own at the same address: what it writes there comes nowhere.  The
 * file is looked for at `path`; if it is gone, this takes memory for all of it.  0, or
 * a negative errno.
 */
int hbfile_detach(void *address, size_t nbytes, const char *path);

/*
 * What tells the file at `path` from all that were, are or will be at that path or have
 * its inode number: inode, birth (seconds, nanoseconds), generation; 0 for what the
 * file system does not know.  Not what is written over it in place.  0, or a negative
 * errno.
 */
int hbfile_identity(const char *path, uint64_t identity[4]);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif
