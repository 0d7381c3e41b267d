/* SPDX-License-Identifier: MIT */
/*
 * The write path of a node.  The bitmaps that record stand in a set behind an
 * atomic pointer; a mark reads the pointer and marks them all.
 *
 * Whoever publishes another set has to know when nobody uses the old one any
 * more.  So each thread has a slot, in which it says what set it is using:
 *
 *     a mark                              a publication
 *     1  set = tracker->set               1  tracker->set = new
 *     2  slot = set                       2  for each slot: wait until it is
 *     3  tracker->set still set? else 1      not the old set
 *     4  mark                             3  free the old set
 *     5  slot = nothing
 *
 * All of this is sequentially consistent but step 5.  If a mark passes step 3
 * with the old set, its step 2 came before the publication's step 1, so the
 * wait sees the slot; if not, it starts again and finds the new set.  A set
 * that got the memory of an older one is no trouble: what step 3 finds is what
 * is published then.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "slots.h"
#include "tracker.h"

struct HBTrackerSet {
    uint64_t size;
    bool readonly;
    size_t n;
    HBitmap *bitmaps[];
};

struct HBTracker {
    _Atomic(HBTrackerSet *) set;        /* NULL: writes wait */
};

/* How many writes are marked before another set gets its chance. */
enum { HB_STRIDE = 4096 };

/* ---- entering and leaving ------------------------------------------------ */

/* The set to mark in, which stays until hb_leave.  NULL: there is no memory for
 * a slot (*slot is NULL), or no set is published and `wait` is false. */
static const HBTrackerSet *hb_enter(HBTracker *tracker, bool wait, struct hb_slot **slot)
{
    *slot = hb_slot();
    if (!*slot) {
        return NULL;
    }
    for (;;) {
        const HBTrackerSet *set = atomic_load(&tracker->set);

        atomic_store(&(*slot)->set, set);
        if (set && atomic_load(&tracker->set) == set) {
            return set;
        }
        if (!set) {
            if (!wait) {
                return NULL;    /* the slot holds nothing */
            }
            sched_yield();
        }
    }
}

static void hb_leave(struct hb_slot *slot)
{
    /* Release: the marks come before it, for whoever then frees a bitmap. */
    atomic_store_explicit(&slot->set, NULL, memory_order_release);
}

/* ---- life --------------------------------------------------------------- */

HBTracker *hbtracker_alloc(void)
{
    HBTracker *tracker = calloc(1, sizeof(*tracker));
    HBTrackerSet *set = hbtracker_set_alloc(0, NULL, 0, false);

    if (!tracker || !set) {
        free(tracker);
        free(set);
        return NULL;
    }
    atomic_init(&tracker->set, set);
    return tracker;
}

void hbtracker_free(HBTracker *tracker)
{
    if (tracker) {
        free(atomic_load(&tracker->set));
        free(tracker);
    }
}

HBTrackerSet *hbtracker_set_alloc(uint64_t size, HBitmap *const *bitmaps,
                                  size_t n, bool readonly)
{
    HBTrackerSet *set;

    if (n > (SIZE_MAX - sizeof(*set)) / sizeof(bitmaps[0])) {
        return NULL;
    }
    set = malloc(sizeof(*set) + n * sizeof(bitmaps[0]));
    if (set) {
        set->size = size;
        set->readonly = readonly;
        set->n = n;
        for (size_t i = 0; i < n; i++) {
            set->bitmaps[i] = bitmaps[i];
        }
    }
    return set;
}

void hbtracker_set_free(HBTrackerSet *set)
{
    free(set);
}

void hbtracker_publish(HBTracker *tracker, HBTrackerSet *set)
{
    HBTrackerSet *old = atomic_exchange(&tracker->set, set);

    if (!old) {
        return;
    }
    for (struct hb_slot *slot = hb_slots_first(); slot; slot = slot->next) {
        while (atomic_load(&slot->set) == old) {
            sched_yield();
        }
    }
    free(old);
}

/* ---- writes ------------------------------------------------------------- */

static bool hb_set_has(const HBTrackerSet *set, uint64_t offset, uint64_t length)
{
    return length == 0 || (offset <= set->size && length <= set->size - offset);
}

static inline int hb_mark_write(HBTracker *tracker, uint64_t offset, uint64_t length,
                                bool wait)
{
    struct hb_slot *slot;
    const HBTrackerSet *set = hb_enter(tracker, wait, &slot);
    int err = 0;

    if (!set) {
        return slot ? -EAGAIN : -ENOMEM;
    }
    if (!hb_set_has(set, offset, length)) {
        err = -ERANGE;
    } else if (set->readonly && length) {
        err = -EROFS;
    } else {
        for (size_t i = 0; i < set->n; i++) {
            (void)hbitmap_set(set->bitmaps[i], offset, length);
        }
    }
    hb_leave(slot);
    return err;
}

int hbtracker_mark(HBTracker *tracker, uint64_t offset, uint64_t length)
{
    return hb_mark_write(tracker, offset, length, true);
}

int hbtracker_try_mark(HBTracker *tracker, uint64_t offset, uint64_t length)
{
    return hb_mark_write(tracker, offset, length, false);
}

int hbtracker_mark_many(HBTracker *tracker, const uint64_t *offsets,
                        const uint64_t *lengths, size_t n)
{
    size_t checked = 0;
    int err = 0;

    for (size_t done = 0; done < n && !err;) {
        size_t stride = n - done < HB_STRIDE ? n - done : HB_STRIDE;
        struct hb_slot *slot;
        const HBTrackerSet *set = hb_enter(tracker, true, &slot);

        if (!set) {
            return -ENOMEM;
        }
        /* All of them before the first is marked, later only what is next. */
        for (; checked < n && !err; checked++) {
            if (!hb_set_has(set, offsets[checked], lengths[checked])) {
                err = -ERANGE;
            } else if (set->readonly && lengths[checked]) {
                err = -EROFS;
            }
        }
        for (size_t i = 0; i < set->n && !err; i++) {
            err = hbitmap_set_many(set->bitmaps[i], offsets + done,
                                   lengths + done, stride);
        }
        hb_leave(slot);
        done += stride;
    }
    return err;
}
