/* SPDX-License-Identifier: MIT */
/*
 * What a process does around the calls: signal handlers that interrupt malloc, and
 * a library that is unloaded while threads that used it go on.
 *
 *     test_process handler             marks in a handler, after hbitmap_thread_init
 *     test_process unprepared          without it: must fail
 *     test_process unload LIBRARY      the core as a shared object
 *     test_process fork                in the midst of a thread's first mark
 *
 * Linked with -Wl,--wrap=posix_memalign.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "hbitmap.h"
#include "tracker.h"

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1); \
        } \
    } while (0)

/* ---- a handler ------------------------------------------------------------ */

int __real_posix_memalign(void **memory, size_t alignment, size_t size);
int __wrap_posix_memalign(void **memory, size_t alignment, size_t size);

static volatile sig_atomic_t interrupted;   /* this thread is in malloc */
static HBitmap *bitmap, *recorded;
static HBTracker *tracker;
static bool prepared;

int __wrap_posix_memalign(void **memory, size_t alignment, size_t size)
{
    if (interrupted) {
        static const char message[] = "memory was asked for in the handler\n";

        (void)!write(2, message, sizeof(message) - 1);
        _exit(1);
    }
    return __real_posix_memalign(memory, alignment, size);
}

static void handle(int signal_number)
{
    const uint64_t starts[] = { 70, 3000 }, counts[] = { 1, 200 };
    int64_t first, count;
    size_t done;

    (void)signal_number;
    if (hbitmap_set(bitmap, 5, 1) != 0 || hbitmap_set_many(bitmap, starts, counts, 2) != 0 ||
        hbtracker_try_mark(tracker, 5, 1) != 0 ||
        hbtracker_try_mark_many(tracker, starts, counts, 2, &done) != 0 || done != 2 ||
        !hbitmap_get(bitmap, 3100) ||
        !hbitmap_next_dirty_area(bitmap, 0, INT64_MAX, INT64_MAX, &first, &count)) {
        _exit(2);
    }
}

static void *interrupted_thread(void *unused)
{
    (void)unused;
    if (prepared) {
        CHECK(hbitmap_thread_init() == 0);
        CHECK(hbitmap_thread_init() == 0);
    }
    interrupted = true;
    CHECK(raise(SIGUSR1) == 0);
    interrupted = false;
    return NULL;
}

static void test_handler(void)
{
    HBTrackerSet *set;
    pthread_t thread;

    bitmap = hbitmap_alloc(1 << 20, 0);
    recorded = hbitmap_alloc(1 << 20, 0);
    tracker = hbtracker_alloc();
    CHECK(bitmap && recorded && tracker);
    set = hbtracker_set_alloc(1 << 20, &recorded, 1, false);
    CHECK(set);
    hbtracker_publish(tracker, set);
    CHECK(signal(SIGUSR1, handle) != SIG_ERR);
    CHECK(pthread_create(&thread, NULL, interrupted_thread, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(hbitmap_count(bitmap) == 202 && hbitmap_equal(bitmap, recorded) == 1);
    hbtracker_free(tracker);
    hbitmap_free(bitmap);
    hbitmap_free(recorded);
}

/* ---- a library that goes -------------------------------------------------- */

static struct {
    __typeof__(hbitmap_alloc) *alloc;
    __typeof__(hbitmap_set) *set;
    __typeof__(hbitmap_reset_all) *reset_all;
    __typeof__(hbitmap_free) *free;
    __typeof__(hbtracker_alloc) *tracker_alloc;
    __typeof__(hbtracker_mark) *mark;
    __typeof__(hbtracker_free) *tracker_free;
} library;

static sem_t used, unloaded;

static void use(void)
{
    HBitmap *hb = library.alloc(1000, 0);
    HBTracker *node = library.tracker_alloc();

    CHECK(hb && node);
    CHECK(library.set(hb, 5, 1) == 0);
    CHECK(library.mark(node, 0, 0) == 0);
    library.reset_all(hb);
    library.free(hb);
    library.tracker_free(node);
}

static void *user(void *unused)
{
    (void)unused;
    use();
    sem_post(&used);
    sem_wait(&unloaded);
    return NULL;
}

/* Of the library; POSIX wants that an address fits into a function pointer. */
static void find(void *handle, const char *name, void *function)
{
    void *symbol = dlsym(handle, name);

    CHECK(symbol);
    memcpy(function, &symbol, sizeof(symbol));
}

static void test_unload(const char *path)
{
    for (int i = 0; i < 3; i++) {
        void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        pthread_t threads[4];
        int status;

        if (!handle) {
            fprintf(stderr, "%s\n", dlerror());
            exit(1);
        }
        find(handle, "hbitmap_alloc", &library.alloc);
        find(handle, "hbitmap_set", &library.set);
        find(handle, "hbitmap_reset_all", &library.reset_all);
        find(handle, "hbitmap_free", &library.free);
        find(handle, "hbtracker_alloc", &library.tracker_alloc);
        find(handle, "hbtracker_mark", &library.mark);
        find(handle, "hbtracker_free", &library.tracker_free);
        sem_init(&used, 0, 0);
        sem_init(&unloaded, 0, 0);
        for (int j = 0; j < 4; j++) {
            CHECK(pthread_create(&threads[j], NULL, user, NULL) == 0);
        }
        use();
        for (int j = 0; j < 4; j++) {
            sem_wait(&used);
        }
        CHECK(dlclose(handle) == 0);
        CHECK(!dlopen(path, RTLD_NOW | RTLD_NOLOAD));
        for (int j = 0; j < 4; j++) {
            sem_post(&unloaded);
        }
        for (int j = 0; j < 4; j++) {
            CHECK(pthread_join(threads[j], NULL) == 0);
        }
        if (fork() == 0) {
            _exit(0);
        }
        CHECK(wait(&status) > 0 && status == 0);
    }
}

/* ---- a fork amid the first mark of all ------------------------------------ */

static void *mark_all(void *unused)
{
    (void)unused;
    CHECK(hbitmap_set(bitmap, 0, UINT64_C(1) << 28) == 0);
    return NULL;
}

static void test_fork(void)
{
    pthread_t thread;
    int status;

    bitmap = hbitmap_alloc(UINT64_C(1) << 28, 0);
    CHECK(bitmap);
    CHECK(pthread_create(&thread, NULL, mark_all, NULL) == 0);
    while (!hbitmap_get(bitmap, 1 << 20)) {
    }
    if (fork() == 0) {
        uint64_t count = hbitmap_count(bitmap);

        CHECK(count > 1 << 20 && count == hbitmap_count_range(bitmap, 0, UINT64_MAX));
        CHECK(hbitmap_check(bitmap, NULL) == 0);
        hbitmap_reset_all(bitmap);
        CHECK(!hbitmap_get(bitmap, 1 << 20) && hbitmap_empty(bitmap));
        _exit(0);
    }
    CHECK(wait(&status) > 0 && status == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    hbitmap_free(bitmap);
}

int main(int argc, char **argv)
{
    alarm(20);
    if (argc == 3 && strcmp(argv[1], "unload") == 0) {
        test_unload(argv[2]);
    } else if (argc == 2 && strcmp(argv[1], "fork") == 0) {
        test_fork();
    } else if (argc == 2) {
        prepared = strcmp(argv[1], "handler") == 0;
        test_handler();
    } else {
        return 2;
    }
    puts("ok");
    return 0;
}
