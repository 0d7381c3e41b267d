/* SPDX-License-Identifier: MIT */
/*
 * Threads that write as fast as they can, without Python between two writes.
 *
 * A sequence of writes goes round the nodes, block by block; a block is some units
 * one behind the other, written by one call.  Its threads take turns: each writes
 * its block when the one before has returned, so the order is that of the
 * sequence.  How far it is stands in memory that may be shared with another
 * process.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { MAX_NODES = 8, MAX_THREADS = 4, MAX_BLOCK = 16384 };

/* So often a thread that has to wait looks again at once; from then on it sleeps in
 * between. */
enum { LOOKS = 1000 };

typedef int mark_function(void *tracker, uint64_t offset, uint64_t length);
typedef int mark_many_function(void *tracker, const uint64_t *offsets,
                               const uint64_t *lengths, size_t n);

/* How many writes were begun, have returned, may be begun; anything: stop; errors. */
struct progress {
    _Atomic uint64_t begun, acked, limit, stop, failed;
};

struct sequence {
    void *trackers[MAX_NODES];
    uint64_t nnodes, nthreads, block, first, unit;
    mark_function *mark;
    mark_many_function *mark_many;
    struct progress *progress;
    pthread_t threads[MAX_THREADS];
};

struct turn {
    struct sequence *sequence;
    uint64_t number;
};

static void *run(void *argument)
{
    struct turn turn = *(struct turn *)argument;
    struct sequence *s = turn.sequence;
    struct progress *p = s->progress;
    uint64_t offsets[MAX_BLOCK], lengths[MAX_BLOCK];

    free(argument);
    for (uint64_t number = turn.number;; number += s->nthreads) {
        uint64_t begin = number * s->block;
        uint64_t unit = s->first + number / s->nnodes * s->block;
        void *tracker = s->trackers[number % s->nnodes];
        unsigned looks = 0;
        int err = 0;

        while (atomic_load(&p->acked) < begin || atomic_load(&p->limit) < begin + s->block) {
            if (atomic_load(&p->stop)) {
                return NULL;
            }
            if (looks < LOOKS) {
                looks++;
            } else {
                (void)nanosleep(&(struct timespec){ .tv_nsec = 1000 }, NULL);
            }
        }
        atomic_store(&p->begun, begin + s->block);
        if (s->block == 1) {
            err = s->mark(tracker, unit * s->unit, s->unit);
        } else {
            for (uint64_t i = 0; i < s->block; i++) {
                offsets[i] = (unit + i) * s->unit;
                lengths[i] = s->unit;
            }
            err = s->mark_many(tracker, offsets, lengths, s->block);
        }
        if (err) {
            atomic_store(&p->failed, (uint64_t)-err);
            return NULL;
        }
        atomic_store(&p->acked, begin + s->block);
    }
}

/* NULL: something is too large, or there is no thread. */
struct sequence *writers_start(void *const *trackers, uint64_t nnodes, uint64_t nthreads,
                               uint64_t block, uint64_t first, uint64_t unit, void *mark,
                               void *mark_many, void *progress)
{
    struct sequence *s = calloc(1, sizeof(*s));

    if (!s || nnodes > MAX_NODES || nthreads > MAX_THREADS || block > MAX_BLOCK) {
        free(s);
        return NULL;
    }
    for (uint64_t i = 0; i < nnodes; i++) {
        s->trackers[i] = trackers[i];
    }
    s->nnodes = nnodes;
    s->nthreads = nthreads;
    s->block = block;
    s->first = first;
    s->unit = unit;
    *(void **)&s->mark = mark;
    *(void **)&s->mark_many = mark_many;
    s->progress = progress;
    for (uint64_t i = 0; i < nthreads; i++) {
        struct turn *turn = malloc(sizeof(*turn));

        if (!turn) {
            abort();
        }
        turn->sequence = s;
        turn->number = i;
        if (pthread_create(&s->threads[i], NULL, run, turn)) {
            abort();
        }
    }
    return s;
}

void writers_join(struct sequence *s)
{
    atomic_store(&s->progress->stop, 1);
    for (uint64_t i = 0; i < s->nthreads; i++) {
        pthread_join(s->threads[i], NULL);
    }
    free(s);
}
