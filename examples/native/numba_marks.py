# SPDX-License-Identifier: MIT
"""Numba: a loop that marks at C speed, compiled when it is first called.

Numba calls a ctypes function within ``@njit`` as C does, without Python in between. Declare the
address as an integer: Numba has no pointers of other kinds to pass. ``nogil=True`` lets other
threads of Python run meanwhile; marks may run beside everything.
"""

import ctypes

import numba
import numpy as np

from pybitmap import HBitmap, native

hbitmap_set = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)(
    native.address("hbitmap_set")
)


@numba.njit(nogil=True)
def run(bitmap, writes):
    """Marks each write; gives the number of those that are outside the bitmap."""
    refused = 0
    for i in range(writes.shape[0]):
        if hbitmap_set(bitmap, writes[i, 0], writes[i, 1]) != 0:
            refused += 1
    return refused


rng = np.random.default_rng(1)
memory = HBitmap(1 << 30, granularity=12)
writes = np.empty((1_000_000, 2), np.uint64)
writes[:, 0] = rng.integers(0, 1 << 30, len(writes), np.uint64)
writes[:, 1] = 8
with memory.pin() as address:
    refused = run(np.uint64(address), writes)

expected = HBitmap(1 << 30, granularity=12)
inside = writes[writes[:, 0] + writes[:, 1] <= 1 << 30]
expected.set_many(np.ascontiguousarray(inside[:, 0]), np.ascontiguousarray(inside[:, 1]))
assert memory == expected
assert refused == len(writes) - len(inside)
print(len(memory), "dirty pages")
