# SPDX-License-Identifier: MIT
"""DirtyBitmap: an HBitmap with a name, flags and a lifecycle, as QEMU's block layer has them.

A bitmap records a node's writes while it is enabled. What a user may do with it depends on its
flags; one gatekeeper, :meth:`DirtyBitmap.check`, decides, in QEMU's words:

==============  =========================================  ========================================
flag            means                                      forbids
==============  =========================================  ========================================
busy            in use by another operation                everything
readonly        its content must not change                clear, merge into it, set, reset, remove
inconsistent    not stored in an orderly way; never on     everything but remove
==============  =========================================  ========================================

To read a bitmap while writes go on, it is frozen: a *successor* without a name records in its
place. When the reading has succeeded the successor takes over (abdicate), else both are merged
again (reclaim)::

    with bitmap.freeze() as frozen:
        for offset, nbytes in frozen.areas():
            copy(offset, nbytes)              # an exception puts everything back

Offsets, lengths, counts and granularities are in bytes. Everything may be called from several
threads; what changes flags takes the lock of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Flag
from itertools import count
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol

from .errors import (
    BusyError,
    InconsistentError,
    InvalidError,
    MismatchError,
    NotFoundError,
    ReadonlyError,
    StateError,
)
from .hbitmap import HBitmap
from .store.base import Record

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from .store.base import Loaded
    from .transaction import Transaction

    RLockType = RLock

#: Bytes of UTF-8.
MAX_NAME = 1023
MIN_GRANULARITY = 512

_serials = count(1)


class Forbidding(Flag):
    """The flags that forbid something."""

    BUSY = 1
    READONLY = 2
    INCONSISTENT = 4


#: What forbids a change of content; use that leaves the content; removal.
CHANGE = Forbidding.BUSY | Forbidding.READONLY | Forbidding.INCONSISTENT
USE = Forbidding.BUSY | Forbidding.INCONSISTENT
REMOVAL = Forbidding.BUSY | Forbidding.READONLY


class Host(Protocol):
    """What a bitmap needs of its node."""

    @property
    def size(self) -> int: ...

    @property
    def lock(self) -> RLockType: ...

    def make(self, granularity: int, *, stored: bool, size: int | None = None) -> HBitmap:
        """Memory for a content or a successor, where the bitmap is stored if it is."""

    def publish(self, *, store: bool = False) -> None:
        """Let what records now record, and nothing else; when it returns, so it is.

        :param store: tell the node's store first
        :raises StoreError, MemoryError: nothing has changed then
        """

    def store(self) -> None:
        """Tell the node's store what there is.

        :raises StoreError: it is told again when the node is flushed or closed
        """

    def transaction(self) -> AbstractContextManager[Transaction]:
        """For one action.

        :raises StateError: if this thread is inside a transaction
        """

    def alone(self) -> AbstractContextManager[object]:
        """The lock, for what is no action of a transaction.

        :raises StateError: if this thread is inside a transaction
        """


def check_granularity(granularity: int) -> None:
    """
    :raises InvalidError: for what is no granularity of a named bitmap, in bytes
    """
    if granularity < MIN_GRANULARITY or granularity & (granularity - 1):
        raise InvalidError("Granularity must be power of 2 and at least 512")


class DirtyBitmap:
    """A named bitmap of a node; made by :meth:`pybitmap.BlockNode.add_bitmap`."""

    def __init__(
        self,
        host: Host,
        name: str,
        content: HBitmap,
        *,
        enabled: bool,
        persistent: bool,
        readonly: bool = False,
        reason: str | None = None,
    ) -> None:
        self._host = host
        self._name = name
        self._bitmap = content
        self._enabled = enabled and reason is None
        self._enabled_if_repaired = enabled
        self._persistent = persistent
        self._busy = False
        self._readonly = readonly
        self._reason = reason
        self._skip_store = False
        self._removed = False
        # The successor: what it has recorded, and whether it is enabled.
        self._successor: HBitmap | None = None
        self._successor_enabled = False
        # Orders the node's bitmaps for queries; a successor that takes over brings its own.
        self._serial = next(_serials)
        self._successor_serial = 0
        # What an open transaction has prepared: the content and the state of after its commit, None
        # where they stay as they are; whether the bitmap is then gone, or there at last.
        self._shadow: HBitmap | None = None
        self._enabled_then: bool | None = None
        self._gone_then = False
        self._new_then = False

    @classmethod
    def _loaded(cls, host: Host, loaded: Loaded, *, readonly: bool) -> DirtyBitmap:
        """One that was stored."""
        # An inconsistent one has no content: with 65,535 of them that matters.
        content = loaded.content
        if content is None:
            content = HBitmap(0, loaded.granularity.bit_length() - 1)
        return cls(
            host,
            loaded.name,
            content,
            enabled=loaded.enabled,
            persistent=True,
            readonly=readonly,
            reason=loaded.reason,
        )

    # ---- what it is -------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        """Of the node, in bytes."""
        return self._host.size

    @property
    def granularity(self) -> int:
        """Bytes that a bit stands for."""
        return 1 << self._bitmap.granularity

    @property
    def count(self) -> int:
        """Dirty bytes, in whole groups; of a frozen bitmap, without its successor's."""
        return self._bitmap.count()

    @property
    def enabled(self) -> bool:
        """Does it record itself? (A frozen bitmap does not, see :attr:`recording`.)"""
        return self._enabled if self._enabled_then is None else self._enabled_then

    @property
    def recording(self) -> bool:
        """Will a write be recorded, by the bitmap or by its successor?"""
        return self.enabled or (self._successor is not None and self._successor_enabled)

    @property
    def busy(self) -> bool:
        return self._busy

    @property
    def persistent(self) -> bool:
        """Is it stored with its node? Not while :attr:`skip_store` says otherwise."""
        return self._persistent and not self._skip_store

    @property
    def readonly(self) -> bool:
        return self._readonly

    @property
    def inconsistent(self) -> bool:
        """Was it not stored in an orderly way? :attr:`reason` says what happened."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """Why it is inconsistent, a sentence; None if it is not."""
        return self._reason

    @property
    def skip_store(self) -> bool:
        """Does the node pass over it when it stores its bitmaps?"""
        return self._skip_store

    def info(self) -> dict[str, Any]:
        """As QMP reports it (BlockDirtyInfo of QEMU's QMP reference)."""
        with self._host.lock:
            info: dict[str, Any] = {
                "name": self._name,
                "count": self.count,
                "granularity": self.granularity,
                "recording": self.recording,
                "busy": self._busy,
                "persistent": self.persistent,
            }
            if self.inconsistent:
                info["inconsistent"] = True
            return info

    def __repr__(self) -> str:
        flags = [
            flag
            for flag in ("recording", "busy", "persistent", "readonly", "inconsistent")
            if getattr(self, flag)
        ]
        return (
            f"<DirtyBitmap {self._name!r} granularity={self.granularity} count={self.count}"
            f"{''.join(' ' + flag for flag in flags)}>"
        )

    # ---- what it holds ----------------------------------------------------------------------

    def get(self, offset: int) -> bool:
        """Is the group of ``offset`` dirty? Beyond the end: False."""
        return self._bitmap.get(offset)

    def areas(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """The dirty areas ``(offset, nbytes)``, see :meth:`HBitmap.areas`."""
        return self._bitmap.areas(start, end)

    def areas_array(self, start: int = 0, end: int | None = None) -> memoryview:
        """The same at once, format 'Q', shape (n, 2), see :meth:`HBitmap.areas_array`."""
        return self._bitmap.areas_array(start, end)

    def sha256(self) -> str:
        """Of the bits, as QEMU's x-debug-block-dirty-bitmap-sha256 has it, in hex."""
        with self._host.lock:
            # QEMU has empty bits for an inconsistent one, we have none.
            bits = (
                HBitmap(self.size, self._bitmap.granularity) if self.inconsistent else self._bitmap
            )
            return bits.sha256()

    # ---- what may be done -------------------------------------------------------------------

    def check(self, forbidding: Forbidding) -> None:
        """The gatekeeper.

        :raises NotFoundError: if the bitmap was removed
        :raises BusyError, ReadonlyError, InconsistentError: if one of these flags forbids it
        """
        if self._removed:
            raise NotFoundError(f"Dirty bitmap '{self._name}' not found")
        if self._busy and Forbidding.BUSY in forbidding:
            raise BusyError(
                f"Bitmap '{self._name}' is currently in use by another operation and cannot be used"
            )
        if self._readonly and Forbidding.READONLY in forbidding:
            raise ReadonlyError(f"Bitmap '{self._name}' is readonly and cannot be modified")
        if self.inconsistent and Forbidding.INCONSISTENT in forbidding:
            raise InconsistentError(f"Bitmap '{self._name}' is inconsistent and cannot be used")

    def enable(self) -> None:
        """Record writes from now on.

        :raises StateError: if it is busy or inconsistent, or inside a transaction
        """
        with self._host.transaction() as tx:
            tx._enable(self, True)

    def disable(self) -> None:
        """Record no write that comes after this returns.

        :raises StateError: if it is busy or inconsistent, or inside a transaction
        """
        with self._host.transaction() as tx:
            tx._enable(self, False)

    def clear(self) -> None:
        """Make everything clean.

        :raises StateError: if it is busy, readonly or inconsistent, or inside a transaction
        """
        with self._host.transaction() as tx:
            tx._clear(self)

    def set(self, offset: int, nbytes: int) -> None:
        """Mark, whether enabled or not.

        :raises StateError: if it is busy, readonly or inconsistent
        :raises RangeError: if the range is not inside the node
        """
        with self._host.alone():
            self.check(CHANGE)
            self._bitmap.set(offset, nbytes)

    def set_many(self, offsets: ReadableBuffer, lengths: ReadableBuffer) -> None:
        """Mark many ranges, see :meth:`HBitmap.set_many`.

        :raises StateError: if it is busy, readonly or inconsistent
        """
        with self._host.alone():
            self.check(CHANGE)
            self._bitmap.set_many(offsets, lengths)

    def reset(self, offset: int, nbytes: int) -> None:
        """Clean whole groups, see :meth:`HBitmap.reset`.

        :raises StateError: if it is busy, readonly or inconsistent
        :raises InvalidError: if the range cuts a group, or is not inside the node
        """
        with self._host.alone():
            self.check(CHANGE)
            self._bitmap.reset(offset, nbytes)

    def merge(self, *sources: DirtyBitmap) -> None:
        """Mark what is dirty in the sources, in all of them or, if one is refused, in none.

        They may be on any node of the same size, and of any granularity.

        :raises StateError: if this is busy, readonly or inconsistent, or a source is busy or
            inconsistent
        :raises MismatchError: (a ValueError) if a source is of another size
        """
        with self._host.transaction() as tx:
            tx._merge(self, sources)

    def _gather(self, sources: Iterable[DirtyBitmap]) -> HBitmap:
        """What a merge would add; checks all that it needs."""
        gathered = HBitmap(self.size, self._bitmap.granularity)
        for source in sources:
            self.check(CHANGE)  # before the source's flags, as in QEMU
            source.check(USE)
            if source.size != self.size:
                raise MismatchError(
                    f"Bitmaps are of different sizes (destination size is {self.size}, "
                    f"source size is {source.size}) and can't be merged"
                )
            gathered.merge(source._prepared_content())
        self.check(CHANGE)
        return gathered

    # ---- freezing ---------------------------------------------------------------------------

    def create_successor(self) -> None:
        """Freeze: from when this returns the content is constant, and the bitmap busy.

        A successor records in its place, if it was enabled.

        :raises BusyError: if it is busy, so also if it has a successor
        :raises StateError: inside a transaction
        :raises StoreError: if it is persistent and there is no space for a second one
        """
        with self._host.alone():
            self.check(Forbidding.BUSY)
            successor = self._new_content()
            self._successor, self._successor_serial = successor, next(_serials)
            self._successor_enabled = self._enabled
            self._enabled, self._busy = False, True
            try:
                self._host.publish(store=self._persistent)
            except BaseException:
                self._end_successor()
                raise

    def abdicate(self) -> None:
        """Let the successor take over; what this held is dropped.

        :raises StateError: if there is none, or inside a transaction
        :raises StoreError: if it is persistent and that cannot be stored; nothing has changed
        """
        with self._host.alone():
            if self._successor is None:
                raise StateError("Cannot relinquish control if there's no successor present")
            before = self._bitmap, self._successor, self._successor_enabled
            self._bitmap = self._successor
            self._end_successor()
            try:
                # It records already, so there is nothing to publish.
                if self._persistent and not self._removed:
                    self._host.store()
            except BaseException:
                self._bitmap, self._successor, self._successor_enabled = before
                self._enabled, self._busy = False, True
                raise
            self._serial = self._successor_serial

    def reclaim(self) -> None:
        """Take the successor's marks back; no write is lost meanwhile.

        :raises StateError: if there is none, or inside a transaction
        :raises StoreError: if it is persistent and that could not be stored. It is so all the same;
            until it can be, whoever loads the bitmap gets the union, which it is.
        """
        with self._host.alone():
            successor = self._successor
            if successor is None:
                raise StateError("Cannot reclaim a successor when none is present")
            self._end_successor()
            try:
                self._host.publish()
            except BaseException:
                self._successor, self._successor_enabled = successor, self._enabled
                self._enabled, self._busy = False, True
                raise
            # Nobody marks the successor any more.
            self._bitmap.merge(successor)
            if self._persistent and not self._removed:
                self._host.store()

    def _end_successor(self) -> None:
        self._enabled, self._busy = self._successor_enabled, False
        self._successor, self._successor_enabled = None, False

    @contextmanager
    def freeze(self) -> Iterator[DirtyBitmap]:
        """``with bitmap.freeze() as frozen``: read it while writes go on.

        ``frozen`` is the bitmap itself, constant and busy within the block. Leaving it drops what
        was read and keeps what was written meanwhile; leaving it by an exception keeps both.

        :raises StateError: if it is busy, readonly or inconsistent
        """
        with self._host.lock:
            self.check(USE)  # a backup of QEMU's says so first
            self.check(CHANGE)
            self.create_successor()
        try:
            yield self
            self.abdicate()
        except BaseException:
            self.reclaim()
            raise

    # ---- repair -----------------------------------------------------------------------------

    def repair(self) -> None:
        """Make an inconsistent bitmap usable: all dirty, so too much is copied, nothing missed.

        It records from now on if it did when it was stored.

        :raises StateError: if it is not inconsistent, or busy, or readonly, or inside a transaction
        :raises StoreError: if that cannot be stored; nothing has changed
        """
        with self._host.alone():
            self.check(REMOVAL)
            if self._reason is None:
                raise StateError(f"Bitmap '{self._name}' is not inconsistent")
            before = self._bitmap, self._reason
            content = self._new_content()
            content.set(0, self.size)
            self._bitmap, self._reason = content, None
            self._enabled = self._enabled_if_repaired
            try:
                self._host.publish(store=True)
            except BaseException:
                self._bitmap, self._reason = before
                self._enabled = False
                raise

    # ---- for its node, and for transactions -------------------------------------------------

    def _prepared_content(self) -> HBitmap:
        return self._bitmap if self._shadow is None else self._shadow

    def _recorders(self, then: bool) -> list[HBitmap]:
        """What a write is to be marked in: now, or once the open transaction has committed."""
        if then and self._gone_then:
            return []
        if self._successor is not None:
            return [self._successor] if self._successor_enabled else []
        if not (self.enabled if then else self._enabled):
            return []
        if self._shadow is None:
            return [self._bitmap]
        return [self._shadow] if then else [self._bitmap, self._shadow]

    def _new_content(self) -> HBitmap:
        """Clean, and where the bitmap is stored if it is."""
        return self._host.make(self.granularity, stored=self._persistent)

    def _record(self, then: bool) -> Record | None:
        """As it is to be stored: now, or once the open transaction has committed. None: not."""
        if not self._persistent or (self._gone_then if then else self._new_then):
            return None
        content = self._prepared_content() if then else self._bitmap
        return Record(
            self._name,
            self.granularity,
            enabled=(self.enabled if then else self._enabled) or self._successor_enabled,
            content=None if self._reason is not None or self._skip_store else content,
            successor=self._successor,
        )

    def _resized(self, content: HBitmap, size: int) -> HBitmap:
        """A copy of another size, in new memory of the same kind."""
        copy = content.copy()
        copy.truncate(size)
        if not self._persistent:
            return copy
        resized = self._host.make(self.granularity, stored=True, size=size)
        resized.merge(copy)
        return resized

    def _commit(self) -> None:
        """What was prepared is so; the node publishes it."""
        self._bitmap = self._prepared_content()
        self._enabled = self.enabled
        self._removed = self._gone_then
        self._shadow, self._enabled_then = None, None
        self._gone_then = self._new_then = False
