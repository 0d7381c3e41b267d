# SPDX-License-Identifier: MIT
"""What pyproject.toml cannot say: the compiled module, and the tag of the wheel."""

import sys

from setuptools import setup

limited_api = sys.implementation.name == "cpython" and "t" not in getattr(sys, "abiflags", "")

setup(
    cffi_modules=["csrc/ffi_build.py:ffibuilder"],
    # One wheel for every CPython from 3.9 on.
    options={"bdist_wheel": {"py_limited_api": "cp39"}} if limited_api else {},
)
