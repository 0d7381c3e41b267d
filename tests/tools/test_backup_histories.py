# SPDX-License-Identifier: MIT
"""Random histories of disks and their backups: whatever happened, each listed point restores
exactly.

Two qcow2 images, which a machine has or nobody; a raw disk that the machine has; and a raw disk
with a local store. They are written to, resized, lose their bitmaps, are put back from copies;
backups of some of them are made, interrupted at any step by a kill of us or of the machine, pruned.
An oracle knows what each disk held at each instant. 20 histories here; `make histories` has 500
(PYBITMAP_HISTORIES=N), and PYBITMAP_HISTORY=SEED repeats one.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from backing_up import M, Place, Raw, killed, new_image, new_raw
from daemon import qemu_img
from machines import Machine, content, write
from peers import package, peer

from pybitmap import offline
from pybitmap.errors import BitmapError
from pybitmap.store import LocalStore, Qcow2Store
from pybitmap.tools.backup import Hooks, Repository, Source, backup, prune, verify
from pybitmap.tools.backup.run import STEPS
from pybitmap.tools.monitor import MonitorError

package("qemu.qmp")
peer("qemu-storage-daemon", "qemu-system-common")

SEEDS = (
    [int(os.environ["PYBITMAP_HISTORY"])]
    if "PYBITMAP_HISTORY" in os.environ
    else range(int(os.environ.get("PYBITMAP_HISTORIES", "20")))
)
STEPS_IN_ONE = 8
SECTOR = 512


class History:
    """Disks, what they hold, and what they held at each point that may be listed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.folder, self.to = folder, folder / "to"
        self.log: list[str] = []
        cluster = self.rng.choice(["4k", "64k", "64k", "256k"])
        size = self.rng.choice([M, M + 4096 * 3 + SECTOR, 2 * M - SECTOR])
        self.paths = {name: new_image(folder, name, size, cluster_size=cluster) for name in "ab"}
        self.paths["r"] = new_raw(folder, "r", size)
        self.stored = Raw(folder, "s", size=size)
        self.paths["s"] = self.stored.path
        self.held = {name: bytearray(size) for name in "abrs"}
        self.points: dict[str, dict[str, bytes]] = {}
        self.kept: dict[str, bytes] = {}
        self.machine: Machine | None = None
        self.granularity = self.rng.choice([4096, 65536, 65536, 262144])
        self.full = 0
        self.increments = 0

    def close(self) -> None:
        if self.machine is not None:
            self.machine.close()

    def say(self, what: str) -> None:
        self.log.append(what)

    # ---- what is there ----------------------------------------------------------------------

    def at_hand(self) -> list[str]:
        """Disks that can be written to, or backed up, now."""
        return ["a", "b", "r"] if self.machine is not None else ["a", "b", "s"]

    def read(self, name: str) -> bytearray:
        path = self.paths[name]
        raw = path.suffix == ".raw"
        shared = self.machine is not None
        return bytearray(content(path, shared=shared, format="raw" if raw else "qcow2"))

    # ---- what happens -----------------------------------------------------------------------

    def act(self) -> None:
        acts = {
            self.do_write: 6,
            self.do_backup: 6,
            self.do_killed_backup: 2,
            self.do_resize: 2,
            self.do_cut: 2,
            self.do_switch: 2,
            self.do_kill_machine: 1,
            self.do_lose_bitmap: 1,
            self.do_keep_or_put_back: 2,
            self.do_prune: 1,
        }
        self.rng.choices(list(acts), list(acts.values()))[0]()

    def do_write(self, disks: list[str] | None = None) -> None:
        for name in disks or self.at_hand():
            for _ in range(self.rng.randrange(3)):
                self._write(name)

    def _write(self, name: str) -> None:
        size = len(self.held[name])
        offset = self.rng.choice([0, size - SECTOR, self.rng.randrange(size // SECTOR) * SECTOR])
        nbytes = min(self.rng.choice([1, SECTOR, 4096, 70000, 300000]), size - offset)
        self._put(name, offset, nbytes, self.rng.choice([0, self.rng.randrange(1, 256)]))

    def _put(self, name: str, offset: int, nbytes: int, pattern: int) -> None:
        self.say(f"write {name} {offset}+{nbytes} {pattern}")
        self.held[name][offset : offset + nbytes] = bytes([pattern]) * nbytes
        if name == "s":
            self.stored.write(pattern, offset, nbytes)
            return
        zero = pattern == 0 and nbytes % SECTOR == 0 and self.rng.random() < 0.7
        command = f"write {'-z -u' if zero else f'-P {pattern}'} {offset} {nbytes}"
        if self.machine is not None:
            self.machine.write(name, command)
        else:
            write(self.paths[name], command, format="qcow2")

    def do_cut(self) -> None:
        """What a point has is cut off before the next, or beside one; perhaps all is written to."""
        name = self.rng.choice(self.at_hand())
        size = len(self.held[name])
        smaller = self.rng.randrange(1, size // SECTOR + 1) * SECTOR
        self._put(name, size // 2, size - size // 2, 77)
        self.do_backup([name])
        if self.rng.random() < 0.5:
            self._resize(name, [smaller, size])
        else:
            self._resize(name, [smaller])
            self.do_backup([name])
            self._resize(name, [size])
        if self.rng.random() < 0.5:
            self._put(name, size - SECTOR, SECTOR, 78)
        self.do_backup([name])

    def do_resize(self) -> None:
        name = self.rng.choice(self.at_hand())
        sizes = [
            max(SECTOR, self.rng.randrange(2 * M // SECTOR) * SECTOR)
            for _ in range(self.rng.choice([1, 2, 2]))
        ]
        if len(sizes) == 2:
            end = -(-sizes[0] // self.granularity) * self.granularity  # of a bitmap's group
            sizes[1] = self.rng.choice([len(self.held[name]), sizes[1], end])
        self._resize(name, sizes)

    def _resize(self, name: str, sizes: list[int]) -> None:
        if self.machine is not None and self.machine.jobs():
            return  # of a killed backup: QEMU lets nobody resize such disks
        self.say(f"resize {name} {sizes}")
        self._remove_inconsistent(name)
        if name == "s":
            self.stored.resize(*sizes)
        elif self.machine is not None:
            self.machine.resize(name, *sizes)
        else:
            for size in sizes:
                qemu_img("resize", "-q", "--shrink", str(self.paths[name]), str(size))
        self.held[name] = self.read(name)

    def _remove_inconsistent(self, name: str) -> None:
        """With such bitmaps QEMU resizes no image."""
        if self.machine is not None:
            for each in self.machine.bitmaps(name).values():
                if each.get("inconsistent"):
                    self.machine.must("block-dirty-bitmap-remove", node=name, name=each["name"])
        elif name != "s":
            [node] = Qcow2Store(self.paths[name]).entries()
            stale = [(None, each.name) for each in node.bitmaps if each.inconsistent]
            if stale:
                offline.remove(Qcow2Store(self.paths[name]), stale, lambda *_: None)

    def do_switch(self) -> None:
        if self.machine is not None:
            self.say("stop")
            self.machine.stop()
            self.machine.close()
            self.machine = None
        else:
            self.say("start")
            self.machine = Machine({name: self.paths[name] for name in "abr"})

    def do_kill_machine(self) -> None:
        if self.machine is not None:
            self.say("kill the machine")
            self.machine.kill()
            self._machine_is_dead()

    def _machine_is_dead(self) -> None:
        assert self.machine is not None
        self.machine.close()
        self.machine = None
        for name in "abr":  # what it had in its caches is lost
            self.held[name] = self.read(name)

    def do_lose_bitmap(self) -> None:
        name = self.rng.choice(self.at_hand())
        if self.machine is not None:
            there = sorted(self.machine.bitmaps(name))
            if there:
                lost = self.rng.choice(there)
                self.say(f"lose {name} {lost}")
                self.machine.must("block-dirty-bitmap-remove", node=name, name=lost)
            return
        store = LocalStore(self.stored.store) if name == "s" else Qcow2Store(self.paths[name])
        [node] = store.entries()
        if node.bitmaps:
            lost = self.rng.choice([each.name for each in node.bitmaps])
            self.say(f"lose {name} {lost}")
            offline.remove(store, [(node.name, lost)], lambda *_: None)

    def do_keep_or_put_back(self) -> None:
        """A copy of an image is an image of an earlier time, with its bitmaps."""
        if self.machine is not None:
            return
        name = self.rng.choice("ab")
        if name in self.kept and self.rng.random() < 0.7:
            self.say(f"put {name} back")
            self.paths[name].write_bytes(self.kept.pop(name))
            self.held[name] = self.read(name)
        else:
            self.say(f"keep {name}")
            self.kept[name] = self.paths[name].read_bytes()

    def do_prune(self) -> None:
        if (self.to / "manifest.json").exists():
            keep = self.rng.randrange(1, 4)
            self.say(f"prune {keep}")
            prune(self.to, keep=keep)

    # ---- backups ----------------------------------------------------------------------------

    def _sources(self, names: list[str] | None = None) -> tuple[list[str], list[Place]]:
        there = self.at_hand()
        names = names or self.rng.sample(there, self.rng.randrange(1, len(there) + 1))
        if self.machine is not None:
            return names, list(names)
        places = {name: Source(str(self.paths[name]), name) for name in "ab"}
        places["s"] = self.stored.source
        return names, [places[name] for name in names]

    def _now(self) -> dict[str, bytes]:
        return {name: bytes(held) for name, held in self.held.items()}

    def do_backup(self, only: list[str] | None = None) -> None:
        """With writes beside it; sometimes the machine is killed, at any step."""
        names, sources = self._sources(only)
        kill = ""
        if only is None and self.machine is not None and self.rng.random() < 0.15:
            kill = self.rng.choice(STEPS)
        writes = self.rng.sample(STEPS, 3) if self.machine is not None and not kill else []
        mode = self.rng.choice(["auto", "auto", "auto", "full"])
        self.say(f"backup {names} {mode} kill={kill} writes={writes}")
        then: dict[str, bytes] = {}

        def step(name: str) -> None:
            if name == "instant":
                then.update(self._now())
            if name == kill and self.machine is not None:
                self.machine.kill()
            if name in writes:
                self.do_write([each for each in names if each in self.at_hand()])

        qmp = None if self.machine is None else self.machine.qmp
        compress = self.rng.random() < 0.2
        try:
            done = backup(
                sources,
                self.to,
                qmp=qmp,
                mode=mode,
                granularity=self.granularity,
                hooks=Hooks(step=step),
                timeout=10,
                compress=compress,
            )
        except MonitorError:
            assert kill, self.log
        else:
            assert not done.failed, self.log
            assert {copy.disk for copy in done.point.copies} == set(names)
            self.points[done.point.id] = then
            for copy in done.point.copies:
                self.full += copy.parent is None
                self.increments += copy.parent is not None
        if kill:
            self._machine_is_dead()

    def do_killed_backup(self) -> None:
        """Nothing is written while it runs, so whatever it has listed is of now."""
        names, sources = self._sources()
        step = self.rng.choice(STEPS)
        self.say(f"backup {names} killed at {step}")
        before = self._listed()
        now = self._now()
        qmp = None if self.machine is None else self.machine.qmp
        ended = killed(sources, self.to, step, qmp=qmp, granularity=self.granularity)
        assert ended == signal.SIGKILL, self.log
        for name in names:
            self._wait_for_daemon(name)
        for point in self._listed() - before:
            self.points[point] = now

    def _wait_for_daemon(self, name: str) -> None:
        while self.machine is None and name in "ab":
            with suppress(BitmapError):
                Qcow2Store(self.paths[name]).open("x", None, read_only=False).close()
                return

    def _listed(self) -> set[str]:
        if not (self.to / "manifest.json").exists():
            return set()
        with Repository.open(self.to) as repository:
            return {point.id for point in repository.manifest.points}

    # ---- what must hold ---------------------------------------------------------------------

    def check(self) -> None:
        """Each listed point, by qemu-img alone; and by verify."""
        if not self._listed():
            return
        with Repository.open(self.to) as repository:
            for point in repository.manifest.points:
                for copy in point.copies:
                    got = content(repository.path_of(copy))
                    wanted = self.points[point.id][copy.disk]
                    assert got == wanted, (point.id, copy.disk, copy.reason, self.log)
        assert verify(self.to).good, self.log


@pytest.mark.parametrize("seed", SEEDS)
def test_each_listed_point_restores_exactly(memory_path: Path, seed: int) -> None:
    history = History(seed, memory_path)
    try:
        for _ in range(STEPS_IN_ONE):
            history.act()
        # In the end one that nothing disturbs, after which nothing is left over.
        history.do_write()
        history.do_backup()
        history.check()
    except BaseException:
        print("\n".join(history.log))
        raise
    finally:
        history.close()
        shutil.rmtree(history.folder, ignore_errors=True)
