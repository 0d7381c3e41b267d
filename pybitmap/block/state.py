# SPDX-License-Identifier: MIT
"""What a named bitmap is at a moment: one frozen value, and pure functions of it.

Everything that changes a bitmap makes a new :class:`State` of its old one; which of the two counts
is decided in one place (:mod:`.commit`). What a flag means stands here and nowhere else:

==============  =========================================  ========================================
flag            means                                      forbids
==============  =========================================  ========================================
busy            in use by another operation                everything
readonly        its content must not change                clear, merge into it, set, reset, remove
inconsistent    not stored in an orderly way; never on     everything but remove
==============  =========================================  ========================================

``forbid`` is the gatekeeper, ``recorders`` says where a write goes, ``record`` what a store is
told. A new flag is a field here, and what these functions make of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Flag
from itertools import count
from threading import RLock
from typing import Any

from ..errors import BusyError, InconsistentError, NotFoundError, ReadonlyError, StateError
from ..hbitmap import HBitmap, check_whole
from ..store.base import Record

_serials = count(1)


class Forbidding(Flag):
    """The flags that forbid something."""

    BUSY = 1
    READONLY = 2
    INCONSISTENT = 4


#: What forbids a change of content; use that leaves the content; repair; removal, which a node
#: that is read-only refuses in its own words.
CHANGE = Forbidding.BUSY | Forbidding.READONLY | Forbidding.INCONSISTENT
USE = Forbidding.BUSY | Forbidding.INCONSISTENT
REPAIR = Forbidding.BUSY | Forbidding.READONLY
REMOVAL = Forbidding.BUSY


class Preserved:
    """Which groups of a frozen bitmap writers have seen to before they wrote over them.

    The lock is held while one of them does: another that comes to the same group waits, and so does
    whoever ends the freeze.
    """

    __slots__ = ("ended", "groups", "lock")

    def __init__(self) -> None:
        self.lock = RLock()
        self.groups: HBitmap | None = None
        self.ended = False

    def end(self, *, wait: bool) -> None:
        """No writer sees to anything any more when this returns.

        :param wait: for one who does; else
        :raises StateError: if there is one
        """
        if not wait:
            if not self.lock.acquire(blocking=False):
                raise StateError(
                    "a write has its before= called right now, and may wait for this thread, which "
                    "holds the graph's lock: done() and close() of what is frozen wait for that "
                    "write, so they are called outside of graph.locked()"
                )
            self.lock.release()  # at once: only `with` lets go of it whatever interrupts it
        with self.lock:
            self.ended = True

    def after_fork(self) -> None:
        """In the child: a thread that was seeing to something is not there."""
        self.lock = RLock()


@dataclass(frozen=True, eq=False)
class Successor:
    """What records in the place of a frozen bitmap.

    :param enabled: does it? (Not if the bitmap did not when it was frozen.)
    :param serial: of the bitmap, if the successor takes over
    :param holder: whose it is to end this
    :param preserved: what writers have seen to before they wrote over it
    """

    content: HBitmap
    enabled: bool
    serial: int
    holder: object
    preserved: Preserved = field(default_factory=lambda: Preserved())


@dataclass(frozen=True, eq=False)
class State:
    """A named bitmap but for its name and its node.

    :param content: the bits; of an inconsistent one none, of size 0
    :param serial: orders the node's bitmaps for queries; a successor that takes over brings its own
    :param enabled: does the bitmap itself record writes? A frozen one does not
    :param persistent: is it stored with its node?
    :param busy: in use by another operation: it is frozen, or is going to be removed
    :param readonly: its content must not change, as it is stored where nothing is written
    :param reason: why it is inconsistent, a sentence; None if it is not
    :param enabled_if_repaired: what ``enabled`` is of an inconsistent one once it is repaired
    :param skip_store: what is stored under its name stays as it is
    :param removed: it is not there: not yet, or no longer
    :param successor: of a frozen one
    :param recorder: has the writes since the instant of a commit that is not done; they count as
        the bitmap's own
    """

    content: HBitmap
    serial: int
    enabled: bool
    persistent: bool = False
    busy: bool = False
    readonly: bool = False
    reason: str | None = None
    enabled_if_repaired: bool = False
    skip_store: bool = False
    removed: bool = False
    successor: Successor | None = None
    recorder: HBitmap | None = None

    def but(self, **changes: Any) -> State:
        """The same with other fields; what dataclasses.replace() does, in a tenth of the time."""
        other = object.__new__(State)
        other.__dict__.update(self.__dict__, **changes)
        return other

    @property
    def granularity(self) -> int:
        """Bytes that a bit stands for."""
        return 1 << self.content.granularity

    @property
    def recording(self) -> bool:
        """Will a write be recorded, by the bitmap or by its successor?"""
        successor = self.successor is not None and self.successor.enabled
        return not self.removed and (self.enabled or successor)

    @property
    def flags(self) -> Forbidding:
        """Those that are set."""
        flags = Forbidding(0)
        if self.busy:
            flags |= Forbidding.BUSY
        if self.readonly:
            flags |= Forbidding.READONLY
        if self.reason is not None:
            flags |= Forbidding.INCONSISTENT
        return flags

    @property
    def bits(self) -> HBitmap:
        """What is dirty, without what a successor has."""
        return self.content if self.recorder is None else self.content | self.recorder


def new_serial() -> int:
    """Of a bitmap that is newer than all others."""
    return next(_serials)


def forbid(name: str, state: State, forbidding: Forbidding) -> None:
    """The gatekeeper.

    :raises NotFoundError: if the bitmap is not there
    :raises BusyError, ReadonlyError, InconsistentError: the first of these flags that forbids it
    :raises StateError: if it is torn by a fork, and an inconsistent one would be forbidden
    """
    if state.removed:
        raise NotFoundError(f"Dirty bitmap '{name}' not found")
    found = state.flags & forbidding
    if Forbidding.BUSY in found:
        raise BusyError(
            f"Bitmap '{name}' is currently in use by another operation and cannot be used"
        )
    if Forbidding.READONLY in found:
        raise ReadonlyError(f"Bitmap '{name}' is readonly and cannot be modified")
    if Forbidding.INCONSISTENT in found:
        raise InconsistentError(f"Bitmap '{name}' is inconsistent and cannot be used")
    if Forbidding.INCONSISTENT in forbidding:
        check_whole(state.content)


def recorders(state: State) -> list[HBitmap]:
    """What a write is to be marked in."""
    if state.removed:
        return []
    if state.successor is not None:
        return [state.successor.content] if state.successor.enabled else []
    return [state.content] if state.enabled else []


def record(name: str, state: State) -> Record | None:
    """As it is to be stored; None: not at all."""
    if not state.persistent or state.removed:
        return None
    successor = state.recorder
    if state.successor is not None:
        successor = state.successor.content
    return Record(
        name,
        state.granularity,
        enabled=state.recording,
        content=None if state.reason is not None or state.skip_store else state.content,
        successor=successor,
    )


def freeze(state: State, content: HBitmap, holder: object) -> State:
    """The content is constant from now on, ``content`` records in its place."""
    successor = Successor(content, state.enabled, new_serial(), holder)
    return state.but(enabled=False, busy=True, successor=successor)


def abdicate(state: State) -> State:
    """Of a frozen one: what was frozen is dropped, what was written meanwhile is the content."""
    successor = state.successor
    assert successor is not None
    return thaw(state).but(content=successor.content, serial=successor.serial)


def thaw(state: State) -> State:
    """Of a frozen one, when its content has the successor's marks as well."""
    assert state.successor is not None
    return state.but(enabled=state.successor.enabled, busy=False, successor=None)
