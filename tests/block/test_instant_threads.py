# SPDX-License-Identifier: MIT
"""Threads write over several nodes while transactions change their bitmaps.

What a transaction found before its instant is seen by one pair of bitmaps on each node: `taken`
gets what `daily` has, which is cleared. That has to be a beginning of each sequence of writes, one
for all nodes, between what had returned when the commit began and what had begun when it was over.
All other bitmaps, whatever else the transaction did to them, have to be what they are with the same
beginning.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from instant import UNIT, Action, Bits, Drafter, World, bits_of, do, perform, qmp, shown, written
from sequences import ROUNDS, Native, Sequence, Threaded, build

from pybitmap import AbortedError, BlockGraph, DirtyBitmap
from pybitmap.qmp import execute

NODES = ("a", "b", "c")
LIMIT = (1 << 22) - 3  # units of a node, the last group is cut
BURST = 100_000  # writes of a sequence beside one transaction


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def sequences_of(kinds: str, folder: Path) -> list[Sequence]:
    """n: one write at a time; m: several in a call; h: by two threads that hand over to each other;
    p, q: the first two by Python."""
    found: list[Sequence] = []
    share = LIMIT // len(kinds)
    for i, kind in enumerate(kinds):
        units = range(i * share, (i + 1) * share)
        if kind == "n":
            found.append(Native(build(folder), ["a", "b", "c"], units))
        elif kind == "m":
            found.append(Native(build(folder), ["c", "a"], units, 50))
        elif kind == "h":
            found.append(Native(build(folder), ["b", "a", "c"], units, 1, 2))
        elif kind == "p":
            found.append(Threaded(["c", "b", "a"], units))
        else:
            found.append(Threaded(["a", "b"], units, 7))
    return found


class Beside:
    """Transactions on a graph beside sequences of writes.

    :param storable: the nodes that can have persistent bitmaps
    """

    def __init__(
        self, graph: BlockGraph, sequences: list[Sequence], seed: int, storable: tuple[str, ...] = ()
    ) -> None:
        self.graph = graph
        self.sequences = sequences
        self.rng = random.Random(seed)
        self.storable = storable
        self.world: World = {}
        self.cuts = [0] * len(sequences)
        self.frozen: list[DirtyBitmap] = []

    def begin(self) -> None:
        for node in NODES:
            persistent = node in self.storable
            actions: list[Action] = [
                ("add", node, "daily", 512, persistent, False),
                ("add", node, "taken", 512, persistent, True),
                ("add", node, "weekly", 4096, persistent, True),
                ("add", node, "always", 65536, persistent, False),
                ("add", node, "a", 512, persistent, False),
                ("add", node, "b", 512, persistent, False),
            ]
            with self.graph.transaction() as tx:
                for action in actions:
                    do(tx, action)
            self.world = perform(self.world, actions, LIMIT)
        for sequence in self.sequences:
            sequence.start([self.graph.nodes[name] for name in sequence.nodes])

    def end(self) -> None:
        """All writes have returned: everything is known."""
        for sequence in self.sequences:
            sequence.allow(300)
            sequence.wait_idle()
            sequence.join()
        self.move_on([sequence.acked for sequence in self.sequences])
        for key, bits in self.world.items():
            assert bits_of(self.graph.nodes[key[0]].bitmaps[key[1]]) == bits, key

    def draft(self) -> list[Action]:
        """The pair of each node, and anything to the others."""
        free = {
            key: bits
            for key, bits in self.world.items()
            if key[1] not in ("daily", "taken", "weekly")
        }
        free = {key: bits for key, bits in free.items() if key[1] != "always"}
        drafter = Drafter(self.rng, free, NODES, self.storable)
        actions = drafter.draft()
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
        return actions

    def allow(self, count: int) -> None:
        for sequence in self.sequences:
            slow = 40 if isinstance(sequence, Threaded) else 1
            sequence.allow(max(count // slow, sequence.block))

    def transact(self, how: str = "python") -> None:
        actions = self.draft()
        aborts = self.rng.random() < 0.15
        if aborts:
            actions.insert(self.rng.randrange(len(actions) + 1), ("abort",))
        self.allow(self.rng.choice([0, BURST // 10]))
        if how == "qmp":
            self.allow(BURST)
            for sequence in self.sequences:
                sequence.wait_a_little(10)
            acked = [sequence.acked for sequence in self.sequences]
            arguments = {"actions": [qmp(action) for action in actions]}
            reply = execute(self.graph, {"execute": "transaction", "arguments": arguments})
            assert ("error" in reply) == aborts, reply
        else:
            with suppress(AbortedError), self.graph.transaction() as tx:
                for action in actions:
                    tx.abort() if action[0] == "abort" else do(tx, action)
                self.allow(BURST)
                for sequence in self.sequences:
                    sequence.wait_a_little(10)
                acked = [sequence.acked for sequence in self.sequences]
        begun = [sequence.begun for sequence in self.sequences]
        self.allow(0)
        if not aborts:
            self.move_on(self.cuts_found(acked, begun))
            self.world = perform(self.world, actions, LIMIT)
        self.check(actions)

    def cuts_found(self, acked: list[int], begun: list[int]) -> list[int]:
        """How far each sequence was at the instant."""
        taken = {
            node: bits_of(self.graph.nodes[node].bitmaps["taken"]).content for node in NODES
        }
        cuts = []
        everything = dict.fromkeys(NODES, 0)
        for i, sequence in enumerate(self.sequences):
            cut = sequence.cut(self.cuts[i], begun[i], taken)
            assert acked[i] <= cut <= begun[i], f"{acked[i]} <= {cut} <= {begun[i]}"
            cuts.append(cut)
            for node in NODES:
                everything[node] |= sequence.between(self.cuts[i], cut, node)
        assert taken == everything, "taken twice, or never written"
        return cuts

    def move_on(self, cuts: list[int]) -> None:
        """These writes were before."""
        for i, sequence in enumerate(self.sequences):
            for node in sequence.nodes:
                units = sequence.between(self.cuts[i], cuts[i], node)
                self.world = written(self.world, node, units)
        self.cuts = cuts

    def check(self, actions: list[Action]) -> None:
        """What records may have more, of what was written since; all else is exact."""
        for key, bits in self.world.items():
            found = bits_of(self.graph.nodes[key[0]].bitmaps[key[1]])
            begun = 0
            if bits.enabled:
                for i, sequence in enumerate(self.sequences):
                    begun |= sequence.between(self.cuts[i], sequence.begun, key[0])
            wrong = difference(bits, found, begun)
            assert wrong is None, f"{key}: {wrong}, after {actions}"


def difference(bits: Bits, found: Bits, maybe: int) -> str | None:
    most = bits.written(maybe)
    for part in ("content", "successor"):
        must, has, may = (getattr(each, part) or 0 for each in (bits, found, most))
        if must & ~has or has & ~may:
            return f"{part} lacks [{shown(must & ~has)}], has [{shown(has & ~may)}] too many"
    plain = replace(found, content=bits.content, successor=bits.successor)
    return None if plain == bits else f"{plain}"


@pytest.mark.parametrize("how", ["python", "qmp"])
@pytest.mark.parametrize("kinds", ["n", "m", "h", "p", "nm", "hp", "q"])
def test_one_instant_for_all_nodes(kinds: str, how: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    with BlockGraph() as graph:
        for name in NODES:
            graph.add_node(name, LIMIT * UNIT)
        sequences = sequences_of(kinds, tmp_path_factory.getbasetemp())
        beside = Beside(graph, sequences, seed)
        beside.begin()
        try:
            for _ in range(25 * ROUNDS):
                beside.transact(how)
            beside.end()
        finally:
            for sequence in sequences:
                sequence.join()
