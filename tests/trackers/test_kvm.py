# SPDX-License-Identifier: MIT
"""KvmDirtyLog and KvmDirtyRing: a guest writes, each of its writes is in one collect.

Kill has no test: log and rings are the machine's, KVM lets that go with its process, and nothing is
left that the next program could find.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Union

import preload
import pytest
from guest import CAP_MANUAL, ENTRIES, MANUAL, PAGE, PROGRAM_SLOT, Machine, Processor
from lines import at_every_line
from peers import lacking
from support import collect, run_python

from pybitmap import ClosedError, HBitmap, InvalidError, StateError, StoreError, _core
from pybitmap.livecopy import live_copy
from pybitmap.trackers import KvmDirtyLog, KvmDirtyRing

Made = Union[KvmDirtyLog, KvmDirtyRing]

NPAGES = 300
SIZE = NPAGES * PAGE


def pages(hb: HBitmap) -> list[int]:
    return [start // PAGE for start in hb]


def offsets(*numbers: int) -> list[int]:
    """One in each of these pages, the last ones too."""
    return [number * PAGE + (number * 4) % PAGE for number in numbers]


def ring_of(machine: Machine, **more: Any) -> KvmDirtyRing:
    slots = {
        slot: (at, len(memory))
        for slot, (at, memory) in machine.slots.items()
        if slot != PROGRAM_SLOT
    }
    return KvmDirtyRing(machine.fd, [each.fd for each in machine.processors], slots, **more)


def log_of(machine: Machine, **more: Any) -> KvmDirtyLog:
    return KvmDirtyLog(machine.fd, 0, len(machine.memory), **more)


def plain_log_of(machine: Machine) -> KvmDirtyLog:
    return log_of(machine, manual=False)


KINDS: dict[str, Callable[[Machine], Made]] = {
    "log": log_of,
    "plain log": plain_log_of,
    "ring": ring_of,
}


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Callable[[Machine], Made]:
    made: Callable[[Machine], Made] = KINDS[request.param]
    return made


@pytest.fixture
def machine(make: Callable[[Machine], Made]) -> Iterator[Machine]:
    """One of the kind that is to be made."""
    with Machine(SIZE, processors=2, ring=ENTRIES if make is ring_of else 0) as machine:
        yield machine


@pytest.fixture
def logged() -> Iterator[Machine]:
    with Machine(SIZE) as machine:
        yield machine


@pytest.fixture
def ringed() -> Iterator[Machine]:
    with Machine(SIZE, processors=2, ring=ENTRIES) as machine:
        yield machine


def descriptors() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of listdir
            found.append(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return sorted(found)


# ---- what is collected ----------------------------------------------------------------------


def test_each_page_that_the_guest_writes_to_is_in_one_collect(
    machine: Machine, make: Callable[[Machine], Made]
) -> None:
    with make(machine) as tracker:
        assert (tracker.size, 1 << tracker.granularity) == (SIZE, PAGE)
        assert pages(tracker.collect()) == []
        machine.write(offsets(299, 0, 5, 64, 63), 7)
        assert pages(tracker.collect()) == [0, 5, 63, 64, 299]
        assert pages(tracker.collect()) == []
        machine.write(offsets(5, 6), 8)  # once more
        machine.processors[1].write(offsets(6, 100), 8)
        assert pages(tracker.collect()) == [5, 6, 100]
        assert pages(tracker.collect()) == []


def test_what_was_written_before_is_in_the_first_collect(
    machine: Machine, make: Callable[[Machine], Made]
) -> None:
    machine.write(offsets(3), 7)
    with make(machine) as tracker:
        machine.write(offsets(4), 7)
        assert pages(tracker.collect()) == [3, 4]


@pytest.mark.parametrize("npages", [1, 2, 63, 64, 65, 127, 128, 4095, 4096, 4097, 32768, 32833])
@pytest.mark.parametrize("manual", [True, False])
def test_slots_of_any_size(npages: int, manual: bool) -> None:
    written = sorted({0, npages // 2, max(npages - 2, 0), npages - 1})
    with Machine(npages * PAGE) as machine, log_of(machine, manual=manual) as tracker:
        for again in range(2):
            machine.write(offsets(*written), again)
            assert pages(tracker.collect()) == written
            assert pages(tracker.collect()) == []


def test_what_is_cleared_by_several_calls() -> None:
    """A GiB is cleared at a time; the bits of both ends of each."""
    gib = (1 << 30) // PAGE
    written = [0, 1, gib - 1, gib, gib + 63, gib + 64, gib + 66]
    with Machine((gib + 67) * PAGE) as machine, log_of(machine) as tracker:
        for _ in range(2):
            machine.write(offsets(*written), 1)
            assert pages(tracker.collect()) == written
            machine.write(offsets(gib + 66), 1)
            assert pages(tracker.collect()) == [gib + 66]
            assert pages(tracker.collect()) == []


def test_slots_have_their_places_in_one_bitmap(
    machine: Machine, make: Callable[[Machine], Made]
) -> None:
    """The second lies at another address in the guest than in the bitmap."""
    at, first, size = 1 << 28, 1000 * PAGE, 1200 * PAGE + 5
    machine.add_slot(1, at, 100 * PAGE)
    into = HBitmap(size, 12)
    if make is ring_of:
        slots = {0: (0, SIZE), 1: (first, 100 * PAGE)}
        fds = [each.fd for each in machine.processors]
        trackers: list[Made] = [KvmDirtyRing(machine.fd, fds, slots, size=size)]
    else:
        manual = make is log_of
        trackers = [
            KvmDirtyLog(machine.fd, 0, SIZE, size=size, manual=manual),
            KvmDirtyLog(machine.fd, 1, 100 * PAGE, first, size=size, manual=manual),
        ]
    machine.write([5 * PAGE, at, at + 99 * PAGE], 1)
    for tracker in trackers:
        tracker.collect(into)
        assert not tracker.collect()
    assert pages(into) == [5, 1000, 1099]
    coarse = HBitmap(size, 16)
    machine.write([at + PAGE], 1)
    for tracker in trackers:
        tracker.collect(coarse)
        tracker.close()
    assert list(coarse) == [1001 * PAGE >> 16 << 16]


def test_writes_of_the_host_are_not_in_what_kvm_has(
    machine: Machine, make: Callable[[Machine], Made], tmp_path: Path
) -> None:
    """As the docstrings say; whoever makes them marks them."""
    file = tmp_path / "disk"
    file.write_bytes(b"data" * 1024)
    with make(machine) as tracker:
        machine.memory[0:4] = b"host"
        with file.open("rb", buffering=0) as disk:
            disk.readinto(memoryview(machine.memory)[PAGE : 2 * PAGE])
        assert pages(tracker.collect()) == []
        machine.write(offsets(0), 1)  # such a write changes nothing for the guest's
        assert pages(tracker.collect()) == [0]


def test_logs_that_begin_later_begin_with_all_pages_if_that_is_said() -> None:
    for initially_set, expected in (False, []), (True, list(range(10))):
        with Machine(SIZE) as machine, log_of(machine, initially_set=initially_set) as tracker:
            assert not tracker.collect()
            machine.add_slot(1, 1 << 28, 10 * PAGE)
            with KvmDirtyLog(machine.fd, 1, 10 * PAGE, initially_set=initially_set) as later:
                assert pages(later.collect()) == expected
                machine.write([(1 << 28) + 3 * PAGE], 1)
                assert pages(later.collect()) == [3]


def test_a_machine_that_was_set_to_manual_before(logged: Machine) -> None:
    logged.enable(CAP_MANUAL, MANUAL)
    logged.write(offsets(3), 1)
    with log_of(logged) as tracker:
        assert pages(tracker.collect()) == [3]
        assert pages(tracker.collect()) == []


# ---- beside the machine ---------------------------------------------------------------------


class Running:
    """``with``: processors write to pages at random, and count up what they write."""

    def __init__(self, processors: Iterable[Processor], npages: int, at_once: int = 500) -> None:
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(each, npages, at_once, number))
            for number, each in enumerate(processors)
        ]

    def _write(self, processor: Processor, npages: int, at_once: int, number: int) -> None:
        rng = random.Random(number)
        value = 0
        while not self._stop.is_set():
            value += 1
            processor.write(
                [rng.randrange(npages) * PAGE + 4 * number for _ in range(at_once)], value
            )

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Copy:
    """What a migration has at the other end."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.data = bytearray(len(memory))
        self._lock = threading.Lock()

    def take(self, written: HBitmap) -> int:
        with self._lock:  # of two that copy a page, the later one has the later data
            return written.copy_areas(self.data, self.memory)

    def check(self) -> None:
        wrong = [
            at // PAGE
            for at in range(0, len(self.data), PAGE)
            if self.data[at : at + PAGE] != self.memory[at : at + PAGE]
        ]
        assert not wrong, f"lost: {wrong}"


@pytest.mark.parametrize("collectors", [1, 2])
def test_a_copy_beside_running_processors_has_every_write(
    machine: Machine, make: Callable[[Machine], Made], collectors: int
) -> None:
    with make(machine) as tracker:
        copy = Copy(machine.memory)

        def collecting() -> None:
            for _ in range(60):
                copy.take(tracker.collect())

        machine.when_full = lambda: copy.take(tracker.collect())
        for _ in range(3):
            with Running(machine.processors, NPAGES):
                threads = [threading.Thread(target=collecting) for _ in range(collectors)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            copy.take(tracker.collect())
            copy.check()


HOOKED = r"""
import os, sys
sys.path.insert(0, {support!r})
import ctypes
from guest import PAGE, Machine
from pybitmap import HBitmap
from pybitmap.errors import StateError, StoreError
from pybitmap.trackers import KvmDirtyLog, KvmDirtyRing

hooked = ctypes.CDLL({library!r})
HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_ulong)
ring = {ring}
REQUEST = 0xAEC7 if ring else 0xC018AEC0     # KVM_RESET_DIRTY_RINGS, KVM_CLEAR_DIRTY_LOG

SIZE = 2000 * PAGE
machine = Machine(SIZE, ring=1024 * ring)
if ring:
    tracker = KvmDirtyRing(machine.fd, [machine.processors[0].fd], {{0: (0, SIZE)}})
else:
    tracker = KvmDirtyLog(machine.fd, 0, SIZE)

def pages(hb):
    return [start // PAGE for start in hb]

def hook(request):
    if request != REQUEST or not hooks:
        return 0
    return hooks.pop(0)() or 0

def hooking(*functions):
    hooks[:] = functions if ring else (passed, *functions)

def passed():       # clears nothing: a log looks so whether the slot has the same size
    return 0

hooks = []
kept = HOOK(hook)
ctypes.c_void_p.in_dll(hooked, "hook").value = ctypes.cast(kept, ctypes.c_void_p).value
write = machine.write
"""


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], str]:
    """Runs code with functions that are called right before KVM watches pages again. What one
    answers, a negative errno, or 1 for a 0 of nothing done, comes in the place of the call."""
    Machine(PAGE).close()  # or skips
    library = preload.build(tmp_path_factory.mktemp("hook"), "ioctl_hook")

    def run(code: str, ring: bool) -> str:
        begin = HOOKED.format(support=str(preload.SUPPORT), library=str(library), ring=int(ring))
        return run_python(begin + code, LD_PRELOAD=str(library)).strip()

    return run


@pytest.mark.parametrize("ring", [False, True])
def test_what_is_written_between_fetch_and_clear_is_in_the_next_collect(
    hooked: Callable[[str, bool], str], ring: bool
) -> None:
    code = """
write([3 * PAGE], 1)
hooking(lambda: write([3 * PAGE, 4 * PAGE], 2) and None)
print(pages(tracker.collect()), 4 in pages(tracker.collect()), pages(tracker.collect()))
"""
    assert hooked(code, ring) == "[3] True []"


@pytest.mark.parametrize("ring", [False, True])
def test_a_page_is_marked_when_kvm_watches_it_again_and_not_before(
    hooked: Callable[[str, bool], str], ring: bool
) -> None:
    """A second collector has fetched, and drains while the first one is about to clear; what it
    gets it copies, and the guest goes over that.
    """
    code = """
copy = bytearray(SIZE)
def other():
    early = tracker._log.drain()
    print(pages(early), end=" ")
    early.copy_areas(copy, machine.memory)
    write([3 * PAGE], 2)
write([3 * PAGE], 1)
hooking(other)
for _ in range(3):
    tracker.collect().copy_areas(copy, machine.memory)
print(copy == machine.memory[:])
"""
    assert hooked(code, ring) == "[] True"


@pytest.mark.parametrize("ring", [False, True])
def test_a_clear_that_fails_loses_nothing(hooked: Callable[[str, bool], str], ring: bool) -> None:
    code = """
write([3 * PAGE], 1)
hooking(lambda: -12)
try:
    tracker.collect()
except StoreError as error:
    print(error.errno, end=" ")
write([4 * PAGE], 1)
print(pages(tracker.collect()), pages(tracker.collect()))
"""
    assert hooked(code, ring) == "12 [3, 4] []"


def test_a_look_at_the_size_that_fails_loses_nothing(hooked: Callable[[str, bool], str]) -> None:
    """By then a log that is not manual is clean."""
    code = """
tracker.close()
machine = Machine(SIZE)     # one that is not set to manual
tracker = KvmDirtyLog(machine.fd, 0, SIZE, manual=False)
machine.write([3 * PAGE], 1)
hooks[:] = [lambda: -12]
try:
    tracker.collect()
except StoreError as error:
    print(error.errno, end=" ")
machine.write([4 * PAGE], 1)
print(pages(tracker.collect()), pages(tracker.collect()))
"""
    assert hooked(code, False) == "12 [3, 4] []"


def test_without_clears_a_slot_of_another_size_tells_no_old_page(
    hooked: Callable[[str, bool], str],
) -> None:
    """A kernel before 5.2: as the docstring says, only a log of more words is noticed there."""
    code = """
tracker.close()
machine = Machine(PAGE)     # one that is not set to manual
write = machine.write

def made(npages):
    global REQUEST
    machine.add_slot(1, 1 << 28, npages * PAGE)
    REQUEST = 0xAE03                                # KVM_CHECK_EXTENSION: has it none?
    hooks[:] = [lambda: 1]
    made = KvmDirtyLog(machine.fd, 1, npages * PAGE)
    assert not hooks
    return made

def anew(npages, *written):
    machine.remove_slot(1)
    machine.add_slot(1, 1 << 28, npages * PAGE)
    write([(1 << 28) + page * PAGE for page in written], 1)

with made(128) as later:
    anew(128, 3, 127)
    print(pages(later.collect()), pages(later.collect()), end=" ")
    anew(128, 127)
    later.collect()
    anew(64, 3)
    print(pages(later.collect()), pages(later.collect()), end=" ")
    anew(129)
    try:
        later.collect()
    except StateError as error:
        print(error)
"""
    expected = "[3, 127] [] [3] [] slot 1 of a KVM machine has another size by now, "
    assert hooked(code, False).startswith(expected)


def test_rings_that_a_signal_keeps_from_being_emptied_are_emptied(
    hooked: Callable[[str, bool], str],
) -> None:
    """KVM stops early and says how far it came. Were that all, what is written to those pages
    from then on would be in no ring.
    """
    code = """
write([3 * PAGE, 4 * PAGE], 1)
hooking(*[lambda: 1] * 5)
print(pages(tracker.collect()), len(hooks), end=" ")
write([3 * PAGE, 4 * PAGE], 2)
print(pages(tracker.collect()))
"""
    assert hooked(code, True) == "[3, 4] 0 [3, 4]"


def test_a_processor_that_fills_its_ring_while_it_is_harvested(
    hooked: Callable[[str, bool], str],
) -> None:
    """Where KVM lets it run on, new entries replace those that were harvested."""
    code = """
class Full(Exception):
    pass
def full():
    raise Full
def fill():
    try:
        write(range(0, SIZE, PAGE), 2)
    except Full:
        pass
copy = bytearray(SIZE)
for few in (1, 100, 400) * 3:
    machine.when_full = full
    write([page * PAGE for page in range(few)], 1)
    hooking(fill)
    tracker.collect().copy_areas(copy, machine.memory)
    machine.when_full = lambda: tracker.collect().copy_areas(copy, machine.memory)
    write([page * PAGE for page in range(few, 2 * few)], 3)
    tracker.collect().copy_areas(copy, machine.memory)
    assert copy == machine.memory[:], few
print("equal")
"""
    assert hooked(code, True) == "equal"


# ---- rings ----------------------------------------------------------------------------------


def test_a_ring_that_is_full_loses_nothing() -> None:
    """Where KVM lets a processor run on with a full ring, all pages are found instead."""
    npages = 5 * ENTRIES
    with Machine(npages * PAGE, ring=ENTRIES) as machine:
        found: list[int] = []
        tracker = ring_of(machine)
        machine.when_full = lambda: found.extend(pages(tracker.collect()))
        for _ in range(2):
            machine.write(offsets(*range(npages)), 1)
            found += pages(tracker.collect())
            assert sorted(set(found)) == list(range(npages))
            found.clear()
            machine.write(offsets(7, 8), 1)
            assert pages(tracker.collect()) == [7, 8]
        assert machine.processors[0].full > 4
        tracker.close()


@pytest.mark.parametrize("entries", [ENTRIES, 4 * ENTRIES, 65536])
def test_rings_of_any_size_go_round(entries: int) -> None:
    """The size is found out: a wrong one would lose entries when they begin anew. (400 fit into
    the smallest ring everywhere: Intel's keep 576 entries free.)"""
    with Machine(1000 * PAGE, processors=2, ring=entries) as machine, ring_of(machine) as tracker:
        for round_ in range(2 * entries // 400 + 2 if entries < 65536 else 200):
            numbers = range(round_ % 300, round_ % 300 + 400)
            machine.processors[round_ % 3 // 2].write(offsets(*numbers), 1)
            assert pages(tracker.collect()) == list(numbers)


@pytest.mark.parametrize("before", [0, 1, 63, 400])
@pytest.mark.parametrize("left", [0, 1, 300])
def test_rings_that_were_harvested_before_are_gone_on_with(before: int, left: int) -> None:
    with Machine(ENTRIES * PAGE, ring=ENTRIES) as machine:
        for _ in range(3):
            with ring_of(machine) as tracker:
                machine.write(offsets(*range(before)), 1)
                assert pages(tracker.collect()) == list(range(before))
                machine.write(offsets(*range(left)), 1)
            with ring_of(machine) as tracker:
                assert pages(tracker.collect()) == list(range(left))
                machine.write(offsets(7, 8), 1)
                assert pages(tracker.collect()) == [7, 8]


def test_a_slot_that_was_not_named_is_an_error_once(ringed: Machine) -> None:
    ringed.add_slot(1, 1 << 28, 10 * PAGE)
    fds = [each.fd for each in ringed.processors]
    with KvmDirtyRing(ringed.fd, fds, {0: (0, 100 * PAGE)}) as tracker:
        for wrong, where in (
            ((1 << 28) + 3 * PAGE, "page 3 of slot 1"),
            (
                100 * PAGE,
                "page 100 of slot 0",
            ),
        ):
            ringed.write([5 * PAGE, wrong, 6 * PAGE], 1)
            with pytest.raises(StateError, match=f"wrote to {where}, which is in none of slots 0"):
                tracker.collect()
            assert pages(tracker.collect()) == [5, 6]


def test_a_processor_of_another_machine_is_told(ringed: Machine) -> None:
    with Machine(SIZE, ring=ENTRIES) as other:
        fds = [ringed.processors[0].fd, other.processors[0].fd]
        with pytest.raises(InvalidError, match="is there twice"):  # both are number 0
            KvmDirtyRing(ringed.fd, fds, {0: (0, SIZE)})
        with KvmDirtyRing(ringed.fd, fds[1:], {0: (0, SIZE)}) as tracker:
            assert not tracker.collect()
            other.write([0], 1)
            for _ in range(2):
                with pytest.raises(StateError, match="one of vcpu_fds is of another machine"):
                    tracker.collect()


def test_processors_have_to_be_processors_each_once(ringed: Machine) -> None:
    fds = [each.fd for each in ringed.processors]
    with pytest.raises(InvalidError, match=f"vm_fd {fds[0]} is no KVM machine"):
        KvmDirtyRing(fds[0], fds, {0: (0, SIZE)})
    again = os.dup(fds[1])
    with pytest.raises(InvalidError, match=f"vCPU {again} is there twice"):
        KvmDirtyRing(ringed.fd, [*fds, again], {0: (0, SIZE)})
    os.close(again)
    with pytest.raises(InvalidError, match=f"vCPU {again} is not open"):
        KvmDirtyRing(ringed.fd, [fds[0], again], {0: (0, SIZE)})
    with open(__file__, "rb") as file, pytest.raises(InvalidError, match="is no KVM vCPU"):
        KvmDirtyRing(ringed.fd, [fds[0], file.fileno()], {0: (0, SIZE)})
    with pytest.raises(InvalidError, match="is no KVM vCPU"):
        KvmDirtyRing(ringed.fd, [ringed.fd], {0: (0, SIZE)})
    with pytest.raises(InvalidError, match="names no vCPU"):
        KvmDirtyRing(ringed.fd, [], {0: (0, SIZE)})
    with pytest.raises(InvalidError, match="slots is empty"):
        KvmDirtyRing(ringed.fd, fds, {})


# ---- the example ----------------------------------------------------------------------------


def example(name: str) -> list[str]:
    """The lines that it prints."""
    Machine(PAGE).close()  # or skips
    path = Path(__file__).resolve().parents[2] / "examples" / name
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_example_copies_several_slots() -> None:
    first, last = example("kvm_slots.py")
    assert re.fullmatch(r"64 MiB first, \d+ rounds", first)
    assert last == "the copy is the guest's memory, byte for byte"


@pytest.mark.parametrize("ring", [False, True])
def test_a_live_copy_begins_with_all_that_the_tracker_s_size_has(ring: bool) -> None:
    """As the docstrings say: a log's later rounds have its own slot, a ring's all of them."""
    size, copied = SIZE + 10 * PAGE, list[tuple[int, int]]()
    with Machine(SIZE, ring=ENTRIES * ring) as machine:
        machine.add_slot(1, 1 << 28, 10 * PAGE)
        vcpu = machine.processors[0].fd

        def copy(offset: int, nbytes: int) -> None:
            if not copied:
                machine.write([5 * PAGE, (1 << 28) + 3 * PAGE], 1)
            copied.append((offset, nbytes))

        with (
            KvmDirtyRing(machine.fd, [vcpu], {0: (0, SIZE), 1: (SIZE, 10 * PAGE)})
            if ring
            else KvmDirtyLog(machine.fd, 1, 10 * PAGE, SIZE)
        ) as tracker:
            live_copy(tracker, copy, paused=nullcontext(), piece=size)
    of_slot_0 = [(5 * PAGE, PAGE)] if ring else []
    assert copied == [(0, size), *of_slot_0, (SIZE + 3 * PAGE, PAGE)]


def test_the_example_migrates_a_machine() -> None:
    lines = example("kvm_migration.py")
    assert lines[-1] == "the copy is the guest's memory, byte for byte"
    assert re.fullmatch(r" +1  262144 KiB +[\d.]+, runs", lines[1])
    assert lines[-2].endswith("is stopped")


# ---- what is refused ------------------------------------------------------------------------


def test_a_slot_without_a_log_is_refused(logged: Machine) -> None:
    logged.add_slot(1, 1 << 28, SIZE, log=False)
    for slot in (1, 2, 31):
        with pytest.raises(StateError, match=f"slot {slot} has no log.*KVM_MEM_LOG_DIRTY_PAGES"):
            KvmDirtyLog(logged.fd, slot, SIZE)


@pytest.mark.parametrize("slot", [0xFFFF, 1 << 16, (1 << 32) - 1])
def test_a_slot_that_there_cannot_be_is_refused(logged: Machine, slot: int) -> None:
    with pytest.raises(InvalidError, match=f"slot {slot}: KVM has no slot of that number"):
        KvmDirtyLog(logged.fd, slot, SIZE)


@pytest.mark.parametrize("npages", [64, 256, 299, 301, 320, 2**31 - 1])
def test_another_size_than_the_slot_has_is_refused(logged: Machine, npages: int) -> None:
    with pytest.raises(InvalidError, match=f"slot 0 has {SIZE} bytes, not {npages * PAGE}"):
        KvmDirtyLog(logged.fd, 0, npages * PAGE)


def test_numbers_that_cannot_be_are_refused(logged: Machine) -> None:
    for arguments, why in [
        ((logged.fd, -1, SIZE), "slot -1 is not in"),
        ((logged.fd, 1 << 32, SIZE), "is not in"),
        ((logged.fd, 0, SIZE - 1), f"nbytes {SIZE - 1} is no number of pages"),
        ((logged.fd, 0, 0), "cannot have 0 bytes"),
        ((logged.fd, 0, -PAGE), "no number of pages"),
        ((logged.fd, 0, 1 << 62), "cannot have"),
        ((logged.fd, 0, 1 << 100), "no number of pages"),
        ((logged.fd, 0, SIZE, 5), "first 5 is no number of pages"),
        ((logged.fd, 0, SIZE, -PAGE), "no number of pages"),
        ((logged.fd, 0, SIZE, (1 << 63) - PAGE), "size"),
        ((-1, 0, SIZE), "vm_fd -1 is no file descriptor"),
        ((1 << 31, 0, SIZE), "is no file descriptor"),
    ]:
        with pytest.raises(InvalidError, match=why):
            KvmDirtyLog(*arguments)
    with pytest.raises(InvalidError, match=f"ends at {SIZE}, beyond size 5"):
        KvmDirtyLog(logged.fd, 0, SIZE, size=5)
    with pytest.raises(InvalidError, match="manual is False"):
        KvmDirtyLog(logged.fd, 0, SIZE, manual=False, initially_set=True)
    for what in "0", None, 0.0:
        with pytest.raises(TypeError):
            KvmDirtyLog(logged.fd, what, SIZE)  # type: ignore[arg-type]


def test_what_is_no_machine_is_refused(logged: Machine) -> None:
    closed = os.dup(0)
    os.close(closed)
    with pytest.raises(InvalidError, match=f"vm_fd {closed} is not open"):
        KvmDirtyLog(closed, 0, SIZE)
    with open(os.devnull, "rb") as null:
        for fd in (null.fileno(), logged.kvm, logged.processors[0].fd):
            with pytest.raises(InvalidError, match=f"vm_fd {fd} is no KVM machine"):
                KvmDirtyLog(fd, 0, SIZE)


def test_a_machine_has_a_log_or_rings(logged: Machine, ringed: Machine) -> None:
    with pytest.raises(StateError, match="has dirty rings and no log: use KvmDirtyRing"):
        log_of(ringed)
    with pytest.raises(StateError, match="no dirty rings: enable KVM_CAP_DIRTY_LOG_RING before"):
        ring_of(logged)
    with ring_of(ringed) as tracker, pytest.raises(StateError, match="has dirty rings and no log"):
        log_of(ringed)
    assert tracker.closed


def test_a_second_tracker_of_the_same_is_refused(
    machine: Machine, make: Callable[[Machine], Made]
) -> None:
    with make(machine) as tracker:
        if not kcmp_works():
            lacking("kcmp(2), by which a second tracker is known")
        user, machine.fd = machine.fd, os.dup(machine.fd)
        try:
            with pytest.raises(StateError, match="has a tracker already"):
                make(machine)
        finally:
            os.close(machine.fd)
            machine.fd = user
        machine.write(offsets(3), 1)
        assert pages(tracker.collect()) == [3]
        with Machine(SIZE, ring=ENTRIES if make is ring_of else 0) as other:
            make(other).close()
    make(machine).close()


def kcmp_works() -> bool:
    import ctypes

    pid = os.getpid()
    return bool(ctypes.CDLL(None).syscall(312, pid, pid, 0, 0, 0) == 0)


def test_a_slot_that_is_removed_is_refused_until_it_is_there_again(logged: Machine) -> None:
    with log_of(logged) as tracker:
        logged.write(offsets(2), 1)  # goes with its log
        logged.remove_slot(0)
        for _ in range(2):
            with pytest.raises(StateError, match="slot 0 of a KVM machine has no log"):
                tracker.collect()
        logged.add_slot(0, 0, SIZE)
        logged.write(offsets(3), 1)
        assert pages(tracker.collect()) == [3]


AT = 1 << 28  # of a slot that is made anew; slot 0 has the memory of page 0

#: Of every kind: within a word of the log or not, from its end on, to its end, a page apart.
OTHER_SIZES = [
    *((10, 20), (20, 10), (100, 128), (128, 100), (128, 64), (64, 128), (64, 65), (65, 64)),
    *((128, 127), (127, 128), (128, 190), (300, 40000), (40000, 300), (32768, 32832), (1, 2)),
]


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize(("before", "now"), OTHER_SIZES)
def test_a_slot_that_is_made_anew_with_another_size_is_refused(
    manual: bool, before: int, now: int
) -> None:
    """Whatever is written to, and nothing at all; and what the old one had is not told again."""
    with Machine(PAGE) as machine:
        machine.add_slot(1, AT, before * PAGE)
        with KvmDirtyLog(machine.fd, 1, before * PAGE, manual=manual) as tracker:
            machine.write([AT + (before - 1) * PAGE], 1)
            assert pages(tracker.collect()) == [before - 1]
            machine.remove_slot(1)
            machine.add_slot(1, AT, now * PAGE)
            for written in [], [now - 1], [0, now - 1]:
                machine.write([AT + page * PAGE for page in written], 1)
                with pytest.raises(StateError, match=r"has another size by now.*close this"):
                    tracker.collect()
        with KvmDirtyLog(machine.fd, 1, now * PAGE, manual=manual) as tracker:
            tracker.collect()
            machine.write([AT + (now - 1) * PAGE], 1)
            assert pages(tracker.collect()) == [now - 1]


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("npages", [10, 128])
def test_a_slot_that_is_made_anew_with_the_same_size_goes_on(manual: bool, npages: int) -> None:
    """As the docstring says: with another log, and what was in the old one is in no collect."""
    with Machine(PAGE) as machine:
        machine.add_slot(1, AT, npages * PAGE)
        with KvmDirtyLog(machine.fd, 1, npages * PAGE, manual=manual) as tracker:
            machine.write([AT + 3 * PAGE], 1)
            machine.remove_slot(1)
            machine.add_slot(1, AT, npages * PAGE)
            machine.write([AT + 5 * PAGE], 1)
            assert pages(tracker.collect()) == [5]


# ---- descriptors, forks, interruptions -----------------------------------------------------------


def test_it_keeps_the_machine_and_gives_it_back(make: Callable[[Machine], Made]) -> None:
    before = descriptors()
    machine = Machine(SIZE, processors=2, ring=ENTRIES if make is ring_of else 0)
    tracker = make(machine)
    machine.write(offsets(3), 1)
    machine.close()
    assert pages(tracker.collect()) == [3]
    assert len(descriptors()) == len(before) + 1
    tracker.close()
    tracker.close()
    assert descriptors() == before
    assert b"kvm-vcpu" not in Path("/proc/self/maps").read_bytes()
    with pytest.raises(ClosedError, match="is closed"):
        tracker.collect()


def test_one_that_is_dropped_is_closed_with_a_warning(
    machine: Machine, make: Callable[[Machine], Made]
) -> None:
    before = descriptors()
    tracker = make(machine)
    with pytest.warns(ResourceWarning, match="of a KVM machine was dropped"):  # noqa: PT031
        del tracker
        collect()
    assert descriptors() == before
    make(machine).close()


def test_one_that_is_refused_keeps_nothing(ringed: Machine, logged: Machine) -> None:
    before = descriptors()
    for _ in range(3):
        with pytest.raises(StateError):
            log_of(ringed)
        with pytest.raises(StateError):
            ring_of(logged)
        with pytest.raises(InvalidError):
            KvmDirtyLog(logged.fd, 0, PAGE)
        with pytest.raises(InvalidError):
            KvmDirtyRing(ringed.fd, [ringed.processors[0].fd, 0], {0: (0, SIZE)})
    collect()
    assert descriptors() == before


def test_the_child_of_a_fork_is_refused_and_has_nothing_of_the_machine(
    machine: Machine, make: Callable[[Machine], Made]
) -> None:
    without = len(descriptors())
    tracker = make(machine)
    machine.write(offsets(3), 1)
    child = os.fork()
    if not child:
        code = 1
        try:
            with pytest.raises(StateError, match="is the parent's"):
                tracker.collect()
            assert len(descriptors()) == without
            kept = Path("/proc/self/maps").read_text().count("kvm-vcpu")
            assert kept == len(machine.processors)  # the test's own, of their states
            with pytest.raises(StateError, match="another process's"):
                make(machine)
            tracker.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    machine.write(offsets(4), 1)
    assert pages(tracker.collect()) == [3, 4]
    tracker.close()


def test_one_that_only_the_parent_s_parent_made(
    machine: Machine, make: Callable[[Machine], Made]
) -> None:
    """A child that unwinds a `with` leaves the parent's alone."""
    with make(machine) as tracker:
        child = os.fork()
        if not child:
            try:
                tracker.__exit__(None, None, None)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        machine.write(offsets(4), 1)
        assert pages(tracker.collect()) == [4]


with_fast = pytest.mark.skipif(
    sys.implementation.name != "cpython" or _core.fast is None,
    reason="relies on counted references and on _fast",
)


@with_fast
@pytest.mark.filterwarnings("ignore:what was taken from a bitmap was dropped")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_collect_that_is_interrupted_at_any_line_loses_no_write(
    machine: Machine, make: Callable[[Machine], Made]
) -> None:
    tracker, into = make(machine), HBitmap(SIZE, 13)

    def attempt() -> None:
        machine.write(offsets(3, 299), 1)
        tracker.collect(into)

    for where in at_every_line(attempt):
        tracker.collect(into)
        assert into.get(3 * PAGE), where
        assert into.get(299 * PAGE), where
        into.clear()
    tracker.close()


@with_fast
@pytest.mark.filterwarnings("ignore:a tracker of .* was dropped")
def test_making_and_closing_that_is_interrupted_at_any_line_keeps_nothing(
    machine: Machine, make: Callable[[Machine], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest's keeps what a finalizer was about that was interrupted, for the next attempt.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    before = descriptors()

    def attempt() -> None:
        with make(machine):
            pass

    for where in at_every_line(attempt):
        assert descriptors() == before, where
        make(machine).close()  # nor a lock, nor a place in the list
        other = threading.Thread(target=lambda: make(machine).close(), daemon=True)
        other.start()
        other.join(60)
        assert not other.is_alive(), where


@contextmanager
def few_descriptors() -> Iterator[None]:
    import resource

    used = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
    spare = []
    with suppress(OSError):
        while True:
            spare.append(os.dup(0))
    try:
        yield
    finally:
        for fd in spare:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_the_error_says_so(
    machine: Machine, make: Callable[[Machine], Made]
) -> None:
    import errno

    with few_descriptors(), pytest.raises(StoreError) as caught:
        make(machine)
    assert caught.value.errno == errno.EMFILE
    make(machine).close()
