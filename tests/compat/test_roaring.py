# SPDX-License-Identifier: MIT
"""BitMap, BitMap64 and their frozen ones: as pyroaring's, and what is different on purpose."""

from __future__ import annotations

import copy
import operator
import os
import pickle
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lines import at_every_line
from peers import package
from support import run_python

from pybitmap import BitmapError, HBitmap
from pybitmap.compat.roaring import BitMap, BitMap64, FrozenBitMap, FrozenBitMap64

TOP = {BitMap: 1 << 32, FrozenBitMap: 1 << 32, BitMap64: 1 << 41, FrozenBitMap64: 1 << 41}
EDGES = [0, 63, 64, 4095, 4096, 65535, 65536, 1 << 31, (1 << 32) - 1]

numbers = st.sampled_from(EDGES) | st.integers(0, 300) | st.integers(0, (1 << 32) - 1)
few = st.lists(numbers, max_size=12)
# A run and a comb make every kind of container.
many = st.builds(
    lambda some, start, count, step: [*some, *range(start, start + count * step, step)],
    few,
    st.integers(0, 1 << 17),
    st.integers(0, 6000),
    st.integers(1, 3),
)
widths = st.sampled_from(["BitMap", "BitMap64"])


def pairs(width: str, *contents: list[int], frozen: bool = False) -> list[Any]:
    """Theirs and ours of each."""
    name = f"Frozen{width}" if frozen else width
    theirs = getattr(package("pyroaring"), name)
    ours: Any = {each.__name__: each for each in TOP}[name]
    return [each for content in contents for each in (theirs(content), ours(content))]


def outcome(function: Any, *args: Any) -> Any:
    """What it gives, or the kind of error that who is used to pyroaring would catch."""
    try:
        result = function(*args)
    except (OverflowError, TypeError, IndexError, KeyError, ValueError) as error:
        kinds = (OverflowError, TypeError, IndexError, KeyError, ValueError)
        return next(kind for kind in kinds if isinstance(error, kind))
    return result if isinstance(result, (int, float, type(None))) else list(result)


BINARY = [operator.or_, operator.and_, operator.sub, operator.xor, operator.le, operator.lt]
BINARY += [operator.ge, operator.gt, operator.eq, operator.ne]
NAMED = ["union", "intersection", "difference", "symmetric_difference", "isdisjoint", "issubset"]
NAMED += ["issuperset", "intersect", "union_cardinality", "intersection_cardinality"]
NAMED += ["difference_cardinality", "symmetric_difference_cardinality"]
QUESTIONS = ["rank", "next_set_bit", "iter_equal_or_larger", "__contains__", "__getitem__", "shift"]
RANGES = ["range_cardinality", "flip"]
CHANGES = ["add", "add_checked", "discard", "remove"]
RANGE_CHANGES = ["add_range", "remove_range", "flip_inplace"]
SET_CHANGES = ["update", "intersection_update"]
BITMAP_CHANGES = ["difference_update", "symmetric_difference_update", "overwrite"]


@given(widths, many, many)
def test_operators_are_those_of_pyroaring(width: str, a: list[int], b: list[int]) -> None:
    theirs, ours, their_other, our_other = pairs(width, a, b)
    for operation in BINARY:
        assert outcome(operation, ours, our_other) == outcome(operation, theirs, their_other)
    for name in NAMED:
        assert outcome(getattr(ours, name), our_other) == outcome(
            getattr(theirs, name), their_other
        ), name


@given(widths, many, numbers, st.integers(0, 9) | st.integers(0, 1 << 20), st.integers(-20, 20))
@example("BitMap64", [65535, 1 << 31], 65535, 2, 0)
def test_questions_are_those_of_pyroaring(
    width: str, content: list[int], at: int, count: int, index: int
) -> None:
    theirs, ours = pairs(width, content)
    assert repr(ours)[:8] == repr(theirs)[:8]
    assert (len(ours), bool(ours), list(ours)) == (len(theirs), bool(theirs), list(theirs))
    assert ours.to_array() == theirs.to_array()
    for name in ("min", "max"):
        assert outcome(getattr(ours, name)) == outcome(getattr(theirs, name))
    for name in QUESTIONS:
        value = index if name in ("__getitem__", "shift") else at
        assert outcome(getattr(ours, name), value) == outcome(getattr(theirs, name), value), name
    for name in RANGES:
        # Of a range that ends before it begins theirs asserts that nobody counts it; ours is empty.
        for end in (at + count, at, at if name == "range_cardinality" else max(0, at - 1)):
            asked = outcome(getattr(ours, name), at, within(width, end))
            assert asked == outcome(getattr(theirs, name), at, within(width, end)), name
    # Theirs of 64 bits says of {65535, 2**31} that it contains [65535, 65537).
    for end in (at + count, at + 1, at, max(0, at - 1)):
        there = sum(at <= item < end for item in set(content))
        assert ours.contains_range(at, end) == (there == max(0, within(width, end) - at))


def within(width: str, end: int) -> int:
    """Of ranges beyond all numbers theirs flips and counts nothing, ours the part that is not."""
    return min(end, 1 << 32) if width == "BitMap" else end


slices = st.builds(
    slice,
    *[st.none() | st.integers(-9000, 9000)] * 2,
    st.none() | st.integers(-5, 5).filter(bool),
)


@given(widths, many, slices)
def test_slices_are_those_of_pyroaring(width: str, content: list[int], places: slice) -> None:
    theirs, ours = pairs(width, content)
    assert list(ours[places]) == list(theirs[places])


changes = st.lists(
    st.tuples(st.sampled_from(CHANGES), numbers)
    | st.tuples(st.sampled_from(RANGE_CHANGES), st.tuples(numbers, st.integers(-2, 9999)))
    | st.tuples(st.sampled_from(SET_CHANGES + BITMAP_CHANGES), few),
    max_size=10,
)


@given(widths, few, changes)
def test_changes_are_those_of_pyroaring(width: str, content: list[int], those: Any) -> None:
    theirs, ours = pairs(width, content)
    for name, argument in those:
        if name in RANGE_CHANGES:
            start, count = argument
            end = max(0, start + count)
            arguments = [[start, within(width, end) if name == "flip_inplace" else end]] * 2
        elif name in BITMAP_CHANGES:
            arguments = [[each] for each in pairs(width, argument)]
        else:
            arguments = [[argument]] * 2
        assert outcome(getattr(ours, name), *arguments[1]) == outcome(
            getattr(theirs, name), *arguments[0]
        ), name
        assert list(ours) == list(theirs), name
    assert outcome(ours.pop) == outcome(theirs.pop)
    ours.clear()
    assert not ours


@given(widths, many)
@example("BitMap", list(range(0, 8192, 2)))  # the largest array
@example("BitMap64", list(range(0, 8194, 2)))  # the smallest bitset
@example("BitMap", [65536 * key + item for key in range(4) for item in range(9)])  # offsets
def test_each_reads_what_the_other_has_serialised(width: str, content: list[int]) -> None:
    theirs, ours = pairs(width, content, frozen=True)
    assert list(type(ours).deserialize(theirs.serialize())) == list(theirs)
    assert list(type(theirs).deserialize(ours.serialize())) == list(ours)
    stats, their_stats = ours.get_statistics(), theirs.get_statistics()
    assert stats == {name: their_stats[name] for name in stats}


@given(widths, few, st.data())
def test_damaged_data_are_refused_or_are_a_bitmap(
    width: str, content: list[int], data: st.DataObject
) -> None:
    cls = BitMap if width == "BitMap" else BitMap64
    whole = bytearray(cls(content).serialize())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    damaged = bytes(whole[: data.draw(st.sampled_from([at + 1, len(whole)]))])
    try:
        loaded = cls.deserialize(damaged)
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
        assert cls.deserialize(loaded.serialize()) == loaded
    assert refused.startswith("Could not deserialize bitmap") or not refused


def arrays(*containers: tuple[int, list[int]], cookie: int = 12346) -> bytes:
    """A serialisation by hand: the key of each, and the numbers of its array."""
    heads = [number for key, items in containers for number in (key, len(items) - 1)]
    numbers = [item for _, items in containers for item in items]
    return struct.pack(
        f"<II{len(heads)}H{len(containers)}I{len(numbers)}H",
        *(cookie, len(containers), *heads),
        *(0 for _ in containers),
        *numbers,
    )


def runs(*pairs: tuple[int, int], cardinality: int) -> bytes:
    """One container of runs."""
    flat = [number for pair in pairs for number in pair]
    return struct.pack(f"<IB3H{len(flat)}H", 12347, 1, 0, cardinality - 1, len(pairs), *flat)


def test_what_is_made_by_hand_is_read() -> None:
    assert list(BitMap.deserialize(arrays((0, [1, 5]), (2, [3])))) == [1, 5, 131075]
    assert list(BitMap.deserialize(runs((3, 1), (9, 0), cardinality=3))) == [3, 4, 9]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "ends after 0 bytes"),
        (arrays((0, [1]), cookie=12345), "no cookie"),
        (arrays((0, [1, 1])), "not the 2 items"),
        (arrays((1, [1]), (1, [2])), "not in order"),
        (arrays((0, [1])) + b"?", "1 bytes stand behind"),
        (arrays((0, [1, 2]))[:-1], "it ends after"),
        (struct.pack("<II", 12346, 65537), "more than there can be"),
        (runs((65535, 1), cardinality=2), "beyond its container"),
        (runs((5, 3), (6, 0), cardinality=5), "not the 5 items"),
    ],
)
def test_what_is_no_bitmap_is_refused_with_the_reason(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=f"^Could not deserialize bitmap: .*{why}"):
        BitMap.deserialize(data)


@pytest.mark.parametrize(
    ("uppers", "why"), [([3, 3], "not in order"), ([1 << 9], "beyond what a bitmap of"), ([5], "")]
)
def test_upper_halves_are_in_order_and_within_the_limit(uppers: list[int], why: str) -> None:
    parts = [struct.pack("<I", upper) + arrays((0, [7])) for upper in uppers]
    data = struct.pack("<Q", len(uppers)) + b"".join(parts)
    if why:
        with pytest.raises(ValueError, match=why):
            BitMap64.deserialize(data)
    else:
        assert list(BitMap64.deserialize(data)) == [(5 << 32) + 7]


@pytest.mark.parametrize("value", [-1, 1 << 64])
@pytest.mark.parametrize("cls", [BitMap, BitMap64])
@pytest.mark.parametrize("name", [*CHANGES, *QUESTIONS[:4]])
def test_what_is_no_number_of_theirs_overflows(name: str, cls: Any, value: int) -> None:
    bm = cls([3])
    with pytest.raises(OverflowError):
        getattr(bm, name)(value)
    with pytest.raises(OverflowError):
        bm.update([1, value])
    with pytest.raises(OverflowError):
        cls([1, value])
    assert list(bm) == [3]


def test_marks_beyond_the_limit_are_refused_and_change_nothing() -> None:
    bm = BitMap64([3])
    top = TOP[BitMap64]
    marks: list[tuple[str, list[Any]]] = [
        ("add", [top]),
        ("update", [[5, top]]),
        ("update", [range(top - 1, top + 1)]),
        ("add_range", [top - 1, top + 1]),
        ("flip_inplace", [5, top + 1]),
        ("shift", [top - 3]),
    ]
    for name, arguments in marks:
        with pytest.raises(OverflowError) as caught:
            getattr(bm, name)(*arguments)
        assert isinstance(caught.value, BitmapError)
        assert list(bm) == [3]


def test_questions_beyond_the_limit_know_that_nothing_is_there() -> None:
    bm = BitMap64([3])
    far = 1 << 63
    assert far not in bm
    assert bm.rank(far) == 1
    assert list(bm.iter_equal_or_larger(far)) == []
    assert not bm.contains_range(3, far)
    assert bm.contains_range(far, far)
    assert bm.range_cardinality(0, far) == 1
    bm.discard(far)
    bm.remove_range(4, far)
    with pytest.raises(KeyError):
        bm.remove(far)
    assert list(bm) == [3]


@pytest.mark.parametrize("cls", list(TOP))
def test_the_last_number_can_be_had(cls: Any) -> None:
    bm = cls([TOP[cls] - 1])
    assert (bm.max(), len(bm), list(bm)) == (TOP[cls] - 1, 1, [TOP[cls] - 1])


def test_it_lies_over_a_bitmap_of_ours() -> None:
    hb = HBitmap(1000)
    bm = BitMap.of(hb)
    bm.add_range(5, 8)
    hb.set(20)
    assert list(bm) == [5, 6, 7, 20]
    assert bm.hbitmap is hb
    assert list(hb.drain()) == [5, 6, 7, 20]
    assert not bm
    with pytest.raises(OverflowError, match="1000"):
        bm.add(1000)
    assert 1000 not in bm


@pytest.mark.parametrize(
    ("hb", "why"), [(HBitmap(8, 1), "granularity 1"), (HBitmap(1 << 33), "at")]
)
def test_a_bitmap_that_does_not_fit_is_refused(hb: HBitmap, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        BitMap.of(hb)


def test_one_is_made_of_a_bitmap_of_another_size() -> None:
    assert list(BitMap(HBitmap.from_bytes(b"\x05" + bytes(7), 64))) == [0, 2]


SMALL, WHOLE = ([3, 7], [3, 7]), ([3, 7, 999], [3, 8, 5000])
ASKED = (
    *("__eq__", "__ne__", "__le__", "__lt__", "__ge__", "__gt__", "__or__", "__and__", "__sub__"),
    *("__xor__", "union", "intersection", "difference", "symmetric_difference", "issubset"),
    *("issuperset", "isdisjoint", "intersect", "union_cardinality", "intersection_cardinality"),
    *("difference_cardinality", "symmetric_difference_cardinality", "jaccard_index"),
)
BECOMING = ("__ior__", "__ixor__", "update", "symmetric_difference_update", "overwrite")
CHANGED = (*BECOMING, "__iand__", "__isub__", "intersection_update", "difference_update")


@pytest.mark.parametrize("width", ["BitMap", "BitMap64"])
@pytest.mark.parametrize(("small", "whole"), [SMALL, WHOLE])
@pytest.mark.parametrize("name", [*ASKED, *CHANGED])
def test_those_over_a_smaller_bitmap_are_sets_like_others(
    width: str, small: list[int], whole: list[int], name: str
) -> None:
    """They are combined and compared by their numbers, whatever they could have beside."""
    hb = HBitmap(1000)
    hb.update(small)
    theirs, _, others, ours = pairs(width, small, whole)
    cover = type(ours).of(hb)
    if name in ASKED:
        assert outcome(getattr(cover, name), ours) == outcome(getattr(theirs, name), others)
        assert outcome(getattr(ours, name), cover) == outcome(getattr(others, name), theirs)
        assert (list(cover), list(ours), cover.hbitmap) == (small, whole, hb)
        return
    back = theirs.copy(), others.copy()
    if max(whole) >= 1000 and name in BECOMING:
        with pytest.raises(OverflowError, match="5000 is beyond the 1000 items"):
            getattr(cover, name)(ours)
        assert list(hb) == small
    else:
        getattr(cover, name)(ours)
        getattr(theirs, name)(others)
        assert (list(hb), hb.size) == (list(theirs), 1000)
    theirs, others = back
    cover = type(ours).of(HBitmap.from_extents([(each, 1) for each in small], 1000))
    getattr(ours, name)(cover)
    getattr(others, name)(theirs)
    assert (list(ours), list(cover)) == (list(others), small)


def test_one_that_was_written_is_read_as_it_was_from_a_smaller_bitmap() -> None:
    bm = BitMap.of(HBitmap.from_extents([(3, 5)], 1000))
    again = BitMap.deserialize(bm.serialize())
    assert again == bm
    assert FrozenBitMap(again) in {FrozenBitMap.of(bm.hbitmap)}


def test_each_cover_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, pybitmap;"
        "print('pybitmap.compat' in sys.modules);"
        "import pybitmap.compat as compat;"
        "print('BitMap' in dir(compat), 'pybitmap.compat.roaring' in sys.modules);"
        "from pybitmap.compat import bitarray;"
        "print('pybitmap.compat.roaring' in sys.modules, hasattr(compat, 'nothing'));"
        "from pybitmap.compat import BitMap, BitMap64, FrozenBitMap, FrozenBitMap64;"
        "print('pyroaring' in sys.modules, 'bitarray' in sys.modules)"
    )
    assert run_python(code).split() == ["False", "True", *["False"] * 5]


def test_widths_are_not_mixed() -> None:
    with pytest.raises(TypeError, match="BitMap64"):
        BitMap() | BitMap64()
    assert BitMap([1]) != BitMap64([1])


def test_frozen_ones_have_no_changes_and_a_hash() -> None:
    frozen = FrozenBitMap([1, 2])
    for name in CHANGES + RANGE_CHANGES + SET_CHANGES + BITMAP_CHANGES:
        assert not hasattr(frozen, name)
    assert hash(frozen) == hash(FrozenBitMap([2]) | FrozenBitMap([1]))
    before = frozen
    frozen |= FrozenBitMap([3])
    assert (list(before), list(frozen)) == ([1, 2], [1, 2, 3])


class Named(BitMap):
    """A subclass with attributes."""

    name = ""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_have_all_of_it(protocol: int) -> None:
    bm = Named([1, 1 << 31], copy_on_write=True)
    bm.name = "daily"
    for again in (pickle.loads(pickle.dumps(bm, protocol)), copy.copy(bm), copy.deepcopy(bm)):
        assert (type(again), again, again.name) == (Named, bm, "daily")
        again.add(5)
        assert 5 not in bm


# ---- visitors -------------------------------------------------------------------------------


def test_each_number_that_a_thread_adds_is_drained_once() -> None:
    bm = BitMap()
    each = 3000
    go_on = threading.Event()

    def write(first: int) -> None:
        for number in range(first, 4 * each, 4):
            bm.add(number << 8)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    drained: list[int] = []
    while any(thread.is_alive() for thread in threads):
        drained += bm.hbitmap.drain()
        go_on.wait(0.001)
    drained += bm.hbitmap.drain()
    assert sorted(drained) == [number << 8 for number in range(4 * each)]


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hurried")
def test_each_number_is_popped_by_one_thread() -> None:
    bm = BitMap(range(0, 40000, 10))
    popped: list[list[int]] = [[], [], []]

    def take(mine: list[int]) -> None:
        try:
            while True:
                mine.append(bm.pop())
        except KeyError:
            pass

    threads = [threading.Thread(target=take, args=(mine,)) for mine in popped]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item for mine in popped for item in mine) == list(range(0, 40000, 10))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_the_child_of_a_fork_has_a_copy() -> None:
    code = """
import os
from pybitmap.compat import BitMap
bm = BitMap([1, 2])
pid = os.fork()
if not pid:
    bm.add(3)
    os._exit(bm != BitMap([1, 2, 3]))
print(os.waitpid(pid, 0)[1], list(bm))
"""
    assert run_python(code).strip() == "0 [1, 2]"


def test_a_kill_leaves_what_was_added_in_a_mapped_file(tmp_path: Path) -> None:
    code = """
import mmap, os, signal, sys
from pybitmap import HBitmap
from pybitmap.compat import BitMap
path, kill = os.environ["LEAF"], "KILL" in os.environ
with open(path, "r+b") as file:
    bm = BitMap.of(HBitmap.over(mmap.mmap(file.fileno(), 8192), 65536))
if kill:
    pid = os.fork()
    if not pid:
        bm.update([1, 65535])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
else:
    print(list(bm))
"""
    leaf = tmp_path / "leaf"
    leaf.write_bytes(bytes(8192))
    run_python(code, LEAF=str(leaf), KILL="1")
    assert run_python(code, LEAF=str(leaf)).strip() == "[1, 65535]"


def test_an_update_that_is_interrupted_has_marked_all_or_nothing() -> None:
    bm = BitMap()

    def attempt() -> None:
        bm.clear()
        bm.update([1, 1 << 20, 1 << 31])

    for where in at_every_line(attempt, within="compat"):
        assert list(bm) in ([], [1, 1 << 20, 1 << 31]), where


def test_a_number_is_removed_by_one_of_two_that_ask() -> None:
    bm = BitMap([7])
    bm.remove(7)
    with pytest.raises(KeyError, match="7"):
        bm.remove(7)
    with pytest.raises(KeyError):
        bm.pop()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
@pytest.mark.parametrize("name", ["BitMap", "BitMap64"])
def test_an_empty_one_takes_little_memory(name: str) -> None:
    code = f"""
from pybitmap.compat import {name}
def pages():
    return int(open("/proc/self/statm").read().split()[1])
some, before = [{name}([1])], pages()
some += [{name}([i]) for i in range(100)]
print((pages() - before) / 100)
"""
    assert float(run_python(code)) < 20  # pages of 4 KiB
