# SPDX-License-Identifier: MIT
"""BlockGraph: the nodes of a program by name, and transactions over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from operator import index
from types import MappingProxyType, TracebackType
from typing import Union

from .. import _core
from .._core import NotCopied
from ..errors import AbortedError, ExistsError, InvalidError, NotFoundError, StateError, StoreError
from ..store.base import Store
from .bitmap import DirtyBitmap, Frozen, bitmap_of
from .coordinator import ABORTED, Coordinator, Drafting
from .device import Cell, Device, Publication
from .draft import Draft
from .node import BlockNode, load

#: A bitmap to merge from: its name, on the node of the target, or (node, name).
Source = Union[str, "tuple[str, str]"]


class BlockGraph(NotCopied):
    """The nodes of one program, by name; a context manager that closes them.

    >>> with BlockGraph() as graph:
    ...     node = graph.add_node("disk", size=1 << 30)
    ...     daily = node.add_bitmap("daily", granularity=4096)
    ...     node.mark_dirty(10_000, 512)
    ...     list(daily.areas())
    [(8192, 4096)]
    >>> list(graph.nodes)
    ['disk']
    """

    def __init__(self) -> None:
        self._coordinator = Coordinator()
        self._nodes: dict[str, BlockNode] = {}

    def __repr__(self) -> str:
        return f"<BlockGraph nodes={list(self._nodes)}>"

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

        >>> graph = BlockGraph()
        >>> graph.add_node("disk", size=1 << 30)
        <BlockNode 'disk' size=1073741824 bitmaps=[]>
        >>> graph.nodes["disk"].size
        1073741824
        """
        if size is not None:
            size = index(size)
            _core.check_size(size, 63)
        if not (store is None or isinstance(store, Store)):
            raise TypeError(f"a store is a LocalStore or a Qcow2Store, not {type(store).__name__}")
        with self._coordinator.held():
            if not name:
                raise InvalidError("the name of a node cannot be empty")
            if name in self._nodes:
                raise ExistsError(f"Duplicate nodes with node-name='{name}'")
            volume = device = None
            if store is not None:
                volume = store.open(name, size, read_only=read_only)
                size = volume.size
            elif size is None:
                raise InvalidError(f"node '{name}' needs a size, or a store that knows it")
            try:
                device = Device(name, size, volume, read_only=read_only)
                load(device)
                Publication({device: device.recording()}).publish()
                node = BlockNode(self._coordinator, device)
            except BaseException:
                if device is not None:
                    device.closed = True
                if volume is not None:
                    volume.close()
                raise
            self._coordinator.devices[name] = device
            self._nodes[name] = node
            return node

    def find_node(self, name: str) -> BlockNode:
        """
        :raises NotFoundError: (a KeyError) if there is none of that name

        >>> graph = BlockGraph()
        >>> graph.add_node("disk", size=100) is graph.find_node("disk")
        True
        >>> graph.find_node("other")
        Traceback (most recent call last):
        pybitmap.errors.NotFoundError: Node 'other' not found
        """
        with self._coordinator.held():
            self._coordinator.find(name)
            return self._nodes[name]

    def remove_node(self, name: str) -> None:
        """Close a node and forget it.

        :raises NotFoundError: (a KeyError) if there is none of that name
        :raises StoreError: if its bitmaps cannot be stored; it is there as before

        >>> graph = BlockGraph()
        >>> node = graph.add_node("disk", size=100)
        >>> graph.remove_node("disk")
        >>> list(graph.nodes)
        []
        """
        with self._coordinator.held():
            self.find_node(name).close()
            del self._nodes[name]
            del self._coordinator.devices[name]

    def locked(self) -> AbstractContextManager[None]:
        """``with graph.locked():`` no other thread changes nodes or bitmaps meanwhile.

        For several questions that are to be answered as of one moment. Writes go on being marked;
        this thread may change bitmaps inside. Left in whichever way, it lets go. In the child of a
        fork it is free, unless this thread has it; but a signal handler that forks while its thread
        waits for it leaves the child waiting.

        >>> graph = BlockGraph()
        >>> node = graph.add_node("disk", size=1 << 20)
        >>> with graph.locked():                    # no other thread adds or removes
        ...     [(name, list(node.bitmaps)) for name, node in graph.nodes.items()]
        [('disk', [])]
        """
        return self._coordinator.held()

    def transaction(self, *, close: bool = False) -> AbstractContextManager[Transaction]:
        """``with graph.transaction() as tx``: actions on any nodes, all or none of them.

        There is one instant T for all of it, over all nodes, when the block has ended. Each write
        is before T or after it; if one returned before another began, on whatever nodes, and the
        second is before T, so is the first. The actions work on what is before T, in their order;
        what comes after T is marked in what records after the transaction. So ``merge(all <-
        daily); clear(daily)`` puts each write into exactly one of the two. An abort, and a commit
        that fails, leave each write where it would be without the transaction. Writes wait for
        nothing. T is an instant of marks, not of data: a program that marks and then writes may
        have marked before T what it writes afterwards.

        Each action is checked at once, sees the flags that those before it have changed, and
        raises at once if it cannot be; leaving the block commits, an exception aborts. Other
        threads' changes wait until the end. Inside, changes go through ``tx`` only. Killed before
        the end, a program finds all of it in its store or nothing. With several stores those that
        gain bitmaps come first, and one that gains some and loses others may have only gained yet.
        If a store cannot say whether it has a bitmap as enabled, the bitmap is marked in until the
        store has been told.

        With a clear or a merge of stored bitmaps the store is changed twice, and has one more file
        per bitmap meanwhile.

        In the child of a fork that came inside, a graph with a store commits nothing.

        :param close: close all nodes in the same step: either all is done, stored and closed, or
            nothing has changed and all is open. Writes wait meanwhile, and are then refused
            (ClosedError) or marked
        :raises StateError: if the thread has a transaction open
        :raises StoreError: if the bitmaps cannot be stored; then all is as before. If only a
            further store fails, all is done, that store stays as it was until a flush or close
            succeeds, and the error says so.

        >>> graph = BlockGraph()
        >>> disk = graph.add_node("disk", size=1 << 20)
        >>> daily, all_days = disk.add_bitmap("daily"), disk.add_bitmap("all", disabled=True)
        >>> disk.mark_dirty(0, 1)
        >>> with graph.transaction() as tx:         # a rotation: each write is in one of the two
        ...     tx.merge("disk", "all", ["daily"])
        ...     tx.clear("disk", "daily")
        >>> daily.count(), all_days.count()
        (0, 65536)
        """
        return _Transacting(self._coordinator, close)

    def freeze(self, bitmaps: Iterable[DirtyBitmap]) -> Frozen:
        """``with graph.freeze([...]) as frozen``: read bitmaps while writes go on.

        They are constant from one instant on, which holds for all of them, on whatever nodes; see
        :class:`Frozen` for what happens when the block is left.

        >>> from pybitmap import BlockGraph
        >>> graph = BlockGraph()
        >>> disk = graph.add_node("disk", size=1 << 20)
        >>> daily = disk.add_bitmap("daily", granularity=4096)
        >>> disk.mark_dirty(0, 1)
        >>> with graph.freeze([daily]) as frozen:
        ...     for bitmap in frozen:
        ...         print(bitmap.name, list(bitmap.areas()))
        ...     disk.mark_dirty(8192, 1)
        ...     frozen.done()
        daily [(0, 4096)]
        >>> list(daily.areas())
        [(8192, 4096)]

        :raises InvalidError: if one is named twice, or is of another graph; none is frozen
        :raises StateError: if one is busy, readonly or inconsistent, or inside a transaction; none
            is frozen
        :raises StoreError: if one is persistent and there is no space for a second one; none is
            frozen
        """
        return Frozen(self._coordinator, bitmaps)

    def flush(self) -> None:
        """Flush all nodes, see :meth:`BlockNode.flush`.

        :raises StoreError: of the first that could not be; the others were

        >>> from pybitmap import LocalStore
        >>> with BlockGraph() as graph:
        ...     disk = graph.add_node("disk", 1 << 20, LocalStore("disks.bitmaps"))
        ...     daily = disk.add_bitmap("daily", persistent=True)
        ...     disk.mark_dirty(0, 1)
        ...     graph.flush()                       # what was marked is on the disk
        """
        self._for_each(BlockNode.flush)

    def close(self) -> None:
        """Close all nodes; may be called twice.

        :raises StoreError: of the first whose bitmaps cannot be stored; it stays open, the others
            are closed

        >>> graph = BlockGraph()
        >>> disk = graph.add_node("disk", size=1 << 20)
        >>> graph.close()
        >>> disk.mark_dirty(0, 1)
        Traceback (most recent call last):
        pybitmap.errors.ClosedError: node 'disk' is closed
        """
        self._for_each(BlockNode.close)

    def _for_each(self, work: Callable[[BlockNode], None]) -> None:
        with self._coordinator.held():
            errors = []
            for name, node in self._nodes.items():
                try:
                    if not self._coordinator.devices[name].closed:
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


class Transaction(NotCopied):
    """The actions of a block ``with graph.transaction() as tx``; nodes and bitmaps by name.

    Every action raises what the same change would raise outside, and aborts everything by it.

    >>> graph = BlockGraph()
    >>> disk = graph.add_node("disk", size=1 << 20)
    >>> with graph.transaction() as tx:
    ...     daily = tx.add("disk", "daily")
    ...     tx.disable("disk", "daily")
    >>> daily.recording
    False
    """

    def __init__(self, coordinator: Coordinator, draft: Draft) -> None:
        self._coordinator = coordinator
        self._draft = draft

    def add(
        self,
        node: str,
        name: str,
        granularity: int | None = None,
        *,
        persistent: bool = False,
        disabled: bool = False,
    ) -> DirtyBitmap:
        """See :meth:`BlockNode.add_bitmap`; it is there at once, and records from T on.

        >>> graph = BlockGraph()
        >>> disk = graph.add_node("disk", size=1 << 20)
        >>> with graph.transaction() as tx:
        ...     monday = tx.add("disk", "monday", granularity=4096)
        >>> list(disk.bitmaps)
        ['monday']
        """
        with self._action():
            if not name:  # before the node is looked up, as in QEMU
                raise InvalidError("Bitmap name cannot be empty")
            granularity = None if granularity is None else index(granularity)
            device = self._coordinator.devices.get(node)
            if device is None:
                raise NotFoundError(f"Cannot find device='{node}' nor node-name='{node}'")
            cell = self._draft.add(
                device, name, granularity, persistent=persistent, disabled=disabled
            )
            return bitmap_of(cell, self._coordinator)

    def remove(self, node: str, name: str) -> None:
        """Until the commit the bitmap keeps its name, is busy, and is not stored.

        >>> graph = BlockGraph()
        >>> disk = graph.add_node("disk", size=1 << 20)
        >>> monday = disk.add_bitmap("monday")
        >>> with graph.transaction() as tx:
        ...     tx.remove("disk", "monday")
        ...     list(disk.bitmaps), monday.busy
        (['monday'], True)
        >>> list(disk.bitmaps)
        []
        """
        with self._action():
            self._draft.remove(self._find(node, name))

    def clear(self, node: str, name: str) -> None:
        """See :meth:`DirtyBitmap.clear`: nothing from before T remains.

        >>> graph = BlockGraph()
        >>> disk = graph.add_node("disk", size=1 << 20)
        >>> daily = disk.add_bitmap("daily")
        >>> disk.mark_dirty(0, 1)
        >>> with graph.transaction() as tx:
        ...     tx.clear("disk", "daily")
        >>> daily.count()
        0
        """
        with self._action():
            self._draft.clear(self._find(node, name))

    def merge(self, node: str, target: str, sources: Iterable[Source]) -> None:
        """See :meth:`DirtyBitmap.merge`: what the sources had at T, after the actions so far.

        >>> graph = BlockGraph()
        >>> disk = graph.add_node("disk", size=1 << 20)
        >>> monday, week = disk.add_bitmap("monday"), disk.add_bitmap("week", disabled=True)
        >>> disk.mark_dirty(0, 1)
        >>> with graph.transaction() as tx:
        ...     tx.merge("disk", "week", ["monday"])
        >>> week.count()
        65536
        """
        with self._action():
            # One by one: QEMU looks up a source when those before it have been judged.
            found = (
                self._find(node, source) if isinstance(source, str) else self._find(*source)
                for source in sources
            )
            self._draft.merge(self._find(node, target), found)

    def repair(self, node: str, name: str) -> None:
        """See :meth:`DirtyBitmap.repair`: an inconsistent bitmap is all dirty, and usable.

        >>> graph = BlockGraph()
        >>> disk = graph.add_node("disk", size=1 << 20)
        >>> daily = disk.add_bitmap("daily")
        >>> with graph.transaction() as tx:         # only what is inconsistent is repaired
        ...     tx.repair("disk", "daily")
        Traceback (most recent call last):
        pybitmap.errors.StateError: Bitmap 'daily' is not inconsistent
        """
        with self._action():
            self._draft.repair(self._find(node, name))

    def enable(self, node: str, name: str) -> None:
        """See :meth:`DirtyBitmap.enable`; it records from T on.

        >>> graph = BlockGraph()
        >>> disk = graph.add_node("disk", size=1 << 20)
        >>> daily = disk.add_bitmap("daily", disabled=True)
        >>> with graph.transaction() as tx:
        ...     tx.enable("disk", "daily")
        >>> daily.recording
        True
        """
        with self._action():
            self._draft.enable(self._find(node, name), True)

    def disable(self, node: str, name: str) -> None:
        """See :meth:`DirtyBitmap.disable`; it records until T.

        >>> graph = BlockGraph()
        >>> disk = graph.add_node("disk", size=1 << 20)
        >>> daily = disk.add_bitmap("daily")
        >>> with graph.transaction() as tx:
        ...     tx.disable("disk", "daily")
        >>> daily.recording
        False
        """
        with self._action():
            self._draft.enable(self._find(node, name), False)

    def abort(self) -> None:
        """Always fails: for tests.

        :raises AbortedError: always

        >>> graph = BlockGraph()
        >>> disk = graph.add_node("disk", size=1 << 20)
        >>> try:
        ...     with graph.transaction() as tx:
        ...         daily = tx.add("disk", "daily")
        ...         tx.abort()
        ... except AbortedError:
        ...     list(disk.bitmaps)
        []
        """
        with self._action():
            raise AbortedError("Transaction aborted using Abort action")

    def _find(self, node: str, name: str) -> Cell:
        device = self._coordinator.find(node)
        device.check_open()
        return device.find(name)

    def _action(self) -> _Action:
        if self._draft.dropped:
            raise AbortedError(ABORTED)
        if self._draft.ended:
            raise StateError("the transaction has ended")
        return _Action(self._draft)


class _Action:
    """One action: if it fails, the transaction is aborted before anybody can go on."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._draft.drop()


class _Transacting(Drafting):
    """See :meth:`BlockGraph.transaction`."""

    def __init__(self, coordinator: Coordinator, close: bool = False) -> None:
        super().__init__(coordinator, Draft(coordinator.devices, closes=close))

    def _entered(self, nested: bool) -> Transaction:
        super()._entered(nested)
        return Transaction(self._coordinator, self._draft)
