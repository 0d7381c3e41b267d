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

import copy
import errno
import hashlib
import sys
import warnings
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, MutableSet
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import partial
from operator import index
from pickle import PickleBuffer
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, SupportsIndex, TypeVar, cast

from . import _core
from ._core import (
    CData,
    hbitmap_count,
    hbitmap_count_range,
    hbitmap_get,
    hbitmap_granularity,
    hbitmap_iter_fill,
    hbitmap_iter_init,
    hbitmap_reset,
    hbitmap_set,
    hbitmap_take,
)
from ._entry import _fast, filled_bytes, in_front, leave_aside
from ._fork import in_child
from .arrays import Areas, Items
from .errors import InvalidError, RangeError, StateError
from .extent import Extent, Extents, batches, cut_in_blocks, with_gaps
from .native import Pin

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from typing_extensions import Self

    from ._typing import Integers, Mask, Readable, Writable

    Operation = Callable[[CData, CData, CData], int]

_TO_THE_END = _core.MAX_SIZE

_DIGEST_STEP = 1 << 24  # bytes
_FIRST_AREAS = 4096  # that areas_array has room for at first, and items_array for items
_AT_ONCE = 1 << 16  # items of a range with a step that are marked by one call


#: How many items or areas an iterator fetches at a time: the first time, and at most.
FIRST_BATCH, LAST_BATCH = 16, 1024

_Item = TypeVar("_Item")


class PythonHinted(Iterator[_Item]):
    """What ``iterator`` gives, with a ``__length_hint__``, which generators lack.

    ``hint()`` says how many that were in all. Both go when the iterator has come to its end.
    ``_fast`` has the same in C.
    """

    __slots__ = ("_given", "_hint", "_iterator")

    def __init__(self, iterator: Iterator[_Item], hint: Callable[[], int]) -> None:
        self._iterator: Iterator[_Item] = iterator
        self._hint: Callable[[], int] | None = hint
        self._given = 0

    def __next__(self) -> _Item:
        try:
            item = next(self._iterator)
        except StopIteration:
            self._iterator, self._hint = iter(()), None
            raise
        self._given += 1
        return item

    def __length_hint__(self) -> int:
        hint = self._hint
        return 0 if hint is None else max(0, hint() - self._given)


Hinted: type[PythonHinted[Any]] = PythonHinted if _fast is None else _fast.Hinted


def hinted(iterator: Iterator[_Item], hint: Callable[[], int]) -> Iterator[_Item]:
    """See :class:`PythonHinted`."""
    return Hinted(iterator, hint)


class CffiBase(_core.CffiEntry):
    """What HBitmap is called for most."""

    __slots__ = ("_clears",)

    _hb: CData

    def _attach(self, address: int, owner: _core.Owner) -> None:
        super()._attach(address, owner)
        self._clears = 0

    def set(self, start: int, count: int = 1) -> None:
        """Mark every group that the ``count`` items from ``start`` on touch; 0 marks nothing.

        :raises RangeError: (a ValueError) if the range is not inside the bitmap

        >>> hb = HBitmap(100, group_size=8)
        >>> hb.set(15, 10)                        # touches two groups
        >>> list(hb.areas())
        [(8, 24)]
        """
        if type(start) is not int or type(count) is not int:
            start, count = index(start), index(count)
        try:
            code = hbitmap_set(self._hb, start, count)
        except OverflowError:
            raise _core.out_of_range(self._hb, start, count) from None
        if code:
            raise _core.failed(code, self._hb, start, count)

    def add(self, item: int) -> None:
        """Mark the group of ``item``.

        :raises RangeError: if it is not inside the bitmap

        >>> hb = HBitmap(100)
        >>> hb.add(7)
        >>> list(hb)
        [7]
        """
        self.set(item)

    def discard(self, item: object) -> None:
        """Clean the group of ``item``; whatever is no item of a dirty group is ignored.

        >>> hb = HBitmap(100)
        >>> hb.add(7)
        >>> hb.discard(7); hb.discard("no item")
        >>> len(hb)
        0
        """
        self._take(item)

    def remove(self, item: object) -> None:
        """Clean the group of ``item``.

        :raises KeyError: if it is no item of a dirty group

        >>> hb = HBitmap(100)
        >>> hb.add(7)
        >>> hb.remove(7)
        >>> hb.remove(7)
        Traceback (most recent call last):
        KeyError: 7
        """
        if not self._take(item):
            raise KeyError(item)

    def _take(self, item: object) -> bool:
        try:
            taken = hbitmap_take(self._hb, index(cast(int, item)))
        except (TypeError, OverflowError):
            return False
        self._clears += 1
        return taken == 1

    def get(self, item: int) -> bool:
        """Is the group of ``item`` dirty? Beyond the end of the bitmap: False.

        :raises RangeError: if ``item`` is negative

        >>> hb = HBitmap(100, group_size=8)
        >>> hb.set(15)
        >>> hb.get(12), hb.get(16), hb.get(1000)
        (True, False, False)
        """
        item = index(item)
        try:
            return hbitmap_get(self._hb, item)
        except OverflowError:
            if item < 0:
                raise _core.out_of_range(self._hb, item, 1) from None
            return False

    def __contains__(self, item: object) -> bool:
        """Is it an item of a dirty group? Never an error."""
        try:
            return hbitmap_get(self._hb, item if type(item) is int else index(cast(int, item)))
        except (TypeError, ValueError, OverflowError):
            return False

    def _items(self, first: int) -> Iterator[int]:
        """For iter(): ``first`` is what C takes."""
        return hinted(self._batches(first), lambda: self._groups_from(first))

    def _groups_from(self, first: int) -> int:
        """How many iter(first) would give; a hint: other threads may mark and clear."""
        granularity = hbitmap_granularity(self._hb)
        start = first >> granularity << granularity
        # The last group may be cut.
        return -(-hbitmap_count_range(self._hb, start, _core.MAX_SIZE) >> granularity)

    def _batches(self, first: int) -> Iterator[int]:
        hbi = _core.new("HBitmapIter *")
        hbitmap_iter_init(hbi, self._hb, first)
        batch = FIRST_BATCH
        items = _core.new("uint64_t[]", LAST_BATCH)
        while True:
            clears = self._clears
            nitems = hbitmap_iter_fill(hbi, items, batch)
            full = nitems == batch
            batch = min(2 * batch, LAST_BATCH)
            for item in _core.unpack(items, nitems):
                if self._clears != clears:
                    # The rest of the batch may not be dirty any more. Small steps from here
                    # on: whoever clears what they get will do so again.
                    hbitmap_iter_init(hbi, self._hb, item)
                    full, batch = True, 1
                    break
                yield item
            if not full:
                return


if TYPE_CHECKING:
    Base = CffiBase
else:
    Base = in_front(
        "Base",
        CffiBase,
        handed=["set", "add", "discard", "remove", "get", "__contains__", "_items"],
        kept=["_take", "_batches", "_groups_from"],
    )


class HBitmap(Base, MutableSet[int]):
    """A hierarchical bitmap of ``size`` items with one bit for ``group_size`` of them.

    :param size: in items (bytes, sectors, pages): 0..2**63 - 1, at most 2**41 groups
    :param granularity: log2 of the items that a bit stands for, 0..63, as QEMU has it; None: 0, so
        a bit for each
    :param group_size: the same as their number, a power of 2: 4096 is granularity 12
    :raises InvalidError: (a ValueError) if one of them is out of range, or both are given
    :raises MemoryError: if there is no memory; what is never marked takes none

    All clean at first. Memory: one bit per group, 1/63 more for the summaries; from 512 KiB on,
    pages that are never marked take none.

    Ranges are ``(start, count)`` everywhere; where an end is asked for, it has its name: ``end=``.

    Writer: marks of other threads go on beside every call and none is lost. Fork: the child has a
    copy and goes on with that; what another thread was clearing or changing in another way at that
    moment, but by a mark, is refused there (StateError). Kill: it goes with its process. Drop: the
    memory goes with the last reference. Twin: every call may run in several threads, and again in a
    signal handler of Python's.

    What operators and methods make has the class of the left operand; its ``__init__`` and
    ``__new__`` are not called for that. Attributes of a subclass's instances are in its pickles and
    in what ``copy.copy`` and ``copy.deepcopy`` make, not in other results.

    >>> hb = HBitmap(1 << 20, group_size=4096)
    >>> hb.set(5000, 4096)
    >>> list(hb.areas()), 5000 in hb, len(hb)
    ([(4096, 8192)], True, 2)
    >>> hb.size, hb.group_size, hb.granularity
    (1048576, 4096, 12)
    """

    # The base has set, get and __contains__, and _clears: how often bits may have been cleared, for
    # iterators that hold a batch of them.
    # What it was made over; None: memory of its own.
    __slots__ = ("__weakref__", "_granularity", "_hb", "_memory")

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.set is not Base.set and cls.add is Base.add:
            cls.add = CffiBase.add  # type: ignore[method-assign]  # by the subclass's own set

    def __init__(
        self, size: int, granularity: int | None = None, *, group_size: int | None = None
    ) -> None:
        if hasattr(self, "_hb"):  # which iterators and other threads may be using
            raise TypeError("an HBitmap is initialised once")
        granularity = _core.granularity_of(granularity, group_size)
        try:
            size = index(size)
        except TypeError:
            if not hasattr(size, "__iter__"):
                raise
            raise TypeError(
                f"HBitmap takes its size in items, not {type(size).__name__}: elements are marked "
                "by update(), a mask of bools makes a bitmap by from_mask()"
            ) from None
        self._adopt(_core.hbitmap_alloc(size, granularity), granularity, None)

    def _adopt(self, made: _core.Made, granularity: int, memory: _core.Memory | None) -> None:
        hb, owner = made
        self._attach(_core.address(hb), owner)
        self._hb = hb
        self._granularity = index(granularity)
        self._memory = memory

    @classmethod
    def over(
        cls,
        buffer: Writable,
        size: int,
        granularity: int | None = None,
        *,
        group_size: int | None = None,
    ) -> Self:
        """A bitmap whose leaf words lie in ``buffer``, with the bits that are set there.

        :param buffer: writable and contiguous, at an address that is a multiple of 8, of at least
            ``8 * max(1, ceil(groups / 64))`` bytes: a bytearray, a mapped file, a NumPy array. Bit
            ``n % 64`` of word ``n // 64`` is group ``n``, in the machine's byte order. Bits beyond
            the end are cleared
        :param size: in items; as ``granularity`` and ``group_size``: see :class:`HBitmap`
        :raises TypeError: if it is no writable buffer
        :raises InvalidError: if it is too small or not aligned, or for what HBitmap refuses

        A mark that has returned is in the buffer. That is exported until neither the bitmap nor a
        view of its :attr:`words` is left, so it cannot be resized or closed meanwhile; nor can the
        bitmap be truncated (BufferError). Copies and results have memory of their own. (PyPy lets
        bytearrays be resized and maps be closed all the same: do not, there it is a crash.)

        Writer: whoever changes the buffer in another way is not seen, and may undo marks. Kill: of
        a mapped file the next program finds what was marked, and lays a new bitmap over it. Fork:
        the child has a copy, unless the memory is shared (as ``mmap.mmap(-1, n)`` is): then
        only one of the two processes may go on with the bitmap. Drop: the buffer is given back,
        with its bits. Twin: a second bitmap over the same memory, in whatever process, is forbidden
        and not noticed: each misses what is marked by way of the other.

        >>> leaf = bytearray(8)
        >>> HBitmap.over(leaf, 64).set(8, 4)
        >>> leaf[1]
        15
        """
        granularity = _core.granularity_of(granularity, group_size)
        memory = _core.Memory(buffer)
        try:
            return cls._over(memory, size, granularity)
        except BaseException:
            memory.release()  # a traceback may keep it
            raise

    @classmethod
    def _over(cls, memory: _core.Memory, size: int, granularity: int) -> Self:
        """The same for memory that has been exported."""
        hb = _new(cls)
        hb._adopt(_core.hbitmap_alloc_on(size, granularity, memory), granularity, memory)
        return hb

    @property
    def _kind(self) -> type[Self]:
        """The class of what is made of it."""
        return type(self)

    def _like(self, made: _core.Made) -> Self:
        """A bitmap of that class over C memory that was just made, of its granularity."""
        result = _new(self._kind)
        result._adopt(made, self._granularity, None)
        return result

    # ---- marks ------------------------------------------------------------------------------

    def set_many(self, starts: Integers, counts: Integers | SupportsIndex = 1) -> None:
        """Mark the ranges ``(starts[i], counts[i])``, all or none of them.

        :param starts: n whole numbers, in items: a list, an array('Q'), any one-dimensional NumPy
            array, pandas or Polars Series of integers. Those of 64 bits that lie one after the
            other are not copied
        :param counts: the same, as many; or one number for all
        :raises RangeError: if one of the ranges is not inside the bitmap; it is named
        :raises TypeError: for anything but integers (bytes are refused, as they may be anything)
        :raises InvalidError: if the lengths differ, or there is more than one dimension

        Writer, twin: a mark, as :meth:`set`. Interrupted: one call of C marks all of them, so all
        or none are marked. Drop: the buffers are given back also by an error.

        >>> hb = HBitmap(100)
        >>> hb.set_many([3, 10, 20], [2, 1, 5])
        >>> hb.set_many([90, 92], 1)
        >>> list(hb.areas())
        [(3, 2), (10, 1), (20, 5), (90, 1), (92, 1)]
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

    def merge_bits(
        self,
        bits: Readable,
        start: int = 0,
        granularity: int | None = None,
        msb_first: bool = False,
        *,
        group_size: int | None = None,
    ) -> None:
        """Mark what a foreign flat bitmap has: a log of KVM's, vhost's, DRBD's, XenServer's.

        :param bits: a contiguous buffer; bit ``n`` is bit ``n % 8`` of byte ``n // 8``, counted
            from the lowest (as in little-endian words) or, with ``msb_first``, from the highest (as
            XenServer has it)
        :param start: the item that bit 0 begins with
        :param granularity: log2 of the items that a bit of theirs stands for, 0..63
        :param group_size: the same as their number; both None: as here
        :raises RangeError: if a bit is set that begins beyond the end; then nothing is marked.
            (What the last bit has beyond the end is dropped.)
        :raises TypeError: if it is no buffer
        :raises InvalidError: if it is not contiguous, or for another granularity

        Every group that a set bit touches is marked. It is a mark, and takes no lock. Writer: what
        is set in the buffer meanwhile may be marked or not, nothing else is. Interrupted: it is one
        call of C, which has come to its end. Fork: what another thread was marking so may be there
        in part. Drop: the buffer is given back also by an error. Twin: several may run at once.

        >>> hb = HBitmap(1 << 20, granularity=12)
        >>> hb.merge_bits(bytes([0b101]))
        >>> hb.merge_bits(bytes([0b10000000]), start=8192, granularity=16, msb_first=True)
        >>> list(hb.areas())
        [(0, 4096), (8192, 65536)]
        """
        start = index(start)
        if granularity is None and group_size is None:
            granularity = self._granularity
        granularity = _core.granularity_of(granularity, group_size)
        _core.check_granularity(granularity)
        with _core.raw_array("bits", bits) as c_bits:
            nbits = 8 * len(c_bits)
            try:
                code = _core.hbitmap_merge_bits(
                    self._hb, c_bits, nbits, start, granularity, bool(msb_first)
                )
            except OverflowError:
                code = -errno.ERANGE
            if code:
                raise RangeError(
                    f"bits of {1 << granularity} items, from item {start} on: one is set beyond "
                    f"the end of the bitmap of {self.size} items; nothing was marked"
                )

    def reset(self, start: int, count: int | None = None) -> None:
        """Clean the groups of a range; ``count`` None: the one group at ``start``.

        The range must consist of whole groups (at its end it may be cut by the end of the
        bitmap): a partly covered group never becomes clean.

        :raises RangeError: if the range is not inside the bitmap
        :raises InvalidError: if it cuts a group

        >>> hb = HBitmap(100, group_size=4)
        >>> hb.set(8, 12)
        >>> hb.reset(12)                          # the one group there
        >>> list(hb.areas())
        [(8, 4), (16, 4)]
        """
        self._call(hbitmap_reset, start, count)
        self._clears += 1

    def flip(self, start: int, count: int | None = None) -> None:
        """Dirty groups of a range become clean, clean ones dirty; ``count`` None: the one group at
        ``start``, in items, as ``count`` is.

        Whole groups, as for :meth:`reset`.

        :raises RangeError: if the range is not inside the bitmap
        :raises InvalidError: if it cuts a group

        Writer: a group that is marked meanwhile is dirty afterwards if it was clean before; if it
        was dirty, the mark may be taken for an earlier one. Interrupted: it has come to its end.
        Kill: of a mapped file, some groups may be flipped. Fork, drop, twin: as for every bitmap.

        >>> hb = HBitmap(8)
        >>> hb.set(2, 4)
        >>> hb.flip(0, 4)
        >>> list(hb)
        [0, 1, 4, 5]
        """
        self._call(_core.hbitmap_flip, start, count)
        self._clears += 1

    def _call(
        self, function: Callable[[CData, int, int], int], start: int, count: int | None
    ) -> None:
        """A function of C on a range of whole groups; ``count`` None: the one at ``start``."""
        start = index(start)
        count = 1 << self._granularity if count is None else index(count)
        try:
            code = function(self._hb, start, count)
        except OverflowError:
            raise _core.out_of_range(self._hb, start, count) from None
        if code:
            raise _core.failed(code, self._hb, start, count)

    def reset_all(self) -> None:
        """Clean everything.

        >>> hb = HBitmap(100)
        >>> hb.set(3, 10)
        >>> hb.reset_all()
        >>> len(hb)
        0
        """
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

    @property
    def group_size(self) -> int:
        """The number of items that a bit stands for.

        >>> HBitmap(1 << 20, granularity=12).group_size
        4096
        """
        return 1 << self._granularity

    def count(self, start: int | None = None, count: int | None = None) -> int:
        """Dirty items. Without arguments: of whole groups, so it may exceed the size, and takes
        no time if nothing has changed since it was last asked. With ``start``: in the ``count``
        items from there on (None: to the end), clipped to them and to the size.

        Writer: every mark that has returned before is in it, if nothing clears meanwhile.

        :raises RangeError: if ``start`` or ``count`` is negative

        >>> hb = HBitmap(1 << 20, group_size=4096)
        >>> hb.set(5000, 100)
        >>> hb.count(), hb.count(0, 5000), len(hb)
        (4096, 904, 1)
        """
        if start is None and count is None:
            return hbitmap_count(self._hb)
        start, count = self._search_range(0 if start is None else start, count)
        return _core.hbitmap_count_range(self._hb, start, count)

    def rank(self, item: int) -> int:
        """How many elements are at ``item`` or before it: dirty groups that begin there.

        As pyroaring's: that of ``item`` itself counts. Beyond the end: all.

        :raises RangeError: if ``item`` is negative

        Writer: of what is marked meanwhile some may count. It takes the lock, so no clear shows by
        half. Kill, fork, drop, twin: as for every bitmap.

        >>> hb = HBitmap(100)
        >>> hb.update([5, 7])
        >>> hb.rank(4), hb.rank(5), hb.rank(99)
        (0, 1, 2)
        """
        return _core.hbitmap_rank(self._hb, self._search_range(item, None)[0])

    def select(self, n: int) -> int:
        """The element that has ``n`` before it: the start of a dirty group, in items.

        So ``select(rank(item) - 1)`` is ``item``, if that is an element.

        :raises RangeError: (an IndexError) if there are not so many, or ``n`` is negative

        Writer: what is marked meanwhile may count. It takes the lock, so no clear shows by half.
        Kill, fork, drop, twin: as for every bitmap.

        >>> hb = HBitmap(100)
        >>> hb.update([5, 7])
        >>> hb.select(0), hb.select(1)
        (5, 7)
        """
        n = index(n)
        item = _core.hbitmap_select(self._hb, n) if 0 <= n <= _core.MAX_SIZE else -1
        if item < 0:
            raise RangeError(f"there is no element {n}: the bitmap has {len(self)}, from 0 on")
        return item

    def empty(self) -> bool:
        """Is nothing dirty? A mark that returned before is seen, whatever is cleared meanwhile.

        >>> hb = HBitmap(100)
        >>> hb.empty()
        True
        """
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
            raise TypeError(
                "slices can only be assigned to; see to_mask(start, end=end), areas() and status()"
            )
        try:
            item = index(item)
        except TypeError:
            raise TypeError(
                f"hb[item] takes one whole number, not {type(item).__name__}: of many, see "
                "to_mask() and items_array()"
            ) from None
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
            try:
                start, count = index(key), 1
            except TypeError:
                raise TypeError(
                    f"hb[item] takes one whole number, not {type(key).__name__}: many are marked "
                    "by update() and cleaned by difference_update(), a mask goes to from_mask()"
                ) from None
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

    def _repr_html_(self) -> str:
        """For notebooks: a picture of where it is dirty, in SVG, of bounded size.

        Never raises. Writer: a mark that returned before shows, if nothing clears meanwhile; one
        made meanwhile may. Kill, fork, drop, twin: as for every bitmap; one that cannot be looked
        at is told by its ``repr``.
        """
        from .picture import picture, shown

        return shown(self, lambda: picture(self, type(self).__name__))

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

        >>> hb = HBitmap(100)
        >>> hb.update([3, 50, 70])
        >>> list(hb.iter(10))
        [50, 70]
        """
        return self._items(self._search_range(first, None)[0])

    def areas(self, start: int = 0, *, end: int | None = None) -> Iterator[tuple[int, int]]:
        """The dirty areas ``(start, count)`` in order, in items, clipped to ``[start, end)``.

        What happens to the bitmap meanwhile counts as for :meth:`iter`.

        :raises RangeError: if ``start`` or ``end`` is negative

        >>> hb = HBitmap(100)
        >>> hb.set_many([3, 50], [2, 10])
        >>> list(hb.areas()), list(hb.areas(4, end=55))
        ([(3, 2), (50, 10)], [(4, 1), (50, 5)])
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

    def areas_array(self, start: int = 0, *, end: int | None = None) -> Areas:
        """The areas of :meth:`areas` at once, for NumPy, pandas, Polars and pyarrow.

        ``numpy.asarray`` takes it without a copy: uint64, shape (n, 2). In a table the columns are
        called ``offset`` and ``length``: see :class:`pybitmap.arrays.Areas`.

        :raises RangeError: if ``start`` or ``end`` is negative

        Writer: what is marked or cleared meanwhile is in it or not. Interrupted: nothing is left.
        Kill, fork, drop, twin: as for every bitmap; the array is a copy.

        >>> hb = HBitmap(100)
        >>> hb.set(10, 20)
        >>> hb.areas_array().tolist()
        [[10, 20]]
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
        return Areas(memoryview(_core.buffer(pairs, 16 * max(1, nareas))).cast("Q"), nareas)

    def items_array(self, start: int = 0, *, end: int | None = None) -> Items:
        """The starts of the dirty groups that have items in ``[start, end)``, at once and in order,
        in items.

        ``numpy.asarray`` takes it without a copy (uint64, shape (n,)), and so does :meth:`update`.
        In a table the column is called ``offset``: see :class:`pybitmap.arrays.Items`.

        :raises RangeError: if ``start`` or ``end`` is negative

        Writer: what is marked or cleared meanwhile is in it or not. Interrupted: nothing is left.
        Kill, fork, drop, twin: as for every bitmap; the array is a copy.

        >>> hb = HBitmap(100, granularity=1)
        >>> hb.update([5, 7, 50])
        >>> hb.items_array(5, end=50).tolist()
        [4, 6]
        """
        start, end = self._search_bounds(start, end)
        room, nitems = _FIRST_AREAS, 0
        items = _core.new_words(room)
        hbi = _core.new("HBitmapIter *")
        hbitmap_iter_init(hbi, self._hb, start)
        while start < end:
            nitems += hbitmap_iter_fill(hbi, items + nitems, room - nitems)
            if nitems < room or items[nitems - 1] >= end:
                break
            start = items[nitems - 1] + 1
            # For all of them, and for some that are marked meanwhile.
            nmore = _core.hbitmap_count_range(self._hb, start, end - start) >> self._granularity
            room += nmore + LAST_BATCH
            more = _core.new_words(room)
            _core.move(more, items, 8 * nitems)
            items = more
        view = memoryview(_core.buffer(items, 8 * max(1, nitems))).cast("Q")
        return Items(view, bisect_left(view, end, 0, nitems))

    def to_mask(self, start: int = 0, *, end: int | None = None) -> memoryview:
        """A bool for each group that has items in ``[start, end)``, True where it is dirty: a
        memoryview of format '?', which ``numpy.asarray`` takes without a copy.

        Element ``i`` is the group that begins at item ``(start // group_size + i) * group_size``,
        so ``numpy.flatnonzero(hb.to_mask()) * hb.group_size`` are the elements. It has a byte for
        each group, dirty or not: :meth:`items_array` grows with what is dirty.

        :raises RangeError: if ``start`` or ``end`` is negative

        Writer: marks that have returned before are in it, if nothing clears meanwhile. It takes the
        lock, so no clear shows by half. Interrupted: nothing is left. Kill, fork, drop, twin: as
        for every bitmap; the mask is a copy.

        >>> hb = HBitmap(10, group_size=2)
        >>> hb.set(5, 2)
        >>> hb.to_mask().tolist()
        [False, False, True, True, False]
        """
        start, end = self._search_bounds(start, end)
        bits = self._granularity
        first = start >> bits
        while True:
            size = self.size
            last = min(end, size)
            nbits = -(-last >> bits) - first if start < last else 0
            # For a bitmap of that size it cannot be refused; another thread may give it another.
            with suppress(RangeError, InvalidError):
                data, head = self._words_from(first, nbits, size) if nbits else (b"", 0)
                break
        mask = bytearray(head + nbits)
        with _core.raw_array("bits", data) as c_bits, _core.raw_array("a mask", mask) as c_mask:
            _core.hbmask_unpack(c_mask, c_bits, len(mask))
        bools: Any = memoryview(mask).cast("?")[head:]
        return cast(memoryview, bools)

    def _words_from(self, first: int, nbits: int, size: int) -> tuple[bytes, int]:
        """Little-endian words that have the bits of some groups; and how many bits are before."""
        bits = self._granularity
        if not _core.hbitmap_is_serializable(self._hb):  # 2**63 items are 32 groups then, at most
            word = sum(self.get(first + i << bits) << i for i in range(nbits))
            return word.to_bytes(8, "little"), 0
        head = first % 64  # a chunk has whole words
        nwords = -(-(head + nbits) // 64)
        start = first - head << bits
        return self.serialize(start, min(64 * nwords << bits, size - start)), head

    def next_dirty(self, start: int, count: int | None = None) -> int | None:
        """The first dirty item of the ``count`` items from ``start`` on (None: to the end).

        :raises RangeError: if one of them is negative

        >>> hb = HBitmap(100)
        >>> hb.set(20, 10)
        >>> hb.next_dirty(0), hb.next_dirty(25), hb.next_dirty(30), hb.next_dirty(0, 20)
        (20, 25, None, None)
        """
        item = _core.hbitmap_next_dirty(self._hb, *self._search_range(start, count))
        return None if item < 0 else item

    def next_zero(self, start: int, count: int | None = None) -> int | None:
        """The first clean item of the ``count`` items from ``start`` on (None: to the end).

        :raises RangeError: if one of them is negative

        >>> hb = HBitmap(100)
        >>> hb.set(20, 10)
        >>> hb.next_zero(0), hb.next_zero(20), hb.next_zero(20, 5)
        (0, 30, None)
        """
        item = _core.hbitmap_next_zero(self._hb, *self._search_range(start, count))
        return None if item < 0 else item

    def prev_dirty(self, start: int | None = None, count: int | None = None) -> int | None:
        """The last dirty item of the ``count`` items up to ``start`` (None: to the beginning).

        ``start`` is looked at, too; None, or beyond the end: the last item. The mirror of
        :meth:`next_dirty`, and like that it takes no lock: what other threads mark or clear
        meanwhile may be found or not.

        :raises RangeError: if one of them is negative

        Kill, fork, drop, twin: as for every bitmap.

        >>> hb = HBitmap(100)
        >>> hb.set(20, 10)
        >>> hb.prev_dirty(), hb.prev_dirty(25), hb.prev_dirty(50, 10)
        (29, 25, None)
        """
        start = max(0, self.size - 1) if start is None else start
        item = _core.hbitmap_prev_dirty(self._hb, *self._search_range(start, count))
        return None if item < 0 else item

    def next_dirty_area(
        self, start: int, *, end: int | None = None, max_count: int | None = None
    ) -> tuple[int, int] | None:
        """The first dirty area ``(start, count)`` in ``[start, end)``, at most ``max_count`` long.

        :raises RangeError: if ``start`` or ``end`` is negative
        :raises InvalidError: if ``max_count`` is less than 1

        >>> hb = HBitmap(100)
        >>> hb.set(20, 10)
        >>> hb.next_dirty_area(0), hb.next_dirty_area(25, max_count=3)
        ((20, 10), (25, 3))
        >>> hb.next_dirty_area(0, end=20) is None
        True
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

        >>> hb = HBitmap(100)
        >>> hb.set(20, 10)
        >>> hb.status(0), hb.status(20), hb.status(30), hb.status(100)
        ((False, 20), (True, 10), (False, 70), (False, 0))
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

    # ---- extents ----------------------------------------------------------------------------

    @classmethod
    def from_extents(
        cls,
        extents: Extents,
        size: int | None = None,
        granularity: int | None = None,
        *,
        group_size: int | None = None,
    ) -> Self:
        """A bitmap in which the extents are dirty, rounded outwards to groups.

        :param extents: ``(start, count)`` or ``(start, count, dirty)`` each, in items, in any
            order; what one of them has dirty is dirty. Or an array of shape (n, 2): NumPy's,
            :meth:`areas_array`. An iterator is gone through once, and not kept
        :param size: in items; None: the end of the furthest extent, be it clean or empty
        :param granularity: as ``group_size``: see :class:`HBitmap`
        :raises RangeError: if one is negative, or not inside ``size``; it is named
        :raises InvalidError: for an array of another shape, and for what HBitmap refuses
        :raises TypeError: for what is no pair of whole numbers, or tells with something else than
            True or False whether it is dirty; for tables, whose columns are to be an array

        Writer, twin, fork, kill: the bitmap is nobody else's until it is returned. Interrupted, or
        an error in ``extents``: there is none.

        >>> hb = HBitmap.from_extents([(0, 10), (5000, 1), (8192, 4096, False)], group_size=4096)
        >>> hb.size, list(hb.areas())
        (12288, [(0, 8192)])
        """
        hb = cls(0 if size is None else size, _core.granularity_of(granularity, group_size))
        furthest = 0
        for starts, counts, end in batches(extents, size):
            furthest = max(furthest, end)
            if end > hb.size:
                room = min(2 * end, _core.MAX_GROUPS << hb._granularity, _TO_THE_END)
                hb.truncate(max(end, room))
            hb.set_many(starts, counts)
        if size is None:
            hb.truncate(furthest)
        return hb

    def to_extents(
        self,
        start: int = 0,
        *,
        end: int | None = None,
        block_size: int | None = None,
        clean: bool = False,
    ) -> Iterator[Extent]:
        """What is dirty from ``start`` on, and what is clean if that is asked for, in order.

        :meth:`areas` gives dirty areas as pairs; this gives what lists of extents have beside:

        :param start: where to go on, behind what one has already
        :param end: None: the size
        :param block_size: in items: blocks of that length, each whole and by itself, of which
            something is dirty. The end of the bitmap may cut the last. The first is the one that
            ``start`` is in, the last the one that ``end - 1`` is in. None: as long as areas are
        :param clean: also what is between them, so that all from ``start`` to ``end`` is told
        :raises RangeError: if ``start`` or ``end`` is negative
        :raises InvalidError: if ``block_size`` is not positive

        Writer: what is marked or cleared meanwhile is told as it was or as it is; the extents are
        in order, and with ``clean`` leave no gap, all the same. Kill, fork, drop: as for every
        iterator; nothing is changed. Twin: each has a place of its own. For NumPy, all at once:
        :meth:`areas_array`.

        >>> hb = HBitmap(100)
        >>> hb.set_many([10, 25, 90], [10, 1, 2])
        >>> [tuple(each) for each in hb.to_extents(15, end=90, clean=True)]
        [(15, 5, True), (20, 5, False), (25, 1, True), (26, 64, False)]
        >>> [(start, count) for start, count, _ in hb.to_extents(15, block_size=16)]
        [(0, 16), (16, 16), (80, 16)]
        """
        start, end = self._search_bounds(start, end)
        size = self.size
        end = min(end, size)
        if block_size is not None:
            block_size = index(block_size)
            if block_size < 1:
                raise InvalidError(f"block_size {block_size} is not positive")
            if start < end:
                start, end = start // block_size * block_size, -(-end // block_size) * block_size
        extents: Iterator[Extent] = (Extent(*area) for area in self.areas(start, end=end))
        if block_size is not None:
            extents = cut_in_blocks(extents, block_size, size)
        return with_gaps(extents, start, min(end, size), block_size) if clean else extents

    # ---- as a set ---------------------------------------------------------------------------

    def pop(self) -> int:
        """Clean the first dirty group and return its start; each is given to one caller only.

        :raises KeyError: if nothing is dirty

        >>> hb = HBitmap(100)
        >>> hb.update([3, 5])
        >>> hb.pop(), hb.pop(), len(hb)
        (3, 5, 0)
        """
        while True:
            item = self.next_dirty(0)
            if item is None:
                if self.empty():
                    raise KeyError("pop from an empty bitmap")
            elif self._take(item):
                return item

    def clear(self) -> None:
        """Clean everything.

        >>> hb = HBitmap(100)
        >>> hb.add(3)
        >>> hb.clear()
        >>> hb.empty()
        True
        """
        self.reset_all()

    def copy(self) -> Self:
        """A bitmap of the same size, granularity and bits.

        >>> hb = HBitmap(100)
        >>> hb.add(3)
        >>> other = hb.copy()
        >>> other.add(4)
        >>> list(hb), list(other)
        ([3], [3, 4])
        """
        return self._made_of("union", self, self)

    def __copy__(self) -> Self:
        result = self.copy()
        _set_state(result, self.__getstate__())
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        result = memo[id(self)] = self.copy()
        _set_state(result, copy.deepcopy(self.__getstate__(), memo))
        return result

    def __getstate__(self) -> object:
        """What instances of a subclass have besides, as ``object.__getstate__`` of 3.11 answers it:
        their ``__dict__``, or a pair of that and their slots; None: nothing."""
        attributes = getattr(self, "__dict__", None) or None
        slots = {name: getattr(self, name) for name in _slots_of(self._kind) if hasattr(self, name)}
        return (attributes, slots) if slots else attributes

    def merge(self, other: HBitmap) -> None:
        """Mark what is dirty in ``other``, of the same size and any granularity.

        :raises MismatchError: (a ValueError) if the sizes differ

        >>> pages, sectors = HBitmap(1 << 20, group_size=4096), HBitmap(1 << 20, group_size=512)
        >>> sectors.set(5000)
        >>> pages.merge(sectors)
        >>> list(pages.areas())
        [(4096, 4096)]
        """
        if not isinstance(other, HBitmap):
            raise TypeError(f"merge takes an HBitmap, not {type(other).__name__}; see update()")
        self._operate(_core.hbitmap_merge, other)

    def _operate(self, operation: Operation, other: HBitmap) -> None:
        """self = self op other, in C."""
        if operation(self._hb, other._hb, self._hb):
            raise _core.mismatch(self._hb, other._hb)
        self._clears += 1

    def _made_of(self, operation: str, a: HBitmap, b: HBitmap) -> Self:
        """A new bitmap: a op b, in C; self is one of them, and the other has its granularity."""
        return self._like(_core.hbitmap_of(operation, a._hb, b._hb))

    def _coerce(self, other: Iterable[object], strict: bool) -> HBitmap:
        """``other``, or the groups of its elements as a bitmap of the shape of self.

        Elements that are no items of the bitmap are refused if ``strict``, else ignored.
        """
        if isinstance(other, HBitmap):
            return other
        result = HBitmap(self.size, self._granularity)
        result._mark_elements(other, strict)
        return result

    def _mark_elements(self, elements: Iterable[object], strict: bool) -> None:
        """Mark the groups of what is no bitmap, or of none if one is refused."""
        if isinstance(elements, range):
            self._mark_range(elements, strict)
            return
        items = _core.integers_in(elements)
        if items is None or isinstance(items, list):
            # Again, if need be.
            elements = list(elements) if items is None else items
            items = None
            with suppress(TypeError, OverflowError):
                items = _core.integers_in(_int64_array(elements))
        if items is None or not self._mark_items(items):
            # One of them is no item.
            self._mark_items(_core.integers_in(self._items_of(elements, strict)))

    def _mark_range(self, elements: range, strict: bool) -> None:
        inside = self._inside(elements)
        if strict and inside != elements:
            at = 0 if not inside or elements[0] != inside[0] else len(inside)
            raise _core.out_of_range(self._hb, elements[at], 1)
        groups = self._groups_of(inside)
        if groups is not None:
            self._call(_core.hbitmap_set, *groups)
            return
        for at in range(0, len(inside), _AT_ONCE):
            self._mark_items(_core.integers_in(array("Q", inside[at : at + _AT_ONCE])))

    def _inside(self, elements: range) -> range:
        """Those that are items of the bitmap."""
        start, stop, step = elements.start, elements.stop, elements.step
        if step < 0:
            return self._inside(elements[::-1])[::-1]
        return range(start if start >= 0 else start % step, min(stop, self.size), step)

    def _groups_of(self, inside: range) -> tuple[int, int] | None:
        """The ``start`` and ``count`` of the groups that such have elements in; None: not of all
        from the first to the last."""
        if not inside:
            return 0, 0
        group = 1 << self._granularity
        if abs(inside.step) > group and len(inside) > 1:
            return None
        first, last = sorted((inside[0], inside[-1]))
        start = first - first % group
        return start, min(last - last % group + group, self.size) - start

    def _items_of(self, elements: Iterable[object], strict: bool) -> array[int]:
        """One by one."""
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

    def _mark_items(self, items: CData) -> bool:
        """False: one of them is no item, none was marked."""
        with items:
            return not _core.hbitmap_set_many(self._hb, items, _core.NULL, len(items))

    def update(self, *others: Iterable[int]) -> None:
        """Mark the groups of all elements of the others, or of none if one is refused.

        A range costs as much as a mark of it, a buffer of 64-bit integers (an array('Q'), NumPy's)
        as much as :meth:`set_many`.

        :raises MismatchError: if another HBitmap has another size (granularities may differ)
        :raises RangeError: if an element is not inside the bitmap

        Interrupted, of a range with a step or of several others some may have been marked.

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2], range(50, 60), {70})
        >>> list(hb.areas())
        [(1, 2), (50, 10), (70, 1)]
        """
        if len(others) == 1 and not isinstance(others[0], HBitmap):
            self._mark_elements(others[0], strict=True)
            return
        ready = [self._coerce(other, strict=True) for other in others]
        for other in ready:
            if other.size != self.size:
                raise _core.mismatch(self._hb, other._hb)
        for other in ready:
            self.merge(other)

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

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2, 3])
        >>> hb.intersection_update({2, 3, 4}, [3])
        >>> list(hb)
        [3]
        """
        self._operate_all(_core.hbitmap_and, others)

    def difference_update(self, *others: Iterable[object]) -> None:
        """Clean the groups that one of the others has elements in.

        :raises MismatchError: if another HBitmap has another size or granularity

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2, 3])
        >>> hb.difference_update([2], range(3, 10))
        >>> list(hb)
        [1]
        """
        if len(others) == 1 and isinstance(others[0], range):
            groups = self._groups_of(self._inside(others[0]))
            if groups is not None:
                self._call(hbitmap_reset, *groups)
                self._clears += 1
                return
        self._operate_all(_core.hbitmap_andnot, others)

    def symmetric_difference_update(self, other: Iterable[int]) -> None:
        """Flip the groups that the other has elements in (each once).

        :raises MismatchError: if another HBitmap has another size or granularity
        :raises RangeError: if an element is not inside the bitmap

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> hb.symmetric_difference_update([2, 3])
        >>> list(hb)
        [1, 3]
        """
        self._operate(_core.hbitmap_xor, self._coerce(other, strict=True))

    def union(self, *others: Iterable[int]) -> Self:
        """A new bitmap, of this one's granularity: see :meth:`update`.

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> list(hb.union([7], {8})), list(hb)
        ([1, 2, 7, 8], [1, 2])
        """
        result = self.copy()
        result.update(*others)
        return result

    def intersection(self, *others: Iterable[object]) -> Self:
        """A new bitmap: see :meth:`intersection_update`.

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> list(hb.intersection([2, 3]))
        [2]
        """
        result = self.copy()
        result.intersection_update(*others)
        return result

    def difference(self, *others: Iterable[object]) -> Self:
        """A new bitmap: see :meth:`difference_update`.

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> list(hb.difference([2, 3]))
        [1]
        """
        result = self.copy()
        result.difference_update(*others)
        return result

    def symmetric_difference(self, other: Iterable[int]) -> Self:
        """A new bitmap: see :meth:`symmetric_difference_update`.

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> list(hb.symmetric_difference([2, 3]))
        [1, 3]
        """
        return self._made_of("symmetric_difference", self, self._coerce(other, strict=True))

    # The operators take any iterable, as those of collections.abc.Set do.

    def __or__(self, other: Iterable[int]) -> Self:  # type: ignore[override]
        if not isinstance(other, Iterable):
            return NotImplemented
        return self._made_of("union", self, self._coerce(other, strict=True))

    def __and__(self, other: Iterable[object]) -> Self:
        if not isinstance(other, Iterable):
            return NotImplemented
        return self._made_of("intersection", self, self._coerce(other, strict=False))

    def __sub__(self, other: Iterable[object]) -> Self:
        if not isinstance(other, Iterable):
            return NotImplemented
        return self._made_of("difference", self, self._coerce(other, strict=False))

    def __xor__(self, other: Iterable[int]) -> Self:  # type: ignore[override]
        if not isinstance(other, Iterable):
            return NotImplemented
        return self._made_of("symmetric_difference", self, self._coerce(other, strict=True))

    __ror__ = __or__
    __rand__ = __and__
    __rxor__ = __xor__

    def __rsub__(self, other: Iterable[int]) -> Self:
        if not isinstance(other, Iterable):
            return NotImplemented
        return self._made_of("difference", self._coerce(other, strict=True), self)

    def __ior__(self, other: Iterable[int]) -> Self:  # type: ignore[override]
        if not isinstance(other, Iterable):
            return NotImplemented
        self.update(other)
        return self

    def __iand__(self, other: Iterable[object]) -> Self:
        if not isinstance(other, Iterable):
            return NotImplemented
        self.intersection_update(other)
        return self

    def __isub__(self, other: Iterable[object]) -> Self:
        if not isinstance(other, Iterable):
            return NotImplemented
        self.difference_update(other)
        return self

    def __ixor__(self, other: Iterable[int]) -> Self:  # type: ignore[override]
        if not isinstance(other, Iterable):
            return NotImplemented
        self.symmetric_difference_update(other)
        return self

    # Comparisons with other sets are literal: set(hb) against theirs.

    # NumPy and pandas leave operators to us, on either side: element by element they mean nothing.
    __array_ufunc__ = None
    __pandas_priority__ = 10_000

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

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> hb.isdisjoint([3]), hb.isdisjoint([2, 3])
        (True, False)
        """
        if isinstance(other, HBitmap):
            return self._compare(_core.hbitmap_is_disjoint, self, other)
        elements = _as_set(other)
        return not any(item in elements for item in self)

    def issubset(self, other: Iterable[Any]) -> bool:
        """Are all elements in the other too?

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> hb.issubset(range(5)), hb.issubset([1])
        (True, False)
        """
        return self <= _as_set(other)

    def issuperset(self, other: Iterable[Any]) -> bool:
        """Are all elements of the other in here too?

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> hb.issuperset([1]), hb.issuperset([3])
        (True, False)
        """
        return self >= _as_set(other)

    def intersection_count(self, other: Iterable[object]) -> int:
        """``len(self & other)``, in elements (dirty groups), and no bitmap is made of that.

        So are :meth:`union_count` (``|``), :meth:`difference_count` (``-``) and
        :meth:`symmetric_difference_count` (``^``). Of what is no HBitmap the groups of the elements
        are taken first, as the operators take them.

        :raises MismatchError: if another HBitmap has another size or granularity

        Writer: what is marked meanwhile counts or not. They take both locks, so no clear shows by
        half. Kill, fork, drop, twin: as for every bitmap.

        >>> a, b = HBitmap(100), HBitmap(100)
        >>> a.set(0, 10), b.set(8, 10)
        (None, None)
        >>> a.intersection_count(b), a.union_count(b), a.difference_count(b)
        (2, 18, 8)
        """
        return self._count(_core.hbitmap_intersection_count, other, strict=False)

    def union_count(self, other: Iterable[int]) -> int:
        """``len(self | other)``, but of one granularity only: see :meth:`intersection_count`.

        :raises MismatchError: if another HBitmap has another size or granularity
        :raises RangeError: if an element is not inside the bitmap

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> hb.union_count([2, 3])
        3
        """
        return self._count(_core.hbitmap_union_count, other, strict=True)

    def difference_count(self, other: Iterable[object]) -> int:
        """``len(self - other)``: see :meth:`intersection_count`.

        :raises MismatchError: if another HBitmap has another size or granularity

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> hb.difference_count([2, 3])
        1
        """
        return self._count(_core.hbitmap_difference_count, other, strict=False)

    def symmetric_difference_count(self, other: Iterable[int]) -> int:
        """``len(self ^ other)``: see :meth:`intersection_count`.

        :raises MismatchError: if another HBitmap has another size or granularity
        :raises RangeError: if an element is not inside the bitmap

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> hb.symmetric_difference_count([2, 3])
        2
        """
        return self._count(_core.hbitmap_symmetric_difference_count, other, strict=True)

    def _count(
        self, function: Callable[[CData, CData], int], other: Iterable[object], strict: bool
    ) -> int:
        fitting = self._coerce(other, strict)
        groups = function(self._hb, fitting._hb)
        if groups < 0:
            raise _core.mismatch(self._hb, fitting._hb)
        return groups

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

        >>> hb = HBitmap(100)
        >>> hb.set(20, 10)
        >>> taken = hb.drain()
        >>> list(taken.areas()), len(hb)
        ([(20, 10)], 0)
        """
        start, count = self._to_the_end(start, count)
        drain = _core.hbitmap_drain
        if into is None:
            into = self._like(_core.hbitmap_alloc(self.size, self._granularity))
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

    def copy_areas(self, dst: Writable, src: Readable) -> int:
        """Copy from ``src`` to ``dst`` what is dirty, where items are bytes; returns how many.

        :param dst: a writable contiguous buffer of at least as many bytes as the bitmap has items:
            a mapped file, a bytearray
        :param src: a contiguous buffer that is as long at least; the two must not overlap
        :raises TypeError: if one is no buffer, or ``dst`` is read-only
        :raises InvalidError: if one is too short or not contiguous, or they overlap

        One call of C, without the GIL. Writer: what is marked meanwhile is copied or not, and
        bytes that change in ``src`` meanwhile come out mixed, so this is for a bitmap that is
        constant (:meth:`drain`, :meth:`taking`) and data that are at rest. Interrupted: it has come
        to its end. Kill: ``dst`` has some of it. Fork: a child that was forked meanwhile copies
        nothing. Drop: the buffers are given back also by an error. Twin: several may run at once.

        >>> hb = HBitmap(8)
        >>> hb.set(2, 3)
        >>> copy = bytearray(8)
        >>> hb.copy_areas(copy, b"abcdefgh"), bytes(copy)
        (3, b'\\x00\\x00cde\\x00\\x00\\x00')
        """
        with _core.raw_array("dst", dst, writable=True) as to, _core.raw_array("src", src) as from_:
            size = self.size
            for name, array_of_bytes in (("dst", to), ("src", from_)):
                if len(array_of_bytes) < size:
                    raise InvalidError(
                        f"{name} has {len(array_of_bytes)} bytes, the bitmap {size} items: "
                        "it must have a byte for each"
                    )
            copied = _core.hbitmap_copy_areas(self._hb, to, from_, min(len(to), len(from_)))
            if copied < 0:
                if self.size > min(len(to), len(from_)):
                    raise InvalidError("the bitmap has grown beyond dst or src")
                raise InvalidError("dst and src overlap")
            return copied

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

        >>> hb = HBitmap(100)
        >>> hb.set(20, 80)
        >>> hb.truncate(50)
        >>> list(hb.areas()), hb.size
        ([(20, 30)], 50)
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

        >>> hb = HBitmap(128)
        >>> hb.set(64, 4)
        >>> hb.words.tolist()
        [0, 15]
        """
        return _core.pinned_words(self._hb, self._memory).cast("Q")

    def sha256(self) -> str:
        """SHA-256 of the leaf words as little-endian bytes, in hex: the same on every machine.

        It is that of QEMU's x-debug-block-dirty-bitmap-sha256 on little-endian machines of 64 bits;
        on others that command hashes its memory as it is.

        >>> hb = HBitmap(100)
        >>> hb.add(3)
        >>> hb.sha256()[:16]
        '85b724e3f6e2dd26'
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

        >>> hb = HBitmap(128)
        >>> hb.add(8)
        >>> len(hb.serialize()), hb.serialize(0, 64).hex()
        (16, '0001000000000000')
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

    def deserialize(self, data: Readable, start: int = 0) -> None:
        """Replace the bits from ``start`` on by those in ``data``; see :meth:`serialize`.

        Bits beyond the end of the bitmap are dropped. Not to be called beside marks.

        :param data: a buffer of bytes: whole words, not more than there are from ``start`` on
        :raises RangeError: if ``start`` is not inside the bitmap
        :raises InvalidError: for data of another length, or a ``start`` that is not aligned

        >>> hb = HBitmap(128)
        >>> hb.deserialize(b"\\3" + bytes(7), start=64)
        >>> list(hb)
        [64, 65]
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
    def from_bytes(
        cls,
        data: Readable,
        size: int,
        granularity: int | None = None,
        *,
        group_size: int | None = None,
    ) -> Self:
        """A bitmap from all of what :meth:`serialize` gave.

        :raises InvalidError: if ``data`` is not just as long as such a bitmap's

        >>> hb = HBitmap(1 << 20, group_size=4096)
        >>> hb.set(5000)
        >>> HBitmap.from_bytes(hb.serialize(), 1 << 20, group_size=4096) == hb
        True
        """
        hb = cls(size, _core.granularity_of(granularity, group_size))
        hb._fill(data)
        return hb

    @classmethod
    def from_mask(
        cls,
        mask: Mask,
        *,
        size: int | None = None,
        granularity: int | None = None,
        group_size: int | None = None,
    ) -> Self:
        """A bitmap in which group ``i`` is dirty if ``mask[i]`` is True: see :meth:`to_mask`.

        :param mask: bools: an array of NumPy's, a Series, a list, a bitarray; or a buffer of bytes
            0 and 1
        :param size: in items; None: as many whole groups as the mask has elements. Given, it says
            how many items the last group has
        :param granularity: as ``group_size``: see :class:`HBitmap`
        :raises TypeError: if these are no bools, or have no order, as a set. What is dirty by its
            numbers goes to :meth:`update`, packed bits to :meth:`merge_bits`
        :raises InvalidError: if it has not one dimension, a byte is neither 0 nor 1, or the size
            has another number of groups

        Writer: what changes in the mask meanwhile is in it or not. Interrupted, fork, kill, twin:
        the bitmap is new, and nobody else's. Drop: the mask is given back also by an error.

        >>> hb = HBitmap.from_mask([True, False, True], group_size=4096)
        >>> hb, list(hb)
        (<HBitmap size=12288 granularity=12 dirty=8192>, [0, 8192])
        """
        bits = _core.granularity_of(granularity, group_size)
        _core.check_granularity(bits)
        with _core.bools("mask", mask) as c_bools:
            nbits = len(c_bools)
            size = min(nbits << bits, _core.MAX_SIZE) if size is None else index(size)
            hb = cls(size, bits)
            if -(-size >> bits) != nbits:
                raise InvalidError(
                    f"the mask has {nbits} elements, and a bitmap of {size} items "
                    f"{-(-size >> bits)} groups of {1 << bits}: it must have one for each"
                )
            packed = bytearray(-(-nbits // 8))
            with _core.raw_array("bits", packed) as c_bits:
                bad = _core.hbmask_pack(c_bits, c_bools, nbits)
            if bad < nbits:
                raise InvalidError(
                    f"mask[{bad}] is {c_bools[bad]}, and a mask has 0 and 1 (or bools): packed "
                    "bits are for merge_bits()"
                )
        hb.merge_bits(packed)
        return hb

    def _fill(self, data: Readable) -> None:
        nbytes = _core.byte_array("data", data)[1]
        expected = _core.hbitmap_serialization_size(self._hb, 0, self.size)
        self._check_serializable()
        if nbytes != expected:
            raise InvalidError(
                f"{nbytes} bytes of data: a bitmap of {self.size} items, granularity "
                f"{self._granularity}, has {expected}"
            )
        self.deserialize(data)

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
        data = self.serialize() if dense else _little_endian(self.areas_array().tobytes())
        if index(cast(int, protocol)) >= 5:
            data = PickleBuffer(data if isinstance(data, bytes) else bytes(data))
        elif not isinstance(data, bytes):
            data = bytes(data)
        made = (self.size, self._granularity, dense, data)
        if self._kind is HBitmap:
            return _unpickle, made
        return _unpickle, (*made, self._kind), self.__getstate__()


class Taken(HBitmap):
    """What was dirty in a bitmap, out of it for now; made by :meth:`HBitmap.taking`."""

    # What is made of it is no such thing.
    _kind = HBitmap  # type: ignore[assignment]
    # What puts it back when it goes, whatever interrupts that; and what it does that with.
    __slots__ = ("_back", "_pair")

    def __init__(self, source: HBitmap) -> None:
        made = _core.hbitmap_alloc(source.size, source.granularity)
        self._adopt(made, source.granularity, None)
        self._pair = _core.new("HBitmap *[]", [source._hb, self._hb])
        self._back = _core.own(self._pair, "hbitmap_put_back", (self._pair, source, made))
        source.drain(into=self)  # last: whatever was taken goes back

    def done(self) -> None:
        """It need not be put back.

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> with hb.taking() as taken:
        ...     taken.done()
        >>> len(hb)
        0
        """
        self._pair[0] = _core.NULL

    def close(self) -> None:
        """Mark it in its bitmap again, unless it is done; may be called twice.

        >>> hb = HBitmap(100)
        >>> hb.update([1, 2])
        >>> taken = hb.taking()
        >>> len(hb), len(taken)
        (0, 2)
        >>> taken.close()
        >>> len(hb)
        2
        """
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


_Kind = TypeVar("_Kind", bound=HBitmap)

_pointer = HBitmap.__dict__["_hb"]


def pointers(bitmaps: Iterable[HBitmap]) -> list[CData]:
    """The ``HBitmap *`` of bitmaps, each valid as long as its bitmap exists; torn ones, too."""
    return [_pointer.__get__(each) for each in bitmaps]


def _int64_array(elements: Iterable[Any]) -> array[int]:
    """
    :raises TypeError: if one is no integer
    :raises OverflowError: if one does not fit
    """
    # From 3.10 on CPython's asks for __index__ itself, and for nothing else.
    exact = sys.version_info >= (3, 10) and sys.implementation.name == "cpython"
    return array("q", elements if exact else map(index, elements))


def _as_set(elements: Iterable[Any]) -> AbstractSet[Any]:
    if isinstance(elements, AbstractSet):
        return elements
    _core.integers_in(elements)  # refuses masks
    return frozenset(elements)


def _little_endian(data: ReadableBuffer) -> ReadableBuffer:
    """uint64 of this machine as little-endian ones, or back."""
    if sys.byteorder == "little":
        return data
    words = array("Q", bytes(data))
    words.byteswap()
    return words.tobytes()


def _unpickle(
    size: int,
    granularity: int,
    dense: bool,
    data: ReadableBuffer,
    kind: type[HBitmap] = HBitmap,
) -> HBitmap:
    hb = _new(kind)
    hb._adopt(_core.hbitmap_alloc(size, granularity), granularity, None)
    if dense:
        hb._fill(data)
    else:
        areas = array("Q", bytes(_little_endian(data)))
        hb.set_many(areas[::2], areas[1::2])
    return hb


def _new(kind: type[_Kind]) -> _Kind:
    """An instance, as those of a subclass of set come about: not by a ``__new__`` of its own, nor
    by ``__init__``."""
    return Base.__new__(kind)


def _slots_of(kind: type[HBitmap]) -> list[str]:
    """The names of the slots that subclasses of HBitmap have given it."""
    names = []
    for each in kind.__mro__:
        if issubclass(HBitmap, each):
            continue
        slots = vars(each).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                names.append(f"_{each.__name__.lstrip('_')}{name}")
            elif name not in ("__dict__", "__weakref__"):
                names.append(name)
    return names


def _set_state(hb: HBitmap, state: object) -> None:
    """What ``__getstate__`` gave, as pickle sets it."""
    if state is None:
        return
    if hasattr(hb, "__setstate__"):
        hb.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        vars(hb).update(attributes)
    for name, value in (slots or {}).items():
        setattr(hb, name, value)


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
