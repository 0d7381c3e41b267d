# SPDX-License-Identifier: MIT
"""BlockGraph and BlockNode: devices, their named bitmaps, and the path of every write.

``node.mark_dirty(offset, length)`` is the write path: one C call marks every bitmap of the node
that records, takes no lock, and may run in any number of threads beside everything else here.
Whatever changes what records (adding, removing, enabling, freezing, ...) publishes the new set of
bitmaps and waits until no write can still see the old one, before it returns: ``csrc/tracker.h``.

Offsets, lengths and sizes are in bytes. One re-entrant lock per graph keeps management in order;
writes never take it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from operator import index
from threading import RLock
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from . import _core
from ._core import CData, hbtracker_mark
from .dirty import MAX_NAME, REMOVAL, DirtyBitmap, check_granularity
from .errors import (
    ClosedError,
    ExistsError,
    InvalidError,
    NotFoundError,
    RangeError,
    ReadonlyError,
    StateError,
    UnsupportedError,
)
from .hbitmap import HBitmap
from .transaction import Transaction

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

DEFAULT_GRANULARITY = 65536


class BlockNode:
    """A device of ``size`` bytes with named dirty bitmaps; made by :meth:`BlockGraph.add_node`."""

    def __init__(self, lock: RLock, name: str, size: int, read_only: bool) -> None:  # type: ignore[valid-type, unused-ignore]
        self._lock = lock
        self._name = name
        self._size = size
        self._read_only = read_only
        self._closed = False
        self._bitmaps: dict[str, DirtyBitmap] = {}
        self._tracker, self._owner = _core.hbtracker_alloc()
        self._recording: list[HBitmap] = []  # kept alive for the tracker
        self.publish()

    @property
    def name(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        """In bytes."""
        return self._size

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def lock(self) -> Any:
        """The re-entrant lock of the graph."""
        return self._lock

    @property
    def bitmaps(self) -> Mapping[str, DirtyBitmap]:
        """By name, the oldest first; live."""
        return MappingProxyType(self._bitmaps)

    def __repr__(self) -> str:
        return f"<BlockNode {self._name!r} size={self._size} bitmaps={list(self._bitmaps)}>"

    # ---- writes -----------------------------------------------------------------------------

    def mark_dirty(self, offset: int, length: int) -> None:
        """A write: mark it in every bitmap that records.

        :raises RangeError: if it is not inside the node
        :raises ReadonlyError: if the node is read-only, or a bitmap of it must not change
        :raises ClosedError: if the node is closed
        """
        if type(offset) is not int or type(length) is not int:
            offset, length = index(offset), index(length)
        try:
            code = hbtracker_mark(self._tracker, offset, length)
        except OverflowError:
            code = -errno.ERANGE
        if code:
            raise self._refused(code, f"range [{offset}, {offset + length})")

    def mark_dirty_many(self, offsets: ReadableBuffer, lengths: ReadableBuffer) -> None:
        """Many writes, as buffers of uint64, shape (n,); see :meth:`HBitmap.set_many`.

        :raises RangeError: if one of them is not inside the node; none is marked then
        :raises ReadonlyError: if the node is read-only, or a bitmap of it must not change
        :raises TypeError, InvalidError: for buffers that are none of uint64, or differ in length
        :raises ClosedError: if the node is closed
        """
        _core.with_ranges(self._mark_ranges, ("offsets", "lengths"), offsets, lengths)

    def _mark_ranges(self, offsets: CData, lengths: CData, nwrites: int) -> None:
        code = _core.hbtracker_mark_many(self._tracker, offsets, lengths, nwrites)
        if code:
            raise self._refused(code, f"one of {nwrites} writes")

    def _refused(self, code: int, what: str) -> Exception:
        if self._closed:
            return ClosedError(f"node '{self._name}' is closed")
        if code == -errno.ERANGE:
            return RangeError(f"{what} is not inside node '{self._name}' of {self._size} bytes")
        if code == -errno.EROFS:
            for name, bitmap in list(self._bitmaps.items()):
                if bitmap.readonly:
                    return ReadonlyError(f"Bitmap '{name}' is readonly and cannot be modified")
            return ReadonlyError(f"node '{self._name}' is read-only")
        return MemoryError("no memory for this thread to mark writes")

    def publish(self) -> None:
        """For its bitmaps: see :class:`pybitmap.dirty.Host`."""
        self._install(self._prepare(self._size))

    def _prepare(self, size: int, then: bool = False) -> tuple[CData, list[HBitmap]]:
        """What records, for a size of the node: now, or once the open transaction has committed.

        :raises MemoryError: nothing has changed
        """
        bitmaps = self._bitmaps.values()
        recording = [each for bitmap in bitmaps for each in bitmap._recorders(then)]
        readonly = self._read_only or any(bitmap.readonly for bitmap in bitmaps)
        pointers = [each._hb for each in recording]
        return _core.hbtracker_set_alloc(size, pointers, readonly), recording

    def _commit(self, prepared: tuple[CData, list[HBitmap]]) -> None:
        """What was prepared for its bitmaps is so, and what records then is published."""
        for bitmap in list(self._bitmaps.values()):
            bitmap._commit()
            if bitmap._removed:
                del self._bitmaps[bitmap.name]
        self._install(prepared)

    def _discard(self, prepared: tuple[CData, list[HBitmap]]) -> None:
        """Of no use any more."""
        _core.hbtracker_set_free(prepared[0])

    def _withdraw(self) -> None:
        """Publish what is left after an abort. Without memory for that, writes go on being marked
        in what is dropped as well, until the next publication."""
        with suppress(MemoryError):
            self.publish()

    def _forget(self, bitmap: DirtyBitmap) -> None:
        """Drop a bitmap whatever its flags; the caller publishes."""
        del self._bitmaps[bitmap.name]
        bitmap._removed = True

    def _install(self, prepared: tuple[CData, list[HBitmap]]) -> None:
        """Publish it; cannot fail."""
        tracker_set, recording = prepared
        # The old ones as well, until no write sees them any more.
        self._recording = self._recording + recording
        _core.hbtracker_publish(self._tracker, tracker_set)
        self._recording = recording

    # ---- bitmaps ----------------------------------------------------------------------------

    def add_bitmap(
        self,
        name: str,
        granularity: int | None = None,
        *,
        persistent: bool = False,
        disabled: bool = False,
    ) -> DirtyBitmap:
        """A new bitmap, clean; it has every write that begins after this returns.

        :param name: 1..1023 bytes of UTF-8, unique in the node
        :param granularity: bytes that a bit stands for: a power of 2, at least 512; None: 65536
        :param disabled: it records nothing until it is enabled
        :raises InvalidError: for another name or granularity
        :raises ExistsError: if the node has a bitmap of that name
        :raises UnsupportedError: if it cannot be stored, but is to be persistent
        """
        with self._lock:
            self._check_open()
            if not name:
                raise InvalidError("Bitmap name cannot be empty")
            granularity = DEFAULT_GRANULARITY if granularity is None else index(granularity)
            check_granularity(granularity)
            if persistent:
                raise UnsupportedError(
                    f"Can't store persistent bitmaps to {self._name}: Operation not supported"
                )
            if name in self._bitmaps:
                raise ExistsError(f"Bitmap already exists: {name}")
            if len(name.encode()) > MAX_NAME:
                raise InvalidError(f"Bitmap name too long: {name}")
            bitmap = DirtyBitmap(
                self, name, granularity, enabled=not disabled, persistent=persistent
            )
            self._bitmaps[name] = bitmap
            try:
                self.publish()
            except BaseException:
                del self._bitmaps[name]
                raise
            return bitmap

    def find_bitmap(self, name: str) -> DirtyBitmap:
        """
        :raises NotFoundError: (a KeyError) if there is none of that name
        """
        with self._lock:
            self._check_open()
            try:
                return self._bitmaps[name]
            except KeyError:
                raise NotFoundError(f"Dirty bitmap '{name}' not found") from None

    def remove_bitmap(self, name: str) -> None:
        """Forget a bitmap.

        :raises NotFoundError: (a KeyError) if there is none of that name
        :raises StateError: if it is busy or readonly
        """
        with self._lock:
            bitmap = self.find_bitmap(name)
            bitmap.check(REMOVAL)
            before = dict(self._bitmaps)
            del self._bitmaps[name]
            try:
                self.publish()
            except BaseException:
                # In its old place: queries show the order.
                self._bitmaps.clear()
                self._bitmaps.update(before)
                raise
            bitmap._removed = True

    def query(self) -> list[dict[str, Any]]:
        """What QMP's queries list as ``dirty-bitmaps``: the newest first."""
        with self._lock:
            return [bitmap.info() for bitmap in reversed(list(self._bitmaps.values()))]

    # ---- life -------------------------------------------------------------------------------

    def truncate(self, size: int) -> None:
        """Change the size, of the node and of all its bitmaps; writes wait meanwhile.

        :raises InvalidError: for a size that a bitmap of the node cannot have
        :raises BufferError: if a bitmap's content is exported or pinned; nothing changes
        :raises MemoryError: nothing changes
        """
        size = index(size)
        with self._lock:
            self._check_open()
            before = self._size
            contents = [each for bitmap in self._bitmaps.values() for each in bitmap._contents()]
            for each in contents:
                _core.check_size(size, each.granularity)
            _core.check_size(size, 63)
            # What a shrink cuts off has to be known until all have been cut.
            saved = [each.copy() for each in contents] if size < before else []
            after, as_before = self._prepare(size), self._prepare(before)
            _core.hbtracker_publish(self._tracker, _core.NULL)
            done = 0
            try:
                for each in contents:
                    each.truncate(size)
                    done += 1
            except BaseException:
                try:
                    for each in contents[:done]:
                        each.truncate(before)
                    for each, content in zip(contents[:done], saved):
                        each.merge(content)
                finally:
                    self._install(as_before)
                    self._discard(after)
                raise
            self._size = size
            self._install(after)
            self._discard(as_before)

    def close(self) -> None:
        """Forget all bitmaps and refuse writes; may be called twice."""
        with self._lock:
            if not self._closed:
                for bitmap in self._bitmaps.values():
                    bitmap._removed = True
                self._bitmaps.clear()
                size, self._size = self._size, 0
                self.publish()
                self._size = size
                self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"node '{self._name}' is closed")


class BlockGraph:
    """The nodes of one program, by name; a context manager that closes them.

    >>> with BlockGraph() as graph:
    ...     node = graph.add_node("disk", size=1 << 30)
    ...     daily = node.add_bitmap("daily", granularity=4096)
    ...     node.mark_dirty(10_000, 512)
    ...     list(daily.areas())
    [(8192, 4096)]
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._nodes: dict[str, BlockNode] = {}
        self._open: Transaction | None = None

    @property
    def nodes(self) -> Mapping[str, BlockNode]:
        """By name, the oldest first; live."""
        return MappingProxyType(self._nodes)

    def add_node(self, name: str, size: int, *, read_only: bool = False) -> BlockNode:
        """A new node of ``size`` bytes.

        :raises ExistsError: if there is a node of that name
        :raises InvalidError: for an empty name, or a size beyond 2**63 - 1
        """
        size = index(size)
        _core.check_size(size, 63)
        with self._lock:
            if not name:
                raise InvalidError("the name of a node cannot be empty")
            if name in self._nodes:
                raise ExistsError(f"Duplicate nodes with node-name='{name}'")
            node = self._nodes[name] = BlockNode(self._lock, name, size, read_only)
            return node

    def find_node(self, name: str) -> BlockNode:
        """
        :raises NotFoundError: (a KeyError) if there is none of that name
        """
        with self._lock:
            try:
                return self._nodes[name]
            except KeyError:
                raise NotFoundError(f"Node '{name}' not found") from None

    def remove_node(self, name: str) -> None:
        """Close a node and forget it.

        :raises NotFoundError: (a KeyError) if there is none of that name
        """
        with self._lock:
            self.find_node(name).close()
            del self._nodes[name]

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """``with graph.transaction() as tx``: actions on any nodes, all or none of them.

        Each action is prepared at once, sees what those before it have prepared, and raises at
        once if it cannot be; leaving the block commits, an exception aborts. Other threads' changes
        and queries wait until the end, writes do not. Inside, use nothing but ``tx``.

        :raises StateError: if the thread has a transaction open
        """
        with self._lock:
            if self._open is not None:
                raise StateError("this thread has a transaction open already")
            self._open = Transaction(self)
            try:
                yield self._open
                self._open._commit()
            except BaseException:
                self._open._abort()
                raise
            finally:
                self._open = None

    def close(self) -> None:
        """Close all nodes; may be called twice."""
        with self._lock:
            for node in self._nodes.values():
                node.close()

    def __enter__(self) -> BlockGraph:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
