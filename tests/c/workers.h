/* SPDX-License-Identifier: MIT */
/*
 * Threads for the C tests that need them: added one by one, let go all at
 * once, each with random numbers of its own.
 */
#ifndef PYBITMAP_TESTS_WORKERS_H
#define PYBITMAP_TESTS_WORKERS_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <unistd.h>

#include "support.h"
#include "threads.h"

enum { MOST_WORKERS = 12 };

struct worker {
    pthread_t thread;
    void (*run)(struct worker *self);
    unsigned index;         /* among those that run the same */
    uint64_t rng;
    uint64_t *seen;         /* how often each group was found in a drain */
};

static struct worker workers[MOST_WORKERS];
static unsigned nworkers;
static uint64_t rng;
static atomic_uint gate;

/* As the core waits: other threads make it true. */
#define WAIT_UNTIL(condition) \
    do { \
        for (unsigned round_ = 0; !(condition);) { \
            hb_relax(&round_); \
        } \
    } while (0)

static inline void *worker_main(void *arg)
{
    struct worker *self = arg;

    atomic_fetch_sub(&gate, 1);
    WAIT_UNTIL(!atomic_load(&gate));
    self->run(self);
    return NULL;
}

static inline void add(unsigned n, void (*run)(struct worker *self))
{
    for (unsigned i = 0; i < n; i++) {
        struct worker *w = &workers[nworkers++];

        CHECK(nworkers <= MOST_WORKERS, "too many workers");
        w->run = run;
        w->index = i;
        w->rng = rng_next(&rng);
        w->seen = NULL;
    }
}

/* Runs all that were added, at once, until each has returned. */
static inline void run_workers(void)
{
    atomic_store(&gate, nworkers);
    for (unsigned i = 0; i < nworkers; i++) {
        int err = pthread_create(&workers[i].thread, NULL, worker_main,
                                 &workers[i]);

        CHECK(err == 0, "pthread_create: %d", err);
    }
    for (unsigned i = 0; i < nworkers; i++) {
        pthread_join(workers[i].thread, NULL);
    }
}

/* Up to `most` idle turns, so that the threads meet in ever other places. */
static inline void linger(struct worker *self, unsigned most)
{
    volatile unsigned turns = (unsigned)rng_below(&self->rng, most + 1);

    while (turns) {
        turns = turns - 1;
    }
    if (rng_one_in(&self->rng, 64)) {
        sched_yield();
    }
}

/* Every few times it holds the thread up, for a turn of the others or for longer. */
#ifdef HB_TEST_DELAY
void hb_test_delay(void)
{
    static _Thread_local uint64_t delays;
    uint64_t turns;

    if (!delays) {
        delays = test_seed ^ (uintptr_t)&delays;
    }
    turns = rng_below(&delays, 32);
    if (turns < 8) {
        sched_yield();
    } else if (turns == 8) {
        usleep((useconds_t)rng_below(&delays, 60));
    }
}
#endif

#endif
