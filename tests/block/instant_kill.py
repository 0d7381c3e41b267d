# SPDX-License-Identifier: MIT
"""Kills a process in the midst of transactions on LocalStores, and looks at what is left.

    python instant_kill.py LIBRARY DIRECTORY SETTING ROUNDS SEED

Each round forks a child in which threads in C write (LIBRARY, see sequences.py), and say in shared
memory how far they are, while it makes the transactions of beside.py, and says of each when it
begins, how many writes had returned by then, and what its instant was. The child is killed
(SIGKILL) at any time. Then each store has the transaction that was under way or has it not, and in
either case every write that had returned is where that puts it, and nothing is where it is not.
SETTING is "one" store for all nodes, or "two".

Prints how often a kill fell where; fails with an AssertionError.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from beside import NODES, Beside
from instant import UNIT, Action, World, passed_on, perform, world_of
from sequences import CELLS, Native, Sequence, cells, load

from pybitmap import BlockGraph
from pybitmap.store import LocalStore

LIMIT = (1 << 18) - 3  # units of a node
BURST = 6000

#: The store of each node; those of the last are not stored.
SETTINGS = {"one": {"a": 0, "b": 0, "c": 0}, "two": {"a": 0, "b": 1, "c": 0}}

MAX_STEPS = 200
#: Cells of 8 bytes: is it ready; how many steps were begun, have ended; then of each step, for each
#: sequence, how many writes had returned when its commit began; and its instant.
READY, BEGUN, ENDED, FIRST = range(4)


@dataclass
class Setting:
    path: Path
    stores: dict[str, int]
    sequences: list[Sequence]
    seed: int
    steps: memoryview

    def cell(self, step: int, sequence: int, cut: bool) -> int:
        return FIRST + (step * len(self.sequences) + sequence) * 2 + cut

    def open(self) -> BlockGraph:
        """As a program that starts."""
        stores = {n: LocalStore(self.path / str(n)) for n in set(self.stores.values())}
        graph = BlockGraph()
        for name in NODES:
            graph.add_node(name, LIMIT * UNIT, stores[self.stores[name]])
        return graph

    def beside(self, graph: BlockGraph) -> Beside:
        return Beside(graph, self.sequences, self.seed, NODES, BURST)


class Child(Beside):
    """Says what it does."""

    setting: Setting
    step = 0

    def hurry(self) -> None:
        super().hurry()
        for i, acked in enumerate(self.acked):
            self.setting.steps[self.setting.cell(self.step, i, False)] = acked
        self.setting.steps[BEGUN] = self.step + 1

    def live(self) -> None:
        steps = self.setting.steps
        self.begin()
        self.start()
        steps[READY] = 1
        for self.step in range(MAX_STEPS):
            if any(sequence.exhausted for sequence in self.sequences):
                break
            actions = self.draft()
            self.run(actions, "python")
            self.note(actions)
            for i, cut in enumerate(self.cuts):
                steps[self.setting.cell(self.step, i, True)] = cut
            steps[BEGUN] = self.step + 1
            steps[ENDED] = self.step + 1
        time.sleep(3600)


def child(setting: Setting) -> None:
    """Until it is killed."""
    life = Child(setting.open(), setting.sequences, setting.seed, NODES, BURST)
    life.setting = setting
    life.live()


def known(setting: Setting) -> tuple[Beside, list[Action]]:
    """What it was before the transaction that was under way, and that."""
    graph = BlockGraph()
    for name in NODES:
        graph.add_node(name, LIMIT * UNIT)
    beside = setting.beside(graph)
    beside.storable = ()
    beside.begin()
    beside.storable = NODES
    beside.world = {
        key: type(bits)(bits.granularity, bits.limit, bits.enabled, True)
        for key, bits in beside.world.items()
    }
    steps = setting.steps
    for step in range(steps[ENDED]):
        actions = beside.draft()
        cuts = [steps[setting.cell(step, i, True)] for i in range(len(setting.sequences))]
        beside.move_on(cuts)
        if ("abort",) not in actions:
            beside.world = perform(beside.world, actions, beside.limit)
    return beside, beside.draft() if steps[BEGUN] > steps[ENDED] else []


def look(setting: Setting) -> str:
    """What is left; says where the kill fell."""
    beside, actions = known(setting)
    acked = [sequence.acked for sequence in setting.sequences]
    graph = setting.open()
    found: dict[int, World] = {}
    for key, bits in world_of(graph).items():
        assert graph.nodes[key[0]].bitmaps[key[1]].reason is None, key
        found.setdefault(setting.stores[key[0]], {})[key] = bits
    if random.random() < 0.5:
        graph.close()
    for node in graph.nodes.values():
        node.close(discard=True)

    def of_store(world: World, store: int) -> World:
        return {
            key: bits.loaded
            for key, bits in world.items()
            if bits.persistent and setting.stores[key[0]] == store
        }

    def wrong(
        world: World, cuts: list[int], part: World, store: int, most: World | None = None
    ) -> str | None:
        """With a part of what was found."""
        beside.world, beside.cuts = of_store(world, store), cuts
        if beside.world.keys() ^ part.keys():
            return f"there are {sorted(part)}, not {sorted(beside.world)}"
        return beside.wrong(part, acked, most and of_store(most, store))

    world, cuts = beside.world, beside.cuts
    undone = {store: wrong(world, cuts, each, store) for store, each in found.items()}
    if not any(undone.values()):
        return "not yet" if actions else "between"
    assert actions, f"nothing was under way, but {undone}"
    assert ("abort",) not in actions, f"an abort was under way, but {undone}"
    # Some have it: at one instant.
    beside.acked = [
        setting.steps[setting.cell(setting.steps[ENDED], i, False)]
        for i in range(len(setting.sequences))
    ]
    having = {k: b for s, each in found.items() if undone[s] for k, b in each.items()}
    begun = [sequence.begun for sequence in setting.sequences]
    done: list[tuple[World, list[int]]] = []
    for most in (False, True):  # where not all nodes are there, it is not quite known
        beside.world, beside.cuts = world, cuts
        try:
            then = beside.cuts_found(having, begun, most)
        except AssertionError as error:
            raise AssertionError(f"not yet: {undone}; done: {error}; {actions}") from None
        beside.move_on(then)
        done.append((perform(beside.world, actions, beside.limit), then))
    (least, then), (most_of_all, _) = done
    twice = False
    for store, each in found.items():
        if undone[store] is None:
            continue
        # A store that gains bitmaps or content, and loses some, beside others, is changed twice.
        told: list[str | None] = []
        for cleared in (set(), passed_on(actions, setting.stores)):
            lost = {
                k: b for k, b in each.items() if (k in world and k not in least) or k in cleared
            }
            had = {key: world[key] for key in lost}
            rest = {key: bits for key, bits in each.items() if key not in lost}
            now = {key: bits for key, bits in least.items() if key not in lost}
            told.append(wrong(had, cuts, lost, store) or wrong(now, then, rest, store, most_of_all))
            if told[-1] is None:
                twice = twice or bool(lost)
                break
        assert None in told, f"not yet: {undone[store]}; done: {told}; {actions}"
    if twice:
        return "done, but for what one of two stores is to lose"
    return "done" if all(undone.values()) else "done in one of two stores"


def main(library: str, directory: Path, name: str, rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    native = load(Path(library))
    where: Counter[str] = Counter()
    writes = transactions = 0
    size = 8 * (FIRST + 4 * MAX_STEPS)
    steps = memoryview(mmap.mmap(-1, size)).cast("Q")
    memory = [mmap.mmap(-1, 8 * CELLS) for _ in range(2)]
    for number in range(rounds):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        steps[:] = memoryview(bytes(size)).cast("Q")
        kinds: list[tuple[list[str], int, int]] = rng.choice(
            [
                [(["a", "b", "c"], 1, 1)],
                [(["c", "b", "a"], 7, 1)],
                [(["b", "a"], 1, 2)],
                [(["a", "b"], 1, 1), (["c", "a"], 30, 1)],
            ]
        )
        sequences: list[Sequence] = []
        for i, (nodes, block, threads) in enumerate(kinds):
            share = LIMIT // len(kinds)
            memory[i][:] = bytes(8 * CELLS)
            units = range(i * share, (i + 1) * share)
            sequences.append(Native(native, nodes, units, block, threads, cells(memory[i])))
        setting = Setting(directory, SETTINGS[name], sequences, rng.randrange(2**32), steps)
        pid = os.fork()
        if pid == 0:
            try:
                child(setting)
            finally:
                os._exit(1)
        while not steps[READY]:
            time.sleep(0.001)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), f"round {number}: it ended"
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"round {number}: the child ended by itself"
        try:
            where[look(setting)] += 1
        except AssertionError as error:
            raise AssertionError(f"round {number} of seed {seed}: {error}") from None
        writes += sum(sequence.acked for sequence in sequences)
        transactions += steps[ENDED]
    print(f"{rounds} kills, {transactions} transactions, {writes} writes")
    for what, times in where.most_common():
        print(f"{times:6} {what}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
