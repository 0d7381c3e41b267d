/* SPDX-License-Identifier: MIT */
/*
 * The functions of one copy of the core, as a table.
 *
 * A process may have several copies: Python's, and those that modules compile from
 * the sources.  Each has such a table of its own functions; whatever a copy makes
 * points to the table of its maker (copies.h), and pybitmap_api.h gives native code
 * the table of Python's copy.
 *
 * Functions are only ever appended, so a table serves whoever knows the first
 * `size` bytes of it.  A function that goes, or changes what it takes, makes another
 * version.
 */
#ifndef PYBITMAP_TABLE_H
#define PYBITMAP_TABLE_H

#include "hbitmap.h"
#include "tracker.h"

/* No pointer, no size of a bitmap, no text. */
#define PYBITMAP_API_MAGIC UINT64_C(0xb17ab1e5c0de6d5a)
#ifndef PYBITMAP_API_VERSION
#define PYBITMAP_API_VERSION 1
#endif

/* F(name) for each function of hbitmap.h and tracker.h, in the table's order. */
#define PYBITMAP_FUNCTIONS(F)       \
    F(hbitmap_thread_init)          \
    F(hbitmap_torn)                 \
    F(hbitmap_alloc)                \
    F(hbitmap_alloc_on)             \
    F(hbitmap_free)                 \
    F(hbitmap_truncate)             \
    F(hbitmap_pin)                  \
    F(hbitmap_unpin)                \
    F(hbitmap_pin_into)             \
    F(hbitmap_drop_pin)             \
    F(hbitmap_set)                  \
    F(hbitmap_set_many)             \
    F(hbitmap_reset)                \
    F(hbitmap_reset_all)            \
    F(hbitmap_take)                 \
    F(hbitmap_size)                 \
    F(hbitmap_granularity)          \
    F(hbitmap_get)                  \
    F(hbitmap_empty)                \
    F(hbitmap_count)                \
    F(hbitmap_count_range)          \
    F(hbitmap_nonzero_words)        \
    F(hbitmap_words)                \
    F(hbitmap_equal)                \
    F(hbitmap_is_subset)            \
    F(hbitmap_is_disjoint)          \
    F(hbitmap_iter_init)            \
    F(hbitmap_iter_next)            \
    F(hbitmap_iter_fill)            \
    F(hbitmap_next_dirty)           \
    F(hbitmap_next_zero)            \
    F(hbitmap_next_dirty_area)      \
    F(hbitmap_status)               \
    F(hbitmap_areas)                \
    F(hbitmap_count_areas)          \
    F(hbitmap_merge)                \
    F(hbitmap_union)                \
    F(hbitmap_and)                  \
    F(hbitmap_andnot)               \
    F(hbitmap_xor)                  \
    F(hbitmap_drain)                \
    F(hbitmap_drain_fresh)          \
    F(hbitmap_put_back)             \
    F(hbitmap_is_serializable)      \
    F(hbitmap_serialization_align)  \
    F(hbitmap_serialization_size)   \
    F(hbitmap_serialize_part)       \
    F(hbitmap_deserialize_part)     \
    F(hbitmap_deserialize_zeroes)   \
    F(hbitmap_deserialize_ones)     \
    F(hbitmap_deserialize_finish)   \
    F(hbitmap_check)                \
    F(hbtracker_alloc)              \
    F(hbtracker_free)               \
    F(hbtracker_set_alloc)          \
    F(hbtracker_set_free)           \
    F(hbtracker_sets_free)          \
    F(hbtracker_publish)            \
    F(hbtracker_publish_all)        \
    F(hbtracker_mark)               \
    F(hbtracker_try_mark)           \
    F(hbtracker_wait)               \
    F(hbtracker_mark_many)          \
    F(hbtracker_try_mark_many)      \
    F(hbtracker_begin_write)        \
    F(hbtracker_end_write)          \
    F(hbtracker_try_begin_write)    \
    F(hbtracker_try_end_write)      \
    F(hbtracker_drop_write)         \
    F(hbitmap_merge_bits)           \
    F(hbitmap_flip)                 \
    F(hbitmap_rank)                 \
    F(hbitmap_select)               \
    F(hbitmap_intersection_count)   \
    F(hbitmap_union_count)          \
    F(hbitmap_difference_count)     \
    F(hbitmap_symmetric_difference_count) \
    F(hbitmap_prev_dirty)           \
    F(hbitmap_copy_areas)           \
    F(hbitmap_intersection)         \
    F(hbitmap_difference)           \
    F(hbitmap_symmetric_difference) \
    F(hbitmap_try_take)

#ifdef __cplusplus
#define PYBITMAP_TYPE_OF(name) decltype(::name)
#else
#define PYBITMAP_TYPE_OF(name) __typeof__(name)
#endif

struct pybitmap_api {
    uint64_t magic;         /* PYBITMAP_API_MAGIC */
    uint32_t version;       /* PYBITMAP_API_VERSION of whoever compiled it */
    uint32_t size;          /* of the table, in bytes */
#define PYBITMAP_MEMBER(name) PYBITMAP_TYPE_OF(name) *name;
    PYBITMAP_FUNCTIONS(PYBITMAP_MEMBER)
#undef PYBITMAP_MEMBER
};

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

/* The table of the copy that is called: a const struct pybitmap_api *. */
const void *hbitmap_api(void);

/* The names of its functions, in its order, a space between them. */
const char *hbitmap_api_names(void);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif
