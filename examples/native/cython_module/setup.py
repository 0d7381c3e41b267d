# SPDX-License-Identifier: MIT
"""Builds the module: ``python setup.py build_ext --inplace``, and then ``python run.py``."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

import pybitmap

setup(
    name="emulator",
    ext_modules=cythonize(
        [Extension("emulator", ["emulator.pyx"], include_dirs=[pybitmap.get_include()])],
        # Where pybitmap lies, for cimport; needed only if it is installed in place (pip -e).
        include_path=[str(Path(pybitmap.__file__).parents[1])],
    ),
)
