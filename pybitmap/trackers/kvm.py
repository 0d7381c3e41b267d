# SPDX-License-Identifier: MIT
"""What the processors of a virtual machine of KVM's write to its memory.

A machine has one of two: a log, a bit for each page of a slot (:class:`KvmDirtyLog`), or rings,
a list for each processor (:class:`KvmDirtyRing`). C fetches, has KVM watch the pages again, and
marks, in this order and in one call; ``csrc/kvm.h`` says why.

Source: the Linux kernel's Documentation/virt/kvm/api.rst, sections 4.8 (KVM_GET_DIRTY_LOG), 4.117
(KVM_CLEAR_DIRTY_LOG), 7.18 (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) and 8.29 (KVM_CAP_DIRTY_LOG_RING).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from operator import index
from threading import RLock
from typing import TypeVar

from .. import _core
from .._core import CData
from .._fork import in_child
from ..errors import (
    BitmapError,
    ClosedError,
    InvalidError,
    StateError,
    StoreError,
    UnsupportedError,
)
from .base import Tracker, _Held, _trackers

_PAGE = mmap.PAGESIZE
_MOST_PAGES = 2**31 - 1  # of a slot

_Tracking = TypeVar("_Tracking", bound="_Kvm")

#: Held while one is made, so that none is made twice.
_making = RLock()


class _Kvm(Tracker):
    """What the two have in common: what C holds."""

    _held: CData
    _machine = -1  # its descriptor; a number, as another thread may close it

    def _begin(self) -> CData:
        """An ``HBKvm **`` for C to fill; it is given back at the latest when this goes."""
        self._held = _core.new("HBKvm **")
        self._owner = _core.own(self._held, "hbkvm_close", self._held)
        return self._held

    def _start(self, what: str, size: int) -> None:
        self._machine = _core.hbkvm_machine(self._held)
        super().__init__(what, size, _PAGE.bit_length() - 1)

    def _release(self) -> None:
        self._machine = -1
        _core.hbkvm_close(self._held)

    def _check_fetched(self, code: int) -> None:
        if code == -errno.EBADF:  # by a handler, after the last look
            raise ClosedError(f"the tracker of {self._what} is closed")
        if code:
            raise _failed(code, self._what, "the machine")


class KvmDirtyLog(_Kvm):
    """The pages of a slot that the machine's processors wrote to, by KVM's log.

    The slot was set with KVM_MEM_LOG_DIRTY_PAGES. What is in its log already is in the first
    collect.

    :param vm_fd: the machine, as KVM_CREATE_VM gave it. It is duplicated: close it when you like,
        the machine lives until the tracker is closed, too
    :param slot: its number; the address space, if it is not 0, in bits 16 to 31
    :param nbytes: of its memory, whole pages
    :param first: the offset that its memory has in what is collected, whole pages: the trackers of
        several slots collect into one bitmap, each at its place
    :param size: of what is collected, in bytes; None: to the end of the slot's memory. Trackers
        that collect into one bitmap have the same
    :param manual: enable KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 where the kernel has it. Pages are then
        cleared by a call of its own, only those that were fetched, 1 GiB at a time, so that
        the processors wait less. It is a setting of the whole machine and stays: whoever else reads
        logs there has to clear them. False: the setting is left alone, and has to be off: else
        whatever was written once is in each collect
    :param initially_set: with KVM_DIRTY_LOG_INITIALLY_SET: logs that begin later begin with all
        pages. Say so if the machine relies on it; what was set before is overwritten
    :raises InvalidError: if vm_fd is not open, or no machine's; if there can be no such slot, or it
        has another size; for parts of pages
    :raises StateError: if the slot has no log, or a tracker already; if the machine has rings; or
        if it is another process's. A collect: if the slot is gone, or has another size
    :raises UnsupportedError: if there is no KVM here, or it lacks what is asked for
    :raises StoreError: if the system refuses something else; ``errno`` says what

    Granularity: the host's page. Offsets are bytes from where slots have ``first`` 0.

    ``live_copy(tracker, ...)`` is for a machine with one slot: its first round is all of ``size``,
    also what other slots have there, and its others have this slot only. Several slots are copied
    from *one* bitmap with a mark on each slot's place, into which all trackers are collected:
    ``live_copy(dirty, copy, paused=..., full=False, flush=collect)``, where ``paused`` collects
    once more when the processors stand (``examples/kvm_slots.py``). Or by a
    :class:`KvmDirtyRing`, which is one tracker of all slots.

    Writes of the machine's processors are seen, and those that KVM makes for them. *Not* seen: what
    this or another process writes to the memory that the machine has, by itself or by system
    calls (a device that the program emulates, read(2)), and what devices write that were
    given to the machine (VFIO), or kernel threads (vhost: has a log of its own). Mark these
    yourself, or use a MemoryTracker. That goes for the pages a processor has under way, too: a
    write is seen once the machine has made it, so stop the processors before the last collect.

    Writer: the machine runs beside it; each write is in that collect or in the next. Kill: the log
    is the machine's and goes with it, so nothing is left to be right. Fork: KVM knows only the
    process that made the machine, so the child is refused (StateError) and holds nothing of it.
    Dropped: closed, see :class:`Tracker`. Twin: a second tracker of the slot is refused, wherever
    kcmp(2) is to be had; other readers of the log in this process take what is then in no collect.

    A slot that is removed or set anew begins with another log, and what was in the old one is in no
    collect: collect before. As long as there is none, or it has another size, collects are refused
    (StateError), and what is in its log then is not told: close this tracker, make another, and
    take all of the slot as written. One that has the same size is gone on with; that it is another
    is not noticed. Sizes are asked of KVM by its rules for clearing, at each fetch, whatever
    ``manual`` is. Where it has no KVM_CLEAR_DIRTY_LOG (Linux before 5.2, PowerPC), it has none to
    tell: ``nbytes`` is believed, and only a slot that ends in a later group of 64 pages is refused.
    """

    def __init__(
        self,
        vm_fd: int,
        slot: int,
        nbytes: int,
        first: int = 0,
        *,
        size: int | None = None,
        manual: bool = True,
        initially_set: bool = False,
    ) -> None:
        vm_fd, slot = _descriptor("vm_fd", vm_fd), _slot(slot)
        self._first, nbytes = _place(slot, first, nbytes)
        size = _size(size, self._first + nbytes)
        if initially_set and not manual:
            raise InvalidError("initially_set is of the manual log, but manual is False")
        self._slot = slot
        flags = _core.HBKVM_MANUAL * bool(manual) | _core.HBKVM_INITIALLY_SET * bool(initially_set)
        npages = _core.new("uint64_t *", nbytes // _PAGE)
        with _Held(_making):
            for other in _others(KvmDirtyLog, vm_fd):
                if other._slot == slot:
                    raise StateError(_twin(f"slot {slot}"))
            code = _core.hbkvm_open_log(self._begin(), vm_fd, slot, npages, flags)
            if code == -errno.ERANGE:
                raise InvalidError(f"slot {slot} has {npages[0] * _PAGE} bytes, not {nbytes}")
            if code == -errno.ENXIO:
                raise StateError("this machine has dirty rings and no log: use KvmDirtyRing")
            if code:
                raise _failed(code, f"slot {slot}", f"vm_fd {vm_fd}")
            self._start(f"slot {slot} of a KVM machine", size)

    def _fetch(self) -> None:
        code = _core.hbkvm_fetch_log(self._held, self._log._hb, self._first)
        if code in (-errno.EFAULT, -errno.EINVAL):
            raise StateError(
                f"{self._what} has another size by now, and what was written there is not all "
                "known: close this tracker, make another, and take all of the slot as written"
            )
        self._check_fetched(code)


class KvmDirtyRing(_Kvm):
    """The pages that a machine's processors wrote to, by KVM's dirty rings.

    For a machine on which KVM_CAP_DIRTY_LOG_RING (or _ACQ_REL) was enabled before it had
    processors; its slots were set with KVM_MEM_LOG_DIRTY_PAGES. A fetch costs what was written, not
    what there is: for large machines that write little.

    :param vm_fd: the machine, as KVM_CREATE_VM gave it. It is duplicated, and the rings are mapped:
        the machine lives until the tracker is closed, too
    :param vcpu_fds: *all* of its processors, as KVM_CREATE_VCPU gave them: the writes of one that
        is left out are not seen. For one that is added later close this tracker and make another
    :param slots: ``{slot: (first, nbytes)}``: where the memory of each slot lies in what is
        collected, whole pages; the address space in bits 16 to 31 of the slot. Two may lie at
        the same place, as memory that the machine has at two addresses. Without gaps between
        them, all of ``size`` is memory, as ``live_copy`` takes it for its first round
    :param size: of what is collected, in bytes; None: to the end of what lies last
    :raises InvalidError: if a descriptor is not open, or not what it should be, or there twice; for
        parts of pages, or no slots
    :raises StateError: if the machine has no rings, or a tracker already; or if it is another
        process's
    :raises UnsupportedError, StoreError: see :class:`KvmDirtyLog`

    A collect empties the rings, so a processor that KVM_RUN left with KVM_EXIT_DIRTY_RING_FULL
    needs a collect and can go on: nothing is lost. (There are kernels that let it run on with a
    full ring, and lose entries: then a collect has all that is in ``slots``.) A page that was
    written in no slot that is named raises StateError, once: what else was there is in the next
    collect.

    Writes are seen, and not, as by :class:`KvmDirtyLog`, but for one thing: what a running
    processor wrote last may be not in its ring yet but in the hardware, until it leaves KVM_RUN. It
    is in a later collect. So send the processors a signal before a collect that has to have all
    (the last one, when they are stopped, has it). On arm64 KVM itself writes some tables of
    the interrupt controller; with KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP they are in the log, for a
    :class:`KvmDirtyLog` beside this.

    Writer, kill, fork, dropped, twin: as :class:`KvmDirtyLog`. Rings that somebody else has
    harvested before are gone on with; two who harvest at a time tear them.
    """

    def __init__(
        self,
        vm_fd: int,
        vcpu_fds: Iterable[int],
        slots: Mapping[int, tuple[int, int]],
        *,
        size: int | None = None,
    ) -> None:
        vm_fd = _descriptor("vm_fd", vm_fd)
        vcpus = [_descriptor("a vCPU", fd) for fd in vcpu_fds]
        places = {_slot(slot): _place(slot, *place) for slot, place in slots.items()}
        if not vcpus or not places:
            raise InvalidError(
                "vcpu_fds names no vCPU: all writes would go unseen"
                if places
                else "slots is empty: it has to name all slots that are logged"
            )
        size = _size(size, max(first + nbytes for first, nbytes in places.values()))
        c_slots = _core.new(
            "struct hbkvm_slot[]",
            [(slot, first, nbytes // _PAGE) for slot, (first, nbytes) in places.items()],
        )
        which = _core.new("size_t *")
        self._stranger = _core.new("uint64_t[2]")
        with _Held(_making):
            for _ in _others(KvmDirtyRing, vm_fd):
                raise StateError(_twin("this machine"))
            code = _core.hbkvm_open_rings(
                self._begin(), vm_fd, vcpus, len(vcpus), c_slots, len(places), which
            )
            if code == -errno.ENXIO:
                raise StateError(
                    "this machine has no dirty rings: enable KVM_CAP_DIRTY_LOG_RING before it has "
                    "vCPUs, or use KvmDirtyLog"
                )
            if code:
                named = [f"vCPU {fd}" for fd in vcpus] + [f"vm_fd {vm_fd}"]
                raise _failed(code, "the rings", named[which[0]])
            self._start(f"slots {', '.join(map(str, places))} of a KVM machine", size)

    def _fetch(self) -> None:
        code = _core.hbkvm_fetch_rings(self._held, self._log._hb, self._stranger)
        if code == 1:
            slot, page = self._stranger
            raise StateError(
                f"the machine wrote to page {page} of slot {slot}, which is in none of "
                f"{self._what}: name all that have KVM_MEM_LOG_DIRTY_PAGES, with their sizes"
            )
        self._check_fetched(code)


def _others(kind: type[_Tracking], vm_fd: int) -> Iterator[_Tracking]:
    """The open trackers of this machine, as far as the system tells."""
    for tracker in list(_trackers):
        if isinstance(tracker, kind) and _core.hbkvm_same(tracker._machine, vm_fd):
            yield tracker


def _descriptor(name: str, fd: int) -> int:
    fd = index(fd)
    if not 0 <= fd < 2**31:
        raise InvalidError(f"{name} {fd} is no file descriptor")
    return fd


def _slot(slot: int) -> int:
    slot = index(slot)
    if not 0 <= slot < 2**32:
        raise InvalidError(f"slot {slot} is not in 0..2**32 - 1")
    return slot


def _place(slot: int, first: int, nbytes: int) -> tuple[int, int]:
    first, nbytes = index(first), index(nbytes)
    for name, value in ("first", first), ("nbytes", nbytes):
        if value % _PAGE or not 0 <= value <= _core.MAX_SIZE:
            raise InvalidError(
                f"slot {slot}: {name} {value} is no number of pages of {_PAGE} bytes"
            )
    if not 0 < nbytes // _PAGE <= _MOST_PAGES:
        raise InvalidError(f"slot {slot} cannot have {nbytes} bytes: 1 to {_MOST_PAGES} pages")
    return first, nbytes


def _size(size: int | None, end: int) -> int:
    size = end if size is None else index(size)
    if size < end:
        raise InvalidError(f"the memory ends at {end}, beyond size {size}")
    return size


def _twin(what: str) -> str:
    return (
        f"{what} has a tracker already: what one takes, the other would not see. "
        "Let both use that one, or close it"
    )


def _failed(code: int, slot: str, fd: str) -> BitmapError:
    """The exception for a call that returned ``code``.

    :param slot: which slot, in words
    :param fd: which descriptor
    """
    if code == -errno.EBADF:
        return InvalidError(f"{fd} is not open")
    if code == -errno.ENOTTY:
        return InvalidError(f"{fd} is no KVM {'vCPU' if 'vCPU' in fd else 'machine'}")
    if code == -errno.EEXIST:
        return InvalidError(f"{fd} is there twice: each vCPU has one ring")
    if code == -errno.EINVAL:
        return InvalidError(f"{slot}: KVM has no slot of that number, or address space")
    if code == -errno.EIO:
        return StateError(
            "the machine is another process's, and KVM serves only that: track it there"
        )
    if code == -errno.ENOENT:
        return StateError(
            f"{slot} has no log: there is no such slot, or it was set without "
            "KVM_MEM_LOG_DIRTY_PAGES"
        )
    if code == -errno.ENOSYS:
        return UnsupportedError("there is no KVM on this system", errno.ENOSYS)
    if code == -errno.EOPNOTSUPP:
        return UnsupportedError("this kernel has no KVM_DIRTY_LOG_INITIALLY_SET")
    if code == -errno.EXDEV:
        return StateError("one of vcpu_fds is of another machine: its ring is never emptied")
    return StoreError(f"KVM, {slot}: {os.strerror(-code)}", -code)


@in_child
def _after_fork() -> None:
    """In the child: KVM refuses it; so that it does not keep the machine, it lets go."""
    global _making
    _making = RLock()
    for tracker in _trackers:
        if isinstance(tracker, _Kvm):
            tracker._release()
