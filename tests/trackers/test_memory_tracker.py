# SPDX-License-Identifier: MIT
"""MemoryTracker: the kernel says what was written to memory of this process."""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import platform
import random
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fcntl import ioctl
from itertools import chain
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import peers
import preload
import pytest
from namespaces import run_as_first
from support import collect as collect_garbage
from support import run_python
from tracked import (
    PAGE,
    CalledAt,
    Interruption,
    address_of,
    advise,
    descriptors,
    in_child,
    interrupted,
    libc,
    mapped,
    need_tracker,
    pages,
    poke,
    private,
    unmap,
)

from pybitmap import (
    BusyError,
    ClosedError,
    HBitmap,
    InvalidError,
    MismatchError,
    StateError,
    StoreError,
    UnsupportedError,
    _core,
)
from pybitmap.trackers import MemoryTracker

MADV_REMOVE, MADV_HUGEPAGE, MADV_COLLAPSE = 9, 14, 25
HUGE = PAGE * PAGE // 8


@pytest.fixture(autouse=True)
def tracking() -> None:
    need_tracker()


# ---- what is reported -----------------------------------------------------------------------


def test_each_written_page_is_in_one_collect() -> None:
    ram = private(100)
    with MemoryTracker(ram) as tracker:
        assert (tracker.size, 1 << tracker.granularity) == (100 * PAGE, PAGE)
        assert pages(tracker.collect()) == []
        ram[5 * PAGE] = ram[7 * PAGE + 1] = ram[99 * PAGE + PAGE - 1] = 1
        ram[20 * PAGE - 1 : 21 * PAGE + 1] = bytes(PAGE + 2)
        assert pages(tracker.collect()) == [5, 7, 19, 20, 21, 99]
        assert pages(tracker.collect()) == []
        ram[7 * PAGE] = 2
        assert pages(tracker.collect()) == [7]


def test_what_was_written_before_is_not_reported_and_reads_are_not() -> None:
    ram = private(100)
    ram[: 50 * PAGE] = bytes(50 * PAGE)
    with MemoryTracker(ram) as tracker:
        assert bytes(ram) == bytes(100 * PAGE)  # pages that are not there yet, too
        assert pages(tracker.collect()) == []
        ram[60 * PAGE] = 1  # where a read has put the page of zeros
        assert pages(tracker.collect()) == [60]


def test_many_runs_are_all_reported() -> None:
    """More than what one scan answers."""
    ram = private(5000)
    with MemoryTracker(ram) as tracker:
        for page in range(1, 5000, 2):
            ram[page * PAGE] = 1
        assert pages(tracker.collect()) == list(range(1, 5000, 2))
        ram[:] = bytes(len(ram))
        assert tracker.collect().count() == len(ram)


@contextmanager
def of_a_file(folder: Path, flags: int) -> Iterator[mmap.mmap]:
    path = folder / "ram"
    path.write_bytes(bytes(40 * PAGE))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, flags=flags) as memory:
        yield memory


@contextmanager
def of_memory_file(_: Path) -> Iterator[mmap.mmap]:
    fd = os.memfd_create("ram")
    os.truncate(fd, 40 * PAGE)
    with mmap.mmap(fd, 40 * PAGE) as memory:
        os.close(fd)
        yield memory


@contextmanager
def of_shared_memory(_: Path) -> Iterator[memoryview]:
    memory = shared_memory.SharedMemory(create=True, size=40 * PAGE)
    try:
        with memoryview(memory.buf or b"") as buffer:
            yield buffer
    finally:
        memory.close()
        memory.unlink()


@contextmanager
def anonymous(_: Path, flags: int) -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 40 * PAGE, flags=flags) as memory:
        yield memory


KINDS: dict[str, Callable[[Path], Any]] = {
    "private": lambda folder: anonymous(folder, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    "shared": lambda folder: anonymous(folder, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS),
    "shared file on a disk": lambda folder: of_a_file(folder, mmap.MAP_SHARED),
    "private file on a disk": lambda folder: of_a_file(folder, mmap.MAP_PRIVATE),
    "shared file in memory": lambda _: of_a_file(Path("/dev/shm"), mmap.MAP_SHARED),
    "private file in memory": lambda _: of_a_file(Path("/dev/shm"), mmap.MAP_PRIVATE),
    "memfd": of_memory_file,
    "SharedMemory": of_shared_memory,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_memory_is_tracked_page_by_page(kind: str, tmp_path: Path) -> None:
    rng = random.Random(kind)
    with KINDS[kind](tmp_path) as memory, MemoryTracker(memory) as tracker:
        for _ in range(20):
            written = sorted(rng.sample(range(40), rng.randrange(10)))
            for page in written:
                memory[page * PAGE + rng.randrange(PAGE)] = rng.randrange(256)
            if isinstance(memory, mmap.mmap) and rng.random() < 0.3:
                memory.flush()  # what a disk makes of it: pages are clean, and written anew
            bytes(memory)
            assert pages(tracker.collect()) == written


def test_a_part_is_tracked_by_offsets_of_its_own_also_one_that_ends_within_a_page() -> None:
    ram = private(10)
    with memoryview(ram)[2 * PAGE : 5 * PAGE + 100] as part, MemoryTracker(part) as tracker:
        assert tracker.size == 3 * PAGE + 100
        ram[PAGE] = ram[2 * PAGE] = ram[5 * PAGE] = ram[6 * PAGE] = 1
        assert list(tracker.collect().areas()) == [(0, PAGE), (3 * PAGE, 100)]
        ram[5 * PAGE + 200] = 1  # what follows it in the same page
        assert list(tracker.collect().areas()) == [(3 * PAGE, 100)]


def test_nothing_can_be_tracked() -> None:
    with memoryview(bytearray(8))[3:3] as nothing, MemoryTracker(nothing) as tracker:
        assert tracker.size == tracker.collect().count() == 0


def test_a_collect_adds_to_a_bitmap_of_any_granularity() -> None:
    ram = private(100)
    with MemoryTracker(ram) as tracker:
        fine, coarse = HBitmap(len(ram), 0), HBitmap(len(ram), tracker.granularity + 2)
        ram[5 * PAGE] = 1
        assert list(tracker.collect(fine).areas()) == [(5 * PAGE, PAGE)]
        ram[9 * PAGE] = 1
        assert list(tracker.collect(coarse).areas()) == [(8 * PAGE, 4 * PAGE)]
        with pytest.raises(MismatchError):
            tracker.collect(HBitmap(len(ram) - 1))


def test_what_was_taken_is_put_back_unless_done_was_said() -> None:
    ram = private(10)
    with MemoryTracker(ram) as tracker:
        ram[PAGE] = 1
        with tracker.taking() as taken:
            assert pages(taken) == [1]
            ram[3 * PAGE] = 1
        with tracker.taking() as taken:
            assert pages(taken) == [1, 3]
            taken.done()
        assert pages(tracker.collect()) == []


# ---- who writes -----------------------------------------------------------------------------

KERNEL_WRITES = """
import ctypes, mmap, os, sys
if len(sys.argv) > 1:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, or /proc/self is root's
from pybitmap.trackers import MemoryTracker
PAGE = mmap.PAGESIZE
ram = mmap.mmap(-1, 20 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
ram[0] = ram[2 * PAGE] = 1
with MemoryTracker(ram) as tracker, open("/dev/zero", "rb", buffering=0) as zeros:
    with memoryview(ram) as view:
        assert zeros.readinto(view[:1]) == 1               # a page that was there
        assert zeros.readinto(view[4 * PAGE:5 * PAGE + 1]) == PAGE + 1    # two that were not
    class Vector(ctypes.Structure):
        _fields_ = [("at", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]
    data = ctypes.create_string_buffer(b"x")
    one = Vector(ctypes.addressof(data), 1)
    other = Vector(tracker.address + 7 * PAGE, 1)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.process_vm_writev(os.getpid(), ctypes.byref(one), 1, ctypes.byref(other), 1, 0) != 1:
        ram[7 * PAGE] = 1
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(tracker.address + 9 * PAGE)
        memory.write(b"y")
    assert (ram[7 * PAGE], ram[9 * PAGE]) != (0, 0)
    print([start // PAGE for start in tracker.collect()], [start for start in tracker.collect()])
"""


def test_writes_of_the_kernel_are_seen() -> None:
    assert run_python(KERNEL_WRITES).strip() == "[0, 4, 5, 7, 9] []"


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_writes_of_the_kernel_are_seen_without_any_rights() -> None:
    """A userfaultfd for faults of the user's only is enough: this protection traps no fault."""
    script = KERNEL_WRITES.replace(
        "import ctypes", "import sys; sys.argv = ['', 'nobody']\nimport ctypes", 1
    )
    # What is imported must be readable, before.
    script = script.replace("if len", "import pybitmap.trackers\nif len", 1)
    assert run_python(script).strip() == "[0, 4, 5, 7, 9] []"


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_process_that_has_changed_its_user_is_told_how_to_look_at_itself() -> None:
    script = KERNEL_WRITES.replace("if len(sys.argv) > 1:", "import pybitmap.trackers\nif True:")
    script = script.replace("    ctypes.CDLL(None).prctl", "    pass  # ")
    with pytest.raises(AssertionError, match="PR_SET_DUMPABLE"):
        run_python(script)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the guest is one of x86")
def test_writes_of_a_guest_of_kvm_are_seen() -> None:
    """A guest without paging, and the page tables that KVM has for it beside ours."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        peers.lacking("/dev/kvm")
    ram = private(16)
    ram[:4] = b"\xc6\x07\x01\xf4"  # mov byte [bx], 1; hlt
    with ExitStack() as opened:

        def file(descriptor: int) -> int:
            opened.callback(os.close, descriptor)
            return descriptor

        kvm = file(os.open("/dev/kvm", os.O_RDWR))
        machine = file(ioctl(kvm, 0xAE01, 0))  # KVM_CREATE_VM
        region = struct.pack("IIQQQ", 0, 0, 0, len(ram), address_of(ram))
        ioctl(machine, 0x4020AE46, region)  # KVM_SET_USER_MEMORY_REGION
        processor = file(ioctl(machine, 0xAE41, 0))  # KVM_CREATE_VCPU
        state = mmap.mmap(processor, ioctl(kvm, 0xAE04, 0))  # KVM_GET_VCPU_MMAP_SIZE
        special = bytearray(312)
        ioctl(processor, 0x8138AE83, special)  # KVM_GET_SREGS
        special[:8] = bytes(8)  # the base of cs, ...
        special[12:14] = bytes(2)  # ... and its selector
        ioctl(processor, 0x4138AE84, bytes(special))

        def write(page: int) -> None:
            registers = [0, page * PAGE, *[0] * 15, 2]  # rbx; rip is 0, flags are 2
            ioctl(processor, 0x4090AE82, struct.pack("18Q", *registers))
            ioctl(processor, 0xAE80, 0)  # KVM_RUN
            assert struct.unpack_from("I", state, 8) == (5,)  # KVM_EXIT_HLT

        with MemoryTracker(ram) as tracker:
            for number in (5, 5, 7):
                write(number)
                write(number)
                assert pages(tracker.collect()) == [number]
                assert pages(tracker.collect()) == []
            assert (ram[5 * PAGE], ram[7 * PAGE]) == (1, 1)
        state.close()


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="unicorn is not for PyPy")
def test_writes_of_unicorn_to_memory_of_ours_are_seen() -> None:
    """Of code that it translated, and of its own mem_write."""
    unicorn, x86 = peers.package("unicorn"), peers.package("unicorn.x86_const")
    npages = 16
    ram = private(npages)
    ram[:3] = b"\x88\x03\x90"  # mov [rbx], al; nop
    machine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    machine.mem_map_ptr(0x10000, len(ram), unicorn.UC_PROT_ALL, address_of(ram))
    with MemoryTracker.at(address_of(ram), len(ram), keep=ram) as tracker:
        for page in (1, 2, 1):
            machine.reg_write(x86.UC_X86_REG_RAX, 7)
            for _ in range(2):
                machine.reg_write(x86.UC_X86_REG_RBX, 0x10000 + page * PAGE)
                machine.emu_start(0x10000, 0x10003)
            assert pages(tracker.collect()) == [page]
            assert ram[page * PAGE] == 7
        machine.mem_write(0x10000 + 3 * PAGE, b"x")
        assert pages(tracker.collect()) == [3]
        assert pages(tracker.collect()) == []


def test_beside_writers_each_write_is_in_a_collect_after_it() -> None:
    """A replica that takes over what collects report is as the memory, once they have ended."""
    npages = 512
    ram = private(npages)
    base, half = address_of(ram), npages // 2 * PAGE
    replica = bytearray(npages * PAGE)
    beside = 0
    with MemoryTracker(ram) as tracker:
        for value in range(1, 60):
            # memset has no GIL: these run while the kernel looks at their pages.
            writers = [
                threading.Thread(target=ctypes.memset, args=(base + at, value, half))
                for at in (0, half)
            ]
            for thread in writers:
                thread.start()
            while any(thread.is_alive() for thread in writers):
                dirty = tracker.collect()
                beside += not dirty.empty()
                dirty.copy_areas(replica, ram)
            for thread in writers:
                thread.join()
            tracker.collect().copy_areas(replica, ram)
            assert replica == ram[:]
        assert pages(tracker.collect()) == []
    assert beside or os.cpu_count() == 1


def test_threads_that_collect_each_get_a_part() -> None:
    npages = 2000
    ram = private(npages)
    got: list[list[int]] = []
    with MemoryTracker(ram) as tracker:

        def collect() -> None:
            mine = []
            for _ in range(30):
                mine += pages(tracker.collect())
            got.append(mine)

        collectors = [threading.Thread(target=collect) for _ in range(3)]
        for thread in collectors:
            thread.start()
        for page in range(npages):
            ram[page * PAGE] = 1
        for thread in collectors:
            thread.join()
        got.append(pages(tracker.collect()))
    # A page that is about to be written to may be in two.
    assert sorted(set(chain(*got))) == list(range(npages))
    assert len(list(chain(*got))) < npages + 3 * 30


def test_a_close_beside_collects_ends_them_cleanly() -> None:
    for _ in range(20):
        ram = private(64)
        tracker = MemoryTracker(ram)
        ended: list[str] = []

        def collect(tracker: MemoryTracker = tracker, ended: list[str] = ended) -> None:
            try:
                while True:
                    tracker.collect()
            except BaseException as error:
                ended.append(type(error).__name__)

        threads = [threading.Thread(target=collect) for _ in range(2)]
        for thread in threads:
            thread.start()
        tracker.close()
        for thread in threads:
            thread.join()
        assert ended == [ClosedError.__name__] * 2
    assert descriptors() == []


# ---- what is not seen -----------------------------------------------------------------------


def test_writes_by_another_way_to_shared_memory_are_not_seen(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(20 * PAGE))
    file = open(path, "r+b", buffering=0)  # noqa: SIM115
    ram, second = mmap.mmap(file.fileno(), 0), mmap.mmap(file.fileno(), 0)
    with file, second, MemoryTracker(ram) as tracker:
        second[PAGE] = 1  # a second mapping
        os.pwrite(file.fileno(), b"x", 3 * PAGE)  # the file
        in_child(lambda: ram.__setitem__(5 * PAGE, 7))  # another process
        assert (ram[PAGE], ram[3 * PAGE], ram[5 * PAGE]) == (1, ord("x"), 7)
        assert pages(tracker.collect()) == []
        ram[PAGE] = 2
        assert pages(tracker.collect()) == [1]


def test_what_a_hole_takes_from_shared_memory_is_not_seen() -> None:
    ram = mmap.mmap(-1, 20 * PAGE)
    with MemoryTracker(ram) as tracker:
        ram[3 * PAGE] = 1
        tracker.collect()
        advise(tracker.address + 3 * PAGE, 1, MADV_REMOVE)
        assert ram[3 * PAGE] == 0
        assert pages(tracker.collect()) == []


def test_what_is_given_back_of_a_private_file_is_not_seen(tmp_path: Path) -> None:
    with of_a_file(tmp_path, mmap.MAP_PRIVATE) as ram, MemoryTracker(ram) as tracker:
        ram[3 * PAGE] = 1
        tracker.collect()
        advise(tracker.address + 3 * PAGE, 1, mmap.MADV_DONTNEED)
        assert ram[3 * PAGE] == 0
        assert pages(tracker.collect()) == []


# ---- what becomes of the memory meanwhile ---------------------------------------------------


def test_pages_that_are_given_back_are_reported() -> None:
    ram = private(100)
    ram[:] = b"x" * len(ram)
    with MemoryTracker(ram) as tracker:
        advise(tracker.address + 3 * PAGE, 2, mmap.MADV_DONTNEED)
        assert pages(tracker.collect()) == [3, 4]
        assert ram[3 * PAGE] == 0
        assert pages(tracker.collect()) == []
        ram[4 * PAGE] = 1
        assert pages(tracker.collect()) == [4]


def test_whole_page_tables_that_are_given_back_are_reported() -> None:
    npages = 4 * HUGE // PAGE
    ram = private(npages)
    with MemoryTracker(ram) as tracker:
        ram[:] = b"x" * len(ram)
        tracker.collect()
        advise(tracker.address, npages, mmap.MADV_DONTNEED)
        found = tracker.collect().count()
        if found < len(ram):
            peers.lacking("a kernel that reports page tables that were given back (6.18.44 does)")
        assert found == len(ram)
        ram[HUGE] = 1
        assert pages(tracker.collect()) == [HUGE // PAGE]


def test_shared_pages_that_are_given_back_have_their_bytes_and_are_not_reported() -> None:
    ram = mmap.mmap(-1, 10 * PAGE)
    with MemoryTracker(ram) as tracker:
        ram[3 * PAGE] = 1
        tracker.collect()
        ram[5 * PAGE] = 1
        advise(tracker.address, 10, mmap.MADV_DONTNEED)
        assert (ram[3 * PAGE], ram[5 * PAGE]) == (1, 1)
        assert 5 in pages(tracker.collect())
        assert pages(tracker.collect()) == []


@pytest.mark.parametrize(("first", "count"), [(0, 10), (0, 1), (4, 2), (9, 1)])
def test_memory_that_is_unmapped_is_an_error(first: int, count: int) -> None:
    address = mapped(10)
    with MemoryTracker.at(address, 10 * PAGE) as tracker:
        unmap(address + first * PAGE, count)
        for call in (tracker.collect, tracker.taking, tracker.collect):
            with pytest.raises(StoreError, match=f"{address:#x} is no longer mapped") as caught:
                call()
            assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize(("first", "count"), [(0, 10), (0, 1), (4, 2), (9, 1)])
def test_memory_that_something_else_was_mapped_over_is_an_error(first: int, count: int) -> None:
    address = mapped(10)
    with MemoryTracker.at(address, 10 * PAGE) as tracker:
        mapped(count, at=address + first * PAGE)
        for _ in range(2):
            with pytest.raises(StoreError, match=f"{address:#x} is mapped anew"):
                tracker.collect()
    with MemoryTracker.at(address, 10 * PAGE) as tracker:
        poke(address + 4 * PAGE)
        assert pages(tracker.collect()) == [4]
    unmap(address, 10)


def test_a_tracker_of_what_is_there_now_is_not_robbed_by_the_one_before() -> None:
    address = mapped(10)
    with MemoryTracker.at(address, 8 * PAGE) as before, MemoryTracker(private(4)) as other:
        mapped(3, at=address + 7 * PAGE)
        with MemoryTracker.at(address + 7 * PAGE, 3 * PAGE) as now:
            poke(address + 7 * PAGE)
            for _ in range(2):
                with pytest.raises(StoreError, match="mapped anew"):
                    before.collect()
            assert pages(now.collect()) == [0]
            assert other.collect().empty()
            before.close()
            with pytest.raises(ClosedError):
                before.collect()
            poke(address + 9 * PAGE)
            assert pages(now.collect()) == [2]
    unmap(address, 10)


def test_memory_that_was_moved_is_an_error_and_can_be_tracked_there() -> None:
    address = mapped(10)
    with MemoryTracker.at(address, 10 * PAGE) as tracker:
        there = libc.mremap(
            ctypes.c_void_p(address), ctypes.c_size_t(10 * PAGE), ctypes.c_size_t(5000 * PAGE), 1
        )
        if there == address:
            pytest.skip("it grew in place")
        with pytest.raises(StoreError, match="no longer mapped"):
            tracker.collect()
    with MemoryTracker.at(there, 5000 * PAGE) as tracker:
        poke(there + 4999 * PAGE)
        assert pages(tracker.collect()) == [4999]
    unmap(there, 5000)


def test_protection_of_the_users_own_hides_nothing() -> None:
    address = mapped(10)
    with MemoryTracker.at(address, 10 * PAGE) as tracker:
        poke(address + 2 * PAGE)
        for protection in (mmap.PROT_READ, 0, mmap.PROT_READ | mmap.PROT_WRITE):
            where, nbytes = ctypes.c_void_p(address + PAGE), ctypes.c_size_t(3 * PAGE)
            assert libc.mprotect(where, nbytes, protection) == 0
            assert pages(tracker.collect()) == ([2] if protection == mmap.PROT_READ else [])
        poke(address + 2 * PAGE)
        assert pages(tracker.collect()) == [2]
    unmap(address, 10)


def huge_bytes(address: int, nbytes: int) -> int:
    """How much of that is in transparent huge pages."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin < address + nbytes and end > address
        elif inside and first == "AnonHugePages:":
            found += int(line.split()[1]) << 10
    return found


def test_of_transparent_huge_pages_small_ones_are_reported_and_the_others_stay_huge() -> None:
    number = 8
    address = mapped((number + 1) * HUGE // PAGE)
    begin = -(-address // HUGE) * HUGE
    try:
        advise(begin, number * HUGE // PAGE, MADV_HUGEPAGE)
        ctypes.memset(begin, 1, number * HUGE)
        if huge_bytes(begin, number * HUGE) != number * HUGE:
            peers.lacking("transparent huge pages")
        with MemoryTracker.at(begin, number * HUGE) as tracker:
            poke(begin + HUGE + 5 * PAGE, 2)
            assert pages(tracker.collect()) == [(HUGE + 5 * PAGE) // PAGE]
            assert huge_bytes(begin, number * HUGE) == (number - 1) * HUGE
            assert pages(tracker.collect()) == []
            ctypes.memset(begin + 2 * HUGE, 2, HUGE)
            assert list(tracker.collect().areas()) == [(2 * HUGE, HUGE)]
            advise(begin + 3 * HUGE, HUGE // PAGE, mmap.MADV_DONTNEED)
            if list(tracker.collect().areas()) == [(3 * HUGE, HUGE)]:  # see above
                poke(begin + 3 * HUGE)
                assert pages(tracker.collect()) == [3 * HUGE // PAGE]
        ctypes.memset(begin, 3, number * HUGE)
        for _ in range(10):  # it may lack memory for the moment
            with suppress(AssertionError):
                advise(begin, number * HUGE // PAGE, MADV_COLLAPSE)
        assert huge_bytes(begin, number * HUGE) == number * HUGE  # as it was
    finally:
        unmap(address, (number + 1) * HUGE // PAGE)


@pytest.mark.parametrize("sharing", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_huge_pages_of_hugetlbfs_are_reported_whole(sharing: int) -> None:
    """To run it: sysctl vm.nr_hugepages=8."""
    flags = sharing | mmap.MAP_ANONYMOUS | 0x40000  # MAP_HUGETLB
    try:
        ram = mmap.mmap(-1, 2 * HUGE, flags=flags)
    except OSError:
        peers.lacking("huge pages that are reserved (vm.nr_hugepages)")
    with MemoryTracker(ram) as tracker:
        ram[HUGE] = 1
        assert list(tracker.collect().areas()) == [(HUGE, HUGE)]
        assert tracker.collect().empty()
        ram[HUGE + 5] = 1
        ram[3] = 1
        assert list(tracker.collect().areas()) == [(0, 2 * HUGE)]
        assert tracker.collect().empty()
    with memoryview(ram)[PAGE : 3 * PAGE] as part, pytest.raises(InvalidError, match="cuts a huge"):
        MemoryTracker(part)
    ram.close()


# ---- what is refused ------------------------------------------------------------------------


def test_memory_that_does_not_begin_at_a_page_is_refused_with_advice() -> None:
    data = bytearray(10 * PAGE)
    with pytest.raises(InvalidError, match=r"take an mmap.mmap") as caught:
        MemoryTracker(data)
    data.append(1)  # it was given back, although the traceback has the frame
    assert caught
    with memoryview(private(10))[8:] as part, pytest.raises(InvalidError, match="within a page"):
        MemoryTracker(part)
    assert descriptors() == []


def test_what_is_no_writable_buffer_is_refused() -> None:
    ram = private(4)
    for wrong in (b"x" * PAGE, memoryview(ram).toreadonly(), 4711, None, "ram"):
        with pytest.raises(TypeError):
            MemoryTracker(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidError, match="contiguous"), memoryview(ram)[::2] as view:
        MemoryTracker(view)


@pytest.mark.parametrize(
    ("address", "nbytes"), [(-PAGE, PAGE), (0, -1), (1 << 64, PAGE), ((1 << 64) - PAGE, 2 * PAGE)]
)
def test_addresses_where_no_memory_can_be_are_refused(address: int, nbytes: int) -> None:
    with pytest.raises(InvalidError, match="there is no memory"):
        MemoryTracker.at(address, nbytes)


def test_addresses_where_no_memory_is_are_refused() -> None:
    address = mapped(4)
    unmap(address + PAGE, 1)
    for at, npages in ((address, 2), (address, 4), (address + PAGE, 1), (address + PAGE, 3)):
        with pytest.raises(InvalidError, match=r"not all of the .* is mapped"):
            MemoryTracker.at(at, npages * PAGE)
    with pytest.raises(InvalidError, match="within a page"):
        MemoryTracker.at(address + 1, PAGE)
    with pytest.raises(InvalidError):
        MemoryTracker.at(0, PAGE)
    with pytest.raises(TypeError):
        MemoryTracker.at(1.0, PAGE)  # type: ignore[arg-type]
    unmap(address, 1)
    unmap(address + 2 * PAGE, 2)
    assert descriptors() == []


def test_memory_has_one_tracker() -> None:
    ram = private(10)
    with memoryview(ram) as view, MemoryTracker(view[2 * PAGE : 6 * PAGE]) as tracker:
        for begin, end in ((2, 6), (0, 10), (5, 6), (5, 8), (0, 3)):
            with pytest.raises(BusyError, match="is tracked already"):
                MemoryTracker(view[begin * PAGE : end * PAGE])
        second = mmap.mmap(-1, 4 * PAGE)
        with MemoryTracker.at(address_of(second), 4 * PAGE):
            with pytest.raises(BusyError) as caught:
                MemoryTracker(second)
            second.close()  # likewise; and what is unmapped is tracked no longer
            assert caught
        with MemoryTracker(view[6 * PAGE :]) as beside:
            ram[5 * PAGE] = ram[6 * PAGE] = 1
            assert (pages(tracker.collect()), pages(beside.collect())) == ([3], [0])
        ram[2 * PAGE] = 1
        assert pages(tracker.collect()) == [0]
    with MemoryTracker(ram):
        pass


def test_memory_of_another_userfaultfd_is_refused() -> None:
    ram = private(4)
    somebodys = _core.new("HBMemory *", {"uffd": -1, "pagemap": -1})
    assert _core.hbmem_open(somebodys, address_of(ram) + PAGE, PAGE) == 0
    try:
        with pytest.raises(BusyError, match="another userfaultfd"):
            MemoryTracker(ram)
    finally:
        _core.hbmem_close(somebodys)
    with MemoryTracker(ram):
        pass


def test_a_process_without_descriptors_is_told_and_leaks_none() -> None:
    code = """
import mmap, os, resource
from pybitmap import StoreError, UnsupportedError
from pybitmap.trackers import MemoryTracker
ram = mmap.mmap(-1, 1 << 16)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
while True:
    try:
        taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        break
for left in range(3):
    try:
        MemoryTracker(ram).close()
        print("tracked")
    except StoreError as error:
        assert not isinstance(error, UnsupportedError) and "descriptors" in str(error), error
        print(left, error.errno)
    os.close(taken.pop())
"""
    assert run_python(code).split() == ["0", "24", "1", "24", "tracked"]


LACKS = [
    ({"OLDKERNEL_SCAN": "ENOTTY"}, r"has no PAGEMAP_SCAN.*Linux 6\.7"),
    ({"OLDKERNEL_FEATURES": "EINVAL"}, r"lacks UFFD_FEATURE_WP_ASYNC: Linux 6\.7"),
    ({"OLDKERNEL_FAULTFD": "EPERM"}, "filter of system calls.*/dev/userfaultfd"),
    ({"OLDKERNEL_FAULTFD": "ENOSYS"}, "CONFIG_USERFAULTFD"),
    ({"OLDKERNEL_PAGEMAP": "ENOENT"}, "/proc must be mounted"),
    ({"OLDKERNEL_PAGEMAP": "EACCES"}, "/proc/self/pagemap cannot be opened"),
]

TRY = """
import mmap, os
from pybitmap.trackers import MemoryTracker
ram = mmap.mmap(-1, 1 << 16)
before = os.listdir("/proc/self/fd")
try:
    with MemoryTracker(ram) as tracker:
        ram[0] = 1
        print(tracker.collect().count())
except Exception as error:
    print(type(error).__name__, error)
assert os.listdir("/proc/self/fd") == before
ram.close()
"""


@pytest.mark.parametrize(("lacking", "said"), LACKS, ids=lambda value: str(value)[:40])
def test_where_it_cannot_be_it_says_what_is_missing(
    lacking: dict[str, str], said: str, library: Path
) -> None:
    numbers = {name: str(getattr(errno, value)) for name, value in lacking.items()}
    printed = run_python(TRY, LD_PRELOAD=str(library), **numbers)
    assert printed.startswith(UnsupportedError.__name__)
    assert re.search(said, printed), printed


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preload.build(tmp_path_factory.mktemp("oldkernel"), "oldkernel")


def test_the_device_is_the_other_way(library: Path) -> None:
    if not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        peers.lacking("/dev/userfaultfd, and the right to open it")
    environment = {"OLDKERNEL_SYSCALL": str(errno.EPERM)}
    assert run_python(TRY, LD_PRELOAD=str(library), **environment) == f"{PAGE}\n"


def test_another_system_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(memory: Any, address: int, nbytes: int) -> int:
        memory.step = _core.HBMEM_SYSTEM
        return -errno.ENOSYS

    monkeypatch.setattr(_core, "hbmem_open", elsewhere)
    ram = private(1)
    with pytest.raises(UnsupportedError, match="Linux only"):
        MemoryTracker(ram)
    ram.close()


# ---- holding, and letting go ----------------------------------------------------------------


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy's mmap closes all the same")
def test_the_buffer_is_held_until_close() -> None:
    ram = private(4)
    tracker = MemoryTracker(ram)
    with pytest.raises(BufferError):
        ram.close()
    tracker.close()
    tracker.close()
    with pytest.raises(ClosedError):
        tracker.collect()
    assert repr(tracker).endswith(", closed>")
    ram[0] = 1  # nothing is protected any more
    collect_garbage()
    ram.close()
    assert descriptors() == []


def test_a_tracker_that_is_dropped_is_closed_with_a_warning() -> None:
    ram = private(4)
    trackers = [MemoryTracker(ram)]

    def drop() -> None:
        trackers.clear()
        collect_garbage()

    with pytest.warns(ResourceWarning, match=r"tracker of memory at .* was dropped"):
        drop()
    assert descriptors() == []
    ram.close()


def test_what_keeps_the_memory_of_an_address_is_kept() -> None:
    class Keeper:
        pass

    from weakref import ref

    keeper = Keeper()
    alive = ref(keeper)
    address = mapped(2)
    tracker = MemoryTracker.at(address, 2 * PAGE, keep=keeper)
    del keeper
    collect_garbage()
    assert alive() is not None
    tracker.close()
    del tracker
    collect_garbage()
    assert alive() is None
    unmap(address, 2)


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="relies on counted references")
@pytest.mark.filterwarnings("ignore:a tracker of .* was dropped:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_at_any_line_leaks_nothing_and_loses_no_write() -> None:
    """While it is made, while it collects, while it is closed."""
    ram = private(4)
    kept = HBitmap(len(ram), PAGE.bit_length() - 1)
    stopped = 0
    for at in range(1000):
        with MemoryTracker(ram) as tracker:
            ram[2 * PAGE] = 1
            try:
                with interrupted(at) as where:
                    tracker.collect(kept)
            except Interruption:
                stopped += 1
                assert pages(kept) + pages(tracker.collect(kept)) in ([2], [2, 2]), where
                kept.clear()
                continue
        assert pages(kept) == [2]
        break
    assert stopped > 10
    assert descriptors() == []
    for at in range(1000):
        whole = False
        with suppress(Interruption), interrupted(at) as where:
            MemoryTracker(ram).close()
            whole = True
        assert descriptors() == [], where
        with MemoryTracker(ram):  # nobody has it
            pass
        if whole:
            break
    assert at > 30
    ram.close()


def test_a_signal_handler_may_collect() -> None:
    """The same thread once more, at any line: each page is in one of the two."""
    ram = private(4)
    for at in range(1000):
        inner: list[int] = []
        with MemoryTracker(ram) as tracker:
            ram[2 * PAGE] = 1

            def handler(tracker: MemoryTracker = tracker, inner: list[int] = inner) -> None:
                inner.extend(pages(tracker.collect()))

            done = CalledAt(at, handler)
            with done:
                outer = pages(tracker.collect())
            assert sorted(inner + outer + pages(tracker.collect())) == [2]
        if not done.called:
            break
    assert at > 10


# ---- forks ----------------------------------------------------------------------------------


def test_the_child_of_a_fork_is_refused_and_the_parent_goes_on() -> None:
    ram = private(10)
    ram[:] = b"x" * len(ram)
    with MemoryTracker(ram) as tracker:
        ram[PAGE] = 1

        def child() -> None:
            assert descriptors() == []
            with pytest.raises(StateError, match="the parent's"):
                tracker.collect()
            ram[2 * PAGE] = 1  # a copy of its own
            tracker.close()
            with MemoryTracker(ram) as mine:
                ram[3 * PAGE] = 1
                assert pages(mine.collect()) == [3]

        in_child(child)
        ram[5 * PAGE] = 1
        assert pages(tracker.collect()) == [1, 5]

        reader, writer = os.pipe()
        pid = os.fork()  # now one that lives on: pages are copied when they are written to
        if not pid:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        os.close(reader)
        ram[1 * PAGE] = ram[7 * PAGE] = 1
        assert pages(tracker.collect()) == [1, 7]
        ram[7 * PAGE] = 2
        assert pages(tracker.collect()) == [7]
        os.close(writer)
        os.waitpid(pid, 0)
        ram[7 * PAGE] = 3
        assert pages(tracker.collect()) == [7]


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy does not bear such a fork")
def test_a_child_that_python_does_not_know_of_takes_nothing_from_its_parent() -> None:
    """A fork by C: the descriptors are there, and act on the parent's memory."""
    ram = private(10)
    with MemoryTracker(ram) as tracker:
        ram[PAGE] = 1
        pid = ctypes.PyDLL(None).fork()
        if not pid:
            status = 1
            try:
                tracker.collect()
            except StateError:
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert pages(tracker.collect()) == [1]


def test_a_child_that_has_its_parent_s_number_takes_nothing_from_it() -> None:
    """The first of a PID namespace, as its parent is; and its child in turn."""
    code = """
import mmap
from pybitmap.trackers import MemoryTracker
PAGE = mmap.PAGESIZE
ram = mmap.mmap(-1, 10 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

def pages(tracker):
    return [start // PAGE for start in tracker.collect()]

def child():
    with MemoryTracker(ram) as own:
        ram[2 * PAGE] = 1
        print(same(lambda: pages(own)), pages(own), flush=True)
    return pages(tracker)

with MemoryTracker(ram) as tracker:
    ram[PAGE] = 1
    print(same(child))
    print(pages(tracker))
"""
    refused = "StateError: the tracker of memory at .* is the parent's, .*"
    assert re.fullmatch(rf"{refused} \[2\]\n{refused}\n\[1\]\n", run_as_first(code))


def test_programs_that_are_started_have_no_descriptor_of_it() -> None:
    with MemoryTracker(private(1)):
        listed = subprocess.run(
            ["ls", "-l", "/proc/self/fd"],
            capture_output=True,
            text=True,
            check=True,
            close_fds=False,
        ).stdout
    assert "userfaultfd" not in listed
    assert "pagemap" not in listed


def test_unbuffered_reads_into_what_is_tracked_are_whole() -> None:
    """No fault of the kernel's is refused half way."""
    ram = private(64)
    with MemoryTracker(ram) as tracker, memoryview(ram) as view:
        data = os.urandom(64 * PAGE)
        assert io.BytesIO(data).readinto(view) == 64 * PAGE
        reader, writer = os.pipe()

        def write() -> None:
            with os.fdopen(writer, "wb", buffering=0) as file:
                file.write(data[: 8 * PAGE])

        threading.Thread(target=write).start()
        with os.fdopen(reader, "rb", buffering=0) as file:
            tracker.collect()
            got = 0
            while n := file.readinto(view[got : 8 * PAGE]):
                got += n
        assert got == 8 * PAGE
        assert pages(tracker.collect()) == list(range(8))
