/* SPDX-License-Identifier: MIT */
/*
 * HBitmap: a hierarchical bitmap for tracking what was written to.
 *
 * `size` items (bytes, sectors, pages), one bit for each group of
 * 2^granularity of them.  Above the leaf words stand summary levels: bit N of
 * a level is set if word N of the level below is not zero, so the next dirty
 * group is found in O(levels) steps however empty the bitmap is.
 *
 *     size 8, granularity 1:      set(3, 2)  ->  leaf 0110, count 4
 *     items  0 1 2 3 4 5 6 7
 *     groups  0   1   2   3
 *
 * Workload: marks by the million from several threads, of which most hit what
 * is dirty already; now and then somebody drains, merges or iterates.
 *
 * UNITS.  start, count, size and item are in items; ranges are half-open
 * [start, start + count); a count of 0 does nothing.  Marks and resets never
 * clamp: a range that leaves the bitmap, or overflows, is refused.  Searches
 * clamp: a start beyond the size finds nothing, an end beyond it means the
 * size.
 *
 * ERRORS.  A function that can be called wrongly returns 0 or a negative errno
 * and has then changed nothing: -ERANGE, the range is not inside the bitmap;
 * -EINVAL, it cuts a group (reset, drain), the bitmaps do not fit each other,
 * or an argument makes no sense; -EBUSY, the bitmap is pinned; -ENOMEM; -EXDEV, see
 * SEVERAL COPIES.
 * Nothing here aborts or prints.
 *
 * THREADS.  Every function may run in several threads on one bitmap, but for
 * hbitmap_free.  Marks (set, set_many, merge_bits, the target of drain) take no lock.
 * Whatever clears bits takes one lock inside the bitmap, and so does whatever
 * has to see all of it (count, rank, select, merge, compare, serialize, drain); with several
 * bitmaps the locks are taken in the order of their addresses.  Promised:
 *   (a) once all calls have returned, no summary bit is clear over a word that
 *       is not zero;
 *   (b) a mark that returned before a drain began is in that drain, or was
 *       taken by a clear that overlapped it: no mark is ever lost;
 *   (c) the count has all marks that returned before it began, if nothing clears
 *       meanwhile; once all calls have returned, it is exact.
 * Searches and iterators take no lock: while a clear is under way they may pass
 * over marks near what it clears; these are there once the clear has returned.
 * (hbitmap_empty is exact: where a clear is under way it takes the lock before it
 * says yes.)  A truncate
 * beside other calls is safe for memory, but a mark that overlaps it may go to the
 * old size and be lost.
 * The promises are about the bitmap.  A mark that finds its bit set is no
 * memory barrier for your data: a thread that writes data, marks it, and has
 * it copied by another thread which clears the mark first and reads the data
 * then, puts atomic_thread_fence(memory_order_seq_cst) between writing and
 * marking (Python code under the GIL has that already).
 *
 * SIGNAL HANDLERS may mark (set, set_many; of tracker.h try_mark and try_mark_many)
 * and ask what takes no lock (get, size, granularity, searches), if they cannot have
 * interrupted any of these functions in their thread: a handler of write-protected
 * memory, for example, that the library itself does not write to.  A thread that is
 * going to be interrupted so calls hbitmap_thread_init() first, since the first mark
 * of a thread takes memory, and the handler may have interrupted malloc.  Nothing
 * else is allowed there.
 *
 * FORK.  The child of a fork(2) has copies of all bitmaps and goes on with them by
 * itself (but for leaf words in shared memory); a mark that another thread had not
 * finished may be there or not: what takes no lock may see it in part, until the
 * first call that takes the bitmap's lock, which reads the whole leaf if there were
 * other threads.  It waits for nobody: locks that other threads had are free.  What
 * one of them was changing, by any call but a mark, is torn there (hbitmap_torn), and
 * no other bitmap is.
 *
 * SEVERAL COPIES of this code may be in a process: that of Python's pybitmap, and those
 * that modules have compiled from the sources.  Each function works on whatever any of
 * them has made, by calling its namesake in the copy that made it, so nothing is lost
 * between them.  Refused are things of several copies in one call (merge, compare,
 * drain, ...: -EXDEV, or NULL with errno EXDEV), and those of a copy of another
 * PYBITMAP_API_VERSION (pybitmap_table.h): -EXDEV; functions that return no error answer
 * 0, false, NULL or -1, or do nothing, with errno EXDEV.  hbitmap_thread_init is about the
 * copy that is called.  (Code that only wants to use Python's copy compiles none: see
 * pybitmap_api.h.)
 *
 * DLCLOSE.  The library may be unloaded when no call is running, and nothing that it has
 * made is in use; threads that have used it may go on.
 */
#ifndef PYBITMAP_HBITMAP_H
#define PYBITMAP_HBITMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

/* At most 2^HBITMAP_LOG_MAX_SIZE groups. */
#define HBITMAP_LOG_MAX_SIZE 41

typedef struct HBitmap HBitmap;

/* Lives where the caller wants, usually on the stack; needs no clean-up.
 * The members are the implementation's. */
typedef struct HBitmapIter {
    const HBitmap *hb;
    uint64_t word;          /* the leaf word that it is in */
    uint64_t seen, rest;    /* what that held, and what of it was not passed */
} HBitmapIter;

/* ---- threads ------------------------------------------------------------ */

/* What a thread's first mark would take memory for: see SIGNAL HANDLERS.  0, or
 * -ENOMEM; may be called again. */
int hbitmap_thread_init(void);

/*
 * In the child of a fork: was another thread changing the bitmap at that moment?
 * Then its bits are those of no moment, for good; all that is useful is to free it.
 * NULL: is there such a bitmap, of the copy that is called?
 */
bool hbitmap_torn(const HBitmap *hb);

/* ---- life --------------------------------------------------------------- */

/*
 * All clean.  size: at most INT64_MAX items; granularity: 0..63, the log2 of
 * the items in a group.  Memory of large bitmaps is only mapped, and touched
 * when it is marked.  NULL with errno EINVAL (size, granularity or number of
 * groups out of range) or ENOMEM.
 */
HBitmap *hbitmap_alloc(uint64_t size, int granularity);

/*
 * The same over leaf words of the caller's: `words` is 8-byte aligned, holds
 * at least max(1, ceil(groups / 64)) words of the machine's byte order, and
 * outlives the bitmap.  Set bits are adopted, bits beyond the end are cleared.
 * The memory is neither freed nor resized here (truncate: -EBUSY) and must
 * not be under two HBitmaps at a time.  NULL as above.
 */
HBitmap *hbitmap_alloc_on(uint64_t size, int granularity,
                          uint64_t *words, size_t nwords);

/* Frees hb and all that it holds; what is pinned, with the last unpin.  No
 * other call may be running.  NULL is fine. */
void hbitmap_free(HBitmap *hb);

/*
 * Grow: the new items are clean.  Shrink: groups wholly beyond the new end go,
 * a group that the end cuts stays.  The old memory lives on until
 * hbitmap_free, for calls that are still in it.  -EBUSY while pinned or over
 * the caller's words, -EINVAL for a size that hbitmap_alloc refuses, -ENOMEM.
 */
int hbitmap_truncate(HBitmap *hb, uint64_t size);

/* Between pin and unpin hbitmap_truncate is refused and hbitmap_free waits, so
 * the bitmap and its words stay. */
void hbitmap_pin(HBitmap *hb);
void hbitmap_unpin(HBitmap *hb);

/* The same for those who may be interrupted right behind it: *pin is hb from then on.
 * And, for finalizers: what *pin says is unpinned, once, and *pin is NULL; if it is that
 * already, nothing. */
void hbitmap_pin_into(HBitmap *hb, HBitmap **pin);
void hbitmap_drop_pin(HBitmap **pin);

/* ---- marks -------------------------------------------------------------- */

/* Marks every group that the range touches.  -ERANGE. */
int hbitmap_set(HBitmap *hb, uint64_t start, uint64_t count);

/* n ranges [starts[i], starts[i] + counts[i]); counts NULL: of one item each.
 * -ERANGE: one of them is not inside the bitmap, none was marked.  (If another thread changes the arrays
 * meanwhile, some may have been marked.) */
int hbitmap_set_many(HBitmap *hb, const uint64_t *starts,
                     const uint64_t *counts, size_t n);

/*
 * Marks what a foreign flat bitmap has.  Its bit i is bit i % 8 of bits[i / 8],
 * counted from the lowest (KVM, vhost, DRBD: words in little-endian order) or, with
 * msb_first, from the highest (XenServer); it stands for the 2^granularity items
 * from start + (i << granularity) on, and marks every group that these touch.
 *
 *     size 8, granularity 1, start 2, bits 0101 of granularity 0  ->  leaf 0110
 *
 * nbits: those that are read, in (nbits + 7) / 8 bytes.  -ERANGE: one that is set
 * begins beyond the end, none was marked.  (What the last one has beyond the end is
 * dropped.)  -EINVAL: granularity is not in 0..63.  A mark; what is set in `bits` by
 * others meanwhile may be marked or not, nothing else is.
 */
int hbitmap_merge_bits(HBitmap *hb, const uint8_t *bits, uint64_t nbits,
                       uint64_t start, int granularity, bool msb_first);

/*
 * Cleans whole groups.  start is a multiple of 2^granularity; start + count
 * is one too, or is the size: a partly covered group never becomes clean.
 * (The size rounded up to a group is accepted as the end.)  -ERANGE, -EINVAL.
 */
int hbitmap_reset(HBitmap *hb, uint64_t start, uint64_t count);
void hbitmap_reset_all(HBitmap *hb);

/* Cleans the group that holds `item`: 1 if it was dirty, 0 if it was clean,
 * -ERANGE.  Of several threads that take one group, one gets the 1. */
int hbitmap_take(HBitmap *hb, uint64_t item);

/* The same for callers that must not wait for the lock: -EAGAIN where they would. */
int hbitmap_try_take(HBitmap *hb, uint64_t item);

/*
 * Dirty groups become clean and clean ones dirty; whole groups, as for
 * hbitmap_reset.  A mark of a group meanwhile comes before the flip, or after it and
 * is there; one of a group that was clean when the flip came to it is there.
 * -ERANGE, -EINVAL.
 *
 *     size 8, granularity 1, leaf 0110:   flip(2, 4)  ->  leaf 0000,   flip(0, 8)  ->  1001
 */
int hbitmap_flip(HBitmap *hb, uint64_t start, uint64_t count);

/* ---- questions ---------------------------------------------------------- */

uint64_t hbitmap_size(const HBitmap *hb);
int hbitmap_granularity(const HBitmap *hb);

/* Is the group of `item` dirty?  Outside the bitmap: false. */
bool hbitmap_get(const HBitmap *hb, uint64_t item);

/* Is no group dirty?  As a rule O(1) and without the lock, whatever the answer; a
 * mark that returned before is seen. */
bool hbitmap_empty(const HBitmap *hb);

/* Dirty groups << granularity (so it may exceed the size).  O(1) if nothing
 * changed since it was last asked, else it looks again at the pieces of 4096 groups
 * in which something has. */
uint64_t hbitmap_count(const HBitmap *hb);

/* Dirty items in the range, clipped to it and to the size. */
uint64_t hbitmap_count_range(const HBitmap *hb, uint64_t start, uint64_t count);

/*
 * How many dirty groups begin at `item` or before it (so that of `item` counts); and
 * the start of the one that has n such before it, -1 if there are no more than n.
 *
 *     size 8, granularity 1, leaf 0110:   rank 1, 2, 3, 4 -> 0, 1, 1, 2
 *                                         select 0, 1, 2 -> 2, 4, -1
 */
uint64_t hbitmap_rank(const HBitmap *hb, uint64_t item);
int64_t hbitmap_select(const HBitmap *hb, uint64_t n);

/* Leaf words that are not zero (a hint of how dense the bitmap is). */
uint64_t hbitmap_nonzero_words(const HBitmap *hb);

/* The leaf words and, in *nwords, how many: max(1, ceil(groups / 64)); live,
 * in the machine's byte order, bit N % 64 of word N / 64 is group N.  Valid
 * until truncate, drain_fresh or free (see hbitmap_pin). */
const uint64_t *hbitmap_words(const HBitmap *hb, size_t *nwords);

/*
 * Same size, granularity and bits; are all of a's bits in b; have they none in
 * common.  1 or 0.  The last two: -EINVAL where size or granularity differ.
 */
int hbitmap_equal(const HBitmap *a, const HBitmap *b);
int hbitmap_is_subset(const HBitmap *a, const HBitmap *b);
int hbitmap_is_disjoint(const HBitmap *a, const HBitmap *b);

/* How many groups are dirty in both, in one at least, in a only, in one only.  No
 * bitmap is made.  -EINVAL where size or granularity differ. */
int64_t hbitmap_intersection_count(const HBitmap *a, const HBitmap *b);
int64_t hbitmap_union_count(const HBitmap *a, const HBitmap *b);
int64_t hbitmap_difference_count(const HBitmap *a, const HBitmap *b);
int64_t hbitmap_symmetric_difference_count(const HBitmap *a, const HBitmap *b);

/* ---- searches ----------------------------------------------------------- */

/* The starts of dirty groups in order, beginning with the group that holds
 * `first`; -1 at the end.  Setting, resetting and truncating meanwhile is
 * safe; what is reset ahead of the iterator is not given, what is set ahead is, what
 * is set behind is not. */
void hbitmap_iter_init(HBitmapIter *hbi, const HBitmap *hb, uint64_t first);
int64_t hbitmap_iter_next(HBitmapIter *hbi);

/* Up to n of them at once into `items`; returns how many, fewer than n only
 * at the end. */
size_t hbitmap_iter_fill(HBitmapIter *hbi, uint64_t *items, size_t n);

/* The first dirty (clean) item at or after start and before start + count, or
 * -1.  INT64_MAX as count means to the end; negative arguments find nothing. */
int64_t hbitmap_next_dirty(const HBitmap *hb, int64_t start, int64_t count);
int64_t hbitmap_next_zero(const HBitmap *hb, int64_t start, int64_t count);

/* The last dirty item at or before start and after start - count, or -1.  A start
 * beyond the size means the last item, INT64_MAX as count to the first; negative
 * arguments find nothing.
 *
 *     size 8, granularity 1, leaf 0110:   (7, INT64_MAX) -> 5,  (4, 1) -> 4,  (7, 2) -> -1 */
int64_t hbitmap_prev_dirty(const HBitmap *hb, int64_t start, int64_t count);

/*
 * The first run of dirty items in [start, end), cut at `end` and at
 * max_dirty_count (> 0) items.  False, and nothing stored, if there is none.
 *
 *     size 10, granularity 2, leaf 110:   (1, 10, INT64_MAX)  ->  1, 7
 */
bool hbitmap_next_dirty_area(const HBitmap *hb, int64_t start, int64_t end,
                             int64_t max_dirty_count,
                             int64_t *dirty_start, int64_t *dirty_count);

/* Is `start` dirty, and for how many of the `count` items from there does it
 * stay so?  *pnum is 0 only if the clamped range is empty (then: false). */
bool hbitmap_status(const HBitmap *hb, int64_t start, int64_t count,
                    int64_t *pnum);

/*
 * The dirty areas of [start, end) as pairs (start, count), at most max_areas
 * of them, into 2 * max_areas words.  Returns how many; *next is where to go
 * on, and is the (clamped) end once all have been given.
 */
size_t hbitmap_areas(const HBitmap *hb, uint64_t start, uint64_t end,
                     uint64_t *areas, size_t max_areas, uint64_t *next);

/* How many hbitmap_areas would give, if nothing changes meanwhile; in a small
 * part of the time. */
uint64_t hbitmap_count_areas(const HBitmap *hb, uint64_t start, uint64_t end);

/*
 * Copies the dirty items of src to dst, where items are bytes.  Both have nbytes, at
 * least the size, and do not overlap in the size's first bytes (-EINVAL).  Returns how many
 * were copied.  What is marked meanwhile may be copied or not.
 */
int64_t hbitmap_copy_areas(const HBitmap *hb, void *dst, const void *src, uint64_t nbytes);

/* ---- whole bitmaps ------------------------------------------------------ */

/*
 * result = a or b; any of the three may be the same.  Sizes must be equal
 * (-EINVAL); granularities may differ, a dirty group then marks every group of
 * the result that it touches.
 */
int hbitmap_merge(const HBitmap *a, const HBitmap *b, HBitmap *result);

/* A new bitmap of a's granularity: a or b.  NULL with errno EINVAL (the sizes
 * differ) or ENOMEM. */
HBitmap *hbitmap_union(const HBitmap *a, const HBitmap *b);

/* The same: a and b, a and not b, a xor b.  EINVAL where the sizes or the
 * granularities differ. */
HBitmap *hbitmap_intersection(const HBitmap *a, const HBitmap *b);
HBitmap *hbitmap_difference(const HBitmap *a, const HBitmap *b);
HBitmap *hbitmap_symmetric_difference(const HBitmap *a, const HBitmap *b);

/* result = a and b, a and not b, a xor b; any of the three may be the same.
 * Sizes and granularities must be equal (-EINVAL). */
int hbitmap_and(const HBitmap *a, const HBitmap *b, HBitmap *result);
int hbitmap_andnot(const HBitmap *a, const HBitmap *b, HBitmap *result);
int hbitmap_xor(const HBitmap *a, const HBitmap *b, HBitmap *result);

/*
 * Moves the dirty bits of a range (whole groups, as for hbitmap_reset) from hb
 * into `into`, whose own bits stay: each mark is in exactly one of the two
 * afterwards.  Same size and granularity, and not the same bitmap (-EINVAL);
 * -ERANGE.
 */
int hbitmap_drain(HBitmap *hb, uint64_t start, uint64_t count, HBitmap *into);

/* The same into a bitmap that was just made: it is clean, and until this returns
 * no other thread uses it.  So it costs less; all of hb costs next to nothing in
 * a process with one thread, since then the two exchange their memory. */
int hbitmap_drain_fresh(HBitmap *hb, uint64_t start, uint64_t count,
                        HBitmap *fresh);

/* For finalizers: marks in pair[0] what is dirty in pair[1], as far as pair[0] goes,
 * and sets pair[0] to NULL.  If it is that already, nothing. */
void hbitmap_put_back(HBitmap **pair);

/* ---- serialisation ------------------------------------------------------ */

/*
 * The leaf bits as little-endian 64-bit words, the same on every machine.
 * A chunk starts at a multiple of hbitmap_serialization_align() items, and so
 * it ends, unless its last item is in the last group.  -EINVAL for any other
 * chunk and for bitmaps that are not serializable (granularity 58 and more:
 * the alignment does not fit 64 bits), -ERANGE outside the bitmap.
 */
bool hbitmap_is_serializable(const HBitmap *hb);
uint64_t hbitmap_serialization_align(const HBitmap *hb);

/* Bytes of a chunk; 0 for an empty one, and for one that is refused. */
uint64_t hbitmap_serialization_size(const HBitmap *hb,
                                    uint64_t start, uint64_t count);

/* buf: hbitmap_serialization_size(hb, start, count) bytes, any alignment. */
int hbitmap_serialize_part(const HBitmap *hb, uint8_t *buf,
                           uint64_t start, uint64_t count);

/*
 * Replaces the bits of a chunk; bits beyond the end of the bitmap are dropped.
 * Call hbitmap_deserialize_finish, or pass finish = true, after the last chunk
 * and before the bitmap is used.  Beside other calls the bits may come out
 * wrong, memory stays safe.
 */
int hbitmap_deserialize_part(HBitmap *hb, const uint8_t *buf,
                             uint64_t start, uint64_t count, bool finish);
int hbitmap_deserialize_zeroes(HBitmap *hb, uint64_t start, uint64_t count,
                               bool finish);
int hbitmap_deserialize_ones(HBitmap *hb, uint64_t start, uint64_t count,
                             bool finish);
void hbitmap_deserialize_finish(HBitmap *hb);

/* ---- self-check --------------------------------------------------------- */

/*
 * Validates every invariant: levels, summaries, no bit beyond the end, the
 * remembered count.  0, or -EINVAL with the reason in words in *reason (NULL
 * is fine; valid until the thread's next call).  Reads the whole bitmap; no
 * other call should be running.
 */
int hbitmap_check(const HBitmap *hb, const char **reason);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif
