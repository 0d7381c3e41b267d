# SPDX-License-Identifier: MIT
"""What it costs to do much with one call: batches of marks, all that is dirty, whole bitmaps."""

from __future__ import annotations

import operator
import random
from array import array
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Callable

from bench_calls import ByCffi
from measure import Goal, Shape, Work, benchmark, peer

from pybitmap import HBitmap

bitarray, numpy, pyroaring = peer("bitarray"), peer("numpy"), peer("pyroaring")

Ways = dict[str, Callable[..., object]]

SPARSE, DENSE = 0.001, 0.5
WRITES = 100_000
PIECE = 1 << 24  # groups that are made at a time


# ---- the same bits for all of them ----------------------------------------------------------


@lru_cache(maxsize=2)
def leaf(shape: Shape, seed: int) -> bytes:
    """Random bits, as HBitmap and bitarray have them."""
    assert shape.density is not None
    rng = random.Random(seed)
    if shape.density == DENSE:
        return rng.randbytes(shape.groups // 8)
    data = bytearray(shape.groups // 8)
    for _ in range(int(shape.groups * shape.density)):
        item = rng.randrange(shape.groups)
        data[item // 8] |= 1 << item % 8
    return bytes(data)


def hbitmap(shape: Shape, seed: int = 1) -> HBitmap:
    return HBitmap.from_bytes(leaf(shape, seed), shape.groups)


def bits_of(shape: Shape, seed: int = 1) -> Any:
    bits = bitarray.bitarray(endian="little")
    bits.frombytes(leaf(shape, seed))
    return bits


@lru_cache(maxsize=2)
def roaring_of(shape: Shape, seed: int = 1) -> Any:
    roaring, data = pyroaring.BitMap(), leaf(shape, seed)
    for start in range(0, shape.groups, PIECE):
        roaring |= pyroaring.BitMap(items_of(data[start // 8 : (start + PIECE) // 8], start))
    return roaring


def items_of(data: bytes, start: int) -> Any:
    """The dirty items, counted from ``start``, as uint32."""
    if not numpy:
        return array("I", (item + start for item in HBitmap.from_bytes(data, 8 * len(data))))
    flags = numpy.unpackbits(numpy.frombuffer(data, "u1"), bitorder="little")
    return (numpy.flatnonzero(flags) + start).astype("<u4")


def words_of(shape: Shape, seed: int = 1) -> Any:
    return numpy.frombuffer(leaf(shape, seed), dtype="<u8").copy()


# ---- many marks -----------------------------------------------------------------------------


@benchmark("100,000 marks, one call", 1 << 20)
def many_marks(shape: Shape) -> Work:
    """What does a mark cost in a batch, into a clean bitmap and into one that has them all?"""
    rng = random.Random(1)
    starts = array("Q", [rng.randrange(shape.groups) for _ in range(WRITES)])
    counts = array("Q", [1]) * WRITES
    full = HBitmap(shape.groups)
    full.set_many(starts, counts)

    def mark(hb: HBitmap) -> None:
        hb.set_many(starts, counts)

    ways: Ways = {"set_many, dirty": lambda: mark(full), "set_many, clean": mark}
    before: dict[str, Callable[[], object]] = {"set_many, clean": lambda: HBitmap(shape.groups)}
    if numpy:
        flags, items = numpy.zeros(shape.groups, dtype=bool), numpy.frombuffer(starts, "<u8")
        ways["numpy[items] = True"] = lambda: flags.__setitem__(items, True)
    if pyroaring:
        narrow = array("I", starts)
        roaring = pyroaring.BitMap(narrow)
        ways["pyroaring update"] = lambda: roaring.update(narrow)
    goals = [Goal("set_many, dirty", None, 4)]
    return Work("mark", WRITES, ways, goals, before)


@benchmark("update, 100,000 items", 1 << 20)
def update(shape: Shape) -> Work:
    """What does it cost to mark the elements of something, beside the same as ranges?"""
    rng = random.Random(1)
    items = array("Q", [rng.randrange(shape.groups) for _ in range(WRITES)])
    counts, as_list = array("Q", [1]) * WRITES, list(items)
    hb = HBitmap(shape.groups)
    hb.update(items)
    ways: Ways = {
        "set_many": lambda: hb.set_many(items, counts),
        "update(array('Q'))": lambda: hb.update(items),
        "update(list)": lambda: hb.update(as_list),
    }
    goals = [Goal("update(array('Q'))", "set_many", 1.2)]
    if numpy:
        signed = numpy.array(items, dtype="<i8")
        ways["update(numpy, int64)"] = lambda: hb.update(signed)
        goals.append(Goal("update(numpy, int64)", "set_many", 1.2))
    if pyroaring:
        roaring = pyroaring.BitMap(array("I", items))
        ways["pyroaring update(list)"] = lambda: roaring.update(as_list)
    return Work("item", WRITES, ways, goals)


@benchmark("update, a range", 1 << 24)
def update_with_a_range(shape: Shape) -> Work:
    """What does it cost to mark or clean the elements of a range, beside one call for them?"""
    hb = HBitmap(shape.groups)
    every, third = range(shape.groups), range(0, shape.groups, 3)
    ways: Ways = {
        "set": lambda: hb.set(0, shape.groups),
        "update(range)": lambda: hb.update(every),
        "difference_update(range)": lambda: hb.difference_update(every),
        "reset": lambda: hb.reset(0, shape.groups),
        "update(range(0, n, 3))": lambda: hb.update(third),
    }
    before: dict[str, Callable[[], object]] = {
        "difference_update(range)": lambda: hb.update(every),
        "reset": lambda: hb.update(every),
    }
    goals = [
        Goal("update(range)", "set", 1.5),
        Goal("difference_update(range)", "reset", 1.5),
    ]
    ways = {way: lambda _=None, call=call: call() for way, call in ways.items()}
    return Work("word", shape.groups // 64, ways, goals, before)


# ---- all that is dirty ----------------------------------------------------------------------


def go_through(items: Iterable[object]) -> None:
    for _ in items:
        pass


@benchmark("iterate", 1 << 20, (0.01, DENSE))
def iterate(shape: Shape) -> Work:
    """What does it cost to see each dirty item as a Python int?"""
    hb = hbitmap(shape)
    by_cffi = ByCffi(hb)
    ways: Ways = {"HBitmap": lambda: go_through(hb), "HBitmap by cffi": lambda: go_through(by_cffi)}
    if pyroaring:
        roaring = roaring_of(shape)
        ways["pyroaring"] = lambda: go_through(roaring)
    if bitarray:
        bits = bits_of(shape)
        ways["bitarray search"] = lambda: go_through(bits.search(1))
    if numpy:
        flags = numpy.unpackbits(words_of(shape).view("u1"), bitorder="little")
        ways["numpy flatnonzero, tolist"] = lambda: go_through(numpy.flatnonzero(flags).tolist())
    return Work("item", len(hb), ways, [Goal("HBitmap", "pyroaring", 0.8)])


@benchmark("areas", 1 << 24, (SPARSE, DENSE))
def areas(shape: Shape) -> Work:
    """What does it cost to see what is dirty as ranges?"""
    hb = hbitmap(shape)
    ways: Ways = {
        "areas_array": hb.areas_array,
        "for area in areas()": lambda: go_through(hb.areas()),
    }
    if numpy:
        flags = numpy.unpackbits(words_of(shape).view("u1"), bitorder="little")
        ways["numpy diff of flags"] = lambda: numpy.flatnonzero(numpy.diff(flags))
    return Work("area", len(hb.areas_array()), ways, [Goal("areas_array", None, 8)])


@benchmark("items", 1 << 24, (0.012, DENSE))
def items(shape: Shape) -> Work:
    """What does it cost to have all that is dirty as an array of items?"""
    hb = hbitmap(shape)
    ways: Ways = {"items_array": hb.items_array, "areas_array": hb.areas_array}
    goals = [Goal("items_array", "areas_array", 1.0)]
    if numpy:
        words = words_of(shape).view("u1")
        ways["numpy flatnonzero of bits"] = lambda: numpy.flatnonzero(
            numpy.unpackbits(words, bitorder="little")
        )
    if pyroaring:
        ways["pyroaring to_array"] = roaring_of(shape).to_array
        goals.append(Goal("items_array", "pyroaring to_array", 3.0))
    return Work("item", len(hb), ways, goals)


@benchmark("merge_bits", 1 << 24, (SPARSE, DENSE))
def foreign(shape: Shape) -> Work:
    """What does it cost to mark what a foreign flat bitmap has, beside a merge of our own?"""
    hb, other, bits = hbitmap(shape), hbitmap(shape, 2), leaf(shape, 2)
    larger = HBitmap(2 * shape.groups)
    ways: Ways = {
        "merge": lambda a: a.merge(other),
        "merge_bits": lambda a: a.merge_bits(bits),
        "merge_bits, highest first": lambda a: a.merge_bits(bits, msb_first=True),
        "merge_bits from item 13": lambda _: larger.merge_bits(bits, 13),
        "merge_bits, granularity 1": lambda _: larger.merge_bits(bits, granularity=1),
    }
    before: dict[str, Callable[[], object]] = dict.fromkeys(ways, hb.copy)
    if numpy:
        words, more_words = words_of(shape), words_of(shape, 2)
        ways["numpy words"] = lambda a: a.__ior__(more_words)
        before["numpy words"] = words.copy
    return Work("word", shape.groups // 64, ways, [Goal("merge_bits", "merge", 2.0)], before)


@benchmark("copy_areas", 1 << 24, (SPARSE, 0.1))
def copy_dirty(shape: Shape) -> Work:
    """What does it cost to copy what is dirty, beside a loop of ours, and beside all?"""
    hb = hbitmap(shape)
    src, dst = memoryview(bytes(shape.groups)), memoryview(bytearray(shape.groups))

    def by_areas() -> None:
        for start, count in hb.areas():
            dst[start : start + count] = src[start : start + count]

    def whole_of_it() -> None:
        dst[:] = src

    ways: Ways = {
        "copy_areas": lambda: hb.copy_areas(dst, src),
        "for area in areas()": by_areas,
        "all of it": whole_of_it,
    }
    goals = [Goal("copy_areas", "for area in areas()", 0.2)]
    return Work("area", len(hb.areas_array()), ways, goals)


# ---- whole bitmaps --------------------------------------------------------------------------

DENSITIES = (SPARSE, DENSE)


def whole(
    shape: Shape, ours: str, ways: Ways, before: dict[str, Callable[[], object]] | None = None
) -> Work:
    """At most what pyroaring takes, and on dense data what bitarray takes."""
    goals = [Goal(ours, "pyroaring", 1.0)]
    if shape.density == DENSE:
        goals.append(Goal(ours, "bitarray", 1.0))
    return Work("word", shape.groups // 64, ways, goals, before or {})


@benchmark("a | b", densities=DENSITIES)
def union(shape: Shape) -> Work:
    """What does a new union cost? A word is 64 groups."""
    hb, other = hbitmap(shape), hbitmap(shape, 2)
    ways: Ways = {"HBitmap": lambda: hb | other}
    if bitarray:
        bits, more_bits = bits_of(shape), bits_of(shape, 2)
        ways["bitarray"] = lambda: bits | more_bits
    if pyroaring:
        roaring, more_roaring = roaring_of(shape), roaring_of(shape, 2)
        ways["pyroaring"] = lambda: roaring | more_roaring
    if numpy:
        words, more_words = words_of(shape), words_of(shape, 2)
        ways["numpy words"] = lambda: words | more_words
    return whole(shape, "HBitmap", ways)


def add_operation(
    sign: str, operate: Callable[[Any, Any], Any], count: str, cardinality: str
) -> None:
    """Two benchmarks: of a new bitmap, and of its count alone."""

    def operation(shape: Shape) -> Work:
        """What does a new bitmap cost that is made of two?"""
        hb, other = hbitmap(shape), hbitmap(shape, 2)
        ways: Ways = {"HBitmap": lambda: operate(hb, other)}
        goals = []
        if pyroaring:
            roaring, more_roaring = roaring_of(shape), roaring_of(shape, 2)
            ways["pyroaring"] = lambda: operate(roaring, more_roaring)
            goals = [Goal("HBitmap", "pyroaring", 1.5)]
        if numpy:
            words, more_words = words_of(shape), words_of(shape, 2)
            ways["numpy words"] = lambda: (
                words & ~more_words if sign == "-" else operate(words, more_words)
            )
        return Work("word", shape.groups // 64, ways, goals)

    def counted(shape: Shape) -> Work:
        """What does it cost to count what an operation would give, without the bitmap?"""
        hb, other = hbitmap(shape), hbitmap(shape, 2)
        ways: Ways = {
            "HBitmap": lambda: getattr(hb, count)(other),
            "len of the new one": lambda: len(operate(hb, other)),
        }
        goals = [Goal("HBitmap", "len of the new one", 1.0)]
        if pyroaring:
            roaring, more_roaring = roaring_of(shape), roaring_of(shape, 2)
            ways["pyroaring"] = lambda: getattr(roaring, cardinality)(more_roaring)
            goals.append(Goal("HBitmap", "pyroaring", 1.5))
        return Work("word", shape.groups // 64, ways, goals)

    benchmark(f"a {sign} b", densities=DENSITIES)(operation)
    benchmark(f"{count}", densities=DENSITIES)(counted)


add_operation("&", operator.and_, "intersection_count", "intersection_cardinality")
add_operation("-", operator.sub, "difference_count", "difference_cardinality")
add_operation("^", operator.xor, "symmetric_difference_count", "symmetric_difference_cardinality")


@benchmark("a |= b", densities=DENSITIES)
def merge(shape: Shape) -> Work:
    """What does a merge in place cost, of other bits than those that are there?"""
    hb, other = hbitmap(shape), hbitmap(shape, 2)
    ways: Ways = {"HBitmap": lambda a: a.merge(other)}
    before: dict[str, Callable[[], object]] = {"HBitmap": hb.copy}
    if bitarray:
        bits, more_bits = bits_of(shape), bits_of(shape, 2)
        ways["bitarray"] = lambda a: a.__ior__(more_bits)
        before["bitarray"] = bits.copy
    if pyroaring:
        roaring, more_roaring = roaring_of(shape), roaring_of(shape, 2)
        ways["pyroaring"] = lambda a: a.__ior__(more_roaring)
        before["pyroaring"] = roaring.copy
    if numpy:
        words, more_words = words_of(shape), words_of(shape, 2)
        ways["numpy words"] = lambda a: a.__ior__(more_words)
        before["numpy words"] = words.copy
    return whole(shape, "HBitmap", ways, before)


@benchmark("serialize", densities=DENSITIES)
def serialize(shape: Shape) -> Work:
    """What does it cost to have the bits as bytes? (pyroaring's are compressed.)"""
    hb = hbitmap(shape)
    ways: Ways = {"HBitmap": hb.serialize}
    if bitarray:
        ways["bitarray"] = bits_of(shape).tobytes
    if pyroaring:
        ways["pyroaring"] = roaring_of(shape).serialize
    if numpy:
        ways["numpy words"] = words_of(shape).tobytes
    return whole(shape, "HBitmap", ways)


@benchmark("drain", densities=DENSITIES)
def drain(shape: Shape) -> Work:
    """What does it cost to move all bits out? The others copy and clear, which no mark survives."""
    hb = hbitmap(shape)
    ways: Ways = {"HBitmap": lambda a: a.drain()}
    before: dict[str, Callable[[], object]] = {"HBitmap": hb.copy}

    def move(a: Any) -> Any:
        taken = a.copy()
        a.clear()
        return taken

    if bitarray:

        def move_bits(a: Any) -> Any:
            taken = a.copy()
            a.setall(0)
            return taken

        ways["bitarray"], before["bitarray"] = move_bits, bits_of(shape).copy
    if pyroaring:
        ways["pyroaring"], before["pyroaring"] = move, roaring_of(shape).copy
    return whole(shape, "HBitmap", ways, before)


@benchmark("count", densities=DENSITIES)
def count(shape: Shape) -> Work:
    """What does the count cost after a change?"""
    hb = hbitmap(shape)

    def ours() -> int:
        hb.set(0)
        hb.reset(0)
        return hb.count()

    ways: Ways = {"HBitmap": ours}
    if bitarray:
        ways["bitarray"] = bits_of(shape).count
    if pyroaring:
        ways["pyroaring"] = roaring_of(shape).__len__
    return Work("word", shape.groups // 64, ways)
