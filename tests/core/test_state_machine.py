# SPDX-License-Identifier: MIT
"""Random sequences of every operation, compared with the model in full after each step.

Four bitmaps live side by side: two of one shape, one of the same size and another granularity, one
of another size. Arguments are drawn near the edges and include wrong ones: a refused call must be
refused by the model too, and leave everything as it was. Iterators and views of the words stay
alive over many steps. At the end the model is broken on purpose, to prove that the checks notice.
"""

from __future__ import annotations

import copy
import operator
import pickle
from array import array
from collections.abc import Iterable, Iterator
from decimal import Decimal
from operator import index
from typing import Any, Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RULE_MARKER,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model import Area, Maybe, Model, Starts, as_areas, assert_same
from support import collect

from pybitmap import BitmapError, HBitmap, _core
from pybitmap._cffi import ffi

pytestmark = pytest.mark.core

Call = Callable[[Any], Any]

GROUPS = st.one_of(
    st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097]),
    st.integers(0, 300),
    st.integers(0, 9000),
)
#: Seldom: each step costs some 100 ms.
MANY_GROUPS = st.sampled_from([2**18 - 1, 2**18, 2**18 + 1])
GRANULARITIES = st.one_of(st.sampled_from([0, 1, 57, 58, 62, 63]), st.integers(0, 63))

WRONG_TYPES: list[Any] = [1.0, "1", b"1", None, Decimal(1), 1j, [1], (1,)]
NO_ITEMS: list[Any] = [-1, -(2**64), 2**63, 2**64, 2**64 + 1, 2**70]
#: Hashable, and items of no bitmap.
NO_ELEMENTS: list[Any] = ["a", None, b"", 0.5, (1,), -1, 2**63, 2**70]


@st.composite
def sizes(draw: st.DrawFn, granularity: int, groups: st.SearchStrategy[int] = GROUPS) -> int:
    """So many groups, the last of them whole or cut."""
    most = (2**63 - 1) >> granularity
    ngroups = min(draw(groups), most)
    cut = draw(st.one_of(st.just(0), st.integers(0, (1 << granularity) - 1))) if ngroups else 0
    return (ngroups << granularity) - cut


def positions(model: Model) -> st.SearchStrategy[int]:
    size, group = model.size, model.group
    ngroups = model.rounded_size // group
    return st.one_of(
        st.integers(0, size),
        st.integers(0, ngroups).map(lambda n: n * group),
        st.integers(0, ngroups // 64).map(lambda n: 64 * n * group),
        st.sampled_from([0, 1, max(size - 1, 0), size, model.rounded_size, size + 1]),
    )


def counts(model: Model, start: int) -> st.SearchStrategy[int]:
    group = model.group
    return st.one_of(
        st.integers(0, 3 * group),
        st.integers(0, 5).map(lambda n: n * group),
        st.integers(0, 200).map(lambda n: n * group),
        st.just(max(0, model.size - start)),
        st.just(max(0, model.rounded_size - start)),
        st.integers(0, max(0, model.size - start) + 2),
    )


@st.composite
def ranges(draw: st.DrawFn, model: Model) -> tuple[int, int]:
    start = draw(positions(model))
    return start, draw(counts(model, start))


@st.composite
def wrong_ranges(draw: st.DrawFn, model: Model) -> tuple[int, int]:
    """Ranges that marks refuse: negative, beyond the end, over 64 bits."""
    start = draw(positions(model))
    rest = max(0, model.size - start)
    refused: tuple[int, int] = draw(
        st.one_of(
            st.tuples(st.sampled_from(NO_ITEMS), counts(model, start)),
            st.tuples(st.just(start), st.sampled_from([-1, rest + 1, *NO_ITEMS])),
            st.just((start, 2**64 - start)),
        )
    )
    return refused


def elements(model: Model) -> st.SearchStrategy[Iterable[Any]]:
    """An iterable that is no bitmap, of items; sometimes with one that is none."""
    item = positions(model).map(lambda item: min(item, model.size - 1))
    items = st.lists(item, max_size=8 if model.size else 0)
    wrong = st.sampled_from([*NO_ELEMENTS, model.size])
    return st.one_of(
        items,
        items.map(tuple),
        items.map(frozenset),
        items.map(set),
        st.builds(lambda plain, element: {*plain, element}, items, wrong),
        st.builds(lambda plain, element: [*plain, element], items, wrong),
    )


@st.composite
def foreign_bits(draw: st.DrawFn, nbits: int) -> bytes:
    """A flat bitmap of hardly more than so many bits, a few KiB at most."""
    nbytes = min(-(-nbits // 8), draw(st.sampled_from([1, 9, 70, 600, 1100])))
    pieces = draw(st.lists(st.sampled_from([b"\0" * 64, b"\0", b"\xff" * 9, b"\x81", b"\x10"])))
    data = b"".join(pieces)[: max(0, nbytes - 1)]
    # Of the last byte some may be beyond the end.
    data += bytes([draw(st.sampled_from([0, 1, 0x80, 0xFF]))]) if nbytes else b""
    return data + draw(st.sampled_from([b"", b"\0" * 70, b"\0\1"]))


class Pair:
    """A bitmap, its model, and the views of its words."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.real = HBitmap(model.size, model.granularity)
        self.views: list[memoryview] = []


class ItemWalk:
    """A live iterator, and what it owes: the items dirty all the time since it was made."""

    def __init__(self, pair: Pair, iterator: Iterator[int], first: int) -> None:
        self.model, self.iterator = pair.model, iterator
        self.owed: Starts = {
            item for item in pair.model.starts if item >= pair.model.start_of(first)
        }
        self.last = -1
        self.done = False

    def keep_up(self) -> None:
        """After every change."""
        self.owed &= self.model.starts

    def step(self) -> None:
        item = next(self.iterator, None)
        if item is None:
            self.done = True
            assert not self.owed, f"not given: {sorted(self.owed)}"
            return
        assert item > self.last, f"{item} after {self.last}"
        assert item in self.model.starts, f"{item} is not dirty any more"
        assert not self.owed or min(self.owed) >= item, f"{min(self.owed)} was passed over"
        self.owed.discard(item)
        self.last = item


class AreaWalk:
    """The same for an iterator over areas."""

    def __init__(self, pair: Pair, iterator: Iterator[Area], start: int, end: Maybe) -> None:
        self.model, self.iterator = pair.model, iterator
        self.start = start
        self.end = 2**63 if end is None else end
        self.owed: Starts = {
            item
            for item in pair.model.starts
            if item < self.end and item + pair.model.group > start
        }
        self.covered = start
        self.done = False

    def keep_up(self) -> None:
        self.owed &= self.model.starts

    def step(self) -> None:
        area = next(self.iterator, None)
        if area is None:
            self.done = True
            assert not self.owed, f"not given: {sorted(self.owed)}"
            return
        start, count = area
        end = start + count
        assert self.covered <= start < end <= min(self.end, self.model.size), area
        for item in self.model.touched(start, count):
            assert item in self.model.starts, f"{item} of {area} is not dirty any more"
        passed = {item for item in self.owed if max(item, self.start) < start}
        assert not passed, f"{sorted(passed)} were passed over before {area}"
        self.owed = {item for item in self.owed if item >= end}
        self.covered = end


def outcome(call: Call, arguments: list[Any]) -> Any:
    try:
        return call(*arguments)
    except Exception as error:
        return error


class Machine(RuleBasedStateMachine):
    model_type: type[Model] = Model

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Pair] = []
        self.walks: list[tuple[Pair, ItemWalk | AreaWalk]] = []

    # ---- the machinery ----------------------------------------------------------------------

    def pair(self, size: int, granularity: int) -> Pair:
        return Pair(self.model_type(size, granularity))

    @initialize(data=st.data(), granularity=GRANULARITIES, many=st.integers(0, 19))
    def make(self, data: st.DataObject, granularity: int, many: int) -> None:
        groups = MANY_GROUPS if many == 19 else GROUPS
        size = data.draw(sizes(granularity, groups), "size")
        coarsest = data.draw(st.integers(max(0, granularity - 2), 63), "other granularity")
        other_size = data.draw(sizes(granularity), "other size")
        self.pairs = [
            self.pair(size, granularity),
            self.pair(size, granularity),
            self.pair(size, coarsest),
            self.pair(other_size, granularity),
        ]

    def both(self, call: Callable[..., Any], *pairs: Pair) -> None:
        """The same call on the models and on the bitmaps must have the same outcome."""
        want = outcome(call, [pair.model for pair in pairs])
        got = outcome(call, [pair.real for pair in pairs])
        if isinstance(want, Exception):
            assert isinstance(got, type(want)), f"{got!r} instead of {want!r}"
            if isinstance(want, (ValueError, IndexError)):
                assert isinstance(got, BitmapError), repr(got)
        elif isinstance(want, Model):
            assert isinstance(got, HBitmap), f"{got!r} instead of {want!r}"
            assert_same(got, want)
        else:
            assert type(got) is type(want), f"{got!r} instead of {want!r}"
            assert got == want, f"{got!r} instead of {want!r}"

    @invariant()
    def same(self) -> None:
        for pair in self.pairs:
            assert_same(pair.real, pair.model)
            for view in pair.views:
                assert view.tobytes() == pair.model.words()
        for _, walk in self.walks:
            walk.keep_up()

    def teardown(self) -> None:
        # Pins go with their views, on PyPy when it collects.
        self.pairs.clear()
        self.walks.clear()

    PAIR = st.integers(0, 3)
    DATA = st.data()

    # ---- marks ------------------------------------------------------------------------------

    @rule(n=PAIR, data=DATA)
    def set(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        start, count = data.draw(ranges(pair.model))
        self.both(lambda hb: hb.set(start, count), pair)

    @rule(n=PAIR, data=DATA)
    def set_one(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        item = data.draw(positions(pair.model))
        method = data.draw(st.sampled_from(["set", "add"]))
        self.both(lambda hb: getattr(hb, method)(item), pair)

    @rule(n=PAIR, data=DATA)
    def set_many(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        writes = data.draw(st.lists(ranges(pair.model), max_size=20))
        starts = array("Q", [start for start, _ in writes])
        counts = array("Q", [min(count, 2**64 - 1) for _, count in writes])
        if data.draw(st.integers(0, 9)) == 9:
            counts.append(1)
        self.both(lambda hb: hb.set_many(starts, counts), pair)

    @rule(n=PAIR, data=DATA)
    def reset(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        start, count = data.draw(ranges(pair.model))
        self.both(lambda hb: hb.reset(start, count), pair)

    @rule(n=PAIR, data=DATA)
    def flip(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        start, count = data.draw(ranges(pair.model))
        if count <= 10000 * pair.model.group:
            self.both(lambda hb: hb.flip(start, count), pair)
        self.both(lambda hb: hb.flip(start), pair)

    @rule(n=PAIR, data=DATA, msb_first=st.booleans())
    def merge_bits(self, n: int, data: st.DataObject, msb_first: bool) -> None:
        pair = self.pairs[n]
        size, own = pair.model.size, pair.model.granularity
        start = data.draw(positions(pair.model))
        near = st.integers(max(0, own - 5), min(63, own + 3))
        granularity = data.draw(st.none() | near)
        most = max(0, size - start - 1) >> (own if granularity is None else granularity)
        foreign = data.draw(foreign_bits(most + 1))
        self.both(lambda hb: hb.merge_bits(foreign, start, granularity, msb_first), pair)

    @rule(n=PAIR, data=DATA)
    def reset_one(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        start = data.draw(positions(pair.model))
        self.both(lambda hb: hb.reset(start), pair)

    @rule(n=PAIR, method=st.sampled_from(["reset_all", "clear"]), really=st.integers(0, 3))
    def reset_all(self, n: int, method: str, really: int) -> None:
        if really == 3:
            self.both(lambda hb: getattr(hb, method)(), self.pairs[n])

    @rule(n=PAIR, data=DATA, value=st.booleans())
    def assign(self, n: int, data: st.DataObject, value: bool) -> None:
        pair = self.pairs[n]
        start, count = data.draw(ranges(pair.model))
        key: Any = data.draw(
            st.sampled_from(
                [
                    start,
                    slice(start, start + count),
                    slice(start, start + count, 1),
                    slice(start, start + count, 2),
                    slice(start, None),
                    slice(None, start),
                    slice(-1, None),
                    slice(None, -1),
                    slice(start + 1, start),
                ]
            )
        )
        self.both(lambda hb: hb.__setitem__(key, value), pair)

    @rule(n=PAIR, data=DATA)
    def refused_mark(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        start, count = data.draw(wrong_ranges(pair.model))
        method = data.draw(st.sampled_from(["set", "reset", "flip", "drain", "serialize"]))
        if method == "serialize" and count == 0:
            return
        self.both(lambda hb: getattr(hb, method)(start, count), pair)

    @rule(n=PAIR, wrong=st.sampled_from(WRONG_TYPES), data=DATA)
    def refused_type(self, n: int, wrong: Any, data: st.DataObject) -> None:
        calls: list[Call] = [
            lambda hb: hb.set(wrong),
            lambda hb: hb.add(wrong),
            lambda hb: hb.reset(wrong),
            lambda hb: hb.get(wrong),
            lambda hb: hb[wrong],
            lambda hb: hb.__setitem__(wrong, True),
            lambda hb: hb.__setitem__(slice(0, 1, wrong if wrong is not None else "1"), True),
            lambda hb: hb.__setitem__(0, wrong),
            lambda hb: hb.set(0, wrong),
            lambda hb: hb.iter(wrong),
            lambda hb: hb.areas(wrong),
            lambda hb: hb.next_dirty(wrong),
            lambda hb: hb.next_zero(wrong),
            lambda hb: hb.next_dirty_area(wrong),
            lambda hb: hb.status(wrong),
            lambda hb: hb.merge(wrong),
            lambda hb: hb.flip(wrong),
            lambda hb: hb.rank(wrong),
            lambda hb: hb.select(wrong),
            lambda hb: hb.merge_bits(b"", wrong),
            lambda hb: hb.truncate(wrong),
            lambda hb: hb.drain(wrong),
            lambda hb: hb.serialize(wrong),
            lambda hb: hb.update([wrong]),
            lambda hb: hb ^ [wrong],
            lambda hb: hb.remove(wrong),
            lambda hb: hb.discard(wrong),
            lambda hb: wrong in hb,
        ]
        if wrong is not None:
            calls += [
                lambda hb: hb.reset(0, wrong),
                lambda hb: hb.count(wrong),
                lambda hb: hb.count(0, wrong),
                lambda hb: hb.areas(0, end=wrong),
                lambda hb: hb.next_dirty(0, wrong),
                lambda hb: hb.prev_dirty(wrong),
                lambda hb: hb.prev_dirty(0, wrong),
                lambda hb: hb.flip(0, wrong),
                lambda hb: hb.merge_bits(b"", 0, wrong),
                lambda hb: hb.next_zero(0, wrong),
                lambda hb: hb.next_dirty_area(0, end=wrong),
                lambda hb: hb.next_dirty_area(0, end=None, max_count=wrong),
                lambda hb: hb.status(0, wrong),
                lambda hb: hb.drain(0, wrong),
                lambda hb: hb.drain(into=wrong),
                lambda hb: hb.serialize(0, wrong),
            ]
        self.both(data.draw(st.sampled_from(calls)), self.pairs[n])

    # ---- questions and searches -------------------------------------------------------------

    @rule(n=PAIR, data=DATA)
    def ask_item(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        item = data.draw(positions(pair.model) | st.sampled_from(NO_ITEMS))
        self.both(lambda hb: item in hb, pair)
        self.both(lambda hb: hb.get(item), pair)
        self.both(lambda hb: hb[item], pair)

    @rule(n=PAIR, data=DATA)
    def search(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        start = data.draw(positions(pair.model) | st.sampled_from(NO_ITEMS))
        count = data.draw(st.none() | counts(pair.model, start) | st.sampled_from(NO_ITEMS))
        end = data.draw(st.none() | positions(pair.model) | st.sampled_from(NO_ITEMS))
        most = data.draw(st.none() | counts(pair.model, start) | st.sampled_from(NO_ITEMS))
        self.both(lambda hb: hb.next_dirty(start, count), pair)
        self.both(lambda hb: hb.next_zero(start, count), pair)
        self.both(lambda hb: hb.status(start, count), pair)
        self.both(lambda hb: hb.count(start, count), pair)
        self.both(lambda hb: hb.next_dirty_area(start, end=end, max_count=most), pair)
        self.both(lambda hb: list(hb.areas(start, end=end)), pair)
        self.both(lambda hb: list(hb.iter(start)), pair)
        self.both(lambda hb: hb.prev_dirty(start, count), pair)
        self.both(lambda hb: hb.prev_dirty(None, count), pair)
        self.both(lambda hb: hb.rank(start), pair)
        self.both(lambda hb: hb.select(start), pair)

    @rule(n=PAIR, data=DATA)
    def ask_order(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        which = data.draw(st.integers(-1, len(pair.model)))
        self.both(lambda hb: hb.select(which), pair)
        if 0 <= which < len(pair.model):
            item = pair.real.select(which)
            assert pair.real.rank(item) == which + 1

    @rule(n=PAIR, data=DATA)
    def items_array(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        start = data.draw(positions(pair.model))
        end = data.draw(st.none() | positions(pair.model))
        items = pair.real.items_array(start, end=end)
        assert (items.data.format, items.data.shape) == ("Q", (len(items),))
        assert items.tolist() == pair.model.items(start, end)

    @rule(n=PAIR, data=DATA)
    def to_mask(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        granularity, size = pair.model.granularity, pair.model.size
        start = data.draw(positions(pair.model))
        end = data.draw(st.none() | positions(pair.model))
        mask = pair.real.to_mask(start, end=end)
        last = size if end is None else min(end, size)
        touched = range(start >> granularity, -(-last >> granularity))
        groups, starts = touched if start < last else (), set(pair.model)
        assert mask.tolist() == [group << granularity in starts for group in groups]
        whole = pair.real.to_mask()
        made = HBitmap.from_mask(whole, size=size, granularity=granularity)
        assert_same(made, pair.model)

    @rule(n=PAIR)
    def areas_array(self, n: int) -> None:
        pair = self.pairs[n]
        areas = pair.real.areas_array()
        assert (areas.data.format, areas.data.ndim) == ("Q", 2)
        assert areas.shape == (len(pair.model.areas()), 2)
        assert as_areas(areas) == pair.model.areas()

    @rule(n=PAIR)
    def sha256(self, n: int) -> None:
        self.both(lambda hb: hb.sha256(), self.pairs[n])

    # ---- as a set ---------------------------------------------------------------------------

    @rule(n=PAIR, data=DATA, method=st.sampled_from(["discard", "remove"]))
    def take(self, n: int, data: st.DataObject, method: str) -> None:
        pair = self.pairs[n]
        item = data.draw(positions(pair.model) | st.sampled_from(NO_ITEMS + NO_ELEMENTS))
        self.both(lambda hb: getattr(hb, method)(item), pair)

    @rule(n=PAIR, times=st.integers(1, 3))
    def pop(self, n: int, times: int) -> None:
        for _ in range(times):
            self.both(lambda hb: hb.pop(), self.pairs[n])

    OPERATORS = st.sampled_from(
        [
            *[operator.or_, operator.and_, operator.sub, operator.xor],
            *[operator.ior, operator.iand, operator.isub, operator.ixor],
        ]
    )
    METHODS = st.sampled_from(
        [
            *["union", "intersection", "difference", "symmetric_difference"],
            *["update", "intersection_update", "difference_update"],
            *["symmetric_difference_update", "issubset", "issuperset", "isdisjoint"],
            *["intersection_count", "union_count"],
            *["difference_count", "symmetric_difference_count"],
        ]
    )
    COMPARISONS = st.sampled_from(
        [operator.eq, operator.ne, operator.le, operator.lt, operator.ge, operator.gt]
    )

    @rule(n=PAIR, m=PAIR, op=OPERATORS)
    def operate(self, n: int, m: int, op: Callable[[Any, Any], Any]) -> None:
        if op in (operator.or_, operator.ior):
            # Of any granularity: the merge.
            self.both(lambda a, b: op(a, b), self.pairs[n], self.pairs[m])
        else:
            self.both(op, self.pairs[n], self.pairs[m])

    @rule(n=PAIR, m=PAIR, method=METHODS)
    def operate_by_name(self, n: int, m: int, method: str) -> None:
        self.both(lambda a, b: getattr(a, method)(b), self.pairs[n], self.pairs[m])

    @rule(n=PAIR, m=PAIR, op=COMPARISONS)
    def compare(self, n: int, m: int, op: Callable[[Any, Any], Any]) -> None:
        self.both(op, self.pairs[n], self.pairs[m])

    @rule(n=PAIR, m=PAIR)
    def merge(self, n: int, m: int) -> None:
        self.both(lambda a, b: a.merge(b), self.pairs[n], self.pairs[m])

    @rule(n=PAIR, data=DATA, op=OPERATORS)
    def operate_with_plain(
        self, n: int, data: st.DataObject, op: Callable[[Any, Any], Any]
    ) -> None:
        pair = self.pairs[n]
        other = data.draw(elements(pair.model))
        self.both(lambda hb: op(hb, other), pair)

    @rule(n=PAIR, data=DATA)
    def operate_reflected(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        other = data.draw(elements(pair.model))
        op = data.draw(st.sampled_from([operator.or_, operator.and_, operator.sub, operator.xor]))
        self.both(lambda hb: op(other, hb), pair)

    @rule(n=PAIR, data=DATA, method=METHODS)
    def operate_by_name_with_plain(self, n: int, data: st.DataObject, method: str) -> None:
        pair = self.pairs[n]
        other = data.draw(elements(pair.model))
        self.both(lambda hb: getattr(hb, method)(other), pair)

    @rule(n=PAIR, data=DATA, op=COMPARISONS, wiggle=st.integers(-1, 1))
    def compare_with_plain(
        self, n: int, data: st.DataObject, op: Callable[[Any, Any], bool], wiggle: int
    ) -> None:
        pair = self.pairs[n]
        other = set(pair.model.starts)
        if wiggle < 0 and other:
            other.pop()
        elif wiggle > 0:
            other.add(data.draw(positions(pair.model)))
        self.both(lambda hb: op(hb, other), pair)
        self.both(lambda hb: op(other, hb), pair)
        self.both(lambda hb: op(hb, frozenset(other)), pair)

    # ---- whole bitmaps ----------------------------------------------------------------------

    @rule(n=PAIR, data=DATA)
    def drain(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        start, count = data.draw(ranges(pair.model))
        self.both(lambda hb: hb.drain(start, count), pair)

    @rule(n=PAIR)
    def drain_all(self, n: int) -> None:
        self.both(lambda hb: hb.drain(), self.pairs[n])

    @rule(n=PAIR, m=PAIR, data=DATA)
    def drain_into(self, n: int, m: int, data: st.DataObject) -> None:
        pair, into = self.pairs[n], self.pairs[m]
        start, count = data.draw(ranges(pair.model))
        self.both(lambda a, b: a.drain(start, count, b), pair, into)

    def truncate_pair(self, pair: Pair, size: int) -> None:
        if pair.views and size != pair.model.size:
            with pytest.raises(BufferError):
                pair.real.truncate(size)
        else:
            self.both(lambda hb: hb.truncate(size), pair)

    @rule(n=PAIR, data=DATA)
    def truncate(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        size = data.draw(sizes(pair.model.granularity) | positions(pair.model))
        self.truncate_pair(pair, min(size, 2**63 - 1))

    @rule(data=DATA)
    def truncate_all(self, data: st.DataObject) -> None:
        model = self.pairs[0].model
        finest = min(pair.model.granularity for pair in self.pairs)
        size = data.draw(sizes(finest) | positions(model))
        for pair in self.pairs:
            self.truncate_pair(pair, min(size, 2**63 - 1))

    @rule(n=PAIR, size=st.sampled_from([-1, 2**63, 2**64, 2**64 + 5, -(2**70)]))
    def refused_truncate(self, n: int, size: int) -> None:
        self.both(lambda hb: hb.truncate(size), self.pairs[n])

    @rule(n=PAIR, protocol=st.integers(2, 5))
    def pickle(self, n: int, protocol: int) -> None:
        pair = self.pairs[n]
        assert_same(pickle.loads(pickle.dumps(pair.real, protocol)), pair.model)
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(pair.real, 5, buffer_callback=buffers.append)
        assert_same(pickle.loads(data, buffers=buffers), pair.model)

    @rule(n=PAIR, how=st.sampled_from([copy.copy, copy.deepcopy, HBitmap.copy]))
    def copy(self, n: int, how: Callable[[HBitmap], HBitmap]) -> None:
        pair = self.pairs[n]
        twin = how(pair.real)
        assert twin == pair.real
        assert_same(twin, pair.model)
        twin.set(0, twin.size)  # the original must not notice

    @rule(n=PAIR, data=DATA)
    def serialize(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        start, count = data.draw(ranges(pair.model))
        self.both(lambda hb: hb.serialize(start, count), pair)

    @rule(n=PAIR, data=DATA)
    def deserialize(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        word = 64 * pair.model.group
        nwords = -(-pair.model.size // word)
        first = data.draw(st.integers(0, nwords))
        words = data.draw(
            st.lists(
                st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\x81" * 8]),
                max_size=min(nwords - first + 1, 70),
            )
        )
        chunk: Any = b"".join(words)
        start = first * word
        if data.draw(st.integers(0, 4)) == 4:
            chunk = data.draw(st.sampled_from([bytearray(chunk), chunk + b"\1", chunk[1:]]))
            start = data.draw(positions(pair.model) | st.sampled_from(NO_ITEMS))
        self.both(lambda hb: hb.deserialize(chunk, start), pair)

    @rule(n=PAIR, m=PAIR)
    def deserialize_all(self, n: int, m: int) -> None:
        """What one bitmap gave, put into another."""
        source = self.pairs[n].model
        data = source.serialize() if source.granularity < 58 else source.leaf()
        self.both(lambda hb: hb.deserialize(data), self.pairs[m])
        model = self.pairs[m].model
        size, granularity = model.size, model.granularity
        self.both(lambda hb: type(hb).from_bytes(data, size, granularity), self.pairs[m])

    # ---- what lives on ----------------------------------------------------------------------

    @precondition(lambda self: len(self.walks) < 6)
    @rule(n=PAIR, data=DATA)
    def start_walk(self, n: int, data: st.DataObject) -> None:
        pair = self.pairs[n]
        start = data.draw(st.just(0) | positions(pair.model))
        end = data.draw(st.none() | positions(pair.model))
        if data.draw(st.booleans()):
            self.walks.append((pair, ItemWalk(pair, pair.real.iter(start), start)))
        else:
            walk = AreaWalk(pair, pair.real.areas(start, end=end), start, end)
            self.walks.append((pair, walk))

    @precondition(lambda self: self.walks)
    @rule(which=st.integers(0, 5), steps=st.integers(1, 40))
    def walk(self, which: int, steps: int) -> None:
        _, walk = self.walks[which % len(self.walks)]
        for _ in range(steps):
            if not walk.done:
                walk.step()
        if walk.done:
            del self.walks[which % len(self.walks)]

    @precondition(lambda self: self.walks)
    @rule(which=st.integers(0, 5), ahead=st.integers(0, 3))
    def clear_ahead(self, which: int, ahead: int) -> None:
        """Cleans what the iterator is about to give."""
        pair, walk = self.walks[which % len(self.walks)]
        owed = sorted(walk.owed)[: ahead + 1]
        if owed:
            self.both(lambda hb: hb.reset(owed[-1]), pair)

    @rule(n=PAIR)
    def view_words(self, n: int) -> None:
        pair = self.pairs[n]
        if len(pair.views) < 2:
            pair.views.append(pair.real.words)

    @rule(n=PAIR)
    def release_words(self, n: int) -> None:
        pair = self.pairs[n]
        if pair.views:
            pair.views.clear()
            collect()


def test_everything_agrees_with_the_model() -> None:
    run_state_machine_as_test(Machine)


RULES = {name for name in vars(Machine) if hasattr(getattr(Machine, name), RULE_MARKER)}


# ---- do the checks notice? ------------------------------------------------------------------


class SetForgetsTheLastGroup(Model):
    def set(self, start: int, count: int = 1) -> None:
        super().set(start, max(0, count - 1))


class SetClamps(Model):
    def set(self, start: int, count: int = 1) -> None:
        super().set(start, max(0, min(count, self.size - start)))


class ResetCleansCutGroups(Model):
    def reset(self, start: int, count: Maybe = None) -> None:
        self._clean(self.start_of(start), start + (self.group if count is None else count))


class CountIsClipped(Model):
    def count(self, start: Maybe = None, count: Maybe = None) -> int:
        return super().count(0 if start is None else start, count)


class NextZeroIgnoresTheEnd(Model):
    def next_zero(self, start: int, count: Maybe = None) -> Maybe:
        return super().next_zero(start, None)


class PopTakesTheLast(Model):
    def pop(self) -> int:
        item = max(self.starts, default=None)
        if item is None:
            raise KeyError("pop")
        self.starts.remove(item)
        return item


class MergeReplaces(Model):
    def merge(self, other: Model) -> None:
        super().merge(other)
        if self.granularity == other.granularity:
            self.starts = set(other.starts)


class DrainCopies(Model):
    def drain(self, start: int = 0, count: Maybe = None, into: Model | None = None) -> Model:
        before = set(self.starts)
        result = super().drain(start, count, into)
        self.starts = before
        return result


class FlipOnlySets(Model):
    def flip(self, start: int, count: Maybe = None) -> None:
        before = set(self.starts)
        super().flip(start, count)
        self.starts |= before


class MergeBitsForgetsTheOrder(Model):
    def merge_bits(
        self, bits: Any, start: int = 0, granularity: Maybe = None, msb_first: bool = False
    ) -> None:
        super().merge_bits(bits, start, granularity, False)


class RankLeavesTheItemOut(Model):
    def rank(self, item: int) -> int:
        return super().rank(item) - (index(item) in self.starts)


class PrevDirtyIgnoresTheCount(Model):
    def prev_dirty(self, start: Maybe = None, count: Maybe = None) -> Maybe:
        super().prev_dirty(start, count)
        return super().prev_dirty(start, None)


class TruncateLeavesBits(Model):
    def truncate(self, size: int) -> None:
        before = set(self.starts)
        super().truncate(size)
        self.starts = before


class DeserializeAdds(Model):
    def deserialize(self, data: Any, start: int = 0) -> None:
        before = set(self.starts)
        super().deserialize(data, start)
        self.starts |= before


@pytest.mark.parametrize(
    ("broken", "rules"),
    [
        (SetForgetsTheLastGroup, ["set"]),
        (SetClamps, ["set"]),
        (ResetCleansCutGroups, ["set", "reset"]),
        (CountIsClipped, ["set"]),
        (NextZeroIgnoresTheEnd, ["set", "search"]),
        (PopTakesTheLast, ["set", "pop"]),
        (MergeReplaces, ["set", "merge"]),
        (DrainCopies, ["set", "drain_all"]),
        (FlipOnlySets, ["set", "flip"]),
        (MergeBitsForgetsTheOrder, ["merge_bits"]),
        (RankLeavesTheItemOut, ["set", "search"]),
        (PrevDirtyIgnoresTheCount, ["set", "search"]),
        (TruncateLeavesBits, ["set", "truncate"]),
        (DeserializeAdds, ["set", "deserialize"]),
    ],
)
def test_a_broken_model_is_noticed(broken: type[Model], rules: list[str]) -> None:
    class BrokenMachine(Machine):
        """Only with the rules that matter, so that it does not take long."""

        model_type = broken

    for name in RULES - set(rules):
        setattr(BrokenMachine, name, None)
    often_enough = settings(
        max_examples=1000,
        phases=[Phase.generate],
        database=None,
        derandomize=True,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(BrokenMachine, settings=often_enough)


def walk_over(given: list[int], dirty: Starts) -> None:
    pair = Pair(Model(100))
    pair.model.starts |= dirty
    walk = ItemWalk(pair, iter(given), 0)
    while not walk.done:
        walk.step()


def area_walk_over(given: list[Area], dirty: Starts) -> None:
    pair = Pair(Model(100))
    pair.model.starts |= dirty
    walk = AreaWalk(pair, iter(given), 0, None)
    while not walk.done:
        walk.step()


def test_a_walk_over_just_what_is_dirty_is_accepted() -> None:
    walk_over([1, 5, 9], {1, 5, 9})
    area_walk_over([(1, 2), (9, 1)], {1, 2, 9})


@pytest.mark.parametrize("given", [[1, 9, 5], [1, 1, 5, 9], [1, 5], [5, 9], [1, 5, 7, 9]])
def test_a_walk_that_errs_is_noticed(given: list[int]) -> None:
    with pytest.raises(AssertionError):
        walk_over(given, {1, 5, 9})


@pytest.mark.parametrize(
    "given", [[(9, 1), (1, 2)], [(1, 2)], [(9, 1)], [(1, 3), (9, 1)], [(1, 1), (9, 1)]]
)
def test_an_area_walk_that_errs_is_noticed(given: list[Area]) -> None:
    with pytest.raises(AssertionError):
        area_walk_over(given, {1, 2, 9})


def poke(hb: HBitmap, word: int, value: int) -> None:
    """Overwrites a leaf word behind the bitmap's back."""
    words = _core.hbitmap_words(hb._hb, _core.new("size_t *"))
    ffi.cast("uint64_t *", words)[word] = value


def test_check_notices_a_leaf_bit_without_its_summary() -> None:
    hb = HBitmap(640)
    poke(hb, 3, 1)
    with pytest.raises(AssertionError, match=r"word 3 .*summary bit is clear"):
        _core.check(hb._hb)


def test_check_notices_a_bit_beyond_the_end() -> None:
    hb = HBitmap(65)
    hb.add(64)
    poke(hb, 1, 0b11)
    with pytest.raises(AssertionError, match="word 1 has bits beyond the end"):
        _core.check(hb._hb)


def test_check_notices_a_wrong_remembered_count() -> None:
    hb = HBitmap(64)
    hb.add(0)
    assert hb.count() == 1
    poke(hb, 0, 0b11)
    with pytest.raises(AssertionError, match="count of piece 0 is 1, not 2"):
        _core.check(hb._hb)


def test_check_accepts_a_summary_bit_over_an_empty_word() -> None:
    hb = HBitmap(640)
    hb.add(200)
    poke(hb, 3, 0)
    _core.check(hb._hb)
    assert hb.empty()
    assert list(hb) == []
