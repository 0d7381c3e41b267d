# SPDX-License-Identifier: MIT
"""Every exception that pybitmap raises on purpose, in one tree.

Each is a :class:`BitmapError`, and also the built-in exception that a caller would expect at that
place. Wrong types are plain :class:`TypeError`, a lack of memory is :class:`MemoryError`, an item
that is not in the set is :class:`KeyError`, and a resize while the memory is lent out is
:class:`BufferError`: these are Python's own protocols.
"""

from __future__ import annotations

from errno import ENOTSUP


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


class NotFoundError(BitmapError, KeyError):
    """There is no node, or no bitmap, of that name."""

    # KeyError shows the repr of its argument; this is a sentence.
    __str__ = Exception.__str__


class ExistsError(InvalidError):
    """The name is taken."""


class StateError(BitmapError):
    """A flag of the bitmap forbids what was asked for."""


class BusyError(StateError):
    """The bitmap is in use by another operation."""


class ReadonlyError(StateError):
    """The content of the bitmap, or of a bitmap of the node, must not change."""


class InconsistentError(StateError):
    """The bitmap was not stored in an orderly way; it can only be removed."""


class StoreError(BitmapError, OSError):
    """What is stored cannot be read or written; ``errno`` says why, if a system call knew."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno

    def __reduce__(self) -> tuple[type[StoreError], tuple[str, int | None]]:
        return type(self), (str(self), self.errno)

    # OSError would show its errno.
    __str__ = Exception.__str__


class UnsupportedError(StoreError):
    """Something that cannot be done here, however often it is tried: not by this node, which may
    have no store, nor by its store, the format of its image, or the machine."""

    def __init__(self, message: str, errno: int | None = ENOTSUP) -> None:
        super().__init__(message, errno)


class LockedError(StoreError):
    """Another process has the store or the image open."""


class CorruptError(StoreError, ValueError):
    """The store or the image is damaged, or not what it is said to be."""


class ClosedError(BitmapError, ValueError):
    """The node, or the pin, is closed."""


class AbortedError(BitmapError):
    """The transaction was aborted."""
