# SPDX-License-Identifier: MIT
"""What it costs to learn what was written, and to bring memory back: beside the bare call below."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
import subprocess
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any, Callable

from measure import Goal, Shape, Work, benchmark, missing

from pybitmap import HBitmap, UnsupportedError
from pybitmap.trackers import MemoryTracker, Snapshot

PAGE = mmap.PAGESIZE


def compiled(name: str) -> Any:
    """The functions of bench/c/NAME.c, or None, and then :data:`missing` says why."""
    compiler = os.environ.get("CC", "cc").split()
    if shutil.which(compiler[0]) is None:
        missing["bare loops in C"] = f"{compiler[0]} is not installed"
        return None
    source = Path(__file__).parent / "c" / f"{name}.c"
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/{name}.so"
        command = [*compiler, "-std=c11", "-O2", "-shared", "-fPIC", "-o", library, str(source)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(library)


bare = compiled("bare")

# ---- memory of this process -----------------------------------------------------------------

WRITES = 1000


def private(npages: int) -> mmap.mmap:
    return mmap.mmap(-1, npages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def can_track() -> bool:
    try:
        MemoryTracker(private(1)).close()
    except UnsupportedError as error:
        missing["memory tracking"] = str(error)
        return False
    return True


def offsets(npages: int, number: int = WRITES) -> list[int]:
    return [page * PAGE for page in random.Random(1).sample(range(npages), number)]


def writing(ram: mmap.mmap, where: list[int]) -> Callable[[], None]:
    def write() -> None:
        for offset in where:
            ram[offset] = 1

    return write


if can_track():

    @benchmark("MemoryTracker.collect", 1 << 18)
    def collect(shape: Shape) -> Work:
        """What does a collect of 1 GiB cost in which 1,000 pages were written to?

        Of a group a page. The bare ioctl has the same array for its answers, and drops them.
        """
        ram = private(shape.groups)
        write = writing(ram, offsets(shape.groups))
        for offset in range(0, len(ram), PAGE):
            ram[offset] = 1  # every page is there
        tracker = MemoryTracker(ram)
        kept = HBitmap(len(ram), tracker.granularity)
        ways: dict[str, Callable[..., object]] = {}
        goals = []
        if bare:
            scan = bare.bare_scan
            begin, end = (ctypes.c_uint64(tracker.address + at) for at in (0, len(ram)))
            pagemap = tracker._memory.pagemap
            ways["bare ioctl"] = lambda _: scan(pagemap, begin, end)
            goals = [Goal("collect", "bare ioctl", 1.3)]
        ways["collect"] = lambda _: tracker.collect()
        ways["collect into a bitmap"] = lambda _: tracker.collect(kept)
        return Work("page", WRITES, ways, goals, dict.fromkeys(ways, write))

    @benchmark("writes to tracked memory", 1 << 18)
    def first_writes(shape: Shape) -> Work:
        """What does the first write to a page cost after a collect, and a later one?"""
        where = offsets(shape.groups)
        ram, untracked, fresh = (private(shape.groups) for _ in range(3))
        writing(untracked, where)()
        tracker = MemoryTracker(ram)
        ways: dict[str, Callable[..., object]] = {
            "untracked": lambda _: writing(untracked, where)(),
            "later": lambda _: writing(ram, where)(),
            "first after a collect": lambda _: writing(ram, where)(),
            "first of all, untracked": lambda _: writing(fresh, where)(),
        }
        before: dict[str, Callable[[], object]] = dict.fromkeys(ways, lambda: None)
        before["untracked"], before["later"] = writing(untracked, where), writing(ram, where)
        before["first after a collect"] = tracker.collect
        before["first of all, untracked"] = lambda: fresh.madvise(mmap.MADV_DONTNEED)
        return Work("write", WRITES, ways, [], before, loop=lambda: [None for _ in where])


# ---- snapshots ------------------------------------------------------------------------------

ROUNDS = 10


@benchmark("Snapshot.restore", 1 << 14, tuple(number / (1 << 14) for number in (50, 500, 5000)))
def restore(shape: Shape) -> Work:
    """What does it cost to bring 64 MiB back, of which some pages are dirty? Of a group a page."""
    ram = private(shape.groups)
    for offset in range(0, len(ram), PAGE):
        ram[offset] = 1
    number = round((shape.density or 0) * shape.groups)
    dirty = HBitmap(len(ram), PAGE.bit_length() - 1)
    for offset in offsets(shape.groups, number):
        dirty.set(offset, PAGE)
    snapshot = Snapshot(ram)
    view, data = memoryview(ram), snapshot.data

    def in_python() -> None:
        for start, count in dirty.areas():
            view[start : start + count] = data[start : start + count]

    def all_of_it() -> None:
        view[:] = data

    def often(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(ROUNDS):
                call()

        return run

    # In this order: each of the last two finds the caches as a loop over the same pages left them.
    ways: dict[str, Callable[..., object]] = {
        "all of it": often(all_of_it),
        "Python loop": often(in_python),
    }
    goals = []
    if bare:
        starts, counts = zip(*dirty.areas())
        areas = (ctypes.c_uint64 * (2 * len(starts)))(*chain(*zip(starts, counts)))
        copy, nareas = bare.bare_copy, ctypes.c_uint64(len(starts))
        to = (ctypes.c_char * len(ram)).from_buffer(ram)
        kept = ctypes.c_void_p(address_of(data))
        ways["C loop of memcpy"] = often(lambda: copy(to, kept, areas, nareas))
        goals = [Goal("restore", "C loop of memcpy", 1.2)]
    ways["restore"] = often(lambda: snapshot.restore(dirty))
    return Work("page", number * ROUNDS, ways, goals)


def address_of(view: memoryview) -> int:
    from pybitmap import _core

    with _core.raw_array("it", view) as array:
        return _core.address(array)


if can_track():

    @benchmark("a fuzzer's round", 1 << 14, tuple(number / (1 << 14) for number in (50, 500, 5000)))
    def fuzz(shape: Shape) -> Work:
        """What does a round cost that writes to some pages of 64 MiB, collects and restores?"""
        number = round((shape.density or 0) * shape.groups)
        where = offsets(shape.groups, number)
        ways: dict[str, Callable[..., object]] = {}

        def add(name: str, bring_back: Callable[[Snapshot, MemoryTracker], object]) -> None:
            ram = private(shape.groups)
            for offset in range(0, len(ram), PAGE):
                ram[offset] = 1
            tracker, snapshot, write = MemoryTracker(ram), Snapshot(ram), writing(ram, where)

            def once() -> None:
                write()
                bring_back(snapshot, tracker)

            ways[name] = once

        add("rewind", lambda s, t: s.rewind(t))
        add("restore(collect())", lambda s, t: s.restore(t.collect()))
        untracked = private(shape.groups)
        snapshot, write = Snapshot(untracked), writing(untracked, where)
        view = memoryview(untracked)

        def all_of_it() -> None:
            write()
            view[:] = snapshot.data

        ways["untracked, all of it"] = all_of_it
        return Work("page", number, ways)
