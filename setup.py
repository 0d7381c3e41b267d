# SPDX-License-Identifier: MIT
"""What pyproject.toml cannot say: the compiled modules, and the tag of the wheel."""

import sys

from setuptools import Extension, setup

cpython = sys.implementation.name == "cpython" and "t" not in getattr(sys, "abiflags", "")

# The limited API has METH_FASTCALL from 3.10 on. So 3.9 builds for itself; the file that the others
# build refuses to be loaded there. The wheel is right for all of them either way: without _fast
# everything goes through cffi.
limited_api = sys.version_info >= (3, 10)

fast = Extension(
    "pybitmap._fast",
    ["pybitmap/_fast.c"],
    depends=["csrc/hbitmap.h", "csrc/tracker.h"],
    include_dirs=["csrc"],
    extra_compile_args=["-std=c11", "-O3", "-fvisibility=hidden"],
    define_macros=[("Py_LIMITED_API", "0x030a0000")] if limited_api else [],
    py_limited_api=limited_api,
    optional=True,
)

setup(
    cffi_modules=["csrc/ffi_build.py:ffibuilder"],
    ext_modules=[fast] if cpython else [],
    # One wheel for every CPython from 3.9 on.
    options={"bdist_wheel": {"py_limited_api": "cp39"}} if cpython else {},
)
