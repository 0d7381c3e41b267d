/* SPDX-License-Identifier: MIT */
/*
 * Who is in the middle of what: each thread has a slot, in which it says what
 * others may have to wait for.
 *
 * Workload: threads say so up to a million times a second, on a cache line of
 * their own; somebody looks at all slots now and then.
 *
 * Three things are said, each apart from the others:
 *   set         the tracker's set that the thread is marking in (tracker.c)
 *   summarising odd: it is setting summary bits (protocol.h)
 *   locked      bitmaps whose locks it has: the child of a fork asks, where the
 *               thread is no more
 */
#ifndef PYBITMAP_THREADS_H
#define PYBITMAP_THREADS_H

#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#pragma GCC visibility push(hidden)

enum { HB_CACHE_LINE = 64 };

struct HBitmap;

enum { HB_MOST_LOCKS = 3 };             /* of one thread at a time */

struct hb_slot {
    alignas(HB_CACHE_LINE) _Atomic(const void *) set;
    _Atomic uint64_t summarising;       /* grows by one at begin and end */
    _Atomic uintptr_t locked[HB_MOST_LOCKS];    /* odd: it changes that bitmap */
    atomic_bool taken;                  /* by a thread that is alive */
    struct hb_slot *next;
};

/*
 * The thread's own; NULL before it has one.  In a C library that gives a module
 * which is loaded later no other kind, thread-local storage is reached by a call;
 * glibc has room for a pointer.
 */
#ifdef __GLIBC__
extern __attribute__((tls_model("initial-exec")))
#else
extern
#endif
_Thread_local struct hb_slot *hb_own_slot;

/* A slot for this thread, which has none; NULL: there is no memory for one. */
struct hb_slot *hb_slot_take(void);

static inline struct hb_slot *hb_slot(void)
{
    struct hb_slot *slot = hb_own_slot;

    return slot ? slot : hb_slot_take();
}

/* The first of all slots; slots are added in front, and never freed. */
struct hb_slot *hb_slots_first(void);

/* So that a fork is seen, also one before anybody has a slot. */
void hb_slots_ready(void);

/* How many forks this process has behind it, from processes that may have had other
 * threads. */
extern unsigned hb_forks;

/* What `slot` says of the locks of a thread that this process has no more: they
 * are free again.  (locks.c) */
void hb_locks_forget(struct hb_slot *slot);

/* For tests: called where a thread that is held up for a while meets others halfway. */
#ifdef HB_TEST_DELAY
void hb_test_delay(void);
#else
#define hb_test_delay() ((void)0)
#endif

/*
 * To wait for another thread without burning its processor: *round is 0 the first
 * time.  Pauses for some microseconds, then sleeps, longer and longer, up to a
 * millisecond.  It never yields: who is waited for may have been preempted, by a
 * thread of real-time priority that would get the processor back at once, and
 * among equals whoever yields is behind all that are busy.
 */
void hb_relax(unsigned *round);

/*
 * Sleeps while *word is `seen`, until hb_wake, a signal, or so many milliseconds
 * are over; may return sooner.  UINT_MAX: as long as it takes.
 */
void hb_park(atomic_uint *word, unsigned seen, unsigned milliseconds);

/* Wakes all that sleep on the word, which was changed before. */
void hb_wake(atomic_uint *word);

/* Threads without a slot that are setting summary bits. */
extern atomic_uint hb_without_slot;

/*
 * Between these two a thread sets summary bits; neither waits or fails.  What is
 * loaded in between comes after hb_summarising_begins in the order of all
 * sequentially consistent accesses; whoever uses others there needs a fence.
 */
static inline struct hb_slot *hb_summarising_begins(void)
{
    struct hb_slot *slot = hb_slot();

    if (slot) {
        /* Nobody else writes it. */
        atomic_store(&slot->summarising,
                     atomic_load_explicit(&slot->summarising, memory_order_relaxed) + 1);
    } else {
        atomic_fetch_add(&hb_without_slot, 1);
    }
    return slot;
}

static inline void hb_summarising_ends(struct hb_slot *slot)
{
    if (slot) {
        /* Release: the bits come before it, for whoever waits for that. */
        atomic_store_explicit(&slot->summarising,
                              atomic_load_explicit(&slot->summarising,
                                                   memory_order_relaxed) + 1,
                              memory_order_release);
    } else {
        atomic_fetch_sub(&hb_without_slot, 1);
    }
}

/* Returns when all that had begun before the call has ended. */
void hb_wait_for_summarising(void);

#pragma GCC visibility pop

#endif
