# SPDX-License-Identifier: MIT
"""Backups that are killed, or whose QEMU is, at every step, and what the next one makes of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from backing_up import (
    K,
    M,
    Place,
    Raw,
    copied,
    fulls,
    killed,
    needed,
    new_image,
    new_raw,
    nothing_left,
    of,
    ours,
    settled,
)
from machines import Machine, content, write
from peers import package, peer

from pybitmap.errors import LockedError
from pybitmap.store import LocalStore, Qcow2Store
from pybitmap.store.qcow2 import store
from pybitmap.store.qcow2.file import File
from pybitmap.tools.backup import Hooks, backup
from pybitmap.tools.backup.run import STEPS
from pybitmap.tools.monitor import MonitorError

package("qemu.qmp")
peer("qemu-storage-daemon", "qemu-system-common")

#: From here on the killed run's point is listed.
LISTED = STEPS[STEPS.index("listed") :]


@pytest.fixture
def folder(memory_path: Path) -> Path:
    return memory_path


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    with Machine({"a": new_image(folder, "a"), "r": new_raw(folder, "r")}) as made:
        yield made


#: Step, and whether it is the first backup.
LIVE = [*((step, False) for step in STEPS), ("instant", True), ("copied", True), ("hashed", True)]


@pytest.mark.parametrize(("step", "first"), LIVE)
def test_killed_beside_a_machine_nothing_is_left_and_nothing_is_missed(
    machine: Machine, folder: Path, step: str, first: bool
) -> None:
    to = folder / "to"
    before = 0
    if not first:
        machine.write("a", "write -P 1 0 2M")
        machine.write("r", "write -P 1 0 2M")
        backup(["a", "r"], to, qmp=machine.qmp)
        before = 1
    machine.write("a", "write -P 2 1M 100k")
    machine.write("r", "write -P 2 1M 100k")
    speed = M if step in ("instant", "after") else 0  # so that jobs run when it dies
    assert killed(["a", "r"], to, step, qmp=machine.qmp, speed=speed) == signal.SIGKILL
    machine.write("a", "write -P 3 3M 100k", "write -z 0 64k")
    machine.write("r", "write -P 3 3M 100k", "write -z 0 64k")
    done = backup(["a", "r"], to, qmp=machine.qmp)
    assert set(fulls(done)) == ({"a", "r"} if first else set())
    settled(machine, done, "a", "r")
    nothing_left(to, before + 1 + (step in LISTED))
    for disk in "ar":
        assert copied(to, done, disk) == of(machine, disk)


@pytest.mark.parametrize("step", STEPS)
def test_killed_beside_disks_that_are_off_nothing_is_left_and_nothing_is_missed(
    folder: Path, step: str
) -> None:
    a, raw, to = new_image(folder, "a"), Raw(folder, "r"), folder / "to"
    sources: list[Place] = [a, raw.source]
    write(a, "write -P 1 0 2M", format="qcow2")
    raw.write(1, 0, 2 * M)
    backup(sources, to)
    write(a, "write -P 2 1M 100k", format="qcow2")
    raw.write(2, M, 100 * K)
    assert killed(sources, to, step) == signal.SIGKILL
    while _is_locked(a):
        pass  # the daemon is dying
    write(a, "write -P 3 3M 100k", format="qcow2")
    raw.write(3, 3 * M, 100 * K)
    done = backup(sources, to)
    assert not fulls(done)
    assert ours(Qcow2Store(a)) == needed(done, "a.qcow2")
    assert ours(LocalStore(raw.store)) == needed(done, "r")
    nothing_left(to, 2 + (step in LISTED))
    assert copied(to, done, "a.qcow2") == content(a)
    assert copied(to, done, "r") == raw.path.read_bytes()


def _is_locked(image: Path) -> bool:
    try:
        Qcow2Store(image).open("x", None, read_only=False).close()
    except LockedError:
        return True
    return False


@pytest.mark.parametrize(
    "step", ["recovered", "targets", "instant", "copied", "finished", "hashed", "removed"]
)
def test_a_machine_that_dies_costs_a_full_copy_at_most(
    machine: Machine, folder: Path, step: str
) -> None:
    to = folder / "to"
    machine.write("a", "write -P 1 0 2M")
    backup(["a", "r"], to, qmp=machine.qmp)
    machine.write("a", "write -P 2 1M 100k")

    def kill(now: str) -> None:
        if now == step:
            os.kill(machine.pid, signal.SIGKILL)

    listed = 1 + (step in STEPS[STEPS.index("finished") :])
    if listed == 2:
        done = backup(["a", "r"], to, qmp=machine.qmp, hooks=Hooks(step=kill))
        assert len(done.notes) == (0 if step == "removed" else 2)
    else:
        with pytest.raises(MonitorError):
            backup(["a", "r"], to, qmp=machine.qmp, hooks=Hooks(step=kill))
    nothing_left(to, listed)
    machine.kill()
    machine.start()
    machine.write("a", "write -P 3 3M 100k")
    done = backup(["a", "r"], to, qmp=machine.qmp)
    assert set(fulls(done)) == {"a", "r"}
    assert "was killed" in str(fulls(done)["a"])
    settled(machine, done, "a", "r")
    nothing_left(to, listed + 1)
    assert copied(to, done, "a") == of(machine, "a")
    assert not fulls(backup(["a", "r"], to, qmp=machine.qmp))


@pytest.mark.parametrize("step", ["prepared", "instant", "copied", "finished"])
def test_a_daemon_that_dies_leaves_all_as_it_was(folder: Path, step: str) -> None:
    a, raw, to = new_image(folder, "a"), Raw(folder, "r"), folder / "to"
    sources: list[Place] = [a, raw.source]
    write(a, "write -P 1 0 2M", format="qcow2")
    first = backup(sources, to)
    write(a, "write -P 2 1M 100k", format="qcow2")

    def kill(now: str) -> None:
        if now == step:
            [pid] = _daemons()
            os.kill(pid, signal.SIGKILL)

    if step == "finished":
        done = backup(sources, to, hooks=Hooks(step=kill))
    else:
        with pytest.raises(MonitorError):
            backup(sources, to, hooks=Hooks(step=kill))
        assert ours(Qcow2Store(a)) == needed(first, "a.qcow2")
        assert ours(LocalStore(raw.store)) == needed(first, "r")
        nothing_left(to, 1)
        done = backup(sources, to)
    assert not fulls(done)
    assert copied(to, done, "a.qcow2") == content(a)


def _daemons() -> list[int]:
    """Children of ours that are one."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("only Linux tells which processes there are")
    found = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = each.read_text().rpartition(")")[2].split()
            command = (each.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(words[1]) == os.getpid() and b"qemu-storage-daemon" in command and words[0] != "Z":
            found.append(int(each.parent.name))
    return found


def test_killed_at_every_write_to_an_image_it_stays_usable(folder: Path) -> None:
    """And to the copies that are made: whatever our own code writes to an image."""
    to, path = folder / "to", new_image(folder, "a")
    write(path, "write -P 1 0 1M", format="qcow2")
    backup([path], to)
    for number in range(1, 200):
        if not _killed_at_write(path, to, number):
            break
        while _is_locked(path):
            pass
        assert ours(Qcow2Store(path))  # none of them in use
        write(path, f"write -P {number} {number * 8}k 8k", format="qcow2")
        done = backup([path], to)
        assert not fulls(done)
        assert ours(Qcow2Store(path)) == needed(done, "a.qcow2")
        assert copied(to, done, "a.qcow2") == content(path)
    assert 8 < number < 100


def _killed_at_write(path: Path, to: Path, number: int) -> bool:
    """Runs a backup that is killed at the n-th write or sync of ours; False: there were less."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)
    left = [number]

    def call() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    class Killed(File):
        def _pwritev(self, pieces: Sequence[memoryview], offset: int) -> int:
            call()
            return super()._pwritev(pieces, offset)

        def _fdatasync(self) -> None:
            call()
            super()._fdatasync()

    setattr(store, "File", Killed)  # noqa: B010
    with suppress(BaseException):
        backup([path], to)
    os._exit(0)
