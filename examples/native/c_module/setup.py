# SPDX-License-Identifier: MIT
"""Builds the module: ``python setup.py build_ext --inplace``, and then ``python run.py``."""

from setuptools import Extension, setup

import pybitmap

setup(
    name="emulator",
    ext_modules=[Extension("emulator", ["emulator.c"], include_dirs=[pybitmap.get_include()])],
)
