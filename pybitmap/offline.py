# SPDX-License-Identifier: MIT
"""Bitmaps of images and stores that no program has open: the work behind `pybitmap info`, `add`...

A :class:`Target` is what is found at a path: a qcow2 image or the directory of a local store. What
changes bitmaps opens its nodes as any program would, changes them in one transaction, and closes
them. If they cannot be stored then, the change is taken back and what was there before is stored:
bitmaps that have nothing to do with it must not be left in use, which whoever opens an image next
takes for inconsistent.

A ``progress`` may raise to stop the work. It is heard until everything is loaded; from then on the
target is in use, and the only way out is to store.

Offsets, lengths, counts, sizes and granularities are in bytes.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Callable

from .block.bitmap import DirtyBitmap
from .block.commit import check_granularity
from .block.graph import BlockGraph
from .block.node import BlockNode
from .block.state import USE
from .errors import (
    CorruptError,
    InvalidError,
    NotFoundError,
    StateError,
    StoreError,
    UnsupportedError,
)
from .store.base import Progress, Store, StoredNode

_QCOW2_MAGIC = b"QFI\xfb"
_CATALOG = "catalog.sqlite"


# ---- what there is --------------------------------------------------------------------------


@dataclass(frozen=True)
class Bitmap:
    """A stored bitmap.

    :param node: None where a target has only one, without a name
    :param in_use: it was not closed in an orderly way, or its program runs
    :param reason: why it is inconsistent, a sentence; None if it is not
    :param count: dirty bytes in whole groups; None if not asked for, or inconsistent
    """

    node: str | None
    name: str
    size: int
    granularity: int
    enabled: bool
    in_use: bool
    reason: str | None
    count: int | None = None

    @property
    def inconsistent(self) -> bool:
        return self.reason is not None


@dataclass(frozen=True)
class Node:
    """What a target holds for one disk; its bitmaps, in the order in which they are stored."""

    name: str | None
    size: int
    bitmaps: Sequence[Bitmap]


def _node(stored: StoredNode) -> Node:
    bitmaps = [
        Bitmap(
            stored.name,
            each.name,
            stored.size,
            each.granularity,
            each.enabled,
            each.in_use,
            each.reason,
        )
        for each in stored.bitmaps
    ]
    return Node(stored.name, stored.size, bitmaps)


class Target(ABC):
    """A place with bitmaps; made by :func:`find_target`."""

    #: For people, and for programs.
    kind: str
    format: str

    def __init__(self, path: str) -> None:
        self.path = path

    def nodes(self) -> list[Node]:
        """What is stored, without reading bits.

        :raises LockedError: if another program has it open
        :raises CorruptError: if it is damaged
        :raises StoreError: if it cannot be read
        """
        return [_node(each) for each in self.store().entries()]

    @abstractmethod
    def store(self) -> Store:
        """To open its nodes with."""

    def node_name(self, node: str | None) -> str:
        """For a graph."""
        return self.path if node is None else node

    def label(self, bitmap: Bitmap, nodes: Collection[Node]) -> str:
        """How :meth:`find` is told which of its bitmaps is meant."""
        return f"{bitmap.node}/{bitmap.name}" if len(nodes) > 1 else bitmap.name

    def find(self, names: Iterable[str], node: str | None = None) -> list[Bitmap]:
        """Bitmaps by the names that people give them.

        :param names: ``BITMAP`` where there is one node, else ``NODE/BITMAP``
        :param node: the node of all of them; the names are then those of bitmaps, whatever is in
            them
        :raises NotFoundError: if there is none of such a name
        :raises InvalidError: if it can mean several
        """
        nodes = self.nodes()
        if node is not None:
            nodes = [self._named(node, nodes)]
        return list(dict.fromkeys(self._find(name, nodes, node is not None) for name in names))

    def _find(self, name: str, nodes: list[Node], literally: bool) -> Bitmap:
        bitmaps = [bitmap for node in nodes for bitmap in node.bitmaps]
        found = [bitmap for bitmap in bitmaps if len(nodes) == 1 and bitmap.name == name]
        if not found and not literally:
            named = [bitmap for bitmap in bitmaps if bitmap.node is not None]
            found = [bitmap for bitmap in named if f"{bitmap.node}/{bitmap.name}" == name]
        if len(found) > 1:
            raise self._ambiguous(name, [str(bitmap.node) for bitmap in found])
        if not found:
            there = _some([self.label(bitmap, nodes) for bitmap in bitmaps]) or "none"
            raise NotFoundError(
                f"{self.path}: Dirty bitmap '{name}' not found; bitmaps there: {there}"
            )
        return found[0]

    def _ambiguous(self, name: str, nodes: Iterable[str]) -> InvalidError:
        return InvalidError(
            f"{self.path}: '{name}' can mean a bitmap of several nodes, {_some(nodes)}: "
            f"choose one with --node"
        )

    def _named(self, name: str, nodes: Iterable[Node]) -> Node:
        for node in nodes:
            if node.name == name:
                return node
        there = _some(str(node.name) for node in nodes) or "none"
        raise NotFoundError(f"{self.path}: Node '{name}' not found; nodes there: {there}")

    @abstractmethod
    def place(self, name: str, node: str | None, size: int | None) -> tuple[str | None, str]:
        """Where a bitmap of that name is to be added: node and bitmap.

        :param name: as for :meth:`find`; the node may be new if there is a size
        :raises NotFoundError: if there is no such node
        :raises InvalidError: if it is not said in which
        """


class Image(Target):
    """A qcow2 image."""

    kind, format = "qcow2 image", "qcow2"

    def store(self) -> Store:
        from .store import Qcow2Store

        return Qcow2Store(self.path)

    def _named(self, name: str, nodes: Iterable[Node]) -> Node:
        raise InvalidError(f"{self.path}: a qcow2 image has one node, without a name")

    def place(self, name: str, node: str | None, size: int | None) -> tuple[str | None, str]:
        if node is not None:
            self._named(node, [])
        return None, name


class Local(Target):
    """The directory of a local store.

    :param new: there is none yet
    """

    kind, format = "local store", "local"

    def __init__(self, path: str, *, new: bool = False) -> None:
        super().__init__(path)
        self._new = new

    def nodes(self) -> list[Node]:
        return [] if self._new else super().nodes()

    def store(self) -> Store:
        from .store import LocalStore

        return LocalStore(self.path)

    def place(self, name: str, node: str | None, size: int | None) -> tuple[str | None, str]:
        if self._new and size is None:
            raise NotFoundError(
                f"{self.path}: neither an image nor a local store is there; "
                "with the --size of the disk, a store is made"
            )
        nodes = self.nodes()
        known = {str(each.name) for each in nodes}
        if node is None:
            node, name = self._split(name, known)
        if node not in known and size is None:
            there = f"; nodes there: {_some(known)}" if known else ""
            raise NotFoundError(f"{self.path}: a new node '{node}' needs its --size{there}")
        return node, name

    def _split(self, name: str, known: Collection[str]) -> tuple[str, str]:
        """Node and bitmap. What has a slash never names a bitmap of the only node: that may be a
        new disk of which the size was forgotten."""
        found = [node for node in known if name.startswith(f"{node}/")]
        if len(found) > 1:
            raise self._ambiguous(name, found)
        if found:
            return found[0], name[len(found[0]) + 1 :]
        node, slash, bitmap = name.partition("/")
        if slash:
            return node, bitmap
        if len(known) == 1:
            return next(iter(known)), name
        there = f": {_some(known)}" if known else ""
        raise InvalidError(
            f"{self.path}: '{name}' is to be a bitmap of which node{there}? Write NODE/{name}"
        )


def find_target(path: str, *, new: bool = False) -> Target:
    """What is at a path.

    :param new: if nothing is there, or an empty directory, it is a local store that is to be made
    :raises InvalidError: if it is neither a qcow2 image nor a local store
    :raises UnsupportedError: for a qcow2 image that can have no bitmaps
    :raises OSError: if it cannot be looked at
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if new:
            return Local(path, new=True)
        raise
    if stat.S_ISDIR(mode):
        names = set(os.listdir(path))
        if new and _is_unfinished(path, names):
            return Local(path, new=True)
        if _CATALOG in names:
            return Local(path)
        what = "a directory, but no local store" if names else "an empty directory"
        raise InvalidError(f"{path}: {what}: it has no {_CATALOG}")
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise InvalidError(f"{path}: neither a qcow2 image nor the directory of a local store")
    with open(path, "rb") as file:
        head = file.read(8)
    if head == _QCOW2_MAGIC + (2).to_bytes(4, "big"):
        raise UnsupportedError(
            f"{path}: a qcow2 image of version 2, which has no bitmaps; version 3 is made of it by "
            f"qemu-img amend -o compat=1.1"
        )
    if head.startswith(_QCOW2_MAGIC):
        return Image(path)
    raise InvalidError(
        f"{path}: not a qcow2 image; bitmaps of other disks can be in a local store, a directory"
    )


def _is_unfinished(path: str, names: Collection[str]) -> bool:
    """Is a directory empty, but for what an attempt to make a store there has left?"""
    if set(names) - {"lock", _CATALOG, f"{_CATALOG}-journal"}:
        return False
    return _CATALOG not in names or not os.path.getsize(os.path.join(path, _CATALOG))


def _some(words: Iterable[str]) -> str:
    """Up to five of them."""
    words = sorted(words)
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")


# ---- reading --------------------------------------------------------------------------------


@contextmanager
def _reading(
    target: Target, nodes: Iterable[str | None], progress: Progress
) -> Iterator[BlockGraph]:
    store = target.store()
    store.progress = progress
    with BlockGraph() as graph:
        for node in dict.fromkeys(nodes):
            graph.add_node(target.node_name(node), store=store, read_only=True)
        yield graph


def _of(graph: BlockGraph, target: Target, bitmap: Bitmap) -> DirtyBitmap:
    return graph.find_node(target.node_name(bitmap.node)).find_bitmap(bitmap.name)


def counted(target: Target, nodes: Iterable[Node], progress: Progress) -> list[Node]:
    """The same nodes, with the count of every bitmap that has bits: all are read for that."""
    nodes = list(nodes)
    with _reading(target, [node.name for node in nodes], progress) as graph:

        def count(bitmap: Bitmap) -> Bitmap:
            found = _of(graph, target, bitmap)
            return replace(
                bitmap, count=None if found.inconsistent else found.count, reason=found.reason
            )

        return [replace(node, bitmaps=[count(bitmap) for bitmap in node.bitmaps]) for node in nodes]


@contextmanager
def areas(
    target: Target, bitmap: Bitmap, progress: Progress
) -> Iterator[Iterator[tuple[int, int]]]:
    """The dirty areas of a bitmap, ``(offset, length)``, as they are found.

    :raises InconsistentError: if it has no bits, and why
    """
    with _reading(target, [bitmap.node], progress) as graph:
        found = _of(graph, target, bitmap)
        _check_usable(target, found)
        yield found.areas()


def _check_usable(target: Target, bitmap: DirtyBitmap) -> None:
    """The gatekeeper, and what happened to the bitmap."""
    try:
        bitmap.check(USE)
    except Exception as error:
        if bitmap.reason is None:
            raise
        raise type(error)(f"{target.path}: {error}: {bitmap.reason}") from None


def problems(target: Target, progress: Progress) -> Iterator[tuple[Bitmap | None, str | None]]:
    """Every bitmap, and what is wrong with it (None: nothing). A problem of the whole: no bitmap.

    Reads everything: the directory, the tables, the bits.
    """
    try:
        target.store().check()
    except CorruptError as error:
        yield None, str(error)
    try:
        nodes = counted(target, target.nodes(), progress)
    except CorruptError as error:
        yield None, str(error)
        return
    for node in nodes:
        for bitmap in node.bitmaps:
            yield bitmap, bitmap.reason


# ---- changing -------------------------------------------------------------------------------


@dataclass
class _Change:
    """Nodes that are open to be changed."""

    target: Target
    graph: BlockGraph
    #: What to do if it cannot be stored.
    undo: list[Callable[[], None]] = field(default_factory=list)

    def bitmap(self, bitmap: Bitmap) -> DirtyBitmap:
        return _of(self.graph, self.target, bitmap)

    def keep(self, bitmap: DirtyBitmap) -> None:
        """Its content is going to change."""
        spare = BlockGraph().add_node("before", bitmap.size).add_bitmap("it", bitmap.granularity)
        spare.merge(bitmap)

        def put_back() -> None:
            bitmap.clear()
            bitmap.merge(spare)

        self.undo.append(put_back)

    def close(self) -> None:
        """Store all; if that fails, what was there before.

        :raises StoreError, MemoryError: it is as before
        """
        try:
            self.graph.close()
        except (StoreError, MemoryError):
            while self.undo:
                self.undo.pop()()
            self.graph.close()
            raise


@contextmanager
def _changing(
    target: Target, nodes: Iterable[str | None], progress: Progress, size: int | None = None
) -> Iterator[_Change]:
    """The nodes, open for writing until the end of the block."""
    store = target.store()
    store.progress = progress
    change = _Change(target, BlockGraph())
    try:
        for node in dict.fromkeys(nodes):
            change.graph.add_node(target.node_name(node), size, store)
        store.progress = _unstoppable(progress)
        yield change
    finally:
        store.progress = _unstoppable(progress)
        change.close()


def _unstoppable(progress: Progress) -> Progress:
    def report(what: str, done: int, total: int | None) -> None:
        with suppress(KeyboardInterrupt):
            progress(what, done, total)

    return report


def add(
    target: Target,
    name: str,
    progress: Progress,
    *,
    granularity: int | None = None,
    disabled: bool = False,
    node: str | None = None,
    size: int | None = None,
) -> None:
    """A new bitmap, clean.

    :param node: see :meth:`Target.find`
    :param size: of the node, if it is new or has no bitmaps
    :raises ExistsError: if there is one of that name
    :raises InvalidError, UnsupportedError: if there cannot be such a bitmap
    :raises StoreError: nothing has changed
    """
    if granularity is not None:
        check_granularity(granularity)  # before a store is made
    node, name = target.place(name, node, size)
    if not name:
        raise InvalidError("Bitmap name cannot be empty")
    empty = any(each.name == node and not each.bitmaps for each in target.nodes())
    with _changing(target, [node], progress, None if empty else size) as change:
        host: BlockNode = change.graph.find_node(target.node_name(node))
        before = host.size
        try:
            if size is not None and size != before:
                host.truncate(size)
            host.add_bitmap(name, granularity, persistent=True, disabled=disabled)
        except BaseException:
            if not host.bitmaps:  # a node that is new is not to be stored
                with suppress(StoreError):
                    if host.size != before:
                        host.truncate(before)
                host.close(discard=True)
            raise
        change.undo.append(lambda: host.remove_bitmap(name))


def remove(target: Target, bitmaps: Collection[Bitmap], progress: Progress) -> None:
    """All of them or, if one cannot be removed, none; inconsistent ones, too."""
    nodes = [bitmap.node for bitmap in bitmaps]
    with _changing(target, nodes, progress) as change, change.graph.transaction() as tx:
        for bitmap in bitmaps:
            tx.remove(target.node_name(bitmap.node), bitmap.name)


def clear(target: Target, bitmaps: Collection[Bitmap], progress: Progress) -> None:
    """Make all of them clean, or none.

    :raises InconsistentError: if one is
    :raises StoreError: nothing has changed
    """
    with _changing(target, [each.node for each in bitmaps], progress) as change:
        found = [change.bitmap(each) for each in bitmaps]
        for bitmap in found:
            _check_usable(target, bitmap)
            change.keep(bitmap)
        with change.graph.transaction() as tx:
            for each in bitmaps:
                tx.clear(target.node_name(each.node), each.name)


def enable(target: Target, bitmaps: Collection[Bitmap], enabled: bool, progress: Progress) -> None:
    """Let all of them record, or not, when they are open the next time.

    :raises InconsistentError: if one is; then none has changed
    """
    with _changing(target, [each.node for each in bitmaps], progress) as change:
        for bitmap in bitmaps:
            _check_usable(target, change.bitmap(bitmap))
        with change.graph.transaction() as tx:
            for bitmap in bitmaps:
                act = tx.enable if enabled else tx.disable
                act(target.node_name(bitmap.node), bitmap.name)


def merge(
    target: Target,
    bitmap: Bitmap,
    source_target: Target,
    sources: Collection[Bitmap],
    progress: Progress,
) -> None:
    """Mark what is dirty in the sources, in all of them or, if one is refused, in none.

    :param source_target: where these are; may be the target itself, the same object then
    :raises InconsistentError: if one of them is
    :raises MismatchError: if a source is of another size
    :raises StoreError: nothing has changed
    """
    if source_target is target:
        nodes = [bitmap.node, *(each.node for each in sources)]
        with _changing(target, nodes, progress) as change:
            _merge(change, bitmap, target, [change.bitmap(each) for each in sources])
        return
    with _reading(source_target, [each.node for each in sources], progress) as graph:
        found = [_of(graph, source_target, each) for each in sources]
        with _changing(target, [bitmap.node], progress) as change:
            _merge(change, bitmap, source_target, found)


def _merge(
    change: _Change, bitmap: Bitmap, source_target: Target, sources: Sequence[DirtyBitmap]
) -> None:
    found = change.bitmap(bitmap)
    _check_usable(change.target, found)
    for source in sources:
        _check_usable(source_target, source)
    change.keep(found)
    found.merge(*sources)


def repair(target: Target, bitmaps: Collection[Bitmap], progress: Progress) -> None:
    """Make inconsistent bitmaps usable by marking all of them dirty: nothing is missed then.

    :raises StateError: if one is not inconsistent; nothing has changed
    :raises StoreError: nothing has changed
    """
    for each in bitmaps:
        if not each.inconsistent:
            raise StateError(f"Bitmap '{each.name}' is not inconsistent")
    with _changing(target, [each.node for each in bitmaps], progress) as change:
        for each in bitmaps:
            bitmap = change.bitmap(each)
            bitmap.repair()
            # What is stored under the name is in use, and so stays inconsistent.
            change.undo.append(bitmap._keep_stored)
