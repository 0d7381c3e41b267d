# SPDX-License-Identifier: MIT
"""Extent: a range that is dirty or clean, and many of them as arrays.

Bitmaps are made of extents (:meth:`HBitmap.from_extents`) and tell theirs
(:meth:`HBitmap.to_extents`); :mod:`pybitmap.interchange` reads and writes them as other programs
have them. They come one by one and are marked some 65,536 at a time, so what is kept in memory does
not grow with their number.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple, Union, cast

from .arrays import Areas
from .errors import InvalidError, RangeError
from .sizes import MAX_SIZE

if TYPE_CHECKING:
    from ._typing import Readable

__all__ = ["Extent"]

_AT_ONCE = 1 << 16  # extents


class Extent(NamedTuple):
    """The ``length`` items from ``start`` on are dirty, or clean.

    Where a bitmap is of a disk, both are in bytes. An extent of no items says nothing but how far
    what is described goes.

    >>> extent = Extent(4096, 512)
    >>> extent.start, extent.length, extent.end, extent.dirty
    (4096, 512, 4608, True)
    >>> Extent(0, 4096, dirty=False) < extent   # a tuple, so they sort by where they begin
    True
    """

    start: int
    length: int
    dirty: bool = True

    @property
    def end(self) -> int:
        """The first item behind it."""
        return self.start + self.length


#: What extents may be given as: an array of shape (n, 2), or starts and counts one by one, with a
#: third that says whether they are dirty, or without.
Extents = Union["Readable", Iterable[Union[tuple[int, int], tuple[int, int, bool]]]]


class Batch(NamedTuple):
    """Some extents: those that are dirty, and the end of the furthest, dirty or not."""

    starts: Any
    counts: Any
    end: int


def batches(extents: Extents, size: int | None = None) -> Iterator[Batch]:
    """All of them, in order, many at a time.

    :param size: where the last of them ends at the latest; None: 2**63 - 1
    :raises RangeError: if one is negative, or ends beyond that; it is named
    :raises InvalidError: for an array of another shape
    :raises TypeError: for what is none
    """
    table = _table(extents)
    if table is not None:
        starts, counts = table
        yield from _columns(starts, counts, size)
        return
    first = 0
    each = iter(cast("Iterable[tuple[int, ...]]", extents))
    while some := list(islice(each, _AT_ONCE)):
        starts, counts, end = array("Q"), array("Q"), 0
        for number, extent in enumerate(some, first):
            start, count, dirty = _parts(number, extent, size)
            end = max(end, start + count)
            if dirty:
                starts.append(start)
                counts.append(count)
        yield Batch(starts, counts, end)
        first += len(some)


def _parts(number: int, extent: Any, size: int | None) -> tuple[int, int, bool]:
    try:
        start, count, *more = extent
        [dirty] = more or [True]
        start, count = index(start), index(count)
        if dirty not in (True, False):  # None, or "false", are no answer
            raise ValueError
    except (TypeError, ValueError):
        raise TypeError(
            f"extent {number} is {extent!r:.60}, and is to be (start, count) or (start, count, "
            "dirty), dirty True or False"
        ) from None
    _check(number, start, count, size)
    return start, count, bool(dirty)


def _check(number: int, start: int, count: int, size: int | None) -> None:
    if start < 0 or count < 0:
        raise RangeError(f"extent {number}: start {start}, count {count}: one is negative")
    if start + count > (MAX_SIZE if size is None else size):
        beyond = "2^63 - 1" if size is None else f"the size, {size}"
        raise RangeError(f"extent {number}: start {start} + count {count} is beyond {beyond}")


def _table(extents: Any) -> tuple[Any, Any] | None:
    """Starts and counts of an array; None if it is none."""
    if isinstance(extents, (bytes, bytearray, str)):
        raise TypeError("extents are pairs of numbers, not bytes")
    if isinstance(extents, Areas):
        extents = extents.data
    elif hasattr(extents, "columns") or hasattr(extents, "column_names"):
        kind = type(extents)
        raise TypeError(
            f"extents are no table ({kind.__module__.partition('.')[0]}'s {kind.__name__}), but an"
            " array of its columns: numpy.column_stack((table['offset'], table['length']))"
        )
    shape = getattr(extents, "shape", None)
    if shape is None:
        return None
    if len(shape) != 2 or shape[1] != 2:
        raise InvalidError(f"an array of extents has the shape (n, 2), not {tuple(shape)}")
    if isinstance(extents, memoryview):
        if extents.format not in ("Q", "L", "q", "l") or extents.itemsize != 8:
            raise TypeError(f"a view of extents has 64-bit numbers, not format {extents.format!r}")
        if not extents.c_contiguous:
            raise InvalidError("a view of extents is to be contiguous")
        if not shape[0]:
            return array("Q"), array("Q")
        flat = extents.cast("B").cast("Q" if extents.format in "QL" else "q")
        return flat[::2], flat[1::2]
    return extents[:, 0], extents[:, 1]


def _columns(starts: Any, counts: Any, size: int | None) -> Iterator[Batch]:
    for first in range(0, len(starts), _AT_ONCE):
        some, numbers = starts[first : first + _AT_ONCE], counts[first : first + _AT_ONCE]
        end = 0
        for number, (start, count) in enumerate(zip(some.tolist(), numbers.tolist()), first):
            start, count = _whole(number, start), _whole(number, count)
            _check(number, start, count, size)
            end = max(end, start + count)
        yield Batch(some, numbers, end)


def _whole(number: int, value: object) -> int:
    try:
        return index(cast(Any, value))
    except TypeError:
        raise TypeError(f"extent {number} has {value!r:.60}, which is no whole number") from None


def cut_in_blocks(extents: Iterable[Extent], block_size: int, size: int) -> Iterator[Extent]:
    """Every block, at a multiple of ``block_size``, that one of them touches; each once.

    :param extents: dirty ones, in order
    :param size: at which the last is cut
    """
    done = 0
    for extent in extents:
        first = max(done, extent.start // block_size * block_size)
        done = max(done, -(-extent.end // block_size) * block_size)
        for block in range(first, done, block_size):
            yield Extent(block, min(block_size, size - block))


def with_gaps(
    extents: Iterable[Extent], start: int, end: int, block_size: int | None = None
) -> Iterator[Extent]:
    """With clean extents between them, and before and after, from ``start`` to ``end``.

    :param extents: in order, in that range
    :param block_size: clean ones are of that length, too, but for the last
    """
    for extent in extents:
        yield from _clean(start, extent.start, block_size)
        yield extent
        start = extent.end
    yield from _clean(start, end, block_size)


def _clean(start: int, end: int, block_size: int | None) -> Iterator[Extent]:
    step = block_size or max(1, end - start)
    for first in range(start, end, step):
        yield Extent(first, min(step, end - first), False)


def rounded(
    areas: Iterable[tuple[int, int]], granularity: int, size: int
) -> Iterator[tuple[int, int]]:
    """Outwards, to whole groups of something of that size; those that then touch are one.

    :param areas: in order
    :param granularity: any number, not only a power of 2
    """
    start = end = 0
    for offset, nbytes in areas:
        first = offset // granularity * granularity
        if first > end:
            if end > start:
                yield start, end - start
            start = first
        end = min(-(-(offset + nbytes) // granularity) * granularity, size)
    if end > start:
        yield start, end - start
