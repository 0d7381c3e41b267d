/* SPDX-License-Identifier: MIT */
/*
 * A second copy of the core, as modules have one that compile the sources: threads that
 * call it on what Python's copy has made (tests/core/test_two_copies.py).
 *
 * With HB_TEST_DELAY, whoever is in the middle of something here is held up.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "hbitmap.h"
#include "tracker.h"

#define EXPORT __attribute__((visibility("default")))

enum { THREADS = 2 };

enum kind { MARK, RESET, WRITE };

static void *thing;
static enum kind kind;
static uint64_t items, times;
static atomic_int running, refused;
static pthread_t threads[THREADS];

#ifdef HB_TEST_DELAY
void hb_test_delay(void);
void hb_test_delay(void)
{
    nanosleep(&(struct timespec){ .tv_nsec = 20000 }, NULL);
}
#endif

/* Each thread does its share of the items, each of them once, far apart one after
 * the other. */
static void *work(void *argument)
{
    const uint64_t step = 4096 * 61 + 64 + 1;
    uint64_t item = 0;

    for (uint64_t i = 0; i < times && !atomic_load(&refused); i++) {
        int err = 0;

        item = (item + step) % items;
        if (item % THREADS == (uint64_t)(uintptr_t)argument) {
            switch (kind) {
            case MARK:
                err = hbitmap_set(thing, item, 1);
                break;
            case RESET:
                err = hbitmap_reset(thing, item, 1);
                break;
            case WRITE:
                err = hbtracker_mark(thing, item * 512, 1);
                break;
            }
        }
        if (err) {
            atomic_store(&refused, err);
        }
    }
    atomic_fetch_sub(&running, 1);
    return NULL;
}

/* n items, a power of 2, so that it has no factor in common with the step; the first
 * `first` of them, in their order, are done. */
EXPORT void copy_start(void *what, int how, uint64_t n, uint64_t first);
EXPORT void copy_start(void *what, int how, uint64_t n, uint64_t first)
{
    thing = what;
    kind = (enum kind)how;
    items = n;
    times = first;
    atomic_store(&refused, 0);
    atomic_store(&running, THREADS);
    for (uintptr_t i = 0; i < THREADS; i++) {
        (void)pthread_create(&threads[i], NULL, work, (void *)i);
    }
}

EXPORT bool copy_running(void);
EXPORT bool copy_running(void)
{
    return atomic_load(&running) != 0;
}

/* Waits for them; 0, or the first error. */
EXPORT int copy_finish(void);
EXPORT int copy_finish(void)
{
    for (int i = 0; i < THREADS; i++) {
        (void)pthread_join(threads[i], NULL);
    }
    return atomic_load(&refused);
}

/* The names that a module of several files has for itself. */
EXPORT HBitmap *copy_alloc(uint64_t size);
EXPORT HBitmap *copy_alloc(uint64_t size)
{
    return hbitmap_alloc(size, 0);
}

EXPORT int copy_merge(const HBitmap *from, HBitmap *into);
EXPORT int copy_merge(const HBitmap *from, HBitmap *into)
{
    return hbitmap_merge(from, into, into);
}

EXPORT HBTracker *copy_tracker(HBitmap *hb);
EXPORT HBTracker *copy_tracker(HBitmap *hb)
{
    HBTracker *tracker = hbtracker_alloc();
    HBTrackerSet *set = hbtracker_set_alloc(hbitmap_size(hb), &hb, 1, false);

    return tracker && set && hbtracker_publish(tracker, set) == 0 ? tracker : NULL;
}

EXPORT int copy_publish(HBTracker *tracker);
EXPORT int copy_publish(HBTracker *tracker)
{
    HBTrackerSet *set = hbtracker_set_alloc(100, NULL, 0, false);
    int err = set ? hbtracker_publish(tracker, set) : 1;

    if (err) {
        hbtracker_set_free(set);
    }
    return err;
}
