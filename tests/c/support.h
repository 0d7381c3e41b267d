/* SPDX-License-Identifier: MIT */
/*
 * What the C tests share: checks that say where and with which values they
 * failed, a trace of what was done before, and random numbers that a seed
 * repeats.
 */
#ifndef PYBITMAP_TESTS_SUPPORT_H
#define PYBITMAP_TESTS_SUPPORT_H

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "hbitmap.h"

#if defined(__GNUC__)
#define PRINTF_LIKE(at, args) __attribute__((format(printf, at, args)))
#else
#define PRINTF_LIKE(at, args)
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif

/* ---- what led to a failure ---------------------------------------------- */

enum { TRACE_LINES = 24, TRACE_WIDTH = 160 };

static uint64_t test_seed;
static char trace_line[TRACE_LINES][TRACE_WIDTH];
static unsigned long trace_at;

/* Notes one step; the last ones are shown when a check fails.  For programs
 * of one thread, as are all that call it. */
PRINTF_LIKE(1, 2)
static inline void trace(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    (void)vsnprintf(trace_line[trace_at++ % TRACE_LINES], TRACE_WIDTH, format,
                    args);
    va_end(args);
}

static inline void trace_clear(void)
{
    trace_at = 0;
}

PRINTF_LIKE(4, 5)
static inline void fail_at_line(const char *file, int line, const char *what,
                                const char *format, ...)
{
    unsigned long from = trace_at > TRACE_LINES ? trace_at - TRACE_LINES : 0;
    va_list args;

    fflush(stdout);
    fprintf(stderr, "%s:%d: %s: ", file, line, what);
    va_start(args, format);
    (void)vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\nseed %" PRIu64 "\n", test_seed);
    for (unsigned long i = from; i < trace_at; i++) {
        fprintf(stderr, "  %s%s\n", i + 1 == trace_at ? "> " : "  ",
                trace_line[i % TRACE_LINES]);
    }
    fflush(stderr);
    /* Not exit(): other threads may still be running. */
    _Exit(1);
}

#define CHECK(condition, ...) \
    do { \
        if (!(condition)) { \
            fail_at_line(__FILE__, __LINE__, #condition, __VA_ARGS__); \
        } \
    } while (0)

/* Two integers: converted to int64_t, so a wrong -1 is shown as -1. */
#define CHECK_EQ(got, want) \
    do { \
        int64_t got_ = (int64_t)(got), want_ = (int64_t)(want); \
        if (got_ != want_) { \
            fail_at_line(__FILE__, __LINE__, #got " == " #want, \
                         "%" PRId64 ", not %" PRId64, got_, want_); \
        } \
    } while (0)

static inline void check_valid_at(const char *file, int line, const HBitmap *hb)
{
    const char *reason = NULL;

    if (hbitmap_check(hb, &reason) != 0) {
        fail_at_line(file, line, "hbitmap_check", "%s", reason);
    }
}

#define CHECK_VALID(hb) check_valid_at(__FILE__, __LINE__, hb)

static inline void ok(const char *name)
{
    printf("ok %s\n", name);
    fflush(stdout);
}

/* ---- memory of the tests themselves ------------------------------------- */

static inline void *grab(size_t nbytes)
{
    void *memory = calloc(nbytes ? nbytes : 1, 1);

    CHECK(memory != NULL, "the test is out of memory, %zu bytes", nbytes);
    return memory;
}

/* ---- random numbers: SplitMix64 ----------------------------------------- */

static inline uint64_t rng_next(uint64_t *rng)
{
    uint64_t z = (*rng += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* In [0, limit); 0 as limit stands for 2^64. */
static inline uint64_t rng_below(uint64_t *rng, uint64_t limit)
{
    return limit ? rng_next(rng) % limit : rng_next(rng);
}

static inline bool rng_one_in(uint64_t *rng, uint64_t n)
{
    return rng_below(rng, n) == 0;
}

/* ---- the command line: PROGRAM [SEED [ROUNDS]] -------------------------- */

static inline unsigned long read_arguments(int argc, char **argv,
                                           unsigned long rounds)
{
    struct timespec now = { 0 };

    (void)timespec_get(&now, TIME_UTC);
    test_seed = ((uint64_t)now.tv_sec << 20) ^ (uint64_t)now.tv_nsec;
    if (argc > 1) {
        test_seed = strtoull(argv[1], NULL, 0);
    }
    if (argc > 2) {
        rounds = strtoul(argv[2], NULL, 0);
    }
    printf("%s %" PRIu64 " %lu\n", argv[0], test_seed, rounds);
    fflush(stdout);
    return rounds;
}

#endif
