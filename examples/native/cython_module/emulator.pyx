# SPDX-License-Identifier: MIT
# cython: language_level=3
"""A module in Cython whose writes mark a bitmap of Python's."""

from libc.stdint cimport uint64_t, uintptr_t

from pybitmap.native cimport HBitmap, hbitmap_set, pybitmap_import

pybitmap_import()


cdef class Emulator:
    """:param memory: an HBitmap, whose pin this keeps as long as it lives"""

    cdef object pin
    cdef HBitmap *dirty

    def __init__(self, memory):
        self.pin = memory.pin()
        self.dirty = <HBitmap *><uintptr_t>self.pin.address

    def run(self, uint64_t n):
        """Let the guest make n writes; other threads of Python run meanwhile."""
        cdef uint64_t i, offset = 0
        cdef int err = 0
        with nogil:
            for i in range(n):
                offset = (offset + 4096 * 257) % (1 << 30)
                err = hbitmap_set(self.dirty, offset, 8)
                if err:
                    break
        if err:
            raise OSError(-err, "a write beyond the guest's memory")

    def close(self):
        self.dirty = NULL
        self.pin.close()
