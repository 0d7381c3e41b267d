/* SPDX-License-Identifier: MIT */
/*
 * A file system without locks, seen from below a program: a library for
 * LD_PRELOAD (Linux, glibc).
 *
 * From nolocks_fail(error) on each request for a lock, or about one, fails with
 * that error; flock, fcntl or both, as asked for.  A program that has not asked
 * takes the error from the environment: NOLOCKS_ERRNO, for both.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>

static int flock_error, fcntl_error;

__attribute__((constructor)) static void from_environment(void)
{
    const char *text = getenv("NOLOCKS_ERRNO");

    if (text) {
        flock_error = fcntl_error = atoi(text);
    }
}

/* 0: they work. */
void nolocks_fail(int of_flock, int of_fcntl)
{
    flock_error = of_flock;
    fcntl_error = of_fcntl;
}

static void *real(const char *name)
{
    void *symbol = dlsym(RTLD_NEXT, name);

    if (!symbol) {
        abort();
    }
    return symbol;
}

int flock(int fd, int operation)
{
    int (*call)(int, int);
    void *symbol = real("flock");

    if (flock_error) {
        errno = flock_error;
        return -1;
    }
    memcpy(&call, &symbol, sizeof(call)); /* ISO C has no conversion for it */
    return call(fd, operation);
}

static int is_about_locks(int command)
{
    switch (command) {
    case F_GETLK:
    case F_SETLK:
    case F_SETLKW:
    case F_OFD_GETLK:
    case F_OFD_SETLK:
    case F_OFD_SETLKW:
        return 1;
    default:
        return 0;
    }
}

#define FCNTL(name)                                     \
    int name(int fd, int command, ...)                  \
    {                                                   \
        int (*call)(int, int, ...);                     \
        void *symbol = real(#name), *argument;          \
        va_list arguments;                              \
                                                        \
        va_start(arguments, command);                   \
        argument = va_arg(arguments, void *);           \
        va_end(arguments);                              \
        if (fcntl_error && is_about_locks(command)) {   \
            errno = fcntl_error;                        \
            return -1;                                  \
        }                                               \
        memcpy(&call, &symbol, sizeof(call));           \
        return call(fd, command, argument);             \
    }

FCNTL(fcntl)
FCNTL(fcntl64)
