/* SPDX-License-Identifier: MIT */
/*
 * hbitmap.h and tracker.h for native code that calls the copy of the core which
 * Python has loaded, without compiling one of its own.
 *
 *     #include <Python.h>
 *     #include <pybitmap_api.h>
 *
 *     PyMODINIT_FUNC PyInit_emulator(void)
 *     {
 *         if (pybitmap_import() < 0) {
 *             return NULL;
 *         }
 *         ...
 *
 * From then on code that is written against the two headers compiles as it is:
 * hbitmap_set(hb, start, count) calls the function of Python's copy.
 *
 * Code without Python.h, a library that is loaded by ctypes for example, is given
 * pybitmap.native.table() by its loader, and calls pybitmap_use() with it.
 *
 * Each source file has a pointer of its own and imports for itself.  Files that
 * want one for all define PYBITMAP_API_SYMBOL as a name that nobody else has, before
 * they include this; all but one of them define PYBITMAP_NO_IMPORT, too.
 *
 * What is compiled against this works with the pybitmap that it was compiled with,
 * and with later ones of the same PYBITMAP_API_VERSION.
 */
#ifndef PYBITMAP_API_H
#define PYBITMAP_API_H

#include <errno.h>

#include "pybitmap_table.h"

#ifndef PYBITMAP_API_SYMBOL
static const struct pybitmap_api *pybitmap_core;
#else
#define pybitmap_core PYBITMAP_API_SYMBOL
#ifdef PYBITMAP_NO_IMPORT
extern const struct pybitmap_api *pybitmap_core;
#else
const struct pybitmap_api *pybitmap_core;
#endif
#endif

#ifndef PYBITMAP_NO_IMPORT

/* The table to call from now on.  -EXDEV: it is none, or one of a pybitmap that is
 * older than this header, or of another version; nothing has changed. */
static inline int pybitmap_use(const void *table)
{
    const struct pybitmap_api *api = (const struct pybitmap_api *)table;

    if (!api || api->magic != PYBITMAP_API_MAGIC || api->version != PYBITMAP_API_VERSION ||
        api->size < sizeof(*api)) {
        return -EXDEV;
    }
    pybitmap_core = api;
    return 0;
}

#ifdef Py_PYTHON_H

/* The same with that of the pybitmap which Python imports.  The caller has the GIL.
 * -1 with an exception. */
static inline int pybitmap_import(void)
{
    const void *table = NULL;
    PyObject *module = PyImport_ImportModule("pybitmap.native");
    PyObject *object;

    if (!module) {
        return -1;
    }
#ifdef PYPY_VERSION
    object = PyObject_CallMethod(module, "table", NULL);
    if (object) {
        table = PyLong_AsVoidPtr(object);
    }
#else
    object = PyObject_GetAttrString(module, "_C_API");
    if (object) {
        table = PyCapsule_GetPointer(object, "pybitmap.native._C_API");
    }
#endif
    Py_XDECREF(object);
    Py_DECREF(module);
    if (!table) {
        return -1;
    }
    if (pybitmap_use(table)) {
        const struct pybitmap_api *api = (const struct pybitmap_api *)table;

        PyErr_Format(PyExc_ImportError,
                     "this module was compiled for version %u of pybitmap's C interface with "
                     "%u bytes of functions, and the pybitmap that is installed has version %u "
                     "with %u: compile the module again, or install the pybitmap that it was "
                     "compiled with",
                     (unsigned)PYBITMAP_API_VERSION, (unsigned)sizeof(*api),
                     (unsigned)api->version, (unsigned)api->size);
        return -1;
    }
    return 0;
}

#endif
#endif

#define hbitmap_thread_init (pybitmap_core->hbitmap_thread_init)
#define hbitmap_torn (pybitmap_core->hbitmap_torn)
#define hbitmap_alloc (pybitmap_core->hbitmap_alloc)
#define hbitmap_alloc_on (pybitmap_core->hbitmap_alloc_on)
#define hbitmap_free (pybitmap_core->hbitmap_free)
#define hbitmap_truncate (pybitmap_core->hbitmap_truncate)
#define hbitmap_pin (pybitmap_core->hbitmap_pin)
#define hbitmap_unpin (pybitmap_core->hbitmap_unpin)
#define hbitmap_pin_into (pybitmap_core->hbitmap_pin_into)
#define hbitmap_drop_pin (pybitmap_core->hbitmap_drop_pin)
#define hbitmap_set (pybitmap_core->hbitmap_set)
#define hbitmap_set_many (pybitmap_core->hbitmap_set_many)
#define hbitmap_reset (pybitmap_core->hbitmap_reset)
#define hbitmap_reset_all (pybitmap_core->hbitmap_reset_all)
#define hbitmap_take (pybitmap_core->hbitmap_take)
#define hbitmap_size (pybitmap_core->hbitmap_size)
#define hbitmap_granularity (pybitmap_core->hbitmap_granularity)
#define hbitmap_get (pybitmap_core->hbitmap_get)
#define hbitmap_empty (pybitmap_core->hbitmap_empty)
#define hbitmap_count (pybitmap_core->hbitmap_count)
#define hbitmap_count_range (pybitmap_core->hbitmap_count_range)
#define hbitmap_nonzero_words (pybitmap_core->hbitmap_nonzero_words)
#define hbitmap_words (pybitmap_core->hbitmap_words)
#define hbitmap_equal (pybitmap_core->hbitmap_equal)
#define hbitmap_is_subset (pybitmap_core->hbitmap_is_subset)
#define hbitmap_is_disjoint (pybitmap_core->hbitmap_is_disjoint)
#define hbitmap_iter_init (pybitmap_core->hbitmap_iter_init)
#define hbitmap_iter_next (pybitmap_core->hbitmap_iter_next)
#define hbitmap_iter_fill (pybitmap_core->hbitmap_iter_fill)
#define hbitmap_next_dirty (pybitmap_core->hbitmap_next_dirty)
#define hbitmap_next_zero (pybitmap_core->hbitmap_next_zero)
#define hbitmap_next_dirty_area (pybitmap_core->hbitmap_next_dirty_area)
#define hbitmap_status (pybitmap_core->hbitmap_status)
#define hbitmap_areas (pybitmap_core->hbitmap_areas)
#define hbitmap_count_areas (pybitmap_core->hbitmap_count_areas)
#define hbitmap_merge (pybitmap_core->hbitmap_merge)
#define hbitmap_union (pybitmap_core->hbitmap_union)
#define hbitmap_and (pybitmap_core->hbitmap_and)
#define hbitmap_andnot (pybitmap_core->hbitmap_andnot)
#define hbitmap_xor (pybitmap_core->hbitmap_xor)
#define hbitmap_drain (pybitmap_core->hbitmap_drain)
#define hbitmap_drain_fresh (pybitmap_core->hbitmap_drain_fresh)
#define hbitmap_put_back (pybitmap_core->hbitmap_put_back)
#define hbitmap_is_serializable (pybitmap_core->hbitmap_is_serializable)
#define hbitmap_serialization_align (pybitmap_core->hbitmap_serialization_align)
#define hbitmap_serialization_size (pybitmap_core->hbitmap_serialization_size)
#define hbitmap_serialize_part (pybitmap_core->hbitmap_serialize_part)
#define hbitmap_deserialize_part (pybitmap_core->hbitmap_deserialize_part)
#define hbitmap_deserialize_zeroes (pybitmap_core->hbitmap_deserialize_zeroes)
#define hbitmap_deserialize_ones (pybitmap_core->hbitmap_deserialize_ones)
#define hbitmap_deserialize_finish (pybitmap_core->hbitmap_deserialize_finish)
#define hbitmap_check (pybitmap_core->hbitmap_check)
#define hbtracker_alloc (pybitmap_core->hbtracker_alloc)
#define hbtracker_free (pybitmap_core->hbtracker_free)
#define hbtracker_set_alloc (pybitmap_core->hbtracker_set_alloc)
#define hbtracker_set_free (pybitmap_core->hbtracker_set_free)
#define hbtracker_sets_free (pybitmap_core->hbtracker_sets_free)
#define hbtracker_publish (pybitmap_core->hbtracker_publish)
#define hbtracker_publish_all (pybitmap_core->hbtracker_publish_all)
#define hbtracker_mark (pybitmap_core->hbtracker_mark)
#define hbtracker_try_mark (pybitmap_core->hbtracker_try_mark)
#define hbtracker_wait (pybitmap_core->hbtracker_wait)
#define hbtracker_mark_many (pybitmap_core->hbtracker_mark_many)
#define hbtracker_try_mark_many (pybitmap_core->hbtracker_try_mark_many)
#define hbtracker_begin_write (pybitmap_core->hbtracker_begin_write)
#define hbtracker_end_write (pybitmap_core->hbtracker_end_write)
#define hbtracker_try_begin_write (pybitmap_core->hbtracker_try_begin_write)
#define hbtracker_try_end_write (pybitmap_core->hbtracker_try_end_write)
#define hbtracker_drop_write (pybitmap_core->hbtracker_drop_write)
#define hbitmap_merge_bits (pybitmap_core->hbitmap_merge_bits)
#define hbitmap_flip (pybitmap_core->hbitmap_flip)
#define hbitmap_rank (pybitmap_core->hbitmap_rank)
#define hbitmap_select (pybitmap_core->hbitmap_select)
#define hbitmap_intersection_count (pybitmap_core->hbitmap_intersection_count)
#define hbitmap_union_count (pybitmap_core->hbitmap_union_count)
#define hbitmap_difference_count (pybitmap_core->hbitmap_difference_count)
#define hbitmap_symmetric_difference_count (pybitmap_core->hbitmap_symmetric_difference_count)
#define hbitmap_prev_dirty (pybitmap_core->hbitmap_prev_dirty)
#define hbitmap_copy_areas (pybitmap_core->hbitmap_copy_areas)
#define hbitmap_intersection (pybitmap_core->hbitmap_intersection)
#define hbitmap_difference (pybitmap_core->hbitmap_difference)
#define hbitmap_symmetric_difference (pybitmap_core->hbitmap_symmetric_difference)
#define hbitmap_try_take (pybitmap_core->hbitmap_try_take)

#endif
