/* SPDX-License-Identifier: MIT */
/*
 * _fast: the calls that are made by the million, without cffi's price.
 *
 * A cffi call releases the GIL and keeps errno, and a Python function stands
 * around it: together some ten times what a mark takes.  Here are base
 * classes for HBitmap and BlockNode which hold the C object's address and call
 * C at once, the GIL held:
 *
 *     Base       set, add, discard, remove, get, in; iteration, for the same reason
 *     NodeBase   mark_dirty
 *
 * and four things that Python lacks: bytes for somebody to fill; an owner of C
 * memory whose end no signal handler can interrupt, as it can any finalizer that
 * is written in Python; a context manager whose lock is released likewise; and a
 * generator that can say how much it still has.
 *
 * They do nothing but the plain case: exact ints that fit, by position, a
 * range that takes about a microsecond at most, a call that succeeds.
 * Everything else goes to the method of the same name with _cffi_ before it,
 * which pybitmap/_entry.py has put into the class: that one knows every
 * argument, words every error, and releases the GIL.  So there is one source
 * of errors, and whoever holds the GIL here never waits for a lock:
 * hbtracker_try_mark and hbitmap_try_take say -EAGAIN where the others would wait.
 *
 * Nothing of csrc is linked in.  bind() takes the addresses that cffi has, so
 * there is one copy of the code and of its threads' slots.
 *
 * The module is optional: absent on PyPy, where there is no GIL, and where it does
 * not build; PYBITMAP_PURE_CFFI=1 leaves it aside.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "hbitmap.h"
#include "tracker.h"

/* What takes longer than about a microsecond releases the GIL: in groups, and
 * for a node, whose bitmaps have granularity 9 at least, in bytes. */
enum { MANY_GROUPS = 1 << 16, MANY_BYTES = 1 << 20 };

/* What an iterator fetches at a time, at first and at most; not more for the
 * same reason. */
enum { FIRST_BATCH = 8, BATCH = 64 };

/* The same in every interpreter of the process, as cffi's library is loaded
 * once. */
static __typeof__(hbitmap_set) *core_set;
static __typeof__(hbitmap_get) *core_get;
static __typeof__(hbitmap_try_take) *core_try_take;
static __typeof__(hbitmap_granularity) *core_granularity;
static __typeof__(hbitmap_iter_init) *core_iter_init;
static __typeof__(hbitmap_iter_fill) *core_iter_fill;
static __typeof__(hbtracker_try_mark) *core_try_mark;

/* In the child of a fork that has torn a bitmap: Base's calls all go by cffi, where
 * that is found out. */
static bool aside;

/* What each interpreter has for itself. */
struct state {
    PyObject *items_type;
};

/* ---- what both classes are ---------------------------------------------- */

/* Without an address: __init__ did not come so far.  The address is valid while
 * the owner lives, so they come and go together. */
struct entry {
    PyObject_HEAD
    void *address;
    PyObject *owner;
    unsigned long long clears;  /* of a bitmap: calls that may have cleared bits */
};

static void *address_of(PyObject *self)
{
    return ((struct entry *)self)->address;
}

/* NULL: it has none, or is to go by cffi. */
static void *bitmap_of(PyObject *self)
{
    return aside ? NULL : address_of(self);
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

/* ---- Items ---------------------------------------------------------------- */

/* An iterator over the starts of dirty groups; what it holds may be used as long
 * as the bitmap, and is dropped with it. */
struct items {
    PyObject_HEAD
    PyObject *bitmap;           /* NULL: it has come to the end */
    HBitmapIter hbi;
    unsigned long long first;   /* the item it was to begin with, */
    Py_ssize_t given;           /* and how many it has given */
    unsigned long long clears;  /* the bitmap's when the batch was fetched */
    size_t next, end;           /* of the batch */
    size_t batch;               /* what to fetch */
    bool last;                  /* nothing comes after this batch */
    uint64_t batch_items[BATCH];
};

static PyObject *items_next(PyObject *self)
{
    struct items *items = (struct items *)self;
    const struct entry *bitmap = (struct entry *)items->bitmap;

    if (!bitmap || !bitmap->address) {
        return NULL;
    }
    if (aside) {
        PyObject *hb = PyObject_GetAttrString(items->bitmap, "_hb");

        if (!hb) {
            return NULL;
        }
        Py_DECREF(hb);
    }
    if (items->next < items->end && items->clears != bitmap->clears) {
        /* The rest of the batch may not be dirty any more.  Small steps from
         * here on: whoever clears what they get will do so again. */
        core_iter_init(&items->hbi, bitmap->address, items->batch_items[items->next]);
        items->next = items->end;
        items->last = false;
        items->batch = 1;
    }
    if (items->next == items->end && !items->last) {
        items->clears = bitmap->clears;
        items->next = 0;
        items->end = core_iter_fill(&items->hbi, items->batch_items, items->batch);
        items->last = items->end < items->batch;
        items->batch = items->batch < BATCH ? 2 * items->batch : BATCH;
    }
    if (items->next == items->end) {
        Py_CLEAR(items->bitmap);
        return NULL;
    }
    items->given++;
    /* The quickest of them, and wide enough: the core is for 64 bits. */
    return PyLong_FromLong((long)items->batch_items[items->next++]);
}

/* What `total` says, without those that were given.  Steals it; NULL: an error. */
static PyObject *rest_of(PyObject *total, Py_ssize_t given)
{
    Py_ssize_t rest;

    if (!total) {
        return NULL;
    }
    rest = PyLong_AsSsize_t(total);
    Py_DECREF(total);
    if (rest == -1 && PyErr_Occurred()) {
        return NULL;
    }
    return PyLong_FromSsize_t(rest > given ? rest - given : 0);
}

static PyObject *items_length_hint(PyObject *self, PyObject *unused)
{
    struct items *items = (struct items *)self;
    PyObject *bitmap = items->bitmap, *total;

    (void)unused;
    if (!bitmap) {
        return PyLong_FromLong(0);
    }
    Py_INCREF(bitmap);      /* this releases the GIL */
    total = PyObject_CallMethod(bitmap, "_groups_from", "K", items->first);
    Py_DECREF(bitmap);
    return rest_of(total, items->given);
}

static int items_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((struct items *)self)->bitmap);
    return 0;
}

static int items_clear(PyObject *self)
{
    Py_CLEAR(((struct items *)self)->bitmap);
    return 0;
}

static void items_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    PyObject_GC_UnTrack(self);
    (void)items_clear(self);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

/* 3.9 has no flag for it. */
static PyObject *items_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)args;
    (void)kwargs;
    PyErr_Format(PyExc_TypeError, "%R is made by iter() only", type);
    return NULL;
}

static PyMethodDef items_methods[] = {
    { "__length_hint__", items_length_hint, METH_NOARGS, NULL },
    { 0 },
};

static PyType_Slot items_slots[] = {
    { Py_tp_new, items_new },
    { Py_tp_methods, items_methods },
    { Py_tp_iter, PyObject_SelfIter },
    { Py_tp_iternext, items_next },
    { Py_tp_traverse, items_traverse },
    { Py_tp_clear, items_clear },
    { Py_tp_dealloc, items_dealloc },
    { 0 },
};

/* ---- an iterator that can say how much it still has ----------------------- */

struct hinted {
    PyObject_HEAD
    PyObject *iterator;         /* NULL: it has come to the end */
    PyObject *hint;
    Py_ssize_t given;
};

static PyObject *hinted_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PyObject *iterator, *hint;
    struct hinted *hinted;

    (void)kwargs;
    if (!PyArg_ParseTuple(args, "OO:Hinted", &iterator, &hint)) {
        return NULL;
    }
    if (!PyIter_Check(iterator)) {
        PyErr_SetString(PyExc_TypeError, "an iterator and a function");
        return NULL;
    }
    hinted = (struct hinted *)alloc(type, 0);
    if (hinted) {
        Py_INCREF(iterator);
        hinted->iterator = iterator;
        Py_INCREF(hint);
        hinted->hint = hint;
    }
    return (PyObject *)hinted;
}

static int hinted_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((struct hinted *)self)->iterator);
    Py_VISIT(((struct hinted *)self)->hint);
    return 0;
}

static int hinted_clear(PyObject *self)
{
    Py_CLEAR(((struct hinted *)self)->iterator);
    Py_CLEAR(((struct hinted *)self)->hint);
    return 0;
}

static void hinted_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);

    PyObject_GC_UnTrack(self);
    (void)hinted_clear(self);
    free_object(self);
    Py_DECREF(type);
}

static PyObject *hinted_next(PyObject *self)
{
    struct hinted *hinted = (struct hinted *)self;
    PyObject *iterator = hinted->iterator, *item;

    if (!iterator) {
        return NULL;
    }
    Py_INCREF(iterator);        /* another thread may come to the end meanwhile */
    item = PyIter_Next(iterator);
    Py_DECREF(iterator);
    if (item) {
        hinted->given++;
    } else if (!PyErr_Occurred()) {
        (void)hinted_clear(self);
    }
    return item;
}

static PyObject *hinted_length_hint(PyObject *self, PyObject *unused)
{
    struct hinted *hinted = (struct hinted *)self;
    PyObject *hint = hinted->hint, *total;

    (void)unused;
    if (!hint) {
        return PyLong_FromLong(0);
    }
    Py_INCREF(hint);
    total = PyObject_CallNoArgs(hint);
    Py_DECREF(hint);
    return rest_of(total, hinted->given);
}

static PyMethodDef hinted_methods[] = {
    { "__length_hint__", hinted_length_hint, METH_NOARGS, NULL },
    { 0 },
};

static PyType_Slot hinted_slots[] = {
    { Py_tp_doc, (void *)PyDoc_STR(
        "Hinted(iterator, hint, /)\n--\n\nSee pybitmap.hbitmap.PythonHinted.") },
    { Py_tp_new, hinted_new },
    { Py_tp_methods, hinted_methods },
    { Py_tp_iter, PyObject_SelfIter },
    { Py_tp_iternext, hinted_next },
    { Py_tp_traverse, hinted_traverse },
    { Py_tp_clear, hinted_clear },
    { Py_tp_dealloc, hinted_dealloc },
    { 0 },
};

/* ---- Base ----------------------------------------------------------------- */

#define FASTCALL(function) \
    (PyCFunction)(void (*)(void))function, METH_FASTCALL | METH_KEYWORDS

static PyObject *base_set(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *names)
{
    HBitmap *hb = bitmap_of(self);
    uint64_t start, count = 1;

    if (hb && !names && (nargs == 2 || nargs == 1) && plain(args[0], &start) &&
        (nargs == 1 || plain(args[1], &count)) &&
        (count <= MANY_GROUPS || count >> core_granularity(hb) <= MANY_GROUPS) &&
        core_set(hb, start, count) == 0) {
        Py_RETURN_NONE;
    }
    return by_cffi(self, "_cffi_set", args, nargs, names);
}

static PyObject *base_add(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *names)
{
    HBitmap *hb = bitmap_of(self);
    uint64_t item;

    if (hb && !names && nargs == 1 && plain(args[0], &item) && core_set(hb, item, 1) == 0) {
        Py_RETURN_NONE;
    }
    return by_cffi(self, "_cffi_add", args, nargs, names);
}

/* 1: the group of args[0] was dirty, and is clean now; 0: it is clean; -1: by cffi. */
static int take(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    HBitmap *hb = bitmap_of(self);
    uint64_t item;
    int taken;

    if (!hb || names || nargs != 1 || !plain(args[0], &item)) {
        return -1;
    }
    if (!core_get(hb, item)) {
        return 0;
    }
    taken = core_try_take(hb, item);
    if (taken > 0) {
        ((struct entry *)self)->clears++;
    }
    return taken < 0 ? -1 : taken;
}

static PyObject *base_discard(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *names)
{
    if (take(self, args, nargs, names) >= 0) {
        Py_RETURN_NONE;
    }
    return by_cffi(self, "_cffi_discard", args, nargs, names);
}

static PyObject *base_remove(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *names)
{
    if (take(self, args, nargs, names) > 0) {
        Py_RETURN_NONE;
    }
    return by_cffi(self, "_cffi_remove", args, nargs, names);
}

static PyObject *base_get(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *names)
{
    const HBitmap *hb = bitmap_of(self);
    uint64_t item;

    if (hb && !names && nargs == 1 && plain(args[0], &item)) {
        return PyBool_FromLong(core_get(hb, item));
    }
    return by_cffi(self, "_cffi_get", args, nargs, names);
}

static int base_contains(PyObject *self, PyObject *object)
{
    const HBitmap *hb = bitmap_of(self);
    PyObject *answer;
    uint64_t item;
    int found;

    if (hb && plain(object, &item)) {
        return core_get(hb, item);
    }
    answer = by_cffi(self, "_cffi_contains", &object, 1, NULL);
    found = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    return found;
}

static PyObject *base_items(PyObject *self, PyTypeObject *defining_class,
                            PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    struct state *state = PyType_GetModuleState(defining_class);
    const HBitmap *hb = bitmap_of(self);
    struct items *items;
    uint64_t first;

    if (!state || !hb || names || nargs != 1 || !plain(args[0], &first)) {
        return by_cffi(self, "_cffi_items", args, nargs, names);
    }
    items = PyObject_GC_New(struct items, (PyTypeObject *)state->items_type);
    if (!items) {
        return NULL;
    }
    Py_INCREF(self);
    items->bitmap = self;
    core_iter_init(&items->hbi, hb, first);
    items->first = first;
    items->given = 0;
    items->next = items->end = 0;
    items->batch = FIRST_BATCH;
    items->last = false;
    PyObject_GC_Track((PyObject *)items);
    return (PyObject *)items;
}

static PyMethodDef base_methods[] = {
    { "set", FASTCALL(base_set), PyDoc_STR(
        "set($self, /, start, count=1)\n--\n\n"
        "Mark every group that the ``count`` items from ``start`` on touch; 0 marks nothing.\n\n"
        ":raises RangeError: (a ValueError) if the range is not inside the bitmap\n\n"
        ">>> hb = HBitmap(100, group_size=8)\n"
        ">>> hb.set(15, 10)                        # touches two groups\n"
        ">>> list(hb.areas())\n"
        "[(8, 24)]") },
    { "add", FASTCALL(base_add), PyDoc_STR(
        "add($self, /, item)\n--\n\n"
        "Mark the group of ``item``.\n\n"
        ":raises RangeError: if it is not inside the bitmap\n\n"
        ">>> hb = HBitmap(100)\n"
        ">>> hb.add(7)\n"
        ">>> list(hb)\n"
        "[7]") },
    { "discard", FASTCALL(base_discard), PyDoc_STR(
        "discard($self, /, item)\n--\n\n"
        "Clean the group of ``item``; whatever is no item of a dirty group is ignored.\n\n"
        ">>> hb = HBitmap(100)\n"
        ">>> hb.add(7)\n"
        ">>> hb.discard(7); hb.discard(\"no item\")\n"
        ">>> len(hb)\n"
        "0") },
    { "remove", FASTCALL(base_remove), PyDoc_STR(
        "remove($self, /, item)\n--\n\n"
        "Clean the group of ``item``.\n\n"
        ":raises KeyError: if it is no item of a dirty group\n\n"
        ">>> hb = HBitmap(100)\n"
        ">>> hb.add(7)\n"
        ">>> hb.remove(7)\n"
        ">>> hb.remove(7)\n"
        "Traceback (most recent call last):\n"
        "KeyError: 7") },
    { "get", FASTCALL(base_get), PyDoc_STR(
        "get($self, /, item)\n--\n\n"
        "Is the group of ``item`` dirty? Beyond the end of the bitmap: False.\n\n"
        ":raises RangeError: if ``item`` is negative\n\n"
        ">>> hb = HBitmap(100, group_size=8)\n"
        ">>> hb.set(15)\n"
        ">>> hb.get(12), hb.get(16), hb.get(1000)\n"
        "(True, False, False)") },
    { "_items", (PyCFunction)(void (*)(void))base_items,
        METH_METHOD | METH_FASTCALL | METH_KEYWORDS, PyDoc_STR(
        "_items($self, first, /)\n--\n\nFor iter(): ``first`` is what C takes.") },
    { "_attach", entry_attach, METH_VARARGS, NULL },
    { 0 },
};

static PyMemberDef base_members[] = {
    { "_clears", T_ULONGLONG, offsetof(struct entry, clears), 0, NULL },
    { 0 },
};

static PyType_Slot base_slots[] = {
    { Py_tp_methods, base_methods },
    { Py_tp_members, base_members },
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
        core_try_mark(tracker, offset, length) == 0) {
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
        ":raises ClosedError: if the node is closed\n"
        ":raises StateError: where it would have to wait for the thread that calls it, which is\n"
        "    truncating or closing the node, and has come here by a callback or a signal handler\n\n"
        ">>> from pybitmap import BlockGraph\n"
        ">>> node = BlockGraph().add_node(\"disk\", size=1 << 20)\n"
        ">>> daily = node.add_bitmap(\"daily\", granularity=4096)\n"
        ">>> node.mark_dirty(5000, 512)\n"
        ">>> list(daily.areas())\n"
        "[(4096, 4096)]") },
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

/* ---- an owner of C memory ------------------------------------------------ */

/*
 * Not known to the cycle collector, so it goes with the last reference, after all
 * finalizers of a cycle that refers to it: these may still use the memory.
 */
struct owner {
    PyObject_HEAD
    void *address;
    void (*let_go)(void *);
    PyObject *keep;             /* goes after the memory */
};

static PyObject *owner_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PyObject *address, *let_go, *keep = Py_None;
    struct owner *owner;

    (void)kwargs;
    if (!PyArg_ParseTuple(args, "OO|O:Owner", &address, &let_go, &keep)) {
        return NULL;
    }
    owner = (struct owner *)alloc(type, 0);
    if (owner) {
        owner->address = PyLong_AsVoidPtr(address);
        owner->let_go = (void (*)(void *))PyLong_AsVoidPtr(let_go);
        Py_INCREF(keep);
        owner->keep = keep;
        if (PyErr_Occurred()) {
            owner->let_go = NULL;
            Py_DECREF(owner);
            return NULL;
        }
    }
    return (PyObject *)owner;
}

static void owner_dealloc(PyObject *self)
{
    struct owner *owner = (struct owner *)self;
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);

    if (owner->let_go) {
        Py_BEGIN_ALLOW_THREADS      /* large bitmaps take their time */
        owner->let_go(owner->address);
        Py_END_ALLOW_THREADS
    }
    Py_XDECREF(owner->keep);
    free_object(self);
    Py_DECREF(type);
}

static PyType_Slot owner_slots[] = {
    { Py_tp_doc, (void *)PyDoc_STR(
        "Owner(address, let_go, keep=None, /)\n--\n\n"
        "Calls the C function at let_go with the address when nothing refers to this any more.") },
    { Py_tp_new, owner_new },
    { Py_tp_dealloc, owner_dealloc },
    { 0 },
};

/* ---- a context manager --------------------------------------------------- */

/*
 * With `_lock`, if it is not None, held from before _entered(nested) until after
 * _leaving(kind, error, traceback); nested: this thread had it before.  Methods
 * of Python can be interrupted before their first line, by what a signal handler
 * raises; so where _leaving raises, _interrupted() is called as well, which
 * brings to its end what was left.
 */
struct guard {
    PyObject_HEAD
    PyObject *lock;
    PyObject *release;          /* of it: to look that up later may lack memory */
};

static int guard_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((struct guard *)self)->lock);
    Py_VISIT(((struct guard *)self)->release);
    return 0;
}

static int guard_clear(PyObject *self)
{
    Py_CLEAR(((struct guard *)self)->lock);
    Py_CLEAR(((struct guard *)self)->release);
    return 0;
}

static void guard_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);

    PyObject_GC_UnTrack(self);
    (void)guard_clear(self);
    free_object(self);
    Py_DECREF(type);
}

/* Calls what takes no arguments for what it does; what it raises is dropped. */
static void call_quietly(PyObject *function)
{
    PyObject *kind, *error, *traceback;

    PyErr_Fetch(&kind, &error, &traceback);
    Py_XDECREF(PyObject_CallNoArgs(function));
    PyErr_Restore(kind, error, traceback);
}

static void guard_interrupted(PyObject *self)
{
    PyObject *kind, *error, *traceback, *method;

    PyErr_Fetch(&kind, &error, &traceback);
    method = PyObject_GetAttrString(self, "_interrupted");
    PyErr_Restore(kind, error, traceback);
    if (method) {
        call_quietly(method);
        Py_DECREF(method);
    }
}

static PyObject *guard_enter(PyObject *self, PyObject *unused)
{
    struct guard *guard = (struct guard *)self;
    PyObject *lock = guard->lock, *owned = NULL, *result;

    (void)unused;
    if (lock && lock != Py_None) {
        PyObject *acquired;

        if (!guard->release) {
            guard->release = PyObject_GetAttrString(lock, "release");
        }
        owned = guard->release ? PyObject_CallMethod(lock, "_is_owned", NULL) : NULL;
        acquired = owned ? PyObject_CallMethod(lock, "acquire", NULL) : NULL;
        if (!acquired) {
            Py_XDECREF(owned);
            return NULL;
        }
        Py_DECREF(acquired);
    }
    result = PyObject_CallMethod(self, "_entered", "O", owned ? owned : Py_False);
    if (!result) {
        guard_interrupted(self);
        if (owned) {
            call_quietly(guard->release);
        }
    }
    Py_XDECREF(owned);
    return result;
}

static PyObject *guard_exit(PyObject *self, PyObject *args)
{
    PyObject *release = ((struct guard *)self)->release;
    PyObject *method = PyObject_GetAttrString(self, "_leaving");
    PyObject *result = method ? PyObject_CallObject(method, args) : NULL;

    Py_XDECREF(method);
    if (!result) {
        guard_interrupted(self);
    }
    if (release) {
        call_quietly(release);
    }
    return result;
}

static PyMethodDef guard_methods[] = {
    { "__enter__", guard_enter, METH_NOARGS, NULL },
    { "__exit__", guard_exit, METH_VARARGS, NULL },
    { 0 },
};

static PyMemberDef guard_members[] = {
    { "_lock", T_OBJECT_EX, offsetof(struct guard, lock), 0, NULL },
    { 0 },
};

static PyType_Slot guard_slots[] = {
    { Py_tp_doc, (void *)PyDoc_STR("See pybitmap._entry.") },
    { Py_tp_methods, guard_methods },
    { Py_tp_members, guard_members },
    { Py_tp_traverse, guard_traverse },
    { Py_tp_clear, guard_clear },
    { Py_tp_dealloc, guard_dealloc },
    { 0 },
};

/* ---- the module --------------------------------------------------------- */

/* A function pointer has room for an address: POSIX wants that for dlsym. */
static void *core_at(PyObject *addresses, const char *name)
{
    PyObject *number = PyDict_GetItemString(addresses, name);
    void *address = number ? PyLong_AsVoidPtr(number) : NULL;

    if (!address && !PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "no address of %s", name);
    }
    return address;
}

#define BIND(function, name) \
    ((function = (__typeof__(function))core_at(addresses, name)) != NULL)

static PyObject *fast_bind(PyObject *module, PyObject *addresses)
{
    (void)module;
    if (BIND(core_set, "hbitmap_set") && BIND(core_get, "hbitmap_get") &&
        BIND(core_try_take, "hbitmap_try_take") &&
        BIND(core_granularity, "hbitmap_granularity") &&
        BIND(core_iter_init, "hbitmap_iter_init") &&
        BIND(core_iter_fill, "hbitmap_iter_fill") &&
        BIND(core_try_mark, "hbtracker_try_mark")) {
        Py_RETURN_NONE;
    }
    return NULL;
}

/* self: a function, and its arguments. */
static PyObject *call_bound(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyObject_CallObject(PyTuple_GetItem(self, 0), PyTuple_GetItem(self, 1));
}

static PyMethodDef bound_method = { "bound", call_bound, METH_VARARGS, NULL };

static PyObject *fast_bound(PyObject *module, PyObject *args)
{
    PyObject *function, *arguments;

    (void)module;
    if (!PyArg_ParseTuple(args, "OO!:bound", &function, &PyTuple_Type, &arguments)) {
        return NULL;
    }
    return PyCFunction_New(&bound_method, args);
}

static PyObject *fast_leave_aside(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    aside = true;
    Py_RETURN_NONE;
}

static PyObject *fast_unset_bytes(PyObject *module, PyObject *size)
{
    Py_ssize_t nbytes = PyLong_AsSsize_t(size);

    (void)module;
    if (nbytes < 0) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_ValueError, "a negative number of bytes");
        }
        return NULL;
    }
    return PyBytes_FromStringAndSize(NULL, nbytes);
}

static PyMethodDef module_methods[] = {
    { "bind", fast_bind, METH_O, PyDoc_STR(
        "bind(addresses, /)\n--\n\n"
        "A dict of C functions' names and addresses; before the first object is made.") },
    { "bound", fast_bound, METH_VARARGS, PyDoc_STR(
        "bound(function, args, /)\n--\n\n"
        "What calls function(*args), whatever it is called with itself.") },
    { "leave_aside", fast_leave_aside, METH_NOARGS, PyDoc_STR(
        "leave_aside()\n--\n\nFrom now on, Base's calls all go to the methods with _cffi_.") },
    { "unset_bytes", fast_unset_bytes, METH_O, PyDoc_STR(
        "unset_bytes(nbytes, /)\n--\n\n"
        "New bytes, for the caller to set before anybody else gets them.") },
    { 0 },
};

/* A new reference. */
static PyObject *add_type(PyObject *module, const char *name, size_t size, unsigned flags,
                          PyType_Slot *slots)
{
    PyType_Spec spec = {
        .name = name,
        .basicsize = (int)size,
        .flags = Py_TPFLAGS_DEFAULT | flags,
        .slots = slots,
    };
    PyObject *type = PyType_FromModuleAndSpec(module, &spec, NULL);

    Py_XINCREF(type);
    if (type && PyModule_AddObject(module, strrchr(name, '.') + 1, type) < 0) {
        Py_DECREF(type);
        Py_CLEAR(type);
    }
    return type;
}

static int fast_exec(PyObject *module)
{
    struct state *state = PyModule_GetState(module);
    PyObject *base, *node, *owner, *guard, *hinted;

#ifdef Py_LIMITED_API
    /* METH_FASTCALL is in the limited API from 3.10 on; but 3.9 would load this
     * file as well, from the one wheel that there is for all of them. */
    const char *version = Py_GetVersion();

    if (strtol(version, NULL, 10) == 3 && strtol(version + 2, NULL, 10) < 10) {
        PyErr_SetString(PyExc_ImportError, "built for Python 3.10 and later");
        return -1;
    }
#endif
    state->items_type = add_type(module, "pybitmap._fast.Items", sizeof(struct items),
                                 Py_TPFLAGS_HAVE_GC, items_slots);
    base = add_type(module, "pybitmap._fast.Base", sizeof(struct entry),
                    Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, base_slots);
    node = add_type(module, "pybitmap._fast.NodeBase", sizeof(struct entry),
                    Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, node_slots);
    owner = add_type(module, "pybitmap._fast.Owner", sizeof(struct owner), 0, owner_slots);
    guard = add_type(module, "pybitmap._fast.Guard", sizeof(struct guard),
                     Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, guard_slots);
    hinted = add_type(module, "pybitmap._fast.Hinted", sizeof(struct hinted),
                      Py_TPFLAGS_HAVE_GC, hinted_slots);
    Py_XDECREF(base);
    Py_XDECREF(node);
    Py_XDECREF(owner);
    Py_XDECREF(guard);
    Py_XDECREF(hinted);
    return state->items_type && base && node && owner && guard && hinted ? 0 : -1;
}

static int fast_traverse(PyObject *module, visitproc visit, void *arg)
{
    Py_VISIT(((struct state *)PyModule_GetState(module))->items_type);
    return 0;
}

static int fast_clear(PyObject *module)
{
    Py_CLEAR(((struct state *)PyModule_GetState(module))->items_type);
    return 0;
}

static void fast_free(void *module)
{
    (void)fast_clear(module);
}

static PyModuleDef_Slot module_slots[] = {
    { Py_mod_exec, fast_exec },
    { 0 },
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "pybitmap._fast",
    .m_size = sizeof(struct state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = fast_traverse,
    .m_clear = fast_clear,
    .m_free = fast_free,
};

PyMODINIT_FUNC PyInit__fast(void)
{
    return PyModuleDef_Init(&module_def);
}
