# SPDX-License-Identifier: MIT
"""Lets every call below LocalStores fail during a transaction, one after the other, beside writes.

    LD_PRELOAD=faults.so python instant_faults.py faults.so WRITERS DIRECTORY SETTING MODE SEED...

For the transaction of beside.py that follows from a seed, in "one" store or in "two", and every n,
the n-th call that would change a file fails (see c/faults.c; MODE is how, see local_faults.py),
while threads in C write (WRITERS, see sequences.py). Then the transaction is done or not, at one
instant, in the process; a kill leaves one of the two; and after a flush, it leaves the same. In
mode "kill" the process is killed before the n-th call. Likewise the end of a freeze.

Prints how many calls were tried; fails with an AssertionError.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from beside import NODES
from instant import Action, Key, World, of_areas, passed_on, perform, world_of
from instant_kill import BEGUN, ENDED, FIRST, READY, SETTINGS, Child, Setting, known, look
from local_faults import KILL, MODES, Faults
from sequences import CELLS, Native, Sequence, cells, load

from pybitmap import BlockGraph, StoreError

#: Of writes: so many come before, and so many after what fails.
SOME = 60


class Trial:
    """One setting, made anew for each fault."""

    def __init__(self, faults: Faults, writers: str, directory: Path, name: str, seed: int) -> None:
        self.faults = faults
        self.writers = load(Path(writers))
        self.path = directory / "stores"
        self.name = name
        self.seed = seed
        self.memory = mmap.mmap(-1, 8 * CELLS)
        self.steps = memoryview(mmap.mmap(-1, 8 * (FIRST + 4))).cast("Q")
        while ("abort",) in self.actions():
            self.seed += 3

    def actions(self) -> list[Action]:
        setting = self.setting()
        self.steps[BEGUN] = 1
        return known(setting)[1]

    def setting(self) -> Setting:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        self.memory[:] = bytes(8 * CELLS)
        self.steps[:] = memoryview(bytes(8 * len(self.steps))).cast("Q")
        nodes, block, threads = [
            (["a", "b", "c"], 1, 1),
            (["c", "b", "a"], 7, 1),
            (["b", "c"], 1, 2),
        ][self.seed % 3]
        sequences: list[Sequence] = [
            Native(self.writers, nodes, range(1 << 17), block, threads, cells(self.memory))
        ]
        return Setting(self.path, SETTINGS[self.name], sequences, self.seed, self.steps)


def discard(graph: BlockGraph) -> None:
    for node in graph.nodes.values():
        node.close(discard=True)


def write_some(sequence: Sequence) -> None:
    sequence.allow(SOME)
    sequence.wait_idle()


# ---- transactions -------------------------------------------------------------------------------


def life(setting: Setting) -> Child:
    child = Child(setting.open(), setting.sequences, setting.seed, NODES, SOME)
    child.setting = setting
    child.begin()
    child.start()
    write_some(setting.sequences[0])
    return child


def try_failing(trial: Trial, mode: str, where: Counter[str]) -> int:
    """How many calls there are."""
    error, how = MODES[mode]
    n = 0
    while True:
        n += 1
        for retry in (False, True):
            setting = trial.setting()
            child = life(setting)
            actions = child.draft()
            what = f"{trial.name}, seed {trial.seed}, {mode}, call {n}: {actions}"
            child.allow(1 << 14)
            trial.faults.arm(n, error, how)
            failure = None
            try:
                child.run(actions, "python")
            except StoreError as caught:
                failure = caught
            calls = trial.faults.disarm()
            begun = [sequence.begun for sequence in setting.sequences]
            try:
                told = try_one(child, actions, failure, begun, retry)
            except AssertionError as wrong:
                raise AssertionError(f"{what}: {failure}: {wrong}") from None
            finally:
                for sequence in setting.sequences:
                    sequence.join()
            where[told] += 1
            if calls < n:
                return n - 1


def try_one(
    child: Child, actions: list[Action], failure: StoreError | None, begun: list[int], retry: bool
) -> str:
    """What came of it, in memory and in the stores."""
    sequence = child.sequences[0]
    sequence.allow(0)
    done = failure is None or "done, but not stored everywhere" in str(failure)
    before, first = child.world, child.cuts
    if done:
        child.move_on(child.cuts_found(child.found(), begun))
        child.world = perform(child.world, actions, child.limit)
    child.check(actions)
    write_some(sequence)
    sequence.join()
    told = "done" if failure is None else "done, but not stored everywhere" if done else "failed"
    if retry:
        child.graph.flush()
    end = [sequence.acked]
    after, cuts = child.world, child.cuts
    child.move_on(end)
    assert child.found() == child.world, f"in memory: {child.wrong(child.found())}"
    discard(child.graph)
    graph = child.setting.open()
    found: dict[int, World] = {}
    for key, bits in world_of(graph).items():
        assert graph.nodes[key[0]].bitmaps[key[1]].reason is None, key
        found.setdefault(child.setting.stores[key[0]], {})[key] = bits
    discard(graph)
    for store, each in found.items():
        wrong = of_store_wrong(child, child.world, store, each)
        if wrong is None:
            continue
        assert not retry, f"stored after a flush: {wrong}"
        assert failure is not None, f"stored: {wrong}"
        told += ", otherwise in a store"
        # A store that gains bitmaps or content, and loses some, beside others, is changed twice.
        removed = {key for key in each.keys() - after.keys() if key in before}
        cleared = passed_on(actions, child.setting.stores)
        if done and any(
            of_store_wrong(child, child.world, store, each, lost) is None
            for lost in (removed, removed | cleared)
        ):
            continue
        # One that was not told has what was before, or what it was told in vain.
        child.world, child.cuts = before, first
        if not done:
            most = child.cuts_found(each, end, True)
            child.move_on(child.cuts_found(each, end))
            child.world, child.cuts = perform(child.world, actions, child.limit), most
        # What it names is shared with what is: that may have been marked since.
        wrong = stale_wrong(child, store, each, end, first)
        assert wrong is None, f"stored: {wrong}"
        child.world, child.cuts = after, cuts
        child.move_on(end)
    return told


def of_store(child: Child, world: World, store: int) -> World:
    return {
        key: bits.loaded
        for key, bits in world.items()
        if bits.persistent and child.setting.stores[key[0]] == store
    }


def of_store_wrong(
    child: Child, world: World, store: int, found: World, lost: Collection[Key] = ()
) -> str | None:
    expected = {k: b for k, b in of_store(child, world, store).items() if k not in lost}
    found = {key: bits for key, bits in found.items() if key not in lost}
    if expected.keys() != found.keys():
        return f"there are {sorted(found)}, not {sorted(expected)}"
    for key, bits in expected.items():
        if bits != found[key]:
            return f"{key} differs"
    return None


def stale_wrong(
    child: Child, store: int, found: World, end: list[int], first: list[int]
) -> str | None:
    child.move_on(end)
    expected = of_store(child, child.world, store)
    if expected.keys() - found.keys():
        return f"{sorted(expected.keys() - found.keys())} are missing"
    for key, bits in expected.items():
        more, has = 0, found[key].content
        for i, sequence in enumerate(child.sequences):
            more |= sequence.between(first[i], end[i], key[0])
        if bits.content & ~has:
            return f"{key} lacks writes"
        if has & ~(bits.content | bits.rounded(more)):
            return f"{key} has writes too many"
    return None


def kills(
    trial: Trial, run: Callable[[Setting, int], object]
) -> Iterator[tuple[Setting, bool, int]]:
    """``run`` in a child that is killed at its n-th call, for each n; at last it is not killed."""
    killed = True
    n = 0
    while killed:
        n += 1
        setting = trial.setting()
        killed = in_child(partial(run, setting, n))
        yield setting, killed, n


def try_killing(trial: Trial, where: Counter[str]) -> int:
    def run(setting: Setting, n: int) -> None:
        child = life(setting)
        setting.steps[READY] = 1
        actions = child.draft()
        child.allow(1 << 14)
        trial.faults.arm(n, 0, KILL)
        child.run(actions, "python")
        child.note(actions)
        trial.faults.disarm()
        for i, cut in enumerate(child.cuts):
            setting.steps[setting.cell(0, i, True)] = cut
        setting.steps[BEGUN] = setting.steps[ENDED] = 1

    n = 0
    for setting, _, n in kills(trial, run):
        try:
            where[look(setting)] += 1
        except AssertionError as error:
            what = f"{trial.name}, seed {trial.seed}, kill, call {n}"
            raise AssertionError(f"{what}: {error}") from None
    return n - 1


def in_child(run: Callable[[], object]) -> bool:
    """Was it killed?"""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


# ---- the end of a freeze ------------------------------------------------------------------------


def try_killing_the_end_of_a_freeze(trial: Trial, end: str, where: Counter[str]) -> int:
    """Of a bitmap of each node."""

    def run(setting: Setting, n: int) -> None:
        child = life(setting)
        sequence = setting.sequences[0]
        frozen = child.graph.freeze([child.graph.nodes[name].bitmaps["a"] for name in NODES])
        setting.steps[FIRST] = sequence.acked
        write_some(sequence)
        setting.steps[FIRST + 1] = sequence.acked
        sequence.allow(1 << 14)
        trial.faults.arm(n, 0, KILL)
        getattr(frozen, end)()
        trial.faults.disarm()
        setting.steps[ENDED] = 1

    n = 0
    for setting, killed, n in kills(trial, run):
        sequence = setting.sequences[0]
        freeze, acked = setting.steps[FIRST], max(setting.steps[FIRST + 1], sequence.acked)
        graph = setting.open()
        for name in NODES:
            found = of_areas(graph.nodes[name].bitmaps["a"].areas())
            before = sequence.between(0, freeze, name)
            must, may = (
                sequence.between(freeze, acked, name),
                sequence.between(freeze, sequence.begun, name),
            )
            done = end == "done" and not found & before
            if not done:
                must, may = must | before, may | before
            else:
                where["done"] += 1
            assert killed or done == (end == "done"), (trial.name, end, n)
            what = f"{trial.name}, seed {trial.seed}, {end}, call {n}, node {name}"
            assert not must & ~found, f"{what}: lost {bin(must & ~found).count('1')} writes"
            assert not found & ~may, f"{what}: writes too many"
        discard(graph)
    return n - 1


def main(
    library: str, writers: str, directory: Path, name: str, mode: str, seeds: list[int]
) -> None:
    watched = directory / "watched"
    watched.mkdir()
    faults = Faults(library, watched)
    for seed in seeds:
        where: Counter[str] = Counter()
        trial = Trial(faults, writers, watched, name, seed)
        if mode == "kill":
            calls = [try_killing(trial, where)]
            for end in ("close", "done"):
                calls.append(try_killing_the_end_of_a_freeze(trial, end, where))
        else:
            calls = [try_failing(trial, mode, where)]
        assert all(calls)
        print(f"{mode}, {name}, seed {trial.seed}: {calls} calls; {dict(where)}", flush=True)


if __name__ == "__main__":
    main(
        sys.argv[1],
        sys.argv[2],
        Path(sys.argv[3]),
        sys.argv[4],
        sys.argv[5],
        [int(seed) for seed in sys.argv[6:]],
    )
