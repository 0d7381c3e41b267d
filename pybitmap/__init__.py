# SPDX-License-Identifier: MIT
"""QEMU-class dirty bitmaps: the public names, gathered."""

from ._sources import get_include, get_sources
from .dirty import DirtyBitmap
from .errors import (
    AbortedError,
    BitmapError,
    BusyError,
    ClosedError,
    ExistsError,
    InconsistentError,
    InvalidError,
    MismatchError,
    NotFoundError,
    RangeError,
    ReadonlyError,
    StateError,
    TraceError,
    UnsupportedError,
)
from .hbitmap import HBitmap
from .node import BlockGraph, BlockNode
from .transaction import Transaction

__all__ = [
    "AbortedError",
    "BitmapError",
    "BlockGraph",
    "BlockNode",
    "BusyError",
    "ClosedError",
    "DirtyBitmap",
    "ExistsError",
    "HBitmap",
    "InconsistentError",
    "InvalidError",
    "MismatchError",
    "NotFoundError",
    "RangeError",
    "ReadonlyError",
    "StateError",
    "TraceError",
    "Transaction",
    "UnsupportedError",
    "get_include",
    "get_sources",
]
