/* SPDX-License-Identifier: MIT */
/*
 * How the C benchmarks measure and print.
 *
 * A row is a question: how long does one unit of work take us, and how long the
 * bare loop that does nothing but the memory accesses?  Both run in turn, round
 * after round; what is shown is the median of the times and the median of the
 * rounds' ratios, so a neighbour on the machine disturbs both sides of a ratio
 * or neither.
 */
#ifndef PYBITMAP_BENCH_MEASURE_H
#define PYBITMAP_BENCH_MEASURE_H

#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum goal {
    GOAL_NONE,
    GOAL_RATIO,             /* at most goal x the bare loop */
    GOAL_NS,                /* at most goal ns per unit */
    GOAL_MORE_NS,           /* at most goal ns per unit more than the bare one */
    GOAL_BYTES,             /* at most goal bytes in all */
};

/* Does the work, in thread `self` of 0, 1, ...; returns how many units. */
typedef uint64_t work(unsigned self);

struct row {
    const char *name;
    const char *unit;
    enum goal kind;
    double goal;
    void (*setup)(void);            /* once */
    void (*before)(void);           /* before each run of ours, not timed */
    work *ours;
    void (*before_bare)(void);
    work *bare;
    unsigned threads;               /* 0 is 1 */
};

static struct {
    bool json;
    unsigned rounds;
    const char *only;               /* rows whose names contain this */
    uint64_t groups;
    double density;                 /* below 0: the row's own */
} options = { .rounds = 25, .groups = UINT64_C(1) << 24, .density = -1 };

static inline double now_ns(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* ---- one run ------------------------------------------------------------ */

struct runner {
    pthread_t thread;
    work *run;
    unsigned self;
    uint64_t units;
};

static atomic_uint gate;

static inline void *runner_main(void *arg)
{
    struct runner *runner = arg;

    atomic_fetch_sub(&gate, 1);
    while (atomic_load(&gate)) {
    }
    runner->units = runner->run(runner->self);
    return NULL;
}

/* ns per unit of one thread. */
static inline double time_of(work *run, unsigned threads)
{
    enum { MOST = 8 };
    struct runner runners[MOST];
    double begin, end;

    if (threads <= 1) {
        uint64_t units;

        /* Of this thread: others on the machine take none of it. */
        begin = now_ns(CLOCK_THREAD_CPUTIME_ID);
        units = run(0);
        end = now_ns(CLOCK_THREAD_CPUTIME_ID);
        return (end - begin) / (double)(units ? units : 1);
    }
    atomic_store(&gate, threads);
    for (unsigned i = 0; i < threads; i++) {
        runners[i] = (struct runner){ .run = run, .self = i };
        if (i && pthread_create(&runners[i].thread, NULL, runner_main, &runners[i])) {
            fprintf(stderr, "cannot start a thread\n");
            exit(1);
        }
    }
    while (atomic_load(&gate) > 1) {
    }
    begin = now_ns(CLOCK_MONOTONIC);
    runner_main(&runners[0]);
    for (unsigned i = 1; i < threads; i++) {
        pthread_join(runners[i].thread, NULL);
    }
    end = now_ns(CLOCK_MONOTONIC);
    return (end - begin) / (double)(runners[0].units ? runners[0].units : 1);
}

static inline int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static inline double median(double *values, unsigned n)
{
    qsort(values, n, sizeof(values[0]), by_value);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

/* ---- what is printed ---------------------------------------------------- */

static inline void print_head(void)
{
    if (!options.json) {
        printf("%-36s %-11s %12s %12s %8s  %s\n", "", "ns per", "ours", "bare",
               "ratio", "goal: at most");
    }
}

static inline void print_number(const char *name, double value)
{
    if (value < 0) {
        printf(", \"%s\": null", name);
    } else {
        printf(", \"%s\": %.6g", name, value);
    }
}

/* bare below 0: there is none. */
static inline void print_row(const struct row *row, double ours, double bare,
                             double ratio)
{
    static const char *const kinds[] = {
        "null", "\"ratio\"", "\"ns\"", "\"more ns\"", "\"bytes\"",
    };
    /* Goals in ns are for what caches hold, and so for this size. */
    bool in_ns = row->kind == GOAL_NS || row->kind == GOAL_MORE_NS;
    enum goal kind = in_ns && options.groups > UINT64_C(1) << 24 ? GOAL_NONE
                                                                : row->kind;
    double reached = kind == GOAL_RATIO ? ratio
                   : kind == GOAL_MORE_NS ? ours - bare : ours;
    bool met = reached <= row->goal;

    if (options.json) {
        printf("{\"name\": \"%s\", \"unit\": \"%s\", \"groups\": %" PRIu64
               ", \"threads\": %u", row->name, row->unit, options.groups,
               row->threads ? row->threads : 1);
        print_number("density", options.density);
        print_number("ours", ours);
        print_number("bare", bare);
        print_number("ratio", ratio);
        printf(", \"goal_kind\": %s", kinds[kind]);
        print_number("goal", kind ? row->goal : -1);
        printf(", \"met\": %s}\n", !kind ? "null" : met ? "true" : "false");
    } else {
        printf("%-36s %-11s %12.3f ", row->name, row->unit, ours);
        if (bare < 0) {
            printf("%12s %8s  ", "", "");
        } else {
            printf("%12.3f %8.2f  ", bare, ratio);
        }
        switch (kind) {
        case GOAL_NONE:
            printf("\n");
            break;
        case GOAL_RATIO:
            printf("%g x%s\n", row->goal, met ? "" : "   MISSED");
            break;
        case GOAL_NS:
            printf("%g ns%s\n", row->goal, met ? "" : "   MISSED");
            break;
        case GOAL_MORE_NS:
            printf("%g ns more%s\n", row->goal, met ? "" : "   MISSED");
            break;
        case GOAL_BYTES:
            printf("%.0f bytes%s\n", row->goal, met ? "" : "   MISSED");
            break;
        }
    }
    fflush(stdout);
}

static inline void measure(const struct row *row)
{
    enum { MOST = 1001 };
    double ours[MOST], bare[MOST], ratio[MOST];
    unsigned n = options.rounds < MOST ? options.rounds : MOST;

    if (options.only && !strstr(row->name, options.only)) {
        return;
    }
    if (row->setup) {
        row->setup();
    }
    /* The first round is for the caches, and not counted. */
    for (unsigned i = 0; i <= n; i++) {
        unsigned at = i ? i - 1 : 0;

        if (row->before) {
            row->before();
        }
        ours[at] = time_of(row->ours, row->threads);
        if (row->bare) {
            if (row->before_bare) {
                row->before_bare();
            }
            bare[at] = time_of(row->bare, row->threads);
            ratio[at] = ours[at] / bare[at];
        }
    }
    print_row(row, median(ours, n), row->bare ? median(bare, n) : -1,
              row->bare ? median(ratio, n) : -1);
}

#endif
