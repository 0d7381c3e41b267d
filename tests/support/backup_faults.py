# SPDX-License-Identifier: MIT
"""Kills what changes a backup directory, or lets it fail, at every call that changes a file.

    LD_PRELOAD=faults.so python backup_faults.py faults.so DIRECTORY WORK MODE

WORK is one of WORKS, MODE "kill" or one of local_faults. Whatever is listed after that is restored
exactly, by us and by qemu-img alone, which reads what headers name; the points are those from
before or those from after; and the next one who writes brings all to its end, with nothing left.

With WORK "restore" the target is as it was, or the disk; after an error nothing else is there.

Prints how many calls were tried; fails with an AssertionError.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from images import qemu_img
from local_faults import MODES, Faults, killed_at
from points import History, content, new_id, now

from pybitmap import BitmapError
from pybitmap.tools.backup import Point, Repository, points, prune, restore, verify
from pybitmap.tools.backup.manifest import LEAVES

MIB = 1 << 20
#: Sizes of the disk: it shrinks, and grows again.
SIZES = [2 * MIB, MIB + 512, 2 * MIB, 2 * MIB]


def made(path: Path) -> History:
    history = History(path)
    for number, size in enumerate(SIZES, 1):
        history.point(size, [f"write -P {number} {number * 100}k 300k", "write -z 0 64k"])
    return history


class Prune:
    """Of two points that do not lie next to each other."""

    def __init__(self, base: History) -> None:
        self.base = base
        self.going = [list(base.contents)[number] for number in (0, 2)]

    def run(self, path: Path) -> None:
        prune(path, points=self.going)

    def wanted(self, before: list[str]) -> list[str]:
        return [each for each in before if each not in self.going]


class Append:
    """A new point, of which the copy is there but for its leaves."""

    def __init__(self, base: History) -> None:
        self.base = base
        self.point, self.time = new_id(), now()
        with Repository.open(base.path, writing=True) as repository:
            last = repository.manifest.last
            assert last is not None
            self.last = last.id
            self.path = repository.new_file("vda", self.point)
            below = last.copies[0].file
            qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", self.path)
            base.contents[self.point] = content(self.path)

    def run(self, path: Path) -> None:
        with Repository.open(path, writing=True) as repository:
            copy = self.base.copy(repository, path / self.path.name, self.last)
            repository.append(Point(self.point, self.time, self.time, (copy,)))

    def wanted(self, before: list[str]) -> list[str]:
        return [*before, self.point]


WORKS: dict[str, Callable[[History], Prune | Append]] = {"prune": Prune, "append": Append}


class Judge:
    """Of directories as a kill leaves them; each is looked at once."""

    def __init__(self, work: Prune | Append, target: Path) -> None:
        self.work, self.target = work, target
        self.before = [each.id for each in points(work.base.path)]
        self._seen: set[tuple[tuple[str, bytes], ...]] = set()

    def judge(self, path: Path, what: object) -> bool:
        """Is the work done, as far as the list of points goes?"""
        found = [each.id for each in points(path)]
        assert found in (self.before, self.work.wanted(self.before)), what
        if self._is_new(path):
            self._restored(path, what)
            with Repository.open(path, writing=True) as repository:
                repository.sweep()
                assert repository.leftovers() == [], what
            files = {copy.file for point in points(path) for copy in point.copies}
            left = {each.name for each in path.iterdir()}
            assert left == {"manifest.json", "lock", *files, *(each + LEAVES for each in files)}
            if self._is_new(path):
                self._restored(path, what)
                assert verify(path, full=True).good, what
        return found != self.before

    def _is_new(self, path: Path) -> bool:
        state = tuple((each.name, each.read_bytes()) for each in sorted(path.iterdir()))
        known = state in self._seen
        self._seen.add(state)
        return not known

    def _restored(self, path: Path, what: object) -> None:
        for point in points(path):
            [copy] = point.copies
            wanted = self.work.base.contents[point.id]
            assert content(path / copy.file) == wanted, (what, point.id, "qemu-img")
        last = points(path)[-1].id
        restore(path, to=self.target, force=True)
        assert self.target.read_bytes() == self.work.base.contents[last], what


def restored(base: History, watched: Path) -> tuple[Prepare, Callable[[object, bool], bool]]:
    """Over a file that is there, and beside it to one that is not."""
    old, new = watched / "old", watched / "new"
    disk = list(base.contents.values())[-1]

    def prepare() -> Callable[[], object]:
        shutil.rmtree(watched)
        watched.mkdir()
        old.write_bytes(b"old")

        def run() -> None:
            restore(base.path, to=old, force=True)
            restore(base.path, to=new)

        return run

    def judge(what: object, failed: bool) -> bool:
        assert old.read_bytes() in (b"old", disk), what
        assert not new.exists() or new.read_bytes() == disk, what
        others = {each.name for each in watched.iterdir()} - {"old", "new"}
        assert all(each.startswith(".pybitmap-") for each in others), what
        assert not others or not failed, what
        return new.exists()

    return prepare, judge


Prepare = Callable[[], Callable[[], object]]


def main(library: str, directory: Path, name: str, mode: str) -> None:
    watched = directory / "watched"
    watched.mkdir()
    base = made(directory / "base")
    if name == "restore":
        prepare, judge = restored(base, watched)
    else:
        work = WORKS[name](base)
        path = watched / "backups"
        judge_directory = Judge(work, directory / "restored").judge

        def prepare() -> Callable[[], object]:
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(base.path, path)
            return lambda: work.run(path)

        def judge(what: object, failed: bool) -> bool:
            return judge_directory(path, what)

    faults = Faults(library, watched)
    n = done = 0
    if mode == "kill":
        while killed_at(faults, n + 1, prepare):
            n += 1
            done += judge((name, mode, n), False)
    else:
        while True:
            failed, reached = attempt(faults, n + 1, mode, prepare())
            if not reached:
                break
            done += judge((name, mode, n), failed)
            n += 1 if name != "prune" else 3  # every call is killed before, at least
    assert judge("in the end", False)
    assert n > 5
    print(f"{name} {mode}: {n} calls, done all the same: {done}")


def attempt(faults: Faults, n: int, mode: str, run: Callable[[], object]) -> tuple[bool, bool]:
    """Did it fail? Was there an n-th call?"""
    error, how = MODES[mode]
    faults.arm(n, error, how)
    failure = ""
    try:
        run()
    except BitmapError as caught:
        failure = str(caught)
    calls = faults.disarm()
    assert not failure or os.strerror(error) in failure, failure
    return bool(failure), calls >= n


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
