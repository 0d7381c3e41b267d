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
    """The base of all errors of this package.

    >>> from pybitmap import HBitmap
    >>> try:
    ...     HBitmap(100).set(99, 2)
    ... except BitmapError as error:
    ...     print(type(error).__name__)
    RangeError
    """


class InvalidError(BitmapError, ValueError):
    """A value that cannot be right, whatever the bitmap holds.

    >>> from pybitmap import HBitmap
    >>> HBitmap(100, group_size=10)
    Traceback (most recent call last):
    pybitmap.errors.InvalidError: group_size 10 is not a power of 2
    """


class RangeError(InvalidError, IndexError):
    """A range, or an item, that is not inside the bitmap.

    >>> from pybitmap import HBitmap
    >>> HBitmap(100).set(99, 2)
    Traceback (most recent call last):
    pybitmap.errors.RangeError: range [99, 101) is not inside the bitmap of 100 items
    """


class MismatchError(InvalidError):
    """Two bitmaps that do not fit each other: their sizes or granularities differ.

    >>> from pybitmap import HBitmap
    >>> HBitmap(100).merge(HBitmap(50))
    Traceback (most recent call last):
    pybitmap.errors.MismatchError: the bitmaps' sizes differ: 100 and 50 items
    """


class TraceError(InvalidError):
    """A trace of block writes that cannot be read.

    >>> from pathlib import Path
    >>> from pybitmap.trace import read_trace
    >>> nbytes = Path("some.trace").write_text("write 0 much\\n")
    >>> read_trace("some.trace", print)
    Traceback (most recent call last):
    pybitmap.errors.TraceError: some.trace:1: expected a number of bytes in decimal, found 'much'
    """


class FormatError(InvalidError):
    """Extents that cannot be read, or that a format cannot have.

    >>> import io
    >>> from pybitmap.interchange import read_extents
    >>> list(read_extents(io.BytesIO(b"offset,length\\n4096,x\\n")))
    Traceback (most recent call last):
    pybitmap.errors.FormatError: <stream>:2: expected a number of bytes in decimal, found 'x'
    """


class NotFoundError(BitmapError, KeyError):
    """There is no node, or no bitmap, of that name.

    >>> from pybitmap import BlockGraph
    >>> BlockGraph().find_node("disk")
    Traceback (most recent call last):
    pybitmap.errors.NotFoundError: Node 'disk' not found
    """

    # KeyError shows the repr of its argument; this is a sentence.
    __str__ = Exception.__str__


class ExistsError(InvalidError):
    """The name is taken.

    >>> from pybitmap import BlockGraph
    >>> disk = BlockGraph().add_node("disk", size=1 << 20)
    >>> disk.add_bitmap("daily").name
    'daily'
    >>> disk.add_bitmap("daily")
    Traceback (most recent call last):
    pybitmap.errors.ExistsError: Bitmap already exists: daily
    """


class StateError(BitmapError):
    """A flag of the bitmap forbids what was asked for.

    >>> from pybitmap import BlockGraph
    >>> graph = BlockGraph()
    >>> with graph.transaction(), graph.transaction():
    ...     pass
    Traceback (most recent call last):
    pybitmap.errors.StateError: this thread has a transaction open already
    """


class BusyError(StateError):
    """The bitmap is in use by another operation.

    >>> from pybitmap import BlockGraph
    >>> daily = BlockGraph().add_node("disk", size=1 << 20).add_bitmap("daily")
    >>> with daily.freeze():
    ...     daily.clear()
    Traceback (most recent call last):
    pybitmap.errors.BusyError: Bitmap 'daily' is currently in use by another operation and cannot be used
    """  # noqa: E501


class ReadonlyError(StateError):
    """The content of the bitmap, or of a bitmap of the node, must not change.

    >>> from pybitmap import BlockGraph
    >>> disk = BlockGraph().add_node("disk", size=1 << 20, read_only=True)
    >>> disk.mark_dirty(0, 512)
    Traceback (most recent call last):
    pybitmap.errors.ReadonlyError: node 'disk' is read-only
    """


class InconsistentError(StateError):
    """The bitmap was not stored in an orderly way; it can only be removed.

    >>> from pathlib import Path
    >>> from pybitmap import BlockGraph, LocalStore
    >>> with BlockGraph() as graph:
    ...     disk = graph.add_node("disk", 1 << 20, LocalStore("broken.bitmaps"))
    ...     daily = disk.add_bitmap("daily", persistent=True)
    >>> for words in Path("broken.bitmaps").glob("*.words"):
    ...     words.unlink()                    # somebody damages the store
    >>> with BlockGraph() as graph:
    ...     disk = graph.add_node("disk", store=LocalStore("broken.bitmaps"))
    ...     disk.bitmaps["daily"].clear()
    Traceback (most recent call last):
    pybitmap.errors.InconsistentError: Bitmap 'daily' is inconsistent and cannot be used
    """


class StoreError(BitmapError, OSError):
    """What is stored cannot be read or written; ``errno`` says why, if a system call knew.

    >>> import errno
    >>> from pybitmap import BlockGraph, LocalStore
    >>> try:
    ...     disk = BlockGraph().add_node("disk", 1 << 20, LocalStore("missing/disks.bitmaps"))
    ... except StoreError as error:
    ...     print(error.errno == errno.ENOENT)
    True
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno

    def __reduce__(self) -> tuple[type[StoreError], tuple[str, int | None]]:
        return type(self), (str(self), self.errno)

    # OSError would show its errno.
    __str__ = Exception.__str__


class UnsupportedError(StoreError):
    """Something that cannot be done here, however often it is tried: not by this node, which may
    have no store, nor by its store, the format of its image, or the machine.

    >>> from pybitmap import BlockGraph
    >>> disk = BlockGraph().add_node("disk", size=1 << 20)       # without a store
    >>> disk.add_bitmap("daily", persistent=True)
    Traceback (most recent call last):
    pybitmap.errors.UnsupportedError: Can't store persistent bitmaps to disk: Operation not supported
    """  # noqa: E501

    def __init__(self, message: str, errno: int | None = ENOTSUP) -> None:
        super().__init__(message, errno)


class LockedError(StoreError):
    """Another process has the store or the image open.

    >>> from pybitmap import BlockGraph, LocalStore
    >>> with BlockGraph() as graph:
    ...     disk = graph.add_node("disk", 1 << 20, LocalStore("disks.bitmaps"))
    ...     try:
    ...         BlockGraph().add_node("disk", store=LocalStore("disks.bitmaps"))
    ...     except LockedError:
    ...         print("it is open already")
    it is open already
    """


class CorruptError(StoreError, ValueError):
    """The store or the image is damaged, or not what it is said to be.

    >>> from pathlib import Path
    >>> from pybitmap import BlockGraph, LocalStore
    >>> Path("torn.bitmaps").mkdir()
    >>> nbytes = Path("torn.bitmaps/catalog.sqlite").write_text("no catalog")
    >>> try:
    ...     BlockGraph().add_node("disk", store=LocalStore("torn.bitmaps"))
    ... except CorruptError:
    ...     print("that is no store")
    that is no store
    """


class ClosedError(BitmapError, ValueError):
    """The node, or the pin, is closed.

    >>> from pybitmap import BlockGraph
    >>> disk = BlockGraph().add_node("disk", size=1 << 20)
    >>> disk.close()
    >>> disk.mark_dirty(0, 512)
    Traceback (most recent call last):
    pybitmap.errors.ClosedError: node 'disk' is closed
    """


class AbortedError(BitmapError):
    """The transaction was aborted.

    >>> from pybitmap import BlockGraph
    >>> with BlockGraph().transaction() as tx:
    ...     tx.abort()
    Traceback (most recent call last):
    pybitmap.errors.AbortedError: Transaction aborted using Abort action
    """


class ExecutorError(BitmapError, RuntimeError):
    """The executor that was to run something broke, or could not be started."""
