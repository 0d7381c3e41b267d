# SPDX-License-Identifier: MIT
"""Snapshot: memory is copied, and what is dirty is brought back."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import collect as collect_garbage
from tracked import (
    PAGE,
    CalledAt,
    Interruption,
    address_of,
    descriptors,
    in_child,
    interrupted,
    mapped,
    need_tracker,
    pages,
    poke,
    private,
    unmap,
)

from pybitmap import ClosedError, HBitmap, InvalidError, MismatchError, StoreError, _core
from pybitmap.trackers import MemoryTracker, Snapshot

GRANULARITY = PAGE.bit_length() - 1


@pytest.mark.parametrize("granularity", [0, 5, GRANULARITY, GRANULARITY + 3])
@pytest.mark.parametrize("nbytes", [0, 1, PAGE - 1, PAGE, PAGE + 1, 33 * PAGE + 100])
def test_what_is_dirty_is_restored_and_nothing_else(nbytes: int, granularity: int) -> None:
    rng = random.Random(nbytes + granularity)
    memory = bytearray(rng.randbytes(nbytes))
    before = bytes(memory)
    with Snapshot(memory) as kept:
        assert kept.size == nbytes
        assert kept.data == before
        memory[:] = after = rng.randbytes(nbytes)
        dirty = HBitmap(nbytes, granularity)
        for _ in range(4):
            if nbytes:
                start = rng.randrange(nbytes)
                dirty.set(start, rng.randrange(1, min(nbytes - start, 2 * PAGE) + 1))
        assert kept.restore(dirty) == dirty.count(0)
        for start, count in dirty.areas():
            assert memory[start : start + count] == before[start : start + count]
        clean = HBitmap(nbytes, granularity)
        clean.set(0, nbytes)
        clean -= dirty
        for start, count in clean.areas():
            assert memory[start : start + count] == after[start : start + count]
        assert kept.data == before


def test_an_update_takes_over_what_is_dirty() -> None:
    memory = bytearray(b"abcdefgh")
    with Snapshot(memory) as kept:
        data = kept.data
        memory[:] = b"ABCDEFGH"
        dirty = HBitmap(8)
        dirty.set(2, 3)
        assert kept.update(dirty) == 3
        assert bytes(data) == b"abCDEfgh"
        dirty.set(0, 8)
        assert kept.restore(dirty) == 8
        assert memory == b"abCDEfgh"


def resident(address: int, npages: int) -> int:
    """Pages there that take memory."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(8 * (address // PAGE))
        return sum(entry >> 63 for entry in array("Q", file.read(8 * npages)))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc/self/pagemap")
def test_pages_that_are_zero_take_no_memory() -> None:
    ram = private(10_000)
    ram[5 * PAGE] = ram[9_999 * PAGE + 1] = 1
    ram[7 * PAGE : 9 * PAGE] = bytes(2 * PAGE)
    with Snapshot(ram) as kept:
        assert kept._arrays is not None
        assert resident(_core.address(kept._arrays[1]), 10_000) == 2
        assert bytes(kept.data) == ram[:]


def test_the_copy_is_only_to_be_read_and_a_view_outlives_the_snapshot() -> None:
    memory = bytearray(b"abc")
    kept = Snapshot(memory)
    view = kept.data
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    kept.close()
    kept.close()
    assert kept.closed
    assert bytes(view) == b"abc"
    for call in (kept.restore, kept.update):
        with pytest.raises(ClosedError):
            call(HBitmap(3))
    with pytest.raises(ClosedError):
        kept.data  # noqa: B018
    with pytest.raises(ClosedError), kept:
        pass
    assert repr(kept).endswith(", closed>")


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy's bytearray grows all the same")
def test_the_buffer_is_held_until_close_or_drop() -> None:
    memory = bytearray(b"abc")
    kept = Snapshot(memory)
    with pytest.raises(BufferError):
        memory.append(1)
    kept.close()
    memory.append(1)
    kept = Snapshot(memory)
    del kept
    collect_garbage()
    memory.append(1)


def test_any_writable_buffer_will_do_and_others_are_refused() -> None:
    numbers = array("Q", [1, 2, 3])
    with Snapshot(numbers) as kept:
        numbers[1] = 7
        dirty = HBitmap(24)
        dirty.set(8, 8)
        kept.restore(dirty)
        assert list(numbers) == [1, 2, 3]
    for wrong in (b"abc", memoryview(bytearray(3)).toreadonly(), 3, None):
        with pytest.raises(TypeError):
            Snapshot(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidError, match="contiguous"):
        Snapshot(memoryview(bytearray(9))[::2])


def test_bitmaps_that_do_not_fit_are_refused_and_change_nothing() -> None:
    memory = bytearray(100)
    with Snapshot(memory) as kept:
        memory[:] = b"x" * 100
        for size in (99, 101):
            dirty = HBitmap(size)
            dirty.set(0, size)
            for call in (kept.restore, kept.update):
                with pytest.raises(MismatchError, match="one for each"):
                    call(dirty)
        for wrong in ({1}, None, memory):
            with pytest.raises(TypeError):
                kept.restore(wrong)  # type: ignore[arg-type]
        assert memory == b"x" * 100
        assert kept.data == bytes(100)


def test_memory_that_has_an_address_only() -> None:
    address = mapped(3)
    poke(address + PAGE, 5)
    with Snapshot.at(address, 3 * PAGE) as kept:
        poke(address + PAGE, 6)
        dirty = HBitmap(3 * PAGE, GRANULARITY)
        dirty.set(PAGE)
        assert kept.restore(dirty) == PAGE
        assert ctypes.string_at(address + PAGE, 1) == b"\5"
    with pytest.raises(InvalidError, match="there is no memory"):
        Snapshot.at(-1, 5)
    unmap(address, 3)


# ---- with a tracker -------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="others may answer another signal")
@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_file_that_was_truncated_ends_the_process(cut: str, tmp_path: Path) -> None:
    """As the docstring says, when it is copied and when it is brought back."""
    code = f"""
import mmap, os
from pybitmap import HBitmap
from pybitmap.trackers import Snapshot
dirty = HBitmap(4 * mmap.PAGESIZE)
dirty.set(0, dirty.size)
with open({str(tmp_path / "ram")!r}, "wb+") as file:
    file.write(bytes(dirty.size - 1) + b"x")
    file.flush()
    with mmap.mmap(file.fileno(), dirty.size) as ram:
        if {cut!r} == "before":
            os.truncate(file.fileno(), mmap.PAGESIZE)
        kept = Snapshot(ram)
        os.truncate(file.fileno(), mmap.PAGESIZE)
        print("copied", flush=True)
        kept.restore(dirty)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == -signal.SIGBUS, done.stderr
    assert done.stdout == ("copied\n" if cut == "after" else "")


def test_a_tracker_reports_what_was_restored() -> None:
    need_tracker()
    ram = private(20)
    with MemoryTracker(ram) as tracker, Snapshot(ram) as kept:
        ram[3 * PAGE] = ram[5 * PAGE] = 1
        assert kept.restore(tracker.collect()) == 2 * PAGE
        assert pages(tracker.collect()) == [3, 5]
        assert pages(tracker.collect()) == []


def test_a_rewind_brings_back_what_was_written_and_forgets_it() -> None:
    need_tracker()
    ram = private(20)
    with MemoryTracker(ram) as tracker, Snapshot(ram) as kept:
        for case in range(5):  # what was restored before is not restored again
            ram[case * PAGE] = 1
            assert kept.rewind(tracker) == PAGE
            assert ram[:] == bytes(20 * PAGE)
        assert kept.rewind(tracker) == 0
        assert tracker.collect().empty()
        ram[4 * PAGE] = 1  # where it was restored: recorded again
        assert pages(tracker.collect()) == [4]


def test_a_rewind_brings_back_what_was_collected_and_put_back_too() -> None:
    need_tracker()
    ram = private(20)
    with MemoryTracker(ram) as tracker, Snapshot(ram) as kept:
        ram[3 * PAGE] = 1
        with tracker.taking():
            pass
        ram[9 * PAGE] = 1
        assert kept.rewind(tracker) == 2 * PAGE
        assert ram[:] == bytes(20 * PAGE)
        assert tracker.collect().empty()


def test_the_end_within_a_page_is_compared_up_to_there() -> None:
    need_tracker()
    ram = private(2)
    part = memoryview(ram)[: PAGE + 10]
    with MemoryTracker(part) as tracker, Snapshot(part) as kept:
        ram[PAGE + 5] = ram[PAGE + 50] = 1
        assert kept.rewind(tracker) == 10
        assert tracker.collect().empty()
        assert (ram[PAGE + 5], ram[PAGE + 50]) == (0, 1)


def test_a_tracker_of_other_memory_is_refused() -> None:
    need_tracker()
    ram, other = private(4), private(4)
    with memoryview(ram) as view, Snapshot(ram) as kept:
        for memory in (other, view[PAGE:], view[: 2 * PAGE]):
            with MemoryTracker(memory) as tracker:
                ram[0] = 1
                with pytest.raises(MismatchError, match="the tracker is of"):
                    kept.rewind(tracker)
                assert ram[0] == 1
        with MemoryTracker(ram) as tracker:
            pass
        with pytest.raises(ClosedError):
            kept.rewind(tracker)
        for wrong in (HBitmap(len(ram)), ram, None):
            with pytest.raises(TypeError):
                kept.rewind(wrong)  # type: ignore[arg-type]


def test_a_rewind_of_memory_that_was_unmapped_is_an_error_and_touches_nothing() -> None:
    need_tracker()
    address = mapped(4)
    with MemoryTracker.at(address, 4 * PAGE) as tracker, Snapshot.at(address, 4 * PAGE) as kept:
        poke(address)
        unmap(address + 2 * PAGE, 1)
        with pytest.raises(StoreError, match="no longer mapped"):
            kept.rewind(tracker)
        assert ctypes.string_at(address, 1) == b"\1"
    unmap(address, 2)
    unmap(address + 3 * PAGE, 1)


def test_what_is_written_while_it_is_restored_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the look, where it was restored already and elsewhere."""
    need_tracker()
    ram = private(20)
    copy_areas = _core.hbitmap_copy_areas

    def beside(*args: Any) -> int:
        copied = copy_areas(*args)
        ram[3 * PAGE] = ram[7 * PAGE] = 1
        ram[9 * PAGE] = 0  # as it is in the snapshot
        return copied

    with MemoryTracker(ram) as tracker, Snapshot(ram) as kept:
        ram[3 * PAGE] = ram[5 * PAGE] = 2
        with monkeypatch.context() as patch:
            patch.setattr(_core, "hbitmap_copy_areas", beside)
            assert kept.rewind(tracker) == 2 * PAGE
        assert pages(tracker.collect()) == [3, 7]


def test_beside_a_writer_what_differs_is_reported() -> None:
    """Whatever is written while it is restored: the page is as in the snapshot, or dirty."""
    need_tracker()
    npages = 512
    ram = private(npages)
    base, left = address_of(ram), 0
    with MemoryTracker(ram) as tracker, Snapshot(ram) as kept:
        for _ in range(40):
            writer = threading.Thread(target=ctypes.memset, args=(base, 1, len(ram)))
            writer.start()  # without the GIL
            while writer.is_alive():
                kept.rewind(tracker)
            writer.join()
            dirty = tracker.collect()
            for page in range(npages):
                if any(ram[page * PAGE : (page + 1) * PAGE]):
                    assert dirty.get(page * PAGE), page
                    left += 1
            kept.restore(dirty)
            kept.rewind(tracker)
            assert ram[:] == bytes(len(ram))
    assert left or os.cpu_count() == 1


# ---- visitors -------------------------------------------------------------------------------


def test_the_child_of_a_fork_has_a_snapshot_of_its_own() -> None:
    memory = bytearray(b"abc")
    with Snapshot(memory) as kept:
        everything = HBitmap(3)
        everything.set(0, 3)

        def child() -> None:
            memory[:] = b"xyz"
            kept.update(everything)
            memory[:] = b"123"
            kept.restore(everything)
            assert memory == b"xyz"

        in_child(child)
        memory[:] = b"..."
        kept.restore(everything)
        assert memory == b"abc"


def test_memory_that_is_shared_is_restored_for_the_parent_too() -> None:
    ram = mmap.mmap(-1, PAGE)
    ram[0] = 1
    with Snapshot(ram) as kept:
        everything = HBitmap(PAGE)
        everything.set(0, PAGE)
        ram[0] = 2
        in_child(lambda: kept.restore(everything))
        assert ram[0] == 1


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="relies on counted references")
@pytest.mark.filterwarnings("ignore:a tracker of .* was dropped:ResourceWarning")
@pytest.mark.filterwarnings("ignore:what was taken from a bitmap was dropped:ResourceWarning")
def test_an_interruption_at_any_line_leaves_all_or_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_tracker()
    # One that comes in a finalizer goes nowhere; pytest's own hook would keep its frames.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    for at in range(1000):
        memory = private(4)
        dirty = HBitmap(len(memory), GRANULARITY)
        dirty.set(PAGE, PAGE)
        whole = False
        with suppress(Interruption), interrupted(at) as where:
            with MemoryTracker(memory) as tracker, Snapshot(memory) as kept:
                memory[PAGE] = memory[2 * PAGE] = 1
                kept.rewind(tracker)
                assert memory[PAGE] == 0
            whole = True
        assert memory[PAGE] == memory[0] == 0 or memory[PAGE] == memory[2 * PAGE] == 1, where
        tracker = kept = None  # type: ignore[assignment]
        assert descriptors() == [], where
        memory.close()  # it was given back
        if whole:
            break
    assert at > 60


def test_a_close_while_another_thread_restores_leaves_whole_copies() -> None:
    nbytes = 1 << 16
    everything = HBitmap(nbytes)
    everything.set(0, nbytes)
    for _ in range(5):
        memory = bytearray(os.urandom(16)) * (nbytes // 16)
        kept = Snapshot(memory)
        ended: list[str] = []

        def restore(kept: Snapshot = kept, ended: list[str] = ended) -> None:
            try:
                while True:
                    kept.restore(everything)
            except BaseException as error:
                ended.append(type(error).__name__)

        thread = threading.Thread(target=restore)
        thread.start()
        kept.close()
        thread.join()
        assert ended == [ClosedError.__name__]
        collect_garbage()
        memory.append(1)


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="relies on counted references")
def test_a_handler_that_closes_it_in_the_middle_gets_a_clean_error() -> None:
    for at in range(200):
        memory = bytearray(b"abc")
        kept = Snapshot(memory)
        everything = HBitmap(3)
        everything.set(0, 3)
        memory[:] = b"xyz"
        expected = b"xyz"
        done = CalledAt(at, kept.close)
        with suppress(ClosedError), done:
            kept.restore(everything)
            expected = b"abc"
        assert bytes(memory) == expected, at
        if not done.called:
            break
        memory.append(1)
    assert at > 5
