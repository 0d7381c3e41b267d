# SPDX-License-Identifier: MIT
"""Rank, select, prev_dirty, items_array, flip and counts of set operations, one fact per test.

Random sequences of them, compared with the model: test_state_machine.py.
"""

from __future__ import annotations

from array import array
from typing import Any, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model import Model, assert_same

from pybitmap import HBitmap, InvalidError, MismatchError, RangeError

pytestmark = pytest.mark.core

SIZE = 300
BOUNDARIES = [0, 1, 62, 63, 64, 65, 127, 4094, 4095, 4096, 4097, 2**18 - 1, 2**18, 2**18 + 1]
NO_INTEGERS: list[Any] = [1.0, "1", b"1", 1j, [1], object()]

sets = st.sets(st.integers(0, SIZE - 1))


def bitmap(elements: Any = (), granularity: int = 0, size: int = SIZE) -> HBitmap:
    hb = HBitmap(size, granularity)
    hb.update(elements)
    return hb


# ---- rank and select ------------------------------------------------------------------------


@pytest.mark.parametrize("item", BOUNDARIES)
def test_rank_counts_the_item_itself(item: int) -> None:
    hb = bitmap([item], size=2**18 + 2)
    assert hb.rank(item) == 1
    assert hb.rank(item + 1) == 1
    assert item == 0 or hb.rank(item - 1) == 0


@given(sets, st.integers(0, 5), st.integers(0, SIZE + 5))
def test_rank_is_what_bisect_says_of_the_sorted_elements(
    elements: set[int], granularity: int, item: int
) -> None:
    hb = bitmap(elements, granularity)
    assert hb.rank(item) == sum(start <= item for start in hb)


@given(sets, st.integers(0, 5))
def test_select_is_the_inverse_of_rank(elements: set[int], granularity: int) -> None:
    hb = bitmap(elements, granularity)
    for n, item in enumerate(hb):
        assert hb.select(n) == item
        assert hb.rank(item) == n + 1


@pytest.mark.parametrize("size", [2**63 - 1, (1 << 62) + 1])
def test_rank_of_a_last_group_that_is_cut_counts_it(size: int) -> None:
    hb = bitmap([size - 1], 62, size)
    assert hb.rank(size - 1) == hb.rank(2**70) == 1
    assert hb.select(0) == (size - 1) >> 62 << 62


def test_select_finds_each_of_many_words() -> None:
    """Where words are counted together, and the one with the group is found among them."""
    hb = HBitmap(1 << 20)
    hb.set(0, 1 << 20)
    hb.reset(300_000, 10_000)
    for n in (0, 1, 63, 64, 4095, 4096, 262_143, 262_144, 299_999, 300_000, 300_001, 1_038_575):
        assert hb.select(n) == (n if n < 300_000 else n + 10_000)


@pytest.mark.parametrize("n", [-1, 2, 2**62, 2**63, 2**64, -(2**70)])
def test_select_of_what_there_is_not_is_an_index_error(n: int) -> None:
    with pytest.raises(RangeError, match=f"no element {n}: the bitmap has 2") as caught:
        bitmap([5, 7]).select(n)
    assert isinstance(caught.value, (IndexError, ValueError))


@pytest.mark.parametrize("item", [-1, -(2**70)])
def test_rank_of_a_negative_item_is_an_error(item: int) -> None:
    with pytest.raises(RangeError, match="negative"):
        bitmap().rank(item)


@pytest.mark.parametrize("wrong", NO_INTEGERS)
@pytest.mark.parametrize("method", ["rank", "select", "prev_dirty", "items_array", "flip"])
def test_positions_are_integers(method: str, wrong: Any) -> None:
    hb = bitmap([5])
    with pytest.raises(TypeError):
        getattr(hb, method)(wrong)
    assert list(hb) == [5]


# ---- the last dirty item ----------------------------------------------------------------------


@pytest.mark.parametrize("item", BOUNDARIES)
def test_prev_dirty_finds_what_is_at_the_start_and_before_it(item: int) -> None:
    hb = bitmap([item], size=2**18 + 2)
    assert hb.prev_dirty() == hb.prev_dirty(item) == hb.prev_dirty(item + 1) == item
    assert item == 0 or hb.prev_dirty(item - 1) is None


@given(sets, st.integers(0, 5), st.integers(0, SIZE + 5), st.none() | st.integers(0, SIZE + 5))
def test_prev_dirty_is_the_mirror_of_next_dirty(
    elements: set[int], granularity: int, start: int, count: int | None
) -> None:
    hb = bitmap(elements, granularity)
    first = 0 if count is None else max(0, start - count + 1)
    items = [item for item in range(first, min(start + 1, SIZE)) if item in hb]
    assert hb.prev_dirty(start, count) == (items[-1] if items else None)
    assert hb.next_dirty(first, max(0, start + 1 - first)) == (items[0] if items else None)


def test_prev_dirty_of_a_group_that_is_cut_is_the_last_item() -> None:
    hb = bitmap([99], 4, 100)
    assert hb.prev_dirty() == hb.prev_dirty(2**70) == 99
    assert hb.prev_dirty(97) == 97
    assert hb.prev_dirty(95) is None


def test_prev_dirty_of_nothing_is_none() -> None:
    assert HBitmap(0).prev_dirty() is None
    assert HBitmap(1 << 40).prev_dirty() is None
    assert bitmap([5]).prev_dirty(5, 0) is None


def test_prev_dirty_passes_over_what_was_cleared() -> None:
    """Summary bits that are left over an empty word, on each level."""
    hb = HBitmap(1 << 24)
    for item in [3, 1 << 12, 1 << 18, (1 << 24) - 1]:
        hb.add(item)
    for item, before in [((1 << 24) - 1, 1 << 18), (1 << 18, 1 << 12), (1 << 12, 3)]:
        hb.remove(item)
        assert hb.prev_dirty() == before


@pytest.mark.parametrize("args", [(-1,), (5, -1), (None, -1), (-(2**70),)])
def test_prev_dirty_refuses_what_is_negative(args: Any) -> None:
    with pytest.raises(RangeError, match="negative"):
        bitmap().prev_dirty(*args)


# ---- items as an array ------------------------------------------------------------------------


@pytest.mark.parametrize("dirty", [0, 1, 4095, 4096, 4097, 9000])
def test_items_array_has_all_elements(dirty: int) -> None:
    hb = HBitmap(30_000, 1)
    hb.update(range(0, 3 * dirty, 3))
    items = hb.items_array()
    assert (items.data.format, items.data.shape, items.shape) == ("Q", (len(hb),), (len(hb),))
    assert items.tolist() == list(hb)


@given(sets, st.integers(0, 5), st.integers(0, SIZE + 5), st.none() | st.integers(0, SIZE + 5))
def test_items_array_of_a_range_has_the_groups_that_touch_it(
    elements: set[int], granularity: int, start: int, end: int | None
) -> None:
    hb, group = bitmap(elements, granularity), 1 << granularity
    stop = SIZE if end is None else min(end, SIZE)
    expected = [item for item in hb if item + group > start and item < stop and start < stop]
    assert hb.items_array(start, end=end).tolist() == expected


def test_items_array_goes_back_into_a_bitmap() -> None:
    hb = bitmap(range(0, SIZE, 7))
    other = HBitmap(SIZE)
    other.update(hb.items_array())
    assert other == hb


def test_items_array_is_a_copy() -> None:
    hb = bitmap([5])
    items = hb.items_array()
    hb.clear()
    hb.truncate(3)
    assert items.tolist() == [5]


@pytest.mark.parametrize("range_", [{"start": -1}, {"end": -1}])
def test_items_array_refuses_what_is_negative(range_: dict[str, int]) -> None:
    with pytest.raises(RangeError, match="negative"):
        bitmap().items_array(**range_)


# ---- flip ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", BOUNDARIES)
def test_flip_of_one_group_makes_it_dirty_and_clean_again(item: int) -> None:
    hb, model = HBitmap(2**18 + 2), Model(2**18 + 2)
    for _ in range(2):
        hb.flip(item)
        model.flip(item)
        assert_same(hb, model)


@pytest.mark.parametrize("fill", ["nothing", "all", "a piece", "every third"])
@pytest.mark.parametrize("edge", [0, 1, 63, 64])
def test_flip_goes_over_what_is_clean_full_and_mixed(fill: str, edge: int) -> None:
    size = 5 * 4096 + 100
    hb, model = HBitmap(size), Model(size)
    marks: dict[str, list[tuple[int, int]]] = {
        "nothing": [],
        "all": [(0, size)],
        "a piece": [(4096 + 5, 2 * 4096)],
        "every third": [(item, 1) for item in range(0, size, 3)],
    }
    for start, count in marks[fill]:
        hb.set(start, count)
        model.set(start, count)
    hb.count()  # remembered
    for each in (hb, model):
        each.flip(edge, size - 2 * edge)
    assert_same(hb, model)


def test_flip_twice_is_as_before() -> None:
    hb = bitmap(range(0, SIZE, 5), 2)
    before = hb.copy()
    hb.flip(0, SIZE)
    assert hb.isdisjoint(before)
    assert len(hb) + len(before) == SIZE // 4
    hb.flip(0, SIZE)
    assert hb == before


@pytest.mark.parametrize(("start", "count"), [(1, 8), (0, 5), (8, 291)])
def test_flip_refuses_what_cuts_a_group(start: int, count: int) -> None:
    hb = bitmap([20], 3)
    with pytest.raises(InvalidError, match="whole groups of 8"):
        hb.flip(start, count)
    assert list(hb) == [16]


@pytest.mark.parametrize("args", [(-1, 1), (0, -1), (0, 305), (304, 1), (2**64, 1), (0, 2**64)])
def test_flip_refuses_what_is_outside(args: tuple[int, int]) -> None:
    hb = bitmap([20], 3)
    with pytest.raises(RangeError):
        hb.flip(*args)
    assert list(hb) == [16]


def test_flip_is_noticed_by_iterators() -> None:
    hb = bitmap(range(5))
    items, areas = iter(hb), hb.areas()
    assert next(items) == 0
    hb.flip(2, 2)
    hb.flip(5, 2)
    assert list(items) == [1, 4, 5, 6]
    assert list(areas) == [(0, 2), (4, 3)]


# ---- counts of set operations -------------------------------------------------------------------

COUNTS: list[tuple[str, Callable[[Any, Any], Any]]] = [
    ("intersection_count", lambda a, b: a & b),
    ("union_count", lambda a, b: a | b),
    ("difference_count", lambda a, b: a - b),
    ("symmetric_difference_count", lambda a, b: a ^ b),
]


@pytest.mark.parametrize(("method", "op"), COUNTS)
@given(a=sets, b=sets, granularity=st.sampled_from([0, 2]))
def test_counts_are_those_of_the_results(
    method: str, op: Callable[[Any, Any], Any], a: set[int], b: set[int], granularity: int
) -> None:
    x, y = bitmap(a, granularity), bitmap(b, granularity)
    assert getattr(x, method)(y) == len(op(x, y))
    for other in (b, list(b), iter(b), array("Q", sorted(b))):
        assert getattr(x, method)(other) == len(op(x, y))
    assert (x, y) == (bitmap(a, granularity), bitmap(b, granularity))


@pytest.mark.parametrize(("method", "op"), COUNTS)
@pytest.mark.parametrize("thin", [1, 100, 5000])
def test_counts_of_thin_and_dense_ones_together(
    method: str, op: Callable[[Any, Any], Any], thin: int
) -> None:
    a, b = HBitmap(1 << 18), HBitmap(1 << 18)
    a.update(range(0, 1 << 18, thin))
    b.set(4000, 100_000)
    b.update(range(200_000, 1 << 18, 3))
    for x, y in ((a, b), (b, a)):
        assert getattr(x, method)(y) == len(op(x, y))


@pytest.mark.parametrize(("method", "op"), COUNTS)
def test_counts_with_itself(method: str, op: Callable[[Any, Any], Any]) -> None:
    hb = bitmap([1, 200])
    assert getattr(hb, method)(hb) == len(op({1, 200}, {1, 200}))


@pytest.mark.parametrize("method", [method for method, _ in COUNTS])
def test_counts_refuse_other_shapes(method: str) -> None:
    for other in (bitmap([7], granularity=1), bitmap([7], size=SIZE - 1)):
        with pytest.raises(MismatchError, match="differ"):
            getattr(bitmap([7]), method)(other)


@pytest.mark.parametrize("method", [method for method, _ in COUNTS])
def test_counts_take_iterables_only(method: str) -> None:
    with pytest.raises(TypeError):
        getattr(bitmap([7]), method)(5)


@pytest.mark.parametrize("method", ["union_count", "symmetric_difference_count"])
def test_counts_refuse_what_cannot_be_marked(method: str) -> None:
    with pytest.raises(RangeError):
        getattr(bitmap([7]), method)([SIZE])


def test_counts_ignore_what_cannot_be_in_the_bitmap() -> None:
    assert bitmap([7, 8]).intersection_count([8, SIZE, -1, "a"]) == 1
    assert bitmap([7, 8]).difference_count([8, SIZE, -1, "a"]) == 1
