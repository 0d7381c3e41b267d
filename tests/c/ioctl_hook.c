/* SPDX-License-Identifier: MIT */
/*
 * To be preloaded: before each ioctl calls a hook, which a test sets, with the request.
 * What that answers: 0: the ioctl is made; a negative errno: it fails in that way; 1:
 * it answers 0 and has done nothing.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

int (*hook)(unsigned long request);

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    void *argument;
    int answer = hook ? hook(request) : 0;

    va_start(arguments, request);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    if (answer < 0) {
        errno = -answer;
        return -1;
    }
    return answer ? 0 : (int)syscall(SYS_ioctl, fd, request, argument);
}
