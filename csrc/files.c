/* SPDX-License-Identifier: MIT */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* O_DIRECTORY, MAP_ANONYMOUS */
#endif

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
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

int hbfile_detach(void *address, size_t nbytes, const char *path)
{
    const int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_FIXED;
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    void *copy = fd < 0 ? malloc(nbytes) : NULL;
    int err = 0;

    if (fd >= 0) {
        err = mmap(address, nbytes, protection, flags, fd, 0) == MAP_FAILED ? -errno : 0;
        (void)close(fd);
    } else if (!copy) {
        err = -ENOMEM;
    } else {
        memcpy(copy, address, nbytes);
        if (mmap(address, nbytes, protection, flags | MAP_ANONYMOUS, -1, 0) == MAP_FAILED) {
            err = -errno;
        } else {
            memcpy(address, copy, nbytes);
        }
    }
    free(copy);
    return err;
}
