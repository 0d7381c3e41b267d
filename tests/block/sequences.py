# SPDX-License-Identifier: MIT
"""Sequences of writes beside whatever the test does: by threads in C, or of Python.

A sequence goes round some nodes, block by block, each block in one call, and never writes a unit of
a node twice. Of its writes every one comes after all that stand before it, whichever of its threads
makes it; so what is before an instant is a beginning of the sequence, see :meth:`Sequence.cut`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence as List
from pathlib import Path

import pytest
from instant import UNIT, span

from pybitmap import BlockNode, _core

BEGUN, ACKED, LIMIT, STOP, FAILED = range(5)
CELLS = 8

#: How much there is to try, as a multiple of the default.
ROUNDS = int(os.environ.get("PYBITMAP_INSTANT_ROUNDS", "1"))


def cells(memory: mmap.mmap | None = None) -> memoryview:
    """Where a sequence says how far it is; to be seen by other processes."""
    return memoryview(memory or mmap.mmap(-1, 8 * CELLS)).cast("Q")


class Sequence(ABC):
    """
    :param nodes: in the order in which it goes round
    :param units: of each node that it may write to
    :param block: units that are written by one call
    """

    def __init__(
        self, nodes: List[str], units: range, block: int = 1, progress: memoryview | None = None
    ) -> None:
        self.nodes = list(nodes)
        self.first = units.start
        self.block = block
        self.capacity = len(units) // block * block * len(nodes)
        self.progress = cells() if progress is None else progress

    @abstractmethod
    def start(self, nodes: List[BlockNode]) -> None: ...

    @abstractmethod
    def join(self) -> None: ...

    @property
    def begun(self) -> int:
        return self.progress[BEGUN]

    @property
    def acked(self) -> int:
        return self.progress[ACKED]

    def allow(self, count: int) -> None:
        """So many more than have begun, as far as there are any."""
        self.progress[LIMIT] = min(self.begun + count, self.capacity)

    @property
    def exhausted(self) -> bool:
        return self.acked + self.block > self.capacity

    def wait(self, count: int) -> None:
        """Until so many have returned."""
        end = time.monotonic() + 60
        while self.acked < count:
            assert not self.progress[FAILED], f"errno {self.progress[FAILED]}"
            assert time.monotonic() < end, "it does not go on"
            time.sleep(0.0001)

    def wait_a_little(self, count: int) -> None:
        """Until so many more have returned, or for some milliseconds."""
        count, end = self.acked + count, time.monotonic() + 0.005
        while self.acked < min(count, self.progress[LIMIT]) and time.monotonic() < end:
            time.sleep(0.0001)

    def wait_idle(self) -> None:
        """Until all that may be have returned."""
        self.wait(self.progress[LIMIT] // self.block * self.block)

    def place(self, position: int) -> tuple[str, int]:
        """Node and unit."""
        number, within = divmod(position, self.block)
        node = self.nodes[number % len(self.nodes)]
        return node, self.first + number // len(self.nodes) * self.block + within

    def prefix(self, count: int, node: str) -> int:
        """The units of a node that the first so many of its writes are of."""
        number, within = divmod(count, self.block)
        rounds, rest = divmod(number, len(self.nodes))
        index = self.nodes.index(node)
        units = (rounds + (index < rest)) * self.block + (index == rest) * within
        return span(self.first, units)

    def between(self, begin: int, end: int, node: str) -> int:
        """The units of a node that are in these of its writes."""
        if node not in self.nodes:
            return 0
        return self.prefix(end, node) & ~self.prefix(begin, node)

    def cut(self, begin: int, end: int, found: dict[str, int]) -> tuple[int, int]:
        """How many writes there are before an instant, of which these units have been found.

        :param begin: before that, they belong elsewhere
        :param end: they have not begun
        :param found: by node, of this sequence or not; where nodes are missing, nothing is known
        :returns: at least and at most; one number if all nodes are there
        """
        least, most = begin, end
        for node in self.nodes:
            if node not in found:
                continue
            mine = self.between(begin, end, node)
            has = found[node] & mine
            assert has == mine & ((1 << has.bit_length()) - 1), f"holes in node {node}"
            lacks = mine & ~has
            if lacks:
                most = min(most, self.position(node, (lacks & -lacks).bit_length() - 1))
            if has:
                least = max(least, self.position(node, has.bit_length() - 1) + 1)
        assert least <= most, (
            f"no beginning of writes {begin} to {end} over {self.nodes}, {self.block} at a time: "
            f"{self.place(least - 1)} is there, but not {self.place(most)}, which came before"
        )
        return least, most

    def position(self, node: str, unit: int) -> int:
        """Of the write of that unit."""
        rounds, within = divmod(unit - self.first, self.block)
        return (rounds * len(self.nodes) + self.nodes.index(node)) * self.block + within


class Native(Sequence):
    """By threads in C."""

    def __init__(
        self,
        library: ctypes.CDLL,
        nodes: List[str],
        units: range,
        block: int = 1,
        threads: int = 1,
        progress: memoryview | None = None,
    ) -> None:
        super().__init__(nodes, units, block, progress)
        self.library = library
        self.threads = threads
        self.running: int | None = None
        self.written: List[BlockNode] = []

    def start(self, nodes: List[BlockNode]) -> None:
        self.written = nodes  # what C has of them stays
        trackers = (ctypes.c_void_p * len(nodes))(*(_core.address(node._tracker) for node in nodes))
        functions = [
            ctypes.c_void_p(_core.addresses[name])
            for name in ("hbtracker_mark", "hbtracker_mark_many")
        ]
        progress = ctypes.addressof(ctypes.c_uint64.from_buffer(self.progress))
        self.running = self.library.writers_start(
            trackers,
            *(ctypes.c_uint64(n) for n in (len(nodes), self.threads, self.block, self.first, UNIT)),
            *functions,
            ctypes.c_void_p(progress),
        )
        assert self.running

    def join(self) -> None:
        if self.running is not None:
            self.library.writers_join(ctypes.c_void_p(self.running))
            self.running = None
        assert not self.progress[FAILED]


class Threaded(Sequence):
    """By a thread of Python."""

    def start(self, nodes: List[BlockNode]) -> None:
        self.thread = threading.Thread(target=self.run, args=(nodes,), daemon=True)
        self.thread.start()

    def run(self, nodes: List[BlockNode]) -> None:
        progress, block = self.progress, self.block
        position = self.acked
        lengths = array("Q", [UNIT] * block)
        while not progress[STOP]:
            if progress[LIMIT] < position + block:
                time.sleep(0)
                continue
            progress[BEGUN] = position + block
            number = position // block
            node = nodes[number % len(nodes)]
            unit = self.first + number // len(nodes) * block
            if block == 1:
                node.mark_dirty(unit * UNIT, UNIT)
            else:
                offsets = array("Q", [(unit + i) * UNIT for i in range(block)])
                node.mark_dirty_many(offsets, lengths)
            position += block
            progress[ACKED] = position

    def join(self) -> None:
        self.progress[STOP] = 1
        self.thread.join()


def build(folder: Path) -> ctypes.CDLL:
    """The threads in C; skips the test where there is no compiler."""
    compiler = os.environ.get("CC", "cc").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C compiler: {compiler[0]} is not installed (Debian package gcc)")
    path = folder / "writers.so"
    source = str(Path(__file__).with_name("writers.c"))
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    if not path.exists():
        subprocess.run([*compiler, *flags, "-o", str(path), source], check=True)
    return load(path)


def load(path: Path) -> ctypes.CDLL:
    assert sys.platform != "win32", platform.platform()
    library = ctypes.CDLL(str(path))
    library.writers_start.restype = ctypes.c_void_p
    return library
