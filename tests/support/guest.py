# SPDX-License-Identifier: MIT
"""A virtual machine of KVM's that writes what it is told to; x86 only.

Its processors run one program: it reads a table of addresses and stores a number at each. Program
and tables lie in a slot of their own, whose writes KVM does not log. 32 bits, flat segments, no
paging: every address is a physical one.

Sources: the kernel's Documentation/virt/kvm/api.rst, whose sections are named; and for the state of
the processor Intel's manual, volume 3, "Mode Switching".
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import struct
from array import array
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from pybitmap import _core

if TYPE_CHECKING:
    from typing_extensions import Self

# Section 4 of api.rst; the numbers are those of <linux/kvm.h>.
CREATE_VM, CHECK_EXTENSION, GET_VCPU_MMAP_SIZE = 0xAE01, 0xAE03, 0xAE04
CREATE_VCPU, RUN, SET_TSS_ADDR = 0xAE41, 0xAE80, 0xAE47
SET_MEMORY, ENABLE_CAP = 0x4020AE46, 0x4068AEA3
SET_REGS, GET_SREGS, SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
LOG_DIRTY = 1  # KVM_MEM_LOG_DIRTY_PAGES
CAP_MANUAL, CAP_RING, CAP_RING_ACQ_REL = 168, 192, 223
MANUAL, INITIALLY_SET = 1, 2
EXIT_HLT, EXIT_RING_FULL = 5, 31

PAGE = mmap.PAGESIZE
PROGRAM = 0x70000000  # of the slot with program and tables
PROGRAM_SLOT = 100
TABLE = 1 << 18  # addresses that one vCPU writes to by one run, at most
ENTRIES = 1024  # of a ring: the fewest that this architecture may have

#: mov edx, [esi]; mov [edx], eax; add esi, 4; dec ecx; jnz to the first; hlt
CODE = bytes.fromhex("8b16 8902 83c604 49 75f6 f4")


def _lacking(reason: str) -> NoReturn:
    """Ends an example, which may be without pytest, and skips a test."""
    try:
        from peers import lacking
    except ImportError:
        raise SystemExit(f"not here: {reason}") from None
    lacking(reason)


class Memory(mmap.mmap):
    """Anonymous memory, all zero at first."""

    def __new__(cls, nbytes: int) -> Memory:
        return super().__new__(cls, -1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def address(self) -> int:
        with _core.raw_array("memory", self) as data:
            return _core.address(data)


class Processor:
    """A vCPU; one thread at a time runs it."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.fd = fcntl.ioctl(machine.fd, CREATE_VCPU, number)
        size = fcntl.ioctl(machine.kvm, GET_VCPU_MMAP_SIZE)
        self.state = mmap.mmap(self.fd, size)  # struct kvm_run, section 5
        self.full = 0
        self._machine = machine
        self._table = PAGE + number * 4 * TABLE
        special = bytearray(fcntl.ioctl(self.fd, GET_SREGS, bytes(312)))
        code, data = (
            struct.pack("<QIHBBBBBBBBBx", 0, 0xFFFFFFFF, 8, kind, 1, 0, 1, 1, 0, 1, 0, 0)
            for kind in (11, 3)
        )
        special[: 6 * 24] = code + 5 * data  # cs, ds, es, fs, gs, ss
        struct.pack_into("<Q", special, 8 * 24 + 2 * 16, 0x11)  # cr0: protected mode
        fcntl.ioctl(self.fd, SET_SREGS, bytes(special))

    def write(self, offsets: Iterable[int], value: int) -> int:
        """Store ``value`` at these, TABLE at most, and return when the guest has; what it needs a
        full ring emptied for, the machine's ``when_full`` does. The number of exits."""
        table = array("I", offsets)
        if not table:
            return 0
        at = self._table
        self._machine.program[at : at + 4 * len(table)] = table.tobytes()
        registers = struct.pack(
            "<18Q", value, 0, len(table), 0, PROGRAM + at, *11 * (0,), PROGRAM, 2
        )
        fcntl.ioctl(self.fd, SET_REGS, registers)
        exits = 0
        while True:
            try:
                fcntl.ioctl(self.fd, RUN, 0)
            except InterruptedError:  # by a signal
                continue
            exits += 1
            reason = struct.unpack_from("<I", self.state, 8)[0]
            if reason == EXIT_HLT:
                return exits
            assert reason == EXIT_RING_FULL, f"exit reason {reason}"
            self.full += 1
            self._machine.when_full()

    def close(self) -> None:
        self.state.close()
        os.close(self.fd)


class Machine:
    """Slot 0 is ``memory`` of so many bytes, from address 0 on; others are added.

    :param ring: entries of the dirty ring of each processor; 0: it has the log
    :param log: is what is written to slot 0 logged?
    """

    #: Called when the ring of a processor is full, by its thread.
    when_full: Callable[[], object]

    def __init__(
        self, nbytes: int, *, processors: int = 1, ring: int = 0, log: bool = True
    ) -> None:
        if platform.machine() != "x86_64":
            _lacking(f"the guest is x86 code, this is {platform.machine()}")
        try:
            self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            _lacking(f"/dev/kvm cannot be opened: {error.strerror}")
        self.fd = fcntl.ioctl(self.kvm, CREATE_VM, 0)
        self.slots: dict[int, tuple[int, Memory]] = {}
        fcntl.ioctl(self.fd, SET_TSS_ADDR, PROGRAM - 4 * PAGE)  # section 4.36: Intel needs it
        if ring:
            if not fcntl.ioctl(self.fd, CHECK_EXTENSION, CAP_RING):
                _lacking("this kernel's KVM has no dirty rings")
            self.enable(CAP_RING, ring * 16)
        self.program = Memory(PAGE + processors * 4 * TABLE)
        self.program[: len(CODE)] = CODE
        self._set(PROGRAM_SLOT, PROGRAM, self.program, False)
        self.memory = self.add_slot(0, 0, nbytes, log=log)
        self.processors = [Processor(self, number) for number in range(processors)]
        self.write = self.processors[0].write

    def enable(self, capability: int, *arguments: int) -> None:
        fcntl.ioctl(
            self.fd,
            ENABLE_CAP,
            struct.pack("<II4Q64x", capability, 0, *arguments, *(4 - len(arguments)) * (0,)),
        )

    def add_slot(self, slot: int, at: int, nbytes: int, *, log: bool = True) -> Memory:
        """Memory of its own at that address of the guest."""
        memory = Memory(nbytes)
        self._set(slot, at, memory, log)
        return memory

    def remove_slot(self, slot: int) -> None:
        at, _ = self.slots.pop(slot)
        fcntl.ioctl(self.fd, SET_MEMORY, struct.pack("<IIQQQ", slot, 0, at, 0, 0))

    def _set(self, slot: int, at: int, memory: Memory, log: bool) -> None:
        flags = LOG_DIRTY if log else 0
        region = struct.pack("<IIQQQ", slot, flags, at, len(memory), memory.address())
        fcntl.ioctl(self.fd, SET_MEMORY, region)
        self.slots[slot] = at, memory

    def close(self) -> None:
        for processor in self.processors:
            processor.close()
        os.close(self.fd)
        os.close(self.kvm)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
