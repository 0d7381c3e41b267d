# SPDX-License-Identifier: MIT
"""HBitmap as a set: the abstract base class, membership, operators, comparisons."""

from __future__ import annotations

import collections.abc
import operator
from decimal import Decimal
from fractions import Fraction
from typing import Any, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model import Model, assert_same

from pybitmap import BitmapError, HBitmap, MismatchError, RangeError

pytestmark = pytest.mark.core

SIZE = 300

NO_ELEMENTS: list[Any] = [
    *[-1, SIZE, SIZE + 1, 2**63, 2**64, 2**64 + 5, -(2**64)],
    *[5.0, 0.5, "5", b"5", None, Decimal(5), Fraction(5), 5j, (5,), [5], {5}, {}, object()],
]
NO_ELEMENT_IDS = [repr(element)[:12] for element in NO_ELEMENTS]

sets = st.sets(st.integers(0, SIZE - 1))


def bitmap(elements: Any = (), granularity: int = 0, size: int = SIZE) -> HBitmap:
    hb = HBitmap(size, granularity)
    for element in elements:
        hb.add(element)
    return hb


# ---- the protocol ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base", ["MutableSet", "Set", "Collection", "Sized", "Iterable", "Container"]
)
def test_a_bitmap_is_a_mutable_set(base: str) -> None:
    assert isinstance(HBitmap(1), getattr(collections.abc, base))
    assert issubclass(HBitmap, getattr(collections.abc, base))


@pytest.mark.parametrize("name", [name for name in dir(set) if not name.startswith("_")])
def test_every_named_method_of_set_is_there(name: str) -> None:
    assert callable(getattr(HBitmap, name))


@pytest.mark.parametrize("name", [name for name in dir(set) if name.startswith("__")])
def test_every_operator_of_set_is_there(name: str) -> None:
    assert hasattr(HBitmap, name)


MIXINS = {**vars(collections.abc.Set), **vars(collections.abc.MutableSet)}


@pytest.mark.parametrize("name", [name for name in MIXINS if name in dir(set)])
def test_no_mixin_of_the_base_class_is_taken(name: str) -> None:
    """They go through `_from_iterable`, which knows no size and no granularity."""
    ours = [base for base in HBitmap.__mro__ if base.__module__.startswith("pybitmap.")]
    assert any(name in vars(base) for base in ours)


def test_a_bitmap_has_no_hash() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(HBitmap(1))


# ---- membership -----------------------------------------------------------------------------


@pytest.mark.parametrize("element", NO_ELEMENTS, ids=NO_ELEMENT_IDS)
def test_what_is_no_item_is_not_in_a_full_bitmap(element: Any) -> None:
    hb = bitmap(range(SIZE))
    assert element not in hb


@pytest.mark.parametrize("element", NO_ELEMENTS, ids=NO_ELEMENT_IDS)
def test_discard_of_what_is_no_item_does_nothing(element: Any) -> None:
    hb = bitmap(range(SIZE))
    hb.discard(element)
    assert len(hb) == SIZE


@pytest.mark.parametrize("element", NO_ELEMENTS, ids=NO_ELEMENT_IDS)
def test_remove_of_what_is_no_item_is_a_key_error(element: Any) -> None:
    hb = bitmap(range(SIZE))
    with pytest.raises(KeyError) as caught:
        hb.remove(element)
    assert caught.value.args == (element,)
    assert len(hb) == SIZE


@pytest.mark.parametrize("element", NO_ELEMENTS, ids=NO_ELEMENT_IDS)
def test_add_of_what_is_no_item_is_an_error(element: Any) -> None:
    hb = bitmap([3])
    with pytest.raises(RangeError if isinstance(element, int) else TypeError):
        hb.add(element)
    assert list(hb) == [3]


def test_items_of_a_dirty_group_are_in_the_bitmap() -> None:
    hb = bitmap([20], granularity=3)
    assert [item for item in range(SIZE) if item in hb] == list(range(16, 24))
    assert set(hb) == {16}


def test_items_beyond_the_size_are_in_no_group() -> None:
    hb = bitmap([9], granularity=3, size=10)
    assert 9 in hb
    assert 10 not in hb


def test_remove_cleans_the_group_of_any_item_in_it() -> None:
    hb = bitmap([16, 24], granularity=3)
    hb.remove(19)
    assert list(hb) == [24]
    with pytest.raises(KeyError):
        hb.remove(16)


def test_discard_cleans_the_group_of_any_item_in_it() -> None:
    hb = bitmap([16, 24], granularity=3)
    hb.discard(23)
    hb.discard(23)
    assert list(hb) == [24]


def test_pop_gives_every_group_once() -> None:
    hb = bitmap([5, 70, 299], granularity=1)
    assert sorted(hb.pop() for _ in range(3)) == [4, 70, 298]
    with pytest.raises(KeyError):
        hb.pop()


def test_clear_cleans_all() -> None:
    hb = bitmap([5, 70, 299])
    hb.clear()
    assert hb.empty()


# ---- algebra --------------------------------------------------------------------------------

OPERATORS: list[Callable[[Any, Any], Any]] = [
    operator.or_,
    operator.and_,
    operator.sub,
    operator.xor,
]
IN_PLACE: list[Callable[[Any, Any], Any]] = [
    operator.ior,
    operator.iand,
    operator.isub,
    operator.ixor,
]
NAMED = ["union", "intersection", "difference", "symmetric_difference"]
UPDATES = [
    "update",
    "intersection_update",
    "difference_update",
    "symmetric_difference_update",
]


@pytest.mark.parametrize("op", OPERATORS)
@given(a=sets, b=sets)
def test_operators_are_those_of_set(op: Callable[[Any, Any], Any], a: Any, b: Any) -> None:
    x, y = bitmap(a), bitmap(b)
    for result in (op(x, y), op(x, b), op(x, frozenset(b)), op(a, y), op(x, list(b))):
        assert type(result) is HBitmap
        assert set(result) == op(a, b)
        assert result.size == SIZE
    assert (set(x), set(y)) == (a, b)


@pytest.mark.parametrize("op", IN_PLACE)
@given(a=sets, b=sets)
def test_operators_in_place_are_those_of_set(
    op: Callable[[Any, Any], Any], a: set[int], b: set[int]
) -> None:
    expected = op(set(a), b)
    for other in (bitmap(b), b, frozenset(b), tuple(b)):
        x = bitmap(a)
        assert op(x, other) is x
        assert set(x) == expected


@pytest.mark.parametrize("name", NAMED)
@given(a=sets, b=sets)
def test_named_methods_are_those_of_set(name: str, a: set[int], b: set[int]) -> None:
    x = bitmap(a)
    expected = getattr(a, name)(b)
    for other in (bitmap(b), b, iter(b), dict.fromkeys(b)):
        assert set(getattr(x, name)(other)) == expected
    assert set(x) == a


@pytest.mark.parametrize("name", UPDATES)
@given(a=sets, b=sets)
def test_named_updates_are_those_of_set(name: str, a: set[int], b: set[int]) -> None:
    expected = set(a)
    getattr(expected, name)(b)
    for other in (bitmap(b), b, iter(b), list(b) * 2):
        x = bitmap(a)
        assert getattr(x, name)(other) is None
        assert set(x) == expected


@pytest.mark.parametrize("name", [*NAMED[:3], *UPDATES[:3]])
@given(a=sets, b=sets, c=sets)
def test_named_methods_take_several_others(
    name: str, a: set[int], b: set[int], c: set[int]
) -> None:
    x, plain = bitmap(a), set(a)
    result, expected = getattr(x, name)(bitmap(b), c), getattr(plain, name)(b, c)
    assert (result if result is None else set(result)) == expected
    assert set(x) == plain


@pytest.mark.parametrize("name", [*NAMED[:3], *UPDATES[:3]])
def test_named_methods_take_no_others(name: str) -> None:
    x = bitmap([1, 2])
    result = getattr(x, name)()
    assert result is None or (result == x and result is not x)
    assert set(x) == {1, 2}


@pytest.mark.parametrize("op", OPERATORS)
def test_operations_with_itself(op: Callable[[Any, Any], Any]) -> None:
    x = bitmap([1, 200])
    assert set(op(x, x)) == op({1, 200}, {1, 200})


@pytest.mark.parametrize("op", IN_PLACE)
def test_operations_in_place_with_itself(op: Callable[[Any, Any], Any]) -> None:
    x = bitmap([1, 200])
    expected = op({1, 200}, {1, 200})
    assert set(op(x, x)) == expected


def test_elements_are_mapped_to_their_groups_first() -> None:
    hb = bitmap([16], granularity=3)
    assert set(hb | [25]) == {16, 24}
    assert set(hb & [19]) == {16}
    assert set(hb - [23]) == set()
    assert set(hb ^ [17, 18]) == set()
    assert set([17, 25] - hb) == {24}
    assert set({17, 25} - hb) == {24}


@pytest.mark.parametrize("op", [operator.and_, operator.sub])
def test_what_cannot_be_in_the_bitmap_is_ignored_by_and_and_minus(
    op: Callable[[Any, Any], Any],
) -> None:
    hb = bitmap([1, 2])
    assert set(op(hb, [2, *NO_ELEMENTS])) == op({1, 2}, {2})


@pytest.mark.parametrize("op", [operator.or_, operator.xor, operator.ior, operator.ixor])
@pytest.mark.parametrize("element", NO_ELEMENTS, ids=NO_ELEMENT_IDS)
def test_what_cannot_be_marked_is_refused_by_or_and_xor(
    op: Callable[[Any, Any], Any], element: Any
) -> None:
    hb = bitmap([1, 2])
    with pytest.raises(RangeError if isinstance(element, int) else TypeError):
        op(hb, [5, element])
    assert set(hb) == {1, 2}


def test_an_update_that_is_refused_changes_nothing() -> None:
    hb = bitmap([1, 2])
    with pytest.raises(RangeError):
        hb.update([5], [SIZE])
    assert set(hb) == {1, 2}


@pytest.mark.parametrize("name", UPDATES[:3])
def test_an_update_whose_second_bitmap_does_not_fit_changes_nothing(name: str) -> None:
    hb = bitmap([1, 2])
    with pytest.raises(MismatchError):
        getattr(hb, name)(bitmap([1]), bitmap(size=SIZE + 1))
    assert set(hb) == {1, 2}


def test_an_iterable_that_fails_changes_nothing() -> None:
    def failing() -> Any:
        yield 5
        raise RuntimeError("no more")

    hb = bitmap([1, 2])
    for name in UPDATES:
        with pytest.raises(RuntimeError, match="no more"):
            getattr(hb, name)(failing())
    assert set(hb) == {1, 2}


@pytest.mark.parametrize("op", [*OPERATORS, *IN_PLACE])
@pytest.mark.parametrize("other", [5, None, 1.5])
def test_operators_take_iterables_only(op: Callable[[Any, Any], Any], other: Any) -> None:
    hb = bitmap([1, 2])
    with pytest.raises(TypeError):
        op(hb, other)
    if op in OPERATORS:
        with pytest.raises(TypeError):
            op(other, hb)
    assert set(hb) == {1, 2}


@pytest.mark.parametrize("name", [*NAMED, *UPDATES, "isdisjoint", "issubset", "issuperset"])
def test_named_methods_take_iterables_only(name: str) -> None:
    hb = bitmap([1, 2])
    with pytest.raises(TypeError):
        getattr(hb, name)(5)
    assert set(hb) == {1, 2}


def test_an_in_place_result_of_a_plain_set_is_a_bitmap() -> None:
    plain: Any = {1, 2}
    plain |= bitmap([3])
    assert set(plain) == {1, 2, 3}


# ---- shapes that differ ---------------------------------------------------------------------


@pytest.mark.parametrize("op", [operator.or_, operator.ior])
def test_or_of_unequal_granularities_has_the_left_one_s(op: Callable[[Any, Any], Any]) -> None:
    fine, coarse = bitmap([7]), bitmap([17], granularity=3)
    result = op(fine.copy(), coarse)
    assert result.granularity == 0
    assert list(result.areas()) == [(7, 1), (16, 8)]
    result = op(coarse.copy(), fine)
    assert result.granularity == 3
    assert list(result) == [0, 16]


@pytest.mark.parametrize("name", ["union", "update"])
def test_union_takes_unequal_granularities(name: str) -> None:
    hb = bitmap([7], granularity=3)
    result = getattr(hb, name)(bitmap([17], granularity=1), [100])
    assert list(hb if result is None else result) == [0, 16, 96]


OTHERS: list[Callable[[Any, Any], Any]] = [
    *OPERATORS[1:],
    *IN_PLACE[1:],
    operator.le,
    operator.lt,
    operator.ge,
    operator.gt,
]


@pytest.mark.parametrize("op", OTHERS)
def test_all_else_refuses_unequal_granularities(op: Callable[[Any, Any], Any]) -> None:
    a, b = bitmap([7], granularity=2), bitmap([17], granularity=3)
    with pytest.raises(MismatchError, match=r"2 and 3|3 and 2"):
        op(a, b)
    assert (list(a), list(b)) == ([4], [16])


@pytest.mark.parametrize("op", [*OPERATORS, *IN_PLACE, *OTHERS])
def test_unequal_sizes_are_refused(op: Callable[[Any, Any], Any]) -> None:
    a, b = bitmap([7]), bitmap([17], size=SIZE + 1)
    with pytest.raises(MismatchError, match=r"300.*301|301.*300") as caught:
        op(a, b)
    assert isinstance(caught.value, (BitmapError, ValueError))
    assert (list(a), list(b)) == ([7], [17])


@pytest.mark.parametrize(
    "name",
    [*NAMED[1:], *UPDATES[1:], "isdisjoint", "issubset", "issuperset"],
)
def test_named_methods_refuse_other_shapes(name: str) -> None:
    hb = bitmap([7])
    for other in (bitmap([7], granularity=1), bitmap([7], size=SIZE - 1)):
        with pytest.raises(MismatchError):
            getattr(hb, name)(other)
    assert list(hb) == [7]


# ---- comparisons ----------------------------------------------------------------------------

COMPARISONS: list[Callable[[Any, Any], bool]] = [
    operator.eq,
    operator.ne,
    operator.le,
    operator.lt,
    operator.ge,
    operator.gt,
]


@pytest.mark.parametrize("op", COMPARISONS)
@given(a=sets, b=sets, nested=st.booleans())
def test_comparisons_are_those_of_set(
    op: Callable[[Any, Any], bool], a: set[int], b: set[int], nested: bool
) -> None:
    if nested:
        b |= a
    x, y = bitmap(a), bitmap(b)
    expected = op(a, b)
    assert op(x, y) is expected
    assert op(x, b) is expected
    assert op(a, y) is expected
    assert op(x, frozenset(b)) is expected
    assert op(x, dict.fromkeys(b).keys()) is expected
    assert op(y, x) is op(b, a)


@given(a=sets, b=sets)
def test_named_comparisons_are_those_of_set(a: set[int], b: set[int]) -> None:
    x = bitmap(a)
    for other in (b, list(b), bitmap(b), iter(b)):
        assert x.isdisjoint(other) is a.isdisjoint(b)
    for other in (b, list(b), bitmap(b), iter(b)):
        assert x.issubset(other) is a.issubset(b)
    for other in (b, list(b), bitmap(b), iter(b)):
        assert x.issuperset(other) is a.issuperset(b)


def test_comparison_with_a_plain_set_is_literal() -> None:
    hb = bitmap([16], granularity=3)
    assert hb == {16}
    assert hb != {17}
    assert hb != {16, 17}
    assert not hb <= {17}
    assert not hb >= {17}
    assert hb.isdisjoint({17})
    assert not hb.isdisjoint({16})
    assert not hb.issuperset([17])


def test_comparison_with_a_plain_set_takes_any_elements() -> None:
    hb = bitmap([1])
    strange = {1, "a", None, -1, 2**70}
    assert hb < strange
    assert hb != strange
    assert not hb >= strange
    assert hb.isdisjoint(strange - {1})


def test_equal_bitmaps_have_equal_size_granularity_and_bits() -> None:
    assert bitmap([5]) == bitmap([5])
    assert bitmap([5]) != bitmap([6])
    assert bitmap([4], granularity=1) != bitmap([4])
    assert bitmap([5]) != bitmap([5], size=SIZE + 1)
    assert bitmap() != bitmap(size=SIZE + 1)
    assert HBitmap(0) == HBitmap(0)
    assert HBitmap(0) != HBitmap(0, 1)


@pytest.mark.parametrize("other", [None, 5, "5", [5], (5,), object()])
def test_a_bitmap_differs_from_what_is_no_set(other: Any) -> None:
    assert bitmap([5]) != other
    assert other != bitmap([5])


@pytest.mark.parametrize("other", [None, 5, [5], (5,)])
def test_order_is_defined_between_sets_only(other: Any) -> None:
    for op in COMPARISONS[2:]:
        with pytest.raises(TypeError):
            op(bitmap([5]), other)


@given(sets, st.integers(0, 6))
def test_a_bitmap_is_the_set_of_its_group_starts(elements: set[int], granularity: int) -> None:
    hb, model = bitmap(elements, granularity), Model(SIZE, granularity)
    for element in elements:
        model.add(element)
    assert_same(hb, model)
    assert hb == {element >> granularity << granularity for element in elements}
