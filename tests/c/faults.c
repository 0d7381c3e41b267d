/* SPDX-License-Identifier: MIT */
/*
 * What a program does to the files below one directory, seen from below it, and
 * spoilt on demand: a library for LD_PRELOAD (Linux, glibc).
 *
 * Every call that changes a file or syncs it passes by here: those of Python and
 * those of SQLite.  Calls are counted from faults_arm() on; the nth fails, or
 * fails from the nth on, or writes half of what it should, or never comes because
 * the process is killed.  faults_log() writes down what happened, for a model of
 * what the disk may hold after a crash of the system.  What goes into a mapping
 * passes by unseen: at a sync of a file that is not SQLite's, all of it is logged.
 *
 * One thread at a time is meant to be armed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FAULT_ONCE, FAULT_FROM_THEN_ON, FAULT_SHORT, FAULT_KILL };

static char watched[PATH_MAX];
static size_t watched_length;
static long calls, fail_at;
static int fail_errno, fail_mode;
static int log_fd = -1;

typedef void (*function)(void);

/* The call itself, behind this one. */
#define REAL(name) ((__typeof__(&name))real(#name))

static function real(const char *name)
{
    void *symbol = dlsym(RTLD_NEXT, name);
    function call;

    if (!symbol) {
        abort();
    }
    /* ISO C has no conversion for it. */
    memcpy(&call, &symbol, sizeof(call));
    return call;
}

/* ---- for the test ------------------------------------------------------- */

/* The directory; what is outside goes its way. */
void faults_watch(const char *directory)
{
    watched_length = strlen(directory);
    memcpy(watched, directory, watched_length + 1);
}

/* n: the first call is 1; 0: none, only count. */
void faults_arm(long n, int error, int mode)
{
    fail_errno = error;
    fail_mode = mode;
    calls = 0;
    fail_at = n;
}

/* How many calls there were since. */
long faults_calls(void)
{
    return calls;
}

/* Where records go; -1: nowhere. */
void faults_log(int fd)
{
    log_fd = fd;
}

/* ---- which calls -------------------------------------------------------- */

static int is_watched(const char *path)
{
    return watched_length && strncmp(path, watched, watched_length) == 0 &&
           (path[watched_length] == '/' || path[watched_length] == '\0');
}

static int fd_path(int fd, char *path)
{
    char link[64];
    ssize_t length;

    if (!watched_length) {
        return 0;
    }
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) {
        return 0;
    }
    path[length] = '\0';
    return is_watched(path);
}

/* One line of a record: kind, path, two numbers; then so many bytes of data. */
static void record(const char *kind, const char *path, int64_t offset,
                   const void *data, int64_t nbytes)
{
    char head[PATH_MAX + 100];
    int length, ignored;

    if (log_fd < 0) {
        return;
    }
    length = snprintf(head, sizeof(head), "%s %s %lld %lld\n", kind,
                      path[watched_length] ? path + watched_length + 1 : ".",
                      (long long)offset, (long long)(data ? nbytes : 0));
    ignored = REAL(write)(log_fd, head, (size_t)length) < 0;
    if (data) {
        ignored |= REAL(write)(log_fd, data, (size_t)nbytes) < 0;
    }
    (void)ignored;
}

/* Does this call fail? */
static int spoilt(void)
{
    calls++;
    if (!fail_at || calls < fail_at || (calls > fail_at && fail_mode != FAULT_FROM_THEN_ON)) {
        return 0;
    }
    if (fail_mode == FAULT_KILL) {
        raise(SIGKILL);
    }
    errno = fail_errno;
    return 1;
}

/* For the test: a line of its own; and what a mapped file holds by now. */
void faults_note(const char *text)
{
    record("note", watched, 0, text, (int64_t)strlen(text));
}

void faults_mapped(const char *path, const void *data, long nbytes)
{
    record("write", path, 0, data, nbytes);
}

/* ---- the calls ---------------------------------------------------------- */

static ssize_t do_write(int fd, const void *data, size_t nbytes, off_t offset, int positioned)
{
    char path[PATH_MAX];
    int seen = fd_path(fd, path);
    ssize_t done;

    if (seen && fail_mode == FAULT_SHORT && calls + 1 == fail_at && nbytes > 1) {
        calls++;
        nbytes /= 2;
    } else if (seen && spoilt()) {
        return -1;
    }
    if (seen && !positioned) {
        offset = lseek(fd, 0, SEEK_CUR);
    }
    done = positioned ? REAL(pwrite)(fd, data, nbytes, offset)
                      : REAL(write)(fd, data, nbytes);
    if (seen && done > 0) {
        record("write", path, offset, data, done);
    }
    return done;
}

ssize_t write(int fd, const void *data, size_t nbytes)
{
    return do_write(fd, data, nbytes, 0, 0);
}

ssize_t pwrite(int fd, const void *data, size_t nbytes, off_t offset)
{
    return do_write(fd, data, nbytes, offset, 1);
}

ssize_t pwrite64(int fd, const void *data, size_t nbytes, off64_t offset)
{
    return do_write(fd, data, nbytes, offset, 1);
}

int ftruncate(int fd, off_t size)
{
    char path[PATH_MAX];

    if (fd_path(fd, path)) {
        if (spoilt()) {
            return -1;
        }
        record("truncate", path, size, NULL, 0);
    }
    return REAL(ftruncate)(fd, size);
}

int ftruncate64(int fd, off64_t size)
{
    return ftruncate(fd, size);
}

int posix_fallocate(int fd, off_t offset, off_t nbytes)
{
    char path[PATH_MAX];

    if (fd_path(fd, path)) {
        if (spoilt()) {
            return fail_errno;
        }
        record("allocate", path, offset + nbytes, NULL, 0);
    }
    return REAL(posix_fallocate)(fd, offset, nbytes);
}

int posix_fallocate64(int fd, off64_t offset, off64_t nbytes)
{
    return posix_fallocate(fd, offset, nbytes);
}

static int do_sync(int fd, int (*sync)(int))
{
    char path[PATH_MAX], *content = NULL;
    struct stat status;
    ssize_t nbytes = 0;
    int result;

    if (!fd_path(fd, path)) {
        return sync(fd);
    }
    if (spoilt()) {
        return -1;
    }
    if (log_fd >= 0 && strstr(path, ".words") && fstat(fd, &status) == 0) {
        content = malloc((size_t)status.st_size + 1);
        nbytes = content ? pread(fd, content, (size_t)status.st_size, 0) : 0;
    }
    result = sync(fd);
    record("sync", path, 0, nbytes > 0 ? content : NULL, nbytes);
    free(content);
    return result;
}

int fsync(int fd)
{
    return do_sync(fd, REAL(fsync));
}

int fdatasync(int fd)
{
    return do_sync(fd, REAL(fdatasync));
}

static int do_open(const char *path, int flags, mode_t mode)
{
    int created = 0, fd;

    if ((flags & O_CREAT) && is_watched(path)) {
        if (spoilt()) {
            return -1;
        }
        created = access(path, F_OK) != 0;
    }
    fd = REAL(open)(path, flags, mode);
    if (created && fd >= 0) {
        record("create", path, 0, NULL, 0);
    }
    return fd;
}

#define OPEN(name)                                      \
    int name(const char *path, int flags, ...)          \
    {                                                   \
        mode_t mode = 0;                                \
        va_list arguments;                              \
                                                        \
        if (flags & O_CREAT) {                          \
            va_start(arguments, flags);                 \
            mode = va_arg(arguments, mode_t);           \
            va_end(arguments);                          \
        }                                               \
        return do_open(path, flags, mode);              \
    }

OPEN(open)
OPEN(open64)

int unlink(const char *path)
{
    int result;

    if (is_watched(path) && spoilt()) {
        return -1;
    }
    result = REAL(unlink)(path);
    if (is_watched(path) && result == 0) {
        record("unlink", path, 0, NULL, 0);
    }
    return result;
}

int mkdir(const char *path, mode_t mode)
{
    int result;

    if (is_watched(path) && spoilt()) {
        return -1;
    }
    result = REAL(mkdir)(path, mode);
    if (is_watched(path) && result == 0) {
        record("mkdir", path, 0, NULL, 0);
    }
    return result;
}

/* Of what takes a name away from somewhere else, the record's data is the new name. */
static int do_rename(const char *kind, const char *from, const char *to,
                     int (*call)(const char *, const char *))
{
    int result;

    if (is_watched(to) && spoilt()) {
        return -1;
    }
    result = call(from, to);
    if (is_watched(to) && result == 0) {
        record(kind, from, 0, to, (int64_t)strlen(to));
    }
    return result;
}

int rename(const char *from, const char *to)
{
    return do_rename("rename", from, to, REAL(rename));
}

int link(const char *from, const char *to)
{
    return do_rename("link", from, to, REAL(link));
}

int rmdir(const char *path)
{
    int result;

    if (is_watched(path) && spoilt()) {
        return -1;
    }
    result = REAL(rmdir)(path);
    if (is_watched(path) && result == 0) {
        record("rmdir", path, 0, NULL, 0);
    }
    return result;
}
