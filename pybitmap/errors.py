# SPDX-License-Identifier: MIT
"""Every exception that pybitmap raises on purpose, in one tree.

Each is a :class:`BitmapError`, and also the built-in exception that a caller would expect at that
place. Wrong types are plain :class:`TypeError`, a lack of memory is :class:`MemoryError`, an item
that is not in the set is :class:`KeyError`, and a resize while the memory is lent out is
:class:`BufferError`: these are Python's own protocols.
"""

from __future__ import annotations


class BitmapError(Exception):
    """The base of all errors of this package."""


class InvalidError(BitmapError, ValueError):
    """A value that cannot be right, whatever the bitmap holds."""


class RangeError(InvalidError, IndexError):
    """A range, or an item, that is not inside the bitmap."""


class MismatchError(InvalidError):
    """Two bitmaps that do not fit each other: their sizes or granularities differ."""


class TraceError(InvalidError):
    """A trace of block writes that cannot be read."""
