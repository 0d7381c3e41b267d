# SPDX-License-Identifier: MIT
"""HBitmap: the hierarchical bitmap of ``csrc/hbitmap.h`` as a Python set.

A bit stands for a group of ``2**granularity`` items. As a set it holds the starts of its dirty
groups; as a bitmap it is marked and searched in ranges ``(start, count)`` of items, half-open::

    size 8, granularity 1: set(3, 2)  ->  groups 0110  ->  {2, 4}, areas (2, 4), count() 4

Marks and resets never clamp: a range that leaves the bitmap is refused and nothing changes.
Searches clamp, and give None where there is nothing.

Every method may run in several threads at once; the guarantees stand at the head of
``csrc/hbitmap.h``.
"""

from __future__ import annotations

import errno
import hashlib
import sys
import warnings
from array import array
from collections.abc import Iterable, Iterator, MutableSet
from collections.abc import Set as AbstractSet
from functools import partial
from operator import index
from pickle import PickleBuffer
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, cast

from . import _core
from ._core import (
    CData,
    hbitmap_count,
    hbitmap_get,
    hbitmap_reset,
)
from ._entry import FIRST_BATCH, LAST_BATCH, Base, filled_bytes, hinted, leave_aside
from ._fork import in_child
from .errors import InvalidError, RangeError, StateError
from .native import Pin

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    Operation = Callable[[CData, CData, CData], int]

_TO_THE_END = _core.MAX_SIZE

_DIGEST_STEP = 1 << 24  # bytes
_FIRST_AREAS = 4096  # that areas_array has room for at first


class HBitmap(Base, MutableSet[int]):
    """A hierarchical bitmap of ``size`` items with one bit for ``2**granularity`` of them.

    :param size: in items (bytes, sectors, pages): 0..2**63 - 1, at most 2**41 groups
    :param granularity: log2 of the items that a bit stands for, 0..63
    :raises InvalidError: (a ValueError) if one of them is out of range
    :raises MemoryError: if there is no memory; what is never marked takes none

    All clean at first. Memory: one bit per group, 1/63 more for the summaries; from 256 KiB on,
    pages that are never marked take none.

    Fork: the child has a copy and goes on with that; what another thread was clearing or changing
    in another way at that moment, but by a mark, is refused there (StateError).

    >>> hb = HBitmap(1 << 20, granularity=12)
    >>> hb.set(5000, 4096)
    >>> list(hb.areas()), 5000 in hb, len(hb)
    ([(4096, 8192)], True, 2)
    """

    # The base has set, get and __contains__, and _clears: how often bits may have been cleared, for
    # iterators that hold a batch of them.
    # What it was made over; None: memory of its own.
    __slots__ = ("__weakref__", "_granularity", "_hb", "_memory")

    def __init__(self, size: int, granularity: int = 0) -> None:
        if hasattr(self, "_hb"):  # which iterators and other threads may be using
            raise TypeError("an HBitmap is initialised once")
        self._adopt(_core.hbitmap_alloc(size, granularity), granularity, None)

    def _adopt(
        self, made: tuple[CData, _core.Owner], granularity: int, memory: _core.Memory | None
    ) -> None:
        hb, owner = made
        self._attach(_core.address(hb), owner)
        self._hb = hb
        self._granularity = index(granularity)
        self._memory = memory

    @classmethod
    def _over(cls, memory: _core.Memory, size: int, granularity: int) -> HBitmap:
        """A bitmap whose leaf words lie in ``memory``, with the bits that are set there.

        Marks go straight to the memory, which no other bitmap may use meanwhile and which lives on
        as long as the bitmap and views of it. Cannot be truncated (BufferError).
        """
        hb = cls.__new__(cls)
        hb._adopt(_core.hbitmap_alloc_on(size, granularity, memory), granularity, memory)
        return hb

    # ---- marks ------------------------------------------------------------------------------

    def set_many(self, starts: ReadableBuffer, counts: ReadableBuffer) -> None:
        """Mark the ranges ``(starts[i], counts[i])``, all or none of them.

        :param starts: a buffer of uint64, shape (n,), in items: an array('Q'), a NumPy array
        :param counts: the same, as long
        :raises RangeError: if one of the ranges is not inside the bitmap; it is named
        :raises TypeError: for buffers of anything else
        :raises InvalidError: if the lengths differ
        """
        _core.with_ranges(self._set_ranges, ("starts", "counts"), starts, counts)

    def _set_ranges(self, starts: CData, counts: CData, nranges: int) -> None:
        if _core.hbitmap_set_many(self._hb, starts, counts, nranges):
            size = self.size
            for i, (start, count) in enumerate(zip(starts, counts)):
                if start + count > size and count:
                    error = _core.out_of_range(self._hb, start, count)
                    raise type(error)(f"write {i}: {error}")
            raise InvalidError("starts or counts changed while they were being marked")

    def reset(self, start: int, count: int | None = None) -> None:
        """Clean the groups of a range; ``count`` None: the one group at ``start``.

        The range must consist of whole groups (at its end it may be cut by the end of the
        bitmap): a partly covered group never becomes clean.

        :raises RangeError: if the range is not inside the bitmap
        :raises InvalidError: if it cuts a group
        """
        start = index(start)
        count = 1 << self._granularity if count is None else index(count)
        try:
            code = hbitmap_reset(self._hb, start, count)
        except OverflowError:
            raise _core.out_of_range(self._hb, start, count) from None
        if code:
            raise _core.failed(code, self._hb, start, count)
        self._clears += 1

    def reset_all(self) -> None:
        """Clean everything."""
        _core.hbitmap_reset_all(self._hb)
        self._clears += 1

    # ---- questions --------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of items."""
        return _core.hbitmap_size(self._hb)

    @property
    def granularity(self) -> int:
        """log2 of the number of items that a bit stands for."""
        return self._granularity

    def count(self, start: int | None = None, count: int | None = None) -> int:
        """Dirty items. Without arguments: of whole groups, so it may exceed the size, and takes
        no time if nothing has changed since it was last asked. With ``start``: in the ``count``
        items from there on (None: to the end), clipped to them and to the size.

        :raises RangeError: if ``start`` or ``count`` is negative
        """
        if start is None and count is None:
            return hbitmap_count(self._hb)
        start, count = self._search_range(0 if start is None else start, count)
        return _core.hbitmap_count_range(self._hb, start, count)

    def empty(self) -> bool:
        """Is nothing dirty? A mark that returned before is seen, whatever is cleared meanwhile."""
        return _core.hbitmap_empty(self._hb)

    def __bool__(self) -> bool:
        return not self.empty()

    def __len__(self) -> int:
        """Number of dirty groups."""
        return hbitmap_count(self._hb) >> self._granularity

    def __getitem__(self, item: int) -> bool:
        """Is the group of ``item`` dirty?

        :raises RangeError: (an IndexError) if it is not inside the bitmap
        """
        if isinstance(item, slice):
            raise TypeError("slices can only be assigned to; see areas() and status()")
        item = index(item)
        if not 0 <= item < self.size:
            raise _core.out_of_range(self._hb, item, 1)
        return hbitmap_get(self._hb, item)

    def __setitem__(self, key: int | slice, value: bool) -> None:
        """``hb[item] = True``, ``hb[start:stop] = False``: as :meth:`set` and :meth:`reset`."""
        if isinstance(key, slice):
            if key.step is not None and index(key.step) != 1:
                raise InvalidError(f"slices of a bitmap have step 1, not {key.step}")
            start = 0 if key.start is None else index(key.start)
            count = (self.size if key.stop is None else index(key.stop)) - start
        else:
            start, count = index(key), 1
        if value not in (False, True):
            raise TypeError(f"a bit is True or False, not {value!r}")
        if value:
            self.set(start, count)
        else:
            self.reset(start, count if isinstance(key, slice) else None)

    def __repr__(self) -> str:
        try:
            dirty = self.count()
        except StateError:
            return "<HBitmap, torn by a fork>"
        return f"<HBitmap size={self.size} granularity={self._granularity} dirty={dirty}>"

    # ---- searches ---------------------------------------------------------------------------

    #: Not by index, which is what Python would do.
    __reversed__ = None

    def __iter__(self) -> Iterator[int]:
        return self.iter()

    def iter(self, first: int = 0) -> Iterator[int]:
        """The starts of the dirty groups in order, from the group that holds ``first`` on; none
        if ``first`` is not below the size, also where the last group is cut.

        Everything may happen to the bitmap meanwhile: what this object clears ahead of the
        iterator is not given any more; what is marked ahead may or may not be, and the same
        holds for whatever other threads do.

        :raises RangeError: if ``first`` is negative
        """
        return self._items(self._search_range(first, None)[0])

    def areas(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """The dirty areas ``(start, count)`` in order, in items, clipped to ``[start, end)``.

        What happens to the bitmap meanwhile counts as for :meth:`iter`.

        :raises RangeError: if ``start`` or ``end`` is negative
        """
        start, end = self._search_bounds(start, end)
        return hinted(
            self._areas(start, end), lambda: _core.hbitmap_count_areas(self._hb, start, end)
        )

    def _areas(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        batch = FIRST_BATCH
        pairs = _core.new("uint64_t[]", 2 * LAST_BATCH)
        going_on = _core.new("uint64_t *")
        while True:
            clears = self._clears
            nareas = _core.hbitmap_areas(self._hb, start, end, pairs, batch, going_on)
            full, start = nareas == batch, going_on[0]
            batch = min(2 * batch, LAST_BATCH)
            flat = _core.unpack(pairs, 2 * nareas)
            for area in zip(flat[::2], flat[1::2]):
                if self._clears != clears:
                    full, start, batch = True, area[0], 1
                    break
                yield area
            if not full:
                return

    def areas_array(self, start: int = 0, end: int | None = None) -> memoryview:
        """The areas of :meth:`areas` at once: a memoryview of format 'Q', shape (n, 2).

        ``numpy.asarray`` takes it without a copy. In the machine's byte order, as :attr:`words`.
        """
        start, end = self._search_bounds(start, end)
        room, nareas = _FIRST_AREAS, 0
        pairs = _core.new_words(2 * room)
        going_on = _core.new("uint64_t *")
        while True:
            rest = pairs + 2 * nareas
            nareas += _core.hbitmap_areas(self._hb, start, end, rest, room - nareas, going_on)
            start = going_on[0]
            if nareas < room:
                break
            if room == _FIRST_AREAS:
                room *= 4
            else:  # many: for all of them, and for some that are marked meanwhile
                room += _core.hbitmap_count_areas(self._hb, start, end) + LAST_BATCH
            more = _core.new_words(2 * room)
            _core.move(more, pairs, 16 * nareas)
            pairs = more
        # A cast cannot make a shape with a 0 in it, a slice can. (PyPy's slices of views with two
        # dimensions are wrong about their size, so not otherwise.)
        view = memoryview(_core.buffer(pairs, 16 * max(1, nareas)))
        view = view.cast("Q", [max(1, nareas), 2])
        return view if nareas else view[:0]

    def next_dirty(self, start: int, count: int | None = None) -> int | None:
        """The first dirty item of the ``count`` items from ``start`` on (None: to the end).

        :raises RangeError: if one of them is negative
        """
        item = _core.hbitmap_next_dirty(self._hb, *self._search_range(start, count))
        return None if item < 0 else item

    def next_zero(self, start: int, count: int | None = None) -> int | None:
        """The first clean item of the ``count`` items from ``start`` on (None: to the end).

        :raises RangeError: if one of them is negative
        """
        item = _core.hbitmap_next_zero(self._hb, *self._search_range(start, count))
        return None if item < 0 else item

    def next_dirty_area(
        self, start: int, end: int | None = None, max_count: int | None = None
    ) -> tuple[int, int] | None:
        """The first dirty area ``(start, count)`` in ``[start, end)``, at most ``max_count`` long.

        :raises RangeError: if ``start`` or ``end`` is negative
        :raises InvalidError: if ``max_count`` is less than 1
        """
        start, end = self._search_bounds(start, end)
        limit = _TO_THE_END if max_count is None else min(index(max_count), _TO_THE_END)
        if limit < 1:
            raise InvalidError(f"max_count is at least 1, not {max_count}")
        pair = _core.new("int64_t[2]")
        if not _core.hbitmap_next_dirty_area(self._hb, start, end, limit, pair, pair + 1):
            return None
        return pair[0], pair[1]

    def status(self, start: int, count: int | None = None) -> tuple[bool, int]:
        """``(dirty, count)``: is ``start`` dirty, and for how many items does it stay so?

        At most ``count`` of them (None: to the end). ``(False, 0)`` beyond the end.

        :raises RangeError: if one of them is negative
        """
        same = _core.new("int64_t *")
        dirty = _core.hbitmap_status(self._hb, *self._search_range(start, count), same)
        return dirty, same[0]

    def _to_the_end(self, start: int, count: int | None) -> tuple[int, int]:
        start, size = index(start), self.size
        if count is not None:
            return start, index(count)
        if not 0 <= start <= size:
            raise RangeError(f"start {start} is not inside the bitmap of {size} items")
        return start, size - start

    def _search_range(self, start: int, count: int | None) -> tuple[int, int]:
        """What C takes: both within 0..INT64_MAX, which is beyond every bitmap."""
        start = index(start)
        count = _TO_THE_END if count is None else index(count)
        if start < 0 or count < 0:
            raise RangeError(f"start {start}, count {count}: neither can be negative")
        return min(start, _TO_THE_END), min(count, _TO_THE_END)

    def _search_bounds(self, start: int, end: int | None) -> tuple[int, int]:
        start = index(start)
        end = _TO_THE_END if end is None else index(end)
        if start < 0 or end < 0:
            raise RangeError(f"start {start}, end {end}: neither can be negative")
        return min(start, _TO_THE_END), min(end, _TO_THE_END)

    # ---- as a set ---------------------------------------------------------------------------

    def discard(self, item: object) -> None:
        """Clean the group of ``item``; whatever is no item of a dirty group is ignored."""
        self._take(item)

    def remove(self, item: object) -> None:
        """Clean the group of ``item``.

        :raises KeyError: if it is no item of a dirty group
        """
        if not self._take(item):
            raise KeyError(item)

    def _take(self, item: object) -> bool:
        try:
            taken = _core.hbitmap_take(self._hb, index(cast(int, item)))
        except (TypeError, OverflowError):
            return False
        self._clears += 1
        return taken == 1

    def pop(self) -> int:
        """Clean the first dirty group and return its start; each is given to one caller only.

        :raises KeyError: if nothing is dirty
        """
        while True:
            item = self.next_dirty(0)
            if item is None:
                if self.empty():
                    raise KeyError("pop from an empty bitmap")
            elif self._take(item):
                return item

    def clear(self) -> None:
        """Clean everything."""
        self.reset_all()

    def copy(self) -> HBitmap:
        """A bitmap of the same size, granularity and bits."""
        return self._union(self)

    def __copy__(self) -> HBitmap:
        return self.copy()

    def __deepcopy__(self, memo: object) -> HBitmap:
        return self.copy()

    def merge(self, other: HBitmap) -> None:
        """Mark what is dirty in ``other``, of the same size and any granularity.

        :raises MismatchError: (a ValueError) if the sizes differ
        """
        if not isinstance(other, HBitmap):
            raise TypeError(f"merge takes an HBitmap, not {type(other).__name__}; see update()")
        self._operate(_core.hbitmap_merge, other)

    def _operate(self, operation: Operation, other: HBitmap) -> None:
        """self = self op other, in C."""
        if operation(self._hb, other._hb, self._hb):
            raise _core.mismatch(self._hb, other._hb)
        self._clears += 1

    def _union(self, other: HBitmap) -> HBitmap:
        """A new bitmap of the shape of self: self or other."""
        result = HBitmap.__new__(HBitmap)
        result._adopt(_core.hbitmap_union(self._hb, other._hb), self._granularity, None)
        return result

    def _operation(self, operation: Operation, other: HBitmap) -> HBitmap:
        """A new bitmap of the shape of self: self op other, in C."""
        result = HBitmap(self.size, self._granularity)
        if operation(self._hb, other._hb, result._hb):
            raise _core.mismatch(self._hb, other._hb)
        return result

    def _coerce(self, other: Iterable[object], strict: bool) -> HBitmap:
        """``other``, or the groups of its elements as a bitmap of the shape of self.

        Elements that are no items of the bitmap are refused if ``strict``, else ignored.
        """
        if isinstance(other, HBitmap):
            return other
        result = HBitmap(self.size, self._granularity)
        result._mark_items(self._items_of(other, strict))
        return result

    def _items_of(self, elements: Iterable[object], strict: bool) -> array[int]:
        size = self.size
        items = array("Q")
        for element in elements:
            try:
                item = index(cast(int, element))
            except TypeError:
                if strict:
                    raise
                continue
            if 0 <= item < size:
                items.append(item)
            elif strict:
                raise _core.out_of_range(self._hb, item, 1)
        return items

    def _mark_items(self, items: array[int]) -> None:
        self.set_many(items, array("Q", [1]) * len(items))

    def update(self, *others: Iterable[int]) -> None:
        """Mark the groups of all elements of the others, or of none if one is refused.

        :raises MismatchError: if another HBitmap has another size (granularities may differ)
        :raises RangeError: if an element is not inside the bitmap
        """
        ready: list[HBitmap | array[int]] = []
        for other in others:
            if not isinstance(other, HBitmap):
                ready.append(self._items_of(other, strict=True))
            elif other.size != self.size:
                raise _core.mismatch(self._hb, other._hb)
            else:
                ready.append(other)
        for other in ready:
            if isinstance(other, HBitmap):
                self.merge(other)
            else:
                self._mark_items(other)

    def _operate_all(self, operation: Operation, others: Iterable[Iterable[object]]) -> None:
        """self = self op other for each of them, or for none if one does not fit."""
        ready = [self._coerce(other, strict=False) for other in others]
        for other in ready:
            if other._granularity != self._granularity or other.size != self.size:
                raise _core.mismatch(self._hb, other._hb)
        for other in ready:
            self._operate(operation, other)

    def intersection_update(self, *others: Iterable[object]) -> None:
        """Keep only the groups that all others have elements in.

        :raises MismatchError: if another HBitmap has another size or granularity
        """
        self._operate_all(_core.hbitmap_and, others)

    def difference_update(self, *others: Iterable[object]) -> None:
        """Clean the groups that one of the others has elements in.

        :raises MismatchError: if another HBitmap has another size or granularity
        """
        self._operate_all(_core.hbitmap_andnot, others)

    def symmetric_difference_update(self, other: Iterable[int]) -> None:
        """Flip the groups that the other has elements in (each once).

        :raises MismatchError: if another HBitmap has another size or granularity
        :raises RangeError: if an element is not inside the bitmap
        """
        self._operate(_core.hbitmap_xor, self._coerce(other, strict=True))

    def union(self, *others: Iterable[int]) -> HBitmap:
        """A new bitmap, of this one's granularity: see :meth:`update`."""
        result = self.copy()
        result.update(*others)
        return result

    def intersection(self, *others: Iterable[object]) -> HBitmap:
        """A new bitmap: see :meth:`intersection_update`."""
        result = self.copy()
        result.intersection_update(*others)
        return result

    def difference(self, *others: Iterable[object]) -> HBitmap:
        """A new bitmap: see :meth:`difference_update`."""
        result = self.copy()
        result.difference_update(*others)
        return result

    def symmetric_difference(self, other: Iterable[int]) -> HBitmap:
        """A new bitmap: see :meth:`symmetric_difference_update`."""
        return self._operation(_core.hbitmap_xor, self._coerce(other, strict=True))

    # The operators take any iterable, as those of collections.abc.Set do.

    def __or__(self, other: Iterable[int]) -> HBitmap:  # type: ignore[override]
        if not isinstance(other, Iterable):
            return NotImplemented
        return self._union(self._coerce(other, strict=True))

    def __and__(self, other: Iterable[object]) -> HBitmap:
        if not isinstance(other, Iterable):
            return NotImplemented
        return self._operation(_core.hbitmap_and, self._coerce(other, strict=False))

    def __sub__(self, other: Iterable[object]) -> HBitmap:
        if not isinstance(other, Iterable):
            return NotImplemented
        return self._operation(_core.hbitmap_andnot, self._coerce(other, strict=False))

    def __xor__(self, other: Iterable[int]) -> HBitmap:  # type: ignore[override]
        if not isinstance(other, Iterable):
            return NotImplemented
        return self._operation(_core.hbitmap_xor, self._coerce(other, strict=True))

    __ror__ = __or__
    __rand__ = __and__
    __rxor__ = __xor__

    def __rsub__(self, other: Iterable[int]) -> HBitmap:
        if not isinstance(other, Iterable):
            return NotImplemented
        return self._coerce(other, strict=True).difference(self)

    def __ior__(self, other: Iterable[int]) -> HBitmap:  # type: ignore[override]
        if not isinstance(other, Iterable):
            return NotImplemented
        self.update(other)
        return self

    def __iand__(self, other: Iterable[object]) -> HBitmap:
        if not isinstance(other, Iterable):
            return NotImplemented
        self.intersection_update(other)
        return self

    def __isub__(self, other: Iterable[object]) -> HBitmap:
        if not isinstance(other, Iterable):
            return NotImplemented
        self.difference_update(other)
        return self

    def __ixor__(self, other: Iterable[int]) -> HBitmap:  # type: ignore[override]
        if not isinstance(other, Iterable):
            return NotImplemented
        self.symmetric_difference_update(other)
        return self

    # Comparisons with other sets are literal: set(hb) against theirs.

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """With an HBitmap: the same size, granularity and bits."""
        if isinstance(other, HBitmap):
            return bool(_core.hbitmap_equal(self._hb, other._hb))
        if not isinstance(other, AbstractSet):
            return NotImplemented
        return len(self) == len(other) and all(item in other for item in self)

    def __le__(self, other: AbstractSet[Any]) -> bool:
        """
        :raises MismatchError: if another HBitmap has another size or granularity
        """
        if isinstance(other, HBitmap):
            return self._compare(_core.hbitmap_is_subset, self, other)
        if not isinstance(other, AbstractSet):
            return NotImplemented
        return all(item in other for item in self)

    def __ge__(self, other: AbstractSet[Any]) -> bool:
        """
        :raises MismatchError: if another HBitmap has another size or granularity
        """
        if isinstance(other, HBitmap):
            return self._compare(_core.hbitmap_is_subset, other, self)
        if not isinstance(other, AbstractSet):
            return NotImplemented
        return frozenset(self) >= frozenset(other)

    def __lt__(self, other: AbstractSet[Any]) -> bool:
        if not isinstance(other, AbstractSet):
            return NotImplemented
        return self <= other and self != other

    def __gt__(self, other: AbstractSet[Any]) -> bool:
        if not isinstance(other, AbstractSet):
            return NotImplemented
        return self >= other and self != other

    def isdisjoint(self, other: Iterable[Any]) -> bool:
        """Have they no element in common?

        :raises MismatchError: if another HBitmap has another size or granularity
        """
        if isinstance(other, HBitmap):
            return self._compare(_core.hbitmap_is_disjoint, self, other)
        elements = _as_set(other)
        return not any(item in elements for item in self)

    def issubset(self, other: Iterable[Any]) -> bool:
        """Are all elements in the other too?"""
        return self <= _as_set(other)

    def issuperset(self, other: Iterable[Any]) -> bool:
        """Are all elements of the other in here too?"""
        return self >= _as_set(other)

    @staticmethod
    def _compare(function: Callable[[CData, CData], int], a: HBitmap, b: HBitmap) -> bool:
        answer = function(a._hb, b._hb)
        if answer < 0:
            raise _core.mismatch(a._hb, b._hb)
        return bool(answer)

    # ---- whole bitmaps ----------------------------------------------------------------------

    def drain(
        self, start: int = 0, count: int | None = None, into: HBitmap | None = None
    ) -> HBitmap:
        """Move the dirty bits of a range out of here; returns the bitmap that has them now.

        A mark that another thread makes meanwhile is in one of the two bitmaps, never in none
        and never in both. If what was taken may have to be put back, use :meth:`taking`.

        :param start: a whole number of groups, in items
        :param count: None: to the end
        :param into: takes the bits to those it has; None: a new bitmap
        :raises RangeError: if the range is not inside the bitmap
        :raises InvalidError: if it cuts a group, or ``into`` is this bitmap
        :raises MismatchError: if ``into`` has another size or granularity
        """
        start, count = self._to_the_end(start, count)
        drain = _core.hbitmap_drain
        if into is None:
            into = HBitmap(self.size, self._granularity)
            drain = _core.hbitmap_drain_fresh
        elif not isinstance(into, HBitmap):
            raise TypeError(f"into must be an HBitmap, not {type(into).__name__}")
        elif into is self:
            raise InvalidError("a bitmap cannot be drained into itself")
        elif into._granularity != self._granularity or into.size != self.size:
            raise _core.mismatch(self._hb, into._hb)
        try:
            code = drain(self._hb, start, count, into._hb)
        except OverflowError:
            raise _core.out_of_range(self._hb, start, count) from None
        if code:
            raise _core.failed(code, self._hb, start, count)
        self._clears += 1
        return into

    def taking(self) -> Taken:
        """``with hb.taking() as taken``: what is dirty, to be dropped only if that is said.

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> with hb.taking() as taken:
        ...     copied = list(taken)
        ...     hb.add(3)                     # marks go on, and are not in what was taken
        ...     taken.done()                  # without this, all is put back
        >>> copied, list(hb)
        ([1, 2], [3])

        Writer: a mark is in what was taken or here, never in none. Left without ``done()``, by
        whichever way: all is marked here again. Dropped: the same, with a ResourceWarning. A killed
        process has lost the one as the other. Twin: who takes meanwhile gets what is marked
        meanwhile.
        """
        return Taken(self)

    def truncate(self, size: int) -> None:
        """Change the size. New items are clean; groups wholly beyond the end go.

        The old memory is kept until the bitmap goes, for calls of other threads that are still in
        it: a bitmap whose size changes all the time grows.

        :raises BufferError: while the bitmap is pinned, or :attr:`words` of it exist
        :raises InvalidError: for a size that no bitmap of this granularity can have
        """
        size = index(size)
        _core.check_size(size, self._granularity)
        code = _core.hbitmap_truncate(self._hb, size)
        if code == -errno.EBUSY:
            raise BufferError("the bitmap cannot be resized while it is pinned or exported")
        if code:
            raise _core.no_memory(size, self._granularity)
        self._clears += 1

    @property
    def words(self) -> memoryview:
        """The leaf words, live: read-only, format 'Q', shape (max(1, groups / 64 rounded up),).

        Bit ``n % 64`` of word ``n // 64`` is group ``n``, in the machine's byte order. While the
        view exists the bitmap cannot be truncated (on PyPy: until its collector has seen that the
        view is gone).
        """
        return _core.pinned_words(self._hb, self._memory).cast("Q")

    def sha256(self) -> str:
        """SHA-256 of the leaf words as little-endian bytes, in hex: the same on every machine.

        It is that of QEMU's x-debug-block-dirty-bitmap-sha256 on little-endian machines of 64 bits;
        on others that command hashes its memory as it is.
        """
        digest = hashlib.sha256()
        with self.pin(), _core.words(self._hb) as words:
            # Not at once: it could not be interrupted.
            for start in range(0, len(words), _DIGEST_STEP):
                digest.update(_little_endian(words[start : start + _DIGEST_STEP]))
        return digest.hexdigest()

    def pin(self) -> Pin:
        """The ``HBitmap *`` for native code: ``pin.address``, or ``with hb.pin() as address``.

        Valid until the pin is closed; it keeps the bitmap, also if nothing else has it any more,
        and meanwhile :meth:`truncate` raises BufferError. All functions of ``csrc/hbitmap.h`` but
        ``hbitmap_free`` and ``hbitmap_truncate`` may be called on it, from any thread; iterators of
        Python's do not hear of bits that native code clears. Fork, dropped, twin: see
        :class:`pybitmap.native.Pin`.

        >>> hb = HBitmap(100)
        >>> with hb.pin() as address:
        ...     address > 0
        True
        """
        hb = self._hb
        pinned, owner = _core.pin(hb, self._memory)
        return Pin(
            "a bitmap", _core.address(hb), (owner, self), partial(_core.hbitmap_drop_pin, pinned)
        )

    # ---- serialisation ----------------------------------------------------------------------

    def serialize(self, start: int = 0, count: int | None = None) -> bytes:
        """The bits of a chunk as little-endian 64-bit words, the same on every machine.

        ``start`` and ``count`` (None: to the end) are multiples of ``64 << granularity`` items;
        the last chunk may end at the end of the bitmap.

        :raises RangeError: if the chunk is not inside the bitmap
        :raises InvalidError: if it is not aligned, or the granularity is 58 or more
        """
        start, count = self._to_the_end(start, count)
        self._check_serializable()
        size, group = self.size, 1 << self._granularity
        # The size rounded up to whole groups, as far as C accepts a chunk.
        if not 0 <= start <= size or not 0 <= count <= -(-size // group) * group - start:
            raise _core.out_of_range(self._hb, start, count)
        # From the arguments alone: if another thread truncates now, C may accept a chunk that does
        # not fit the size of before, and every chunk of this count has as many words.
        nbytes = 8 * -(-count // _core.hbitmap_serialization_align(self._hb))
        code, data = filled_bytes(
            nbytes, lambda data: _core.hbitmap_serialize_part(self._hb, data, start, count)
        )
        if code:
            raise self._bad_chunk(code, start, count)
        return data

    def deserialize(self, data: ReadableBuffer, start: int = 0) -> None:
        """Replace the bits from ``start`` on by those in ``data``; see :meth:`serialize`.

        Bits beyond the end of the bitmap are dropped. Not to be called beside marks.

        :param data: a buffer of bytes: whole words, not more than there are from ``start`` on
        :raises RangeError: if ``start`` is not inside the bitmap
        :raises InvalidError: for data of another length, or a ``start`` that is not aligned
        """
        start = index(start)
        c_data, nbytes = _core.byte_array("data", data)
        with c_data:
            self._check_serializable()
            size = self.size
            if not 0 <= start <= size:
                raise _core.out_of_range(self._hb, start, 0)
            align = _core.hbitmap_serialization_align(self._hb)
            most = 8 * -(-(size - start) // align)
            if nbytes % 8 or nbytes > most:
                raise InvalidError(
                    f"{nbytes} bytes of data: from item {start} on the bitmap of {size} items "
                    f"takes whole 8-byte words, {most} bytes at most"
                )
            count = size - start if nbytes == most else nbytes // 8 * align
            code = _core.hbitmap_deserialize_part(self._hb, c_data, start, count, True)
            if code:
                raise self._bad_chunk(code, start, count)
            self._clears += 1

    def _check_serializable(self) -> None:
        if not _core.hbitmap_is_serializable(self._hb):
            raise InvalidError(f"granularity {self._granularity} is not serializable (at most 57)")

    def _bad_chunk(self, code: int, start: int, count: int) -> Exception:
        if code == -errno.EINVAL:
            return InvalidError(
                f"chunk [{start}, {start + count}) is not aligned to "
                f"{_core.hbitmap_serialization_align(self._hb)} items"
            )
        return _core.failed(code, self._hb, start, count)

    @classmethod
    def from_bytes(cls, data: ReadableBuffer, size: int, granularity: int = 0) -> HBitmap:
        """A bitmap from all of what :meth:`serialize` gave.

        :raises InvalidError: if ``data`` is not just as long as such a bitmap's
        """
        hb = cls(size, granularity)
        nbytes = _core.byte_array("data", data)[1]
        expected = _core.hbitmap_serialization_size(hb._hb, 0, hb.size)
        hb._check_serializable()
        if nbytes != expected:
            raise InvalidError(
                f"{nbytes} bytes of data: a bitmap of {hb.size} items, granularity "
                f"{hb._granularity}, has {expected}"
            )
        hb.deserialize(data)
        return hb

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Leaf words where more than 1/8 of them are not zero, else areas.

        From protocol 5 on they can go out of band.
        """
        nwords = _core.nwords_of(self.size, self._granularity)
        dense = (
            _core.hbitmap_is_serializable(self._hb)
            and 8 * _core.hbitmap_nonzero_words(self._hb) > nwords
        )
        data: Any
        if dense:
            data = self.serialize()
        else:
            areas = self.areas_array()
            data = _little_endian(areas.cast("B") if areas.nbytes else b"")
        if index(cast(int, protocol)) >= 5:
            data = PickleBuffer(data if isinstance(data, bytes) else bytes(data))
        elif not isinstance(data, bytes):
            data = bytes(data)
        return _unpickle, (self.size, self._granularity, dense, data)


class Taken(HBitmap):
    """What was dirty in a bitmap, out of it for now; made by :meth:`HBitmap.taking`."""

    # What puts it back when it goes, whatever interrupts that; and what it does that with.
    __slots__ = ("_back", "_pair")

    def __init__(self, source: HBitmap) -> None:
        made = _core.hbitmap_alloc(source.size, source.granularity)
        self._adopt(made, source.granularity, None)
        self._pair = _core.new("HBitmap *[]", [source._hb, self._hb])
        self._back = _core.own(self._pair, "hbitmap_put_back", (self._pair, source, made))
        source.drain(into=self)  # last: whatever was taken goes back

    def done(self) -> None:
        """It need not be put back."""
        self._pair[0] = _core.NULL

    def close(self) -> None:
        """Mark it in its bitmap again, unless it is done; may be called twice."""
        _core.hbitmap_put_back(self._pair)

    def __enter__(self) -> Taken:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_pair") and self._pair[0]:
            self.close()
            warnings.warn(
                "what was taken from a bitmap was dropped without close(); it is put back",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )


_pointer = HBitmap.__dict__["_hb"]


def pointers(bitmaps: Iterable[HBitmap]) -> list[CData]:
    """The ``HBitmap *`` of bitmaps, each valid as long as its bitmap exists; torn ones, too."""
    return [_pointer.__get__(each) for each in bitmaps]


def _as_set(elements: Iterable[Any]) -> AbstractSet[Any]:
    return elements if isinstance(elements, AbstractSet) else frozenset(elements)


def _little_endian(data: ReadableBuffer) -> ReadableBuffer:
    """uint64 of this machine as little-endian ones, or back."""
    if sys.byteorder == "little":
        return data
    words = array("Q", bytes(data))
    words.byteswap()
    return words.tobytes()


def _unpickle(size: int, granularity: int, dense: bool, data: ReadableBuffer) -> HBitmap:
    if dense:
        return HBitmap.from_bytes(data, size, granularity)
    hb = HBitmap(size, granularity)
    areas = array("Q", bytes(_little_endian(data)))
    hb.set_many(areas[::2], areas[1::2])
    return hb


def check_whole(hb: HBitmap) -> None:
    """
    :raises StateError: if another thread was changing it when this process was forked
    """
    hb._hb  # noqa: B018


@in_child
def _after_fork() -> None:
    """In the child: from now on, refuse bitmaps that are torn, if there is one."""
    if not _core.hbitmap_torn(_core.NULL) or isinstance(HBitmap.__dict__["_hb"], property):
        return

    def get(self: HBitmap) -> CData:
        hb = _pointer.__get__(self)
        if _core.hbitmap_torn(hb):
            raise StateError(
                "another thread was changing this bitmap when the process was forked, and is not "
                "in the child: what is dirty is not known here"
            )
        return hb

    HBitmap._hb = property(get, _pointer.__set__)
    leave_aside()
