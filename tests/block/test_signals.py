# SPDX-License-Identifier: MIT
"""Signals at any moment of a change, with a handler that raises, as Ctrl-C has it.

A trace function knows the lines of Python (test_interrupts.py); a signal comes where it wants, also
in C, in finalizers, and beside threads that write. What is looked at then: trials.py; and with
writers, that each of their marks is in some bitmap, before closing and after it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest
from stores import SIZE, Place
from support import collect
from trials import (
    CHANGES,
    KINDS,
    Disturbance,
    G,
    Scene,
    Trials,
    descriptors,
    finalizers,
    look_in_a_thread,
)

from pybitmap import BlockGraph, BlockNode, ClosedError
from pybitmap.store.files import sync_directory
from pybitmap.store.opened import opened

pytestmark = pytest.mark.skipif(
    sys.implementation.name != "cpython" or not hasattr(signal, "setitimer"),
    reason="relies on counted references, on _fast, and on timers",
)

ALL = os.environ.get("PYBITMAP_ALL_LINES") == "1"
SAMPLE = 300 if ALL else 4  # of the moments of a change


class Interruption(BaseException):
    """As KeyboardInterrupt."""


class Signal:
    """``with``: after so many seconds, a handler raises if a frame of that name is on the stack."""

    def __init__(self, seconds: float, within: str) -> None:
        self._disturbance = Disturbance((Interruption,))
        self._disturbance.where = f"after {seconds * 1e6:.0f} us"
        self._seconds, self._within = seconds, within

    def _handle(self, number: int, frame: FrameType | None) -> None:
        at = frame
        while frame is not None:
            if frame.f_code.co_name == self._within and at is not None:
                self._disturbance.came = True
                self._disturbance.where += f", {at.f_code.co_filename}:{at.f_lineno}"
                raise Interruption
            frame = frame.f_back

    def __enter__(self) -> Disturbance:
        self._before = signal.signal(signal.SIGALRM, self._handle)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        return self._disturbance

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)


def duration(trials: Trials) -> float:
    """Of the change, in seconds, the longer of two."""
    found = []
    for _ in range(2):
        scene = trials.scene()
        began = time.perf_counter()
        trials.attempt(scene)
        found.append(time.perf_counter() - began)
        scene.graph.close()
    return max(found)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__ if kind else "no store")
def test_a_signal_at_any_moment_leaves_all_or_nothing(
    kind: type[Place] | None, name: str, memory_path: Path
) -> None:
    trials = Trials(kind, memory_path, name)
    longest = duration(trials)
    for _ in range(SAMPLE):
        trials.disturb(Signal(random.uniform(1e-6, 1.1 * longest), "attempt"))


def test_no_descriptor_is_lost_where_a_file_is_opened(tmp_path: Path) -> None:
    for path, flags in ((tmp_path / "file", os.O_RDWR | os.O_CREAT), (tmp_path, os.O_RDONLY)):
        before_it, end = descriptors(), time.monotonic() + 0.3
        with finalizers():  # of files that are dropped: a ResourceWarning
            while time.monotonic() < end:
                disturbed = Signal(random.uniform(1e-6, 1e-3), "open_files")
                with suppress(Interruption, IsADirectoryError), disturbed:
                    open_files(path, flags)
        assert descriptors() <= before_it


def open_files(path: Path, flags: int) -> None:
    for _ in range(50):
        opened(path, flags).close()
        sync_directory(path.parent)


#: Bytes that each writer marks at a time: a group of the finest bitmaps.
UNITS = SIZE // G


class Writer(threading.Thread):
    """Marks every second unit of the one node, and the others of the other, in a random order."""

    def __init__(self, scene: Scene, first: int) -> None:
        super().__init__(daemon=True)
        self._nodes = [scene.node, scene.other]
        units = list(range(32 + first, UNITS, 2))
        random.shuffle(units)
        self._units = units
        self.acknowledged: list[set[int]] = [set(), set()]
        self.stopping = False
        self.begun = threading.Event()

    def run(self) -> None:
        open_nodes = [0, 1]
        for unit in self._units:
            which = unit // 2 % 2
            if self.stopping or not open_nodes:
                break
            if which in open_nodes:
                try:
                    self._nodes[which].mark_dirty(unit * G, 1)
                except ClosedError:
                    open_nodes.remove(which)
                else:
                    self.acknowledged[which].add(unit)
            self.begun.set()
            time.sleep(0)


def marked(nodes: list[BlockNode]) -> set[int]:
    """The units that are in some bitmap."""
    return {
        offset // G
        for node in nodes
        for bitmap in node.bitmaps.values()
        for start, nbytes in bitmap.areas()
        for offset in range(start, start + nbytes, G)
    }


def attempt_beside(name: str, scene: Scene) -> None:
    CHANGES[name](scene)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__ if kind else "no store")
def test_a_signal_beside_writers_loses_no_mark(
    kind: type[Place] | None, name: str, memory_path: Path
) -> None:
    trials = Trials(kind, memory_path, name)
    longest = duration(trials)
    for _ in range(max(2, SAMPLE // 3)):
        scene = trials.scene()
        writers = [Writer(scene, first) for first in range(2)]
        for writer in writers:
            writer.start()
            writer.begun.wait()
        with finalizers():
            try:
                with Signal(random.uniform(1e-6, 2 * longest), "attempt_beside") as signalled:
                    attempt_beside(name, scene)
            except Interruption:
                pass
        what = f"{name}, {signalled.where}"
        look_in_a_thread(scene.graph, what)
        for writer in writers:
            writer.stopping = True
            writer.join(10)
            assert not writer.is_alive(), f"{what}: a write hangs"
        acknowledged = [set().union(*(w.acknowledged[which] for w in writers)) for which in (0, 1)]
        nodes = [scene.node, scene.other]
        present = [node.name for node in scene.graph.nodes.values() if list(node.bitmaps)]
        busy = [bitmap for node in nodes for bitmap in node.bitmaps.values() if bitmap.busy]
        assert not busy, f"{what}: {busy}"
        if len(present) == 2:
            assert set().union(*acknowledged) <= marked(nodes), what
        scene.graph.close()
        place = scene.place
        del scene, writers, nodes, writer
        collect()
        if place is not None:
            with BlockGraph() as graph:
                again = [graph.add_node(n, None, place.store(i)) for i, n in enumerate("nm")]
                assert all(b.reason is None for node in again for b in node.bitmaps.values()), what
                assert set().union(*acknowledged) <= marked(again), what
