# SPDX-License-Identifier: MIT
"""QEMU-class dirty bitmaps: the public names, gathered."""

from ._sources import get_include, get_sources
from .errors import BitmapError, InvalidError, MismatchError, RangeError, TraceError
from .hbitmap import HBitmap

__all__ = [
    "BitmapError",
    "HBitmap",
    "InvalidError",
    "MismatchError",
    "RangeError",
    "TraceError",
    "get_include",
    "get_sources",
]
