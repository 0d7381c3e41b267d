# SPDX-License-Identifier: MIT
"""What a bitmap should do, in the plainest words: a ``set`` of group starts, a size, a granularity.

:class:`Model` has a twin for every operation of HBitmap, with its errors as the built-in exception
that a caller would catch. It walks over what is dirty and never over the size, so it also models
bitmaps of 2**63 - 1 items. :func:`assert_same` compares a bitmap with its model in full.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from operator import index
from typing import Any, Optional, Union

from pybitmap import HBitmap, _core

Starts = set[int]
Area = tuple[int, int]
Operand = Union["Model", Iterable[Any]]
Maybe = Optional[int]


class Model:
    def __init__(self, size: int, granularity: int = 0) -> None:
        size, granularity = index(size), index(granularity)
        if not 0 <= granularity <= 63:
            raise ValueError(granularity)
        if not 0 <= size < 2**63 or -(-size // 2**granularity) > 2**41:
            raise ValueError(size)
        self.size = size
        self.granularity = granularity
        self.starts: Starts = set()

    def __repr__(self) -> str:
        return f"<Model {self.size} {self.granularity} {sorted(self.starts)}>"

    # ---- groups and ranges ------------------------------------------------------------------

    @property
    def group(self) -> int:
        """Items in a group."""
        return 1 << self.granularity

    @property
    def rounded_size(self) -> int:
        return self.start_of(self.size + self.group - 1)

    def start_of(self, item: int) -> int:
        return item - item % self.group

    def touched(self, start: int, count: int) -> Iterable[int]:
        """The starts of the groups that a range touches."""
        return range(self.start_of(start), start + count, self.group) if count else ()

    def _clean(self, start: int, end: int) -> Starts:
        """Cleans the groups that start in [start, end); returns those that were dirty."""
        gone = {item for item in self.starts if start <= item < end}
        self.starts -= gone
        return gone

    @staticmethod
    def _refuse_beyond_64_bits(start: int, count: int) -> None:
        if not 0 <= start < 2**64 or not 0 <= count < 2**64:
            raise ValueError(start, count)

    def _refuse_outside(self, start: int, count: int) -> None:
        self._refuse_beyond_64_bits(start, count)
        if count and start + count > self.size:
            raise ValueError(start, count)

    def _refuse_cut(self, start: int, count: int) -> None:
        """Refuses what is outside, and what cuts a group elsewhere than at the end."""
        self._refuse_beyond_64_bits(start, count)
        if not count:
            return
        end = start + count
        if start >= self.size or end > self.rounded_size:
            raise ValueError(start, count)
        if start % self.group or (end % self.group and end != self.size):
            raise ValueError(start, count)

    def _search_end(self, start: int, count: Maybe) -> int:
        """Searches clamp; what is negative is refused."""
        if start < 0 or (count is not None and index(count) < 0):
            raise ValueError(start, count)
        return self.size if count is None else min(start + count, self.size)

    # ---- marks ------------------------------------------------------------------------------

    def set(self, start: int, count: int = 1) -> None:
        start, count = index(start), index(count)
        self._refuse_outside(start, count)
        self.starts.update(self.touched(start, count))

    def set_many(self, starts: Iterable[int], counts: Iterable[int]) -> None:
        starts, counts = list(starts), list(counts)
        if len(starts) != len(counts):
            raise ValueError(len(starts), len(counts))
        for start, count in zip(starts, counts):
            self._refuse_outside(start, count)
        for start, count in zip(starts, counts):
            self.set(start, count)

    def reset(self, start: int, count: Maybe = None) -> None:
        start, count = index(start), self.group if count is None else index(count)
        self._refuse_cut(start, count)
        self._clean(start, start + count)

    def reset_all(self) -> None:
        self.starts.clear()

    def flip(self, start: int, count: Maybe = None) -> None:
        start, count = index(start), self.group if count is None else index(count)
        self._refuse_cut(start, count)
        self.starts ^= {item for item in self.touched(start, count) if item < self.size}

    def merge_bits(
        self, bits: Any, start: int = 0, granularity: Maybe = None, msb_first: bool = False
    ) -> None:
        start = index(start)
        granularity = self.granularity if granularity is None else index(granularity)
        if not 0 <= granularity <= 63:
            raise ValueError(granularity)
        self._refuse_beyond_64_bits(start, 0)
        for byte_at, byte in enumerate(memoryview(bits).tobytes()):
            for bit in range(8):
                if byte >> (7 - bit if msb_first else bit) & 1:
                    begin = start + ((8 * byte_at + bit) << granularity)
                    self._refuse_outside(begin, 1)
        for byte_at, byte in enumerate(memoryview(bits).tobytes()):
            for bit in range(8):
                if byte >> (7 - bit if msb_first else bit) & 1:
                    begin = start + ((8 * byte_at + bit) << granularity)
                    end = min(begin + (1 << granularity), self.size)
                    self.starts.update(self.touched(begin, end - begin))

    def __setitem__(self, key: Any, value: object) -> None:
        if isinstance(key, slice):
            if key.step is not None and index(key.step) != 1:
                raise ValueError(key.step)
            start = 0 if key.start is None else index(key.start)
            count = (self.size if key.stop is None else index(key.stop)) - start
        else:
            start, count = index(key), 1 if value else self.group
        if value not in (False, True):
            raise TypeError(value)
        if value:
            self.set(start, count)
        else:
            self.reset(start, count)

    # ---- questions --------------------------------------------------------------------------

    def get(self, item: int) -> bool:
        if index(item) < 0:
            raise ValueError(item)
        return item in self

    def __getitem__(self, item: int) -> bool:
        if not 0 <= index(item) < self.size:
            raise IndexError(item)
        return item in self

    def __contains__(self, item: Any) -> bool:
        try:
            item = index(item)
        except TypeError:
            return False
        return 0 <= item < self.size and self.start_of(item) in self.starts

    def __len__(self) -> int:
        return len(self.starts)

    def empty(self) -> bool:
        return not self.starts

    def count(self, start: Maybe = None, count: Maybe = None) -> int:
        if start is None and count is None:
            return len(self.starts) << self.granularity
        start = 0 if start is None else index(start)
        return sum(nitems for _, nitems in self.areas(start, end=self._search_end(start, count)))

    def rank(self, item: int) -> int:
        if index(item) < 0:
            raise ValueError(item)
        return sum(start <= index(item) for start in self.starts)

    def select(self, n: int) -> int:
        if not 0 <= index(n) < len(self.starts):
            raise IndexError(n)
        return sorted(self.starts)[index(n)]

    # ---- searches ---------------------------------------------------------------------------

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.starts))

    def iter(self, first: int = 0) -> Iterator[int]:
        if index(first) < 0:
            raise ValueError(first)
        if index(first) >= self.size:  # also where the last group has items beyond it
            return iter([])
        return iter([item for item in self if item >= self.start_of(first)])

    def areas(self, start: int = 0, *, end: Maybe = None) -> list[Area]:
        start = index(start)
        end = self.size if end is None else min(index(end), self.size)
        if start < 0 or end < 0:
            raise ValueError(start, end)
        areas: list[Area] = []
        for item in self:
            first, last = max(item, start), min(item + self.group, end)
            if first >= last:
                continue
            if areas and sum(areas[-1]) == first:
                first, _ = areas.pop()
            areas.append((first, last - first))
        return areas

    def next_dirty(self, start: int, count: Maybe = None) -> Maybe:
        areas = self.areas(start, end=self._search_end(index(start), count))
        return areas[0][0] if areas else None

    def prev_dirty(self, start: Maybe = None, count: Maybe = None) -> Maybe:
        start = max(0, self.size - 1) if start is None else index(start)
        first = 0 if count is None else start - index(count) + 1
        if start < 0 or first > start + 1:
            raise ValueError(start, count)
        areas = self.areas(max(0, first), end=start + 1)
        return sum(areas[-1]) - 1 if areas else None

    def items(self, start: int = 0, end: Maybe = None) -> list[int]:
        """What items_array() gives, as a list."""
        areas = self.areas(start, end=end)
        return [item for first, count in areas for item in self.touched(first, count)]

    def next_zero(self, start: int, count: Maybe = None) -> Maybe:
        dirty, same = self.status(start, count)
        item = start + same if dirty else start
        return item if item < self._search_end(start, count) else None

    def next_dirty_area(
        self, start: int, end: Maybe = None, max_count: Maybe = None
    ) -> Area | None:
        if max_count is not None and index(max_count) < 1:
            raise ValueError(max_count)
        areas = self.areas(start, end=end)
        if not areas:
            return None
        first, count = areas[0]
        return first, count if max_count is None else min(count, max_count)

    def status(self, start: int, count: Maybe = None) -> tuple[bool, int]:
        end = self._search_end(index(start), count)
        if start >= end:
            return False, 0
        areas = self.areas(start, end=end)
        if areas and areas[0][0] == start:
            return True, areas[0][1]
        return False, (areas[0][0] if areas else end) - start

    # ---- as a set ---------------------------------------------------------------------------

    def add(self, item: int) -> None:
        self.set(item)

    def discard(self, item: object) -> None:
        if item in self:
            self.remove(item)

    def remove(self, item: Any) -> None:
        if item not in self:
            raise KeyError(item)
        self.starts.remove(self.start_of(index(item)))

    def pop(self) -> int:
        item = min(self.starts, default=None)
        if item is None:
            raise KeyError("pop")
        self.starts.remove(item)
        return item

    def clear(self) -> None:
        self.starts.clear()

    def copy(self) -> Model:
        result = Model(self.size, self.granularity)
        result.starts = set(self.starts)
        return result

    def groups_of(self, other: Operand, strict: bool) -> Starts:
        """The groups of self that the other's elements are in; strict: all must be in one."""
        if isinstance(other, Model):
            if (other.size, other.granularity) != (self.size, self.granularity):
                raise ValueError("shape")
            return other.starts
        groups = set()
        for element in other:
            try:
                item = index(element)
            except TypeError:
                if strict:
                    raise
                continue
            if 0 <= item < self.size:
                groups.add(self.start_of(item))
            elif strict:
                raise ValueError(item)
        return groups

    def merge(self, other: Model) -> None:
        if not isinstance(other, Model):
            raise TypeError(other)
        if other.size != self.size:
            raise ValueError(other.size)
        for start, count in other.areas():
            self.starts.update(self.touched(start, count))

    def update(self, *others: Operand) -> None:
        result = self.copy()
        for other in others:
            if isinstance(other, Model):
                result.merge(other)
            else:
                result.starts |= self.groups_of(other, strict=True)
        self.starts = result.starts

    def intersection_update(self, *others: Operand) -> None:
        result = set(self.starts)
        for other in others:
            result &= self.groups_of(other, strict=False)
        self.starts = result

    def difference_update(self, *others: Operand) -> None:
        result = set(self.starts)
        for other in others:
            result -= self.groups_of(other, strict=False)
        self.starts = result

    def symmetric_difference_update(self, other: Operand) -> None:
        self.starts = self.starts ^ self.groups_of(other, strict=True)

    def union(self, *others: Operand) -> Model:
        result = self.copy()
        result.update(*others)
        return result

    def intersection(self, *others: Operand) -> Model:
        result = self.copy()
        result.intersection_update(*others)
        return result

    def difference(self, *others: Operand) -> Model:
        result = self.copy()
        result.difference_update(*others)
        return result

    def symmetric_difference(self, other: Operand) -> Model:
        result = self.copy()
        result.symmetric_difference_update(other)
        return result

    __or__ = __ror__ = union
    __and__ = __rand__ = intersection
    __sub__ = difference
    __xor__ = __rxor__ = symmetric_difference

    def __rsub__(self, other: Iterable[Any]) -> Model:
        result = Model(self.size, self.granularity)
        result.starts = self.groups_of(other, strict=True) - self.starts
        return result

    def __ior__(self, other: Operand) -> Model:  # type: ignore[misc]
        self.update(other)
        return self

    def __iand__(self, other: Operand) -> Model:  # type: ignore[misc]
        self.intersection_update(other)
        return self

    def __isub__(self, other: Operand) -> Model:  # type: ignore[misc]
        self.difference_update(other)
        return self

    def __ixor__(self, other: Operand) -> Model:  # type: ignore[misc]
        self.symmetric_difference_update(other)
        return self

    # With a plain set: literally.

    def literal(self, other: Operand) -> AbstractSet[Any]:
        return self.groups_of(other, strict=True) if isinstance(other, Model) else frozenset(other)

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Model):
            return (self.size, self.granularity, self.starts) == (
                other.size,
                other.granularity,
                other.starts,
            )
        return self.starts == other

    def __le__(self, other: Operand) -> bool:
        return self.starts <= self.literal(other)

    def __lt__(self, other: Operand) -> bool:
        return self.starts < self.literal(other)

    def __ge__(self, other: Operand) -> bool:
        return self.starts >= self.literal(other)

    def __gt__(self, other: Operand) -> bool:
        return self.starts > self.literal(other)

    issubset = __le__
    issuperset = __ge__

    def isdisjoint(self, other: Operand) -> bool:
        return self.starts.isdisjoint(self.literal(other))

    def intersection_count(self, other: Operand) -> int:
        return len(self.starts & self.groups_of(other, strict=False))

    def union_count(self, other: Operand) -> int:
        return len(self.starts | self.groups_of(other, strict=True))

    def difference_count(self, other: Operand) -> int:
        return len(self.starts - self.groups_of(other, strict=False))

    def symmetric_difference_count(self, other: Operand) -> int:
        return len(self.starts ^ self.groups_of(other, strict=True))

    # ---- whole bitmaps ----------------------------------------------------------------------

    def drain(self, start: int = 0, count: Maybe = None, into: Model | None = None) -> Model:
        start = index(start)
        count = self.size - start if count is None else index(count)
        if into is None:
            into = Model(self.size, self.granularity)
        elif not isinstance(into, Model):
            raise TypeError(into)
        elif into is self or (into.size, into.granularity) != (self.size, self.granularity):
            raise ValueError(into)
        self._refuse_cut(start, count)
        into.starts |= self._clean(start, start + count)
        return into

    def truncate(self, size: int) -> None:
        Model(size, self.granularity)  # refuses what no bitmap can have
        self.size = index(size)
        self._clean(self.rounded_size, 2**64)

    def leaf(self) -> bytes:
        """The leaf words, at least one, as little-endian bytes."""
        nwords = max(1, -(-self.size // (64 * self.group)))
        leaf = bytearray(8 * nwords)
        for item in self.starts:
            bit = item // self.group
            leaf[bit // 8] |= 1 << bit % 8
        return bytes(leaf)

    def words(self) -> bytes:
        """The leaf words in the byte order of this machine."""
        words = array("Q", self.leaf())
        if sys.byteorder == "big":
            words.byteswap()
        return words.tobytes()

    def sha256(self) -> str:
        return hashlib.sha256(self.leaf()).hexdigest()

    @property
    def align(self) -> int:
        """Items in a leaf word; what a chunk of serialized data is a multiple of."""
        if self.granularity >= 58:
            raise ValueError(self.granularity)
        return 64 * self.group

    def serialize(self, start: int = 0, count: Maybe = None) -> bytes:
        start = index(start)
        count = self.size - start if count is None else index(count)
        align = self.align
        if not 0 <= start <= self.size or not 0 <= count < 2**64:
            raise ValueError(start, count)
        if count == 0:
            return b""
        end = start + count
        if start == self.size or end > self.rounded_size or start % align:
            raise ValueError(start, count)
        if end <= self.start_of(self.size - 1) and end % align:
            raise ValueError(start, count)
        return self.leaf()[8 * (start // align) : 8 * -(-end // align)]

    def deserialize(self, data: Any, start: int = 0) -> None:
        start = index(start)
        view = memoryview(data)
        if view.itemsize != 1:
            raise TypeError(view.format)
        align = self.align
        nwords, rest = divmod(view.nbytes, 8)
        if not 0 <= start <= self.size or rest or nwords > -(-(self.size - start) // align):
            raise ValueError(start, view.nbytes)
        if nwords and start % align:
            raise ValueError(start)
        self._clean(start, start + nwords * align)
        for i, byte in enumerate(bytes(view)):
            for bit in range(8):
                item = start + (8 * i + bit) * self.group
                if byte >> bit & 1 and item < self.size:
                    self.starts.add(item)

    @classmethod
    def from_bytes(cls, data: bytes, size: int, granularity: int = 0) -> Model:
        result = Model(size, granularity)
        if len(data) != len(result.serialize()):
            raise ValueError(len(data))
        result.deserialize(data)
        return result


def as_areas(array: Any) -> list[Area]:
    """What areas_array() gave, as areas() gives it."""
    return [(start, count) for start, count in array.tolist()]


def assert_same(hb: HBitmap, model: Model) -> None:
    """The bitmap is sound, and all that it answers about itself is what the model answers."""
    _core.check(hb._hb)
    assert (hb.size, hb.granularity) == (model.size, model.granularity)
    assert list(hb) == list(model)
    assert list(hb.areas()) == model.areas()
    assert len(hb) == len(model)
    assert hb.count() == model.count()
    assert hb.empty() is model.empty()
    assert bool(hb) is not model.empty()
    if hb.granularity < 58:
        assert hb.serialize() == model.serialize()
    _core.check(hb._hb)
