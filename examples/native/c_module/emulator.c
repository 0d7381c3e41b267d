/* SPDX-License-Identifier: MIT */
/*
 * A module in C whose write path marks a node of Python's: pybitmap_api.h, no source
 * of pybitmap's compiled in.
 *
 *     pin = node.pin()
 *     emulator.install(pin.address)
 *     emulator.run(1000000)
 *     emulator.install(0)
 *     pin.close()
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pybitmap_api.h>

static HBTracker *tracker;      /* NULL: writes are marked nowhere */

/* What the emulator does for each write of its guest.  0, or a negative errno: the
 * disk was truncated or closed, or must not change. */
static int guest_writes(uint64_t offset, uint64_t length)
{
    return tracker ? hbtracker_mark(tracker, offset, length) : 0;
}

static PyObject *install(PyObject *module, PyObject *address)
{
    void *installed = PyLong_AsVoidPtr(address);

    (void)module;
    if (!installed && PyErr_Occurred()) {
        return NULL;
    }
    tracker = (HBTracker *)installed;
    Py_RETURN_NONE;
}

/* The guest runs for n writes, while other threads of Python run, too. */
static PyObject *run(PyObject *module, PyObject *number)
{
    unsigned long long n = PyLong_AsUnsignedLongLong(number), i;
    uint64_t offset = 0;
    int err = 0;

    (void)module;
    if (PyErr_Occurred()) {
        return NULL;
    }
    /* hbtracker_mark may wait for a change of the node, whose thread needs the GIL. */
    Py_BEGIN_ALLOW_THREADS
    for (i = 0; i < n && !err; i++) {
        offset = (offset + 4096 * 257) % (1 << 30);
        err = guest_writes(offset, 512);
    }
    Py_END_ALLOW_THREADS
    if (err) {
        errno = -err;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    { "install", install, METH_O, "The address of a node's tracker, or 0, for all writes from now on." },
    { "run", run, METH_O, "Let the guest make n writes." },
    { NULL, NULL, 0, NULL },
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "emulator",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit_emulator(void)
{
    if (pybitmap_import() < 0) {
        return NULL;
    }
    return PyModule_Create(&definition);
}
