# SPDX-License-Identifier: MIT
"""The cffi build script (API mode): compiles the core into ``pybitmap._cffi``.

The declarations are the public header's own, the text between its two ``cdef`` marks, so they
are written once. Run by setuptools (``cffi_modules`` in setup.py) from the project's root.
"""

import os
import re
import sys

from cffi import FFI

HERE = os.path.dirname(os.path.abspath(__file__))
HEADERS = [
    *("hbitmap.h", "tracker.h", "pybitmap_table.h"),
    *("files.h", "kvm.h", "memory.h", "process.h", "unicorn.h"),
    *("mask.h", "arrow.h", "capsule.h"),
]
INTERNAL = [
    *("block.h", "copies.h", "count.h", "locks.h", "pages.h", "probe.h", "protocol.h"),
    *("threads.h", "words.h"),
]
SOURCES = [
    *("block.c", "pages.c", "probe.c", "protocol.c", "locks.c", "mark.c", "clear.c", "search.c"),
    *("count.c", "ops.c", "sets.c", "foreign.c", "serial.c", "threads.c", "words.c", "check.c"),
    *("tracker.c", "copies.c", "files.c", "kvm.c", "memory.c", "process.c"),
    *("unicorn.c", "mask.c", "arrow.c"),
]


def declarations(header: str) -> str:
    """The text of ``header`` that cffi reads."""
    with open(os.path.join(HERE, header), encoding="utf-8") as file:
        text = file.read()
    match = re.search(r"/\* cdef: begin \*/(.*)/\* cdef: end \*/", text, re.DOTALL)
    if match is None:
        raise ValueError(f"{header} has no cdef marks")
    return match.group(1)


ffibuilder = FFI()
for name in HEADERS:
    ffibuilder.cdef(declarations(name))
ffibuilder.set_source(
    "pybitmap._cffi",
    "".join(f'#include "{name}"\n' for name in HEADERS),
    # Relative to the project's root, as setuptools wants its sources.
    sources=[f"csrc/{name}" for name in SOURCES],
    depends=[f"csrc/{name}" for name in [*HEADERS, *INTERNAL]],
    include_dirs=["csrc"],
    extra_compile_args=["-std=c11", "-O3", "-pthread", "-fvisibility=hidden"],
    extra_link_args=["-pthread"],
    # The limited API gives one wheel for all versions of CPython; the free-threaded build has none.
    py_limited_api=sys.implementation.name == "cpython"
    and not getattr(sys, "abiflags", "").count("t"),
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
