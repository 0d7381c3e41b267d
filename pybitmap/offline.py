# SPDX-License-Identifier: MIT
"""Bitmaps of a store that no program has open: the work behind `pybitmap info`, `add`...

A bitmap is meant by a :data:`Name`: its node and its own name. What changes some opens their nodes
*at rest* (:attr:`~.store.base.Store.at_rest`), and closes them in the transaction that changes
them. Either all is done, stored and closed, or nothing has changed; a process that is killed leaves
the old bitmaps or the new ones. No bitmap is in use meanwhile, which whoever opens an image next
would take for inconsistent.

A ``progress`` may raise to stop the work. It is heard until everything is loaded; from then on the
only way out is to close.

Offsets, lengths, counts, sizes and granularities are in bytes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from typing import Optional

from .block.bitmap import DirtyBitmap
from .block.draft import check_granularity
from .block.graph import BlockGraph, Transaction
from .errors import CorruptError, InconsistentError, InvalidError, NotFoundError
from .extent import Extents, batches, rounded
from .store.base import (
    LIVE,
    Change,
    Piece,
    Progress,
    Purpose,
    Reading,
    Store,
    StoredBitmap,
    StoredNode,
    Volume,
    Wanted,
)

#: Of a bitmap: that of its node (None: the store holds one, whatever it is called) and its own.
Name = tuple[Optional[str], str]


# ---- reading --------------------------------------------------------------------------------


def counted(store: Store, progress: Progress) -> list[StoredNode]:
    """What is stored, with the count of every bitmap that has bits: all are read for that.

    :raises LockedError: if another program has it open
    :raises CorruptError: if it is damaged
    :raises StoreError: if it cannot be read
    """
    store.progress = progress
    with ExitStack() as stack:
        nodes = []
        for node in store.entries():
            volume = store.open(_label(store, node.name), None, read_only=True)
            nodes.append((node, stack.enter_context(closing(volume))))
        return [
            replace(node, bitmaps=[_counted(each, volume.size) for each in volume.read()])
            for node, volume in nodes
        ]


def _counted(reading: Reading, size: int) -> StoredBitmap:
    bitmap = reading.bitmap
    if bitmap.reason is not None:
        return bitmap
    count = 0
    for start, bits in reading.pieces():
        count += bits.count(0, bits.size)
        if bits.size and start + bits.size == size and bits[bits.size - 1]:
            count += -size % bitmap.granularity  # the last group counts whole
    return replace(bitmap, count=count)


@contextmanager
def areas(
    store: Store, name: Name, progress: Progress, granularity: int = 1
) -> Iterator[Iterator[tuple[int, int]]]:
    """The dirty areas of a bitmap, ``(offset, length)``, as they are found.

    All of it is read once before, so that what cannot be read is told before the first is given;
    the store is locked for writers from then on until the block ends.

    :param granularity: as a bitmap of that granularity has them, if it is coarser
    :raises NotFoundError: if there is none of that name
    :raises InconsistentError: if it has no bits, and why
    :raises StoreError: if it cannot be read
    """
    store.progress = progress
    with closing(store.open(_label(store, name[0]), None, read_only=True)) as volume:
        found = [each for each in volume.read() if each.bitmap.name == name[1]]
        if not found:
            raise NotFoundError(f"Dirty bitmap '{name[1]}' not found")
        [reading] = found
        if reading.bitmap.reason is not None:
            raise _unusable(store, name[1], reading.bitmap.reason)
        for _ in reading.pieces():
            pass
        store.progress = None
        yield rounded(_joined(reading.pieces()), granularity, volume.size)


def _joined(pieces: Iterable[Piece]) -> Iterator[tuple[int, int]]:
    """The areas of all of them; those that touch, as of two pieces, are one."""
    start = end = 0
    for first, bits in pieces:
        for offset, nbytes in bits.areas():
            if first + offset != end:
                if end > start:
                    yield start, end - start
                start = first + offset
            end = first + offset + nbytes
    if end > start:
        yield start, end - start


def problems(store: Store, progress: Progress) -> Iterator[tuple[Name | None, str | None]]:
    """Every bitmap, and what is wrong with it (None: nothing). A problem of the whole: no name.

    Reads everything: the directory, the tables, the bits.

    :raises LockedError: if another program has it open
    :raises StoreError: if it cannot be read
    """
    try:
        store.check()
    except CorruptError as error:
        yield None, str(error)
    try:
        nodes = counted(store, progress)
    except CorruptError as error:
        yield None, str(error)
        return
    for node in nodes:
        for bitmap in node.bitmaps:
            yield (node.name, bitmap.name), bitmap.reason


# ---- changing -------------------------------------------------------------------------------


def add(
    store: Store,
    name: Name,
    progress: Progress,
    *,
    granularity: int | None = None,
    disabled: bool = False,
    size: int | None = None,
) -> None:
    """A new bitmap, clean.

    :param size: of the node, if it is new or has no bitmaps
    Where there is no store and none comes of it, nothing is left; see :meth:`Store.making`.

    :raises ExistsError: if there is one of that name
    :raises InvalidError, UnsupportedError: if there cannot be such a bitmap
    :raises StoreError, MemoryError: nothing has changed
    """
    # Before a store is made.
    if granularity is not None:
        check_granularity(granularity)
    if not name[1]:
        raise InvalidError("Bitmap name cannot be empty")
    with store.making(at_once=True), BlockGraph() as graph:
        opened = _Opened(graph, store, [name], progress, size=size)
        node, bitmap = opened.place(name)
        try:
            with graph.transaction(close=True) as tx:
                tx.add(node, bitmap, granularity, persistent=True, disabled=disabled)
        except BaseException:
            host = graph.find_node(node)
            if not host.bitmaps:  # a new node, or a new size, is not to be stored
                host.close(discard=True)
            raise


def remove(store: Store, names: Collection[Name], progress: Progress) -> None:
    """All of them or, if one cannot be removed, none; inconsistent ones, too.

    :raises StoreError, MemoryError: nothing has changed
    """
    with _changing(store, names, progress) as (opened, tx):
        for name in names:
            tx.remove(*opened.place(name))


def clear(store: Store, names: Collection[Name], progress: Progress) -> None:
    """Make all of them clean, or none.

    :raises InconsistentError: if one is; nothing has changed
    :raises StoreError, MemoryError: nothing has changed
    """
    with _changing(store, names, progress) as (opened, tx):
        for name in names:
            tx.clear(*opened.usable(name))


def enable(store: Store, names: Collection[Name], enabled: bool, progress: Progress) -> None:
    """Let all of them record, or not, when they are open the next time; or change none.

    :raises InconsistentError: if one is; nothing has changed
    :raises StoreError, MemoryError: nothing has changed
    """
    with _changing(store, names, progress) as (opened, tx):
        act = tx.enable if enabled else tx.disable
        for name in names:
            act(*opened.usable(name))


def merge(
    store: Store,
    name: Name,
    sources: Collection[Name],
    progress: Progress,
    source_store: Store | None = None,
) -> None:
    """Mark what is dirty in the sources, in all of them or, if one is refused, in none.

    :param source_store: where these are, not to be written to; None: in the same store
    :raises InconsistentError: if one of them is; nothing has changed
    :raises MismatchError: if a source is of another size; nothing has changed
    :raises StoreError, MemoryError: nothing has changed
    """
    with BlockGraph() as graph:
        if source_store is None:
            target = found = _Opened(graph, store, [name, *sources], progress)
        else:
            beside = _label(store, name[0])
            found = _Opened(graph, source_store, sources, progress, read_only=True, beside=beside)
            target = _Opened(graph, store, [name], progress)
        with graph.transaction(close=True) as tx:
            tx.merge(*target.usable(name), [found.usable(each) for each in sources])


def mark(store: Store, name: Name, extents: Extents, progress: Progress) -> None:
    """Mark extents in a bitmap, all of them or, if one is refused, none.

    :param extents: in bytes; they are gone through once
    :raises InconsistentError: if the bitmap is; nothing has changed
    :raises RangeError: if one is not inside the disk; nothing has changed
    :raises StoreError, MemoryError: nothing has changed
    """
    with BlockGraph() as graph:
        opened = _Opened(graph, store, [name], progress)
        node, bitmap = opened.usable(name)
        size = graph.find_node(node).size
        beside = graph.add_node(f"{node} <- extents", size)
        beside.add_bitmap("extents", opened.find(name).granularity)
        for starts, lengths, _ in batches(extents, size):
            beside.mark_dirty_many(starts, lengths)
        with graph.transaction(close=True) as tx:
            tx.merge(node, bitmap, [(beside.name, "extents")])


def take(store: Store, name: Name, other: str, progress: Progress) -> None:
    """Move what is dirty to a new bitmap of the same node, which does not record; the old one is
    clean then.

    :param other: what the new one is called; :func:`put_back` undoes it
    :raises ExistsError: if there is one of that name; nothing has changed
    :raises InconsistentError: if the bitmap is; nothing has changed
    :raises StoreError, MemoryError: nothing has changed
    """
    with _changing(store, [name], progress) as (opened, tx):
        node, bitmap = opened.usable(name)
        granularity = opened.find(name).granularity
        tx.add(node, other, granularity, persistent=True, disabled=True)
        tx.merge(node, other, [bitmap])
        tx.clear(node, bitmap)


def put_back(store: Store, name: Name, into: Name, progress: Progress) -> None:
    """Mark in a bitmap what is dirty in another of its node, and remove that one.

    :raises InconsistentError: if one of them is; nothing has changed
    :raises InvalidError: if it is the same, or of another node
    :raises StoreError, MemoryError: nothing has changed
    """
    if name == into or name[0] != into[0]:
        raise InvalidError(f"'{name[1]}' cannot be put back into '{into[1]}': they are to be two")
    with _changing(store, [name, into], progress) as (opened, tx):
        node, bitmap = opened.usable(name)
        tx.merge(*opened.usable(into), [bitmap])
        tx.remove(node, bitmap)


def resize(store: Store, node: str, size: int, progress: Progress, *, shrink: bool = False) -> None:
    """Let the bitmaps of a node follow its disk; see :meth:`BlockNode.truncate`.

    Killed, the node has the old size or the new one. Neither it nor the disk may be in use.

    :param shrink: may it become smaller? What was dirty behind the end is forgotten then
    :raises InvalidError: if it would become smaller and must not, or for a size that cannot be
    :raises UnsupportedError: if the store is an image, which has a size of its own
    :raises InconsistentError: if a bitmap of the node is; nothing has changed
    :raises StoreError, MemoryError: nothing has changed
    """
    with BlockGraph() as graph:
        _Opened(graph, store, [(node, "")], progress)
        host = graph.find_node(node)
        if size < host.size and not shrink:
            raise InvalidError(
                f"node '{node}' would shrink from {host.size} bytes to {size}, and its bitmaps "
                "forget what lies behind: allow that with --shrink (shrink=True)"
            )
        for name in host.bitmaps:
            _usable(store, host.bitmaps[name])
        host.truncate(size)


def repair(store: Store, names: Collection[Name], progress: Progress) -> None:
    """Make inconsistent bitmaps usable by marking all of them dirty: nothing is missed then.

    :raises StateError: if one is not inconsistent; nothing has changed
    :raises StoreError, MemoryError: nothing has changed
    """
    with _changing(store, names, progress) as (opened, tx):
        for name in names:
            tx.repair(*opened.place(name))


@contextmanager
def _changing(
    store: Store, names: Iterable[Name], progress: Progress
) -> Iterator[tuple[_Opened, Transaction]]:
    """The nodes, open for writing, and a transaction that closes them at the end of the block."""
    with BlockGraph() as graph:  # which closes them as they were, if that fails
        opened = _Opened(graph, store, names, progress)
        with graph.transaction(close=True) as tx:
            yield opened, tx


# ---- opening --------------------------------------------------------------------------------


class _Opened:
    """The nodes of some bitmaps, open in a graph.

    :param progress: is heard until they are loaded
    :param beside: the name of a node of another store, which is to be in the graph as well
    """

    def __init__(
        self,
        graph: BlockGraph,
        store: Store,
        names: Iterable[Name],
        progress: Progress,
        *,
        size: int | None = None,
        read_only: bool = False,
        beside: str = "",
    ) -> None:
        self._graph, self._store, self._beside = graph, store, beside
        store.progress, store.at_rest = progress, not read_only
        try:
            for node in dict.fromkeys(node for node, _ in names):
                part = _Renamed(store, _label(store, node)) if beside else store
                graph.add_node(self._label(node), size, part, read_only)
        finally:
            store.progress, store.at_rest = _unstoppable(progress), False

    def _label(self, node: str | None) -> str:
        """In the graph; longer than that of the other store's node, so another."""
        label = _label(self._store, node)
        return f"{self._beside} <- {label}" if self._beside else label

    def place(self, name: Name) -> tuple[str, str]:
        """Node and bitmap, as a transaction is told."""
        return self._label(name[0]), name[1]

    def usable(self, name: Name) -> tuple[str, str]:
        """The same.

        :raises InconsistentError: if it is
        """
        _usable(self._store, self.find(name))
        return self.place(name)

    def find(self, name: Name) -> DirtyBitmap:
        """
        :raises NotFoundError: if it is not there
        """
        node, bitmap = self.place(name)
        return self._graph.find_node(node).find_bitmap(bitmap)


def _usable(store: Store, bitmap: DirtyBitmap) -> None:
    """
    :raises InconsistentError: if it is
    """
    if bitmap.reason is not None:
        raise _unusable(store, bitmap.name, bitmap.reason)


def _unusable(store: Store, bitmap: str, reason: str) -> InconsistentError:
    where = f"{store.path}: " if store.path else ""
    if reason == LIVE:
        return InconsistentError(f"{where}Bitmap '{bitmap}' is in use: {LIVE}")
    return InconsistentError(
        f"{where}Bitmap '{bitmap}' is inconsistent and cannot be used: {reason}"
    )


def _label(store: Store, node: str | None) -> str:
    """What a node is called."""
    return os.fspath(store.path) if node is None else node


class _Renamed(Store):
    """A node of a store, for a graph in which it has another name; to be read."""

    def __init__(self, store: Store, node: str) -> None:
        self._store, self._node = store, node

    def open(self, node: str, size: int | None, *, read_only: bool) -> Volume:
        return self._store.open(self._node, size, read_only=read_only)

    def entries(self) -> list[StoredNode]:
        return self._store.entries()

    def prepare(self, wanted: Mapping[Volume, Wanted], purpose: Purpose) -> Change:
        return self._store.prepare(wanted, purpose)


def _unstoppable(progress: Progress) -> Progress:
    def report(what: str, done: int, total: int | None) -> None:
        with suppress(Exception, KeyboardInterrupt):
            progress(what, done, total)

    return report
