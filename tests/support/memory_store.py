# SPDX-License-Identifier: MIT
"""A store in memory: the protocol as simple as it can be, and faults on demand.

What is stored is a dictionary, the medium, which outlives the stores that are opened over it. Like
a qcow2 image it does not have what was marked since it was stored last, so what is found in use is
inconsistent.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from pybitmap import HBitmap, InvalidError, LockedError, MismatchError, StoreError
from pybitmap.store import (
    Change,
    Purpose,
    Record,
    Store,
    StoredBitmap,
    StoredNode,
    Volume,
    Wanted,
)


@dataclass
class Stored:
    name: str
    granularity: int
    enabled: bool
    in_use: bool
    data: bytes | None  # None: was never stored


@dataclass
class Medium:
    """By node: its size, and its bitmaps, the oldest first."""

    nodes: dict[str, tuple[int, list[Stored]]] = field(default_factory=dict)
    opened: set[str] = field(default_factory=set)


class MemoryStore(Store):
    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        #: Called before each step, "make", "prepare" or "switch", and after the last, "switched":
        #: may raise.
        self.fault: Callable[[str], None] = lambda step: None

    def fail(self, step: str, after: int = 0) -> None:
        """From the call after so many on, that step fails."""
        left = after

        def fault(now: str) -> None:
            nonlocal left
            if now == step:
                left -= 1
                if left < 0:
                    raise StoreError(f"no space for {step}", errno.ENOSPC)

        self.fault = fault

    def mend(self) -> None:
        self.fault = lambda step: None

    def open(self, node: str, size: int | None, *, read_only: bool) -> MemoryVolume:
        known = self.medium.nodes.get(node)
        if known is not None and size not in (None, known[0]) and known[1]:
            raise MismatchError(f"node '{node}' has {known[0]} bytes in the store, not {size}")
        if known is not None and size is None:
            size = known[0]
        size = self._taken(node, size)
        return MemoryVolume(self, node, size, read_only=read_only)

    def _taken(self, node: str, size: int | None) -> int:
        """The size of a node that nobody but the caller has open from now on."""
        if size is None:
            raise InvalidError(f"the store does not know the size of node '{node}'")
        if node in self.medium.opened:
            raise LockedError(f"node '{node}' is open already")
        self.medium.opened.add(node)
        return size

    def entries(self) -> list[StoredNode]:
        return [
            StoredNode(name, size, [self._entry(name, each) for each in stored])
            for name, (size, stored) in self.medium.nodes.items()
        ]

    def _entry(self, node: str, each: Stored) -> StoredBitmap:
        lost = each.in_use and node not in self.medium.opened
        reason = "it was in use when its program ended" if lost else None
        return StoredBitmap(
            each.name, each.granularity, each.enabled, reason=reason, in_use=each.in_use
        )

    def prepare(self, wanted: Mapping[Volume, Wanted], purpose: Purpose) -> MemoryChange:
        self.fault("prepare")
        after = {}
        for volume, each in wanted.items():
            before = {
                stored.name: stored for stored in self.medium.nodes.get(volume.node, (0, []))[1]
            }
            lists = [self._stored(record, before, purpose) for record in each.records]
            after[volume.node] = each.size, [stored for stored in lists if stored is not None]
        return MemoryChange(self, after)

    @staticmethod
    def _stored(record: Record, before: Mapping[str, Stored], purpose: Purpose) -> Stored | None:
        if record.content is None:
            return before.get(record.name)
        bits = record.content
        if record.successor is not None:
            bits = bits | record.successor
        old = before.get(record.name)
        data = old.data if old is not None else None
        if purpose is not Purpose.COMMIT:
            data = bits.serialize()
        in_use = purpose is not Purpose.CLOSE
        return Stored(record.name, record.granularity, record.enabled, in_use, data)


class MemoryVolume(Volume):
    default_granularity = 4096
    resizable = True
    store: MemoryStore

    def load(self) -> list[StoredBitmap]:
        loaded = []
        for stored in self.store.medium.nodes.get(self.node, (0, []))[1]:
            content, reason, in_use = None, None, stored.in_use
            if stored.in_use:
                reason = "it was in use when its program ended"
            else:
                content = HBitmap(self.size, stored.granularity.bit_length() - 1)
                assert stored.data is not None
                content.deserialize(stored.data)
                stored.in_use = not self.read_only
            loaded.append(
                StoredBitmap(
                    stored.name, stored.granularity, stored.enabled, content, reason, in_use
                )
            )
        return loaded

    def check_new(self, name: str, granularity: int, names: Collection[str]) -> None:
        pass

    def make(self, granularity: int, size: int | None = None) -> HBitmap:
        self.store.fault("make")
        return HBitmap(self.size if size is None else size, granularity.bit_length() - 1)

    def close(self) -> None:
        self.store.medium.opened.discard(self.node)


@dataclass
class MemoryChange(Change):
    store: MemoryStore
    after: dict[str, tuple[int, list[Stored]]]

    def switch(self) -> None:
        self.store.fault("switch")
        self.store.medium.nodes.update(self.after)
        self.store.fault("switched")

    def abort(self) -> None:
        pass
