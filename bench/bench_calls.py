# SPDX-License-Identifier: MIT
"""What one call costs from Python: 10,000 of them, at random, mostly where it is dirty already."""

from __future__ import annotations

import random
from collections.abc import Iterable
from threading import Timer
from time import monotonic_ns
from typing import Any, Callable

from measure import Goal, Shape, Work, benchmark, peer

from pybitmap import BlockGraph, BlockNode, HBitmap
from pybitmap.block.node import CffiNodeBase
from pybitmap.hbitmap import CffiBase

bitarray, numpy, pyroaring = peer("bitarray"), peer("numpy"), peer("pyroaring")

GROUPS = 1 << 20
CALLS = 10_000
WIDTH = 8  # items of a range


def random_starts() -> list[int]:
    rng = random.Random(1)
    return [rng.randrange(GROUPS - WIDTH) for _ in range(CALLS)]


class ByCffi(CffiBase):
    """The same bitmap, without the fast entry in front."""

    def __init__(self, hb: HBitmap) -> None:
        self._hb = hb._hb
        self._clears = 0

    def __iter__(self) -> Any:
        return self._items(0)


class NodeByCffi(CffiNodeBase):
    def __init__(self, node: BlockNode) -> None:
        self._tracker = node._tracker


def calls(call: Callable[[int], object], starts: Iterable[int]) -> Callable[[], None]:
    def run() -> None:
        for start in starts:
            call(start)

    return run


def loop(starts: list[int]) -> Callable[[], None]:
    def run() -> None:
        for _ in starts:
            pass

    return run


@benchmark("set a range", GROUPS)
def set_a_range(shape: Shape) -> Work:
    """What does it cost to mark a range of 8 items?"""
    starts = random_starts()
    hb = HBitmap(shape.groups)
    by_cffi = ByCffi(hb)

    def ours() -> None:
        mark = hb.set
        for start in starts:
            mark(start, WIDTH)

    def cffi() -> None:
        mark = by_cffi.set
        for start in starts:
            mark(start, WIDTH)

    ways: dict[str, Callable[..., object]] = {"HBitmap.set": ours, "HBitmap.set by cffi": cffi}
    if bitarray:
        bits = bitarray.bitarray(shape.groups)

        def with_bitarray() -> None:
            for start in starts:
                bits[start : start + WIDTH] = True

        ways["bitarray[a:b] = True"] = with_bitarray
    if pyroaring:
        roaring = pyroaring.BitMap()

        def with_pyroaring() -> None:
            add = roaring.add_range
            for start in starts:
                add(start, start + WIDTH)

        ways["pyroaring add_range"] = with_pyroaring
    if numpy:
        flags = numpy.zeros(shape.groups, dtype=bool)

        def with_numpy() -> None:
            for start in starts:
                flags[start : start + WIDTH] = True

        ways["numpy[a:b] = True"] = with_numpy
    goals = [
        Goal("HBitmap.set", "bitarray[a:b] = True", 0.5),
        Goal("HBitmap.set", None, 60),
        Goal("HBitmap.set", "HBitmap.set by cffi", 0.5),
    ]
    return Work("call", CALLS, ways, goals, loop=loop(starts))


@benchmark("set one", GROUPS)
def set_one(shape: Shape) -> Work:
    """What does it cost to mark one item?"""
    starts = random_starts()
    hb = HBitmap(shape.groups)
    flags, plain = bytearray(shape.groups), set(starts)

    def with_bytes() -> None:
        for start in starts:
            flags[start] = 1

    ways: dict[str, Callable[..., object]] = {
        "HBitmap.set": calls(hb.set, starts),
        "HBitmap.set by cffi": calls(ByCffi(hb).set, starts),
        "HBitmap.add": calls(hb.add, starts),
        "set.add": calls(plain.add, starts),
        "bytearray[i] = 1": with_bytes,
    }
    if bitarray:
        bits = bitarray.bitarray(shape.groups)

        def with_bitarray() -> None:
            for start in starts:
                bits[start] = True

        ways["bitarray[i] = True"] = with_bitarray
    if pyroaring:
        ways["pyroaring add"] = calls(pyroaring.BitMap().add, starts)
    goals = [Goal("HBitmap.add", "HBitmap.set", 1.5)]
    return Work("call", CALLS, ways, goals, loop=loop(starts))


@benchmark("clean one", GROUPS)
def clean_one(shape: Shape) -> Work:
    """What does it cost to clean one item, of which each is dirty? All of these take the lock."""
    starts = sorted(set(random_starts()))
    hb, plain = HBitmap(shape.groups), set(starts)

    def again(items: Any) -> Callable[[], None]:
        return lambda: items.update(starts)

    ways: dict[str, Callable[..., object]] = {}
    before: dict[str, Callable[[], object]] = {}
    for name, items, clean in [
        ("HBitmap.reset", hb, hb.reset),
        ("HBitmap.discard", hb, hb.discard),
        ("HBitmap.remove", hb, hb.remove),
        ("set.discard", plain, plain.discard),
    ]:
        ways[name] = lambda _, clean=clean: calls(clean, starts)()
        before[name] = again(items)
    if pyroaring:
        roaring = pyroaring.BitMap(starts)
        ways["pyroaring discard"] = lambda _: calls(roaring.discard, starts)()
        before["pyroaring discard"] = again(roaring)
    goals = [Goal(f"HBitmap.{name}", "HBitmap.reset", 0.5) for name in ("discard", "remove")]
    return Work("call", len(starts), ways, goals, before, loop(starts))


@benchmark("write", GROUPS)
def write(shape: Shape) -> Work:
    """What does a node's write path cost beside a mark in a bare bitmap?"""
    size, granularity = shape.groups << 16, 16
    offsets = [start << granularity for start in random_starts()]
    hb = HBitmap(size, granularity)
    nodes = []
    for nbitmaps in (1, 16):
        node = BlockGraph().add_node("disk", size)
        for number in range(nbitmaps):
            node.add_bitmap(str(number))
        nodes.append(node)

    def through(mark: Callable[[int, int], object]) -> Callable[[], None]:
        def run() -> None:
            for offset in offsets:
                mark(offset, 4096)

        return run

    ways: dict[str, Callable[..., object]] = {
        "mark_dirty, 1 bitmap": through(nodes[0].mark_dirty),
        "mark_dirty, 16 bitmaps": through(nodes[1].mark_dirty),
        "HBitmap.set": through(hb.set),
        "mark_dirty by cffi, 1 bitmap": through(NodeByCffi(nodes[0]).mark_dirty),
        "HBitmap.set by cffi": through(ByCffi(hb).set),
    }
    goals = [
        Goal("mark_dirty, 1 bitmap", "HBitmap.set", 1.3),
        Goal("mark_dirty by cffi, 1 bitmap", "HBitmap.set by cffi", 1.3),
    ]
    return Work("call", CALLS, ways, goals, loop=loop(offsets))


@benchmark("wait", GROUPS)
def wait(shape: Shape) -> Work:
    """What processor time does a write take that waits for a node to be closed or truncated?"""
    milliseconds = 50
    node = BlockGraph().add_node("node", shape.groups)
    node.add_bitmap("b")

    def hold() -> None:
        with node._coordinator.held():
            node._device.hold()  # as these do
        Timer(milliseconds / 1000, release).start()

    def release() -> None:
        with node._coordinator.held():
            node._coordinator._publish_exactly([node._device])

    def spin() -> None:
        end = monotonic_ns() + milliseconds * 1_000_000
        while monotonic_ns() < end:
            pass

    ways: dict[str, Callable[..., object]] = {
        "a loop that spins": lambda _: spin(),
        "mark_dirty": lambda _: node.mark_dirty(0, 1),
        "mark_dirty by cffi": lambda _: node.mark_dirty(offset=0, length=1),
    }
    goals = [Goal("mark_dirty", "a loop that spins", 0.05)]
    before: dict[str, Callable[[], object]] = dict.fromkeys(ways, hold)
    return Work("ms", milliseconds, ways, goals, before)


@benchmark("ask", GROUPS)
def ask(shape: Shape) -> Work:
    """What does it cost to ask whether one item is dirty?"""
    starts = random_starts()
    hb, plain = HBitmap(shape.groups), set(starts[::2])
    hb.update(starts[::2])

    def within(where: Any) -> Callable[[], None]:
        def run() -> None:
            for start in starts:
                start in where  # noqa: B015

        return run

    ways: dict[str, Callable[..., object]] = {
        "item in HBitmap": within(hb),
        "HBitmap.get": calls(hb.get, starts),
        "item in HBitmap by cffi": within(ByCffi(hb)),
        "HBitmap.get by cffi": calls(ByCffi(hb).get, starts),
        "item in set": within(plain),
    }
    if bitarray:
        bits = bitarray.bitarray(shape.groups)
        for start in starts[::2]:
            bits[start] = True

        def with_bitarray() -> None:
            for start in starts:
                bits[start]

        ways["bitarray[i]"] = with_bitarray
    if pyroaring:
        ways["item in pyroaring"] = within(pyroaring.BitMap(starts[::2]))
    goals = [Goal(way, "bitarray[i]", 1.0) for way in ("item in HBitmap", "HBitmap.get")]
    return Work("call", CALLS, ways, goals, loop=loop(starts))
