# SPDX-License-Identifier: MIT
"""Transactions beside threads that write over several nodes.

What a transaction found before its instant is seen by one pair of bitmaps on each node: `weekly`
gathers what `daily` has, which is cleared. That has to be a beginning of each sequence of writes,
one for all nodes, between what had returned when the commit began and what had begun when it was
over. All other bitmaps, whatever else the transaction did to them, have to be what they are with
the same beginning.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from instant import (
    UNIT,
    Action,
    Bits,
    Drafter,
    World,
    difference,
    do,
    perform,
    qmp,
    shown,
    world_of,
    written,
)
from sequences import Native, Sequence, Threaded, build

from pybitmap import AbortedError, BlockGraph
from pybitmap.qmp import execute

NODES = ("a", "b", "c")


@contextmanager
def often() -> Iterator[None]:
    """Threads of Python take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def sequences_of(kinds: str, limit: int, folder: Path) -> list[Sequence]:
    """n: one write at a time; m: several in a call; l: a lot in a call; h: by two threads that hand
    over to each other; p, q, r: the first three by Python."""
    found: list[Sequence] = []
    share = limit // len(kinds)
    for i, kind in enumerate(kinds):
        units = range(i * share, (i + 1) * share)
        if kind == "n":
            found.append(Native(build(folder), ["a", "b", "c"], units))
        elif kind == "m":
            found.append(Native(build(folder), ["c", "a"], units, 50))
        elif kind == "l":
            found.append(Native(build(folder), ["b", "c"], units, 10_000))
        elif kind == "h":
            found.append(Native(build(folder), ["b", "a", "c"], units, 1, 2))
        elif kind == "p":
            found.append(Threaded(["c", "b", "a"], units))
        elif kind == "q":
            found.append(Threaded(["a", "b"], units, 7))
        else:
            found.append(Threaded(["b", "a"], units, 10_000))
    return found


class Beside:
    """Transactions on a graph beside sequences of writes; what they are follows from the seed.

    :param storable: the nodes that can have persistent bitmaps
    :param burst: writes of a sequence beside one transaction, if it is that fast
    """

    def __init__(
        self,
        graph: BlockGraph,
        sequences: list[Sequence],
        seed: int,
        storable: tuple[str, ...] = (),
        burst: int = 100_000,
    ) -> None:
        self.graph = graph
        self.sequences = sequences
        self.rng, self.pace = random.Random(seed), random.Random(seed)
        self.storable = storable
        self.burst = burst
        self.limit = graph.nodes["a"].size // UNIT
        self.world: World = {}
        self.cuts = [0] * len(sequences)
        self.acked = [0] * len(sequences)

    def begin(self) -> None:
        """The bitmaps that there are at first."""
        for node in NODES:
            persistent = node in self.storable
            actions: list[Action] = [
                ("add", node, "daily", 512, persistent, False),
                ("add", node, "taken", 512, persistent, True),
                ("add", node, "weekly", 512, persistent, True),
                ("add", node, "always", 65536, persistent, False),
                ("add", node, "a", 512, persistent, False),
                ("add", node, "b", 512, persistent, False),
            ]
            with self.graph.transaction() as tx:
                for action in actions:
                    do(tx, action)
            self.world = perform(self.world, actions, self.limit)

    def start(self) -> None:
        for sequence in self.sequences:
            sequence.start([self.graph.nodes[name] for name in sequence.nodes])

    @contextmanager
    def writing(self) -> Iterator[None]:
        """At the end all writes have returned, and everything is known."""
        self.begin()
        self.start()
        try:
            yield
            for sequence in self.sequences:
                sequence.allow(300)
                sequence.wait_idle()
        finally:
            for sequence in self.sequences:
                sequence.join()
        self.move_on([sequence.acked for sequence in self.sequences])
        wrong = difference(self.world, self.found())
        assert wrong is None, wrong

    # ---- a transaction ------------------------------------------------------------------------

    def draft(self) -> list[Action]:
        """The pair of each node, and anything to the others; it may end with an abort."""
        own = ("daily", "taken", "weekly", "always")
        free = {key: bits for key, bits in self.world.items() if key[1] not in own}
        actions = Drafter(self.rng, free, NODES, self.storable).draft()
        nodes = list(NODES)
        self.rng.shuffle(nodes)
        for node in nodes:
            pair = [
                ("clear", node, "taken"),
                ("merge", node, "taken", ((node, "daily"),)),
                ("merge", node, "weekly", ((node, "daily"),)),
                ("clear", node, "daily"),
            ]
            places = sorted(self.rng.randrange(len(actions) + 1) for _ in pair)
            for place, action in reversed(list(zip(places, pair))):
                actions.insert(place, action)
        if self.rng.random() < 0.15:
            actions.insert(self.rng.randrange(len(actions) + 1), ("abort",))
        return actions

    def transact(self, how: str = "python") -> None:
        self.allow(self.pace.choice([0, self.burst // 10]))
        actions = self.draft()
        self.run(actions, how)
        self.note(actions)
        self.check(actions)

    def run(self, actions: list[Action], how: str) -> None:
        if how == "qmp":
            self.hurry()
            arguments = {"actions": [qmp(action) for action in actions]}
            reply = execute(self.graph, {"execute": "transaction", "arguments": arguments})
            assert ("error" in reply) == (("abort",) in actions), reply
        else:
            with suppress(AbortedError), self.graph.transaction() as tx:
                for action in actions:
                    do(tx, action)
                self.hurry()

    def allow(self, count: int) -> None:
        for sequence in self.sequences:
            slow = 40 if isinstance(sequence, Threaded) else 1
            sequence.allow(max(count // slow, sequence.block))

    def hurry(self) -> None:
        """The commit comes now."""
        self.allow(self.burst)
        for sequence in self.sequences:
            sequence.wait_a_little(10)
        self.acked = [sequence.acked for sequence in self.sequences]

    def found(self) -> World:
        """Without the bitmaps of others."""
        found = world_of(self.graph)
        return {key: bits for key, bits in found.items() if key[1] != "guest"}

    # ---- what it was --------------------------------------------------------------------------

    def note(self, actions: list[Action]) -> None:
        """It is done: find out when."""
        begun = [sequence.begun for sequence in self.sequences]
        for sequence in self.sequences:
            sequence.allow(0)
        if ("abort",) not in actions:
            self.move_on(self.cuts_found(self.found(), begun))
            self.world = perform(self.world, actions, self.limit)

    def cuts_found(self, found: World, begun: list[int], most: bool = False) -> list[int]:
        """How far each sequence was at the instant, by what was gathered; of some nodes at least.

        :param most: as far as that may be; it is the same if all nodes are there
        """
        weekly = {key[0]: bits.content for key, bits in found.items() if key[1] == "weekly"}
        everything = dict.fromkeys(weekly, 0)
        cuts = []
        for i, sequence in enumerate(self.sequences):
            least, end = sequence.cut(0, begun[i], weekly)
            first = max(self.cuts[i], self.acked[i])
            assert end >= first, f"{end} writes, but {first} had returned before"
            cuts.append(end if most else max(least, first))
            for node in weekly:
                everything[node] |= sequence.between(0, cuts[i], node)
        assert weekly == everything, "never written"
        return cuts

    def move_on(self, cuts: list[int]) -> None:
        """These writes were before."""
        for i, sequence in enumerate(self.sequences):
            for node in sequence.nodes:
                units = sequence.between(self.cuts[i], cuts[i], node)
                self.world = written(self.world, node, units)
        self.cuts = cuts

    def check(self, actions: list[Action]) -> None:
        wrong = self.wrong(self.found())
        assert wrong is None, f"{wrong}, after {actions}"

    def wrong(
        self, found: World, acked: list[int] | None = None, most: World | None = None
    ) -> str | None:
        """What is wrong with it, or None. All that is before is there; of what came after, what
        records has what had returned, and may have what had begun; all else is exact.

        :param acked: how many had; None: nothing is known
        :param most: what may have been before; None: it is known
        """
        if found.keys() - self.world.keys():
            return f"there is {sorted(found.keys() - self.world.keys())}"
        for key in found:
            must = may = 0
            for i, sequence in enumerate(self.sequences):
                may |= sequence.between(self.cuts[i], sequence.begun, key[0])
                if acked is not None:
                    must |= sequence.between(self.cuts[i], max(acked[i], self.cuts[i]), key[0])
            least = self.world[key].written(must)
            wrong = bits_wrong(least, (most or self.world)[key].written(may), found[key])
            if wrong:
                return f"{key}: {wrong}"
        return None


def bits_wrong(least: Bits, most: Bits, found: Bits) -> str | None:
    for part in ("content", "successor"):
        must, may, has = (getattr(each, part) or 0 for each in (least, most, found))
        if must & ~has or has & ~may:
            return f"{part} lacks [{shown(must & ~has)}], has [{shown(has & ~may)}] too many"
    plain = replace(found, content=least.content, successor=least.successor)
    return None if plain == least else f"{plain}"
