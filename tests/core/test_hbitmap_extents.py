# SPDX-License-Identifier: MIT
"""HBitmap.from_extents and to_extents: extents in, extents out, beside a model that is a set."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybitmap import HBitmap
from pybitmap.errors import InvalidError, RangeError
from pybitmap.extent import Extent, rounded

pytestmark = pytest.mark.core

SIZE = 400

pairs = st.tuples(st.integers(0, SIZE), st.integers(0, 60), st.booleans()).filter(
    lambda each: each[0] + each[1] <= SIZE
)


def items_of(extents: Any, group: int, size: int) -> set[int]:
    """What is dirty, rounded outwards: the model."""
    dirty: set[int] = set()
    for start, length, *flag in extents:
        if length and (not flag or flag[0]):
            dirty.update(range(start // group * group, -(-(start + length) // group) * group))
    return {item for item in dirty if item < size}


def test_pairs_are_dirty_and_the_furthest_ends_the_bitmap() -> None:
    hb = HBitmap.from_extents([(10, 5), (3, 2), (100, 0), (40, 20, False)])
    assert (hb.size, list(hb.areas())) == (100, [(3, 2), (10, 5)])


def test_no_extents_make_an_empty_bitmap() -> None:
    assert HBitmap.from_extents([]).size == 0
    assert HBitmap.from_extents([], 10) == HBitmap(10)


@given(st.lists(pairs, max_size=20), st.integers(0, 5), st.booleans())
def test_what_is_given_is_dirty_rounded_outwards(
    extents: list[tuple[int, int, bool]], granularity: int, sized: bool
) -> None:
    end = max((start + length for start, length, _ in extents), default=0)
    size = SIZE if sized else end
    hb = HBitmap.from_extents(iter(extents), SIZE if sized else None, granularity)
    assert hb.size == size
    dirty = items_of(extents, 1 << granularity, size)
    assert {item for start, count in hb.areas() for item in range(start, start + count)} == dirty


@given(
    st.lists(pairs, max_size=12),
    st.integers(0, 4),
    st.integers(0, SIZE + 50),
    st.none() | st.integers(0, SIZE + 50),
    st.none() | st.integers(1, 70),
    st.booleans(),
)
def test_extents_tell_what_is_dirty(
    extents: list[tuple[int, int, bool]],
    granularity: int,
    start: int,
    end: int | None,
    block_size: int | None,
    clean: bool,
) -> None:
    hb = HBitmap.from_extents(extents, SIZE, granularity)
    dirty = items_of(extents, 1 << granularity, SIZE)
    last = SIZE if end is None else min(end, SIZE)
    if block_size is not None and start < last:
        start = start // block_size * block_size
        last = min(-(-last // block_size) * block_size, SIZE)
        dirty = items_of([(item, 1) for item in dirty if start <= item < last], 1, SIZE)
        dirty = {
            block + i
            for block in range(0, SIZE, block_size)
            for i in range(block_size)
            if dirty.intersection(range(block, block + block_size))
        }
    found = list(hb.to_extents(start, end=end, block_size=block_size, clean=clean))
    inside = range(start, max(start, last))
    for flag in (True, False):
        items = [i for each in found if each.dirty is flag for i in range(each.start, each.end)]
        wanted = [i for i in inside if (i in dirty) is flag]
        assert items == (wanted if flag or clean else [])
    if clean:
        assert [each.start for each in found] == [
            start if i == 0 else found[i - 1].end for i in range(len(found))
        ]
    if block_size is not None:
        for each in found:
            assert each.start % block_size == 0
            assert each.length == min(block_size, SIZE - each.start)


def test_a_list_that_was_cut_goes_on_where_it_ended() -> None:
    """Also behind the last one, which the end of the bitmap cuts, so that going on has an end."""
    hb = HBitmap.from_extents([(5, 20), (50, 1), (90, 10)], 100)
    for block_size, clean in product((None, 8), (False, True)):
        whole = list(hb.to_extents(block_size=block_size, clean=clean))
        for count in range(1, len(whole) + 1):
            rest = hb.to_extents(whole[count - 1].end, block_size=block_size, clean=clean)
            assert whole[:count] + list(rest) == whole


def test_its_own_array_makes_an_equal_bitmap() -> None:
    hb = HBitmap.from_extents([(5, 20), (50, 1)], 100, group_size=4)
    assert HBitmap.from_extents(hb.areas_array(), 100, group_size=4) == hb
    assert HBitmap.from_extents(HBitmap(7).areas_array(), 7) == HBitmap(7)
    assert HBitmap.from_extents(hb.to_extents(clean=True), group_size=4) == hb


def test_a_million_extents_are_not_kept() -> None:
    """They come from an iterator, of which no more is taken than is marked at once."""
    taken = most = 0

    def extents() -> Iterator[tuple[int, int]]:
        nonlocal taken
        for taken in range(200_000):
            yield 16 * taken, 1

    class Counting(HBitmap):
        def set_many(self, starts: Any, counts: Any = 1) -> None:
            nonlocal most
            most = max(most, len(starts))
            super().set_many(starts, counts)

    assert len(Counting.from_extents(extents())) == 200_000
    assert most < 100_000


WRONG: list[tuple[Any, type[Exception], str]] = [
    ([(0, 1), (-1, 2)], RangeError, "extent 1: .* negative"),
    ([(0, -1)], RangeError, "extent 0: .* negative"),
    ([(0, 1), (1 << 63, 1)], RangeError, r"extent 1: .* beyond 2\^63 - 1"),
    ([(1 << 62, 1 << 62)], RangeError, r"beyond 2\^63 - 1"),
    ([(1,)], TypeError, "extent 0 is"),
    ([(1, 2, True, 4)], TypeError, "extent 0 is"),
    ([(1.0, 2)], TypeError, "extent 0 is"),
    ([("1", "2")], TypeError, "extent 0 is"),
    ([7], TypeError, "extent 0 is 7"),
    (b"1234", TypeError, "not bytes"),
    (memoryview(bytes(32)).cast("B", [16, 2]), TypeError, "64-bit"),
    (memoryview(bytes(48)).cast("B").cast("Q", [2, 3]), InvalidError, r"\(n, 2\)"),
    (memoryview(array("Q", [1, 2])), InvalidError, r"\(n, 2\)"),
    (memoryview(array("q", [-1, 2])).cast("B").cast("q", [1, 2]), RangeError, "negative"),
]


@pytest.mark.parametrize(("extents", "error", "words"), WRONG)
def test_what_is_no_list_of_extents_is_refused(
    extents: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        HBitmap.from_extents(extents)


def test_one_beyond_the_size_is_named() -> None:
    with pytest.raises(RangeError, match=r"extent 1: start 95 .* beyond the size, 100"):
        HBitmap.from_extents([(0, 100), (95, 6)], 100)


def test_more_groups_than_there_can_be_are_refused() -> None:
    with pytest.raises(InvalidError, match="groups"):
        HBitmap.from_extents([(1 << 50, 1)])
    assert HBitmap.from_extents([(1 << 50, 1)], group_size=1 << 20).size == (1 << 50) + 1


@pytest.mark.parametrize("wrong", [{"block_size": 0}, {"block_size": -4}, {"end": -1}])
def test_ranges_that_cannot_be_are_refused_at_once(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidError):
        HBitmap(10).to_extents(**wrong)  # type: ignore[arg-type]


def test_extents_are_named() -> None:
    [extent] = HBitmap.from_extents([(3, 2)]).to_extents()
    assert extent == Extent(3, 2) == (3, 2, True)
    assert (extent.start, extent.length, extent.end, extent.dirty) == (3, 2, 5, True)


def test_beside_a_writer_extents_leave_no_gap_and_stay_in_order() -> None:
    hb = HBitmap(1 << 16)
    stop = threading.Event()

    def write() -> None:
        number = 1
        while not stop.is_set():
            number = number * 1103515245 % (1 << 31)
            hb.set(number % (1 << 16))
            hb.discard(number * 7 % (1 << 16))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(20):
            at = 100
            for each in hb.to_extents(100, clean=True):
                assert each.start == at
                at = each.end
            assert at == 1 << 16
    finally:
        stop.set()
        thread.join()


def test_blocks_need_not_be_powers_of_2() -> None:
    areas = [(5, 1), (17, 4), (40, 3)]
    assert list(rounded(areas, 12, 42)) == [(0, 24), (36, 6)]


@pytest.mark.parametrize("start", [0, 1, 5])
def test_areas_array_and_its_slices_come_back(start: int) -> None:
    hb = HBitmap(1 << 16, group_size=64)
    hb.set_many([0, 640, 4096], [64, 1, 128])
    for areas in (hb.areas_array(), hb.areas_array()[start:], hb.areas_array()[::-2]):
        back = HBitmap.from_extents(areas, hb.size, group_size=64)
        assert list(back.areas()) == sorted(map(tuple, areas.tolist()))


@pytest.mark.parametrize("dirty", [None, "false", "dirty", 2, float("nan"), []])
def test_only_true_and_false_say_whether_it_is_dirty(dirty: object) -> None:
    extents: Any = [(0, 8, True), (16, 8, dirty)]
    with pytest.raises(TypeError, match=r"extent 1 is .*, dirty True or False"):
        HBitmap.from_extents(extents)


def test_numpy_bools_say_whether_it_is_dirty() -> None:
    numpy = pytest.importorskip("numpy", reason="NumPy is not installed")
    extents = [(0, 8, numpy.True_), (16, 8, numpy.False_), (32, 8, 1), (48, 8, 0)]
    assert list(HBitmap.from_extents(extents).areas()) == [(0, 8), (32, 8)]
