/* SPDX-License-Identifier: MIT */
/*
 * _fast: the calls that are made by the million, without cffi's price.
 *
 * A cffi call releases the GIL and keeps errno, and a Python function stands
 * around it: together some ten times what a mark takes.  Here are base
 * classes for HBitmap and BlockNode which hold the C object's address and call
 * C at once, the GIL held:
 *
 *     Base       set, get, in
 *     NodeBase   mark_dirty
 *
 * They do nothing but the plain case: exact ints that fit, by position, a
 * range that takes about a microsecond at most, a call that succeeds.
 * Everything else goes to the method of the same name with _cffi_ before it,
 * which pybitmap/_entry.py has put into the class: that one knows every
 * argument, words every error, and releases the GIL.  So there is one source
 * of errors, and whoever holds the GIL here never waits: hbtracker_try_mark
 * says -EAGAIN where hbtracker_mark would wait.
 *
 * Nothing of csrc is linked in.  bind() takes the addresses that cffi has, so
 * there is one copy of the code and of its threads' slots.
 *
 * The module is optional: absent on PyPy, where there is no GIL, and where it does
 * not build; PYBITMAP_PURE_CFFI=1 leaves it aside.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>

#include "hbitmap.h"
#include "tracker.h"

/* What takes longer than about a microsecond releases the GIL: in groups, and
 * for a node, whose bitmaps have granularity 9 at least, in bytes. */
enum { MANY_GROUPS = 1 << 16, MANY_BYTES = 1 << 20 };

/* The same in every interpreter of the process, as cffi's library is loaded
 * once; hence no state of the module. */
static struct {
    __typeof__(hbitmap_set) *set;
    __typeof__(hbitmap_get) *get;
    __typeof__(hbitmap_granularity) *granularity;
    __typeof__(hbtracker_try_mark) *try_mark;
} core;

/* ---- what both classes are ---------------------------------------------- */

/* Without an address: __init__ did not come so far.  The address is valid while
 * the owner lives, so they come and go together. */
struct entry {
    PyObject_HEAD
    void *address;
    PyObject *owner;
};

static void *address_of(PyObject *self)
{
    return ((struct entry *)self)->address;
}

static PyObject *entry_attach(PyObject *self, PyObject *args)
{
    struct entry *entry = (struct entry *)self;
    PyObject *number, *owner;
    void *address;

    if (!PyArg_ParseTuple(args, "OO:_attach", &number, &owner)) {
        return NULL;
    }
    address = PyLong_AsVoidPtr(number);
    if (!address && PyErr_Occurred()) {
        return NULL;
    }
    if (entry->owner) {
        PyErr_SetString(PyExc_TypeError, "it is initialised once");
        return NULL;
    }
    Py_INCREF(owner);
    entry->owner = owner;
    entry->address = address;
    Py_RETURN_NONE;
}

static int entry_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((struct entry *)self)->owner);
    return 0;
}

static int entry_clear(PyObject *self)
{
    ((struct entry *)self)->address = NULL;
    Py_CLEAR(((struct entry *)self)->owner);
    return 0;
}

static void entry_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);

    PyObject_GC_UnTrack(self);
    (void)entry_clear(self);
    free_object(self);
    Py_DECREF(type);
}

/* ---- the other path ----------------------------------------------------- */

/* self.NAME(*args, **kwargs), the arguments as METH_FASTCALL gives them. */
static PyObject *by_cffi(PyObject *self, const char *name, PyObject *const *args,
                         Py_ssize_t nargs, PyObject *names)
{
    Py_ssize_t nnamed = names ? PyTuple_Size(names) : 0;
    PyObject *result = NULL, *named = NULL;
    PyObject *method = PyObject_GetAttrString(self, name);
    PyObject *positional = PyTuple_New(nargs);

    if (!method || !positional) {
        goto out;
    }
    for (Py_ssize_t i = 0; i < nargs; i++) {
        Py_INCREF(args[i]);
        if (PyTuple_SetItem(positional, i, args[i]) < 0) {
            goto out;
        }
    }
    if (nnamed) {
        named = PyDict_New();
        for (Py_ssize_t i = 0; named && i < nnamed; i++) {
            if (PyDict_SetItem(named, PyTuple_GetItem(names, i), args[nargs + i]) < 0) {
                Py_CLEAR(named);
            }
        }
        if (!named) {
            goto out;
        }
    }
    result = PyObject_Call(method, positional, named);
out:
    Py_XDECREF(method);
    Py_XDECREF(positional);
    Py_XDECREF(named);
    return result;
}

/* An exact int, at least 0 and less than 2^63; false for everything else, and
 * never an error. */
static inline bool plain(PyObject *object, uint64_t *value)
{
    long long number;
    int overflow;

    if (!PyLong_CheckExact(object)) {
        return false;
    }
    number = PyLong_AsLongLongAndOverflow(object, &overflow);
    *value = (uint64_t)number;
    return number >= 0 && !overflow;
}

/* ---- Base ----------------------------------------------------------------- */

static PyObject *base_set(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *names)
{
    HBitmap *hb = address_of(self);
    uint64_t start, count = 1;

    if (hb && !names && (nargs == 2 || nargs == 1) && plain(args[0], &start) &&
        (nargs == 1 || plain(args[1], &count)) &&
        (count <= MANY_GROUPS || count >> core.granularity(hb) <= MANY_GROUPS) &&
        core.set(hb, start, count) == 0) {
        Py_RETURN_NONE;
    }
    return by_cffi(self, "_cffi_set", args, nargs, names);
}

static PyObject *base_get(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *names)
{
    const HBitmap *hb = address_of(self);
    uint64_t item;

    if (hb && !names && nargs == 1 && plain(args[0], &item)) {
        return PyBool_FromLong(core.get(hb, item));
    }
    return by_cffi(self, "_cffi_get", args, nargs, names);
}

static int base_contains(PyObject *self, PyObject *object)
{
    const HBitmap *hb = address_of(self);
    PyObject *answer;
    uint64_t item;
    int found;

    if (hb && plain(object, &item)) {
        return core.get(hb, item);
    }
    answer = by_cffi(self, "_cffi_contains", &object, 1, NULL);
    found = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    return found;
}

#define FASTCALL(function) \
    (PyCFunction)(void (*)(void))function, METH_FASTCALL | METH_KEYWORDS

static PyMethodDef base_methods[] = {
    { "set", FASTCALL(base_set), PyDoc_STR(
        "set($self, /, start, count=1)\n--\n\n"
        "Mark every group that the ``count`` items from ``start`` on touch; 0 marks nothing.\n\n"
        ":raises RangeError: (a ValueError) if the range is not inside the bitmap") },
    { "get", FASTCALL(base_get), PyDoc_STR(
        "get($self, /, item)\n--\n\n"
        "Is the group of ``item`` dirty? Beyond the end of the bitmap: False.\n\n"
        ":raises RangeError: if ``item`` is negative") },
    { "_attach", entry_attach, METH_VARARGS, NULL },
    { 0 },
};

static PyType_Slot base_slots[] = {
    { Py_tp_methods, base_methods },
    { Py_sq_contains, base_contains },
    { Py_tp_traverse, entry_traverse },
    { Py_tp_clear, entry_clear },
    { Py_tp_dealloc, entry_dealloc },
    { 0 },
};

/* ---- NodeBase ------------------------------------------------------------- */

static PyObject *node_mark_dirty(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                 PyObject *names)
{
    HBTracker *tracker = address_of(self);
    uint64_t offset, length;

    if (tracker && !names && nargs == 2 && plain(args[0], &offset) &&
        plain(args[1], &length) && length <= MANY_BYTES &&
        core.try_mark(tracker, offset, length) == 0) {
        Py_RETURN_NONE;
    }
    return by_cffi(self, "_cffi_mark_dirty", args, nargs, names);
}

static PyMethodDef node_methods[] = {
    { "mark_dirty", FASTCALL(node_mark_dirty), PyDoc_STR(
        "mark_dirty($self, /, offset, length)\n--\n\n"
        "A write: mark it in every bitmap that records.\n\n"
        ":raises RangeError: if it is not inside the node\n"
        ":raises ReadonlyError: if the node is read-only, or a bitmap of it must not change\n"
        ":raises ClosedError: if the node is closed") },
    { "_attach", entry_attach, METH_VARARGS, NULL },
    { 0 },
};

static PyType_Slot node_slots[] = {
    { Py_tp_methods, node_methods },
    { Py_tp_traverse, entry_traverse },
    { Py_tp_clear, entry_clear },
    { Py_tp_dealloc, entry_dealloc },
    { 0 },
};

/* ---- the module --------------------------------------------------------- */

static PyObject *fast_bind(PyObject *module, PyObject *args)
{
    void *addresses[4];
    PyObject *numbers[4];

    (void)module;
    if (!PyArg_ParseTuple(args, "OOOO:bind", &numbers[0], &numbers[1], &numbers[2],
                          &numbers[3])) {
        return NULL;
    }
    for (int i = 0; i < 4; i++) {
        addresses[i] = PyLong_AsVoidPtr(numbers[i]);
        if (!addresses[i]) {
            if (!PyErr_Occurred()) {
                PyErr_SetString(PyExc_ValueError, "a function at address 0");
            }
            return NULL;
        }
    }
    core.set = (__typeof__(core.set))addresses[0];
    core.get = (__typeof__(core.get))addresses[1];
    core.granularity = (__typeof__(core.granularity))addresses[2];
    core.try_mark = (__typeof__(core.try_mark))addresses[3];
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    { "bind", fast_bind, METH_VARARGS, PyDoc_STR(
        "bind(hbitmap_set, hbitmap_get, hbitmap_granularity, hbtracker_try_mark)\n--\n\n"
        "The addresses of the functions; before the first object is made.") },
    { 0 },
};

static int add_type(PyObject *module, const char *name, const char *full_name,
                    PyType_Slot *slots)
{
    PyType_Spec spec = {
        .name = full_name,
        .basicsize = sizeof(struct entry),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
        .slots = slots,
    };
    PyObject *type = PyType_FromSpec(&spec);

    if (!type || PyModule_AddObject(module, name, type) < 0) {
        Py_XDECREF(type);
        return -1;
    }
    return 0;
}

static int fast_exec(PyObject *module)
{
#ifdef Py_LIMITED_API
    /* METH_FASTCALL is in the limited API from 3.10 on; but 3.9 would load this
     * file as well, from the one wheel that there is for all of them. */
    const char *version = Py_GetVersion();

    if (strtol(version, NULL, 10) == 3 && strtol(version + 2, NULL, 10) < 10) {
        PyErr_SetString(PyExc_ImportError, "built for Python 3.10 and later");
        return -1;
    }
#endif
    if (add_type(module, "Base", "pybitmap._fast.Base", base_slots) < 0 ||
        add_type(module, "NodeBase", "pybitmap._fast.NodeBase", node_slots) < 0) {
        return -1;
    }
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    { Py_mod_exec, fast_exec },
    { 0 },
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "pybitmap._fast",
    .m_methods = module_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__fast(void)
{
    return PyModuleDef_Init(&module_def);
}
