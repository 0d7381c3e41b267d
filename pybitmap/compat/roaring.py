# SPDX-License-Identifier: MIT
"""pyroaring's interface over HBitmap: BitMap, FrozenBitMap, and those of 64 bits.

A BitMap is a set of whole numbers below ``2**32``, over an :class:`~pybitmap.HBitmap` of as many
items; a BitMap64 one of numbers below ``2**41``, which is what an HBitmap can have: marks beyond
are refused (OverflowError), while questions know that nothing is there. Memory: an empty one takes
4 KiB, and 524 MiB of address space (261 GiB the 64-bit one); scattered items take a page of 4 KiB
each and some summaries, dense ones a bit each: nothing is compressed, so a full BitMap takes 520
MiB. ``of`` makes one over a smaller bitmap. ``docs/compat.md`` has more.

Five visitors, for every method where it says nothing else. Writer: each call is one operation of
HBitmap's, which other threads may mark beside, and no mark is lost. Fork: the child has a copy.
Kill: it goes with its process, unless ``of`` was given a bitmap over a mapped file. Drop: the
memory goes with the last reference. Twin: two threads may be in any two methods, and two covers may
share an HBitmap; what was asked about before may have changed meanwhile.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import index
from typing import TYPE_CHECKING, Any, ClassVar, overload

from ..errors import InvalidError, RangeError
from ..hbitmap import HBitmap
from . import roaring_format

if TYPE_CHECKING:
    from typing_extensions import Self

    from .._typing import Readable

__all__ = [
    "AbstractBitMap",
    "AbstractBitMap64",
    "BitMap",
    "BitMap64",
    "FrozenBitMap",
    "FrozenBitMap64",
]

_SHOWN = 500  # items that repr shows all of
_ENDS = 10  # items at either end that it shows of more


class NoItem(RangeError, OverflowError):
    """A number that a set of this class, or over this HBitmap, cannot have."""


@contextmanager
def _overflowing() -> Iterator[None]:
    try:
        yield
    except RangeError as error:
        raise NoItem(str(error)) from None


def _sized(hb: HBitmap, size: int) -> HBitmap:
    """Of that size: itself, or a copy."""
    if hb.size == size:
        return hb
    made = hb.copy()
    made.truncate(size)
    return made


class _Reading:
    """What all of them answer."""

    __slots__ = ("__weakref__", "_copy_on_write", "_hb")

    #: One more than the greatest number that pyroaring takes, the items of an HBitmap of ours, and
    #: the type code of arrays of them.
    _LIMIT: ClassVar[int]
    _SIZE: ClassVar[int]
    _TYPECODE: ClassVar[str]
    #: The classes that it can be combined and compared with have this one as a base.
    _FAMILY: ClassVar[type[_Reading]]

    _hb: HBitmap
    _copy_on_write: bool

    def __init__(
        self,
        values: Iterable[int] | None = None,
        copy_on_write: bool = False,
        optimize: bool = True,
    ) -> None:
        """
        :param values: a bitmap, a range, a buffer of integers or whatever gives some
        :param copy_on_write: remembered only, and taken from a bitmap that is copied: those of
            which it differs cannot be combined
        :param optimize: ignored: there are no containers
        :raises OverflowError: if a number is negative or too large
        :raises TypeError: if one is none
        """
        self._copy_on_write = bool(copy_on_write) and self._LIMIT == 1 << 32  # as pyroaring has it
        if isinstance(values, self._FAMILY):
            self._hb, self._copy_on_write = values._hb.copy(), values._copy_on_write
            return
        if isinstance(values, HBitmap):
            values = values.items_array()
        self._hb = HBitmap(self._SIZE)
        if values is not None:
            with _overflowing():
                self._hb.update(values)

    @classmethod
    def of(cls, hbitmap: HBitmap) -> Self:
        """A cover of an HBitmap of granularity 0, not of a copy; its size is the limit then.

        :raises InvalidError: for another granularity, or more items than the class can have

        >>> hb = HBitmap(1000)
        >>> BitMap.of(hb).add(7)
        >>> list(hb)
        [7]
        """
        if hbitmap.granularity:
            raise InvalidError(
                f"{cls.__name__} has a bit for each number: the bitmap has granularity "
                f"{hbitmap.granularity}, not 0"
            )
        if hbitmap.size > cls._SIZE:
            raise InvalidError(
                f"{cls.__name__} has {cls._SIZE} items at most, the bitmap has {hbitmap.size}"
            )
        return cls._made(hbitmap, False)

    @classmethod
    def _made(cls, hb: HBitmap, copy_on_write: bool) -> Self:
        made = cls.__new__(cls)
        made._hb, made._copy_on_write = hb, copy_on_write
        return made

    def _like(self, hb: HBitmap) -> Self:
        return self._made(hb, self._copy_on_write)

    @property
    def hbitmap(self) -> HBitmap:
        """The bitmap itself, for what pyroaring has not: ``drain``, ``areas``, ``pin``.

        >>> bm = BitMap([3, 4])
        >>> list(bm.hbitmap.drain().areas()), len(bm)
        ([(3, 2)], 0)
        """
        return self._hb

    @property
    def copy_on_write(self) -> bool:
        """As it was given; nothing here is copied on write.

        >>> BitMap([1], copy_on_write=True).copy_on_write
        True
        """
        return self._copy_on_write

    # ---- arguments --------------------------------------------------------------------------

    def _number(self, value: int) -> int:
        """
        :raises OverflowError: if pyroaring would not take it
        """
        value = index(value)
        if not 0 <= value < self._LIMIT:
            raise NoItem(f"{value} is not in a {type(self).__name__}'s range, [0, {self._LIMIT})")
        return value

    def _range(self, start: int, end: int) -> tuple[int, int]:
        """``[start, end)`` as a start and a count of what pyroaring looks at of it."""
        start, end = index(start), index(end)
        for bound in (start, end):
            if not 0 <= bound < 1 << 64:
                raise NoItem(f"{bound} is not in [0, 2**64)")
        end = min(end, self._LIMIT)
        return start, max(0, end - start)

    def _other(self, other: object) -> HBitmap:
        """The bitmap of the other operand.

        :raises TypeError: if it is none of the same width
        :raises ValueError: if ``copy_on_write`` differs, as pyroaring has it
        """
        if not isinstance(other, self._FAMILY):
            raise TypeError(
                f"{type(self).__name__} is combined with its like, not with "
                f"{type(other).__name__}: make one of it first"
            )
        if other._copy_on_write != self._copy_on_write:
            raise InvalidError("the two bitmaps differ in copy_on_write: give both the same")
        return other._hb

    def _with(self, *others: object) -> list[HBitmap]:
        """The bitmaps of all operands, of the size that the largest has: of smaller ones, which
        ``of`` was given, as copies."""
        operands = [self._hb, *map(self._other, others)]
        size = max(each.size for each in operands)
        return [_sized(each, size) for each in operands]

    # ---- questions --------------------------------------------------------------------------

    def __contains__(self, value: int) -> bool:
        """
        :raises OverflowError: if it is negative or too large, as pyroaring has it
        """
        return self._hb.get(self._number(value))

    def __len__(self) -> int:
        return len(self._hb)

    def __bool__(self) -> bool:
        return not self._hb.empty()

    def __iter__(self) -> Iterator[int]:
        """In order; marks and clears may go on meanwhile: see :meth:`pybitmap.HBitmap.iter`."""
        return iter(self._hb)

    def iter_equal_or_larger(self, val: int) -> Iterator[int]:
        """The numbers from ``val`` on, in order.

        >>> list(BitMap([1, 5, 9]).iter_equal_or_larger(5))
        [5, 9]
        """
        return self._hb.iter(self._number(val))

    def contains_range(self, range_start: int, range_end: int) -> bool:
        """Are all of ``[range_start, range_end)`` in it? Yes, if that is empty.

        >>> BitMap([3, 4, 5]).contains_range(3, 6), BitMap([3, 5]).contains_range(3, 6)
        (True, False)
        """
        start, count = self._range(range_start, range_end)
        return count == 0 or (
            start + count <= self._hb.size and self._hb.next_zero(start, count) is None
        )

    def range_cardinality(self, range_start: int, range_end: int) -> int:
        """How many of ``[range_start, range_end)`` are in it.

        >>> BitMap([3, 4, 5]).range_cardinality(4, 10)
        2
        """
        return self._hb.count(*self._range(range_start, range_end))

    def min(self) -> int:
        """
        :raises ValueError: if there is none

        >>> BitMap([3, 7]).min()
        3
        """
        return self._found(self._hb.next_dirty(0), "an empty bitmap has no minimum")

    def max(self) -> int:
        """
        :raises ValueError: if there is none

        >>> BitMap([3, 7]).max()
        7
        """
        return self._found(self._hb.prev_dirty(), "an empty bitmap has no maximum")

    def next_set_bit(self, value: int) -> int:
        """The first number from ``value`` on.

        :raises ValueError: if there is none

        >>> BitMap([3, 7]).next_set_bit(4)
        7
        """
        first = self._hb.next_dirty(self._number(value))
        return self._found(first, f"there is no number from {value} on")

    @staticmethod
    def _found(item: int | None, why: str) -> int:
        if item is None:
            raise InvalidError(why)
        return item

    def rank(self, value: int) -> int:
        """How many are not greater than ``value``.

        >>> BitMap([3, 7]).rank(3), BitMap([3, 7]).rank(100)
        (1, 2)
        """
        return self._hb.rank(self._number(value))

    @overload
    def __getitem__(self, value: int) -> int: ...

    @overload
    def __getitem__(self, value: slice) -> Self: ...

    def __getitem__(self, value: int | slice) -> int | Self:
        """The number that has ``value`` before it, from the end if that is negative; of a slice,
        the bitmap of those, whose order is always theirs.

        :raises IndexError: if there are not so many

        Writer: it counts first, and looks then.
        """
        if not isinstance(value, slice):
            n = index(value)
            return self._hb.select(n if n >= 0 else len(self._hb) + n)
        places = range(*value.indices(len(self._hb)))
        if places.step < 0:
            places = places[::-1]
        made = HBitmap(self._hb.size)
        if places:
            first, last = self._hb.select(places[0]), self._hb.select(places[-1])
            if places.step == 1:
                areas = array("Q", self._hb.areas_array(first, end=last + 1).tobytes())
                made.set_many(areas[::2], areas[1::2])
            else:
                made.update(self._hb.items_array(first, end=last + 1).tolist()[:: places.step])
        return self._like(made)

    def to_array(self) -> array[int]:
        """All of them in order: ``array('I')`` of 32-bit ones, ``array('Q')`` of 64-bit ones.

        >>> BitMap([3, 7]).to_array()
        array('I', [3, 7])
        """
        return array(self._TYPECODE, self._hb.items_array().tolist())

    def __repr__(self) -> str:
        name = type(self).__name__
        if len(self) <= _SHOWN:
            return f"{name}({list(self)})"
        hb = self._hb.copy()
        n = len(hb)
        ends = [[hb.select(i) for i in those] for those in (range(_ENDS), range(n - _ENDS, n))]
        first, last = (", ".join(map(str, items)) for items in ends)
        return f"{name}([{first}, ..., {last}])"

    # ---- comparisons ------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, self._FAMILY):
            return NotImplemented
        mine, others = self._with(other)
        return mine == others

    def __le__(self, other: _Reading) -> bool:
        if not isinstance(other, self._FAMILY):
            return NotImplemented
        mine, others = self._with(other)
        return mine <= others

    def __lt__(self, other: _Reading) -> bool:
        if not isinstance(other, self._FAMILY):
            return NotImplemented
        mine, others = self._with(other)
        return mine < others

    def __ge__(self, other: _Reading) -> bool:
        if not isinstance(other, self._FAMILY):
            return NotImplemented
        mine, others = self._with(other)
        return mine >= others

    def __gt__(self, other: _Reading) -> bool:
        if not isinstance(other, self._FAMILY):
            return NotImplemented
        mine, others = self._with(other)
        return mine > others

    __hash__ = None  # type: ignore[assignment]

    def issubset(self, other: _Reading) -> bool:
        """Are all in the other, too?

        >>> BitMap([3]).issubset(BitMap([3, 7]))
        True
        """
        mine, others = self._with(other)
        return mine <= others

    def issuperset(self, other: _Reading) -> bool:
        """Are all of the other in here?

        >>> BitMap([3, 7]).issuperset(BitMap([3]))
        True
        """
        mine, others = self._with(other)
        return mine >= others

    def isdisjoint(self, other: _Reading) -> bool:
        """Have they none in common?

        >>> BitMap([3]).isdisjoint(BitMap([7]))
        True
        """
        mine, others = self._with(other)
        return mine.isdisjoint(others)

    def intersect(self, other: _Reading) -> bool:
        """Have they one in common?

        >>> BitMap([3, 7]).intersect(BitMap([7]))
        True
        """
        return not self.isdisjoint(other)

    # ---- of two, or several -----------------------------------------------------------------

    def __or__(self, other: _Reading) -> Self:
        mine, others = self._with(other)
        return self._like(mine | others)

    def __and__(self, other: _Reading) -> Self:
        mine, others = self._with(other)
        return self._like(mine & others)

    def __sub__(self, other: _Reading) -> Self:
        mine, others = self._with(other)
        return self._like(mine - others)

    def __xor__(self, other: _Reading) -> Self:
        mine, others = self._with(other)
        return self._like(mine ^ others)

    def union(self, *bitmaps: _Reading) -> Self:
        """What is in one of them; also ``BitMap.union(a, b, c)``.

        >>> BitMap([3]).union(BitMap([7]), BitMap([9]))
        BitMap([3, 7, 9])
        """
        mine, *others = self._with(*bitmaps)
        return self._like(mine.union(*others))

    def intersection(self, *bitmaps: _Reading) -> Self:
        """What is in all of them.

        >>> BitMap([3, 7]).intersection(BitMap([7, 9]))
        BitMap([7])
        """
        mine, *others = self._with(*bitmaps)
        return self._like(mine.intersection(*others))

    def difference(self, *bitmaps: _Reading) -> Self:
        """What is in this one and in none of the others.

        >>> BitMap([3, 7]).difference(BitMap([7, 9]))
        BitMap([3])
        """
        mine, *others = self._with(*bitmaps)
        return self._like(mine.difference(*others))

    def symmetric_difference(self, other: _Reading) -> Self:
        """What is in one of the two.

        >>> BitMap([3, 7]).symmetric_difference(BitMap([7, 9]))
        BitMap([3, 9])
        """
        return self ^ other

    def union_cardinality(self, other: _Reading) -> int:
        """``len(self | other)``, which is not made.

        >>> BitMap([3, 7]).union_cardinality(BitMap([7, 9]))
        3
        """
        mine, others = self._with(other)
        return mine.union_count(others)

    def intersection_cardinality(self, other: _Reading) -> int:
        """``len(self & other)``, which is not made.

        >>> BitMap([3, 7]).intersection_cardinality(BitMap([7, 9]))
        1
        """
        mine, others = self._with(other)
        return mine.intersection_count(others)

    def difference_cardinality(self, other: _Reading) -> int:
        """``len(self - other)``, which is not made.

        >>> BitMap([3, 7]).difference_cardinality(BitMap([7, 9]))
        1
        """
        mine, others = self._with(other)
        return mine.difference_count(others)

    def symmetric_difference_cardinality(self, other: _Reading) -> int:
        """``len(self ^ other)``, which is not made.

        >>> BitMap([3, 7]).symmetric_difference_cardinality(BitMap([7, 9]))
        2
        """
        mine, others = self._with(other)
        return mine.symmetric_difference_count(others)

    def jaccard_index(self, other: _Reading) -> float:
        """``len(self & other) / len(self | other)``; not a number, if both are empty.

        Writer: it counts twice; of what is marked in between, some may be in one count only.

        >>> BitMap([1, 2]).jaccard_index(BitMap([2, 3, 4]))
        0.25
        """
        either = self.union_cardinality(other)
        return self.intersection_cardinality(other) / either if either else float("nan")

    # ---- others made of it ------------------------------------------------------------------

    def copy(self) -> Self:
        """One with the same numbers, which goes its own way.

        >>> bm = BitMap([1])
        >>> other = bm.copy()
        >>> other.add(2)
        >>> bm, other
        (BitMap([1]), BitMap([1, 2]))
        """
        return self._like(self._hb.copy())

    def __copy__(self) -> Self:
        made = self.copy()
        if hasattr(self, "__dict__"):
            vars(made).update(vars(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = self.copy()
        if hasattr(self, "__dict__"):
            vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        made = self._hb, self._copy_on_write
        return type(self)._made, made, getattr(self, "__dict__", None)

    def flip(self, start: int, end: int) -> Self:
        """A new one, in which those of ``[start, end)`` are that are not in here.

        :raises OverflowError: of 64-bit ones, for what is beyond what they can have

        >>> BitMap([1, 3]).flip(0, 3)
        BitMap([0, 2, 3])
        """
        made = self._like(self._hb.copy())
        made._mark(HBitmap.flip, start, end)
        return made

    def shift(self, offset: int) -> Self:
        """A new one with every number plus ``offset``; those that leave the range are dropped.

        :raises OverflowError: of 64-bit ones, if a number would be beyond what they can have

        >>> BitMap([1, 3]).shift(10), BitMap([1, 3]).shift(-2)
        (BitMap([11, 13]), BitMap([1]))
        """
        offset = index(offset)
        made = HBitmap(self._hb.size)
        starts, counts = array("Q"), array("Q")
        for start, count in self._hb.areas():
            first = max(0, start + offset)
            end = min(self._LIMIT, start + count + offset)
            if first < end:
                starts.append(first)
                counts.append(end - first)
        with _overflowing():
            made.set_many(starts, counts)
        return self._like(made)

    def _mark(self, function: Any, start: int, end: int) -> None:
        start, count = self._range(start, end)
        if count:
            with _overflowing():
                function(self._hb, start, count)

    # ---- representation ---------------------------------------------------------------------

    def serialize(self) -> bytes:
        """In Roaring's portable format, as pyroaring reads it.

        Writer: it is that of one moment; what is marked meanwhile is in it or not.

        >>> len(BitMap([1, 2, 3]).serialize())
        22
        """
        dump = roaring_format.dump32 if self._TYPECODE == "I" else roaring_format.dump64
        return dump(self._hb)

    @classmethod
    def deserialize(cls, buff: Readable) -> Self:
        """What pyroaring's or ours has written.

        :raises ValueError: if it is not in that format, or not whole

        >>> BitMap.deserialize(BitMap([1, 2, 3]).serialize())
        BitMap([1, 2, 3])
        """
        load = roaring_format.load32 if cls._TYPECODE == "I" else roaring_format.load64
        hb = HBitmap(cls._SIZE)
        load(memoryview(buff).cast("B"), hb)  # type: ignore[arg-type]
        return cls._made(hb, False)

    def get_statistics(self) -> dict[str, int]:
        """What containers :meth:`serialize` would write. In memory there are none.

        >>> stats = BitMap([1, 2, 3]).get_statistics()
        >>> stats["n_containers"], stats["cardinality"], stats["max_value"]
        (1, 3, 3)
        """
        hb = self._hb.copy()
        stats = {f"n_{kind}containers": 0 for kind in ("", "array_", "run_", "bitset_")}
        for what in ("values", "bytes"):
            stats.update({f"n_{what}_{kind}_containers": 0 for kind in ("array", "run", "bitset")})
        for each in roaring_format.containers(hb):
            stats["n_containers"] += 1
            stats[f"n_{each.kind}_containers"] += 1
            stats[f"n_values_{each.kind}_containers"] += each.cardinality
            stats[f"n_bytes_{each.kind}_containers"] += len(each.data)
        empty = hb.empty()
        stats["max_value"] = 0 if empty else self._found(hb.prev_dirty(), "")
        stats["min_value"] = self._LIMIT - 1 if empty else self._found(hb.next_dirty(0), "")
        stats["cardinality"] = len(hb)
        return stats

    def run_optimize(self) -> bool:
        """Nothing: there are no containers that could become runs. False.

        >>> BitMap([1, 2, 3]).run_optimize()
        False
        """
        return False

    def shrink_to_fit(self) -> int:
        """Nothing: 0 bytes were saved.

        >>> BitMap([1, 2, 3]).shrink_to_fit()
        0
        """
        return 0


class _Marking(_Reading):
    """What those do that are not frozen."""

    __slots__ = ()

    def add(self, value: int) -> None:
        """
        :raises OverflowError: if it is negative or too large

        >>> bm = BitMap()
        >>> bm.add(7)
        >>> bm
        BitMap([7])
        """
        value = self._number(value)
        with _overflowing():
            self._hb.add(value)

    def add_checked(self, value: int) -> None:
        """
        :raises KeyError: if it is there

        Twin: it looks and then marks, so of two threads that add the same number both may.

        >>> bm = BitMap([7])
        >>> bm.add_checked(7)
        Traceback (most recent call last):
        KeyError: 7
        """
        if value in self:
            raise KeyError(value)
        self.add(value)

    def update(self, *all_values: Iterable[int]) -> None:
        """Mark all, or none if one is refused.

        :raises OverflowError: if a number is negative or too large

        >>> bm = BitMap()
        >>> bm.update([1, 2], range(5, 8))
        >>> bm
        BitMap([1, 2, 5, 6, 7])
        """
        with _overflowing():
            self._hb.update(*map(self._elements, all_values))

    def _elements(self, values: Iterable[int]) -> Iterable[int]:
        return self._fitting(values) if isinstance(values, _Reading) else values

    def _fitting(self, other: object) -> HBitmap:
        """The bitmap of the other operand, of the size of this one.

        :raises OverflowError: if it has a number that this one cannot have
        """
        theirs, size = self._other(other), self._hb.size
        beyond = theirs.next_dirty(size) if theirs.size > size else None
        if beyond is not None:
            raise NoItem(f"{beyond} is beyond the {size} items of the bitmap that this one covers")
        return _sized(theirs, size)

    def _inside(self, other: object) -> HBitmap:
        """The same without what this one cannot have."""
        return _sized(self._other(other), self._hb.size)

    def discard(self, value: int) -> None:
        """Take it out, if it is there.

        >>> bm = BitMap([1, 2])
        >>> bm.discard(2); bm.discard(3)
        >>> bm
        BitMap([1])
        """
        self._hb.discard(self._number(value))

    def remove(self, value: int) -> None:
        """
        :raises KeyError: if it is not there. Twin: of two threads, one takes it

        >>> bm = BitMap([1, 2])
        >>> bm.remove(2)
        >>> bm
        BitMap([1])
        """
        self._hb.remove(self._number(value))

    def pop(self) -> int:
        """Take the smallest out. Twin: each is given to one caller only.

        :raises KeyError: if there is none

        >>> bm = BitMap([3, 7])
        >>> bm.pop(), bm
        (3, BitMap([7]))
        """
        try:
            return self._hb.pop()
        except KeyError:
            raise KeyError(f"pop from an empty {type(self).__name__}") from None

    def clear(self) -> None:
        """Take all out. To have what was there, and lose no mark: ``hbitmap.drain()``.

        >>> bm = BitMap([3, 7])
        >>> bm.clear()
        >>> bm
        BitMap([])
        """
        self._hb.clear()

    def __ior__(self, other: _Reading) -> Self:
        self._hb.update(self._fitting(other))
        return self

    def __iand__(self, other: _Reading) -> Self:
        self._hb.intersection_update(self._inside(other))
        return self

    def __isub__(self, other: _Reading) -> Self:
        self._hb.difference_update(self._inside(other))
        return self

    def __ixor__(self, other: _Reading) -> Self:
        self._hb.symmetric_difference_update(self._fitting(other))
        return self

    def intersection_update(self, *all_values: Iterable[int]) -> None:
        """Keep what all of them have.

        >>> bm = BitMap([1, 2, 3])
        >>> bm.intersection_update([2, 3], BitMap([3]))
        >>> bm
        BitMap([3])
        """
        self._hb.intersection_update(
            *(self._inside(each) if isinstance(each, _Reading) else each for each in all_values)
        )

    def difference_update(self, *others: _Reading) -> None:
        """Take out what one of them has.

        >>> bm = BitMap([1, 2, 3])
        >>> bm.difference_update(BitMap([3]))
        >>> bm
        BitMap([1, 2])
        """
        self._hb.difference_update(*map(self._inside, others))

    def symmetric_difference_update(self, other: _Reading) -> None:
        """Keep what one of the two has.

        >>> bm = BitMap([1, 2])
        >>> bm.symmetric_difference_update(BitMap([2, 3]))
        >>> bm
        BitMap([1, 3])
        """
        self._hb.symmetric_difference_update(self._fitting(other))

    def overwrite(self, other: _Reading) -> None:
        """Become as the other.

        :raises ValueError: if that is this one

        Writer: what is in both never goes in between; other marks are there afterwards or not.

        >>> bm = BitMap([1, 2])
        >>> bm.overwrite(BitMap([7]))
        >>> bm
        BitMap([7])
        """
        if self._other(other) is self._hb:
            raise InvalidError("a bitmap cannot be overwritten with itself")
        source = self._fitting(other)
        self._hb.intersection_update(source)
        self._hb.update(source)

    def flip_inplace(self, start: int, end: int) -> None:
        """Those of ``[start, end)`` that are there go, the others come.

        >>> bm = BitMap([1, 3])
        >>> bm.flip_inplace(0, 3)
        >>> bm
        BitMap([0, 2, 3])
        """
        self._mark(HBitmap.flip, start, end)

    def add_range(self, range_start: int, range_end: int) -> None:
        """Mark ``[range_start, range_end)``: one mark, however many they are.

        :raises OverflowError: of 64-bit ones, for what is beyond what they can have

        >>> bm = BitMap()
        >>> bm.add_range(3, 6)
        >>> bm
        BitMap([3, 4, 5])
        """
        self._mark(HBitmap.set, range_start, range_end)

    def remove_range(self, range_start: int, range_end: int) -> None:
        """Take ``[range_start, range_end)`` out.

        >>> bm = BitMap([1, 2, 3, 4])
        >>> bm.remove_range(2, 4)
        >>> bm
        BitMap([1, 4])
        """
        start, count = self._range(range_start, range_end)
        count = min(count, self._hb.size - start)
        if count > 0:
            self._hb.reset(start, count)


class _Freezing(_Reading):
    """What those have that are."""

    __slots__ = ()

    def __hash__(self) -> int:  # type: ignore[override]
        """Of what is in it; that must not be changed by way of ``hbitmap``."""
        return hash(self._hb.areas_array().tobytes())


class AbstractBitMap(_Reading):
    """What a BitMap and a FrozenBitMap answer."""

    __slots__ = ()
    _LIMIT = _SIZE = 1 << 32
    _TYPECODE = "I"


class BitMap(_Marking, AbstractBitMap):
    """A set of numbers below ``2**32``, as pyroaring's. See the head of this module.

    >>> bm = BitMap([1, 2, 5])
    >>> bm.add_range(7, 9)
    >>> bm, bm[-1], bm.rank(5)
    (BitMap([1, 2, 5, 7, 8]), 8, 3)
    """

    __slots__ = ()


class FrozenBitMap(_Freezing, AbstractBitMap):
    """The same that cannot be changed, and has a hash.

    >>> {FrozenBitMap([1, 2]) | FrozenBitMap([3])}
    {FrozenBitMap([1, 2, 3])}
    """

    __slots__ = ()


class AbstractBitMap64(_Reading):
    """What a BitMap64 and a FrozenBitMap64 answer."""

    __slots__ = ()
    _LIMIT = 1 << 64
    _SIZE = 1 << 41
    _TYPECODE = "Q"


class BitMap64(_Marking, AbstractBitMap64):
    """A set of numbers below ``2**41``, as pyroaring's of those below ``2**64``.

    >>> bm = BitMap64([1 << 40])
    >>> bm.add(1 << 41)
    Traceback (most recent call last):
    pybitmap.compat.roaring.NoItem: range [2199023255552, 2199023255553) is not inside the bitmap of 2199023255552 items
    """  # noqa: E501

    __slots__ = ()


class FrozenBitMap64(_Freezing, AbstractBitMap64):
    """The same that cannot be changed, and has a hash.

    >>> {FrozenBitMap64([1 << 40]): "a key"}[FrozenBitMap64([1 << 40])]
    'a key'
    """

    __slots__ = ()


AbstractBitMap._FAMILY = AbstractBitMap
AbstractBitMap64._FAMILY = AbstractBitMap64
