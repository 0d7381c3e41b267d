# SPDX-License-Identifier: MIT
"""LocalStore: a question each, beside the same without a store. ``make bench-stores``."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pybitmap import BlockGraph, BlockNode
from pybitmap.store import LocalStore

Benchmark = Any  # pytest-benchmark has no types

GROUPS = 1 << 20

#: 2^30 groups are 128 MiB of words.
LARGE = 1 << 39
GROUP = 512
NBYTES = LARGE // GROUP // 8


@pytest.mark.benchmark(group="10,000 writes, one call each")
@pytest.mark.parametrize("state", ["all dirty already", "all clean before"])
@pytest.mark.parametrize("kind", ["in memory", "mapped"])
def test_mark(benchmark: Benchmark, tmp_path: Path, kind: str, state: str) -> None:
    """What does a write cost where the bitmap is mapped from a file?"""
    benchmark.group += f", {state}"
    rng = random.Random(1)
    offsets = [rng.randrange(GROUPS) << 16 for _ in range(10_000)]
    with BlockGraph() as graph:
        node = graph.add_node("disk", GROUPS << 16, LocalStore(tmp_path / "store"))
        bitmap = node.add_bitmap("b", 65536, persistent=kind == "mapped")
        mark = node.mark_dirty
        for offset in offsets:
            mark(offset, 512)

        def work() -> None:
            for offset in offsets:
                mark(offset, 512)

        if state == "all dirty already":
            benchmark(work)
        else:
            benchmark.pedantic(work, setup=lambda: bitmap.reset(0, GROUPS << 16), rounds=20)


@pytest.fixture
def large(tmp_path: Path) -> Iterator[BlockNode]:
    with BlockGraph() as graph:
        node = graph.add_node("disk", LARGE, LocalStore(tmp_path / "store"))
        bitmap = node.add_bitmap("b", GROUP, persistent=True)
        bitmap.set(0, LARGE)
        yield node


@pytest.mark.benchmark(group="128 MiB of bits, all changed: to the disk")
@pytest.mark.parametrize("what", ["flush", "write and sync"])
def test_store(benchmark: Benchmark, tmp_path: Path, large: BlockNode, what: str) -> None:
    """Does storing cost what writing the same bytes costs?"""
    bitmap = large.bitmaps["b"]
    data = os.urandom(1 << 20)

    def change() -> None:
        bitmap.reset(0, LARGE)
        bitmap.set(0, LARGE)

    def write() -> None:
        with open(tmp_path / "file", "wb", buffering=0) as file:
            for _ in range(NBYTES >> 20):
                file.write(data)
            os.fsync(file.fileno())

    if what == "flush":
        benchmark.pedantic(large.flush, setup=change, rounds=5)
    else:
        benchmark.pedantic(write, rounds=5)


@pytest.mark.benchmark(group="128 MiB of bits, one changed: to the disk")
def test_store_little(benchmark: Benchmark, large: BlockNode) -> None:
    """A flush writes what has changed, not everything."""
    bitmap = large.bitmaps["b"]
    large.flush()

    def change() -> None:
        bitmap.reset(0, GROUP)

    benchmark.pedantic(large.flush, setup=change, rounds=20)


@pytest.mark.benchmark(group="128 MiB of bits: from the page cache")
@pytest.mark.parametrize("what", ["open for writing", "open for reading", "read", "entries"])
def test_load(benchmark: Benchmark, tmp_path: Path, large: BlockNode, what: str) -> None:
    """Does loading cost what reading the same bytes costs? What does listing cost?"""
    large.close()
    path = tmp_path / "store"
    [words] = path.glob("*.words")
    buffer = bytearray(1 << 20)

    def load() -> None:
        with BlockGraph() as graph:
            store = LocalStore(path)
            graph.add_node("disk", store=store, read_only=what == "open for reading")

    def read() -> None:
        with open(words, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def entries() -> None:
        LocalStore(path).entries()

    benchmark.pedantic({"read": read, "entries": entries}.get(what, load), rounds=5)


@pytest.mark.benchmark(group="one change of a bitmap of 32 KiB, beside one synced commit")
@pytest.mark.parametrize("what", ["commit", "disable", "freeze, done", "clear", "merge", "rotate"])
def test_change(benchmark: Benchmark, tmp_path: Path, what: str) -> None:
    """What does a change cost where it is stored? Its files and commits are in docs/design.md."""
    with BlockGraph() as graph:
        node = graph.add_node("disk", GROUPS << 14, LocalStore(tmp_path / "store"))
        a = node.add_bitmap("a", 65536, persistent=True)
        b = node.add_bitmap("b", 65536, persistent=True, disabled=True)
        plain = sqlite3.connect(tmp_path / "plain.sqlite", isolation_level=None)
        plain.execute("PRAGMA journal_mode = PERSIST")
        plain.execute("PRAGMA synchronous = FULL")
        plain.execute("CREATE TABLE row (value)")

        def commit() -> None:
            plain.execute("INSERT INTO row VALUES (1)")

        def disable() -> None:
            (a.disable if a.enabled else a.enable)()

        def freeze() -> None:
            with a.freeze() as frozen:
                frozen.done()

        def rotate() -> None:
            with graph.transaction() as tx:
                tx.merge("disk", "b", ["a"])
                tx.clear("disk", "a")

        work = {
            "commit": commit,
            "disable": disable,
            "freeze, done": freeze,
            "clear": a.clear,
            "merge": lambda: b.merge(a),
            "rotate": rotate,
        }
        benchmark.pedantic(work[what], rounds=20)
        plain.close()
