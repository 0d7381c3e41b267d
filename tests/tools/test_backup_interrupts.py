# SPDX-License-Identifier: MIT
"""Ctrl-C at any line of a backup: all is put back, or it is done and listed.

Some lines of each module here; `make interrupts` has all (PYBITMAP_ALL_LINES=1).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from backing_up import (
    Place,
    Raw,
    copied,
    fulls,
    needed,
    new_image,
    nothing_left,
    of,
    ours,
    settled,
)
from lines import Interruption, interrupted
from machines import Machine, content, write
from peers import package, peer

from pybitmap.store import LocalStore, Qcow2Store
from pybitmap.tools.backup import Repository, backup

package("qemu.qmp")
peer("qemu-storage-daemon", "qemu-system-common")

SAMPLE = 1


@pytest.fixture
def folder(memory_path: Path) -> Path:
    return memory_path


def lines_of(total: int) -> Iterator[int]:
    assert total > 20, "nothing was interrupted"
    if os.environ.get("PYBITMAP_ALL_LINES") == "1":
        return iter(range(1, total + 1))
    return iter(sorted(random.Random(total).sample(range(1, total + 1), SAMPLE)))


def points(to: Path) -> int:
    with Repository.open(to) as repository:
        return len(repository.manifest.points)


@pytest.mark.parametrize("module", ["run", "jobs", "live"])
def test_beside_a_machine(folder: Path, module: str) -> None:
    to, within = folder / "to", f"tools/backup/{module}"
    with Machine({"a": new_image(folder, "a")}) as machine:
        machine.write("a", "write -P 1 0 1M")
        backup(["a"], to, qmp=machine.qmp)
        with interrupted(0, within=within) as lines:
            backup(["a"], to, qmp=machine.qmp)
        for at in lines_of(lines.passed):
            machine.write("a", f"write -P {at % 255} 64k 100k")
            with interrupted(at, within=within) as come, suppress(Interruption):
                backup(["a"], to, qmp=machine.qmp)
            assert come.came
            assert machine.jobs() == [], come.where
            assert [each for each in machine.nodes() if "pybitmap" in each] == [], come.where
            nothing_left(to, points(to))
            done = backup(["a"], to, qmp=machine.qmp)
            assert not fulls(done), come.where
            settled(machine, done, "a")
            assert copied(to, done, "a") == of(machine, "a"), come.where


@pytest.mark.parametrize("module", ["run", "jobs", "images"])
def test_of_disks_that_are_off(folder: Path, module: str) -> None:
    a, raw, to = new_image(folder, "a"), Raw(folder, "r"), folder / "to"
    sources: list[Place] = [a, raw.source]
    within = f"tools/backup/{module}"
    backup(sources, to)
    with interrupted(0, within=within) as lines:
        backup(sources, to)
    for at in lines_of(lines.passed):
        write(a, f"write -P {at % 255} 64k 100k", format="qcow2")
        raw.write(at % 255, 65536, 1000)
        with interrupted(at, within=within) as come, suppress(Interruption):
            backup(sources, to)
        assert come.came
        nothing_left(to, points(to))
        done = backup(sources, to)
        assert not fulls(done), come.where
        assert ours(Qcow2Store(a)) == needed(done, "a.qcow2")
        assert ours(LocalStore(raw.store)) == needed(done, "r")
        assert copied(to, done, "a.qcow2") == content(a), come.where
        assert copied(to, done, "r") == raw.path.read_bytes(), come.where
