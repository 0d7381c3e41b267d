/* SPDX-License-Identifier: MIT */
/*
 * The end of the capsule that a stream of arrow.h travels in.  For the compiled module of
 * CPython alone, which has Python.h; PyPy has no capsules.
 */
#ifndef PYBITMAP_CAPSULE_H
#define PYBITMAP_CAPSULE_H

#include <stdint.h>

#include "arrow.h"

/* cdef: begin */

/* Of PyCapsule_New, in this order: the name, and the address of the destructor. */
const char *hbarrow_capsule_name(void);
uintptr_t hbarrow_capsule_destructor(void);

/* cdef: end */

#ifdef PYPY_VERSION

const char *hbarrow_capsule_name(void)
{
    return NULL;
}

uintptr_t hbarrow_capsule_destructor(void)
{
    return 0;
}

#else

const char *hbarrow_capsule_name(void)
{
    return "arrow_array_stream";
}

static void hb_drop_capsule(PyObject *capsule)
{
    hbarrow_free(PyCapsule_GetPointer(capsule, hbarrow_capsule_name()));
}

uintptr_t hbarrow_capsule_destructor(void)
{
    return (uintptr_t)hb_drop_capsule;
}

#endif

#endif
