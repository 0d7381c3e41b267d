# SPDX-License-Identifier: MIT
"""UnicornTracker: what a machine of the Unicorn engine writes to.

All trackers of a machine share one hook in C (``csrc/unicorn.c``), which marks each write without
entering Python. It has to be the first of the machine's memory hooks, because Unicorn does a write
but leaves out the hooks behind one that stops the machine, or behind the first if a timeout or
another thread does. What the guest's memory gets in other ways, by methods of :class:`unicorn.Uc`,
is marked by wrapping these on the instance.

Unicorn is imported when a tracker is made, not before.
"""

from __future__ import annotations

import errno
import struct
import sys
import weakref
from importlib import import_module
from operator import index
from threading import RLock, get_ident
from types import FrameType
from typing import Any, Callable

from .. import _core
from .._core import CData
from .._fork import in_child
from ..block.node import BlockNode
from ..errors import InvalidError, RangeError, StateError, StoreError, UnsupportedError
from ..hbitmap import HBitmap
from ..native import Pin
from .base import Tracker, _Held

#: A unicorn.Uc, which has no types that could be checked.
Uc = Any

#: What was tested (2.1.4); what of the binding is no public interface may differ in others.
_VERSIONS = ((2, 1),)

_PAGE = 12  # log2 of a page, the granularity of a bitmap that is made here

_UINT64 = 2**64 - 1


class UnicornTracker(Tracker):
    """The writes to guest memory from address ``begin`` to ``end`` of a machine of Unicorn's.

    Addresses are physical ones, in bytes, as those of ``uc.mem_map``; offsets count from ``begin``.
    Marked is what the guest stores, each byte of it, whichever address the store begins at, and
    what ``uc.mem_write``, ``uc.mem_map``, ``uc.mem_map_ptr`` and ``uc.mmio_map`` do to the memory
    (all, where they take for an address or a size what is no number here). Several trackers of one
    machine may track what they like.

    Not marked is what Unicorn tells nobody of:

    - what the processor itself writes to physical memory: the accessed and dirty bits in the page
      tables of x86, RISC-V and SPARC guests, and on x86 the control blocks of ``vmrun``
    - whatever else puts bytes in place: ``uc.context_restore`` of a memory snapshot, buffers of
      ``mem_map_ptr`` that are written to directly, and the wrapped methods if they are called by
      way of the class, or by a reference from before the first tracker

    A store that crosses a page while the guest translates addresses (x86: ``CR0.PG``, ARM:
    ``SCTLR.M``, RISC-V: ``satp``; MIPS and SPARC: always; or hooks fill the TLB) marks all that is
    tracked, since Unicorn says only where its first byte lies.

    After some accesses Unicorn calls no hooks until the run ends: an unaligned store of an x86
    guest to code of the block that is running, and an access over two pages that faults in the
    second, where a hook of interrupts (``UC_HOOK_INTR``) goes on without setting the PC. So from an
    unaligned store to the page of the instruction or the one after it (any unaligned store, if x86
    addresses are translated or the base of CS is not known), or a memory fault that is hooked, each
    collect until the end of the run is of all, and the end of the run marks all in all targets.

    Writer: the guest may run in another thread. A store that was done before a collect began is
    in that collect or in an earlier one; one that was under way is in the next one at the latest,
    and may be in both. This holds where you drain a target yourself, or freeze a node's bitmaps,
    too, but for what such a run stores to after Unicorn fell silent, which is marked there when it
    ends. Kill: of a node's bitmaps, what its store promises; the rest goes with the guest. Fork:
    the child of a fork goes on by itself, also amid a hook. Interrupted: the constructor leaves
    neither hook nor pin; a close may be called again. Dropped: closed, with a ResourceWarning; the
    tracker keeps the machine as long as it is open. Twin: a hook of Python's may collect, close,
    and make another tracker; the first of a machine is made while it does not run. Closed in
    another thread while the machine runs: it marks nothing from then on, and the hook goes with the
    end of the run.

    >>> from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
    >>> from pybitmap import BlockGraph
    >>> ram = BlockGraph().add_node("ram", size=0x4000)
    >>> daily = ram.add_bitmap("daily", granularity=4096)
    >>> uc = Uc(UC_ARCH_X86, UC_MODE_64)
    >>> uc.mem_map(0x1000, 0x4000)
    >>> with UnicornTracker(uc, 0x1000, 0x5000, target=ram):
    ...     uc.mem_write(0x3000, b"data")
    >>> list(daily.areas())
    [(8192, 4096)]
    """

    _forks = True

    _region: CData = None
    _pin: Pin | None = None

    def __init__(
        self,
        uc: Uc,
        begin: int,
        end: int,
        target: HBitmap | BlockNode | None = None,
        *,
        at: int = 0,
        granularity: int | None = None,
    ) -> None:
        """
        :param uc: the machine; its model of CPU, and its size of pages, are chosen before
        :param begin: the first address that is tracked
        :param end: the address behind the last
        :param target: what is marked: None, a bitmap of the tracker's own; a bitmap of yours, which
            cannot be resized meanwhile; or a node, in all its bitmaps that record
        :param at: where in the target ``begin`` lies, an offset
        :param granularity: of a bitmap of its own: log2 of the bytes that a bit stands for; None:
            12, a page
        :raises UnsupportedError: if Unicorn is not installed, or of a version that was not tested;
            for PowerPC and s390x, of which it does not tell all writes
        :raises StateError: if the machine has memory hooks already, or is running and has no
            tracker
        :raises InvalidError: for a range that is empty or too large
        :raises RangeError: (an InvalidError) if the target does not have all of it
        :raises ClosedError: if the node is closed

        After each run what could not be marked in a node (it is read-only, closed, smaller than it
        was) is raised by ``emu_start``, as by :meth:`check`.

        >>> from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
        >>> uc = Uc(UC_ARCH_X86, UC_MODE_64)
        >>> uc.mem_map(0x1000, 0x4000)
        >>> with UnicornTracker(uc, 0x1000, 0x5000) as tracker:
        ...     uc.mem_write(0x3ffe, b"over two pages")
        ...     list(tracker.collect().areas())
        [(8192, 8192)]
        """
        begin, end, at = index(begin), index(end), index(at)
        size = end - begin
        if not 0 <= begin < end <= _UINT64 + 1 or size > _core.MAX_SIZE:
            raise InvalidError(
                f"guest memory [{begin:#x}, {end:#x}) is none: it begins at 0 at the lowest, ends "
                f"at 2**64 at the highest and has 1..2**63 - 1 bytes"
            )
        if target is not None and not isinstance(target, (HBitmap, BlockNode)):
            raise TypeError(
                f"target must be an HBitmap, a BlockNode or None, not {type(target).__name__}"
            )
        if target is None:
            if at:
                raise InvalidError("at is for a target of yours; there is none")
        elif granularity is not None:
            raise InvalidError("the granularity is that of the target's; give none")
        elif at < 0 or at + size > target.size:
            raise RangeError(
                f"range [{at}, {at + size}) is not inside the target of {target.size} bytes"
            )
        if isinstance(target, HBitmap):
            granularity = target.granularity
        elif granularity is None:
            granularity = _PAGE
        _core.check_size(size, granularity)
        binding = _Binding(uc)
        if target is not None:
            self._pin = target.pin()
        self._node = target if isinstance(target, BlockNode) else None
        #: Has the log all marks, and no others?
        self._collects = target is None or (isinstance(target, HBitmap) and target.size == size)
        with _Held(_changing):
            self._machine = _machine_of(uc, binding)
            self._machine.add(self)
        super().__init__(f"guest memory [{begin:#x}, {end:#x})", size, granularity)
        if isinstance(target, HBitmap) and self._collects:
            self._log = target
        bitmap = target if isinstance(target, HBitmap) else self._log
        region = _core.hbunicorn_region_alloc(
            self._machine.state,
            begin,
            end - 1,
            at,
            _core.NULL if self._node is not None else bitmap._hb,
            _core.NULL if self._node is None else self._node._tracker,
        )
        if not region:
            raise MemoryError("no memory for a tracker of guest memory")
        keep = (self._machine.owner, bitmap, self._pin)
        self._owner = _core.own(region, "hbunicorn_region_free", keep)
        self._region = region
        _core.hbunicorn_region_add(region)

    def collect(self, into: HBitmap | None = None) -> HBitmap:
        """As :meth:`Tracker.collect`; of a bitmap of yours it takes what that has.

        :raises StateError: if the target is a node, or larger than what is tracked: freeze the
            bitmaps of the node, or drain the target
        :raises MemoryError: as :meth:`check`

        >>> from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
        >>> uc = Uc(UC_ARCH_X86, UC_MODE_64)
        >>> uc.mem_map(0x1000, 0x4000)
        >>> with UnicornTracker(uc, 0x1000, 0x5000) as tracker:
        ...     uc.mem_write(0x2000, b"data")
        ...     tracker.collect().next_dirty(0), tracker.collect().empty()
        (4096, True)
        """
        return super().collect(into)

    def check(self) -> None:
        """Raise for writes of the guest's that could not be marked since this was asked last.

        Each is told once. Runs, methods that write, collects and the close ask, too; so this is for
        runs that they do not see, as by ``Uc.emu_start(uc, ...)``.

        :raises ReadonlyError, RangeError, ClosedError, StateError: for a node, as its
            :meth:`~pybitmap.BlockNode.mark_dirty` has them
        :raises StoreError: if the node was truncated or closed for longer than writes wait (10 s)
        :raises MemoryError: if there was no memory for the thread to mark

        >>> from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
        >>> uc = Uc(UC_ARCH_X86, UC_MODE_64)
        >>> uc.mem_map(0x1000, 0x4000)
        >>> with UnicornTracker(uc, 0x1000, 0x5000) as tracker:
        ...     tracker.check()                     # no error: all could be marked
        """
        if self._region is None:
            return
        code, address = _core.new("int *"), _core.new("uint64_t *")
        failures = _core.hbunicorn_region_failures(self._region, code, address)
        if not failures:
            return
        lost = (
            f"{failures} marks of writes to {self._what} failed, the first of one at "
            f"{address[0]:#x}; take all of it for dirty"
        )
        if code[0] == -errno.EAGAIN:
            raise StoreError(f"{lost}: the node was being truncated or closed", errno.EAGAIN)
        if self._node is None:
            raise MemoryError(f"{lost}: no memory for the thread to mark")
        cause = self._node._refused(code[0], "one of them")
        raise type(cause)(f"{lost}: {cause}")

    def close(self) -> None:
        """Track no longer; may be called twice. What was not collected is forgotten.

        :raises ReadonlyError, RangeError, ...: as :meth:`check`; it is closed all the same

        >>> from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
        >>> uc = Uc(UC_ARCH_X86, UC_MODE_64)
        >>> uc.mem_map(0x1000, 0x4000)
        >>> tracker = UnicornTracker(uc, 0x1000, 0x5000)
        >>> tracker.close()
        >>> tracker.closed
        True
        """
        super().close()
        self.check()

    def _fetch(self) -> None:
        if not self._collects:
            instead = "freeze the bitmaps of the node" if self._node else "drain the target"
            raise StateError(f"{self._what} is marked in a target of yours: {instead} instead")
        self._machine.rest()
        self.check()

    def _release(self) -> None:
        if self._region is not None:
            _core.hbunicorn_region_remove(self._region)
        if self._pin is not None:
            self._pin.close()
        with _Held(_changing):
            self._machine.remove(self)
            self._machine.settle()

    def _await_node(self) -> None:
        """Wait until writes to the node need not; raises if they would wait for this thread."""
        node = self._node
        if node is not None:
            node._patiently(lambda: _core.hbtracker_try_mark(node._tracker, 0, 0))


# ---- Unicorn --------------------------------------------------------------------------------


class _Binding:
    """All that is used of Unicorn's Python binding and is no public interface of it.

    :raises UnsupportedError: if there is none, or one that was not tested, or for a machine of
        whose writes it does not tell all
    """

    def __init__(self, uc: Uc) -> None:
        try:
            unicorn: Any = import_module("unicorn")
        except ImportError as error:
            raise UnsupportedError(
                f"Unicorn is not installed ({error}): pip install 'unicorn>=2.1,<2.2'"
            ) from None
        if not isinstance(uc, unicorn.Uc):
            raise TypeError(f"uc must be a unicorn.Uc, not {type(uc).__name__}")
        if unicorn.uc_version()[:2] not in _VERSIONS:
            raise UnsupportedError(
                f"Unicorn {unicorn.__version__} is not known here: UnicornTracker needs parts of "
                f"its binding that differ, and was tested with 2.1; install unicorn>=2.1,<2.2, or "
                f"track with MemoryTracker"
            )
        try:
            import ctypes

            binding: Any = import_module("unicorn.unicorn_py3.unicorn")
            library = binding.uclib
            self.engine = int(uc._uch.value or 0)
            self.callbacks: dict[int, Any] = uc._callbacks
            self.hook_add, self.hook_del, self.reg_read = (
                int(ctypes.cast(function, ctypes.c_void_p).value or 0)
                for function in (library.uc_hook_add, library.uc_hook_del, library.uc_reg_read)
            )
            self.memory_hook = binding.HOOK_MEM_ACCESS_CFUNC
            self.tlb_hook = binding.HOOK_TLB_FILL_CFUNC
            self.interrupt_hook = binding.HOOK_INTR_CFUNC
        except (ImportError, AttributeError) as error:
            raise UnsupportedError(
                f"Unicorn {unicorn.__version__} has another binding than the 2.1 that "
                f"UnicornTracker was tested with: {error}"
            ) from None
        self.error = unicorn.UcError
        self.running = unicorn.Uc.emu_start.__code__

    @staticmethod
    def flush(uc: Uc) -> None:
        """Forget how addresses are translated."""
        const = import_module("unicorn.unicorn_const")
        uc.ctl(const.UC_CTL_TLB_FLUSH, const.UC_CTL_IO_WRITE)

    def has_memory_hooks(self) -> bool:
        return self._has(self.memory_hook)

    def has_tlb_hooks(self) -> bool:
        return self._has(self.tlb_hook)

    def has_interrupt_hooks(self) -> bool:
        return self._has(self.interrupt_hook)

    def _has(self, kind: Any) -> bool:
        if not self.callbacks:
            return False
        return any(isinstance(hook, kind) for hook in list(self.callbacks.values()))


def _guest(uc: Uc) -> CData:
    """What its addresses are like.

    :raises UnsupportedError: for an architecture of which Unicorn does not tell all writes
    """
    unicorn_const, x86_const, arm_const, arm64_const, riscv_const, m68k_const = (
        import_module(f"unicorn.{name}_const")
        for name in ("unicorn", "x86", "arm", "arm64", "riscv", "m68k")
    )
    arch, mode = uc.ctl_get_arch(), uc.ctl_get_mode()
    silent = {
        unicorn_const.UC_ARCH_S390X: ("s390x", "MVC"),
        unicorn_const.UC_ARCH_PPC: ("PowerPC", "stmw, stswi and dcbz"),
    }
    if arch in silent:
        name, what = silent[arch]
        raise UnsupportedError(
            f"Unicorn does not tell what {name} guests write by {what}: track the memory with "
            f"MemoryTracker"
        )
    #: The register that turns translation on: its number, the bit, and what uc_reg_read is given.
    registers = {
        unicorn_const.UC_ARCH_X86: (x86_const.UC_X86_REG_CR0, 1 << 31, b""),
        unicorn_const.UC_ARCH_ARM: (
            arm_const.UC_ARM_REG_CP_REG,
            1,
            struct.pack("=8I", 15, 0, 0, 1, 0, 0, 0, 0),  # SCTLR
        ),
        unicorn_const.UC_ARCH_ARM64: (
            arm64_const.UC_ARM64_REG_CP_REG,
            1,
            struct.pack("=6I", 1, 0, 3, 0, 0, 0),  # SCTLR_EL1
        ),
        unicorn_const.UC_ARCH_RISCV: (
            riscv_const.UC_RISCV_REG_SATP,
            0xF << 60 if mode & unicorn_const.UC_MODE_RISCV64 else 1 << 31,
            b"",
        ),
        unicorn_const.UC_ARCH_M68K: (m68k_const.UC_M68K_REG_CR_TC, 1 << 15, b""),
    }
    if arch == unicorn_const.UC_ARCH_ARM and (
        mode & unicorn_const.UC_MODE_MCLASS
        or uc.ctl_get_cpu_model()
        in {getattr(arm_const, f"UC_CPU_ARM_CORTEX_M{n}") for n in (0, 3, 33, 4, 7)}
    ):
        del registers[arch]  # these do not translate
    register, mask, query = registers.get(arch, (0, 0, b""))
    wide = {
        unicorn_const.UC_ARCH_X86: mode & unicorn_const.UC_MODE_64,
        unicorn_const.UC_ARCH_ARM64: True,
        unicorn_const.UC_ARCH_MIPS: mode & unicorn_const.UC_MODE_MIPS64,
        unicorn_const.UC_ARCH_RISCV: mode & unicorn_const.UC_MODE_RISCV64,
        unicorn_const.UC_ARCH_SPARC: mode & unicorn_const.UC_MODE_SPARC64,
    }
    guest = _core.new("HBUnicornGuest *")
    # That of ARM64 is a part of a page, as old ARMs had.
    guest.page = max(
        uc.query(unicorn_const.UC_QUERY_PAGE_SIZE),
        4096 if arch == unicorn_const.UC_ARCH_ARM64 else 0,
    )
    guest.last = _UINT64 if wide.get(arch) else 2**32 - 1
    # Of MIPS and SPARC some addresses are always translated.
    guest.always = arch in (unicorn_const.UC_ARCH_MIPS, unicorn_const.UC_ARCH_SPARC)
    guest.reg = register
    guest.mask = mask
    guest.value_at = len(query)
    guest.query = query.ljust(64, b"\0")
    if arch == unicorn_const.UC_ARCH_X86:
        guest.pc = x86_const.UC_X86_REG_RIP if wide[arch] else x86_const.UC_X86_REG_EIP
        guest.cs = 0 if wide[arch] else x86_const.UC_X86_REG_CS
        guest.real = mode & unicorn_const.UC_MODE_16 != 0
    # Calls of the system are exceptions, too, and so common that they have to be left out.
    faults = {
        unicorn_const.UC_ARCH_X86: {8, 11, 12, 13, 14, 17},
        unicorn_const.UC_ARCH_MIPS: set(range(64)) - {17, 18, 22},
    }.get(arch)
    if faults is None:
        calls = {
            unicorn_const.UC_ARCH_ARM: {1, 2, 7, 11, 13, 16},
            unicorn_const.UC_ARCH_ARM64: {1, 2, 7, 11, 13, 16},
            unicorn_const.UC_ARCH_RISCV: {2, 3, 8, 9, 10, 11},
            unicorn_const.UC_ARCH_M68K: set(range(4, 128)),
        }
        faults = set(range(128)) - calls.get(arch, set())
    bits = sum(1 << number for number in faults)
    guest.faults = [bits & _UINT64, bits >> 64]
    return guest


# ---- machines -------------------------------------------------------------------------------

#: Held by who makes and closes trackers.
_changing = RLock()


class _Machine:
    """What the trackers of one machine share: the hook, and what is done beside it.

    Lives as long as one of them is open; what C has of it, as long as the hook may be called.
    """

    def __init__(self, uc: Uc, binding: _Binding) -> None:
        self.uc = uc
        #: Those that are open, and those of them that mark in nodes.
        self.trackers: set[weakref.ref[UnicornTracker]] = set()
        self.nodes: set[weakref.ref[UnicornTracker]] = set()
        self._translates = False
        self._binding = binding
        self.state: CData = _core.hbunicorn_alloc(_guest(uc))
        if not self.state:
            raise MemoryError("no memory for a hook")
        self.owner = _core.own(self.state, "hbunicorn_free")
        # Keeps what C has until the machine is closed, unless the hook is taken away before. Where
        # machine and trackers go in one round of the collector, the machine is closed first.
        self._finalizer = weakref.finalize(uc, _closed, self.owner)
        self._methods: list[_Method] = [
            _Run(self, "emu_start"),
            _Write(self, "mem_write", ("address", "data")),
            _Write(self, "mem_map", ("address", "size")),
            _Write(self, "mem_map_ptr", ("address", "size")),
            _Write(self, "mmio_map", ("address", "size")),
            _Hooks(self, "hook_add"),
            _Hooks(self, "hook_del"),
        ]
        for method in self._methods:
            method.put(uc)
        code = _core.hbunicorn_hook(
            self.state,
            _core.at("void *", binding.engine),
            binding.hook_add,
            binding.hook_del,
            binding.reg_read,
        )
        if code:
            raise binding.error(code)
        self.listen()
        # Pages that were written to before may be open to stores that no hook hears of.
        binding.flush(uc)
        _machines[id(uc)] = self

    @property
    def settled(self) -> bool:
        """Is the hook away, or the machine closed?"""
        return not self._finalizer.alive

    def settle(self) -> None:
        """Take the hook away, if nobody needs it and no other thread may be in it."""
        if any(reference() for reference in self.trackers) or self.settled:
            return
        if self.threads() - {get_ident()}:
            return  # when the run ends
        for method in self._methods:
            method.remove(self.uc)
        _core.hbunicorn_unhook(self.state)
        self._finalizer.detach()

    def threads(self) -> set[int]:
        """Those that are running it."""
        return _threads_in(self.uc, self._binding)

    def rest(self) -> None:
        """Nothing is under way, unless it runs."""
        deaf = _core.hbunicorn_deaf(self.state)
        if not deaf and not _core.hbunicorn_unfinished(self.state):
            return
        if not self.threads():
            _core.hbunicorn_run_ends(self.state, _core.NULL)
            _core.hbunicorn_hears(self.state, deaf)
        elif deaf:
            _core.hbunicorn_mark_all(self.state)

    def listen(self) -> None:
        """To exceptions of the guest's, as long as others do."""
        code = _core.hbunicorn_listen(self.state, self._binding.has_interrupt_hooks())
        if code:
            raise self._binding.error(code)

    def add(self, tracker: UnicornTracker) -> None:
        """Weakly: one whose making was interrupted just goes."""
        self.trackers.add(weakref.ref(tracker, self.trackers.discard))
        if tracker._node is not None:
            self.nodes.add(weakref.ref(tracker, self.nodes.discard))

    def remove(self, tracker: UnicornTracker) -> None:
        for some in (self.nodes, self.trackers):
            some.discard(weakref.ref(tracker))

    def ready(self) -> None:
        """Something is about to be written."""
        for reference in list(self.nodes):
            tracker = reference()
            if tracker is not None:
                tracker._await_node()
        translates = self._binding.has_tlb_hooks()
        if translates is not self._translates:
            _core.hbunicorn_translates(self.state, translates)
            self._translates = translates
        self.listen()

    def done(self, failed: bool) -> None:
        """It was written; did a mark fail?"""
        if not self.trackers:
            with _Held(_changing):
                self.settle()
        if failed:
            for reference in list(self.trackers):
                tracker = reference()
                if tracker is not None:
                    tracker.check()

    def __del__(self) -> None:
        if hasattr(self, "_methods"):
            with _Held(_changing):
                self.settle()


def _closed(owner: object) -> None:
    """The machine is; nobody calls the hook any more."""


#: By the id of what is a Uc, or was.
_machines: weakref.WeakValueDictionary[int, _Machine] = weakref.WeakValueDictionary()


def _machine_of(uc: Uc, binding: _Binding) -> _Machine:
    """
    :raises StateError: if the hook cannot be the first, or be added now
    """
    machine = _machines.get(id(uc))
    if machine is not None and not machine.settled:
        return machine  # it keeps its Uc, so this is it
    if _threads_in(uc, binding):
        raise StateError(
            "the machine is running: make its first tracker before it does (others may be made "
            "meanwhile)"
        )
    if binding.has_memory_hooks():
        raise StateError(
            "the machine has memory hooks already, and where one of them stops it Unicorn leaves "
            "out those behind: delete them, make the tracker, and add them again"
        )
    return _Machine(uc, binding)


def _threads_in(uc: Uc, binding: _Binding) -> set[int]:
    """The threads that are running the machine, by their frames.

    A count of runs would miss those by a reference to ``emu_start`` from before the first tracker.
    """
    found = set()
    frames: dict[int, FrameType | None] = dict(sys._current_frames())
    for thread in frames:
        while (frame := frames[thread]) is not None:
            if frame.f_code is binding.running and frame.f_locals.get("self") is uc:
                found.add(thread)
                break
            frames[thread] = frame.f_back
    frame = None  # one of them is this function's
    frames.clear()
    return found


@in_child
def _after_fork() -> None:
    """In the child: threads that were in the hook, or had the lock, are gone."""
    global _changing
    _changing = RLock()
    for machine in list(_machines.values()):
        _core.hbunicorn_forked(machine.state)


# ---- methods of the machine -----------------------------------------------------------------


class _Method:
    """A method of a machine, wrapped as long as the machine has trackers."""

    def __init__(self, machine: _Machine, name: str) -> None:
        self._machine = weakref.ref(machine)
        self._name = name
        #: Of somebody who had wrapped it before.
        self._others = machine.uc.__dict__.get(name)
        self._before: Callable[..., Any] = getattr(machine.uc, name)

    def put(self, uc: Uc) -> None:
        setattr(uc, self._name, self)

    def remove(self, uc: Uc) -> None:
        """If somebody has wrapped it since, it stays there, and passes on."""
        if uc.__dict__.get(self._name) is not self:
            return
        if self._others is None:
            delattr(uc, self._name)
        else:
            setattr(uc, self._name, self._others)

    def __call__(self, *args: Any, **named: Any) -> Any:
        machine = self._machine()
        if machine is None or machine.settled:
            return self._before(*args, **named)
        return self._around(machine, args, named)

    def _around(self, machine: _Machine, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        raise NotImplementedError


class _Write(_Method):
    """Changes memory: marked before, for an interruption may come in between, and after."""

    def __init__(self, machine: _Machine, name: str, parameters: tuple[str, str]) -> None:
        super().__init__(machine, name)
        self._parameters = parameters

    def _around(self, machine: _Machine, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        given = {**dict(zip(self._parameters, args)), **named}
        address, what = (given.get(name) for name in self._parameters)
        nbytes = what if self._name != "mem_write" else _length(what)
        first, nbytes = _uint64(address), _uint64(nbytes)
        machine.ready()
        failed = self._mark(machine, first, nbytes)
        try:
            return self._before(*args, **named)
        finally:
            failed |= self._mark(machine, first, nbytes)
            machine.done(failed and not _interrupted())

    @staticmethod
    def _mark(machine: _Machine, first: int | None, nbytes: int | None) -> bool:
        if first is None or nbytes is None:
            return bool(_core.hbunicorn_mark_all(machine.state))
        return bool(_core.hbunicorn_written(machine.state, first, nbytes))


def _interrupted() -> bool:
    """Is a Ctrl-C on its way, which no other error should hide? What failed is told later."""
    error = sys.exc_info()[1]
    return error is not None and not isinstance(error, Exception)


def _length(data: Any) -> int:
    try:
        return len(data)
    except TypeError:
        return 0  # the method says what is wrong with it


def _uint64(number: Any) -> int | None:
    """As ctypes passes it; None: no number is known."""
    try:
        return index(getattr(number, "value", number)) & _UINT64
    except TypeError:
        return None


class _Hooks(_Method):
    """Adds or deletes hooks."""

    def _around(self, machine: _Machine, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        try:
            return self._before(*args, **named)
        finally:
            machine.listen()


class _Run(_Method):
    """Runs the machine."""

    def _around(self, machine: _Machine, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        machine.ready()
        # Does it lie in a hook of another run?
        nested = _core.hbunicorn_unfinished(machine.state)
        outer = _core.new("HBUnicornWrite *") if nested else _core.NULL
        failed = False
        try:
            if nested:
                _core.hbunicorn_run_begins(machine.state, outer)
            return self._before(*args, **named)
        finally:
            deaf = _core.hbunicorn_deaf(machine.state)
            failed = _core.hbunicorn_run_ends(machine.state, outer)
            if deaf and not machine.threads():
                _core.hbunicorn_hears(machine.state, deaf)
            machine.done(failed and not _interrupted())
