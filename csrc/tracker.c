/* SPDX-License-Identifier: MIT */
/*
 * The write path of a node.  The bitmaps that record stand in a set behind an
 * atomic pointer; a mark reads the pointer and marks them all.
 *
 * Whoever publishes another set has to know when nobody uses the old one any
 * more.  So each thread has a slot, in which it says what it is using:
 *
 *     a mark                              a publication
 *     1  set = tracker->published         1  tracker->published = new
 *     2  slot = set                       2  for each slot: wait until it is
 *     3  still published? else 1             not the old set
 *     4  mark                             3  free the old set
 *     5  slot = nothing
 *
 * All of this is sequentially consistent but step 5.  If a mark passes step 3
 * with the old set, its step 2 came before the publication's step 1, so the
 * wait sees the slot; if not, it starts again and finds the new set.  A set
 * that got the memory of an older one is no trouble: what step 3 finds is what
 * is published then.
 *
 * SEVERAL TRACKERS AT ONE INSTANT.  One publication after the other is no
 * instant: a thread that writes to a and then to b could be in the new set of a
 * and in the old one of b.  So there is a step in between, a fork: it is
 * published in the way of the new set and leads to the old one or, from the
 * moment when the turn that all forks share is taken, to the new one.
 *
 *     a mark on a, with an old set, then on b             a        b      turn
 *     -----------------------------------------------------------------------
 *                          publish the fork of a        fork     old       0
 *     a: finds the fork, turn 0: the old set            fork     old       0
 *                          publish the fork of b        fork     fork      0
 *                          T: take the turn             fork     fork      1
 *     b: finds the fork, turn 1: the new set            fork     fork      1
 *                          publish the new sets         new      new       1
 *                          wait for slots that name
 *                          an old set or a fork
 *
 * A mark that found the old set itself, or turn 0, began before T and is in the
 * old set; all others are in the new one.  (b before T: the turn was 0 when b
 * looked, so it was when a, which had returned, looked.)  The slot names the
 * fork while the mark is in the old set.  One that goes on to the new set says
 * so before it lets go of the fork, which is waited for, so no later publication
 * begins before that: there is nothing to look at again.  tests/core/test_turn.py goes
 * through every interleaving.
 *
 * OPEN WRITES stand in lists, under a mutex that all trackers share and that a fork(2)
 * takes first, or the child could find it locked for good.  A publication looks at the list
 * when it has waited: whoever is in it gets marked in the new set.  Whoever comes
 * later marks after the publication, as the begin lists first and then marks.
 * Whoever had left it marked before that; if that was before the publication,
 * the data was written before, too.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "copies.h"
#include "threads.h"
#include "tracker.h"

/* What is published, and what slots name. */
struct hb_head {
    const struct pybitmap_api *home;    /* first, of sets: see copies.h */
    const atomic_bool *turn;            /* NULL: it is the head of a set */
    const HBTrackerSet *before;         /* of a fork: until the turn; NULL: writes wait */
    const HBTrackerSet *after;          /* of a fork: from the turn on */
};

struct HBTrackerSet {
    struct hb_head head;                /* first: its address is that of the set */
    struct hb_head fork;                /* in the way of this set, see above */
    atomic_bool turn;                   /* for all forks of one publication: see the first of them */
    bool readonly;
    uint64_t size;
    size_t n;
    HBitmap *bitmaps[];
};

struct HBWrite {
    const struct pybitmap_api *home;
    HBTracker *tracker;
    uint64_t offset;
    uint64_t length;
    HBWrite *next;
    HBWrite **at;                       /* what points to it */
};

struct HBTracker {
    const struct pybitmap_api *home;    /* first, here and below: see copies.h */
    _Atomic(const struct hb_head *) published;  /* NULL: writes wait */
    atomic_uint changes;                /* grows when they need not any more: they sleep on it */
    HBWrite *open;                      /* under hb_open_mutex */
};

static pthread_mutex_t hb_open_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t hb_open_once = PTHREAD_ONCE_INIT;

/* How many writes are marked before another set gets its chance. */
enum { HB_STRIDE = 4096 };

/* ---- entering and leaving ------------------------------------------------ */

static void hb_leave(struct hb_slot *slot)
{
    /* Release: the marks come before it, for whoever then frees a bitmap. */
    atomic_store_explicit(&slot->set, NULL, memory_order_release);
}

/* Is nothing published?  A fork that leads nowhere yet is something: it will lead
 * somewhere in a moment. */
static bool hb_must_wait(HBTracker *tracker)
{
    return !atomic_load(&tracker->published);
}

/* What hb_enter does where no set is published, or another one right now. */
__attribute__((noinline))
static const HBTrackerSet *hb_enter_slowly(HBTracker *tracker, bool wait,
                                           struct hb_slot *slot)
{
    for (unsigned round = 0;;) {
        const struct hb_head *head = atomic_load(&tracker->published);
        unsigned changes;

        atomic_store(&slot->set, head);
        hb_test_delay();
        if (head && atomic_load(&tracker->published) == head) {
            const HBTrackerSet *set;

            if (!head->turn) {
                return (const HBTrackerSet *)head;
            }
            hb_test_delay();
            if (!atomic_load(head->turn)) {
                set = head->before;
            } else {
                set = head->after;
                atomic_store(&slot->set, &set->head);
            }
            hb_test_delay();
            if (set) {
                return set;
            }
            head = NULL;
        }
        if (!head) {
            hb_leave(slot);
            if (!wait) {
                return NULL;
            }
            changes = atomic_load(&tracker->changes);
            if (hb_must_wait(tracker)) {
                hb_park(&tracker->changes, changes, UINT_MAX);
            } else {
                hb_relax(&round);
            }
        }
    }
}

/* The set to mark in, which stays until hb_leave.  NULL: there is no memory for
 * a slot (*slot is NULL), or no set is published and `wait` is false. */
static inline const HBTrackerSet *hb_enter(HBTracker *tracker, bool wait,
                                           struct hb_slot **slot)
{
    const struct hb_head *head;

    *slot = hb_slot();
    if (!*slot) {
        return NULL;
    }
    head = atomic_load(&tracker->published);
    atomic_store(&(*slot)->set, head);
    hb_test_delay();
    if (head && atomic_load(&tracker->published) == head && !head->turn) {
        return (const HBTrackerSet *)head;
    }
    return hb_enter_slowly(tracker, wait, *slot);
}

/* ---- the lists of open writes -------------------------------------------- */

static void hb_lock_open(void)
{
    (void)pthread_mutex_lock(&hb_open_mutex);
}

static void hb_unlock_open(void)
{
    (void)pthread_mutex_unlock(&hb_open_mutex);
}

static void hb_open_prepare(void)
{
    /* Where this fails there is no memory; then a fork is worse off, no more. */
    (void)pthread_atfork(hb_lock_open, hb_unlock_open, hb_unlock_open);
}

/* ---- life --------------------------------------------------------------- */

/*
 * A set, by its head; NULL is fine.  In the child of a fork(2) that came amid a
 * publication, a fork may be published for good: it lies within a set.
 */
static void hb_free(const struct hb_head *head)
{
    free((void *)(uintptr_t)(head && head->turn ? &head->after->head : head));
}

HBTracker *hbtracker_alloc(void)
{
    HBTracker *tracker = calloc(1, sizeof(*tracker));
    HBTrackerSet *set = hbtracker_set_alloc(0, NULL, 0, false);

    (void)pthread_once(&hb_open_once, hb_open_prepare);
    if (!tracker || !set) {
        free(tracker);
        free(set);
        return NULL;
    }
    tracker->home = &hb_home;
    atomic_init(&tracker->published, &set->head);
    return tracker;
}

void hbtracker_free(HBTracker *tracker)
{
    if (tracker) {
        HB_AT_HOME_VOID(tracker, hbtracker_free, tracker);
        hb_free(atomic_load(&tracker->published));
        free(tracker);
    }
}

HBTrackerSet *hbtracker_set_alloc(uint64_t size, HBitmap *const *bitmaps,
                                  size_t n, bool readonly)
{
    HBTrackerSet *set;

    if (n > (SIZE_MAX - sizeof(*set)) / sizeof(bitmaps[0])) {
        errno = ENOMEM;
        return NULL;
    }
    for (size_t i = 0; i < n; i++) {
        if (!hb_is_known(bitmaps[i])) {
            return NULL;
        }
    }
    set = malloc(sizeof(*set) + n * sizeof(bitmaps[0]));
    if (set) {
        memset(set, 0, sizeof(*set));
        set->head.home = &hb_home;
        atomic_init(&set->turn, false);
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
    if (set) {
        HB_AT_HOME_VOID(set, hbtracker_set_free, set);
        free(set);
    }
}

void hbtracker_sets_free(HBTrackerSet **sets)
{
    for (; *sets; sets++) {
        hbtracker_set_free(*sets);
        *sets = NULL;
    }
}

/* How much of a range is inside a device of that size, from its offset on. */
static uint64_t hb_inside(uint64_t size, uint64_t offset, uint64_t length)
{
    if (offset >= size) {
        return 0;
    }
    return length < size - offset ? length : size - offset;
}

/* Returns when nobody uses what a slot may name by `head` any more. */
static void hb_wait_for(const struct hb_head *head)
{
    for (struct hb_slot *slot = hb_slots_first(); slot && head; slot = slot->next) {
#ifdef HB_BREAK_NO_WAIT
        continue;       /* for the stress test, as in threads.c */
#endif
        for (unsigned round = 0; atomic_load(&slot->set) == head;) {
            hb_relax(&round);
        }
    }
}

/* Writes that sleep need not any more. */
static void hb_let_go_on(HBTracker *tracker)
{
    atomic_fetch_add(&tracker->changes, 1);
    hb_wake(&tracker->changes);
}

/* Marks the writes that are open in what is published now. */
static void hb_mark_open(HBTracker *tracker, const HBTrackerSet *set)
{
    if (set->readonly) {
        return;
    }
    hb_lock_open();
    for (const HBWrite *write = tracker->open; write; write = write->next) {
        for (size_t i = 0; i < set->n; i++) {
            (void)hbitmap_set(set->bitmaps[i], write->offset,
                              hb_inside(set->size, write->offset, write->length));
        }
    }
    hb_unlock_open();
}

int hbtracker_publish(HBTracker *tracker, HBTrackerSet *set)
{
    HB_TOGETHER((tracker, set), -EXDEV, hbtracker_publish, tracker, set);
    const struct hb_head *old = atomic_exchange(&tracker->published, set ? &set->head : NULL);

    if (!old) {
        hb_let_go_on(tracker);
    }
    if (!set || old != &set->head) {    /* else the call is made again, after a fork(2) */
        hb_wait_for(old);
        hb_free(old);
    }
    if (set) {
        hb_mark_open(tracker, set);
    }
    return 0;
}

int hbtracker_publish_all(HBTracker *const *trackers, HBTrackerSet **sets, size_t n)
{
    if (!n || !sets[0]) {
        return 0;
    }
    for (size_t i = 0; i < n; i++) {
        if (!hb_one_home((const void *const[]){ trackers[0], trackers[i], sets[i], NULL })) {
            return -EXDEV;
        }
    }
    HB_AT_HOME(trackers[0], -EXDEV, hbtracker_publish_all, trackers, sets, n);
    if (n == 1) {
        (void)hbtracker_publish(trackers[0], sets[0]);
        sets[0] = NULL;
        return 0;
    }
    for (size_t i = 0; i < n; i++) {
        struct hb_head *fork = &sets[i]->fork;
        const struct hb_head *now = atomic_load(&trackers[i]->published);

        if (now == fork) {
            continue;           /* the call is made again, in the child of a fork(2) */
        }
        /* Nobody else publishes, so what is published is a set, or nothing. */
        fork->before = now == &sets[i]->head ? NULL : (const HBTrackerSet *)now;
        fork->turn = &sets[0]->turn;
        fork->after = sets[i];
#ifdef HB_BREAK_NO_TURN
        atomic_store(&sets[0]->turn, true);     /* for the stress test: too early */
#endif
        atomic_store(&trackers[i]->published, fork);
        hb_test_delay();
    }
    atomic_store(&sets[0]->turn, true);         /* T */
    for (size_t i = 0; i < n; i++) {
        hb_test_delay();
        atomic_store(&trackers[i]->published, &sets[i]->head);
        if (!sets[i]->fork.before) {
            hb_let_go_on(trackers[i]);
        }
    }
    for (size_t i = 0; i < n; i++) {
        const HBTrackerSet *before = sets[i]->fork.before;

#ifndef HB_BREAK_NO_WAIT_FOR_FORK        /* for the stress test */
        hb_wait_for(&sets[i]->fork);
#endif
        if (before) {
            hb_wait_for(&before->head);
            hb_free(&before->head);
        }
        hb_mark_open(trackers[i], sets[i]);
    }
    for (size_t i = 0; i < n; i++) {
        sets[i] = NULL;
    }
    return 0;
}

/* ---- writes ------------------------------------------------------------- */

/* The first of these writes that a set of that size refuses, and why; 0: none. */
static inline int hb_refused(uint64_t size, bool readonly, const uint64_t *offsets,
                             const uint64_t *lengths, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (lengths[i] && (offsets[i] > size || lengths[i] > size - offsets[i])) {
            return -ERANGE;
        }
        if (lengths[i] && readonly) {
            return -EROFS;
        }
    }
    return 0;
}

static inline int hb_mark_write(HBTracker *tracker, uint64_t offset, uint64_t length,
                                bool wait)
{
    struct hb_slot *slot;
    const HBTrackerSet *set = hb_enter(tracker, wait, &slot);
    int err;

    if (!set) {
        return slot ? -EAGAIN : -ENOMEM;
    }
    err = hb_refused(set->size, set->readonly, &offset, &length, 1);
    for (size_t i = 0; i < set->n && !err; i++) {
        (void)hbitmap_set(set->bitmaps[i], offset, length);
    }
    hb_leave(slot);
    return err;
}

int hbtracker_mark(HBTracker *tracker, uint64_t offset, uint64_t length)
{
    HB_AT_HOME(tracker, -EXDEV, hbtracker_mark, tracker, offset, length);
    return hb_mark_write(tracker, offset, length, true);
}

int hbtracker_try_mark(HBTracker *tracker, uint64_t offset, uint64_t length)
{
    HB_AT_HOME(tracker, -EXDEV, hbtracker_try_mark, tracker, offset, length);
    return hb_mark_write(tracker, offset, length, false);
}

bool hbtracker_wait(HBTracker *tracker, unsigned milliseconds)
{
    HB_AT_HOME(tracker, true, hbtracker_wait, tracker, milliseconds);
    unsigned changes = atomic_load(&tracker->changes);

    if (hb_must_wait(tracker)) {
        hb_park(&tracker->changes, changes, milliseconds);
    }
    return !hb_must_wait(tracker);
}

static int hb_mark_writes(HBTracker *tracker, const uint64_t *offsets,
                          const uint64_t *lengths, size_t n, size_t *done, bool wait)
{
    struct hb_slot *slot;
    const HBTrackerSet *set;
    uint64_t size;
    bool readonly;
    int err;

    *done = 0;
    if (!n) {
        return 0;
    }
    set = hb_enter(tracker, wait, &slot);
    if (!set) {
        return slot ? -EAGAIN : -ENOMEM;
    }
    /* All of them before the first is marked, but nobody waits for that. */
    size = set->size;
    readonly = set->readonly;
    hb_leave(slot);
    err = hb_refused(size, readonly, offsets, lengths, n);
    while (*done < n && !err) {
        size_t next = n - *done < HB_STRIDE ? n : *done + HB_STRIDE;

        set = hb_enter(tracker, wait, &slot);
        if (!set) {
            return -EAGAIN;
        }
        if (set->size != size || set->readonly != readonly) {
            err = hb_refused(set->size, set->readonly, offsets + *done, lengths + *done,
                             next - *done);
        }
        for (size_t i = 0; i < set->n && !err; i++) {
            err = hbitmap_set_many(set->bitmaps[i], offsets + *done,
                                   lengths + *done, next - *done);
        }
        hb_leave(slot);
        *done = next;
    }
    return err;
}

int hbtracker_mark_many(HBTracker *tracker, const uint64_t *offsets,
                        const uint64_t *lengths, size_t n)
{
    HB_AT_HOME(tracker, -EXDEV, hbtracker_mark_many, tracker, offsets, lengths, n);
    size_t done;

    return hb_mark_writes(tracker, offsets, lengths, n, &done, true);
}

int hbtracker_try_mark_many(HBTracker *tracker, const uint64_t *offsets,
                            const uint64_t *lengths, size_t n, size_t *done)
{
    HB_AT_HOME(tracker, (*done = 0, -EXDEV),
               hbtracker_try_mark_many, tracker, offsets, lengths, n, done);
    return hb_mark_writes(tracker, offsets, lengths, n, done, false);
}

/* ---- writes that are open ------------------------------------------------- */

static void hb_list(HBTracker *tracker, HBWrite *write)
{
    hb_lock_open();
    write->next = tracker->open;
    write->at = &tracker->open;
    if (write->next) {
        write->next->at = &write->next;
    }
    tracker->open = write;
    hb_unlock_open();
}

static void hb_unlist(HBWrite *write)
{
    hb_lock_open();
    *write->at = write->next;
    if (write->next) {
        write->next->at = write->at;
    }
    hb_unlock_open();
    free(write);
}

static int hb_begin_write(HBTracker *tracker, uint64_t offset, uint64_t length,
                          HBWrite **write, bool wait)
{
    HBWrite *begun = malloc(sizeof(*begun));
    int err;

    *write = NULL;
    if (!begun) {
        return -ENOMEM;
    }
    begun->home = &hb_home;
    begun->tracker = tracker;
    begun->offset = offset;
    begun->length = length;
    hb_list(tracker, begun);
    err = hb_mark_write(tracker, offset, length, wait);
    if (err) {
        hb_unlist(begun);
    } else {
        *write = begun;
    }
    return err;
}

int hbtracker_begin_write(HBTracker *tracker, uint64_t offset, uint64_t length,
                          HBWrite **write)
{
    HB_AT_HOME(tracker, (*write = NULL, -EXDEV),
               hbtracker_begin_write, tracker, offset, length, write);
    return hb_begin_write(tracker, offset, length, write, true);
}

int hbtracker_try_begin_write(HBTracker *tracker, uint64_t offset, uint64_t length,
                              HBWrite **write)
{
    HB_AT_HOME(tracker, (*write = NULL, -EXDEV),
               hbtracker_try_begin_write, tracker, offset, length, write);
    return hb_begin_write(tracker, offset, length, write, false);
}

static int hb_end_write(HBTracker *tracker, HBWrite **write, bool wait)
{
    HBWrite *ended = *write;
    struct hb_slot *slot;
    const HBTrackerSet *set;
    int err = 0;

    if (!ended) {
        return 0;
    }
    set = hb_enter(tracker, wait, &slot);
    if (!set) {
        return slot ? -EAGAIN : -ENOMEM;
    }
    if (set->readonly && ended->length) {
        err = -EROFS;
    }
    for (size_t i = 0; i < set->n && !err; i++) {
        (void)hbitmap_set(set->bitmaps[i], ended->offset,
                          hb_inside(set->size, ended->offset, ended->length));
    }
    hb_leave(slot);
    hb_unlist(ended);
    *write = NULL;
    return err;
}

int hbtracker_end_write(HBTracker *tracker, HBWrite **write)
{
    HB_AT_HOME(tracker, -EXDEV, hbtracker_end_write, tracker, write);
    return hb_end_write(tracker, write, true);
}

int hbtracker_try_end_write(HBTracker *tracker, HBWrite **write)
{
    HB_AT_HOME(tracker, -EXDEV, hbtracker_try_end_write, tracker, write);
    return hb_end_write(tracker, write, false);
}

void hbtracker_drop_write(HBWrite **write)
{
    HBWrite *dropped = *write;

    if (!dropped) {
        return;
    }
    HB_AT_HOME_VOID(dropped, hbtracker_drop_write, write);
    if (hb_end_write(dropped->tracker, write, false) && *write) {
        hb_unlist(dropped);
        *write = NULL;
    }
}
