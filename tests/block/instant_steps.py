# SPDX-License-Identifier: MIT
"""Transactions in one thread, with writes and looks between any two lines of the commit.

    python instant_steps.py FIRST [COUNT]

Each seed is a play: a graph of five nodes, two of them in one store, two in another, one in none,
and some changes of it, one after the other: transactions of random actions, most of which succeed,
while in others a call of a store fails, in each way in which it may. A trace function comes between
the lines of the library, writes to nodes there, and looks at what bitmaps show, and at what a kill
would leave in the stores at that moment. As all writes come in one order, and each is of a unit of
its own, there is a world for each instant T that a change may have had, and one of them has to be
what is found.

Prints the seeds of plays that went wrong, and how.
"""

from __future__ import annotations

import errno
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any

from instant import (
    UNIT,
    Action,
    Bits,
    Drafter,
    Key,
    World,
    difference,
    do,
    passed_on,
    perform,
    qmp,
    world_of,
    written,
)
from kept_store import KeptStore, Shelf

import pybitmap
from pybitmap import AbortedError, BitmapError, BlockGraph, Frozen, StoreError
from pybitmap.qmp import transact

LIMIT = (1 << 12) - 1  # units of a node: the last group is cut
SIZE = LIMIT * UNIT
#: The store of each node.
NODES: dict[str, int | None] = {"a": 0, "b": 0, "c": 1, "d": None, "e": 1}
STORED = [name for name, store in NODES.items() if store is not None]
STORES = (0, 1)
#: Times that something is written before a commit, and beside it.
BEFORE, BESIDE = 4, 60
INTERRUPTS = 0.1  # of the transactions

LIBRARY = pybitmap.__path__[0]
INTERRUPTED = ("block/commit.py", "store/base.py")
#: Where lines are looked between; what only answers a question is not worth it.
TRACED = tuple(
    f"{LIBRARY}/{file}"
    for file in (
        *("block/commit.py", "block/coordinator.py", "block/device.py", "block/draft.py"),
        *("block/graph.py", "store/base.py"),
    )
)
UNTRACED = {"<genexpr>", "<lambda>", "<listcomp>", "<dictcomp>", "same", "recording", "present"}
UNTRACED |= {"state", "stored", "names", "nodes", "owed", "unique", "after"}

#: How a call of a store fails: at which step, and for a switch, is it known that it did?
FAULTS = {
    "make": ("make", True),
    "prepare": ("prepare", True),
    "switch, known": ("switch", True),
    "switch, unknown": ("switch", False),
    "switched": ("switched", False),
}


class Wrong(Exception):
    """The promise is broken."""


@dataclass
class Stale:
    """What a store may hold although the graph is otherwise.

    :param more: by node, what may be marked in it, but need not
    """

    world: World
    more: dict[str, int] = field(default_factory=dict)

    def written(self, node: str, units: int) -> Stale:
        return Stale(written(self.world, node, units), self.also({node: units}).more)

    def also(self, more: dict[str, int]) -> Stale:
        """The same, where that may be marked, too."""
        units = {node: self.more.get(node, 0) | more.get(node, 0) for node in NODES}
        return Stale(self.world, units)

    def fits(self, left: World) -> bool:
        if self.world.keys() != left.keys():
            return False
        for key, bits in self.world.items():
            found = left[key]
            may = bits.content | bits.rounded(self.more.get(key[0], 0))
            if bits.content & ~found.content or found.content & ~may:
                return False
            if replace(bits, content=0) != replace(found, content=0):
                return False
        return True


def stored(world: World, store: int) -> World:
    """What is to be found in a store."""
    return {
        key: bits.loaded
        for key, bits in world.items()
        if bits.persistent and NODES[key[0]] == store
    }


class Play:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.shelves = [Shelf() for _ in STORES]
        self.units = list(range(LIMIT))
        self.rng.shuffle(self.units)
        self.world: World = {}
        #: What each store may hold, besides what it should.
        self.stale: list[list[Stale]] = [[] for _ in STORES]
        #: Of the change that is being made: what each instant would make of it.
        self.changes: list[Callable[[World], World]] = []
        self.done: list[World] = []
        self.marks: list[tuple[str, int]] = []
        self.unknown: set[int] = set()
        self.quiet = self.within = False
        self.interrupt_in: int | None = None
        #: Where something is written; empty: on any node.
        self.touched: list[str] = []
        #: What a store may have kept although all else of the change is stored.
        self.passed_on: set[Key] = set()
        self.left, self.passed = BEFORE, set[str]()
        self.lines = 0.0
        self.log: list[str] = []
        self.looks: Counter[str] = Counter()
        self.frozen: list[tuple[Frozen, list[Key]]] = []
        self.thawing: list[Key] = []
        self.open()

    def open(self) -> None:
        self.stores = [KeptStore(shelf) for shelf in self.shelves]
        self.graph = BlockGraph()
        for name, store in NODES.items():
            self.graph.add_node(name, SIZE, None if store is None else self.stores[store])

    # ---- writes -------------------------------------------------------------------------------

    def mark(self) -> None:
        """One write, or several that follow one another."""
        if self.left <= 0 or len(self.units) < 8:
            return
        self.left -= 1
        for _ in range(self.rng.choice([1, 1, 2, 3])):
            node, unit = self.rng.choice(self.touched or list(NODES)), self.units.pop()
            self.graph.nodes[node].mark_dirty(unit * UNIT, UNIT)
            self.note(node, 1 << unit)

    def note(self, node: str, units: int) -> None:
        self.marks.append((node, units))
        self.world = written(self.world, node, units)
        self.stale = [[each.written(node, units) for each in found] for found in self.stale]
        self.done = [written(world, node, units) for world in self.done]
        self.done += [change(self.world) for change in self.changes]

    # ---- looks --------------------------------------------------------------------------------

    def look(self, where: str) -> None:
        """At what bitmaps show, and at what a kill would leave now."""
        self.looks["looks"] += 1
        memory = None if self.quiet else self.look_at_bitmaps(where)
        instants = set(range(len(self.done))) if memory is None else memory
        for store in STORES:
            found = self.look_at_store(store, where)
            if found is not None:
                instants &= found
                if not instants:
                    raise Wrong(f"{where}: no one instant for all, with store {store}")

    def look_at_bitmaps(self, where: str) -> set[int] | None:
        """At which instants this may have been done; None: it may be that it is not."""
        found = world_of(self.graph)
        wrong = self.undone(found)
        if wrong is None:
            return None
        told = [contents_difference(world, found) for world in self.done]
        instants = {i for i, each in enumerate(told) if each is None}
        if instants:
            self.looks["done in memory"] += 1
            return instants
        nearest = min((each or "" for each in told), key=len, default="")
        raise Wrong(f"{where}: not as before: {wrong}; nor as after: {nearest}")

    def undone(self, found: World) -> str | None:
        """What differs from before, apart from flags, and from what is being added or thawed."""
        for key, bits in self.world.items():
            if key not in found:
                return f"{key} is missing"
            wrong = bits_difference(key, bits, found[key])
            if wrong and not (key in self.thawing and self.is_thawing(bits, found[key])):
                return wrong
        return None

    def is_thawing(self, before: Bits, found: Bits) -> bool:
        """Before, after, or somewhere between."""
        if found.successor is not None:
            return False
        if found.content == before.successor:
            return True
        return not (before.content & ~found.content or found.content & ~before.union)

    def look_at_store(self, store: int, where: str) -> set[int] | None:
        left = self.stores[store].left()
        wrong = difference(stored(self.world, store), left)
        if wrong is None:
            return None
        if any(each.fits(left) for each in self.stale[store]):
            self.looks["stale"] += 1
            return None
        if store in self.unknown:  # what was written since may be there, too, but need not
            began = self.began()
            between = (each for world in self.done for each in self.between(world, store))
            if any(each.also(began).fits(left) for each in between):
                return None
        instants = {
            i
            for i, world in enumerate(self.done)
            if any(each.fits(left) for each in self.between(world, store))
        }
        if not instants:
            nearest = min(
                (difference(stored(w, store), left) or "" for w in self.done), key=len, default=""
            )
            others = [difference(each.world, left) for each in self.stale[store]]
            raise Wrong(
                f"{where}: a kill would leave in store {store}: not as before: {wrong}; "
                f"nor as after: {nearest}; nor as it may be: {others}"
            )
        self.looks["done in a store"] += 1
        return instants

    # ---- events -------------------------------------------------------------------------------

    def event(self, where: str) -> None:
        if self.within:  # looking goes through the library, too
            return
        self.within = True
        try:
            if not self.quiet and self.rng.random() < (0.6 if self.lines < 0.2 else 0.2):
                self.mark()
            self.look(where)
        finally:
            self.within = False

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        traced = code.co_filename.startswith(TRACED) and code.co_name not in UNTRACED
        return self.trace_line if traced else None

    def trace_line(self, frame: FrameType, event: str, arg: object) -> Any:
        if not self.within:
            file = frame.f_code.co_filename[len(LIBRARY) + 1 :]
            where = f"{file}:{frame.f_lineno}, {frame.f_code.co_name}"
            # What is gone through again and again, once is enough, or nearly.
            rate = self.lines * (0.1 if where in self.passed else 1)
            self.passed.add(where)
            if self.rng.random() < rate:
                self.event(where)
            if self.done and self.interrupt_in is not None and file in INTERRUPTED:
                self.interrupt_in -= 1
                if self.interrupt_in == 0:
                    self.log.append(f"  interrupted at {where}")
                    raise KeyboardInterrupt
        return self.trace_line

    def arm(self) -> str:
        """Some call of a store fails, or none."""
        kind = self.rng.choice([*FAULTS, *[None] * 4])
        left = self.rng.choice([0, 0, 1, 1, 2, 3, 4])
        how_long = self.rng.choice([1, 1, 1, 2, 99])
        for number, store in enumerate(self.stores):

            def fault(step: str, number: int = number) -> None:
                nonlocal left, how_long
                self.event(f"store {number}: {step}")
                if kind is None or step != FAULTS[kind][0]:
                    return
                left -= 1
                if left < 0 and how_long:
                    how_long -= 1
                    if not FAULTS[kind][1]:
                        self.unknown.add(number)
                    self.looks[f"fault {kind}"] += 1
                    raise StoreError(f"store {number}: {kind}", errno.EIO)

            store.fault = fault
            store.unsure = kind is not None and not FAULTS[kind][1]
        return "no fault" if kind is None else f"{kind} fails, the {left + 1}th, {how_long} times"

    def mend(self) -> None:
        for store in self.stores:
            store.mend()

    def watched(self, run: Callable[[], object], quiet: bool = False) -> StoreError | None:
        """With events between lines."""
        self.quiet = quiet
        self.marks, self.unknown = [], set()
        self.lines = self.rng.choice([0, 0.03, 0.1, 0.3, 1])
        self.interrupted = False
        self.left = BEFORE
        try:
            sys.settrace(self.trace)
            try:
                run()
            finally:
                sys.settrace(None)
                self.mend()
                self.quiet = False
        except StoreError as error:
            return error
        except KeyboardInterrupt:
            self.interrupted = True
        return None

    # ---- changes ------------------------------------------------------------------------------

    def transaction(self) -> None:
        drafter = Drafter(self.rng, self.world, NODES, STORED)
        actions = drafter.draft()
        how = self.rng.choice(["commit"] * 5 + ["abort", "flush within", "qmp", "qmp abort"])
        position = self.rng.randrange(len(actions) + 1)
        if how in ("abort", "qmp abort"):
            actions = [*actions[:position], ("abort",), *actions[position:]]
        armed = self.arm()
        self.log.append(f"{how} {position}: {actions}; {armed}")
        nodes = {action[1] for action in actions if len(action) > 1}
        self.touched = sorted(nodes) if self.rng.random() < 0.7 else []
        self.passed_on = passed_on(actions, NODES)
        if "abort" not in how and self.rng.random() < INTERRUPTS:
            self.interrupt_in = self.rng.randrange(1, 250)
        self.attempt(lambda: self.run(actions, how, position), how)
        self.interrupt_in, self.touched, self.passed_on = None, [], set()

    def run(self, actions: list[Action], how: str, position: int) -> None:
        changes = [] if "abort" in how else [partial(self.after, actions)]
        if how.startswith("qmp"):
            self.begin(*changes)  # the commit begins somewhere in there
            with suppress(AbortedError):
                transact(self.graph, [qmp(action) for action in actions])
            return
        with suppress(AbortedError), self.graph.transaction() as tx:
            for i, action in enumerate(actions):
                if how == "flush within" and i == position:
                    self.graph.flush()
                do(tx, action)
                self.event("within")
            self.event("at the end")
            self.begin(*changes)

    def after(self, actions: list[Action], world: World) -> World:
        return perform(world, actions, LIMIT)

    def begin(self, *changes: Callable[[World], World]) -> None:
        """T may be from now on, and one of these is what is done then."""
        self.passed = set()
        self.left = BESIDE
        self.changes = list(changes)
        self.done = [change(self.world) for change in changes]

    def attempt(self, run: Callable[[], object], how: str = "") -> None:
        error = self.watched(run)
        made, changes = self.done, len(self.changes)
        self.done, self.changes = [], []
        aborted = "abort" in how
        if error is None and aborted:
            return self.unchanged("aborted")
        if self.interrupted:
            self.graph.find_node(next(iter(self.graph.nodes)))  # brings it to its end
            self.looks["interrupted"] += 1
            self.unknown = set(STORES)
            if difference(self.world, world_of(self.graph)):
                error = StoreError("interrupted: done, but not stored everywhere")
            else:
                error = StoreError("interrupted")
        began = dict.fromkeys(NODES, 0)
        for node, units in self.marks:
            began[node] |= units
        done_all_the_same = error is not None and (
            "done, but not stored everywhere" in str(error) or how in ("close", "done")
        )
        if error is not None:
            self.log.append(f"  -> {error}")
        if error is not None and not done_all_the_same:
            self.looks["failed"] += 1
            for store in self.unknown:
                between = [each for world in made for each in self.between(world, store)]
                self.put_stale(store, between, began)
            self.adopt(made)
            return self.unchanged("failed")
        found = world_of(self.graph)
        made = made[:: changes or 1] if error is None else made[changes - 1 :: changes]
        before, candidates = self.world, [world for world in made if world == found]
        if not candidates:
            told = [difference(world, found) or "" for world in made]
            raise Wrong(f"after it: {min(told, key=len, default='')}")
        self.world = candidates[0]
        self.looks["done"] += 1
        for store in STORES:
            old, new = stored(before, store), stored(self.world, store)
            exactly = difference(new, self.stores[store].left())
            if done_all_the_same:
                between = self.between(self.world, store, before)
                self.put_stale(store, [Stale(old), *between], began)
            elif exactly is not None and (old != new or not self.stale[store]):
                raise Wrong(f"after it, in store {store}: {exactly}")
            elif exactly is None and old != new:
                self.stale[store] = []
        self.looks["not everywhere"] += done_all_the_same
        self.look("after it")

    def between(self, world: World, store: int, before: World | None = None) -> list[Stale]:
        """What a store may hold in the midst of a change that ends in ``world``, or after it.

        One that gains bitmaps or content, and loses some, is changed twice, beside others: it has
        then what it has not lost yet, by this change or by one that it was not told of."""
        old = stored(self.world if before is None else before, store)
        cleared = {key: bits for key, bits in old.items() if key in self.passed_on}
        found = [Stale(stored(world, store))]
        for there in (Stale(old), *self.stale[store]):
            removed = {key: bits for key, bits in there.world.items() if key not in world}
            if removed or there.world is old:
                for changed in ({}, cleared):
                    worlds = {**removed, **world, **changed}
                    found.append(Stale(stored(worlds, store), there.more))
        return found

    def put_stale(self, store: int, found: Iterable[Stale], more: dict[str, int]) -> None:
        for each in found:
            stale = each.also(more)
            if stale not in self.stale[store]:
                self.stale[store].append(stale)

    def adopt(self, made: list[World]) -> None:
        """A store may name a bitmap as recording that the change would have enabled, and failed.

        Then its content has the writes from there on, although it does not record. Let it have
        those of this change; then the store is told."""
        if not self.unknown:
            return
        found = world_of(self.graph)
        for key in list(self.world):
            bits = self.world[key]
            if bits.enabled or not any(key in world and world[key].enabled for world in made):
                continue
            began = bits.rounded(self.began()[key[0]])
            more = found[key].content & began
            if more:
                self.looks["marked although disabled"] += 1
                self.world = {**self.world, key: replace(bits, content=bits.content | more)}
            self.graph.flush()
            self.stale = [[] for _ in STORES]

    def began(self) -> dict[str, int]:
        """What was written beside the change, by node."""
        began = dict.fromkeys(NODES, 0)
        for node, units in self.marks:
            began[node] |= units
        return began

    def unchanged(self, what: str) -> None:
        wrong = difference(self.world, world_of(self.graph))
        if wrong:
            raise Wrong(f"{what}: {wrong}")
        self.look(what)

    def freeze(self) -> None:
        free = [key for key, bits in self.world.items() if bits.successor is None]
        if self.frozen and self.rng.random() < 0.7:
            return self.thaw()
        if not free:
            return
        keys = self.rng.sample(sorted(free), min(len(free), self.rng.choice([1, 1, 2, 3])))
        self.log.append(f"freeze {keys}; {self.arm()}")

        def change(world: World) -> World:
            return {k: replace(b, successor=0) if k in keys else b for k, b in world.items()}

        def run() -> None:
            self.begin(change)
            frozen = self.graph.freeze([self.graph.nodes[k[0]].bitmaps[k[1]] for k in keys])
            self.frozen.append((frozen, keys))

        self.attempt(run)

    def thaw(self) -> None:
        """What is frozen comes to its end."""
        frozen, keys = self.frozen[self.rng.randrange(len(self.frozen))]
        kind = self.rng.choice(["done", "close"])
        stores = {NODES[key[0]] if self.world[key].persistent else None for key in keys}
        if len(stores) > 1 and kind == "done":
            kind = "close"  # store by store
        self.log.append(f"{kind} {keys}; {self.arm()}")

        def thawed(world: World, kind: str) -> World:
            after = dict(world)
            for key in keys:
                bits = world[key]
                content = bits.union if kind == "close" else bits.successor or 0
                after[key] = replace(bits, content=content, successor=None)
            return after

        def run() -> None:
            # What cannot be done is put back.
            kinds = [kind] if kind == "close" else [kind, "close"]
            self.begin(*(partial(thawed, kind=each) for each in kinds))
            getattr(frozen, kind)()

        self.thawing = keys
        self.attempt(run, kind)
        self.thawing = []
        self.frozen.remove((frozen, keys))

    def flush(self) -> None:
        node = self.rng.choice([None, *STORED])
        self.log.append(f"flush {node or 'all'}; {self.arm()}")
        run = self.graph.flush if node is None else self.graph.nodes[node].flush
        error = self.watched(run)
        if error is not None:
            self.log.append(f"  -> {error}")
        elif node is None:
            self.stale = [[] for _ in STORES]
        self.unchanged("flush")

    def kill(self) -> None:
        """And another program opens the stores."""
        self.log.append("kill")
        for node in self.graph.nodes.values():
            node.close(discard=True)
        self.reopen()

    def close(self) -> None:
        self.log.append(f"close; {self.arm()}")
        error = self.watched(self.graph.close, quiet=True)
        if error is not None:
            self.log.append(f"  -> {error}")
            if self.rng.random() < 0.3:
                return self.kill()
            self.graph.close()
        for store in STORES:
            wrong = difference(stored(self.world, store), self.stores[store].left())
            if wrong:
                raise Wrong(f"closed, store {store}: {wrong}")
        self.reopen()

    def reopen(self) -> None:
        found: World = {}
        for store in STORES:
            left = self.stores[store].left()
            wrong = difference(stored(self.world, store), left)
            if wrong and not any(each.fits(left) for each in self.stale[store]):
                raise Wrong(f"store {store}: {wrong}")
            found.update(left)
        self.world, self.stale = found, [[] for _ in STORES]
        self.frozen = []
        self.open()
        self.unchanged("opened again")

    # ---- all of it ----------------------------------------------------------------------------

    def play(self, steps: int = 10) -> None:
        with self.graph.transaction() as tx:
            for node in NODES:
                for name in "abc":
                    drafter = Drafter(self.rng, {}, [node], STORED)
                    drafter._add(node)
                    action = list(drafter.actions[0])
                    action[2] = name
                    do(tx, tuple(action))
                    self.world = perform(self.world, [tuple(action)], LIMIT)
        for _ in range(3):
            self.mark()
        self.look("at first")
        for _ in range(steps):
            kinds = [self.transaction] * 8 + [self.freeze] * 3 + [self.flush]
            kinds += [self.kill, self.close] * (self.rng.random() < 0.5)
            self.rng.choice(kinds)()
            self.marks, self.left = [], BEFORE
            self.mark()
            self.look("between")


def bits_difference(key: Key, bits: Bits, found: Bits) -> str | None:
    """What is wrong with its contents, flags aside: those of a change may show at once."""
    if bits.successor is None or found.successor is None:
        bits, found = (replace(each, successor=None) for each in (bits, found))
    found = replace(found, enabled=bits.enabled, persistent=bits.persistent)
    return difference({key: bits}, {key: found})


def contents_difference(world: World, found: World) -> str | None:
    if world.keys() != found.keys():
        return difference(world, found)
    wrong = (bits_difference(key, bits, found[key]) for key, bits in world.items())
    return next(filter(None, wrong), None)


def play(seed: int, steps: int = 10) -> tuple[str | None, Counter[str]]:
    """What went wrong, or None; and how often what came."""
    each = Play(seed)
    try:
        each.play(steps)
    except Exception as error:
        if not isinstance(error, (Wrong, AssertionError)):
            raise
        lines = [f"seed {seed}: {type(error).__name__}: {error}", *each.log]
        return "\n    ".join(lines), each.looks
    finally:
        sys.settrace(None)
        each.mend()
        for frozen, _ in each.frozen:
            with suppress(BitmapError):
                frozen.close()
    return None, each.looks


def main(first: int, count: int = 1) -> int:
    wrong, total = 0, Counter[str]()
    for seed in range(first, first + count):
        told, looks = play(seed)
        total += looks
        if told:
            wrong += 1
            print(told, flush=True)
    print(f"{count} plays, {wrong} wrong")
    for what, times in total.most_common():
        print(f"{times:8} {what}")
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
