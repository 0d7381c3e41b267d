/* SPDX-License-Identifier: MIT */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* O_DIRECTORY */
#endif

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "files.h"

int hbfile_sync_directory(const char *path)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int err;

    if (fd < 0) {
        return -errno;
    }
    err = fsync(fd) < 0 ? -errno : 0;
    (void)close(fd);
    return err;
}
