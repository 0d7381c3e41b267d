# SPDX-License-Identifier: MIT
"""Writes between two marks: beside freezes, copies and kills, no change of data is missed."""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from lines import interrupted
from support import collect, run_python

from pybitmap import (
    BlockGraph,
    BlockNode,
    ClosedError,
    DirtyBitmap,
    RangeError,
    ReadonlyError,
    _core,
)
from pybitmap.store import LocalStore

pytestmark = pytest.mark.core

G = 512
GROUPS = 64
FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
SIZE = GROUPS * G


def a_node() -> tuple[BlockNode, DirtyBitmap]:
    node = BlockGraph().add_node("disk", SIZE)
    return node, node.add_bitmap("daily", G)


def areas(bitmap: DirtyBitmap) -> list[tuple[int, int]]:
    return list(bitmap.areas())


# ---- one write --------------------------------------------------------------


def test_a_mark_alone_is_not_enough() -> None:
    """What this is for: both orders lose the write."""
    node, bitmap = a_node()
    disk, backup = bytearray(SIZE), bytearray(SIZE)

    def back_up() -> None:
        with bitmap.freeze() as frozen:
            for offset, nbytes in bitmap.areas():
                backup[offset : offset + nbytes] = disk[offset : offset + nbytes]
            frozen.done()

    node.mark_dirty(0, 3)
    back_up()
    disk[0:3] = b"new"
    assert backup != disk
    assert not areas(bitmap)
    with node.writing(0, 3):
        back_up()
        disk[0:3] = b"new"
    assert areas(bitmap) == [(0, G)]


def test_a_range_is_marked_before_the_block_and_after_it() -> None:
    node, bitmap = a_node()
    with node.writing(G, 1):
        assert areas(bitmap) == [(G, G)]
        bitmap.clear()
    assert areas(bitmap) == [(G, G)]


@pytest.mark.parametrize("change", ["freeze", "clear", "add", "enable", "truncate"])
def test_what_begins_to_record_meanwhile_has_the_range(change: str) -> None:
    node, bitmap = a_node()
    other = node.add_bitmap("other", G, disabled=True)
    with node.writing(3 * G + 1, 2 * G):
        if change == "freeze":
            with bitmap.freeze() as frozen:
                frozen.done()
        elif change == "clear":
            bitmap.clear()
        elif change == "add":
            bitmap = node.add_bitmap("new", G)
        elif change == "enable":
            bitmap = other
            other.enable()
        else:
            node.truncate(2 * SIZE)
        assert areas(bitmap) == [(3 * G, 3 * G)]


def test_what_is_beyond_the_end_of_a_node_that_shrank_is_not_marked() -> None:
    node, bitmap = a_node()
    with node.writing(0, SIZE):
        node.truncate(G)
        assert areas(bitmap) == [(0, G)]
    assert areas(bitmap) == [(0, G)]
    with node.writing(0, 1):
        node.truncate(0)


def test_an_exception_in_the_block_goes_on_and_the_range_is_marked() -> None:
    node, bitmap = a_node()
    with pytest.raises(ZeroDivisionError), node.writing(0, 1):  # noqa: PT012
        bitmap.clear()
        bitmap.reset(0, G)
        raise ZeroDivisionError
    assert areas(bitmap) == [(0, G)]


def test_a_write_that_is_dropped_is_ended() -> None:
    node, bitmap = a_node()

    def generate() -> object:
        with node.writing(0, 1):
            yield

    generator = generate()
    next(generator)  # type: ignore[call-overload]
    bitmap.reset(0, G)
    del generator
    collect()
    assert areas(bitmap) == [(0, G)]
    bitmap.clear()
    assert not areas(bitmap)
    writing = node.writing(0, 1)
    writing.__enter__()
    bitmap.reset(0, G)
    del writing
    collect()
    assert areas(bitmap) == [(0, G)]


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(SIZE, 1), (0, SIZE + 1), (-1, 1), (0, -1), (1 << 64, 1), (0, 1 << 64)]
)
def test_a_write_outside_does_not_run(offset: int, nbytes: int) -> None:
    node, bitmap = a_node()
    ran = False
    text = "is not inside node 'disk'"
    with pytest.raises(RangeError, match=text), node.writing(offset, nbytes):
        ran = True
    assert not ran
    bitmap.clear()
    assert not areas(bitmap)


def test_an_empty_write_runs() -> None:
    node, bitmap = a_node()
    with node.writing(SIZE, 0):
        pass
    assert not areas(bitmap)


def test_a_read_only_node_is_not_written_to() -> None:
    node = BlockGraph().add_node("disk", SIZE, read_only=True)
    with pytest.raises(ReadonlyError), node.writing(0, 1):
        raise AssertionError("it ran")


def test_a_node_that_is_closed_meanwhile_has_stored_the_range(tmp_path: Path) -> None:
    graph = BlockGraph()
    node = graph.add_node("disk", SIZE, LocalStore(tmp_path / "store"))
    bitmap = node.add_bitmap("daily", G, persistent=True)
    with pytest.raises(ClosedError), node.writing(0, 1):  # noqa: PT012
        bitmap.clear()
        graph.close()
    with pytest.raises(ClosedError), node.writing(0, 1):
        raise AssertionError("it ran")
    with BlockGraph() as graph:
        node = graph.add_node("disk", None, LocalStore(tmp_path / "store"))
        assert areas(node.bitmaps["daily"]) == [(0, G)]


def test_a_write_is_begun_once() -> None:
    node, _ = a_node()
    writing = node.writing(0, 1)
    with writing, pytest.raises(RuntimeError), writing:
        pass


def test_writes_nest_and_overlap() -> None:
    node, bitmap = a_node()
    with node.writing(0, 1), node.writing(0, 2 * G), node.writing(G, 1):
        bitmap.clear()
        assert areas(bitmap) == [(0, 2 * G)]


# ---- before -----------------------------------------------------------------


def test_before_is_called_once_for_what_a_frozen_bitmap_has() -> None:
    node, bitmap = a_node()
    node.mark_dirty(G, 4 * G)
    seen: list[tuple[DirtyBitmap, int, int]] = []

    def before(*args: object) -> None:
        seen.append(args)  # type: ignore[arg-type]

    with node.writing(0, SIZE, before):
        assert not seen  # nothing is frozen
    bitmap.clear()
    node.mark_dirty(G, 4 * G)
    with bitmap.freeze():
        for offset, nbytes in ((2 * G + 7, 1), (2 * G, G), (0, 3 * G), (0, SIZE), (0, 0)):
            with node.writing(offset, nbytes, before):
                pass
    assert seen == [(bitmap, 2 * G, G), (bitmap, G, G), (bitmap, 3 * G, 2 * G)]
    seen.clear()
    with bitmap.freeze(), node.writing(0, 1, before):
        assert seen == [(bitmap, 0, G)]


def test_a_block_does_not_run_if_before_raises_and_the_next_write_calls_it_again() -> None:
    node, bitmap = a_node()
    node.mark_dirty(0, 1)
    calls = []

    def before(*args: object) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise OSError("no space")

    with bitmap.freeze() as frozen:
        with pytest.raises(OSError, match="no space"), node.writing(0, 1, before):
            raise AssertionError("it ran")
        with node.writing(0, 1, before):
            pass
        frozen.done()
    assert len(calls) == 2
    assert areas(bitmap) == [(0, G)]


def test_before_is_not_called_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A freeze begins at any line of a write, and its instant comes as late as it can.

    What `before` copies ahead of the instant is not what the disk has at the instant.
    """
    number = 1
    while _a_freeze_begins_at(number, monkeypatch):
        number += 1
    assert number > 10


def _a_freeze_begins_at(number: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """
    :returns: is there such a line?
    """
    node, bitmap = a_node()
    node.mark_dirty(0, 1)
    under_way, written, leave = threading.Event(), threading.Event(), threading.Event()
    publish = _core.hbtracker_publish_all
    moments = []

    def late(*args: object) -> None:
        under_way.set()
        written.wait(0.02)
        publish(*args)  # type: ignore[arg-type]
        moments.append("the instant")

    def freeze() -> None:
        with bitmap.freeze():
            leave.wait()

    def before(*_: object) -> None:
        written.set()
        moments.append("before")

    thread = threading.Thread(target=freeze)

    def begin() -> None:
        monkeypatch.setattr(_core, "hbtracker_publish_all", late)
        thread.start()
        under_way.wait(0.05)

    with interrupted(number, within="block", do=begin) as lines:
        with node.writing(0, 1, before):
            written.set()
        sys.settrace(None)
    monkeypatch.undo()
    leave.set()
    if lines.came:
        thread.join()
    assert "before" not in moments or moments[0] == "the instant", lines.where
    return bool(lines.came)


def test_a_handler_that_writes_amid_a_freeze_of_its_own_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At any line of it: the frozen bitmap's copy is the disk as it was at the instant."""
    publish = _core.hbtracker_publish_all
    disk, at_instant, copied = [0], [0], list[int]()

    def note(*args: object) -> None:
        at_instant[0] = disk[0]
        publish(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(_core, "hbtracker_publish_all", note)
    number, came = 1, True
    while came:
        node, bitmap = a_node()
        node.mark_dirty(0, 1)
        disk[0], at_instant[0] = number, -1
        copied.clear()

        def write(node: BlockNode = node) -> None:
            with node.writing(0, 1, lambda *_: copied.append(disk[0])):
                disk[0] = -1

        with interrupted(number, within="block", do=write) as lines:
            frozen = bitmap.freeze()
            sys.settrace(None)
        if at_instant[0] == -1:
            at_instant[0] = disk[0]
        assert [*copied, disk[0]][0] == at_instant[0], lines.where
        came = lines.came
        frozen.close()
        number += 1
    assert number > 50


def test_a_copy_with_before_is_of_one_instant() -> None:
    """A writer writes i into group i % GROUPS; a copy is the disk after some number of writes."""
    node, bitmap = a_node()
    disk = [0] * GROUPS
    backup = [0] * GROUPS
    stop = threading.Event()
    lock = threading.Lock()

    def copy(_: object, offset: int, nbytes: int) -> None:
        with lock:
            for group in range(offset // G, (offset + nbytes) // G):
                if group not in copied:
                    copied.add(group)
                    backup[group] = disk[group]

    def write() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            with node.writing(i % GROUPS * G, G, copy):
                disk[i % GROUPS] = i

    copied: set[int] = set()
    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(150):
            copied.clear()
            with bitmap.freeze() as frozen:
                for offset, nbytes in bitmap.areas():
                    for at in range(offset, offset + nbytes, G):
                        copy(bitmap, at, G)
                        time.sleep(0)
                frozen.done()
            last = max(backup)
            # The write that was open at the instant may be in it or not.
            assert any(backup == after(k) for k in (last - 1, last, last + 1) if k >= 0), backup
    finally:
        stop.set()
        thread.join()


def after(k: int) -> list[int]:
    """The disk after k writes."""
    return [max(range(group, k + 1, GROUPS), default=0) for group in range(GROUPS)]


# ---- threads, kills, signals ------------------------------------------------


def test_backups_beside_writers_miss_nothing(tmp_path: Path) -> None:
    """The last backup plus what is dirty is the file, after any number of rounds."""
    node, bitmap = a_node()
    disk = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    backup = os.open(tmp_path / "backup", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(disk, SIZE)
        os.ftruncate(backup, SIZE)
        stop = threading.Event()

        def write(seed: int) -> None:
            rng = random.Random(seed)
            while not stop.is_set():
                offset = rng.randrange(SIZE - 8)
                with node.writing(offset, 8):
                    os.pwrite(disk, rng.randbytes(8), offset)

        threads = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for round_number in range(200):
            with suppress(ZeroDivisionError), bitmap.freeze() as frozen:
                for offset, nbytes in bitmap.areas():
                    os.pwrite(backup, os.pread(disk, nbytes, offset), offset)
                if round_number % 5 == 4:
                    raise ZeroDivisionError
                frozen.done()
        stop.set()
        for thread in threads:
            thread.join()
        assert missed(os.pread(disk, SIZE, 0), os.pread(backup, SIZE, 0), bitmap) == []
    finally:
        os.close(disk)
        os.close(backup)


def missed(disk: bytes, backup: bytes, bitmap: DirtyBitmap) -> list[int]:
    """Groups that are neither in the backup nor dirty."""
    return [
        offset
        for offset in range(0, SIZE, G)
        if disk[offset : offset + G] != backup[offset : offset + G] and not bitmap.get(offset)
    ]


def child(folder: Path, seed: int) -> None:
    """Writes and backs up until it is killed."""
    sys.setswitchinterval(1e-4)
    rng = random.Random(seed)
    with open(folder / "disk", "r+b") as a, open(folder / "backup", "r+b") as b:
        disk, backup = mmap.mmap(a.fileno(), SIZE), mmap.mmap(b.fileno(), SIZE)
        graph = BlockGraph()
        node = graph.add_node("disk", SIZE, LocalStore(folder / "store"))
        bitmap = node.bitmaps["daily"]

        def write(seed: int) -> None:
            rng = random.Random(seed)
            while True:
                offset = rng.randrange(SIZE - 8)
                with node.writing(offset, 8):
                    disk[offset : offset + 8] = rng.randbytes(8)

        for _ in range(2):
            threading.Thread(target=write, args=(rng.random(),), daemon=True).start()
        while True:
            with bitmap.freeze() as frozen:
                for offset, nbytes in bitmap.areas():
                    backup[offset : offset + nbytes] = disk[offset : offset + nbytes]
                frozen.done()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_kill_misses_nothing(tmp_path: Path) -> None:
    """In a process of its own, since it forks."""
    code = f"""
import sys
sys.path[:0] = {FOLDERS!r}
from pathlib import Path
from test_writing import kill_rounds
kill_rounds(Path({str(tmp_path)!r}), 25)
"""
    assert run_python(code).strip() == "25 kills"


def kill_rounds(folder: Path, rounds: int) -> None:
    rng = random.Random(1)
    for name in ("disk", "backup"):
        (folder / name).write_bytes(bytes(SIZE))
    with BlockGraph() as graph:
        node = graph.add_node("disk", SIZE, LocalStore(folder / "store"))
        node.add_bitmap("daily", G, persistent=True)
    for number in range(rounds):
        pid = os.fork()
        if pid == 0:
            try:
                child(folder, number)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.01, 0.15))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), status
        with BlockGraph() as graph:
            node = graph.add_node("disk", None, LocalStore(folder / "store"))
            disk, backup = (folder / "disk").read_bytes(), (folder / "backup").read_bytes()
            found = missed(disk, backup, node.bitmaps["daily"])
            assert not found, f"round {number}: {found}"
    print(f"{rounds} kills")


INTERRUPTED = """
import random, signal
from pybitmap import BlockGraph

armed = False

def interrupt(*_):
    # The interpreter may handle a signal later than it came, even after the timer is stopped.
    if armed:
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
node = BlockGraph().add_node("disk", 1 << 20)
bitmap = node.add_bitmap("daily", 512)
interrupted = 0
for _ in range(4000):
    wrote = False
    try:
        bitmap.clear()
        armed = True
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-5))
        try:
            with node.writing(0, 1):
                bitmap.reset(0, 512)
                wrote = True
                for _ in range(10):
                    pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt as error:
        interrupted += 1
        error.__traceback__ = None
    armed = False
    assert not wrote or bitmap.get(0)
assert interrupted > 100, interrupted
bitmap.clear()
assert not bitmap.get(0), "a write is open still"
print("ok")
"""


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="relies on counted references")
def test_an_interruption_anywhere_leaves_the_range_marked_and_no_write_open() -> None:
    assert run_python(INTERRUPTED).strip() == "ok"
