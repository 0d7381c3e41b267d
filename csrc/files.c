/* SPDX-License-Identifier: MIT */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* O_DIRECTORY, MAP_ANONYMOUS */
#endif

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <linux/fs.h>       /* FS_IOC_GETVERSION */
#include <sys/ioctl.h>
#endif
#include <sys/mman.h>
#include <sys/stat.h>
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

int hbfile_identity(const char *path, uint64_t identity[4])
{
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    struct stat status;
    int err;

    if (fd < 0) {
        return -errno;
    }
    err = fstat(fd, &status) < 0 ? -errno : 0;
    if (!err) {
        identity[0] = status.st_ino;
        identity[1] = identity[2] = identity[3] = 0;
#if defined(__APPLE__)
        identity[1] = (uint64_t)status.st_birthtimespec.tv_sec;
        identity[2] = (uint64_t)status.st_birthtimespec.tv_nsec;
        identity[3] = status.st_gen;
#elif defined(STATX_BTIME)
        struct statx more;
        int generation = 0;     /* in spite of the request's type, what is written */

        if (statx(fd, "", AT_EMPTY_PATH, STATX_BTIME, &more) == 0
            && (more.stx_mask & STATX_BTIME)) {
            identity[1] = (uint64_t)more.stx_btime.tv_sec;
            identity[2] = more.stx_btime.tv_nsec;
        }
        if (ioctl(fd, FS_IOC_GETVERSION, &generation) == 0) {
            identity[3] = (uint32_t)generation;
        }
#endif
    }
    (void)close(fd);
    return err;
}
