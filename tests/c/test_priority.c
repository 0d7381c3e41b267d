/* SPDX-License-Identifier: MIT */
/*
 * Who waits for a mark gets out at real-time priority too, on the one processor
 * that the marker would need: it must not keep it from the marker.
 *
 * The marker is at the usual priority and held up where others have to wait for
 * it, until it has had some time of the processor.  As that is one which the one
 * that waits gets whenever it wants, the marker has it only while the other
 * sleeps.  (Linux leaves some to the others even so; what the other one takes
 * meanwhile tells that from sleep.)
 *
 *     test_priority WAIT       clear, or publish
 *
 * Exits with 77, and says why, where threads cannot be made so.  Built with
 * -DHB_TEST_DELAY; -DHB_BREAK_NO_SLEEP has to fail.
 */
#define _GNU_SOURCE
#ifndef HB_TEST_DELAY
#define HB_TEST_DELAY       /* what it is linked with has to be built so, too */
#endif

#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <unistd.h>

#include "support.h"
#include "threads.h"
#include "tracker.h"

enum {
    GROUPS = 1 << 18,       /* two levels of summaries at least */
    HELD_MS = 30,           /* of the processor's time */
    SKIPPED = 77,
};

static HBitmap *bitmap, *other;
static HBTracker *tracker;
static sem_t held;
static atomic_bool released;
static _Thread_local bool is_marker;

/* How others see that they have to wait for this thread. */
static bool (*waited_for)(void);

static bool is_summarising(void)
{
    return atomic_load(&hb_own_slot->summarising) % 2;
}

static bool is_in_a_set(void)
{
    return atomic_load(&hb_own_slot->set) != NULL;
}

/* What the thread has had of the processor's time. */
static uint64_t spent_ns(void)
{
    struct timespec time;

    CHECK_EQ(clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time), 0);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

void hb_test_delay(void)
{
    uint64_t until;

    if (!is_marker || atomic_load(&released) || !waited_for()) {
        return;
    }
    until = spent_ns() + UINT64_C(1000000) * HELD_MS;
    CHECK_EQ(sem_post(&held), 0);
    while (spent_ns() < until) {
        continue;
    }
    atomic_store(&released, true);
}

static void skip(const char *what, int err)
{
    printf("skipped: %s: %s\n", what, strerror(err));
    exit(SKIPPED);
}

static void use_one_processor(void)
{
    cpu_set_t all, one;
    size_t at = 0;

    if (sched_getaffinity(0, sizeof(all), &all) != 0) {
        skip("sched_getaffinity", errno);
    }
    while (!CPU_ISSET(at, &all)) {
        at++;
    }
    CPU_ZERO(&one);
    CPU_SET(at, &one);
    if (sched_setaffinity(0, sizeof(one), &one) != 0) {
        skip("threads cannot be kept on one processor", errno);
    }
}

static void *mark(void *unused)
{
    (void)unused;
    is_marker = true;
    CHECK_EQ(hbitmap_thread_init(), 0);
    CHECK_EQ(hbtracker_mark(tracker, GROUPS - 1, 1), 0);
    return NULL;
}

static void wait_in_a_clear(void)
{
    /* Empties a word of level 1. */
    CHECK_EQ(hbitmap_reset(bitmap, 0, 64), 0);
}

static void wait_in_a_publication(void)
{
    hbtracker_publish(tracker, hbtracker_set_alloc(GROUPS, &other, 1, false));
}

static void *wait_for_it(void *wait)
{
    uint64_t before, spent;

    while (sem_wait(&held) != 0) {
        CHECK_EQ(errno, EINTR);
    }
    before = spent_ns();
    (*(void (**)(void))wait)();
    spent = (spent_ns() - before) / 1000;
    CHECK(atomic_load(&released), "it has not waited for the marker");
    CHECK(spent < 1000 * HELD_MS / 2, "%" PRIu64 " us of the processor's time while the "
          "marker had %d", spent, 1000 * HELD_MS);
    return NULL;
}

static void run_at_real_time_priority(pthread_t *thread, void (**wait)(void))
{
    const struct sched_param priority = { .sched_priority = 1 };
    pthread_attr_t attributes;
    int err;

    CHECK_EQ(pthread_attr_init(&attributes), 0);
    CHECK_EQ(pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED), 0);
    CHECK_EQ(pthread_attr_setschedpolicy(&attributes, SCHED_FIFO), 0);
    CHECK_EQ(pthread_attr_setschedparam(&attributes, &priority), 0);
    err = pthread_create(thread, &attributes, wait_for_it, wait);
    if (err) {
        skip("no thread of real-time priority", err);
    }
    CHECK_EQ(pthread_attr_destroy(&attributes), 0);
}

int main(int argc, char **argv)
{
    bool clears = argc == 2 && strcmp(argv[1], "clear") == 0;
    void (*wait)(void) = clears ? wait_in_a_clear : wait_in_a_publication;
    pthread_t marker, waiter;

    if (!clears && (argc != 2 || strcmp(argv[1], "publish") != 0)) {
        fprintf(stderr, "usage: %s clear|publish\n", argv[0]);
        return 2;
    }
    alarm(20);      /* a system that leaves nothing to others hangs */
    use_one_processor();
    waited_for = clears ? is_summarising : is_in_a_set;
    bitmap = hbitmap_alloc(GROUPS, 0);
    other = hbitmap_alloc(GROUPS, 0);
    tracker = hbtracker_alloc();
    CHECK(bitmap && other && tracker, "errno %d", errno);
    CHECK_EQ(hbitmap_set(bitmap, 0, 1), 0);
    hbtracker_publish(tracker, hbtracker_set_alloc(GROUPS, &bitmap, 1, false));
    CHECK_EQ(sem_init(&held, 0, 0), 0);
    run_at_real_time_priority(&waiter, &wait);
    CHECK_EQ(pthread_create(&marker, NULL, mark, NULL), 0);
    CHECK_EQ(pthread_join(waiter, NULL), 0);
    CHECK_EQ(pthread_join(marker, NULL), 0);
    CHECK_EQ(hbitmap_get(bitmap, GROUPS - 1) || hbitmap_get(other, GROUPS - 1), true);
    hbtracker_free(tracker);
    hbitmap_free(bitmap);
    hbitmap_free(other);
    ok(argv[1]);
    return 0;
}
