# SPDX-License-Identifier: MIT
"""The core operations of HBitmap, one question each, beside what Python itself offers for it.

Compare within a group of one run: these are ratios, a time of its own says little. ``make bench``.
"""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest

from pybitmap import BlockGraph, HBitmap

GROUPS = 1 << 20
WRITES = 10_000

Benchmark = Any  # pytest-benchmark has no types


def random_starts(count: int = WRITES, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(GROUPS) for _ in range(count)]


def filled(share: float) -> HBitmap:
    """2^20 groups of which ``share`` are dirty, at random."""
    hb = HBitmap(GROUPS)
    starts = array("Q", random_starts(int(GROUPS * share)))
    hb.set_many(starts, array("Q", [1]) * len(starts))
    return hb


@pytest.mark.benchmark(group="10,000 marks, one call each, all dirty already")
@pytest.mark.parametrize("what", ["HBitmap.set", "set.add", "bytearray[i] = 1"])
def test_mark(benchmark: Benchmark, what: str) -> None:
    """What does a mark cost from Python, where most hit what is dirty?"""
    starts = random_starts()
    hb, plain, flags = HBitmap(GROUPS), set(starts), bytearray(GROUPS)

    def with_hbitmap() -> None:
        mark = hb.set
        for start in starts:
            mark(start)

    def with_set() -> None:
        add = plain.add
        for start in starts:
            add(start)

    def with_bytes() -> None:
        for start in starts:
            flags[start] = 1

    benchmark({"HBitmap.set": with_hbitmap, "set.add": with_set}.get(what, with_bytes))


@pytest.mark.benchmark(group="10,000 writes, one call each, all dirty already")
@pytest.mark.parametrize("what", ["HBitmap.set", "mark_dirty, 1 bitmap", "mark_dirty, 16 bitmaps"])
def test_write_path(benchmark: Benchmark, what: str) -> None:
    """What does a node's write path cost beside a mark in a bare bitmap?"""
    size = GROUPS << 16
    offsets = [start << 16 for start in random_starts()]
    node = BlockGraph().add_node("disk", size)
    for number in range(16 if "16" in what else 1):
        node.add_bitmap(str(number))
    hb = HBitmap(size, 16)
    write = hb.set if what == "HBitmap.set" else node.mark_dirty

    def work() -> None:
        for offset in offsets:
            write(offset, 512)

    work()
    benchmark(work)


@pytest.mark.benchmark(group="10,000 marks, one call for all")
@pytest.mark.parametrize("state", ["clean", "dirty"])
def test_set_many(benchmark: Benchmark, state: str) -> None:
    """What does a mark cost in a batch, into a clean bitmap and into one that has them all?"""
    starts = array("Q", random_starts())
    counts = array("Q", [1]) * WRITES

    def setup() -> tuple[tuple[HBitmap], dict[str, Any]]:
        hb = HBitmap(GROUPS)
        if state == "dirty":
            hb.set_many(starts, counts)
        return (hb,), {}

    def work(hb: HBitmap) -> None:
        hb.set_many(starts, counts)

    benchmark.pedantic(work, setup=setup, rounds=50)


@pytest.mark.benchmark(group="is it dirty? 10,000 questions")
@pytest.mark.parametrize("what", ["item in HBitmap", "item in set"])
def test_contains(benchmark: Benchmark, what: str) -> None:
    """What does a membership test cost from Python?"""
    starts = random_starts()
    where: Any = HBitmap(GROUPS) if what == "item in HBitmap" else set()
    where.update(starts[::2])
    benchmark(lambda: [start in where for start in starts])


@pytest.mark.benchmark(group="all dirty items of 2^20 groups, 1 % dirty")
@pytest.mark.parametrize("what", ["iter", "areas", "areas_array", "sorted(set)"])
def test_iterate_sparse(benchmark: Benchmark, what: str) -> None:
    """What does it cost to see what is dirty in a sparse bitmap?"""
    hb = filled(0.01)
    plain = set(hb)
    benchmark(
        {
            "iter": lambda: sum(1 for _ in hb),
            "areas": lambda: sum(1 for _ in hb.areas()),
            "areas_array": hb.areas_array,
            "sorted(set)": lambda: sorted(plain),
        }[what]
    )


@pytest.mark.benchmark(group="a | b of 2^20 groups")
@pytest.mark.parametrize("share", [0.001, 0.5])
@pytest.mark.parametrize("what", ["HBitmap", "int"])
def test_union(benchmark: Benchmark, what: str, share: float) -> None:
    """What does a union cost, sparse and dense, beside the bits as one large int?"""
    a, b = filled(share), filled(share)
    if what == "HBitmap":
        benchmark(lambda: a | b)
    else:
        x, y = (int.from_bytes(hb.serialize(), "little") for hb in (a, b))
        benchmark(lambda: x | y)


@pytest.mark.benchmark(group="128 KiB of leaf words, half of the bits set")
@pytest.mark.parametrize("what", ["serialize", "deserialize", "copy", "drain", "count", "bytes()"])
def test_whole(benchmark: Benchmark, what: str) -> None:
    """What do whole-bitmap operations cost, beside a copy of the same bytes?"""
    hb = filled(0.5)
    data = hb.serialize()
    source = bytearray(data)

    def count() -> None:
        hb.set(0)
        hb.reset(0)
        hb.count()

    def drain() -> None:
        hb.merge(hb.drain())

    benchmark(
        {
            "serialize": hb.serialize,
            "deserialize": lambda: hb.deserialize(data),
            "copy": hb.copy,
            "drain": drain,
            "count": count,
            "bytes()": lambda: bytes(source),
        }[what]
    )
