# SPDX-License-Identifier: MIT
"""Transactions in memory beside threads that write over several nodes: one instant for all."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from beside import NODES, Beside, often, sequences_of
from instant import UNIT, of_areas
from sequences import ROUNDS, Native, Sequence, build

from pybitmap import BlockGraph

LIMIT = (1 << 22) - 3  # units of a node: the last group is cut


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("writers")


@pytest.mark.parametrize("how", ["python", "qmp"])
@pytest.mark.parametrize("kinds", ["n", "m", "l", "h", "p", "q", "r", "nl", "hp", "nmh"])
def test_one_instant_for_all_nodes(folder: Path, kinds: str, how: str) -> None:
    for _ in range(ROUNDS):
        seed = random.randrange(2**32)
        print("seed", seed)
        with BlockGraph() as graph:
            for name in NODES:
                graph.add_node(name, LIMIT * UNIT)
            beside = Beside(graph, sequences_of(kinds, LIMIT, folder), seed)
            with often(), beside.writing():
                for _ in range(40):
                    beside.transact(how)


class Freezer:
    """Freezes a bitmap on each node, again and again, and takes what it has, or puts it back."""

    def __init__(self, graph: BlockGraph, sequences: list[Sequence], seed: int) -> None:
        self.graph = graph
        self.sequences = sequences
        self.rng = random.Random(seed)
        self.bitmaps = [graph.nodes[name].add_bitmap("guest", UNIT) for name in NODES]
        self.cuts = [0] * len(sequences)
        self.running = True
        self.rounds = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while self.running:
                self.freeze()
                self.rounds += 1
        except BaseException as error:
            self.error = error

    def freeze(self) -> None:
        acked = [sequence.acked for sequence in self.sequences]
        with self.graph.freeze(self.bitmaps) as frozen:
            begun = [sequence.begun for sequence in self.sequences]
            cuts = self.cuts_found(begun)
            for least, cut, most in zip(acked, cuts, begun):
                assert least <= cut <= most
            if self.rng.random() < 0.7:
                frozen.done()
                self.cuts = cuts

    def cuts_found(self, begun: list[int]) -> list[int]:
        found = {node: of_areas(each.areas()) for node, each in zip(NODES, self.bitmaps)}
        everything = dict.fromkeys(NODES, 0)
        cuts = []
        for i, sequence in enumerate(self.sequences):
            least, most = sequence.cut(self.cuts[i], begun[i], found)
            assert least == most
            cuts.append(least)
            for node in NODES:
                everything[node] |= sequence.between(self.cuts[i], least, node)
        assert found == everything, "taken twice, or never written"
        return cuts


@pytest.mark.parametrize("kinds", ["n", "mh", "p"])
def test_what_is_frozen_beside_transactions_is_of_one_instant(folder: Path, kinds: str) -> None:
    for _ in range(ROUNDS):
        seed = random.randrange(2**32)
        print("seed", seed)
        with BlockGraph() as graph:
            for name in NODES:
                graph.add_node(name, LIMIT * UNIT)
            sequences = sequences_of(kinds, LIMIT, folder)
            freezer = Freezer(graph, sequences, seed)
            beside = Beside(graph, sequences, seed)
            thread = threading.Thread(target=freezer.run)
            with often(), beside.writing():
                thread.start()
                for _ in range(30):
                    beside.transact()
                freezer.running = False
                thread.join()
            assert freezer.error is None, freezer.error
            assert freezer.rounds
            ends = [sequence.acked for sequence in sequences]
            assert freezer.cuts_found(ends) == ends


def test_one_instant_for_many_nodes(folder: Path) -> None:
    """The more there are, the longer it takes from the first to the last.

    On each node one bitmap records after the other, in turn.
    """
    rng = random.Random()
    names = [f"node{i}" for i in range(40)]
    limit, left = 1 << 20, 1500 * ROUNDS
    with BlockGraph() as graph:
        for name in names:
            node = graph.add_node(name, limit * UNIT)
            node.add_bitmap("even", UNIT)
            node.add_bitmap("odd", UNIT, disabled=True)
        while left > 0:
            nodes = rng.sample(names, 3)
            sequence = Native(build(folder), nodes, range(limit))
            sequence.start([graph.nodes[name] for name in nodes])
            rng.shuffle(names)
            cut, turns = 0, ["even", "odd"]
            with often():
                while not sequence.exhausted and left > 0:
                    left -= 1
                    sequence.allow(50_000)
                    with graph.transaction() as tx:
                        for name in names:
                            tx.disable(name, turns[0])
                            tx.enable(name, turns[1])
                        sequence.wait_a_little(10)
                        acked = sequence.acked
                    begun = sequence.begun
                    sequence.allow(0)
                    bitmaps = [graph.nodes[name].bitmaps[turns[0]] for name in nodes]
                    found = {n: of_areas(each.areas()) for n, each in zip(nodes, bitmaps)}
                    least, most = sequence.cut(cut, begun, found)
                    assert acked <= least == most <= begun
                    cut = most
                    turns.reverse()
            sequence.join()
            with graph.transaction() as tx:
                for name in names:
                    tx.enable(name, "even")
                    tx.disable(name, "odd")
                for name in nodes:
                    tx.clear(name, "even")
                    tx.clear(name, "odd")
