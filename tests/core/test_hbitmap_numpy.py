# SPDX-License-Identifier: MIT
"""HBitmap beside NumPy: what it lends is not copied, what it takes is taken as it is."""

from __future__ import annotations

import operator
from typing import Any

import pytest
from model import as_areas
from peers import package
from support import collect

from pybitmap import HBitmap, InvalidError, RangeError

np = pytest.importorskip("numpy")


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def test_asarray_of_words_shares_their_memory() -> None:
    hb = HBitmap(1000)
    words = hb.words
    array = np.asarray(words)
    assert array.dtype == np.uint64
    assert array.shape == (16,)
    assert not array.flags.owndata
    assert not array.flags.writeable
    assert np.shares_memory(array, np.asarray(hb.words))
    hb.add(70)
    assert array[1] == 1 << 6


def test_asarray_of_areas_shares_their_memory() -> None:
    hb = HBitmap(1000)
    hb.set(10, 20)
    hb.set(500, 1)
    areas = hb.areas_array()
    array = np.asarray(areas)
    assert array.dtype == np.uint64
    assert array.tolist() == [[10, 20], [500, 1]]
    assert not array.flags.owndata
    assert np.shares_memory(array, np.asarray(areas))
    array[1, 1] = 7
    assert as_areas(areas) == [(10, 20), (500, 7)]


def test_asarray_of_no_areas_has_two_columns() -> None:
    array = np.asarray(HBitmap(1000).areas_array())
    assert array.shape == (0, 2)
    assert array.dtype == np.uint64


def test_an_array_of_words_outlives_the_bitmap() -> None:
    hb = HBitmap(2**24)
    hb.add(2**24 - 1)
    array = np.asarray(hb.words)
    del hb
    collect()
    fill = [HBitmap(2**24) | [n] for n in range(10)]
    assert array[-1] == 1 << 63
    assert int(array.astype(bool).sum()) == 1
    assert len(fill) == 10


def test_an_array_of_words_pins_the_bitmap() -> None:
    hb = HBitmap(1000)
    array = np.asarray(hb.words)
    part = array[3:5]
    del array
    with pytest.raises(BufferError):
        hb.truncate(5)
    del part
    collect()
    hb.truncate(5)
    assert hb.size == 5


def test_set_many_takes_arrays() -> None:
    hb = HBitmap(1000)
    starts = np.array([1, 500, 999], dtype=np.uint64)
    hb.set_many(starts, np.full(3, 1, dtype=np.uint64))
    assert list(hb) == [1, 500, 999]


def test_set_many_takes_what_areas_array_gave() -> None:
    hb, twin = HBitmap(1000), HBitmap(1000)
    hb.set(10, 20)
    hb.set(500, 1)
    starts, counts = np.asarray(hb.areas_array()).T.copy()
    twin.set_many(starts, counts)
    assert twin == hb


def test_set_many_takes_the_contiguous_part_of_an_array() -> None:
    hb = HBitmap(1000)
    starts = np.arange(10, dtype=np.uint64)
    hb.set_many(starts[4:6], starts[1:3])
    assert list(hb) == [4, 5, 6]


def test_set_many_takes_read_only_arrays() -> None:
    hb = HBitmap(1000)
    starts = np.arange(10, dtype=np.uint64)
    starts.flags.writeable = False
    hb.set_many(starts, starts)
    assert list(hb.areas()) == [(1, 17)]


def test_set_many_names_the_range_that_is_outside() -> None:
    hb = HBitmap(1000)
    starts = np.array([1, 2**64 - 1], dtype=np.uint64)
    with pytest.raises(RangeError, match=rf"\[{2**64 - 1}, {2**64 + 1}\)"):
        hb.set_many(starts, np.array([1, 2], dtype=np.uint64))
    assert hb.empty()


@pytest.mark.parametrize("dtype", ["float64", "bool", "complex64", "S8", "M8[s]"])
def test_set_many_refuses_arrays_of_other_types(dtype: str) -> None:
    hb = HBitmap(1000)
    good, wrong = np.ones(2, dtype=np.uint64), np.zeros(2, dtype=dtype)
    with pytest.raises(TypeError, match="starts must be integers"):
        hb.set_many(wrong, good)
    with pytest.raises(TypeError, match="counts must be integers"):
        hb.set_many(good, wrong)
    assert hb.empty()


@pytest.mark.parametrize("dtype", ["i8", "u4", "i4", "u2", "i2", "u1", "i1", ">u8", ">i2", "O"])
def test_set_many_takes_arrays_of_any_integers(dtype: str) -> None:
    hb = HBitmap(1000)
    hb.set_many(np.array([1, 5, 90], dtype), np.array([1, 2, 100], dtype))
    assert list(hb.areas()) == [(1, 1), (5, 2), (90, 100)]
    if dtype not in ("u4", "u2", "u1", ">u8"):
        with pytest.raises(RangeError, match=r"starts\[1\] is -5"):
            hb.set_many(np.array([1, -5], dtype), 1)


def test_set_many_takes_columns_and_series() -> None:
    hb, twin = HBitmap(1000), HBitmap(1000)
    hb.set(10, 20)
    hb.set(500, 1)
    areas = np.asarray(hb.areas_array())
    twin.set_many(areas[:, 0], areas[:, 1])
    assert twin == hb
    for series in (package("pandas").Series, package("polars").Series):
        twin.clear()
        twin.set_many(series([10, 500]), series([20, 1]))
        assert twin == hb
        with pytest.raises(RangeError, match=r"starts\[0\] is -1"):
            twin.set_many(series([-1]), 1)
    twin.clear()
    twin.set_many(np.arange(10, 30), np.int64(1))
    twin.set_many(np.array([500]))
    assert twin == hb


@pytest.mark.parametrize("shape", [(), (1, 4), (4, 1), (2, 2)])
def test_set_many_refuses_arrays_of_other_dimensions(shape: tuple[int, ...]) -> None:
    hb = HBitmap(1000)
    with pytest.raises((InvalidError, TypeError)):
        hb.set_many(np.ones(shape, dtype=np.uint64), np.ones(4, dtype=np.uint64))
    assert hb.empty()


def test_set_many_takes_misaligned_arrays() -> None:
    hb = HBitmap(1000)
    memory = np.zeros(17, dtype=np.uint8)
    starts = memory[1:].view(np.uint64)
    starts[:] = [7, 70]
    assert address(starts) % 8
    hb.set_many(starts, np.ones(2, dtype=np.uint64))
    assert list(hb) == [7, 70]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_integers_of_numpy_are_integers(dtype: str) -> None:
    hb = HBitmap(1000)
    item = np.dtype(dtype).type(7)
    hb.set(item, item)
    assert item in hb
    assert hb[item]
    assert next(hb.iter(item)) == 7
    hb.remove(item)
    assert hb.next_dirty(item) == 8
    assert hb | np.array([500], dtype=dtype if dtype.endswith("64") else "int16") == {
        *range(8, 14),
        500,
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floats_of_numpy_are_no_integers(dtype: str) -> None:
    hb = HBitmap(1000)
    item = np.dtype(dtype).type(7)
    with pytest.raises(TypeError):
        hb.set(item)
    assert item not in hb
    assert hb.empty()


def test_bools_of_numpy_are_bits() -> None:
    hb = HBitmap(1000)
    hb[5] = np.True_
    hb[6:9] = np.bool_(True)
    hb[7] = np.False_
    assert list(hb) == [5, 6, 8]


def test_deserialize_takes_arrays_of_bytes() -> None:
    hb = HBitmap(128)
    hb.deserialize(np.packbits(np.arange(128) % 3 == 0, bitorder="little"))
    assert list(hb) == list(range(0, 128, 3))


def test_deserialize_refuses_arrays_of_words() -> None:
    hb = HBitmap(128)
    with pytest.raises(TypeError, match="bytes"):
        hb.deserialize(np.ones(2, dtype=np.uint64))
    assert hb.empty()


OPERATORS = {"or": operator.or_, "and": operator.and_, "sub": operator.sub, "xor": operator.xor}


def operands(items: list[int]) -> list[Any]:
    """The same elements, as what other libraries have."""
    pandas = package("pandas")
    arrays = [np.array(items, dtype) for dtype in ("i8", "u8", "i4", "u2")]
    frames = [pandas.Series(items), pandas.Index(items), pandas.array(items)]
    return [*arrays, *frames]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_with_arrays_are_those_of_sets_on_either_side(name: str) -> None:
    operate, items, others = OPERATORS[name], {1, 2, 8}, [8, 16, 32]
    hb = HBitmap(100)
    hb.update(items)
    for other in operands(others):
        right, left = operate(hb, other), operate(other, hb)
        assert isinstance(right, HBitmap), type(other)
        assert isinstance(left, HBitmap), type(other)
        assert right == operate(items, set(others)), type(other)
        assert left == operate(set(others), items), type(other)


def test_operators_in_place_take_arrays_and_leave_arrays_alone() -> None:
    for other in operands([8, 16]):
        hb = HBitmap(100)
        hb.add(8)
        hb |= other
        assert hb == {8, 16}
        hb -= other
        assert hb == set()
    array = np.array([8, 16])
    with pytest.raises(TypeError):
        array |= hb
    assert array.tolist() == [8, 16]


@pytest.mark.parametrize("scalar", [np.int64(8), np.uint8(8), np.float64(8), np.bool_(True)])
def test_a_scalar_is_no_set(scalar: Any) -> None:
    hb = HBitmap(100)
    for operate in OPERATORS.values():
        for operands in ((hb, scalar), (scalar, hb)):
            with pytest.raises(TypeError):
                operate(*operands)


def test_a_mask_is_no_set_of_elements() -> None:
    """True and False are 1 and 0 to a set, which nobody means who has a mask."""
    hb = HBitmap(100)
    hb.update([0, 1, 50])
    for mask in (np.zeros(100, bool), hb.to_mask()):
        calls: list[Any] = [hb.update, hb.union, hb.intersection, hb.difference, hb.isdisjoint]
        calls += [hb.symmetric_difference, hb.issubset, hb.issuperset, hb.intersection_count]
        calls += [lambda other, each=each: each(hb, other) for each in OPERATORS.values()]
        for call in calls:
            with pytest.raises(TypeError, match=r"HBitmap.from_mask\(mask\)"):
                call(mask)
    assert list(hb) == [0, 1, 50]
    assert hb & HBitmap.from_mask(hb.to_mask()) == hb


def test_who_takes_a_bitmap_for_an_array_is_told_what_there_is() -> None:
    hb, two = HBitmap(100), np.array([1, 2])
    arrays: list[Any] = [two, [1, 2], np.zeros(100, bool)]
    for many in arrays:
        with pytest.raises(TypeError, match=r"one whole number, not \w+: .* update\(\)"):
            hb[many] = True
        with pytest.raises(TypeError, match=r"one whole number, not \w+: .* items_array\(\)"):
            hb[many]
        with pytest.raises(TypeError, match=r"size in items, not \w+: .*update\(\).*from_mask"):
            HBitmap(many)
    with pytest.raises(TypeError, match="to_mask"):
        hb[2:5]  # type: ignore[index]
    with pytest.raises(TypeError, match="'float' object"):
        HBitmap(1e6)  # type: ignore[arg-type]
    hb.set(3, 4)
    of_areas: list[Any] = [hb.areas_array(), np.asarray(hb.areas_array())]
    for areas in of_areas:
        with pytest.raises(InvalidError, match=r"set_many\(areas.offset, areas.length\)"):
            hb.set_many(areas)
    assert list(hb) == [3, 4, 5, 6]


def test_dates_are_no_elements() -> None:
    hb = HBitmap(100)
    with pytest.raises(TypeError):
        hb |= np.zeros(2, "M8[s]")
    assert not hb & np.zeros(2, "M8[s]")


def test_an_array_is_no_set_to_compare_with() -> None:
    hb = HBitmap(100)
    hb.update([8, 16])
    for other in operands([8, 16]):
        assert (hb == other) is False
        assert (other != hb) is True
        with pytest.raises(TypeError):
            assert hb <= other
        assert hb == {int(item) for item in other}


def test_a_series_of_polars_is_an_operand_on_the_right_and_refuses_to_be_one_on_the_left() -> None:
    polars, hb = package("polars"), HBitmap(100)
    series = polars.Series([8, 16])
    hb.add(8)
    assert hb | series == {8, 16}
    with pytest.raises((TypeError, polars.exceptions.PolarsError)):
        series | hb


@pytest.mark.parametrize("granularity", [0, 9])
def test_masks_are_arrays_of_bools_without_a_copy(granularity: int) -> None:
    rng = np.random.default_rng(1)
    expected = rng.random(1000) < 0.3
    hb = HBitmap.from_mask(expected, granularity=granularity)
    mask = hb.to_mask()
    array = np.asarray(mask)
    assert array.dtype == np.bool_
    assert np.shares_memory(array, np.asarray(mask))
    assert np.array_equal(array, expected)
    assert (np.flatnonzero(array) * hb.group_size).tolist() == list(hb)


def test_masks_are_taken_however_they_lie() -> None:
    square = np.random.default_rng(2).random((64, 64)) < 0.5
    for mask in (square[3], square[:, 3], square[3, ::-1], square[3].view(np.uint8)):
        assert np.array_equal(np.asarray(HBitmap.from_mask(mask).to_mask()), mask)
    for series in (package("pandas").Series, package("polars").Series):
        assert list(HBitmap.from_mask(series([False, True, True]))) == [1, 2]
    assert list(HBitmap.from_mask([np.True_, np.False_])) == [0]
    missing = package("pandas").array([True, None], dtype="boolean")
    with pytest.raises(TypeError, match=r"mask\[1\]"):
        HBitmap.from_mask(missing)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (np.array([3, 5]), TypeError),
        (np.array([0.0, 1.0]), TypeError),
        (np.packbits([True] * 9), InvalidError),
        (np.zeros((2, 2), bool), InvalidError),
        (np.array(True), InvalidError),
        (np.zeros(2, "M8[s]"), TypeError),
        (np.array(["a"]), TypeError),
    ],
)
def test_arrays_that_are_no_masks_are_refused(mask: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        HBitmap.from_mask(mask)


def test_asarray_of_numbers_heeds_what_is_asked_for() -> None:
    hb = HBitmap(1000)
    hb.set(10, 20)
    for numbers in (hb.areas_array(), hb.items_array()):
        array = np.asarray(numbers)
        assert array.tolist() == numbers.tolist()
        assert array.shape == numbers.shape
        assert np.asarray(numbers, dtype=np.int64).dtype == np.int64
        assert not np.shares_memory(np.array(numbers), array)
        assert np.shares_memory(np.asarray(numbers, dtype=np.uint64), array)
        with pytest.raises(ValueError, match="copy"):
            numbers.__array__(np.int32, copy=False)
        with pytest.raises(TypeError):
            operator.add(numbers, 1)


@pytest.mark.parametrize("dtype", ["uint64", "int64", "int32", "uint8", object])
def test_extents_are_taken_from_an_array_of_pairs(dtype: Any) -> None:
    table = np.array([[3, 4], [100, 5], [200, 0]], dtype=dtype)
    for pairs in (table, np.asfortranarray(table), np.repeat(table, 2, axis=0)[::2]):
        hb = HBitmap.from_extents(pairs)
        assert (hb.size, list(hb.areas())) == (200, [(3, 4), (100, 5)])
    assert HBitmap.from_extents(np.asarray(hb.areas_array()), 200) == hb
    assert HBitmap.from_extents(np.zeros((0, 2), dtype)).size == 0


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ([[0.0, 1.0]], TypeError, "extent 0 has 0.0"),
        ([[0, 1], [-1, 2]], RangeError, "extent 1: .*negative"),
        ([[0, 1, 1]], InvalidError, r"\(n, 2\)"),
        ([0, 1], InvalidError, r"\(n, 2\)"),
    ],
)
def test_arrays_that_are_no_extents_are_refused(
    wrong: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        HBitmap.from_extents(np.array(wrong))


@pytest.mark.parametrize("missing", [[True, False], [False, True], [True, True]])
def test_elements_that_are_masked_are_refused(missing: list[bool]) -> None:
    """What lies below the mask is nobody's word; pandas and Polars have no such elements either."""
    hb = HBitmap(10)
    masked: Any = np.ma.array([3, 5], mask=missing)
    for call in (hb.update, hb.set_many, hb.union, lambda counts: hb.set_many([1, 2], counts)):
        with pytest.raises(TypeError, match="masked"):
            call(masked)
    with pytest.raises(TypeError, match="masked"):
        HBitmap.from_mask(np.ma.array([True, False], mask=missing))
    with pytest.raises(TypeError, match="extent 0 has None"):
        HBitmap.from_extents(np.ma.array([[3, 5]], mask=[missing]))
    assert hb.empty()


@pytest.mark.parametrize("missing", [False, [False, False]])
def test_masked_arrays_with_nothing_masked_are_arrays(missing: Any) -> None:
    hb = HBitmap(10)
    hb.set_many(np.ma.array([3, 5], mask=missing))
    assert hb == {3, 5} == HBitmap(10).union(np.ma.array([3, 5]))
    assert hb == HBitmap.from_mask(np.ma.array(hb.to_mask(), mask=False))
