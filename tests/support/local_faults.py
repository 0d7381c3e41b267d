# SPDX-License-Identifier: MIT
"""Lets every call below a LocalStore fail, one after the other.

    LD_PRELOAD=faults.so python local_faults.py faults.so DIRECTORY MODE...

For every change of a node, every way to fail and every n, the n-th call that would change a file
fails. Then the change has raised a StoreError with the cause and all is as before, in the process
and for whoever opens the store next; or the call did not matter. A second try succeeds. (If nothing
works any more behind the point where a transaction counts, the store may have the new state. And a
bitmap whose bits could not be synced is inconsistent from then on.)
In mode "kill" the process is killed before the n-th call; a reader then finds the old state or the
new one, writes nothing, and a writer finds the same.

Prints how many calls were tried; fails with an AssertionError.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pybitmap import BlockGraph, Frozen, StoreError
from pybitmap.store import LocalStore

SIZE = 1 << 24
GROUP = 512
NODES = ("one", "two")

#: error, and how it comes: see faults.c.
MODES = {
    "io": (errno.EIO, 0),
    "io-from-then-on": (errno.EIO, 1),
    "full": (errno.ENOSPC, 0),
    "full-from-then-on": (errno.ENOSPC, 1),
    "short": (errno.ENOSPC, 2),
}

#: What faults.c calls this.
KILL = 3

Stored = dict[str, list[tuple[object, ...]]]


def opened(path: Path) -> BlockGraph:
    store = LocalStore(path)
    graph = BlockGraph()
    try:
        for name in NODES:
            graph.add_node(name, SIZE, store)
    except BaseException:
        discard(graph)
        raise
    return graph


def discard(graph: BlockGraph) -> None:
    """As a killed process does."""
    for node in graph.nodes.values():
        node.close(discard=True)


def state(graph: BlockGraph) -> Stored:
    return {
        name: [
            (each.name, each.enabled, each.reason, list(each.areas()))
            for each in node.bitmaps.values()
        ]
        for name, node in graph.nodes.items()
    }


def stored(path: Path) -> Stored:
    graph = opened(path)
    try:
        found = state(graph)
        bitmaps = sum(map(len, found.values()))
        assert len(list(path.glob("*.words"))) == bitmaps, "a file is left over"
        return found
    finally:
        discard(graph)


def make_base(path: Path) -> None:
    with opened(path) as graph:
        one = graph.nodes["one"]
        one.add_bitmap("a", GROUP, persistent=True)
        one.add_bitmap("b", GROUP, persistent=True, disabled=True)
        one.mark_dirty(0, 100_000)
        one.add_bitmap("c", GROUP, persistent=True)


def transact(graph: BlockGraph) -> None:
    with graph.transaction() as tx:
        tx.add("two", "a", GROUP, persistent=True)
        tx.merge("two", "a", [("one", "a")])
        tx.remove("one", "a")
        tx.clear("one", "c")
        tx.enable("one", "b")


#: What was frozen last, held until the next.
frozen: list[Frozen] = []


def freeze_only(graph: BlockGraph) -> None:
    frozen[:] = [graph.nodes["one"].bitmaps["a"].freeze()]


def freeze(graph: BlockGraph) -> None:
    freeze_only(graph)
    graph.nodes["one"].mark_dirty(1 << 20, 1)


@dataclass
class Case:
    run: Callable[[BlockGraph], object]
    #: Done before, without faults.
    first: Callable[[BlockGraph], object] = lambda graph: None


CASES = {
    "add": Case(lambda g: g.nodes["two"].add_bitmap("x", GROUP, persistent=True)),
    "remove": Case(lambda g: g.nodes["one"].remove_bitmap("a")),
    "clear": Case(lambda g: g.nodes["one"].bitmaps["a"].clear()),
    "merge": Case(lambda g: g.nodes["one"].bitmaps["c"].merge(g.nodes["one"].bitmaps["a"])),
    "disable": Case(lambda g: g.nodes["one"].bitmaps["a"].disable()),
    "freeze": Case(freeze_only),
    "done": Case(lambda g: frozen[0].done(), freeze),
    "truncate": Case(lambda g: g.nodes["one"].truncate(SIZE // 2)),
    "transaction": Case(transact),
    "flush": Case(lambda g: g.flush()),
    "close": Case(lambda g: g.close()),
}


class Faults:
    def __init__(self, library: str, directory: Path) -> None:
        self.library = ctypes.CDLL(library)
        self.library.faults_watch(str(directory).encode())
        self.library.faults_calls.restype = ctypes.c_long

    def arm(self, n: int, error: int = 0, mode: int = 0) -> None:
        self.library.faults_arm(ctypes.c_long(n), error, mode)

    def disarm(self) -> int:
        """How many calls there were."""
        calls = int(self.library.faults_calls())
        self.arm(0)
        return calls


def attempt(faults: Faults, n: int, mode: str, run: Callable[[], object]) -> tuple[bool, bool]:
    """Did it fail? Was there an n-th call?"""
    error, how = MODES[mode]
    faults.arm(n, error, how)
    failure: StoreError | None = None
    try:
        run()
    except StoreError as caught:
        failure = caught
    calls = faults.disarm()
    if failure is not None:
        # Not everything is told by SQLite: not why it cannot open a file, nor sync it.
        told: set[int | None] = {error}
        if "unable to open database file" in str(failure):
            told = {None}
        elif "disk I/O error" in str(failure):
            told = {errno.EIO}
        assert failure.errno in told, f"{failure.errno}: {failure!r}"
    return failure is not None, calls >= n


def try_case(faults: Faults, base: Path, path: Path, name: str, mode: str) -> tuple[int, int]:
    """How many calls were made to fail; how often the change was there although it had raised."""
    case = CASES[name]

    def prepared() -> BlockGraph:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(base, path)
        graph = opened(path)
        case.first(graph)
        return graph

    def run(graph: BlockGraph) -> None:
        case.run(graph)

    graph = prepared()
    discard(graph)
    before = stored(path)
    graph = prepared()
    run(graph)
    discard(graph)
    after = None if name == "truncate" else stored(path)

    n = unclear = 0
    while True:
        n += 1
        for retry in (
            (False, True) if name != "done" else (False,)
        ):  # what it put back is not frozen
            graph = prepared()
            shown = state(graph), {k: node.size for k, node in graph.nodes.items()}
            failed, reached = attempt(faults, n, mode, lambda: run(graph))  # noqa: B023
            if not reached:
                discard(graph)
                return n - 1, unclear
            what = f"{name}, {mode}, call {n}"
            if failed:
                still = state(graph), {k: node.size for k, node in graph.nodes.items()}
                if name == "close":  # of several nodes some may be closed already
                    still[0].update({k: v for k, v in shown[0].items() if not still[0].get(k)})
                if name == "done":  # all is put back
                    shown[0].update(before)
                assert still == shown, f"{what}: {still}"
                if retry:
                    run(graph)
            discard(graph)
            if name == "truncate":
                sizes = {e.name: e.size for e in LocalStore(path).entries()}
                wanted = SIZE if failed and not retry else SIZE // 2
                if sizes["one"] != wanted:
                    assert failed, what
                    assert not retry, what
                    unclear += 1
                continue
            found = stored(path)
            if failed and name in ("flush", "close"):
                forgive_lost(found, before)
            if failed and not retry:
                assert found in (before, after), f"{what}: {found}"
                unclear += found != before
            else:
                assert found == after, f"{what}: {found}"


def forgive_lost(found: Stored, before: Stored) -> None:
    """One bitmap may be lost: that of which the sync failed."""
    lost = [
        (node, i)
        for node, bitmaps in found.items()
        for i, (_, _, reason, _) in enumerate(bitmaps)
        if reason == "its bits could not be written to the disk, so marks may be missing"
    ]
    assert len(lost) <= 1, found
    for node, i in lost:
        found[node][i] = before[node][i]


def read(path: Path) -> Stored:
    """As a program that only reads; it has written nothing."""
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    store = LocalStore(path)
    graph = BlockGraph()
    for name in NODES:
        graph.add_node(name, SIZE, store, read_only=True)
    found = state(graph)
    discard(graph)
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before
    return found


def killed_at(faults: Faults, n: int, prepare: Callable[[], Callable[[], object]]) -> bool:
    """Does a child that is killed at its n-th call come so far?"""
    pid = os.fork()
    if pid == 0:
        try:
            run = prepare()
            faults.arm(n, 0, KILL)
            run()
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, (n, status)
    return os.WIFSIGNALED(status)


def try_killing(faults: Faults, base: Path, path: Path, name: str) -> tuple[int, int]:
    """How many calls there were; after how many kills the change was there."""
    case = CASES[name]

    def prepare() -> Callable[[], object]:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(base, path)
        graph = opened(path)
        case.first(graph)
        return lambda: case.run(graph)

    assert not killed_at(faults, 0, lambda: (prepare(), lambda: None)[1])
    before = stored(path)
    assert not killed_at(faults, 0, prepare)
    after = stored(path)
    n = done = 0
    while killed_at(faults, n + 1, prepare):
        n += 1
        found = read(path)
        assert found in (before, after), f"kill {name}, call {n}: {found}"
        assert stored(path) == found, f"kill {name}, call {n}"
        done += found != before
    return n, done


def try_killing_a_creation(faults: Faults, path: Path) -> int:
    def prepare() -> Callable[[], object]:
        shutil.rmtree(path, ignore_errors=True)
        return lambda: opened(path)

    n = 0
    while killed_at(faults, n + 1, prepare):
        n += 1
        assert stored(path) == {"one": [], "two": []}, n
    return n


def try_opening(faults: Faults, path: Path, mode: str, base: Path | None) -> int:
    """Making a store, or loading one: a failure leaves one that can be opened."""
    n = 0
    while True:
        n += 1
        shutil.rmtree(path, ignore_errors=True)
        if base is not None:
            shutil.copytree(base, path)
        graphs: list[BlockGraph] = []
        failed, reached = attempt(faults, n, mode, lambda: graphs.append(opened(path)))  # noqa: B023
        for graph in graphs:
            discard(graph)
        if not reached:
            return n - 1
        found = stored(path)
        assert [len(each) for each in found.values()] == ([3, 0] if base else [0, 0]), (mode, n)
        assert all(each[2] is None for each in found["one"]), (mode, n, failed)


def main(library: str, directory: Path, modes: list[str]) -> None:
    base, path = directory / "base", directory / "watched" / "store"
    path.parent.mkdir(parents=True)
    make_base(base)
    faults = Faults(library, path.parent)
    for mode in modes:
        if mode == "kill":
            print("kill open new:", try_killing_a_creation(faults, path))
            for name in CASES:
                if name != "truncate":  # another size
                    ncalls, done = try_killing(faults, base, path, name)
                    print(f"kill {name}: {ncalls}, done: {done}")
            continue
        print(mode, "open new:", try_opening(faults, path, mode, None))
        print(mode, "open:", try_opening(faults, path, mode, base))
        for name in CASES:
            ncalls, unclear = try_case(faults, base, path, name, mode)
            assert ncalls
            assert not unclear or mode.endswith("from-then-on"), f"{mode} {name}"
            print(f"{mode} {name}: {ncalls}" + (f", done all the same: {unclear}" * bool(unclear)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] or list(MODES))
