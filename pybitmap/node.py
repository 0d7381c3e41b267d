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
from contextlib import AbstractContextManager, contextmanager, suppress
from operator import index
from threading import RLock
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Callable

from . import _core
from ._core import CData
from ._entry import NodeBase
from .dirty import MAX_NAME, DirtyBitmap, Forbidding, check_granularity
from .errors import (
    ClosedError,
    ExistsError,
    InvalidError,
    NotFoundError,
    RangeError,
    ReadonlyError,
    StateError,
    StoreError,
    UnsupportedError,
)
from .hbitmap import HBitmap
from .store.base import Purpose, Store, Switches, Volume, Wanted
from .transaction import Transaction

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

DEFAULT_GRANULARITY = 65536

OPEN_ALREADY = "this thread has a transaction open already"


class BlockNode(NodeBase):
    """A device of ``size`` bytes with named dirty bitmaps; made by :meth:`BlockGraph.add_node`."""

    def __init__(
        self, graph: BlockGraph, name: str, size: int, volume: Volume | None, read_only: bool
    ) -> None:
        self._graph = graph
        self._lock = graph._lock
        self._name = name
        self._size = size
        self._volume = volume
        self._read_only = read_only
        self._closed = False
        self._bitmaps: dict[str, DirtyBitmap] = {}
        self._tracker, owner = _core.hbtracker_alloc()
        self._attach(_core.address(self._tracker), owner)
        self._recording: list[HBitmap] = []  # kept alive for the tracker
        if volume is not None:
            for loaded in volume.load():
                self._bitmaps[loaded.name] = DirtyBitmap._loaded(self, loaded, readonly=read_only)
            volume.names = frozenset(self._bitmaps)
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
        """By name, in the order of adding; live."""
        return MappingProxyType(self._bitmaps)

    def __repr__(self) -> str:
        return f"<BlockNode {self._name!r} size={self._size} bitmaps={list(self._bitmaps)}>"

    # ---- writes -----------------------------------------------------------------------------

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

    # ---- for its bitmaps: see pybitmap.dirty.Host --------------------------------------------

    def make(self, granularity: int, *, stored: bool, size: int | None = None) -> HBitmap:
        if stored and self._volume is not None and not self._read_only:
            return self._volume.make(granularity, size)
        return HBitmap(self._size if size is None else size, granularity.bit_length() - 1)

    def publish(self, *, store: bool = False) -> None:
        prepared = self._prepare(0 if self._closed else self._size)
        try:
            if store:
                self.store()
        except BaseException:
            self._discard(prepared)
            raise
        self._install(prepared)

    def store(self) -> None:
        self._store(Purpose.COMMIT)

    def _store(self, purpose: Purpose, size: int | None = None) -> None:
        if self._volume is not None and not self._read_only:
            Switches({self._volume: self._wanted(size=size)}, purpose).switch()

    def _wanted(self, *, then: bool = False, size: int | None = None) -> Wanted:
        """What the store is to hold: now, or once the open transaction has committed."""
        records = (bitmap._record(then) for bitmap in self._oldest_first())
        return Wanted(
            self._size if size is None else size,
            [record for record in records if record is not None],
        )

    def transaction(self) -> AbstractContextManager[Transaction]:
        return self._graph.transaction()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._lock:
            if self._graph._open is not None:
                raise StateError(OPEN_ALREADY)
            yield

    # ---- what records -----------------------------------------------------------------------

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
                self._forget(bitmap)
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
        :raises StoreError: if there is no space to store it
        :raises StateError: inside a transaction, which has an ``add`` of its own
        """
        with self.transaction() as tx:
            return tx._add(self, name, granularity, persistent=persistent, disabled=disabled)

    def _add(
        self, name: str, granularity: int | None, *, persistent: bool, disabled: bool
    ) -> DirtyBitmap:
        """For a transaction, which publishes."""
        self._check_open()
        if not name:
            raise InvalidError("Bitmap name cannot be empty")
        try:
            name_nbytes = len(name.encode())
        except UnicodeEncodeError:
            raise InvalidError(f"Bitmap name is no valid Unicode: {name!r}") from None
        granularity = self._default_granularity if granularity is None else index(granularity)
        check_granularity(granularity)
        if persistent:
            self._check_storable(name, granularity)
        if name in self._bitmaps:
            raise ExistsError(f"Bitmap already exists: {name}")
        if name_nbytes > MAX_NAME:
            raise InvalidError(f"Bitmap name too long: {name}")
        content = self.make(granularity, stored=persistent)
        bitmap = DirtyBitmap(self, name, content, enabled=not disabled, persistent=persistent)
        bitmap._new_then = True
        self._bitmaps[name] = bitmap
        return bitmap

    @property
    def _default_granularity(self) -> int:
        stored = None if self._volume is None else self._volume.default_granularity
        return DEFAULT_GRANULARITY if stored is None else stored

    def _check_storable(self, name: str, granularity: int) -> None:
        if self._volume is None:
            raise UnsupportedError(
                f"Can't store persistent bitmaps to {self._name}: Operation not supported"
            )
        if name in self._bitmaps:
            return  # which is complained of before what the store has against it
        if self._read_only:
            raise UnsupportedError(
                f"Can't make bitmap '{name}' persistent in '{self._name}': the node is read-only"
            )
        names = [bitmap.name for bitmap in self._bitmaps.values() if bitmap.persistent]
        self._volume.check_new(name, granularity, names)

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
        with self.transaction() as tx:
            tx._remove(self.find_bitmap(name))

    def query(self) -> list[dict[str, Any]]:
        """What QMP's queries list as ``dirty-bitmaps``: the newest first."""
        with self._lock:
            return [bitmap.info() for bitmap in reversed(self._oldest_first())]

    def _oldest_first(self) -> list[DirtyBitmap]:
        """A successor that has taken over is as young as it is."""
        return sorted(self._bitmaps.values(), key=lambda each: each._serial)

    # ---- life -------------------------------------------------------------------------------

    def truncate(self, size: int) -> None:
        """Change the size, of the node and of all its bitmaps; writes wait meanwhile.

        :raises InvalidError: for a size that a bitmap of the node cannot have
        :raises UnsupportedError: if the node's size is that of an image
        :raises InconsistentError, ReadonlyError: if a bitmap of the node is such
        :raises StateError: inside a transaction
        :raises StoreError, MemoryError: nothing has changed
        """
        size = index(size)
        with self.alone():
            self._check_open()
            if self._volume is not None and not self._volume.resizable:
                raise UnsupportedError(
                    f"node '{self._name}' has the size of its image, which is not resized here"
                )
            bitmaps = list(self._bitmaps.values())
            for bitmap in bitmaps:
                bitmap.check(Forbidding.READONLY | Forbidding.INCONSISTENT)
                _core.check_size(size, bitmap._bitmap.granularity)
            _core.check_size(size, 63)
            saved = [(bitmap, bitmap._bitmap, bitmap._successor) for bitmap in bitmaps]
            outcome = before = self._prepare(self._size)
            after = None
            try:
                _core.hbtracker_publish(self._tracker, _core.NULL)
                for bitmap, content, successor in saved:
                    bitmap._bitmap = bitmap._resized(content, size)
                    if successor is not None:
                        bitmap._successor = bitmap._resized(successor, size)
                after = self._prepare(size)
                self._store(Purpose.COMMIT, size)
                outcome = after
            except BaseException:
                for bitmap, content, successor in saved:
                    bitmap._bitmap, bitmap._successor = content, successor
                raise
            finally:
                if outcome is after:
                    self._size = size
                    if self._volume is not None:
                        self._volume.size = size
                self._install(outcome)
                for each in (before, after):
                    if each is not None and each is not outcome:
                        self._discard(each)

    def flush(self) -> None:
        """Store the persistent bitmaps with all that was marked before the call.

        They stay in use: what is marked afterwards is stored by the next flush, or by close. After
        a crash that comes before, they are exact or inconsistent, as the store has it.

        :raises StoreError: what was stored before is still stored
        """
        with self._lock:
            self._check_open()
            self._store(Purpose.FLUSH)

    def close(self, *, discard: bool = False) -> None:
        """Store the persistent bitmaps, forget all, and refuse writes; may be called twice.

        :param discard: do not store, for example where that fails: whoever opens the store next
            finds the bitmaps as after a crash
        :raises StoreError: the node is open as before, so closing can be tried again
        :raises StateError: inside a transaction
        """
        with self.alone():
            if self._closed:
                return
            outcome = before = self._prepare(self._size)
            nothing: tuple[CData, list[HBitmap]]
            try:
                nothing = _core.hbtracker_set_alloc(0, [], True), []
            except BaseException:
                self._discard(before)
                raise
            try:
                if not discard:
                    # What is stored must be the last of it: writes wait.
                    _core.hbtracker_publish(self._tracker, _core.NULL)
                    self._store(Purpose.CLOSE)
                self._closed, outcome = True, nothing
            except BaseException as error:
                if not isinstance(error, (StoreError, MemoryError)):
                    # Interrupted, perhaps behind the switch: what goes on has to be in use.
                    with suppress(StoreError, MemoryError):
                        self._store(Purpose.COMMIT)
                raise
            finally:
                self._install(outcome)
                self._discard(nothing if outcome is before else before)
            for bitmap in self._bitmaps.values():
                bitmap._removed = True
            self._bitmaps.clear()
            if self._volume is not None:
                self._volume.close()

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

    def add_node(
        self,
        name: str,
        size: int | None = None,
        store: Store | None = None,
        read_only: bool = False,
    ) -> BlockNode:
        """A new node, with the persistent bitmaps that are stored for it.

        :param size: in bytes; None: as the store knows it
        :param store: where its persistent bitmaps are; None: it can have none
        :param read_only: writes, and changes of stored bitmaps, are refused
        :raises ExistsError: if there is a node of that name
        :raises InvalidError: (a ValueError) for an empty name, a size beyond 2**63 - 1 or other
            than the store's, or if there is no size, nor does the store know one
        :raises LockedError: if another process has the store open
        :raises StoreError: if the store cannot be read
        """
        if size is not None:
            size = index(size)
            _core.check_size(size, 63)
        with self._lock:
            if not name:
                raise InvalidError("the name of a node cannot be empty")
            if name in self._nodes:
                raise ExistsError(f"Duplicate nodes with node-name='{name}'")
            volume = None
            if store is not None:
                volume = store.open(name, size, read_only=read_only)
                size = volume.size
            elif size is None:
                raise InvalidError(f"node '{name}' needs a size, or a store that knows it")
            try:
                node = BlockNode(self, name, size, volume, read_only)
            except BaseException:
                if volume is not None:
                    volume.close()
                raise
            self._nodes[name] = node
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
        :raises StoreError: if its bitmaps cannot be stored; it is there as before
        """
        with self._lock:
            self.find_node(name).close()
            del self._nodes[name]

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """``with graph.transaction() as tx``: actions on any nodes, all or none of them.

        Each action is prepared at once, sees what those before it have prepared, and raises at
        once if it cannot be; leaving the block commits, an exception aborts. Other threads' changes
        and queries wait until the end, writes do not. Inside, changes go through ``tx`` only.

        Atomic within one store, ordered across stores: those that gain bitmaps come first.

        :raises StateError: if the thread has a transaction open
        :raises StoreError: if the bitmaps cannot be stored; then all is as before. If only a
            further store fails, all is done, that store stays as it was until a flush or close
            succeeds, and the error says so.
        """
        with self._lock:
            if self._open is not None:
                raise StateError(OPEN_ALREADY)
            self._open = Transaction(self)
            try:
                yield self._open
                failed = self._open._commit()
            except BaseException:
                self._open._abort()
                raise
            finally:
                self._open = None
            if failed is not None:
                raise StoreError(
                    f"the transaction is done, but not stored everywhere: {failed}; "
                    f"flush() or close() of the node tries it again",
                    getattr(failed, "errno", None),
                ) from failed

    def flush(self) -> None:
        """Flush all nodes, see :meth:`BlockNode.flush`.

        :raises StoreError: of the first that could not be; the others were
        """
        self._for_each(BlockNode.flush)

    def close(self) -> None:
        """Close all nodes; may be called twice.

        :raises StoreError: of the first whose bitmaps cannot be stored; it stays open, the others
            are closed
        """
        self._for_each(BlockNode.close)

    def _for_each(self, work: Callable[[BlockNode], None]) -> None:
        with self._lock:
            errors = []
            for node in self._nodes.values():
                try:
                    if not node._closed:
                        work(node)
                except (StoreError, MemoryError) as error:
                    errors.append(error)
            if errors:
                raise errors[0]

    def __enter__(self) -> BlockGraph:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
