/* SPDX-License-Identifier: MIT */
/*
 * The lock of a bitmap.
 */
#ifndef PYBITMAP_LOCKS_H
#define PYBITMAP_LOCKS_H

#include "block.h"

#pragma GCC visibility push(hidden)

/*
 * What a lock is taken for.  The child of a fork has no thread that would release
 * a lock of another one's, so threads say in their slots which they have:
 *
 *     the slot        0   hb       hb + 1                hb         0
 *     the lock                  got        changes           free
 *
 * A lock that a lost thread has named is free for the child; where it was changing
 * the bitmap, that is torn.
 */
enum hb_purpose { HB_READ, HB_CHANGE };

/* The lock is not part of what a caller means by const. */
static inline pthread_mutex_t *hb_lock_of(const HBitmap *hb)
{
    return (pthread_mutex_t *)(uintptr_t)&hb->lock;
}

/* After a fork: what threads that are lost have marked, or were about to restore in a
 * clear, gets its summary bits. */
__attribute__((noinline))
void hb_finish_marks(const HBitmap *hb);

static inline bool hb_unfinished(const HBitmap *hb)
{
    return atomic_load_explicit(&hb->forks, memory_order_relaxed) != hb_forks;
}

/*
 * Who has the lock for a change says so here, too, for those who look without it:
 * `changes` is odd until the lock is released.  If it was the same even number before
 * and behind what they looked at, no clear was under way (hbitmap_empty).
 *
 * Only who has the lock writes it.  Relaxed at the beginning, since a fence follows
 * before anything is cleared, so whoever sees that sees this; a release at the end,
 * so who begins with the even number sees what was restored (tests/litmus,
 * empty-beside-clear).
 */
static inline void hb_says_change(const HBitmap *hb, memory_order order)
{
    HBitmap *own = (HBitmap *)(uintptr_t)hb;

    atomic_store_explicit(&own->changes,
                          atomic_load_explicit(&own->changes, memory_order_relaxed) + 1,
                          order);
}

static inline void hb_locked(const HBitmap *hb)
{
    if (hb_unfinished(hb)) {
        hb_finish_marks(hb);
    }
}

/*
 * Takes the lock; a thread that is alone needs none, and says nothing.  (There may be
 * no slot, if there is no memory for one.)  False, for who must not wait: another
 * thread has it, or marks have to be finished first.
 */
static inline bool hb_lock_if(const HBitmap *hb, enum hb_purpose purpose, bool wait)
{
    struct hb_slot *slot;
    _Atomic uintptr_t *entry = NULL;

    if (!wait && hb_unfinished(hb)) {
        return false;
    }
    if (hb_alone()) {
        hb_locked(hb);
        return true;
    }
    slot = hb_slot();
    if (slot) {
        entry = slot->locked;
        while (atomic_load_explicit(entry, memory_order_relaxed)) {
            entry++;
        }
        atomic_store_explicit(entry, (uintptr_t)hb, memory_order_relaxed);
    }
    /* Before the lock's own stores, in what a fork copies (with hb_locks_forget). */
    hb_write_fence();
    if (wait) {
        pthread_mutex_lock(hb_lock_of(hb));
    } else if (pthread_mutex_trylock(hb_lock_of(hb)) != 0) {
        if (entry) {
            atomic_store_explicit(entry, 0, memory_order_release);
        }
        return false;
    }
    if (entry) {
        atomic_store_explicit(entry, (uintptr_t)hb + purpose, memory_order_relaxed);
    }
    if (purpose == HB_CHANGE) {
        hb_says_change(hb, memory_order_relaxed);
    }
    /* Before those of the call (with hb_undisturbed, and hb_locks_forget). */
    hb_write_fence();
    hb_locked(hb);
    return true;
}

static inline void hb_lock(const HBitmap *hb, enum hb_purpose purpose)
{
    (void)hb_lock_if(hb, purpose, true);
}

static inline void hb_unlock(const HBitmap *hb)
{
    struct hb_slot *slot = hb_own_slot;
    _Atomic uintptr_t *entry = NULL;

    if (atomic_load_explicit(&hb->changes, memory_order_relaxed) % 2) {
        hb_says_change(hb, memory_order_release);
    }
    for (unsigned i = 0; slot && i < HB_MOST_LOCKS; i++) {
        if ((atomic_load_explicit(&slot->locked[i], memory_order_relaxed) | 1) ==
            ((uintptr_t)hb | 1)) {
            entry = &slot->locked[i];
            break;
        }
    }
    if (!entry) {
        /* It was alone, or there was no memory for a slot when it locked. */
        if (!hb_alone()) {
            pthread_mutex_unlock(hb_lock_of(hb));
        }
        return;
    }
    atomic_store_explicit(entry, (uintptr_t)hb, memory_order_release);
    pthread_mutex_unlock(hb_lock_of(hb));
    atomic_store_explicit(entry, 0, memory_order_release);
}

/* Two bitmaps to read, which may be the same, and one to change, which may be one
 * of these; NULL: there is none. */
void hb_lock_all(const HBitmap *a, const HBitmap *b, const HBitmap *changed);
void hb_unlock_all(const HBitmap *a, const HBitmap *b, const HBitmap *changed);

#pragma GCC visibility pop

#endif
