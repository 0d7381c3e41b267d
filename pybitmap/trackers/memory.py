# SPDX-License-Identifier: MIT
"""MemoryTracker: what is written to memory of this process, which the kernel records.

No hook and no signal: the first write to a page after a collect is a page fault that the kernel
settles by itself, all others cost nothing. ``csrc/memory.c`` has how.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Callable
from weakref import WeakSet

from .. import _core
from .._fork import in_child
from ..errors import BusyError, ClosedError, InvalidError, StoreError, UnsupportedError
from ..hbitmap import HBitmap
from .base import Tracker, _Held

if TYPE_CHECKING:
    from typing_extensions import Self

    from .._typing import Writable

_trackers: WeakSet[MemoryTracker] = WeakSet()

_FEATURES = {
    _core.HBMEM_WP_UNPOPULATED: "UFFD_FEATURE_WP_UNPOPULATED",
    _core.HBMEM_WP_ASYNC: "UFFD_FEATURE_WP_ASYNC",
}


class MemoryTracker(Tracker):
    """What was written to a buffer of this process: an emulator's RAM, for example.

    Any memory that begins at a page: an ``mmap.mmap``, ``shared_memory``, a memoryview of a part;
    for what has an address only there is :meth:`at`. Linux 6.7 or newer on x86-64 (later on other
    processors), no rights. A bit is a page; if the buffer ends within one, what follows it there
    counts, too.

    Seen is every write of this process, whoever makes it: Python, native code, KVM, and the kernel
    for it (``readinto``, ``process_vm_writev``). What ``madvise(MADV_DONTNEED)`` empties of private
    memory without a file is reported. Not seen, and in no way noticed:

    - writes that reach the same memory another way: of another process to shared memory, through a
      second mapping, or through the file (``write``, ``truncate``, ``MADV_REMOVE``);
    - what MADV_DONTNEED takes back from a private mapping *of a file*;
    - devices that write to pages which they hold (``O_DIRECT``, ``io_uring`` buffers, VFIO): these
      are reported when the device takes hold of them, not when the bytes arrive.

    Writer: as :class:`Tracker` says; the page of a write that a collect comes upon may be in that
    one as well as in the next, which has the write. Kill:
    nothing stays behind. Fork: the child is refused, and cannot harm the parent's, which goes on.
    Drop: the buffer stays lent out until :meth:`close` (``mmap.close()`` raises BufferError; PyPy's
    does not), and is given back if the making is interrupted. Twin: memory has one tracker;
    another, of whatever part of it, is a BusyError, and so is a userfaultfd of somebody else.

    >>> ram = mmap.mmap(-1, 1 << 20)
    >>> with MemoryTracker(ram) as tracker:
    ...     ram[5000:5003] = b"new"
    ...     written = tracker.collect()
    >>> 5000 in written, 0 in written, tracker.address % mmap.PAGESIZE
    (True, False, 0)
    """

    _replaced = False  # another tracker is where this one was

    def __init__(self, buffer: Writable) -> None:
        """Writes from now on are recorded; those before are not.

        :param buffer: writable and contiguous, and begins at a page
        :raises TypeError: if it is no buffer, or read-only
        :raises InvalidError: if it does not begin at a page, or is no memory that can be tracked
        :raises BusyError: if some of it is tracked already
        :raises UnsupportedError: where the kernel cannot, or does not let; it says what is missing
        :raises StoreError: if the system lacks something for the moment, descriptors for example
        """
        memory = _core.raw_array("memory that is to be tracked", buffer, writable=True)
        address, nbytes = _core.address(memory), len(memory)
        if address % mmap.PAGESIZE and nbytes:
            _core.release(memory)
            raise InvalidError(
                f"the memory begins at {address:#x}, within a page of {mmap.PAGESIZE} bytes, and "
                "the kernel tracks whole pages: take an mmap.mmap(-1, nbytes), or a slice that "
                "begins at one"
            )
        self._buffer = memory
        self._memory = _core.new("HBMemory *", {"uffd": -1, "pagemap": -1})
        # An interruption may come at any line: it is closed when nobody has it any more.
        self._owner = _core.own(self._memory, "hbmem_close", (self._memory, memory))
        _trackers.add(self)
        code = _core.hbmem_open(self._memory, address, nbytes)
        if code:
            _core.release(memory)
            raise _failed_to_open(self._memory, -code)
        for other in list(_trackers):
            if other is not self and not other.closed:
                other._give_way(address, nbytes)
        super().__init__(f"memory at {address:#x}", nbytes, mmap.PAGESIZE.bit_length() - 1)

    @classmethod
    def at(cls, address: int, nbytes: int, keep: object = None) -> Self:
        """The same of memory that is no buffer: Unicorn's ``mem_map_ptr``, ctypes, a C library.

        :param keep: is kept as long as the tracker is open. Whoever unmaps the memory meanwhile
            gets a StoreError from the next collect
        :raises InvalidError: also if not all of it is mapped; else as the constructor

        >>> import ctypes
        >>> ram = mmap.mmap(-1, 1 << 20)
        >>> address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
        >>> with MemoryTracker.at(address, len(ram), keep=ram) as tracker:
        ...     ram[5000] = 1
        ...     5000 in tracker.collect()
        True
        """
        return cls(_core.memory_at(address, nbytes, keep))

    @property
    def address(self) -> int:
        """Where what is tracked begins."""
        return int(self._memory.address)

    def _fetch(self) -> None:
        self._told(_core.hbmem_collect(self._memory, self._log._hb, _core.NULL))

    def _rewind(self, same: _core.CData, restore: Callable[[HBitmap], int]) -> int:
        """Call ``restore`` with what was written, which makes the memory there as ``same`` has it,
        and returns its answer. What is so then is not in the next collect. Raises as a collect.

        Two looks instead of one: pages that are not protected yet are written to without a fault.
        """
        with _Held(self._lock):
            self._check()
            self._told(_core.hbmem_look(self._memory, self._log._hb))
            with self._log.taking() as written:
                answer = restore(written)
                self._told(_core.hbmem_collect(self._memory, self._log._hb, same))
                written.done()
        return answer

    def _told(self, code: int) -> None:
        """
        :raises StoreError, StateError, ClosedError: if that is what the kernel answered
        """
        code = -code
        if code == errno.EBADF and self._replaced:
            code = errno.EPERM
        if code == errno.EBADF:
            raise ClosedError(f"the tracker of {self._what} is closed")
        if code == errno.ESRCH:
            self._check()  # in the child of a fork
        if code in (errno.ENXIO, errno.EPERM):
            now = "no longer mapped" if code == errno.ENXIO else "mapped anew"
            raise StoreError(
                f"some of the {self.size} bytes of {self._what} is {now}, so what was written "
                "there is not known: close the tracker, and track what is there now by a new one",
                code,
            )
        if code:
            raise StoreError(
                f"the kernel does not tell what was written to {self._what}: {os.strerror(code)}",
                code,
            )

    def _give_way(self, address: int, nbytes: int) -> None:
        """To a tracker of what is mapped there now: the kernel did not say that it is tracked, so
        what this one had there is gone, and its scans would take the other's writes.
        """
        if self.address < address + nbytes and address < self.address + self.size:
            with _Held(self._lock):
                self._replaced = not self.closed
                _core.hbmem_close(self._memory)

    def _release(self) -> None:
        _core.hbmem_close(self._memory)
        _core.release(self._buffer)


def _failed_to_open(memory: _core.CData, code: int) -> Exception:
    """The exception for what ``hbmem_open`` returned."""
    step, reason = memory.step, os.strerror(code)
    what = f"the {memory.nbytes} bytes of memory at {memory.address:#x}"
    kernel = f"{os.uname().sysname} {os.uname().release}"
    if code == errno.ENOMEM:
        return MemoryError(f"no memory for tracking {what}")
    if code in (errno.EMFILE, errno.ENFILE):
        return StoreError(f"two descriptors are needed for {what}: {reason}", code)
    if step == _core.HBMEM_SYSTEM:
        return UnsupportedError(f"memory is tracked on Linux only (6.7 or newer), not on {kernel}")
    if step == _core.HBMEM_PAGEMAP:
        return UnsupportedError(
            f"/proc/self/pagemap cannot be opened ({reason}): /proc must be mounted, and a process "
            "that has changed its user may look at itself after prctl(PR_SET_DUMPABLE, 1)",
            code,
        )
    if step == _core.HBMEM_SCAN:
        return UnsupportedError(
            f"this kernel, {kernel}, has no PAGEMAP_SCAN ({reason}): Linux 6.7 or newer is needed",
            code,
        )
    if step == _core.HBMEM_FAULTFD:
        return UnsupportedError(
            f"the kernel, {kernel}, gives no userfaultfd ({reason}): if that is a filter of system "
            "calls, as containers have, it must allow userfaultfd(2), or /dev/userfaultfd must be "
            "there and writable; if it was built without CONFIG_USERFAULTFD, it cannot",
            code,
        )
    if step == _core.HBMEM_FEATURES:
        lacking = [name for bit, name in _FEATURES.items() if memory.lacking & bit]
        return UnsupportedError(
            f"this kernel, {kernel} on {os.uname().machine}, lacks "
            f"{' and '.join(lacking) or reason}: Linux 6.7 or newer is needed, with "
            "CONFIG_PTE_MARKER_UFFD_WP, on a processor for which it can protect pages",
            code,
        )
    if step == _core.HBMEM_MAPPED:
        return InvalidError(f"not all of {what} is mapped")
    if code == errno.EBUSY:
        return BusyError(
            f"some of {what} is tracked already, or registered with another userfaultfd: close "
            "that first"
        )
    if code in (errno.EINVAL, errno.EPERM):
        return InvalidError(
            f"the kernel cannot track {what} ({reason}): it is a file's that was opened read-only, "
            "or a device's, or cuts a huge page of hugetlbfs"
        )
    return StoreError(f"the kernel cannot track {what}: {reason}", code)


@in_child
def _after_fork() -> None:
    """In the child: its descriptors are its parent's, and would act on the parent's memory."""
    for tracker in _trackers:
        _core.hbmem_close(tracker._memory)
