# SPDX-License-Identifier: MIT
"""HBitmap as a bitmap: shapes, ranges, searches and truncation, one fact per test.

As a set: test_hbitmap_set.py. What goes in and out as bytes: test_hbitmap_serialize.py.
"""

from __future__ import annotations

import ctypes
import operator
import weakref
from array import array
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model import Model, as_areas, assert_same
from support import collect

from pybitmap import BitmapError, HBitmap, InvalidError, MismatchError, RangeError

pytestmark = pytest.mark.core

MAX_SIZE = 2**63 - 1
BOUNDARIES = [
    *[0, 1, 2, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097],
    *[2**18 - 1, 2**18, 2**18 + 1],
]
GRANULARITIES = range(64)
NO_INTEGERS: list[Any] = [1.0, 2.5, "1", b"1", None, Decimal(1), 1j, [1], (1,), object()]
NO_INTEGER_IDS = [type(value).__name__ + repr(value)[:5] for value in NO_INTEGERS]


def pair(size: int, granularity: int = 0, *marks: tuple[int, int]) -> tuple[HBitmap, Model]:
    """A bitmap and its model with the same marks."""
    hb, model = HBitmap(size, granularity), Model(size, granularity)
    for start, count in marks:
        hb.set(start, count)
        model.set(start, count)
    return hb, model


# ---- shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", BOUNDARIES)
def test_a_new_bitmap_is_clean(size: int) -> None:
    hb, model = pair(size)
    assert_same(hb, model)
    assert hb.empty()
    assert hb.count() == len(hb) == 0
    assert hb.next_dirty(0) is None


@pytest.mark.parametrize("size", BOUNDARIES)
def test_all_of_a_bitmap_can_be_marked(size: int) -> None:
    hb, model = pair(size, 0, (0, size))
    assert_same(hb, model)
    assert len(hb) == hb.count() == size
    assert hb.next_zero(0) is None


@pytest.mark.parametrize("size", BOUNDARIES)
def test_the_first_and_the_last_item_can_be_marked(size: int) -> None:
    hb, model = pair(size)
    if size:
        for item in (0, size - 1):
            hb.add(item)
            model.add(item)
    assert_same(hb, model)


@pytest.mark.parametrize("size", BOUNDARIES)
def test_the_item_beyond_the_last_is_refused(size: int) -> None:
    hb, model = pair(size, 0, (0, size))
    for item in (size, size + 1):
        with pytest.raises(RangeError, match=rf"\[{item}, {item + 1}\).* {size} items"):
            hb.add(item)
    assert_same(hb, model)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_bit_stands_for_two_to_the_granularity_items(granularity: int) -> None:
    group = 1 << granularity
    hb = HBitmap(min(3 * group, MAX_SIZE), granularity)
    assert hb.granularity == granularity
    hb.add(min(group, hb.size) - 1)
    assert list(hb) == [0]
    assert hb.count() == group
    assert hb.get(0)
    assert not hb.get(group)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_last_group_may_be_cut(granularity: int) -> None:
    group = 1 << granularity
    size = min(5 * group, MAX_SIZE) - group // 2
    last = (size - 1) // group * group
    hb, model = pair(size, granularity, (size - 1, 1))
    assert_same(hb, model)
    assert list(hb) == [last]
    assert list(hb.areas()) == [(last, size - last)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_largest_size_works_with_every_granularity_that_allows_it(granularity: int) -> None:
    if granularity < 22:
        with pytest.raises(InvalidError, match=f"{MAX_SIZE} makes more than {2**41} groups"):
            HBitmap(MAX_SIZE, granularity)
        return
    hb = HBitmap(MAX_SIZE, granularity)
    hb.set(MAX_SIZE - 1)
    last = (MAX_SIZE - 1) >> granularity << granularity
    assert list(hb) == [last]
    assert list(hb.areas()) == [(last, MAX_SIZE - last)]
    assert hb.next_dirty(0) == last
    assert hb.status(last) == (True, MAX_SIZE - last)
    assert hb.next_zero(last) is None
    hb.reset(last)
    assert hb.empty()


def test_the_count_of_the_largest_bitmap_exceeds_its_size() -> None:
    hb = HBitmap(MAX_SIZE, 63)
    hb.add(0)
    assert hb.count() == 2**63
    assert hb.count(0) == MAX_SIZE


def test_two_to_the_41_groups_are_accepted() -> None:
    hb = HBitmap(2**41)
    hb.set(2**41 - 1)
    hb.set(12345678901)
    assert list(hb) == [12345678901, 2**41 - 1]
    assert hb.count() == 2
    hb.reset(12345678901)
    assert hb.next_dirty(0) == 2**41 - 1
    assert hb.next_zero(2**41 - 1) is None
    assert hb.drain() == HBitmap(2**41) | [2**41 - 1]
    assert hb.empty()


@pytest.mark.parametrize("granularity", [0, 1, 12, 21])
def test_more_than_two_to_the_41_groups_are_refused(granularity: int) -> None:
    size = (2**41 << granularity) + 1
    with pytest.raises(InvalidError, match=f"{size} makes more than {2**41} groups"):
        HBitmap(size, granularity)
    assert HBitmap(size - 1, granularity).size == size - 1


@pytest.mark.parametrize("size", [-1, -(2**63), 2**63, 2**64, 2**64 + 1, 2**100])
def test_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(InvalidError, match=str(size)):
        HBitmap(size, 30)


@pytest.mark.parametrize("granularity", [-1, 64, 65, 2**31, 2**32, 2**64, -(2**64)])
def test_granularities_out_of_range_are_refused(granularity: int) -> None:
    with pytest.raises(InvalidError, match=str(granularity)):
        HBitmap(100, granularity)


@pytest.mark.parametrize("value", NO_INTEGERS, ids=NO_INTEGER_IDS)
def test_sizes_and_granularities_are_integers(value: Any) -> None:
    with pytest.raises(TypeError):
        HBitmap(value)
    if value is not None:
        with pytest.raises(TypeError):
            HBitmap(100, value)


def test_size_and_granularity_can_be_named() -> None:
    hb = HBitmap(size=100, granularity=3)
    assert (hb.size, hb.granularity) == (100, 3)


def test_size_and_granularity_cannot_be_assigned() -> None:
    hb = HBitmap(100)
    for name in ("size", "granularity"):
        with pytest.raises(AttributeError):
            setattr(hb, name, 5)


def test_there_are_no_other_attributes() -> None:
    with pytest.raises(AttributeError):
        HBitmap(1).colour = "red"  # type: ignore[attr-defined]


def test_integer_like_objects_are_integers() -> None:
    class Seven:
        def __index__(self) -> int:
            return 7

    seven: Any = Seven()
    hb = HBitmap(seven, True)
    assert (hb.size, hb.granularity) == (7, 1)
    hb = HBitmap(100)
    hb.set(seven, seven)
    assert list(hb.areas()) == [(7, 7)]
    assert seven in hb
    hb.remove(seven)
    assert hb.next_dirty(seven) == 8


def test_repr_names_size_granularity_and_dirty_items() -> None:
    hb = HBitmap(1000, 4)
    hb.set(0, 40)
    assert repr(hb) == "<HBitmap size=1000 granularity=4 dirty=48>"


# ---- marks ----------------------------------------------------------------------------------


def test_the_head_s_example() -> None:
    hb = HBitmap(8, 1)
    hb.set(3, 2)
    assert list(hb) == [2, 4]
    assert list(hb.areas()) == [(2, 4)]
    assert hb.count() == 4


def test_set_marks_one_item_unless_told_more() -> None:
    hb = HBitmap(10)
    hb.set(3)
    assert list(hb) == [3]


def test_set_marks_every_group_that_the_range_touches() -> None:
    hb = HBitmap(64, 3)
    hb.set(7, 10)
    assert list(hb) == [0, 8, 16]


def test_set_twice_is_set_once() -> None:
    hb, model = pair(200, 0, (10, 100), (10, 100), (50, 1))
    assert_same(hb, model)


@pytest.mark.parametrize("start", [0, 9, 10, 11, 10**6, 2**63, 2**64 - 1])
def test_marking_nothing_does_nothing_wherever(start: int) -> None:
    hb = HBitmap(10)
    hb.set(start, 0)
    hb.reset(start, 0)
    assert hb.empty()


OUTSIDE = [
    (0, 101),
    (100, 1),
    (99, 2),
    (101, 1),
    (2**62, 1),
    (MAX_SIZE, 1),
    (2**63, 1),
    (2**64 - 1, 1),
    (2**64 - 1, 2),
    (1, 2**64 - 1),
    (50, 2**64 - 50),
    (50, 2**64 - 40),
    (2**63, 2**63),
    (2**64, 1),
    (0, 2**64),
    (2**64, 2**64),
    (2**100, 2**100),
    (-1, 1),
    (-1, 2),
    (1, -1),
    (-(2**63), 1),
    (-(2**64), 1),
    (5, -(2**100)),
]


@pytest.mark.parametrize("method", ["set", "reset", "drain"])
@pytest.mark.parametrize(("start", "count"), OUTSIDE)
def test_ranges_outside_are_refused_and_named(method: str, start: int, count: int) -> None:
    hb, model = pair(100, 0, (0, 3), (60, 40))
    with pytest.raises(RangeError) as caught:
        getattr(hb, method)(start, count)
    assert f"[{start}, {start + count})" in str(caught.value)
    assert "100" in str(caught.value)
    assert_same(hb, model)


@pytest.mark.parametrize("error", [BitmapError, ValueError, IndexError, InvalidError])
def test_a_range_error_is_all_that_callers_would_catch(error: type[Exception]) -> None:
    with pytest.raises(error):
        HBitmap(1).set(1)


def one_bad_argument(bad: Any) -> list[Callable[[HBitmap], object]]:
    return [
        lambda hb: hb.set(bad),
        lambda hb: hb.set(0, bad),
        lambda hb: hb.reset(bad),
        lambda hb: hb.add(bad),
        lambda hb: hb.get(bad),
        lambda hb: hb[bad],
        lambda hb: hb.__setitem__(bad, True),
        lambda hb: hb.truncate(bad),
        lambda hb: hb.iter(bad),
        lambda hb: hb.areas(bad),
        lambda hb: hb.areas_array(bad),
        lambda hb: hb.next_dirty(bad),
        lambda hb: hb.next_zero(bad),
        lambda hb: hb.next_dirty_area(bad),
        lambda hb: hb.status(bad),
        lambda hb: hb.drain(bad),
        lambda hb: hb.serialize(bad),
        lambda hb: hb.deserialize(b"", bad),
        lambda hb: hb.update([bad]),
        lambda hb: hb.symmetric_difference_update([bad]),
    ]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=NO_INTEGER_IDS)
def test_what_is_no_integer_is_a_type_error(value: Any) -> None:
    hb, model = pair(100, 0, (0, 3), (60, 40))
    for call in one_bad_argument(value):
        with pytest.raises(TypeError):
            call(hb)
    assert_same(hb, model)


# ---- resets ---------------------------------------------------------------------------------


def test_reset_cleans_the_one_group_at_its_start() -> None:
    hb, model = pair(64, 3, (0, 64))
    hb.reset(16)
    assert list(hb.areas()) == [(0, 16), (24, 40)]
    model.reset(16)
    assert_same(hb, model)


@pytest.mark.parametrize(("start", "count"), [(1, 8), (4, None), (8, 1), (8, 9), (0, 15), (1, 15)])
def test_reset_refuses_what_cuts_a_group(start: int, count: int | None) -> None:
    hb, model = pair(100, 3, (0, 100))
    with pytest.raises(InvalidError, match=rf"\[{start}, .*groups of 8 items"):
        hb.reset(start, count)
    assert_same(hb, model)


@pytest.mark.parametrize("end", [100, 104])
def test_the_last_group_is_reset_up_to_the_size_or_rounded_up(end: int) -> None:
    hb, model = pair(100, 3, (0, 100))
    hb.reset(96, end - 96)
    model.reset(96, end - 96)
    assert_same(hb, model)
    assert hb.count() == 96


@pytest.mark.parametrize("end", [97, 99, 101, 103, 105, 112])
def test_no_other_end_in_the_last_group_is_accepted(end: int) -> None:
    hb, model = pair(100, 3, (0, 100))
    with pytest.raises(InvalidError):
        hb.reset(96, end - 96)
    assert_same(hb, model)


def test_reset_without_count_cleans_a_cut_last_group() -> None:
    hb = HBitmap(100, 3)
    hb.set(0, 100)
    hb.reset(96)
    assert hb.next_zero(0) == 96


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_all_can_be_reset_by_range(granularity: int) -> None:
    group = 1 << granularity
    for size in {group, min(2 * group, MAX_SIZE), max(1, group - 1)}:
        if size > MAX_SIZE:
            continue
        for count in (size, -(-size // group) * group):
            hb = HBitmap(size, granularity)
            hb.set(0, size)
            hb.reset(0, count)
            assert hb.empty()


@pytest.mark.parametrize("size", BOUNDARIES)
def test_reset_all_cleans_everything(size: int) -> None:
    hb, model = pair(size, 0, (0, size))
    hb.reset_all()
    model.reset_all()
    assert_same(hb, model)


# ---- subscripts -----------------------------------------------------------------------------


def test_subscripts_read_and_write_a_bit() -> None:
    hb = HBitmap(100)
    hb[7] = True
    assert hb[7] is True
    assert hb[8] is False
    hb[7] = False
    assert not hb


def test_slices_set_and_reset_ranges() -> None:
    hb = HBitmap(100)
    hb[10:30] = True
    hb[15:20] = False
    assert list(hb.areas()) == [(10, 5), (20, 10)]
    hb[:] = True
    assert len(hb) == 100
    hb[50:] = False
    assert len(hb) == 50
    hb[:10:1] = False
    assert list(hb.areas()) == [(10, 40)]


def test_empty_slices_do_nothing() -> None:
    hb = HBitmap(100, 3)
    hb[5:5] = True
    hb[5:5] = False
    hb[100:] = True
    assert hb.empty()


@pytest.mark.parametrize(
    "key",
    [slice(0, 101), slice(-1, 5), slice(0, -1), slice(5, 4), slice(101, None), slice(0, 2**64)],
)
@pytest.mark.parametrize("value", [True, False])
def test_slices_do_not_clamp(key: slice, value: bool) -> None:
    hb, model = pair(100, 0, (30, 30))
    with pytest.raises(RangeError):
        hb[key] = value
    assert_same(hb, model)


@pytest.mark.parametrize("step", [2, 0, -1, 2**64])
def test_slices_have_step_1(step: int) -> None:
    hb, model = pair(100, 0, (30, 30))
    with pytest.raises(InvalidError, match=str(step)):
        hb[0:10:step] = True
    assert_same(hb, model)


@pytest.mark.parametrize("part", [slice("0", 5), slice(0, 5.0), slice(0, 5, "1")])
def test_slices_are_made_of_integers(part: slice) -> None:
    hb, model = pair(100, 0, (30, 30))
    with pytest.raises(TypeError):
        hb[part] = True
    assert_same(hb, model)


@pytest.mark.parametrize("value", [2, -1, None, "True", "", b"", [True], [], 0.5])
def test_a_bit_is_true_or_false(value: Any) -> None:
    hb, model = pair(100, 0, (30, 30))
    with pytest.raises(TypeError, match="True or False"):
        hb[5] = value
    with pytest.raises(TypeError, match="True or False"):
        hb[5:40] = value
    assert_same(hb, model)


@pytest.mark.parametrize("item", [-1, 100, 101, 2**63, 2**64, -(2**64)])
def test_a_subscript_outside_is_refused(item: int) -> None:
    hb, model = pair(100, 0, (30, 30))
    with pytest.raises(RangeError, match=str(item)):
        hb[item]
    with pytest.raises(RangeError, match=str(item)):
        hb[item] = True
    with pytest.raises(RangeError, match=str(item)):
        hb[item] = False
    assert_same(hb, model)


def test_slices_cannot_be_read() -> None:
    with pytest.raises(TypeError):
        HBitmap(10)[0:5]  # type: ignore[index]


def test_bits_cannot_be_deleted() -> None:
    hb: Any = HBitmap(10)
    with pytest.raises((TypeError, AttributeError)):
        del hb[0]


def test_a_subscript_cleans_whole_groups_only() -> None:
    hb, model = pair(100, 3, (0, 100))
    with pytest.raises(InvalidError):
        hb[5] = False
    with pytest.raises(InvalidError):
        hb[0:5] = False
    assert_same(hb, model)


# ---- set_many -------------------------------------------------------------------------------


def words(*values: int) -> array[int]:
    return array("Q", values)


def test_set_many_marks_all_ranges() -> None:
    hb = HBitmap(1000, 2)
    hb.set_many(words(0, 500, 999), words(1, 10, 1))
    assert list(hb.areas()) == [(0, 4), (500, 12), (996, 4)]


def test_set_many_of_nothing_does_nothing() -> None:
    hb = HBitmap(0)
    hb.set_many(words(), words())
    assert hb.empty()


@pytest.mark.parametrize(
    ("start", "count"), [(100, 1), (99, 2), (2**64 - 1, 1), (2**64 - 1, 2), (0, 2**64 - 1)]
)
def test_set_many_marks_none_if_one_is_outside(start: int, count: int) -> None:
    hb, model = pair(100, 0, (50, 1))
    with pytest.raises(RangeError, match=rf"1: .*\[{start}, {start + count}\).* 100 items"):
        hb.set_many(words(3, start, 7), words(1, count, 1))
    assert_same(hb, model)


def test_set_many_allows_ranges_of_nothing_anywhere() -> None:
    hb = HBitmap(100)
    hb.set_many(words(2**64 - 1, 5), words(0, 1))
    assert list(hb) == [5]


def test_set_many_takes_as_many_counts_as_starts() -> None:
    hb, model = pair(100, 0, (50, 1))
    for starts, counts in [(words(1, 2), words(1)), (words(1), words(1, 2)), (words(), words(1))]:
        with pytest.raises(InvalidError, match=f"{len(starts)}.*{len(counts)}"):
            hb.set_many(starts, counts)
    assert_same(hb, model)


WRONG_INTEGERS: list[Any] = [
    b"12345678",
    bytearray(8),
    memoryview(b"12345678"),
    array("d", [1]),
    (ctypes.c_double * 1)(),
    [1.0],
    ["1"],
    [None],
    None,
    1.0,
    "12345678",
]


@pytest.mark.parametrize("wrong", WRONG_INTEGERS, ids=lambda wrong: repr(wrong).split(" at ")[0])
def test_set_many_refuses_what_are_no_integers(wrong: Any) -> None:
    hb, model = pair(100, 0, (50, 1))
    with pytest.raises(TypeError, match="starts must be integers"):
        hb.set_many(wrong, words(1))
    with pytest.raises(TypeError, match="counts must be integers"):
        hb.set_many(words(1), wrong)
    with pytest.raises(TypeError, match=r"starts must be integers: .* not int"):
        hb.set_many(1, 1)  # type: ignore[arg-type]
    assert_same(hb, model)


@pytest.mark.parametrize(
    "kind",
    [
        *(lambda items, code=code: array(code, items) for code in "bBhHiIlLqQ"),
        list,
        tuple,
        iter,
        lambda items: (ctypes.c_int64 * len(items))(*items),
        lambda items: (ctypes.c_uint32 * len(items))(*items),
        lambda items: (ctypes.c_uint64.__ctype_be__ * len(items))(*items),
        lambda items: dict.fromkeys(items),
    ],
)
def test_set_many_takes_integers_of_any_kind(kind: Callable[[list[int]], Any]) -> None:
    hb = HBitmap(100)
    hb.set_many(kind([1, 5, 90]), kind([1, 2, 10]))
    assert list(hb.areas()) == [(1, 1), (5, 2), (90, 10)]
    hb.clear()
    hb.set_many(kind([]), kind([]))
    assert not hb


def test_set_many_takes_ranges_and_one_count_for_all() -> None:
    hb = HBitmap(100)
    hb.set_many(range(0, 100, 40), 3)
    assert list(hb.areas()) == [(0, 3), (40, 3), (80, 3)]
    hb.set_many([7], True)
    hb.set_many([50])
    hb.set_many([60], 0)
    assert list(hb.areas()) == [(0, 3), (7, 1), (40, 3), (50, 1), (80, 3)]


@pytest.mark.parametrize(
    ("starts", "counts", "words_"),
    [
        ([1, -5], 1, r"starts\[1\] is -5"),
        (array("q", [1, -5]), 1, r"starts\[1\] is -5"),
        (array("b", [1, -5]), 1, r"starts\[1\] is -5"),
        ([1], -1, r"counts\[0\] is -1"),
        ([1], array("q", [-1]), r"counts\[0\] is -1"),
        ([1], [1 << 64], rf"counts\[0\] is {1 << 64}"),
        ([1, 99], 2, r"write 1: range \[99, 101\)"),
    ],
)
def test_set_many_names_what_is_outside(starts: Any, counts: Any, words_: str) -> None:
    hb, model = pair(100, 0, (50, 1))
    with pytest.raises(RangeError, match=words_):
        hb.set_many(starts, counts)
    assert_same(hb, model)


def test_set_many_takes_memoryviews() -> None:
    hb = HBitmap(100)
    hb.set_many(memoryview(words(1, 5)), memoryview(bytes(words(2, 2))).cast("Q"))
    assert list(hb) == [1, 2, 5, 6]


def test_set_many_takes_a_contiguous_part_of_a_buffer() -> None:
    hb = HBitmap(100)
    view = memoryview(words(1, 5, 9, 13))
    hb.set_many(view[1:3], view[0:2])
    assert list(hb.areas()) == [(5, 1), (9, 5)]


def test_set_many_takes_buffers_with_gaps() -> None:
    hb = HBitmap(100)
    view = memoryview(words(1, 2, 30, 4))
    hb.set_many(view[::2], view[::-2])
    assert list(hb.areas()) == [(1, 4), (30, 2)]


def test_set_many_refuses_buffers_of_two_dimensions() -> None:
    hb, model = pair(100, 0, (50, 1))
    view = memoryview(bytes(words(1, 2, 3, 4))).cast("Q", [2, 2])
    with pytest.raises(InvalidError, match="one dimension"):
        hb.set_many(view, words(1, 1))
    assert_same(hb, model)


@pytest.mark.parametrize("shift", range(8))
def test_set_many_takes_buffers_of_any_alignment(shift: int) -> None:
    memory = bytearray(64)
    view = memoryview(memory)[shift : shift + 16]
    view[:] = bytes(words(3, 77))
    hb = HBitmap(100)
    hb.set_many(view.cast("Q"), words(1, 1))
    assert list(hb) == [3, 77]
    hb.clear()
    hb.set_many(words(0, 10), view.cast("Q"))
    assert list(hb.areas()) == [(0, 3), (10, 77)]


def test_set_many_takes_ctypes_arrays() -> None:
    hb = HBitmap(100)
    starts, counts = (ctypes.c_uint64 * 2)(1, 5), (ctypes.c_uint64 * 2)(1, 2)
    hb.set_many(starts, counts)
    assert list(hb) == [1, 5, 6]


def test_set_many_names_the_range_of_a_ctypes_array() -> None:
    hb = HBitmap(100)
    starts, counts = (ctypes.c_uint64 * 2)(1, 500), (ctypes.c_uint64 * 2)(1, 2)
    with pytest.raises(RangeError, match=r"\[500, 502\)"):
        hb.set_many(starts, counts)
    assert hb.empty()


# ---- questions ------------------------------------------------------------------------------


def test_get_beyond_the_end_is_false() -> None:
    hb = HBitmap(100, 3)
    hb.set(0, 100)
    assert hb.get(99)
    for item in (100, 103, 104, 2**63, 2**64 - 1, 2**64, 2**100):
        assert hb.get(item) is False


@pytest.mark.parametrize("item", [-1, -(2**63), -(2**64)])
def test_get_of_a_negative_item_is_refused(item: int) -> None:
    with pytest.raises(RangeError, match=str(item)):
        HBitmap(100).get(item)


def test_count_follows_every_change() -> None:
    hb = HBitmap(1000, 2)
    counts = [hb.count()]
    for change in (
        lambda: hb.set(0, 100),
        lambda: hb.reset(0),
        lambda: hb.add(0),
        lambda: hb.pop(),
        lambda: hb.set_many(words(500), words(4)),
        lambda: hb.truncate(96),
        lambda: hb.deserialize(b"\1" + bytes(7)),
        lambda: hb.merge(HBitmap(96, 2) | [50]),
        lambda: hb.drain(48, 8),
        lambda: hb.clear(),
    ):
        change()
        counts.append(hb.count())
    assert counts == [0, 100, 96, 100, 96, 100, 92, 4, 8, 4, 0]


def test_the_count_of_groups_may_exceed_the_size() -> None:
    hb = HBitmap(10, 3)
    hb.set(0, 10)
    assert hb.count() == 16
    assert hb.count(0) == 10


@pytest.mark.parametrize(
    ("start", "count", "items"),
    [(0, 10, 6), (3, 3, 3), (4, 1, 1), (0, 4, 1), (8, 1, 0), (99, 5, 1), (99, 1, 1), (100, 1, 0)],
)
def test_the_count_of_a_range_is_clipped(start: int, count: int, items: int) -> None:
    hb = HBitmap(100)
    hb.set(3, 5)
    hb.set(9, 1)
    hb.set(99, 1)
    assert hb.count(start, count) == items


def test_the_count_of_a_range_counts_items_and_not_groups() -> None:
    hb = HBitmap(100, 4)
    hb.set(0, 40)
    assert hb.count(10, 20) == 20
    assert hb.count(40, 20) == 8
    assert hb.count(start=47) == 1
    assert hb.count(count=3) == 3


def test_empty_and_truth_are_opposites() -> None:
    hb = HBitmap(100)
    assert hb.empty()
    assert not hb
    hb.add(99)
    assert not hb.empty()
    assert hb
    hb.remove(99)
    assert hb.empty()
    assert not hb


# ---- searches -------------------------------------------------------------------------------


def test_next_dirty_and_next_zero() -> None:
    hb = HBitmap(100, 1)
    hb.set(10, 10)
    assert hb.next_dirty(0) == 10
    assert hb.next_dirty(13) == 13
    assert hb.next_dirty(20) is None
    assert hb.next_zero(0) == 0
    assert hb.next_zero(11) == 20
    assert hb.next_dirty(0, 10) is None
    assert hb.next_dirty(0, 11) == 10
    assert hb.next_zero(10, 10) is None
    assert hb.next_zero(10, 11) == 20


@pytest.mark.parametrize("start", [100, 101, 2**63 - 1, 2**63, 2**64, 2**100])
def test_a_search_beyond_the_size_finds_nothing(start: int) -> None:
    hb = HBitmap(100)
    hb.set(0, 100)
    assert hb.next_dirty(start) is None
    assert hb.next_zero(start) is None
    assert hb.next_dirty_area(start) is None
    assert hb.status(start) == (False, 0)
    assert hb.count(start) == 0
    assert list(hb.areas(start)) == []
    assert list(hb.iter(start)) == []
    assert hb.areas_array(start).shape == (0, 2)


@pytest.mark.parametrize("count", [50, 51, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**100])
def test_a_search_with_an_end_beyond_the_size_stops_at_the_size(count: int) -> None:
    hb = HBitmap(100)
    hb.set(50, 50)
    assert hb.next_dirty(50, count) == 50
    assert hb.next_zero(50, count) is None
    assert hb.status(50, count) == (True, 50)
    assert hb.count(50, count) == 50
    assert hb.next_dirty_area(50, end=50 + count) == (50, 50)
    assert hb.next_dirty_area(50, end=None, max_count=count) == (50, 50)
    assert list(hb.areas(0, end=50 + count)) == [(50, 50)]


@pytest.mark.parametrize("granularity", [0, 3])
@pytest.mark.parametrize(
    ("length", "gap"), [(1, 1), (1, 63), (5, 400), (64, 64), (63, 2), (4096, 1)]
)
def test_what_is_searched_in_batches_is_the_same(length: int, gap: int, granularity: int) -> None:
    # Batches of 8 and 64 end inside of words, at their borders, and between far ones.
    groups = 20_000
    hb = HBitmap((groups << granularity) - granularity, granularity)
    model = Model(hb.size, granularity)
    for group in range(0, groups, length + gap):
        start = group << granularity
        count = min(length << granularity, hb.size - start)
        hb.set(start, count)
        model.set(start, count)
    assert list(hb) == sorted(model)
    assert list(hb.areas()) == model.areas()
    assert hb.areas_array().data.cast("B").cast("Q").tolist() == [
        n for area in model.areas() for n in area
    ]


def test_a_search_of_nothing_finds_nothing() -> None:
    hb = HBitmap(100)
    hb.set(0, 100)
    assert hb.next_dirty(5, 0) is None
    assert hb.next_zero(5, 0) is None
    assert hb.status(5, 0) == (False, 0)
    assert hb.count(5, 0) == 0
    assert hb.next_dirty_area(5, end=5) is None
    assert hb.next_dirty_area(5, end=4) is None
    assert list(hb.areas(5, end=5)) == []
    assert list(hb.areas(5, end=4)) == []


@pytest.mark.parametrize("bad", [-1, -(2**63), -(2**64)])
def test_searches_refuse_what_is_negative(bad: int) -> None:
    hb, model = pair(100, 0, (50, 1))
    for call in (
        lambda: hb.next_dirty(bad),
        lambda: hb.next_dirty(0, bad),
        lambda: hb.next_zero(bad),
        lambda: hb.next_zero(0, bad),
        lambda: hb.status(bad),
        lambda: hb.status(0, bad),
        lambda: hb.count(bad),
        lambda: hb.count(0, bad),
        lambda: hb.next_dirty_area(bad),
        lambda: hb.next_dirty_area(0, end=bad),
        lambda: hb.areas(bad),
        lambda: hb.areas(0, end=bad),
        lambda: hb.areas_array(bad),
        lambda: hb.iter(bad),
    ):
        with pytest.raises(RangeError, match=str(bad)):
            call()
    assert_same(hb, model)


@pytest.mark.parametrize("most", [0, -1, -(2**64)])
def test_an_area_of_at_most_nothing_is_refused(most: int) -> None:
    with pytest.raises(InvalidError, match=str(most)):
        HBitmap(100).next_dirty_area(0, end=None, max_count=most)


def test_next_dirty_area_is_clipped_to_start_end_and_max_count() -> None:
    hb = HBitmap(10, 2)
    hb.set(0, 8)
    assert hb.next_dirty_area(0) == (0, 8)
    assert hb.next_dirty_area(1, end=10) == (1, 7)
    assert hb.next_dirty_area(1, end=6) == (1, 5)
    assert hb.next_dirty_area(1, end=6, max_count=2) == (1, 2)
    assert hb.next_dirty_area(8) is None
    hb.set(9)
    assert hb.next_dirty_area(8) == (8, 2)


def test_status_tells_for_how_long() -> None:
    hb = HBitmap(100, 3)
    hb.set(8, 20)
    assert hb.status(0) == (False, 8)
    assert hb.status(5) == (False, 3)
    assert hb.status(8) == (True, 24)
    assert hb.status(9, 5) == (True, 5)
    assert hb.status(32) == (False, 68)
    assert hb.status(0, 4) == (False, 4)


def test_adjacent_groups_are_one_area() -> None:
    hb = HBitmap(10000, 2)
    for start in (252, 256, 248, 260):  # over the border of a word
        hb.add(start)
    assert list(hb.areas()) == [(248, 16)]


@pytest.mark.parametrize("nareas", [0, 1, 15, 16, 17, 1023, 1024, 1025, 4095, 4096, 4097, 9000])
def test_areas_and_items_come_whole_whatever_their_number(nareas: int) -> None:
    hb = HBitmap(3 * 9000)
    hb.set_many(array("Q", range(1, 3 * nareas, 3)), array("Q", [1]) * nareas)
    assert list(hb.areas()) == [(3 * n + 1, 1) for n in range(nareas)]
    assert list(hb) == [3 * n + 1 for n in range(nareas)]
    assert as_areas(hb.areas_array()) == list(hb.areas())


def test_areas_array_without_areas_has_shape_0_2() -> None:
    areas = HBitmap(100).areas_array()
    assert areas.data.format == "Q"
    assert areas.data.shape == areas.shape == (0, 2)
    assert areas.tolist() == []


def test_areas_array_is_clipped_as_areas_are() -> None:
    hb = HBitmap(100)
    hb.set(10, 50)
    assert as_areas(hb.areas_array(20, end=30)) == [(20, 10)]


@pytest.mark.parametrize("nareas", [4095, 4096, 4097, 16383, 16384, 16385, 20_000, 300_000])
def test_areas_array_has_room_for_many(nareas: int) -> None:
    hb = HBitmap(3 * nareas)
    hb.set_many(array("Q", range(0, 3 * nareas, 3)), array("Q", [2]) * nareas)
    areas = hb.areas_array()
    assert areas.shape == (nareas, 2)
    flat = areas.data.cast("B").cast("Q").tolist()
    assert flat[::2] == [*range(0, 3 * nareas, 3)]
    assert set(flat[1::2]) == {2}


def test_areas_array_is_not_live() -> None:
    hb = HBitmap(100)
    hb.set(10, 50)
    areas = hb.areas_array()
    hb.clear()
    hb.truncate(5)
    assert as_areas(areas) == [(10, 50)]


# ---- iterators ------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "granularity"), [(7, 3), (1000, 4), ((1 << 62) - 1, 62)])
def test_iter_gives_nothing_from_the_size_on(size: int, granularity: int) -> None:
    last = (size - 1) >> granularity << granularity
    for hb in pair(size, granularity, (last, 1)):
        assert list(hb.iter(size - 1)) == [last], hb
        assert list(hb.iter(size)) == [], hb


def test_iter_begins_with_the_group_that_holds_first() -> None:
    hb = HBitmap(100, 3)
    hb.set(0, 100)
    assert next(hb.iter(17)) == 16
    assert list(hb.iter(97)) == [96]


def test_what_is_reset_ahead_of_an_iterator_is_not_given() -> None:
    hb = HBitmap(1000)
    hb.set(0, 100)
    items = iter(hb)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    hb.reset(3, 90)
    assert list(items) == [93, 94, 95, 96, 97, 98, 99]


@pytest.mark.parametrize(
    "clear",
    [
        lambda hb: hb.reset(3),
        lambda hb: hb.remove(3),
        lambda hb: hb.discard(3),
        lambda hb: hb.__setitem__(3, False),
        lambda hb: hb.drain(3, 1),
        lambda hb: hb.intersection_update([0, 1, 2, 4]),
        lambda hb: hb.difference_update([3]),
        lambda hb: hb.symmetric_difference_update([3]),
        lambda hb: hb.deserialize(b"\x17" + bytes(15)),
    ],
)
def test_whatever_cleans_is_noticed_by_iterators(clear: Callable[[HBitmap], object]) -> None:
    hb = HBitmap(128)
    hb.set(0, 5)
    items, areas = iter(hb), hb.areas()
    assert next(items) == 0
    clear(hb)
    assert list(items) == [1, 2, 4]
    assert list(areas) == [(0, 3), (4, 1)]


def test_all_may_be_cleared_under_an_iterator() -> None:
    hb = HBitmap(1000)
    hb.set(0, 1000)
    items, areas = iter(hb), hb.areas()
    assert next(items) == 0
    assert next(areas) == (0, 1000)
    hb.clear()
    assert list(items) == []
    assert list(areas) == []


def test_each_item_may_be_removed_as_it_is_given() -> None:
    hb = HBitmap(10000, 1)
    hb.set(0, 10000)
    given_items = []
    for item in hb:
        hb.remove(item)
        given_items.append(item)
    assert given_items == list(range(0, 10000, 2))
    assert hb.empty()


def test_each_area_may_be_reset_as_it_is_given() -> None:
    hb = HBitmap(10000)
    for start in range(0, 10000, 10):
        hb.set(start, 3)
    given_areas = []
    for start, count in hb.areas():
        hb.reset(start, count)
        given_areas.append((start, count))
    assert given_areas == [(start, 3) for start in range(0, 10000, 10)]


def test_marking_all_ahead_of_an_iterator_keeps_it_increasing() -> None:
    hb = HBitmap(3000)
    hb.add(0)
    last = -1
    for item in hb:
        assert item > last
        last = item
        hb.set(0, min(item + 100, 3000))
    assert last >= 0


def test_an_iterator_stops_at_the_new_end() -> None:
    hb = HBitmap(1000)
    hb.set(0, 1000)
    items, areas = iter(hb), hb.areas()
    next(items)
    hb.truncate(5)
    assert list(items) == [1, 2, 3, 4]
    assert list(areas) == [(0, 5)]


def test_an_iterator_keeps_its_bitmap_alive() -> None:
    def items() -> Iterator[int]:
        hb = HBitmap(100)
        hb.set(5, 50)
        return iter(hb)

    assert list(items()) == list(range(5, 55))


ITERATORS: list[Callable[[HBitmap], Iterator[Any]]] = [
    iter,
    lambda hb: hb.iter(200),
    lambda hb: hb.areas(),
    lambda hb: hb.areas(201, end=900),
]


@pytest.mark.parametrize("iterate", ITERATORS)
@pytest.mark.parametrize("dirty", [0, 1, 300])
def test_an_iterator_that_has_ended_lets_go_of_its_bitmap(
    iterate: Callable[[HBitmap], Iterator[Any]], dirty: int
) -> None:
    hb = HBitmap(1000)
    for item in range(0, 3 * dirty, 3):
        hb.add(item)
    alive = weakref.ref(hb)
    iterator = iterate(hb)
    list(iterator)
    del hb
    collect()
    assert alive() is None
    assert next(iterator, None) is None
    assert operator.length_hint(iterator) == 0


@pytest.mark.parametrize("iterate", ITERATORS)
def test_an_iterator_that_is_dropped_early_lets_go_of_its_bitmap(
    iterate: Callable[[HBitmap], Iterator[Any]],
) -> None:
    hb = HBitmap(1000, 2)
    hb.set(0, 1000)
    alive = weakref.ref(hb)
    iterator = iterate(hb)
    next(iterator)
    del hb, iterator
    collect()
    assert alive() is None


@pytest.mark.parametrize("iterate", ITERATORS)
@pytest.mark.parametrize("granularity", [0, 3, 10])
def test_an_iterator_knows_how_many_it_still_has(
    iterate: Callable[[HBitmap], Iterator[Any]], granularity: int
) -> None:
    hb = HBitmap(997, granularity)
    for item in range(0, 997, 7):
        hb.add(item)
    left = len(list(iterate(hb)))
    iterator = iterate(hb)
    for _ in iterator:
        left -= 1
        assert operator.length_hint(iterator) == left
    assert left == 0


@pytest.mark.parametrize("iterate", ITERATORS)
def test_what_an_iterator_still_has_is_never_below_zero(
    iterate: Callable[[HBitmap], Iterator[Any]],
) -> None:
    hb = HBitmap(1000)
    for item in range(0, 1000, 3):
        hb.add(item)
    iterator = iterate(hb)
    for _ in range(100):
        next(iterator)
    hb.clear()
    assert operator.length_hint(iterator) == 0


# ---- truncate -------------------------------------------------------------------------------


@pytest.mark.parametrize("before", BOUNDARIES)
@pytest.mark.parametrize("after", BOUNDARIES)
def test_truncate_from_boundary_to_boundary(before: int, after: int) -> None:
    hb, model = pair(before, 0, (0, min(before, 70)), (before // 2, (before + 1) // 2))
    hb.truncate(after)
    model.truncate(after)
    assert_same(hb, model)


def test_what_grows_is_clean() -> None:
    hb = HBitmap(100)
    hb.set(0, 100)
    hb.truncate(10000)
    assert list(hb.areas()) == [(0, 100)]


def test_what_was_cut_off_stays_gone() -> None:
    hb = HBitmap(10000)
    hb.set(0, 10000)
    hb.truncate(100)
    hb.truncate(10000)
    assert list(hb.areas()) == [(0, 100)]


def test_a_group_that_the_new_end_cuts_stays() -> None:
    hb = HBitmap(64, 3)
    hb.set(0, 64)
    hb.truncate(17)
    assert list(hb) == [0, 8, 16]
    assert list(hb.areas()) == [(0, 17)]
    assert hb.count() == 24
    hb.truncate(64)
    assert list(hb.areas()) == [(0, 24)]


@pytest.mark.parametrize("size", [-1, 2**63, 2**64, 2**100, 2**41 + 1])
def test_truncate_to_an_impossible_size_is_refused(size: int) -> None:
    hb, model = pair(100, 0, (50, 5))
    with pytest.raises(InvalidError, match=str(size)):
        hb.truncate(size)
    assert_same(hb, model)


# ---- merging and draining -------------------------------------------------------------------


def test_merge_adds_the_other_s_bits() -> None:
    a, b = HBitmap(100), HBitmap(100)
    a.set(10, 10)
    b.set(15, 10)
    a.merge(b)
    assert list(a.areas()) == [(10, 15)]
    assert list(b.areas()) == [(15, 10)]


def test_merge_with_itself_changes_nothing() -> None:
    hb, model = pair(100, 2, (10, 10))
    hb.merge(hb)
    assert_same(hb, model)


def test_merge_into_a_coarser_bitmap_rounds_outwards() -> None:
    a, b = HBitmap(100, 3), HBitmap(100)
    b.set(7, 2)
    b.set(99)
    a.merge(b)
    assert list(a) == [0, 8, 96]


def test_merge_into_a_finer_bitmap_marks_whole_groups() -> None:
    a, b = HBitmap(100), HBitmap(100, 3)
    b.set(99)
    a.merge(b)
    assert list(a.areas()) == [(96, 4)]


@pytest.mark.parametrize("other", [99, 101, 0])
def test_merge_of_other_sizes_is_refused(other: int) -> None:
    hb, model = pair(100, 0, (50, 5))
    with pytest.raises(MismatchError, match=f"100 and {other}"):
        hb.merge(HBitmap(other))
    assert_same(hb, model)


@pytest.mark.parametrize("other", [[1], {1}, None, 1, "x"])
def test_merge_takes_bitmaps_only(other: Any) -> None:
    hb, model = pair(100, 0, (50, 5))
    with pytest.raises(TypeError, match=type(other).__name__):
        hb.merge(other)
    assert_same(hb, model)


def test_drain_moves_all_bits() -> None:
    hb = HBitmap(1000, 2)
    hb.set(10, 500)
    expected = hb.copy()
    drained = hb.drain()
    assert hb.empty()
    assert drained == expected


def test_drain_moves_the_bits_of_a_range() -> None:
    hb = HBitmap(1000)
    hb.set(0, 1000)
    drained = hb.drain(100, 300)
    assert list(drained.areas()) == [(100, 300)]
    assert list(hb.areas()) == [(0, 100), (400, 600)]


def test_drain_into_keeps_what_is_there() -> None:
    hb, into = HBitmap(100), HBitmap(100)
    hb.set(10, 10)
    into.set(15, 10)
    assert hb.drain(into=into) is into
    assert list(into.areas()) == [(10, 15)]
    assert hb.empty()


@pytest.mark.parametrize(("start", "count"), [(1, 8), (0, 7), (8, 12)])
def test_drain_refuses_what_cuts_a_group(start: int, count: int) -> None:
    hb, model = pair(100, 3, (0, 100))
    into, into_model = pair(100, 3, (50, 1))
    with pytest.raises(InvalidError, match=rf"\[{start}, {start + count}\)"):
        hb.drain(start, count, into)
    assert_same(hb, model)
    assert_same(into, into_model)


def test_drain_into_itself_is_refused() -> None:
    hb, model = pair(100, 3, (0, 100))
    with pytest.raises(InvalidError):
        hb.drain(into=hb)
    assert_same(hb, model)


@pytest.mark.parametrize(("size", "granularity"), [(99, 3), (101, 3), (100, 2), (100, 4)])
def test_drain_into_another_shape_is_refused(size: int, granularity: int) -> None:
    hb, model = pair(100, 3, (0, 100))
    into, into_model = pair(size, granularity, (50, 1))
    with pytest.raises(MismatchError):
        hb.drain(into=into)
    assert_same(hb, model)
    assert_same(into, into_model)


@pytest.mark.parametrize("into", [set(), [], 1, "x"])
def test_drain_into_what_is_no_bitmap_is_refused(into: Any) -> None:
    hb, model = pair(100, 3, (0, 100))
    with pytest.raises(TypeError):
        hb.drain(into=into)
    assert_same(hb, model)


# ---- anything -------------------------------------------------------------------------------


@given(
    st.integers(0, 63),
    st.integers(1, 200),
    st.lists(st.tuples(st.integers(0, 2**63 - 2), st.integers(1, 2**62))),
)
def test_huge_bitmaps_behave_as_small_ones(
    granularity: int, ngroups: int, marks: list[tuple[int, int]]
) -> None:
    size = min(ngroups << granularity, MAX_SIZE)
    hb, model = pair(size, granularity)
    for start, count in marks:
        start %= size
        count = min(count, size - start)
        hb.set(start, count)
        model.set(start, count)
    assert_same(hb, model)


# ---- what a review found ----------------------------------------------------


def test_a_bitmap_is_initialised_once() -> None:
    """An iterator, or another thread, may be using what it has."""
    hb = HBitmap(1 << 20)
    hb.set(0, 100)
    items = iter(hb)
    next(items)
    with pytest.raises(TypeError, match="once"):
        hb.__init__(10)  # type: ignore[misc]
    assert len(list(items)) == 99


def test_a_bitmap_cannot_be_reversed() -> None:
    with pytest.raises(TypeError):
        reversed(HBitmap(100))


def test_contains_is_false_where_the_index_fails() -> None:
    class Odd:
        def __index__(self) -> int:
            raise ValueError

    odd: object = Odd()
    assert not HBitmap(10).__contains__(odd)


@pytest.mark.parametrize("call", ["next_dirty(-1)", "count(-1)", "areas(-1)", "iter(-1)"])
def test_a_search_says_that_it_starts_at_a_negative_item(call: str) -> None:
    with pytest.raises(RangeError, match=r"start -1, .* negative"):
        eval(f"hb.{call}", {"hb": HBitmap(100)})


@pytest.mark.parametrize("call", ["serialize(200)", "drain(200)"])
def test_a_start_beyond_the_end_is_named(call: str) -> None:
    with pytest.raises(RangeError, match="start 200 is not inside the bitmap of 100 items"):
        eval(f"hb.{call}", {"hb": HBitmap(100)})


# ---- granularity and group_size -------------------------------------------------------------


@pytest.mark.parametrize("granularity", [0, 1, 12, 40, 63])
def test_the_size_of_a_group_says_the_same_as_the_granularity(granularity: int) -> None:
    group_size = 1 << granularity
    hb = HBitmap(100, group_size=group_size)
    assert (hb.granularity, hb.group_size) == (granularity, group_size)
    assert hb == HBitmap(100, granularity)
    memory = bytearray(16)
    over = HBitmap.over(memory, 100, group_size=group_size)
    assert over.granularity == granularity
    if granularity < 58:  # it can be serialised
        assert HBitmap.from_bytes(hb.serialize(), 100, group_size=group_size) == hb


@pytest.mark.parametrize("wrong", [0, -4096, 3, 4097, 1 << 64])
def test_a_group_size_that_is_no_power_of_2_is_refused(wrong: int) -> None:
    with pytest.raises(InvalidError, match=f"group_size {wrong} is not|granularity 64 is not"):
        HBitmap(100, group_size=wrong)


def test_granularity_and_group_size_are_not_given_at_once() -> None:
    with pytest.raises(InvalidError, match="give one of them"):
        HBitmap(100, 12, group_size=4096)


def test_who_gives_the_size_of_a_group_as_granularity_is_told_what_to_write() -> None:
    with pytest.raises(InvalidError, match=r"log2 .*; 12 for 4096, or group_size=4096$"):
        HBitmap(100, 4096)
    with pytest.raises(InvalidError, match=r"stands for$"):
        HBitmap(100, 100)
    with pytest.raises(InvalidError, match=r"16 for 65536"):
        HBitmap(100).merge_bits(b"1", granularity=65536)
    coarse = HBitmap(100, group_size=8)
    coarse.merge_bits(b"\1", group_size=1)
    assert list(coarse.areas()) == [(0, 8)]
