# SPDX-License-Identifier: MIT
"""Kills a process that uses stores, again and again, and looks at what is left.

    python store_kill.py local|qcow2 DIRECTORY ROUNDS SEED

Each round forks a child that opens two nodes, of one LocalStore or of two images. One of its
threads writes, another changes bitmaps by a script that follows from the seed; both say in shared
memory what they begin and what has returned. The child is killed (SIGKILL) at any time, often right
at creation. Then the stores must open, and each bitmap must hold every write that had returned and
nothing that was never begun, where the change that was under way is there as a whole or not at all
(in each of two images). In a LocalStore none may be inconsistent. Those of images that were open
are, and are repaired for the next round; the images are sound for qemu-img. Prints how often a kill
fell where; fails with an AssertionError.

A process of its own, since it forks, which a process with threads had better not.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from images import FINE, LEAKS, check
from stores import LocalPlace, Place, Qcow2Place

from pybitmap import AbortedError, BlockGraph, BlockNode, DirtyBitmap, Frozen
from pybitmap.store import Store

GROUP = 512
NGROUPS = 65536  # two pages of words
NODES = ("one", "two")
NAMES = ("a", "b", "c")

MAX_WRITES, MAX_OPERATIONS = 200_000, 1000

# Cells of 8 bytes in the shared memory.
STARTED, ACKED, BEGUN, ENDED = range(4)
BEGIN_AT = 4
END_AT = BEGIN_AT + MAX_OPERATIONS
ACKED_AT = END_AT + MAX_OPERATIONS
WRITES_AT = ACKED_AT + MAX_OPERATIONS
CELLS = WRITES_AT + MAX_WRITES

Key = tuple[str, str]  # node, bitmap
Operation = tuple[str, ...]


@dataclass
class Bits:
    """What is known of a bitmap: groups that are surely dirty, and all that may be."""

    must: frozenset[int] = frozenset()
    may: frozenset[int] = frozenset()
    enabled: bool = True
    #: Of the successor, if it is frozen; the writes go there.
    successor: Bits | None = None

    def written(self, beside: Beside) -> Bits:
        if self.successor is not None:
            return replace(self, successor=self.successor.written(beside))
        if not self.enabled:
            return self
        return replace(self, must=self.must | beside.sure, may=self.may | beside.all)

    def union(self) -> Bits:
        if self.successor is None:
            return self
        return Bits(
            self.must | self.successor.must,
            self.may | self.successor.may,
            self.successor.enabled,
        )


State = dict[Key, Bits]


class Script:
    """Operations that follow from a seed and from which bitmaps there are."""

    def __init__(self, seed: int, state: State) -> None:
        self.rng = random.Random(seed)
        self.busy = dict.fromkeys(state, False)  # of each bitmap that is there
        self.step = 0

    def next(self) -> list[Operation]:
        """The actions of one step; several, and those that end with an abort, in a transaction."""
        self.step += 1
        if self.step % 20 == 0:
            self.busy = dict.fromkeys(self.busy, False)
            return [("reopen",)]
        chance = self.rng.random()
        frozen = [key for key, busy in self.busy.items() if busy]
        if frozen and chance < 0.4:
            key = self.rng.choice(frozen)
            self.busy[key] = False
            return [(self.rng.choice(["done", "thaw"]), *key)]
        if self._free() and chance > 0.8:
            key = self.rng.choice(self._free())
            self.busy[key] = True
            return [("freeze", *key)]
        if chance > 0.75:
            return [("flush",)]
        before = dict(self.busy)
        actions = [self._action() for _ in range(self.rng.choice([1, 1, 2, 3, 4]))]
        if self.rng.random() < 0.2:
            actions.append(("abort",))
            self.busy = before
        for action in actions:
            if action[0] == "remove" and actions[-1] != ("abort",):
                del self.busy[action[1], action[2]]
        return actions

    def _free(self) -> list[Key]:
        return [key for key, busy in self.busy.items() if not busy]

    def _action(self) -> Operation:
        missing = [(n, b) for n in NODES for b in NAMES if (n, b) not in self.busy]
        free = self._free()
        kinds = ["add"] * bool(missing)
        if free:
            kinds += ["clear", "enable", "disable", "merge", "remove"]
        if not kinds:
            return ("nothing",)
        kind = self.rng.choice(kinds)
        if kind == "add":
            key = self.rng.choice(missing)
            self.busy[key] = False
            return (kind, *key)
        key = self.rng.choice(free)
        if kind == "merge":
            return (kind, *key, *self.rng.choice(free))
        if kind == "remove":
            self.busy[key] = True  # until the transaction ends
        return (kind, *key)


@dataclass(frozen=True)
class Beside:
    """The groups written while something else was done: certainly, and maybe."""

    sure: frozenset[int]
    maybe: frozenset[int]

    @property
    def all(self) -> frozenset[int]:
        return self.sure | self.maybe


def apply(actions: list[Operation], state: State, beside: dict[str, Beside]) -> State:
    """The state after one step, and after the writes that were under way beside it."""
    if actions[-1] == ("abort",):
        actions = []
    after, changed = dict(state), set()
    for kind, *args in actions:
        if kind == "reopen":
            after = {key: bits.union() for key, bits in after.items()}
        if not args:
            continue
        key = (args[0], args[1])
        changed.add(key)
        maybe = beside[key[0]].all
        if kind == "add":
            after[key] = Bits(may=maybe)
            continue
        bits = after.pop(key) if kind == "remove" else after[key]
        if kind == "clear":
            after[key] = replace(bits, must=frozenset(), may=maybe)
        elif kind == "merge":
            source = after[args[2], args[3]]
            may = bits.may | maybe | source.may | beside[args[2]].all
            after[key] = replace(bits, must=bits.must | source.must, may=may)
        elif kind in ("enable", "disable"):
            after[key] = replace(bits, may=bits.may | maybe, enabled=kind == "enable")
        elif kind == "freeze":
            successor = Bits(may=maybe, enabled=bits.enabled)
            after[key] = replace(bits, may=bits.may | maybe, enabled=False, successor=successor)
        elif kind in ("done", "thaw"):
            assert bits.successor is not None
            bits = bits.written(beside[key[0]])
            after[key] = bits.union() if kind == "thaw" or not bits.successor else bits.successor
    for key, bits in after.items():
        if key not in changed:
            after[key] = bits.written(beside[key[0]])
    return after


# ---- the child ------------------------------------------------------------------------------


def stores(place: Place) -> dict[str, Store]:
    """Of each node."""
    if place.shared:
        return dict.fromkeys(NODES, place.store())
    return {name: place.store(medium) for medium, name in enumerate(NODES)}


def child(cells: memoryview, place: Place, seed: int, state: State) -> None:
    """Until it is killed."""
    sys.setswitchinterval(1e-4)
    script, rng = Script(seed, state), random.Random(seed)
    frozen: dict[Key, Frozen] = {}
    for step in range(MAX_OPERATIONS):
        if step % 20 == 0:
            graph = BlockGraph()
            nodes = [
                graph.add_node(name, place.size, store) for name, store in stores(place).items()
            ]
            running = threading.Event()
            running.set()
            writer = threading.Thread(target=write, args=(cells, nodes, running, rng), daemon=True)
            writer.start()
        actions = script.next()
        cells[BEGIN_AT + step] = cells[ACKED]
        cells[BEGUN] = step + 1
        if actions == [("reopen",)]:
            running.clear()
            writer.join()
            graph.close()
            frozen.clear()
        else:
            perform(graph, actions, frozen)
        cells[ACKED_AT + step] = cells[ACKED]
        cells[END_AT + step] = cells[STARTED]
        cells[ENDED] = step + 1
    time.sleep(3600)


def write(
    cells: memoryview, nodes: list[BlockNode], running: threading.Event, rng: random.Random
) -> None:
    for i in range(cells[STARTED], MAX_WRITES):
        if not running.is_set():
            break
        group = rng.randrange(NGROUPS)
        cells[WRITES_AT + i] = group
        cells[STARTED] = i + 1
        nodes[i % 2].mark_dirty(group * GROUP, 1)
        cells[ACKED] = i + 1


def perform(graph: BlockGraph, actions: list[Operation], frozen: dict[Key, Frozen]) -> None:
    [(kind, *args)] = actions[:1]
    if kind == "flush":
        graph.flush()
    elif kind == "freeze":
        frozen[args[0], args[1]] = graph.nodes[args[0]].bitmaps[args[1]].freeze()
    elif kind in ("done", "thaw"):
        ended = frozen.pop((args[0], args[1]))
        if kind == "done":
            ended.done()
        ended.close()
    elif len(actions) == 1 and kind == "add":
        graph.nodes[args[0]].add_bitmap(args[1], GROUP, persistent=True)
    elif len(actions) == 1 and kind == "remove":
        graph.nodes[args[0]].remove_bitmap(args[1])
    else:
        with suppress(AbortedError), graph.transaction() as tx:
            for kind, *args in actions:
                if kind == "add":
                    tx.add(args[0], args[1], GROUP, persistent=True)
                elif kind == "merge":
                    tx.merge(args[0], args[1], [(args[2], args[3])])
                elif kind != "nothing":
                    getattr(tx, kind)(*args)


# ---- what is left ---------------------------------------------------------------------------


def possible(cells: memoryview, seed: int, state: State) -> list[tuple[str, State]]:
    """What the store may hold, each with a word on how that comes."""
    started, acked, begun, ended = cells[:4]
    script = Script(seed, state)

    def written(first: int, end: int, sure: int) -> dict[str, Beside]:
        """What writes have marked, by node. Those below `sure` had returned; one that was under way
        when a step ended may have marked before that or after."""
        groups: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in NODES}
        for i in range(first, end):
            groups[NODES[i % 2]][not done <= i < sure].append(cells[WRITES_AT + i])
        return {name: Beside(frozenset(a), frozenset(b)) for name, (a, b) in groups.items()}

    def after_writes(end: int, sure: int) -> State:
        beside = written(done, end, sure)
        return {key: bits.written(beside[key[0]]) for key, bits in state.items()}

    done = 0
    for step in range(begun):
        actions = script.next()
        begin = cells[BEGIN_AT + step]
        before = after_writes(begin, begin)
        if step == ended:
            what = "+".join(action[0] for action in actions)
            return [
                (f"{what}: not yet", after_writes(started, acked)),
                (f"{what}: done", apply(actions, before, written(begin, started, acked))),
            ]
        end = cells[END_AT + step]
        state = apply(actions, before, written(begin, end, cells[ACKED_AT + step]))
        done = end
    return [("between", after_writes(started, acked))]


def difference(expected: State, found: dict[Key, Bits | None]) -> str | None:
    """What is wrong with what was found, or None.

    :param found: None: it was inconsistent
    """
    if set(expected) != set(found):
        return f"there are {sorted(found)}, not {sorted(expected)}"
    for key, bits in expected.items():
        bits, there = bits.union(), found[key]
        if there is None:
            continue
        if bits.enabled != there.enabled:
            return f"{key}: enabled is {not bits.enabled}"
        if bits.must - there.must:
            return f"{key}: lost {sorted(bits.must - there.must)[:10]}"
        if there.must - bits.may:
            return f"{key}: has got {sorted(there.must - bits.may)[:10]}"
    return None


def between(answers: list[tuple[str, State]]) -> list[tuple[str, State]]:
    """And what a store may have that gains and loses bitmaps in a change of several stores: all of
    both, so that a bitmap that moves is never in none. It is switched twice."""
    if len(answers) < 2:
        return answers
    (word, before), (_, after) = answers
    return [*answers, (word.replace("not yet", "half"), {**before, **after})]


def explained(
    answers: list[tuple[str, State]], found: dict[Key, Bits | None], place: Place
) -> tuple[str | None, str]:
    """How what was found comes, or why it cannot be.

    Of two stores each may have what is before a change or after it.
    """
    reasons = []
    answers = answers if place.shared else between(answers)
    for nodes in [NODES] if place.shared else [(name,) for name in NODES]:
        there = {key: bits for key, bits in found.items() if key[0] in nodes}
        wrong = {
            word: difference({k: v for k, v in state.items() if k[0] in nodes}, there)
            for word, state in answers
        }
        if None not in wrong.values():
            return None, str(wrong)
        reasons.append(next(word for word, why in wrong.items() if why is None))
    return reasons[-1], ""


def bits_of(bitmap: DirtyBitmap) -> Bits:
    groups = frozenset(
        offset // GROUP
        for start, length in bitmap.areas()
        for offset in range(start, start + length, GROUP)
    )
    return Bits(groups, groups, bitmap.enabled)


def look(place: Place, rng: random.Random) -> dict[Key, Bits | None]:
    """Open it as a program that starts does."""
    found: dict[Key, Bits | None] = {}
    graph = BlockGraph()
    for name, store in stores(place).items():
        node = graph.add_node(name, place.size, store)
        for bitmap in node.bitmaps.values():
            if bitmap.inconsistent:
                assert not place.exact_after_kill, f"{name}/{bitmap.name}: {bitmap.reason}"
                found[name, bitmap.name] = None
                bitmap.repair()
                continue
            found[name, bitmap.name] = bits_of(bitmap)
    if isinstance(place, LocalPlace):
        files = list(place.folder.glob("store0/*.words"))
        assert len(files) == len(found), f"{files} for {list(found)}"
    if not place.exact_after_kill or rng.random() < 0.5:
        graph.close()
    else:
        for node in graph.nodes.values():
            node.close(discard=True)
    return found


def known(place: Place) -> State:
    """After a look, which repaired what was inconsistent."""
    state: State = {}
    with BlockGraph() as graph:
        for name, store in stores(place).items():
            node = graph.add_node(name, place.size, store, read_only=True)
            for bitmap in node.bitmaps.values():
                state[name, bitmap.name] = bits_of(bitmap)
    return state


def main(kind: str, folder: Path, rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    memory = mmap.mmap(-1, 8 * CELLS)
    cells = memoryview(memory).cast("Q")
    state: State = {}
    where: Counter[str] = Counter()
    writes = operations = exact = 0
    for number in range(rounds):
        if number % 4 == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            place = {"local": LocalPlace, "qcow2": Qcow2Place}[kind](folder)
            place.size = NGROUPS * GROUP
            if kind == "qcow2":
                stores(place)  # the images are made
            state = {}
        cells[:BEGIN_AT] = memoryview(bytes(8 * BEGIN_AT)).cast("Q")
        round_seed = rng.randrange(2**32)
        pid = os.fork()
        if pid == 0:
            try:
                child(cells, place, round_seed, state)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, 0.02 if number % 4 == 0 else 0.2))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"round {number}: the child ended by itself"
        there = any(folder.iterdir())
        if kind == "qcow2" and number % 8 == 7:
            for image in folder.iterdir():
                assert check(image) in (FINE, LEAKS), f"round {number} of seed {seed}: {image}"
        found = look(place, rng)
        answers = possible(cells, round_seed, state)
        word, wrong = explained(answers, found, place)
        assert word, f"round {number} of seed {seed}: {answers[0][0]}: {wrong}"
        where[word if there else "nothing yet"] += 1
        exact += sum(bits is not None for bits in found.values())
        state = {key: bits for key, bits in found.items() if bits is not None}
        if len(state) < len(found):
            state = known(place)
        writes += cells[ACKED]
        operations += cells[ENDED]
    print(f"{rounds} kills, {operations} steps, {writes} writes, {exact} bitmaps exact")
    for what, times in where.most_common():
        print(f"{times:6} {what}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
