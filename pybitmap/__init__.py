# SPDX-License-Identifier: MIT
"""QEMU-class dirty bitmaps: the public names, gathered."""

from ._sources import get_include, get_sources
from .block.bitmap import DirtyBitmap, Frozen
from .block.graph import BlockGraph, Transaction
from .block.node import BlockNode
from .errors import (
    AbortedError,
    BitmapError,
    BusyError,
    ClosedError,
    CorruptError,
    ExistsError,
    InconsistentError,
    InvalidError,
    LockedError,
    MismatchError,
    NotFoundError,
    RangeError,
    ReadonlyError,
    StateError,
    StoreError,
    TraceError,
    UnsupportedError,
)
from .hbitmap import HBitmap

__all__ = [
    "AbortedError",
    "BitmapError",
    "BlockGraph",
    "BlockNode",
    "BusyError",
    "ClosedError",
    "CorruptError",
    "DirtyBitmap",
    "ExistsError",
    "Frozen",
    "HBitmap",
    "InconsistentError",
    "InvalidError",
    "LockedError",
    "MismatchError",
    "NotFoundError",
    "RangeError",
    "ReadonlyError",
    "StateError",
    "StoreError",
    "TraceError",
    "Transaction",
    "UnsupportedError",
    "get_include",
    "get_sources",
]
