# SPDX-License-Identifier: MIT
"""bitarray: as the package of that name, and what is different on purpose."""

from __future__ import annotations

import copy
import operator
import os
import pickle
import sys
import threading
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lines import at_every_line
from peers import package
from support import run_python

from pybitmap import HBitmap
from pybitmap.compat import bits
from pybitmap.compat.bits import bitarray, frozenbitarray

# Around a word, and around a piece of those that are read at a time.
flags = st.text("01", max_size=70) | st.builds(
    lambda ends, n: ends + n * "0" + ends, st.text("01", max_size=9), st.integers(4080, 4100)
)
endians = st.sampled_from(["big", "little"])
bounds = st.none() | st.integers(-80, 80)
places = st.builds(slice, bounds, bounds, st.none() | st.integers(-4, 4).filter(bool))


def both(content: Any, endian: str) -> tuple[Any, bitarray]:
    return package("bitarray").bitarray(content, endian), bitarray(content, endian)


def outcome(function: Any, *args: Any, **named: Any) -> Any:
    """What it gives, or the kind of error that who is used to bitarray would catch."""
    try:
        result = function(*args, **named)
    except (IndexError, TypeError, ValueError) as error:
        kinds = (IndexError, TypeError, ValueError)
        return next(kind for kind in kinds if isinstance(error, kind))
    return result.to01() if hasattr(result, "to01") else result


@given(flags, endians)
def test_flags_go_in_and_out_as_there(content: str, endian: str) -> None:
    theirs, ours = both(content, endian)
    assert (len(ours), ours.to01(3, "_")) == (len(theirs), theirs.to01(3, "_"))
    assert (ours.nbytes, ours.padbits) == (theirs.nbytes, theirs.padbits)
    assert ours.tobytes() == bytes(ours) == theirs.tobytes()
    assert ours.tolist() == list(ours) == theirs.tolist()
    assert repr(ours) == repr(theirs)
    filled = bitarray(endian=endian)
    filled.frombytes(theirs.tobytes())
    assert filled.to01()[: len(ours)] == ours.to01()
    assert (ours.any(), ours.all()) == (theirs.any(), theirs.all())


@given(flags, endians, places, st.integers(-80, 80), st.integers(0, 1), st.text("01", max_size=5))
def test_slices_and_counts_are_as_there(
    content: str, endian: str, where: slice, at: int, value: int, sub: str
) -> None:
    theirs, ours = both(content, endian)
    assert outcome(operator.getitem, ours, where) == outcome(operator.getitem, theirs, where)
    assert outcome(operator.getitem, ours, at) == outcome(operator.getitem, theirs, at)
    step = where.step or 1
    start, stop = where.start or 0, sys.maxsize if where.stop is None else where.stop
    assert ours.count(value, start, stop, step) == theirs.count(value, start, stop, step)
    subs: list[tuple[Any, Any]] = [(value, value), both(sub, endian)]
    for their_sub, our_sub in subs:
        assert ours.count(our_sub, start, stop) == theirs.count(their_sub, start, stop)
        assert (our_sub in ours) == (their_sub in theirs)
        for right in (False, True):
            asked = (start, stop, right)
            assert ours.find(our_sub, *asked) == theirs.find(their_sub, *asked)
            assert list(ours.search(our_sub, *asked)) == list(theirs.search(their_sub, *asked))
            assert outcome(ours.index, our_sub, *asked) == outcome(theirs.index, their_sub, *asked)


@pytest.mark.parametrize("sub", ["101", "0", "1"])
def test_what_lies_across_two_pieces_is_found(sub: str) -> None:
    flag = "1" if sub == "0" else "0"
    for place in range(4088, 4102):
        content = [flag] * 8192
        content[place : place + len(sub)] = sub
        a = bitarray("".join(content))
        for right in (False, True):
            assert a.find(bitarray(sub), right=right) == place
            assert list(a.search(bitarray(sub), right=right)) == [place]


@given(flags, endians, places, st.integers(-80, 80), st.integers(0, 1), st.data())
def test_changes_are_as_there(
    content: str, endian: str, where: slice, at: int, value: int, data: st.DataObject
) -> None:
    theirs, ours = both(content, endian)

    def same(name: str, their_args: list[Any], our_args: list[Any]) -> None:
        asked = outcome(getattr(ours, name), *our_args)
        assert asked == outcome(getattr(theirs, name), *their_args), name
        assert ours.to01() == theirs.to01(), name

    same("__setitem__", [where, value], [where, value])
    same("__setitem__", [at, 1 - value], [at, 1 - value])
    n = len(content[where])
    other = data.draw(st.text("01", min_size=n, max_size=n))
    their_other, our_other = both(other, endian)
    same("__setitem__", [where, their_other], [where, our_other])
    listed = data.draw(st.lists(st.integers(-80, 80), max_size=5))
    same("__setitem__", [listed, value], [listed, value])
    for each in (listed, tuple(listed), bytes(map(abs, listed)), array("b", listed), "0", 1.5):
        same("__getitem__", [each], [each])
    mask = data.draw(st.text("01", min_size=len(content), max_size=len(content)))
    their_mask, our_mask = both(mask, endian)
    same("__getitem__", [their_mask], [our_mask])
    same("invert", [at], [at])
    same("invert", [where], [where])
    same("invert", [], [])
    same("setall", [value], [value])


OPERATORS = [operator.and_, operator.or_, operator.xor, operator.add, operator.lt, operator.le]
OPERATORS += [operator.gt, operator.ge, operator.eq, operator.ne]
OPERATORS += [operator.iand, operator.ior, operator.ixor]
SHIFTS = [operator.lshift, operator.rshift, operator.ilshift, operator.irshift]
COUNTS = ["count_and", "count_or", "count_xor", "any_and", "subset"]


@given(flags, flags, endians, endians, st.data())
def test_operators_are_as_there(
    a: str, b: str, endian: str, endian_b: str, data: st.DataObject
) -> None:
    if data.draw(st.booleans()):
        b = b[: len(a)].ljust(len(a), "1")
    theirs, ours = both(a, endian)
    their_other, our_other = both(b, endian_b)
    util = package("bitarray.util")
    for name in COUNTS:
        for wrong in [("", our_other), (ours, 4)]:
            with pytest.raises(TypeError, match="bitarray expected"):
                getattr(bits, name)(*wrong)
        asked = outcome(getattr(bits, name), ours, our_other)
        assert asked == outcome(getattr(util, name), theirs, their_other), name
    for operation in OPERATORS:
        asked = outcome(operation, ours, our_other)
        assert asked == outcome(operation, theirs, their_other), operation
        assert ours.to01() == theirs.to01()
    assert outcome(operator.invert, ours) == outcome(operator.invert, theirs)
    n = data.draw(st.integers(-1, 80))
    for operation in SHIFTS:
        assert outcome(operation, ours, n) == outcome(operation, theirs, n), operation
        assert ours.to01() == theirs.to01()
    assert outcome(operator.mul, ours, 2) == outcome(operator.mul, theirs, 2)


@given(flags, endians, st.integers(0, 80), st.integers(-300, 300), st.booleans())
def test_functions_are_as_there(
    content: str, endian: str, n: int, number: int, signed: bool
) -> None:
    theirs, ours = both(content, endian)
    util = package("bitarray.util")
    for name in ("parity", "ba2hex", "ba2int"):
        assert outcome(getattr(bits, name), ours) == outcome(getattr(util, name), theirs), name
    assert outcome(bits.count_n, ours, n) == outcome(util.count_n, theirs, n)
    assert outcome(bits.count_n, ours, n, 0) == outcome(util.count_n, theirs, n, 0)
    assert list(bits.intervals(ours)) == list(util.intervals(theirs))
    for length in (9, 10):
        try:
            expected = util.int2ba(number, length, endian, signed)
        except OverflowError:
            with pytest.raises(OverflowError):
                bits.int2ba(number, length, endian, signed)
        else:
            made = bits.int2ba(number, length, endian, signed)
            assert made.to01() == expected.to01()
            assert bits.ba2int(made, signed) == number
    whole = bitarray(content[: len(content) // 4 * 4], endian)
    assert bits.hex2ba(bits.ba2hex(whole), endian) == whole
    for name in ("zeros", "ones"):
        asked = outcome(getattr(bits, name), n, endian)
        assert asked == outcome(getattr(util, name), n, endian)


@pytest.mark.parametrize("wrong", [[0, 2], "012", -1])
def test_wrong_flags_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"bit|flags|expected"):
        bitarray(wrong)


@pytest.mark.parametrize("name", bits._ABSENT)
def test_what_would_change_its_size_is_not_there_and_says_why(name: str) -> None:
    a = bitarray("01")
    assert not hasattr(a, name)
    with pytest.raises(AttributeError, match="fixed size"):
        getattr(a, name)


def test_it_does_not_grow() -> None:
    a = bitarray("01")
    growths: list[tuple[str, list[Any]]] = [
        ("extend", ["1"]),
        ("frombytes", [b"\x01"]),
        ("__iadd__", [[1]]),
        ("__imul__", [2]),
        ("__setitem__", [slice(0, 1), bitarray("111")]),
    ]
    for name, arguments in growths:
        with pytest.raises(ValueError, match=r"size|grow|must be"):
            getattr(a, name)(*arguments)
        assert a.to01() == "01"


def test_an_empty_one_takes_the_size_of_what_it_is_given() -> None:
    a = bitarray()
    hb = a.hbitmap
    a.extend([])
    a.extend([0, 1])
    assert (a.to01(), a.hbitmap is hb, hb.size) == ("01", True, 2)


def test_a_place_that_is_named_twice_has_the_last_flag() -> None:
    a = bitarray(3)
    a[[1, 1, 0]] = bitarray("101")
    assert a.to01() == "100"
    a[bitarray("110")] = bitarray("01")
    assert a.to01() == "010"


def test_it_lies_over_a_bitmap_of_ours() -> None:
    hb = HBitmap(100)
    a = bitarray.of(hb, "little")
    a[3:5] = 1
    hb.set(99)
    assert (a.count(), a.tobytes()[0], a[-1]) == (3, 0b11000, 1)
    assert list(hb.drain()) == [3, 4, 99]
    assert not a.any()
    with pytest.raises(ValueError, match="granularity 1"):
        bitarray.of(HBitmap(8, 1))


def test_frozen_ones_cannot_be_changed_and_have_a_hash() -> None:
    frozen = frozenbitarray([0, 1, 1])
    changes: list[tuple[str, list[Any]]] = [
        ("__setitem__", [0, 1]),
        *((f"__i{operation}__", [frozen]) for operation in ("and", "or", "xor", "add", "lshift")),
        ("setall", [1]),
        ("invert", []),
        ("extend", ["1"]),
        ("frombytes", [b"1"]),
    ]
    for name, arguments in changes:
        with pytest.raises(TypeError, match="frozen"):
            getattr(frozen, name)(*arguments)
    assert frozen == bitarray("011")
    assert hash(frozen) == hash(frozenbitarray("011", "little"))
    assert type(~frozen) is type(frozen[1:]) is frozenbitarray
    with pytest.raises(TypeError, match="unhashable"):
        hash(bitarray())


class Named(bitarray):
    """A subclass with attributes."""

    name = ""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_have_all_of_it(protocol: int) -> None:
    a = Named("0110", "little")
    a.name = "daily"
    for again in (pickle.loads(pickle.dumps(a, protocol)), copy.copy(a), copy.deepcopy(a)):
        assert (type(again), again, again.endian, again.name) == (Named, a, "little", "daily")
        again[0] = 1
        assert not a[0]


# ---- visitors -------------------------------------------------------------------------------


def test_each_flag_that_a_thread_sets_is_drained_once() -> None:
    a = bitarray(4 * 3000)
    go_on = threading.Event()

    def write(first: int) -> None:
        for place in range(first, len(a), 4):
            a[place] = 1

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    drained: list[int] = []
    while any(thread.is_alive() for thread in threads):
        drained += a.hbitmap.drain()
        go_on.wait(0.001)
    drained += a.hbitmap.drain()
    assert sorted(drained) == list(range(len(a)))


def test_what_is_assigned_takes_no_mark_from_beside_it() -> None:
    a = bitarray(20000)
    done = threading.Event()

    def write() -> None:
        for place in range(0, 10000):
            a[place] = 1
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    pattern = bitarray("10" * 5000)
    while not done.is_set():
        a[10000:] = pattern
        a[10000::3] = 0
        a.invert(slice(10000, None))
    thread.join()
    assert a[:10000].all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_the_child_of_a_fork_has_a_copy() -> None:
    code = """
import os
from pybitmap.compat import bitarray
a = bitarray("010")
pid = os.fork()
if not pid:
    a.setall(1)
    os._exit(a.to01() != "111")
print(os.waitpid(pid, 0)[1], a.to01())
"""
    assert run_python(code).strip() == "0 010"


def test_an_assignment_that_is_interrupted_takes_no_flag_that_is_to_stay() -> None:
    a = bitarray(70)

    def attempt() -> None:
        a.setall(0)
        a[1:70:2] = 1
        a[1:69] = bitarray("10" * 34)

    for where in at_every_line(attempt, within="compat"):
        assert a.to01() in (70 * "0", 35 * "01"), where


def test_a_search_goes_on_while_flags_are_cleared() -> None:
    """As a handler, or a callback, on the same thread would."""
    a = bitarray("1" * 20)
    found = []
    for place in a.search(1):
        found.append(place)
        a[place : place + 2] = 0
    assert found == list(range(0, 20, 2))
