# SPDX-License-Identifier: MIT
"""A store in memory whose rows name live bitmaps, as a LocalStore's rows name mapped files.

So what a kill would leave can be looked at at any moment, without a kill: :meth:`KeptStore.left`.
Faults come on demand as in memory_store.py, and a switch that fails can have come through or not,
and say that it is known or not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from weakref import WeakSet

from instant import UNIT, Bits, Key, World, of_areas
from memory_store import Medium, MemoryStore, MemoryVolume

from pybitmap import HBitmap
from pybitmap.store import Change, Purpose, Record, StoredBitmap, StoredNode, Volume, Wanted


@dataclass(frozen=True)
class Row:
    name: str
    granularity: int
    enabled: bool
    content: HBitmap
    successor: HBitmap | None

    @property
    def units(self) -> int:
        found = of_areas(self.content.areas())
        return found if self.successor is None else found | of_areas(self.successor.areas())


@dataclass
class Shelf:
    """What outlives a store: by node its size, and its rows."""

    rows: dict[str, tuple[int, list[Row]]] = field(default_factory=dict)


class KeptStore(MemoryStore):
    def __init__(self, shelf: Shelf) -> None:
        super().__init__(Medium())
        self.shelf = shelf
        #: What was made since it was opened: nothing else may be named.
        self.made: WeakSet[_Made] = WeakSet()
        #: Is it not known whether a switch came through that fails before it?
        self.unsure = True

    def open(self, node: str, size: int | None, *, read_only: bool) -> KeptVolume:
        known = self.shelf.rows.get(node)
        if known is not None:
            size = known[0]
        size = self._taken(node, size)
        return KeptVolume(self, node, size, read_only=read_only)

    def entries(self) -> list[StoredNode]:
        raise NotImplementedError

    def prepare(self, wanted: Mapping[Volume, Wanted], purpose: Purpose) -> KeptChange:  # type: ignore[override]
        self.fault("prepare")
        after = {}
        for volume, each in wanted.items():
            assert volume.node in self.medium.opened, f"{volume.node} is closed"
            before = {row.name: row for row in self.shelf.rows.get(volume.node, (0, []))[1]}
            rows = [self._row(record, before, each.size) for record in each.records]
            found = [row for row in rows if row is not None]
            assert len({row.name for row in found}) == len(found), "a name twice"
            after[volume.node] = each.size, found
        return KeptChange(self, after)

    def _row(self, record: Record, before: Mapping[str, Row], size: int) -> Row | None:
        if record.content is None:
            return before.get(record.name)
        for content in (record.content, record.successor):
            if content is not None:
                assert isinstance(content, _Made), "made by make() or load()"
                assert content in self.made, "of this store, since it was opened"
                assert (content.size, 1 << content.granularity) == (size, record.granularity)
        return Row(
            record.name, record.granularity, record.enabled, record.content, record.successor
        )

    def left(self) -> World:
        """What whoever opens it next finds, were the process killed now."""
        found: dict[Key, Bits] = {}
        for node, (size, rows) in self.shelf.rows.items():
            for row in rows:
                found[node, row.name] = Bits(
                    row.granularity, -(-size // UNIT), row.enabled, True, row.units
                )
        return found


class _Made(HBitmap):
    """Memory that the store knows."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class KeptVolume(MemoryVolume):
    keeps_marks = True
    store: KeptStore

    def load(self) -> list[StoredBitmap]:
        loaded = []
        for row in self.store.shelf.rows.get(self.node, (0, []))[1]:
            content = self._new(row.granularity, self.size)
            content.merge(row.content)
            if row.successor is not None:
                content.merge(row.successor)
            loaded.append(StoredBitmap(row.name, row.granularity, row.enabled, content))
        rows = [
            Row(each.name, each.granularity, each.enabled, each.content, None)
            for each in loaded
            if each.content is not None
        ]
        if not self.read_only:
            self.store.shelf.rows[self.node] = self.size, rows
        return loaded

    def _new(self, granularity: int, size: int) -> HBitmap:
        made = _Made(size, granularity.bit_length() - 1)
        self.store.made.add(made)
        return made

    def check_new(self, name: str, granularity: int, names: Collection[str]) -> None:
        pass

    def make(self, granularity: int, size: int | None = None) -> HBitmap:
        self.store.fault("make")
        return self._new(granularity, self.size if size is None else size)


@dataclass
class KeptChange(Change):
    store: KeptStore
    after: dict[str, tuple[int, list[Row]]]

    def switch(self) -> None:
        self.unknown = self.store.unsure
        self.store.fault("switch")
        self.unknown = True
        self.store.shelf.rows.update(self.after)
        self.store.fault("switched")

    def abort(self) -> None:
        pass
