# SPDX-License-Identifier: MIT
"""Live copies: at the end the copy equals what was written to, whatever came between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from lines import at_every_line
from peers import lacking

import pybitmap.livecopy
from pybitmap import BlockGraph, BlockNode, DirtyBitmap, HBitmap, InvalidError, StateError
from pybitmap.livecopy import LiveCopy, Progress, live_copy
from pybitmap.store import LocalStore

PAGE = 4096
SIZE = 64 * PAGE + 7


class Disk:
    """Memory with a node, writers of it, and a copy."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.data, self.target = bytearray(os.urandom(SIZE)), bytearray(SIZE)
        self.node: BlockNode = BlockGraph().add_node("disk", size=SIZE)
        self.bitmap: DirtyBitmap = self.node.add_bitmap("daily", granularity=PAGE)
        self.pieces: list[tuple[int, int]] = []

    def write(self, offset: int, data: bytes) -> None:
        with self.lock, self.node.writing(offset, len(data)):
            self.data[offset : offset + len(data)] = data

    def copy(self, offset: int, nbytes: int) -> None:
        self.pieces.append((offset, nbytes))
        self.target[offset : offset + nbytes] = self.data[offset : offset + nbytes]

    def stale(self) -> list[int]:
        """Pages that differ from the copy and are not dirty."""
        return [
            start
            for start in range(0, SIZE, PAGE)
            if self.data[start : start + PAGE] != self.target[start : start + PAGE]
            and not self.bitmap.get(start)
        ]


@pytest.fixture
def disk() -> Disk:
    return Disk()


@contextmanager
def writers(disk: Disk) -> Any:
    """Two threads that write until the block ends, a little at a time."""
    going = True

    def write(seed: int) -> None:
        rng = Random(seed)
        while going:
            disk.write(rng.randrange(SIZE - 8), rng.randbytes(8))

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        going = False
        for thread in threads:
            thread.join()


def test_beside_writers_the_copy_equals_the_disk_while_they_are_paused(disk: Disk) -> None:
    equal = []

    @contextmanager
    def paused() -> Any:
        with disk.lock:
            yield
            equal.append(disk.data == disk.target)

    with writers(disk):
        done = live_copy(disk.bitmap, disk.copy, paused=paused(), max_rounds=5, piece=PAGE)
    assert equal == [True]
    assert done.complete
    assert done.paused_for > 0
    assert done.rounds[0] == SIZE
    assert done.nbytes == sum(nbytes for _, nbytes in disk.pieces)
    assert not disk.stale()


def test_a_plain_bitmap_serves_as_well() -> None:
    hb, source, target = HBitmap(SIZE, 12), bytearray(os.urandom(SIZE)), bytearray(SIZE)

    def copy(offset: int, nbytes: int) -> None:
        target[offset : offset + nbytes] = source[offset : offset + nbytes]

    hb.set(SIZE - 1)
    assert live_copy(hb, copy, paused=nullcontext()).rounds == [SIZE, 0]
    assert target == source
    source[5000] ^= 1
    hb.set(5000)
    assert live_copy(hb, copy, full=False, until=0) == LiveCopy([PAGE], False, 0.0)
    assert target == source


def test_pieces_have_at_most_the_size_asked_for(disk: Disk) -> None:
    disk.node.mark_dirty(PAGE, 3 * PAGE)
    live_copy(disk.bitmap, disk.copy, full=False, until=0, piece=2 * PAGE + 1)
    assert disk.pieces == [(PAGE, 2 * PAGE + 1), (3 * PAGE + 1, PAGE - 1)]


def test_little_is_left_for_the_pause_or_stays_dirty(disk: Disk) -> None:
    disk.node.mark_dirty(0, 3 * PAGE)
    kept = live_copy(disk.bitmap, disk.copy, full=False, until=3 * PAGE)
    assert kept == LiveCopy([], False, 0.0)
    assert disk.bitmap.count() == 3 * PAGE
    done = live_copy(disk.bitmap, disk.copy, full=False, until=3 * PAGE, paused=nullcontext())
    assert done.rounds == [3 * PAGE]
    assert disk.bitmap.count() == 0


def test_writers_that_are_too_fast_are_paused_after_so_many_rounds(disk: Disk) -> None:
    def copy(offset: int, nbytes: int) -> None:
        disk.copy(offset, nbytes)
        if not disk.lock.locked():
            disk.write(offset, b"x")

    done = live_copy(disk.bitmap, copy, paused=disk.lock, max_rounds=4, until=0)
    assert len(done.rounds) == 5
    assert disk.data == disk.target


def test_a_round_is_done_when_it_is_durable(disk: Disk) -> None:
    order: list[str] = []

    def copy(offset: int, nbytes: int) -> None:
        order.append("copy")

    def flush() -> None:
        order.append("flush")
        assert disk.bitmap.busy
        if len(order) > 3:
            raise OSError("the disk is full")

    live_copy(disk.bitmap, copy, flush=flush)
    assert order == ["copy", "flush"]
    disk.node.mark_dirty(0, 1)
    with pytest.raises(OSError, match="full"):
        live_copy(disk.bitmap, copy, flush=flush, full=False, until=0)
    assert list(disk.bitmap.areas()) == [(0, PAGE)]
    assert not disk.bitmap.busy


def test_a_copy_that_fails_is_made_up_for_by_the_next(disk: Disk) -> None:
    live_copy(disk.bitmap, disk.copy)
    for start in range(0, SIZE, 2 * PAGE):
        disk.write(start, b"new")
    fails = 5

    def copy(offset: int, nbytes: int) -> None:
        nonlocal fails
        fails -= 1
        if not fails:
            raise OSError("no route")
        disk.copy(offset, nbytes)

    with pytest.raises(OSError, match="no route"):
        live_copy(disk.bitmap, copy, full=False, until=0)
    assert not disk.stale()
    live_copy(disk.bitmap, copy, full=False, until=0)
    assert disk.data == disk.target


@pytest.mark.filterwarnings("ignore:frozen bitmaps were dropped")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_at_any_line_misses_nothing(disk: Disk) -> None:
    live_copy(disk.bitmap, disk.copy)
    rng = Random(1)

    def attempt() -> None:
        for start in range(0, SIZE, 8 * PAGE):
            disk.write(start, rng.randbytes(4))
        live_copy(disk.bitmap, disk.copy, full=False, until=0, paused=disk.lock, piece=PAGE)

    # Those of the management of bitmaps have tests of their own.
    for where in at_every_line(attempt, within="livecopy"):
        assert not disk.lock.locked(), where
        disk.bitmap.enable()  # puts back what was dropped
        assert not disk.stale(), where


def test_a_killed_copy_leaves_its_round_dirty(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pybitmap import BlockGraph
from pybitmap.livecopy import live_copy
from pybitmap.store import LocalStore

node = BlockGraph().add_node("disk", size={SIZE}, store=LocalStore({str(tmp_path / "s")!r}))
bitmap = node.add_bitmap("daily", granularity={PAGE}, persistent=True)
node.mark_dirty(0, 3 * {PAGE})

def copy(offset, nbytes):
    if offset:
        node.mark_dirty(10 * {PAGE}, 1)
        os.kill(os.getpid(), signal.SIGKILL)

live_copy(bitmap, copy, full=False, until=0, piece={PAGE})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    with BlockGraph() as graph:
        node = graph.add_node("disk", store=LocalStore(tmp_path / "s"))
        bitmap = node.bitmaps["daily"]
        assert list(bitmap.areas()) == [(0, 3 * PAGE), (10 * PAGE, PAGE)]


def test_progress_is_told(disk: Disk) -> None:
    told: list[Progress] = []
    disk.node.mark_dirty(0, 2 * PAGE)
    live_copy(
        disk.bitmap,
        lambda offset, nbytes: disk.node.mark_dirty(20 * PAGE, 1) if len(told) < 3 else None,
        full=False,
        until=PAGE,
        paused=nullcontext(),
        piece=PAGE,
        progress=told.append,
    )
    assert told == [
        Progress(1, 0, 2 * PAGE, 0, False),
        Progress(1, PAGE, 2 * PAGE, PAGE, False),
        Progress(1, 2 * PAGE, 2 * PAGE, 2 * PAGE, False),
        Progress(2, 0, PAGE, 2 * PAGE, True),
        Progress(2, PAGE, PAGE, 3 * PAGE, True),
    ]


def test_bandwidth_is_an_average_over_a_round(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = 0.0, []

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

        @staticmethod
        def sleep(seconds: float) -> None:
            nonlocal now
            slept.append(seconds)
            now += seconds

    def copy(offset: int, nbytes: int) -> None:
        nonlocal now
        now += 1.5 if offset == PAGE else 0.25  # seconds

    monkeypatch.setattr(pybitmap.livecopy, "time", Clock)
    disk.node.mark_dirty(0, 4 * PAGE)
    live_copy(disk.bitmap, copy, full=False, until=0, piece=PAGE, bandwidth=PAGE)
    assert slept == [0, 0.75, 0, 0.25, 0.75]
    assert now == 4.0
    slept.clear()
    disk.node.mark_dirty(0, 4 * PAGE)
    live_copy(disk.bitmap, copy, full=False, paused=nullcontext(), piece=PAGE, bandwidth=PAGE)
    assert slept == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"until": -1},
        {"max_rounds": 0},
        {"piece": 0},
        {"bandwidth": 0},
        {"bandwidth": -1.0},
        {"bandwidth": 1e-320},
        {"bandwidth": float("nan")},
    ],
)
def test_numbers_that_cannot_be_right_are_refused(disk: Disk, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidError, match=next(iter(wrong))):
        live_copy(disk.bitmap, disk.copy, **wrong)
    assert not disk.pieces


@contextmanager
def disabled(bitmap: DirtyBitmap) -> Any:
    bitmap.disable()
    yield


def test_a_bitmap_that_does_not_record_is_refused_whenever_that_is(disk: Disk) -> None:
    with pytest.raises(StateError, match="records no writes"):
        live_copy(disk.node.add_bitmap("off", disabled=True), disk.copy)
    assert not disk.pieces
    disk.node.mark_dirty(0, 1)
    with pytest.raises(StateError, match="records no writes"):
        live_copy(disk.bitmap, disk.copy, paused=disabled(disk.bitmap))


def test_a_pause_that_swallows_an_error_leaves_the_copy_incomplete(disk: Disk) -> None:
    disk.node.mark_dirty(0, 1)

    def copy(offset: int, nbytes: int) -> None:
        raise ZeroDivisionError

    done = live_copy(disk.bitmap, copy, full=False, paused=suppress(ZeroDivisionError))
    assert not done.complete
    assert list(disk.bitmap.areas()) == [(0, PAGE)]


@pytest.mark.parametrize("wrong", [None, {1, 2}, "disk"])
def test_what_says_nothing_of_writes_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="must be a DirtyBitmap"):
        live_copy(wrong, lambda offset, nbytes: None)


def test_nobody_is_paused_for_a_copy_that_fails_before(disk: Disk) -> None:
    class Paused(nullcontext[None]):
        entered = False

        def __enter__(self) -> None:
            self.entered = True

    def copy(offset: int, nbytes: int) -> None:
        raise ZeroDivisionError

    paused = Paused()
    with suppress(ZeroDivisionError):
        live_copy(disk.bitmap, copy, paused=paused)
    assert not paused.entered


def test_the_example_copies_a_disk_and_ram() -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[2] / "examples" / "live_copy.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.stderr.startswith("RAM cannot be tracked here"):
        lacking(done.stderr)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("the copy is the same") == 2
    assert "DIFFERENT" not in done.stdout
