# SPDX-License-Identifier: MIT
"""What a transaction promises, as a model that knows nothing of how it is done.

A *world* is what the bitmaps of a graph are: a write marks what records, a list of actions makes
another world of one. A transaction is `perform` between two writes, wherever that is: so of the
worlds that there may be, one for each instant, one has to be what is found.

Sets of units of 512 bytes are ints, a bit each. A write is of whole units.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pybitmap import BlockGraph, DirtyBitmap, Transaction

UNIT = 512
GRANULARITIES = (512, 512, 512, 4096, 65536)

Key = tuple[str, str]  # node, bitmap
#: What is done, then the node, the bitmap and more: see `do`.
Action = tuple[Any, ...]


# ---- sets of units -------------------------------------------------------------------------------


def span(first: int, count: int) -> int:
    return ((1 << count) - 1) << first


def runs(units: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the areas."""
    start = 0
    while units:
        skip = (units & -units).bit_length() - 1
        units >>= skip
        count = (~units & (units + 1)).bit_length() - 1
        yield start + skip, count
        units >>= count
        start += skip + count


def size(units: int) -> int:
    return sum(count for _, count in runs(units))


def of_areas(areas: Iterable[tuple[int, int]]) -> int:
    """Of (offset, nbytes) as bitmaps give them; both are units, but for the end of a node."""
    units = 0
    for offset, nbytes in areas:
        units |= span(offset // UNIT, -(-nbytes // UNIT))
    return units


def shown(units: int) -> str:
    """For a message."""
    found = [f"{first}+{count}" for first, count in runs(units)]
    return " ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")


# ---- worlds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bits:
    """A bitmap.

    :param enabled: does it record, or its successor?
    :param limit: units of its node
    :param successor: what was written since it was frozen; None: it is not
    """

    granularity: int
    limit: int
    enabled: bool = True
    persistent: bool = False
    content: int = 0
    successor: int | None = None

    def rounded(self, units: int) -> int:
        """To whole groups."""
        group = self.granularity // UNIT
        if group == 1:
            return units
        found = 0
        for first, count in runs(units):
            begin, end = first // group * group, -(-(first + count) // group) * group
            found |= span(begin, min(end, self.limit) - begin)
        return found

    def written(self, units: int) -> Bits:
        if not self.enabled:
            return self
        if self.successor is not None:
            return replace(self, successor=self.successor | self.rounded(units))
        return replace(self, content=self.content | self.rounded(units))

    @property
    def union(self) -> int:
        return self.content | (self.successor or 0)

    @property
    def loaded(self) -> Bits:
        """As it is when it was stored and loaded again."""
        return replace(self, content=self.union, successor=None)


World = dict[Key, Bits]


def written(world: World, node: str, units: int) -> World:
    return {key: bits.written(units) if key[0] == node else bits for key, bits in world.items()}


def perform(world: World, actions: Iterable[Action], limit: int) -> World:
    """The world after these, which are no abort, at an instant when it is this one."""
    after, removed = dict(world), []
    for kind, *args in actions:
        key = (args[0], args[1])
        if kind == "add":
            granularity, persistent, disabled = args[2:]
            after[key] = Bits(granularity, limit, not disabled, persistent)
            continue
        bits = after[key]
        if kind == "remove":
            removed.append(key)
        elif kind == "clear":
            after[key] = replace(bits, content=0)
        elif kind == "merge":
            for source in args[2]:
                more = after[key].rounded(after[source].content)
                after[key] = replace(after[key], content=after[key].content | more)
        else:
            after[key] = replace(bits, enabled=kind == "enable")
    return {key: bits for key, bits in after.items() if key not in removed}


def passed_on(actions: Iterable[Action], groups: Mapping[str, object]) -> set[Key]:
    """The bitmaps that are cleared, in groups of nodes (stores) where what one had goes to another.

    Such a group may be changed twice: first but for what it loses.
    """
    origins: dict[Key, set[Key]] = {}  # whose content of before is in it
    cleared: set[Key] = set()
    for kind, *args in actions:
        key = (args[0], args[1]) if args else ("", "")
        origins.setdefault(key, {key})
        if kind == "clear":
            cleared.add(key)
            origins[key] = set()
        elif kind == "merge":
            for source in args[2]:
                origins[key] |= origins.setdefault(source, {source})
    giving = {
        groups.get(origin[0])
        for key, found in origins.items()
        for origin in found
        if groups.get(origin[0]) != groups.get(key[0])
    }
    return {key for key in cleared if groups.get(key[0]) in giving}


def difference(expected: World, found: World) -> str | None:
    """What is wrong with what was found, or None."""
    if expected.keys() != found.keys():
        return f"there are {sorted(found)}, not {sorted(expected)}"
    for key, bits in expected.items():
        other = found[key]
        if bits == other:
            continue
        told = []
        for part in ("content", "successor"):
            mine, its = getattr(bits, part), getattr(other, part)
            if (mine is None) != (its is None):
                told.append(f"{part} is {its}, not {mine}")
            elif mine != its:
                lost, more = shown(mine & ~its), shown(its & ~mine)
                told.append(f"{part} lacks [{lost}], has [{more}] too many")
        for flag in ("granularity", "enabled", "persistent"):
            if getattr(bits, flag) != getattr(other, flag):
                told.append(f"{flag} is {getattr(other, flag)}")
        return f"{key}: {', '.join(told)}"
    return None


# ---- the same of a graph -------------------------------------------------------------------------


def bits_of(bitmap: DirtyBitmap) -> Bits:
    state = bitmap._state
    successor = None if state.successor is None else of_areas(state.successor.content.areas())
    return Bits(
        bitmap.granularity,
        -(-bitmap.size // UNIT),
        bitmap.recording,
        bitmap.persistent,
        of_areas(bitmap.areas()),
        successor,
    )


def world_of(graph: BlockGraph) -> World:
    return {
        (name, bitmap.name): bits_of(bitmap)
        for name, node in graph.nodes.items()
        for bitmap in node.bitmaps.values()
    }


def do(tx: Transaction, action: Action) -> None:
    kind, *args = action
    if kind == "add":
        node, name, granularity, persistent, disabled = args
        tx.add(node, name, granularity, persistent=persistent, disabled=disabled)
    elif kind == "merge":
        tx.merge(args[0], args[1], args[2])
    elif kind == "abort":
        tx.abort()
    else:
        getattr(tx, kind)(*args)


def qmp(action: Action) -> dict[str, Any]:
    """As QMP's transaction has it."""
    kind, *args = action
    data: dict[str, Any] = dict(zip(("node", "name"), args))
    if kind == "abort":
        return {"type": "abort", "data": {}}
    if kind == "add":
        data.update(zip(("granularity", "persistent", "disabled"), args[2:]))
    if kind == "merge":
        sources = [{"node": node, "name": name} for node, name in args[2]]
        data = {"node": args[0], "target": args[1], "bitmaps": sources}
    return {"type": f"block-dirty-bitmap-{kind}", "data": data}


# ---- what to do ----------------------------------------------------------------------------------


class Drafter:
    """Makes up actions that can be done, one after the other, beginning with a world.

    :param storable: the nodes that can have persistent bitmaps
    """

    def __init__(
        self, rng: random.Random, world: World, nodes: Iterable[str], storable: Iterable[str]
    ) -> None:
        self.rng = rng
        self.nodes, self.storable = list(nodes), set(storable)
        #: What is there and not busy; what is there at all.
        self.free = {key: bits for key, bits in world.items() if bits.successor is None}
        self.taken = set(world)
        self.actions: list[Action] = []

    def draft(self) -> list[Action]:
        patterns = [
            self._rotation,
            self._rotation,
            self._chain,
            self._generation,
            self._move,
            self._orders,
            self._anything,
            self._anything,
        ]
        for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
            self.rng.choice(patterns)()
        return self.actions

    # ---- patterns -------------------------------------------------------------------------------

    def _rotation(self) -> None:
        """What was recorded goes from one to the other."""
        target, source = self._some(2)
        if target is not None and source is not None:
            self._put("merge", *target, (source,))
            self._put("clear", *source)

    def _chain(self) -> None:
        a, b, c = self._some(3)
        if a is not None and b is not None and c is not None:
            self._put("merge", *a, (b,))
            self._put("merge", *b, (c,))
            self._put("clear", *self.rng.choice([b, c]))

    def _generation(self) -> None:
        """A new one records where an old one did."""
        (old,) = self._some(1)
        new = self._add(*(() if old is None else (old[0],)))
        if old is not None and new is not None:
            self._put("disable", *old)

    def _move(self) -> None:
        """To another node, perhaps in another store, perhaps in two steps."""
        (old,) = self._some(1)
        if old is None:
            return
        new = self._add()
        if new is not None:
            self._put("merge", *new, (old,))
            self._remove(old)

    def _orders(self) -> None:
        """One bitmap, changed several times."""
        a, b = self._some(2)
        if a is None or b is None:
            return
        for _ in range(self.rng.randrange(2, 6)):
            kind = self.rng.choice(["clear", "merge", "merge itself", "enable", "disable", "back"])
            if kind == "merge":
                self._put("merge", *a, (b,))
            elif kind == "merge itself":
                self._put("merge", *a, (a, b) if self.rng.random() < 0.5 else (a,))
            elif kind == "back":
                self._put("merge", *b, (a,))
            else:
                self._put(kind, *a)

    def _anything(self) -> None:
        for _ in range(self.rng.randrange(1, 5)):
            kinds = ["add", "remove", "clear", "clear", "merge", "merge", "enable", "disable"]
            kind = self.rng.choice(kinds)
            (key,) = self._some(1)
            if kind == "add" or key is None:
                self._add()
            elif kind == "remove":
                self._remove(key)
            elif kind == "merge":
                sources = self.rng.choices(sorted(self.free), k=self.rng.randrange(1, 4))
                self._put("merge", *key, tuple(sources))
            else:
                self._put(kind, *key)

    # ---- actions --------------------------------------------------------------------------------

    def _some(self, count: int) -> list[Key | None]:
        """Different ones, None where there are too few."""
        keys = sorted(self.free)
        found = self.rng.sample(keys, min(count, len(keys)))
        return [*found, *[None] * (count - len(found))]

    def _put(self, kind: str, *args: Any) -> None:
        self.actions.append((kind, *args))

    def _add(self, *nodes: str) -> Key | None:
        node = self.rng.choice(nodes or self.nodes)
        names = [name for name in "abcdefg" if (node, name) not in self.taken]
        if not names:
            return None
        key = (node, self.rng.choice(names))
        persistent = node in self.storable and self.rng.random() < 0.8
        disabled = self.rng.random() < 0.3
        granularity = self.rng.choice(GRANULARITIES)
        self._put("add", *key, granularity, persistent, disabled)
        self.free[key] = Bits(granularity, 0, not disabled, persistent)
        self.taken.add(key)
        return key

    def _remove(self, key: Key) -> None:
        self._put("remove", *key)
        del self.free[key]
