/* SPDX-License-Identifier: MIT */
/*
 * A kernel that cannot track memory, or does not let, seen from below a program: a
 * library for LD_PRELOAD (Linux, glibc).
 *
 * The environment says what fails, and with which errno: OLDKERNEL_FAULTFD
 * (userfaultfd(2), and /dev/userfaultfd is not there), OLDKERNEL_SYSCALL (the system call
 * alone), OLDKERNEL_FEATURES (WP_ASYNC is not offered), OLDKERNEL_SCAN (PAGEMAP_SCAN),
 * OLDKERNEL_PAGEMAP (the file).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#define API  0x3F
#define SCAN 16

struct api {
    uint64_t api, features, ioctls;
};

/* The next function of that name, in *function.  ISO C has no conversion for it. */
static void real(const char *name, void *function)
{
    void *symbol = dlsym(RTLD_NEXT, name);

    if (!symbol) {
        abort();
    }
    memcpy(function, &symbol, sizeof(symbol));
}

static int fails(const char *what)
{
    const char *text = getenv(what);

    errno = text ? atoi(text) : 0;
    return text != NULL;
}

long syscall(long number, ...)
{
    long (*next)(long, ...);
    long arguments[6];
    va_list list;

    real("syscall", &next);
    va_start(list, number);
    for (int i = 0; i < 6; i++) {
        arguments[i] = va_arg(list, long);
    }
    va_end(list);
    if (number == SYS_userfaultfd && (fails("OLDKERNEL_FAULTFD") || fails("OLDKERNEL_SYSCALL"))) {
        return -1;
    }
    return next(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4],
                arguments[5]);
}

int open(const char *path, int flags, ...)
{
    int (*next)(const char *, int, ...);
    va_list list;
    int mode;

    real("open", &next);
    va_start(list, flags);
    mode = va_arg(list, int);
    va_end(list);
    if (!strcmp(path, "/proc/self/pagemap") && fails("OLDKERNEL_PAGEMAP")) {
        return -1;
    }
    if (!strcmp(path, "/dev/userfaultfd") && getenv("OLDKERNEL_FAULTFD")) {
        errno = ENOENT;
        return -1;
    }
    return next(path, flags, mode);
}

int ioctl(int fd, unsigned long request, ...)
{
    int (*next)(int, unsigned long, ...);
    va_list list;
    void *argument;

    real("ioctl", &next);
    va_start(list, request);
    argument = va_arg(list, void *);
    va_end(list);
    if (_IOC_TYPE(request) == 'f' && _IOC_NR(request) == SCAN && fails("OLDKERNEL_SCAN")) {
        return -1;
    }
    if (_IOC_TYPE(request) == 0xAA && _IOC_NR(request) == API && getenv("OLDKERNEL_FEATURES")) {
        struct api *api = argument;

        if (api->features & 1 << 15) {
            return fails("OLDKERNEL_FEATURES") ? -1 : 0;
        }
        if (next(fd, request, argument) < 0) {
            return -1;
        }
        api->features &= ~(UINT64_C(1) << 15);
        return 0;
    }
    return next(fd, request, argument);
}
