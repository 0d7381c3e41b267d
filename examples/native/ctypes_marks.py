# SPDX-License-Identifier: MIT
"""Plain ctypes: a C function of pybitmap's by its address, on a bitmap of Python's.

This is the shape of every binding that can call an address; for speed from Python itself,
``hb.set`` and ``hb.set_many`` are faster than ctypes.
"""

import ctypes

from pybitmap import HBitmap, native

# As hbitmap.h declares it. CFUNCTYPE lets the GIL go during the call, PYFUNCTYPE keeps it.
hbitmap_set = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)(
    native.address("hbitmap_set")
)

memory = HBitmap(1 << 30, granularity=12)  # 1 GiB of guest memory, pages of 4 KiB
with memory.pin() as address:
    code = hbitmap_set(address, 0x12345678, 8)
    assert code == 0, f"errno {-code}"
print(list(memory.areas()))
