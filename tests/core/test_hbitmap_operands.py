# SPDX-License-Identifier: MIT
"""What set operations take besides bitmaps and sets, and what class their results have.

Ranges and buffers of integers go another way than other iterables: the answer is the same.
"""

from __future__ import annotations

import copy
import ctypes
import operator
import pickle
import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model import Model, assert_same

from pybitmap import HBitmap, RangeError
from pybitmap.hbitmap import _AT_ONCE, _unpickle

pytestmark = pytest.mark.core

SIZE = 300

Call = Callable[[Any, Any], Any]

UPDATES: list[Call] = [
    lambda hb, other: hb.update(other),
    lambda hb, other: hb.intersection_update(other),
    lambda hb, other: hb.difference_update(other),
    lambda hb, other: hb.symmetric_difference_update(other),
    *[operator.ior, operator.iand, operator.isub, operator.ixor],
]
MADE: list[Call] = [
    lambda hb, other: hb.union(other),
    lambda hb, other: hb.intersection(other),
    lambda hb, other: hb.difference(other),
    lambda hb, other: hb.symmetric_difference(other),
    *[operator.or_, operator.and_, operator.sub, operator.xor],
]


class Index:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def outcome(call: Call, hb: HBitmap, other: Any) -> Any:
    try:
        result = call(hb, other)
    except Exception as error:
        return type(error), str(error)
    return list(result if isinstance(result, HBitmap) else hb)


def same_as_one_by_one(call: Call, hb: HBitmap, other: Any, items: Iterable[Any]) -> None:
    """As if the elements came from a generator of objects that are no ints."""
    twin = hb.copy()
    expected = outcome(call, twin, (Index(item) for item in items))
    assert outcome(call, hb, other) == expected
    assert hb == twin


# ---- ranges -----------------------------------------------------------------------------------

edges = st.integers(-20, SIZE + 20)
steps = st.integers(-9, 9).filter(bool) | st.sampled_from([-200, -64, 64, 65, 200])
ranges = st.builds(range, edges, edges, steps)


@pytest.mark.parametrize("call", [*UPDATES, *MADE])
@given(ranges, st.sampled_from([0, 1, 3, 6]), st.integers(0, 3))
def test_ranges_are_what_their_elements_are(
    call: Call, elements: range, granularity: int, cut: int
) -> None:
    hb = HBitmap(SIZE - cut, granularity)
    hb.set(50, 100)
    same_as_one_by_one(call, hb, elements, elements)


@pytest.mark.parametrize("step", [2, -2, 7])
def test_a_range_with_a_step_may_be_longer_than_what_is_marked_at_once(step: int) -> None:
    size = abs(step) * 2 * _AT_ONCE + 5
    elements = range(size)[::step]
    hb, model = HBitmap(size), Model(size)
    hb.update(elements)
    model.starts = set(elements)
    assert_same(hb, model)


@pytest.mark.parametrize(
    "elements",
    [range(2**70), range(-(2**70), 2**70), range(2**70, -(2**70), -3), range(5, 2**63, 2**30)],
)
def test_ranges_are_not_gone_through(elements: range) -> None:
    """They may have more elements than there is time."""
    size = 2**40
    hb = HBitmap(size, 20)
    hb.set(0, size)
    assert hb - elements == HBitmap(size, 20) or elements.step == 2**30
    assert len(hb & elements) in (len(hb), 2**10)
    hb.difference_update(elements)
    assert len(hb) in (0, 2**20 - 2**10)
    with pytest.raises(RangeError, match="not inside the bitmap"):
        hb.update(elements)


@pytest.mark.parametrize(
    ("elements", "named"),
    [
        (range(10, SIZE + 5), SIZE),
        (range(SIZE + 5, 10, -1), SIZE + 5),
        (range(-3, 5), -3),
        (range(5, -3, -2), -1),
        (range(400, 500, 7), 400),
    ],
)
def test_the_first_element_that_is_refused_is_named(elements: range, named: int) -> None:
    hb = HBitmap(SIZE)
    with pytest.raises(RangeError, match=rf"range \[{named}, {named + 1}\)"):
        hb.update(elements)
    assert hb.empty()


def test_an_empty_range_is_nothing() -> None:
    hb = HBitmap(SIZE)
    hb.add(5)
    for elements in (range(0), range(1000, 1000), range(-5, -9), range(2**70, 0)):
        hb |= elements
        hb -= elements
        hb ^= elements
    assert list(hb) == [5]


def test_a_range_that_is_cleaned_is_noticed_by_iterators() -> None:
    hb = HBitmap(SIZE)
    hb.update(range(5))
    items = iter(hb)
    assert next(items) == 0
    hb -= range(2, 4)
    assert list(items) == [1, 4]


# ---- buffers ------------------------------------------------------------------------------------

values = st.lists(st.integers(0, SIZE - 1) | st.integers(-3, SIZE + 3), max_size=100)


@pytest.mark.parametrize("call", [*UPDATES[:4], operator.sub])
@pytest.mark.parametrize("code", ["q", "l", "i", "Q", "L", "H", "b", "d"])
@given(values, st.sampled_from([0, 3]))
def test_buffers_are_what_their_elements_are(
    code: str, call: Call, items: list[int], granularity: int
) -> None:
    low = 0 if code.isupper() else -3
    limit = 127 if code == "b" else SIZE + 3
    data = array(code, [max(low, min(item, limit)) for item in items])
    hb = HBitmap(SIZE, granularity)
    hb.set(50, 100)
    if code == "d":
        expected = outcome(call, hb.copy(), iter(data))
        assert outcome(call, hb, data) == expected
    else:
        same_as_one_by_one(call, hb, data, data.tolist())


@pytest.mark.parametrize(
    "data",
    [
        memoryview(array("Q", [5, 6, 7, 8]))[::2],
        memoryview(array("q", [7, 6, 5]))[::-2],
        memoryview(b"\0" + array("Q", [5, 7]).tobytes())[1:].cast("Q"),
        (ctypes.c_uint64 * 2)(5, 7),
        (ctypes.c_int16 * 2)(5, 7),
        b"\5\7",
        bytearray(b"\7\5"),
    ],
)
def test_buffers_lie_as_they_like(data: Any) -> None:
    hb = HBitmap(SIZE)
    hb.update(data)
    assert list(hb) == [5, 7]


@pytest.mark.parametrize("code", ["q", "Q"])
def test_a_buffer_with_an_element_outside_marks_nothing_and_names_it(code: str) -> None:
    hb = HBitmap(SIZE)
    hb.add(1)
    for wrong in (SIZE, -1 if code == "q" else 2**64 - 1):
        with pytest.raises(RangeError, match=rf"range \[{wrong}, {wrong + 1}\)"):
            hb.update(array(code, [5] * 50 + [wrong] + [6] * 50))
        assert list(hb) == [1]


def test_a_buffer_is_given_back_also_by_an_error() -> None:
    hb, data = HBitmap(SIZE), array("Q", [5, SIZE])
    with pytest.raises(RangeError) as caught:
        hb.update(data)
    data.append(1)  # though the traceback is alive
    hb.update(data[:1])
    data.append(1)
    assert caught.value


def test_packed_bits_are_not_taken_for_elements() -> None:
    """As a bitarray has them: its buffer is of bytes, its elements are bits."""

    class Bits(bytearray):
        def __iter__(self) -> Iterator[int]:
            return iter([1, 0, 1])

    hb = HBitmap(SIZE)
    hb.update(Bits(b"\5"))
    assert list(hb) == [0, 1]


@pytest.mark.parametrize("elements", [[5, True], [Index(5), 1], {1: 2, 5: 6}, iter([1, 5])])
def test_other_iterables_have_integers_of_any_kind(elements: Any) -> None:
    hb = HBitmap(SIZE)
    hb.update(elements)
    assert list(hb) == [1, 5]


def test_an_index_that_fails_comes_through() -> None:
    class Bad:
        def __index__(self) -> int:
            raise ZeroDivisionError

    hb = HBitmap(SIZE)
    with pytest.raises(ZeroDivisionError):
        hb.update([5, Bad()])  # type: ignore[list-item]
    assert hb.empty()


# ---- the class of results ----------------------------------------------------------------------


class Plain(HBitmap):
    pass


class Slotted(HBitmap):
    __slots__ = ("__hidden", "label")

    label: object

    def hide(self, value: object) -> None:
        self.__hidden = value

    def hidden(self) -> object:
        return self.__hidden


class Both(Slotted):
    """With a dict as well, and made by other arguments."""

    more: list[int]
    me: Both

    def __new__(cls, name: str) -> Both:
        return super().__new__(cls)

    def __init__(self, name: str) -> None:
        super().__init__(SIZE)
        self.name = name


class Own(HBitmap):
    """Says itself what there is to keep."""

    def __getstate__(self) -> object:
        return "kept"

    def __setstate__(self, state: object) -> None:
        self.state = state


def plain() -> Plain:
    hb = Plain(SIZE)
    hb.update(range(0, SIZE, 7))
    hb.name = "n"  # type: ignore[attr-defined]
    return hb


def both() -> Both:
    hb = Both("n")
    hb.update([5, 7])
    hb.label, hb.more = ["x"], [1]
    hb.hide("h")
    return hb


OTHERS: list[Any] = [{5}, [5], range(5), array("Q", [5])]

RESULTS: list[Callable[[Any], Any]] = [
    *[lambda hb, op=op, other=other: op(hb, other) for op in MADE for other in OTHERS],
    *[lambda hb, op=op: op(hb, HBitmap(SIZE)) for op in MADE],
    lambda hb: {5} | hb,
    lambda hb: [5] & hb,
    lambda hb: {5} - hb,
    lambda hb: [5] ^ hb,
    lambda hb: hb.union(),
    lambda hb: hb.copy(),
    lambda hb: hb.drain(),
    lambda hb: hb.drain(0, 64),
    copy.copy,
    copy.deepcopy,
    lambda hb: pickle.loads(pickle.dumps(hb)),
]


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("make", [plain, both])
def test_results_have_the_class_of_the_left_operand(
    make: Callable[[], HBitmap], result: Callable[[Any], Any]
) -> None:
    hb = make()
    made = result(hb)
    assert type(made) is type(hb)
    made.add(0)
    assert made.size == SIZE


def test_a_bitmap_has_the_class_of_the_left_one() -> None:
    a, b = HBitmap(SIZE), plain()
    assert type(a | b) is type(a & b) is type(a - b) is type(a ^ b) is HBitmap
    assert type(b | a) is type(b & a) is type(b - a) is type(b ^ a) is Plain


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dense", [False, True])
def test_pickles_have_the_attributes(protocol: int, dense: bool) -> None:
    hb = both()
    if dense:
        hb.update(range(0, SIZE, 2))
    back = pickle.loads(pickle.dumps(hb, protocol))
    assert type(back) is Both
    assert back == hb
    assert (back.name, back.more, back.label, back.hidden()) == ("n", [1], ["x"], "h")


def test_copies_share_the_attributes_and_deep_ones_do_not() -> None:
    hb = both()
    hb.me = hb
    shallow, deep = copy.copy(hb), copy.deepcopy(hb)
    for made in (shallow, deep):
        assert made == hb
        assert (made.name, made.more, made.label, made.hidden()) == ("n", [1], ["x"], "h")
    assert shallow.label is hb.label
    assert shallow.me is hb
    assert deep.label is not hb.label
    assert deep.me is deep


def test_a_slot_that_is_empty_stays_so() -> None:
    hb = Slotted(SIZE)
    hb.label = 1
    for made in (copy.copy(hb), pickle.loads(pickle.dumps(hb))):
        assert made.label == 1
        with pytest.raises(AttributeError):
            made.hidden()


def test_a_subclass_may_say_itself_what_to_keep() -> None:
    hb = Own(SIZE)
    hb.add(5)
    for made in (copy.copy(hb), copy.deepcopy(hb), pickle.loads(pickle.dumps(hb))):
        assert made == hb
        assert made.state == "kept"


def test_results_have_no_attributes_as_those_of_sets_have_none() -> None:
    hb = both()
    for made in (hb | {1}, hb.copy(), hb.drain()):
        assert not vars(made)


def test_what_is_made_of_something_taken_is_no_such_thing() -> None:
    hb = plain()
    before = list(hb)
    with hb.taking() as taken:
        for made in (taken.copy(), taken | {1}, copy.deepcopy(taken), taken - {5}):
            assert type(made) is HBitmap
        back = pickle.loads(pickle.dumps(taken))
        assert type(back) is HBitmap
        assert list(back) == before
    assert list(hb) == before


@pytest.mark.skipif(sys.byteorder == "big", reason="the words are little-endian")
def test_pickles_of_before_can_be_read() -> None:
    """Which had no class in them."""
    for dense, data in ((True, b"\x20" + bytes(7)), (False, array("Q", [5, 1]).tobytes())):
        hb = _unpickle(60, 0, dense, data)
        assert type(hb) is HBitmap
        assert list(hb) == [5]
