# SPDX-License-Identifier: MIT
# cython: language_level=3
"""For Cython: the functions of hbitmap.h and tracker.h, in the copy that Python has loaded.

    from pybitmap.native cimport HBitmap, hbitmap_set, pybitmap_import
    pybitmap_import()

Compile with ``include_dirs=[pybitmap.get_include()]``.
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t

cdef extern from "pybitmap_api.h":
    # Once in each module, before anything else here: what is not imported yet is a NULL.
    int pybitmap_import() except -1
    int pybitmap_use(const void *table)

    enum:
        HBITMAP_LOG_MAX_SIZE

    ctypedef struct HBitmap:
        pass
    ctypedef struct HBitmapIter:
        pass
    ctypedef struct HBTracker:
        pass
    ctypedef struct HBTrackerSet:
        pass
    ctypedef struct HBWrite:
        pass

cdef extern from "pybitmap_api.h" nogil:
    int hbitmap_thread_init()
    bint hbitmap_torn(const HBitmap *hb)
    HBitmap *hbitmap_alloc(uint64_t size, int granularity)
    HBitmap *hbitmap_alloc_on(uint64_t size, int granularity, uint64_t *words, size_t nwords)
    void hbitmap_free(HBitmap *hb)
    int hbitmap_truncate(HBitmap *hb, uint64_t size)
    void hbitmap_pin(HBitmap *hb)
    void hbitmap_unpin(HBitmap *hb)
    void hbitmap_pin_into(HBitmap *hb, HBitmap **pin)
    void hbitmap_drop_pin(HBitmap **pin)
    int hbitmap_set(HBitmap *hb, uint64_t start, uint64_t count)
    int hbitmap_set_many(HBitmap *hb, const uint64_t *starts, const uint64_t *counts, size_t n)
    int hbitmap_reset(HBitmap *hb, uint64_t start, uint64_t count)
    void hbitmap_reset_all(HBitmap *hb)
    int hbitmap_take(HBitmap *hb, uint64_t item)
    uint64_t hbitmap_size(const HBitmap *hb)
    int hbitmap_granularity(const HBitmap *hb)
    bint hbitmap_get(const HBitmap *hb, uint64_t item)
    bint hbitmap_empty(const HBitmap *hb)
    uint64_t hbitmap_count(const HBitmap *hb)
    uint64_t hbitmap_count_range(const HBitmap *hb, uint64_t start, uint64_t count)
    uint64_t hbitmap_nonzero_words(const HBitmap *hb)
    const uint64_t *hbitmap_words(const HBitmap *hb, size_t *nwords)
    int hbitmap_equal(const HBitmap *a, const HBitmap *b)
    int hbitmap_is_subset(const HBitmap *a, const HBitmap *b)
    int hbitmap_is_disjoint(const HBitmap *a, const HBitmap *b)
    void hbitmap_iter_init(HBitmapIter *hbi, const HBitmap *hb, uint64_t first)
    int64_t hbitmap_iter_next(HBitmapIter *hbi)
    size_t hbitmap_iter_fill(HBitmapIter *hbi, uint64_t *items, size_t n)
    int64_t hbitmap_next_dirty(const HBitmap *hb, int64_t start, int64_t count)
    int64_t hbitmap_next_zero(const HBitmap *hb, int64_t start, int64_t count)
    bint hbitmap_next_dirty_area(const HBitmap *hb, int64_t start, int64_t end, int64_t
                                 max_dirty_count, int64_t *dirty_start, int64_t *dirty_count)
    bint hbitmap_status(const HBitmap *hb, int64_t start, int64_t count, int64_t *pnum)
    size_t hbitmap_areas(const HBitmap *hb, uint64_t start, uint64_t end, uint64_t *areas, size_t
                         max_areas, uint64_t *next)
    uint64_t hbitmap_count_areas(const HBitmap *hb, uint64_t start, uint64_t end)
    int hbitmap_merge(const HBitmap *a, const HBitmap *b, HBitmap *result)
    HBitmap *hbitmap_union(const HBitmap *a, const HBitmap *b)
    int hbitmap_and(const HBitmap *a, const HBitmap *b, HBitmap *result)
    int hbitmap_andnot(const HBitmap *a, const HBitmap *b, HBitmap *result)
    int hbitmap_xor(const HBitmap *a, const HBitmap *b, HBitmap *result)
    int hbitmap_drain(HBitmap *hb, uint64_t start, uint64_t count, HBitmap *into)
    int hbitmap_drain_fresh(HBitmap *hb, uint64_t start, uint64_t count, HBitmap *fresh)
    void hbitmap_put_back(HBitmap **pair)
    bint hbitmap_is_serializable(const HBitmap *hb)
    uint64_t hbitmap_serialization_align(const HBitmap *hb)
    uint64_t hbitmap_serialization_size(const HBitmap *hb, uint64_t start, uint64_t count)
    int hbitmap_serialize_part(const HBitmap *hb, uint8_t *buf, uint64_t start, uint64_t count)
    int hbitmap_deserialize_part(HBitmap *hb, const uint8_t *buf, uint64_t start, uint64_t count,
                                 bint finish)
    int hbitmap_deserialize_zeroes(HBitmap *hb, uint64_t start, uint64_t count, bint finish)
    int hbitmap_deserialize_ones(HBitmap *hb, uint64_t start, uint64_t count, bint finish)
    void hbitmap_deserialize_finish(HBitmap *hb)
    int hbitmap_check(const HBitmap *hb, const char **reason)
    HBTracker *hbtracker_alloc()
    void hbtracker_free(HBTracker *tracker)
    HBTrackerSet *hbtracker_set_alloc(uint64_t size, HBitmap **bitmaps, size_t n, bint readonly)
    void hbtracker_set_free(HBTrackerSet *set)
    void hbtracker_sets_free(HBTrackerSet **sets)
    int hbtracker_publish(HBTracker *tracker, HBTrackerSet *set)
    int hbtracker_publish_all(HBTracker **trackers, HBTrackerSet **sets, size_t n)
    int hbtracker_mark(HBTracker *tracker, uint64_t offset, uint64_t length)
    int hbtracker_try_mark(HBTracker *tracker, uint64_t offset, uint64_t length)
    bint hbtracker_wait(HBTracker *tracker, unsigned milliseconds)
    int hbtracker_mark_many(HBTracker *tracker, const uint64_t *offsets, const uint64_t *lengths,
                            size_t n)
    int hbtracker_try_mark_many(HBTracker *tracker, const uint64_t *offsets, const uint64_t
                                *lengths, size_t n, size_t *done)
    int hbtracker_begin_write(HBTracker *tracker, uint64_t offset, uint64_t length, HBWrite
                              **write)
    int hbtracker_end_write(HBTracker *tracker, HBWrite **write)
    int hbtracker_try_begin_write(HBTracker *tracker, uint64_t offset, uint64_t length, HBWrite
                                  **write)
    int hbtracker_try_end_write(HBTracker *tracker, HBWrite **write)
    void hbtracker_drop_write(HBWrite **write)
    int hbitmap_merge_bits(HBitmap *hb, const uint8_t *bits, uint64_t nbits, uint64_t start,
                           int granularity, bint msb_first)
    int hbitmap_flip(HBitmap *hb, uint64_t start, uint64_t count)
    uint64_t hbitmap_rank(const HBitmap *hb, uint64_t item)
    int64_t hbitmap_select(const HBitmap *hb, uint64_t n)
    int64_t hbitmap_intersection_count(const HBitmap *a, const HBitmap *b)
    int64_t hbitmap_union_count(const HBitmap *a, const HBitmap *b)
    int64_t hbitmap_difference_count(const HBitmap *a, const HBitmap *b)
    int64_t hbitmap_symmetric_difference_count(const HBitmap *a, const HBitmap *b)
    int64_t hbitmap_prev_dirty(const HBitmap *hb, int64_t start, int64_t count)
    int64_t hbitmap_copy_areas(const HBitmap *hb, void *dst, const void *src, uint64_t nbytes)
    HBitmap *hbitmap_intersection(const HBitmap *a, const HBitmap *b)
    HBitmap *hbitmap_difference(const HBitmap *a, const HBitmap *b)
    HBitmap *hbitmap_symmetric_difference(const HBitmap *a, const HBitmap *b)
    int hbitmap_try_take(HBitmap *hb, uint64_t item)
