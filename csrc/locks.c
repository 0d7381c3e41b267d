/* SPDX-License-Identifier: MIT */
/*
 * Locks of several bitmaps, and what a fork makes of locks.
 */
#include <errno.h>

#include "locks.h"
#include "protocol.h"

static void hb_order(const HBitmap **a, const HBitmap **b)
{
    if ((uintptr_t)*a > (uintptr_t)*b) {
        const HBitmap *t = *a;

        *a = *b;
        *b = t;
    }
}

void hb_lock_all(const HBitmap *a, const HBitmap *b, const HBitmap *changed)
{
    const HBitmap *c = changed;

    hb_order(&a, &b);
    hb_order(&b, &c);
    hb_order(&a, &b);
    if (a) {
        hb_lock(a, a == changed ? HB_CHANGE : HB_READ);
    }
    if (b != a) {
        hb_lock(b, b == changed ? HB_CHANGE : HB_READ);
    }
    if (c != b) {
        hb_lock(c, c == changed ? HB_CHANGE : HB_READ);
    }
}

void hb_unlock_all(const HBitmap *a, const HBitmap *b, const HBitmap *changed)
{
    const HBitmap *c = changed;

    hb_order(&a, &b);
    hb_order(&b, &c);
    hb_order(&a, &b);
    if (c != b) {
        hb_unlock(c);
    }
    if (b != a) {
        hb_unlock(b);
    }
    if (a) {
        hb_unlock(a);
    }
}

/* ---- after a fork ------------------------------------------------------- */

static bool hb_any_torn;

void hb_locks_forget(struct hb_slot *slot)
{
#ifdef HB_BREAK_KEEP_LOCKS
    return;     /* for the stress test */
#endif
    for (unsigned i = 0; i < HB_MOST_LOCKS; i++) {
        uintptr_t said = atomic_load(&slot->locked[i]);
        HBitmap *hb = (HBitmap *)(said & ~(uintptr_t)1);

        if (hb) {
            (void)pthread_mutex_init(&hb->lock, NULL);
            hb->torn |= said & 1;
            hb_any_torn |= said & 1;
            atomic_store(&slot->locked[i], 0);
        }
    }
}

bool hbitmap_torn(const HBitmap *hb)
{
    if (!hb) {
        return hb_any_torn;
    }
    HB_AT_HOME(hb, true, hbitmap_torn, hb);
    return hb->torn;
}

int hbitmap_thread_init(void)
{
    return hb_slot() ? 0 : -ENOMEM;
}
