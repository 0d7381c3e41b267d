/* SPDX-License-Identifier: MIT */
/*
 * HBTracker: one write, marked in every bitmap that records it.
 *
 * A node's write path.  Which bitmaps record changes now and then, from one
 * thread at a time; writes come from many threads, all the time.
 *
 * offset and length are in bytes, the items of the bitmaps; all bitmaps of a
 * set have its size.  Errors are as in hbitmap.h.
 *
 * THREADS.  Marks take no lock and may run beside everything but
 * hbtracker_free.  While NULL is published they sleep.  One thread at a time may
 * publish, of all the trackers that are ever published together.
 *
 * In the child of a fork(2) a tracker of the parent that nobody was publishing
 * goes on by itself; writes that were open there are open for good.  (Its bitmaps:
 * see hbitmap.h.)
 *
 * SEVERAL COPIES of this code: as hbitmap.h has it.  A tracker and a set that is
 * published on it are made by one copy; the bitmaps may be of others.
 *
 * A NODE OF PYTHON'S: node.pin() gives its tracker to native hooks, for marks and open
 * writes; what is published is Python's to say.  The address is valid until the pin
 * is closed, whatever becomes of the node, and each call says with its return code what
 * has:
 *     node.truncate()      marks wait meanwhile, and then the new size counts: -ERANGE
 *                          beyond it
 *     node.close()         marks wait meanwhile, then -ERANGE, since the device is empty;
 *                          if it could not be stored, the node is open as before
 *     the child of a fork  -ERANGE, if the graph has a store: that is the parent's
 *     a node or a bitmap that must not change: -EROFS
 * Who closes or truncates needs the GIL to come to its end.  So a hook that has it calls
 * the functions with try_ in their names, and lets the GIL go before it waits.
 */
#ifndef PYBITMAP_TRACKER_H
#define PYBITMAP_TRACKER_H

#include "hbitmap.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

typedef struct HBTracker HBTracker;
typedef struct HBTrackerSet HBTrackerSet;
typedef struct HBWrite HBWrite;

/* Knows no bitmap and has size 0.  NULL: no memory. */
HBTracker *hbtracker_alloc(void);

/* Frees the tracker and its set, not the bitmaps.  No write is open.  NULL is
 * fine. */
void hbtracker_free(HBTracker *tracker);

/*
 * What is to record: n bitmaps, for writes of a device of `size` bytes; with
 * `readonly`, writes are refused.  The bitmaps stay the caller's, who keeps
 * them until a later publish has returned.  NULL with errno ENOMEM, or EXDEV: one of
 * them is of another version of this code.
 */
HBTrackerSet *hbtracker_set_alloc(uint64_t size, HBitmap *const *bitmaps,
                                  size_t n, bool readonly);

/* Frees a set that was never published.  NULL is fine. */
void hbtracker_set_free(HBTrackerSet *set);

/* Frees the sets of an array that ends with NULL, not the array. */
void hbtracker_sets_free(HBTrackerSet **sets);

/*
 * From now on `set` records; the tracker owns it.  When this returns, no mark
 * is under way any more that does not see it: a bitmap that it leaves out does
 * not change, and can be freed.  0; cannot fail but by a set of another copy of this
 * code than the tracker's: -EXDEV, and nothing has happened.
 * NULL: writes wait until the next publish; nothing is marked meanwhile.
 */
int hbtracker_publish(HBTracker *tracker, HBTrackerSet *set);

/*
 * The same for n trackers, each named once, at one instant T, which lies within
 * the call: each mark on any of them is before T, and then in what recorded
 * there, or after T, and then in what is published now.  If mark A returned
 * before mark B began, on whichever trackers, then B before T implies A before T.
 * The writes of one hbtracker_mark_many are cut in their order.
 *
 * Marks do not wait for it.  The call waits for those that are under way, so
 * when it returns, all that are before T are done.  0, or -EXDEV as above.
 *
 * The trackers own the sets, of which none is NULL; each sets[i] is NULL
 * afterwards.
 *
 * In the child of a fork(2) that came amid the call, the same call brings it to its
 * end; until then nothing else is published on these trackers.  With sets[0] NULL,
 * nothing happens.
 */
int hbtracker_publish_all(HBTracker *const *trackers, HBTrackerSet **sets, size_t n);

/*
 * A write.  -ERANGE: not inside the device; -EROFS: some bitmap must not
 * change; -ENOMEM: no memory for the slot of a thread that marks for the first
 * time.  Nothing was marked then.
 */
int hbtracker_mark(HBTracker *tracker, uint64_t offset, uint64_t length);

/* The same for callers that must not wait: -EAGAIN, and nothing marked, where
 * hbtracker_mark would sleep until the next publish. */
int hbtracker_try_mark(HBTracker *tracker, uint64_t offset, uint64_t length);

/* Sleeps while marks would have to wait, for so many milliseconds at most, or
 * until a signal was handled.  False: they would still. */
bool hbtracker_wait(HBTracker *tracker, unsigned milliseconds);

/* n writes, in their order.  As hbtracker_mark, for all of them; but what is
 * published meanwhile is seen from the next 4096 writes on, and if it refuses
 * these, those before them were marked. */
int hbtracker_mark_many(HBTracker *tracker, const uint64_t *offsets,
                        const uint64_t *lengths, size_t n);

/* The same for callers that must not wait: -EAGAIN where it would; the first
 * *done writes were marked then. */
int hbtracker_try_mark_many(HBTracker *tracker, const uint64_t *offsets,
                            const uint64_t *lengths, size_t n, size_t *done);

/*
 * A write of data that bitmaps must not miss, whatever is published while it is
 * done: between these two its range is open.  It is marked at the begin and
 * again at the end, and every publication in between marks it in what records
 * then, before it returns.  So what is copied of what a publication left out
 * has the data, or the range is marked in what came in.
 *
 *     HBWrite *write;
 *     err = hbtracker_begin_write(tracker, offset, length, &write);
 *     ... write the data ...
 *     err = hbtracker_end_write(tracker, &write);
 *
 * Any number may be open, of any threads; the one that ends a write need not be
 * the one that began it.  Begin and end wait for publications that mark open
 * ranges, and as hbtracker_mark does.
 *
 * Begin: -ERANGE, -EROFS, -ENOMEM: nothing is open, and *write is NULL.
 * End: *write is NULL afterwards; if it was before, nothing happens.  What is
 * beyond the end of a device that has become smaller is not marked.  -EROFS:
 * what is published now must not change, so only the begin was marked.  -ENOMEM:
 * the write is open still; only a thread that marks for the first time gets that.
 */
int hbtracker_begin_write(HBTracker *tracker, uint64_t offset, uint64_t length,
                          HBWrite **write);
int hbtracker_end_write(HBTracker *tracker, HBWrite **write);

/* The same for callers that must not wait for a publish: -EAGAIN, and nothing
 * has changed, where hbtracker_mark would. */
int hbtracker_try_begin_write(HBTracker *tracker, uint64_t offset, uint64_t length,
                              HBWrite **write);
int hbtracker_try_end_write(HBTracker *tracker, HBWrite **write);

/* For finalizers: ends a write without waiting; *write may be NULL.  Where it
 * would wait, the range is not marked again: what is published next has it
 * from before. */
void hbtracker_drop_write(HBWrite **write);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif
