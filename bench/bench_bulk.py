# SPDX-License-Identifier: MIT
"""What it costs to do much with one call: batches of marks, all that is dirty, whole bitmaps."""

from __future__ import annotations

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
    return Work("mark", WRITES, ways, [Goal("set_many, dirty", None, 4)], before)


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
