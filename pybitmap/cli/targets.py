# SPDX-License-Identifier: MIT
"""What commands work on, and how people name it: TARGET, NAME, NODE/NAME, --node.

A :class:`Target` is what is at a path: a qcow2 image or the directory of a local store. Its
bitmaps have the names that people give them here, and those that programs do (:data:`Name`).
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

from ..errors import InvalidError, NotFoundError, UnsupportedError
from ..offline import Name
from ..store import Store, StoredBitmap, StoredNode, probe


class Target(ABC):
    """A place with bitmaps; made by :func:`find_target`."""

    #: For people, and for programs.
    kind: str
    format: str

    def __init__(self, path: str, store: Store) -> None:
        self.path = path
        self.store = store

    @property
    def repairable(self) -> bool:
        """Can `pybitmap repair` be proposed?"""
        return self.store.lock

    def keeps(self, bitmap: StoredBitmap) -> bool:
        """Is it there also when whatever has it open has ended?"""
        return True

    def nodes(self) -> Sequence[StoredNode]:
        """What is stored, without reading bits.

        :raises LockedError: if another program has it open
        :raises CorruptError: if it is damaged
        :raises StoreError: if it cannot be read
        """
        return self.store.entries()

    def label(self, name: Name, nodes: Collection[object]) -> str:
        """How :meth:`find` is told which of its bitmaps is meant, of so many nodes."""
        node, bitmap = name
        return f"{node}/{bitmap}" if len(nodes) > 1 else bitmap

    def find(self, names: Iterable[str], node: str | None = None) -> list[Name]:
        """Bitmaps by the names that people give them, each once.

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

    def _find(self, name: str, nodes: Sequence[StoredNode], literally: bool) -> Name:
        bitmaps = [(node.name, bitmap.name) for node in nodes for bitmap in node.bitmaps]
        found = [each for each in bitmaps if len(nodes) == 1 and each[1] == name]
        if not found and not literally:
            found = [(node, each) for node, each in bitmaps if node and f"{node}/{each}" == name]
        if len(found) > 1:
            raise self._ambiguous(name, [str(node) for node, _ in found])
        if not found:
            there = _some([self.label(each, nodes) for each in bitmaps]) or "none"
            raise NotFoundError(
                f"{self.path}: Dirty bitmap '{name}' not found; bitmaps there: {there}"
            )
        return found[0]

    def _ambiguous(self, name: str, nodes: Iterable[str]) -> InvalidError:
        return InvalidError(
            f"{self.path}: '{name}' can mean a bitmap of several nodes, {_some(nodes)}: "
            f"choose one with --node"
        )

    def _named(self, name: str, nodes: Iterable[StoredNode]) -> StoredNode:
        for node in nodes:
            if node.name == name:
                return node
        there = _some(str(node.name) for node in nodes) or "none"
        raise NotFoundError(f"{self.path}: Node '{name}' not found; nodes there: {there}")

    @abstractmethod
    def node(self, name: str | None) -> str:
        """The node that is meant, for what changes a node itself.

        :param name: None: the only one
        :raises NotFoundError: if there is no such node
        :raises InvalidError: if it is not said which
        :raises UnsupportedError: if its size is not for us to change
        """

    @abstractmethod
    def place(self, name: str, node: str | None, size: int | None) -> Name:
        """Where a bitmap of that name is to be added.

        :param name: as for :meth:`find`; the node may be new if there is a size
        :raises NotFoundError: if there is no such node
        :raises InvalidError: if it is not said in which
        """


class Image(Target):
    """A qcow2 image."""

    kind, format = "qcow2 image", "qcow2"

    def _named(self, name: str, nodes: Iterable[StoredNode]) -> StoredNode:
        raise InvalidError(f"{self.path}: a qcow2 image has one node, without a name")

    def node(self, name: str | None) -> str:
        raise UnsupportedError(
            f"{self.path}: an image has the size of its disk: see qemu-img resize"
        )

    def place(self, name: str, node: str | None, size: int | None) -> Name:
        if node is not None:
            self._named(node, [])
        return None, name


class Local(Target):
    """The directory of a local store.

    :param new: there is none yet
    """

    kind, format = "local store", "local"

    def __init__(self, path: str, store: Store, *, new: bool = False) -> None:
        super().__init__(path, store)
        self._new = new

    def nodes(self) -> Sequence[StoredNode]:
        return [] if self._new else super().nodes()

    def node(self, name: str | None) -> str:
        nodes = self.nodes()
        if name is None and len(nodes) != 1:
            there = _some(str(each.name) for each in nodes) or "none"
            raise InvalidError(f"{self.path}: choose a node with --node; nodes there: {there}")
        found = nodes[0] if name is None else self._named(name, nodes)
        return str(found.name)

    def place(self, name: str, node: str | None, size: int | None) -> Name:
        if self._new and size is None:
            raise NotFoundError(
                f"{self.path}: neither an image nor a local store is there; "
                "with the --size of the disk, a store is made"
            )
        known = {str(each.name) for each in self.nodes()}
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


def find_target(path: str, *, new: bool = False, lock: bool = True) -> Target:
    """What is at a path.

    :param new: if nothing is there, or an empty directory, it is a local store that is to be made
    :param lock: see the stores
    :raises InvalidError: if it is neither a qcow2 image nor a local store
    :raises UnsupportedError: for a qcow2 image that can have no bitmaps
    :raises OSError: if it cannot be looked at
    """
    from ..store import Qcow2Store

    try:
        found = probe(path)
    except FileNotFoundError:
        if not new:
            raise
        found = None
    if found is Qcow2Store:
        return Image(path, Qcow2Store(path, lock=lock))
    from ..store import LocalStore  # for which images do not wait

    if new and LocalStore.vacant(path):
        return Local(path, LocalStore(path, lock=lock), new=True)
    if found is LocalStore:
        return Local(path, LocalStore(path, lock=lock))
    raise InvalidError(f"{path}: {_why_none(path)}")


def _why_none(path: str) -> str:
    """What is at a path where no store is."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        what = "a directory, but no local store" if os.listdir(path) else "an empty directory"
        return f"{what}: it has no catalog.sqlite"
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return "not a qcow2 image; bitmaps of other disks can be in a local store, a directory"
    return "neither a qcow2 image nor the directory of a local store"


def _some(words: Iterable[str]) -> str:
    """Up to five of them."""
    words = sorted(words)
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
