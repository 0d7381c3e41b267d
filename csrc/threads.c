/* SPDX-License-Identifier: MIT */
/*
 * Slots of threads.  They stand in a list, are never freed, but taken again when
 * their thread has ended: as many as threads ever used one at the same time.
 *
 * Where there is no memory for a slot, a thread that sets summary bits counts
 * itself in a number that all such threads share.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* posix_memalign */
#endif

#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "threads.h"
#include "words.h"

static _Atomic(struct hb_slot *) hb_slots;
static pthread_key_t hb_slot_key;
static pthread_once_t hb_slot_once = PTHREAD_ONCE_INIT;
static atomic_bool hb_slot_key_made;

atomic_uint hb_without_slot;

unsigned hb_forks;

/* Right before a fork: was there no other thread that could be in the library? */
static bool hb_was_alone;

_Thread_local struct hb_slot *hb_own_slot;

/* The thread ends.  If it still marks, in the destructor of another key, it
 * takes a slot again. */
static void hb_slot_leave(void *slot)
{
    hb_own_slot = NULL;
    atomic_store(&((struct hb_slot *)slot)->taken, false);
}

/*
 * In the child of a fork, where only this thread lives on.  What the others had
 * said would be waited for in vain, also by clears of bitmaps that the child has
 * made itself.
 */
static void hb_slots_forget(void)
{
    for (struct hb_slot *slot = hb_slots_first(); slot; slot = slot->next) {
        if (slot != hb_own_slot) {
            uint64_t said = atomic_load(&slot->summarising);

            atomic_store(&slot->set, NULL);
            atomic_store(&slot->summarising, said + said % 2);
            hb_locks_forget(slot);
            atomic_store(&slot->taken, false);
        }
    }
    atomic_store(&hb_without_slot, 0);
    hb_forks += !hb_was_alone;
}

static void hb_slots_before_fork(void)
{
    hb_was_alone = hb_alone();
}

/*
 * The library is unloaded, or the process ends.  A thread that ends later must not
 * find the destructor of its slot gone.  Slots stay: at the end of a process, other
 * threads may be using theirs.
 */
__attribute__((destructor))
static void hb_slots_unload(void)
{
    if (atomic_exchange(&hb_slot_key_made, false)) {
        (void)pthread_key_delete(hb_slot_key);
    }
}

static void hb_slots_prepare(void)
{
    /* Where this fails there is no memory; then a fork is worse off, no more. */
    (void)pthread_atfork(hb_slots_before_fork, NULL, hb_slots_forget);
    hb_slot_key_made = pthread_key_create(&hb_slot_key, hb_slot_leave) == 0;
}

void hb_slots_ready(void)
{
    (void)pthread_once(&hb_slot_once, hb_slots_prepare);
}

struct hb_slot *hb_slot_take(void)
{
    struct hb_slot *slot, *first;

    hb_slots_ready();
    for (slot = atomic_load(&hb_slots); slot; slot = slot->next) {
        if (!atomic_exchange(&slot->taken, true)) {
            break;
        }
    }
    if (!slot) {
        void *memory;

        if (posix_memalign(&memory, HB_CACHE_LINE, sizeof(*slot)) != 0) {
            return NULL;
        }
        slot = memset(memory, 0, sizeof(*slot));
        atomic_init(&slot->taken, true);
        first = atomic_load(&hb_slots);
        do {
            slot->next = first;
        } while (!atomic_compare_exchange_weak(&hb_slots, &first, slot));
    }
    if (hb_slot_key_made) {
        /* Without it the slot stays taken when the thread ends, no more. */
        (void)pthread_setspecific(hb_slot_key, slot);
    }
    hb_own_slot = slot;
    return slot;
}

struct hb_slot *hb_slots_first(void)
{
    return atomic_load(&hb_slots);
}

static struct timespec hb_microseconds(unsigned long n)
{
    return (struct timespec){ .tv_sec = (time_t)(n / 1000000),
                              .tv_nsec = (long)(n % 1000000 * 1000) };
}

/* Tells the processor, if it can be told, that this is a loop which waits. */
static inline void hb_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield" ::: "memory");
#elif defined(__powerpc64__)
    __asm__ volatile("or 27, 27, 27" ::: "memory");
#endif
}

void hb_relax(unsigned *round)
{
    /* 2 to the power of these: pauses, a few microseconds in all; microseconds. */
    enum { PAUSES = 7, MOST = 10 };

    if (*round < PAUSES) {
        for (unsigned i = 0; i < 1u << *round; i++) {
            hb_pause();
        }
        ++*round;
        return;
    }
#ifndef HB_BREAK_NO_SLEEP   /* for the test of priorities, as HB_BREAK_NO_WAIT */
    struct timespec time = hb_microseconds(1ul << (*round - PAUSES));

    (void)nanosleep(&time, NULL);
    *round += *round < PAUSES + MOST;
#endif
}

void hb_park(atomic_uint *word, unsigned seen, unsigned milliseconds)
{
#ifdef __linux__
    struct timespec time = hb_microseconds(1000ul * milliseconds);

    (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen,
                  milliseconds == UINT_MAX ? NULL : &time, NULL, 0);
#else
    struct timespec time = hb_microseconds(1000);

    if (milliseconds && atomic_load(word) == seen) {
        (void)nanosleep(&time, NULL);
    }
#endif
}

void hb_wake(atomic_uint *word)
{
#ifdef __linux__
    (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#else
    (void)word;
#endif
}

void hb_wait_for_summarising(void)
{
#ifdef HB_BREAK_NO_WAIT
    return;     /* for the stress test, as HB_BREAK_EARLY_EXIT */
#endif
    /* A slot that is not in the list yet is one of a thread that begins later. */
    for (struct hb_slot *slot = hb_slots_first(); slot; slot = slot->next) {
        uint64_t seen = atomic_load(&slot->summarising);

        hb_test_delay();
        for (unsigned round = 0; seen % 2 && atomic_load(&slot->summarising) == seen;) {
            hb_relax(&round);
        }
    }
    for (unsigned round = 0; atomic_load(&hb_without_slot);) {
        hb_relax(&round);
    }
}
