# SPDX-License-Identifier: MIT
"""What tests of backups share: disks, what a point has of them, a backup that is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Union

from daemon import qemu_img
from machines import Machine, content

from pybitmap import BlockGraph, offline
from pybitmap.store import LocalStore, Qcow2Store
from pybitmap.tools.backup import Backup, Hooks, Repository, Source, backup

K, M = 1 << 10, 1 << 20
Place = Union[str, Path, Source]


def new_image(folder: Path, name: str, size: int = 4 * M, **options: Any) -> Path:
    """An empty qcow2 image."""
    path = folder / f"{name}.qcow2"
    more = ["-o", ",".join(f"{key}={value}" for key, value in options.items())] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *more, str(path), str(size))
    return path


def new_raw(folder: Path, name: str, size: int = 4 * M) -> Path:
    path = folder / f"{name}.raw"
    path.touch()
    os.truncate(path, size)
    return path


class Raw:
    """A raw disk whose writer marks in a local store."""

    def __init__(self, folder: Path, name: str, node: str = "vm", size: int = 4 * M) -> None:
        self.path, self.store, self.node = new_raw(folder, name, size), folder / "store", node
        offline.add(LocalStore(self.store), (node, "daily"), lambda *_: None, size=size)
        self.source = Source(str(self.path), name, str(self.store), node)

    def write(self, pattern: int, offset: int, nbytes: int) -> None:
        with BlockGraph() as graph, self.path.open("r+b") as file:
            node = graph.add_node(self.node, store=LocalStore(self.store))
            with node.writing(offset, nbytes):
                file.seek(offset)
                file.write(bytes([pattern]) * nbytes)
                file.flush()

    def resize(self, *sizes: int) -> None:
        for size in sizes:
            os.truncate(self.path, size)
            offline.resize(LocalStore(self.store), self.node, size, lambda *_: None, shrink=True)


def of(machine: Machine, disk: str) -> bytes:
    """What a disk of a machine has now."""
    path = machine.disks[disk]
    return content(path, shared=True, format="raw" if path.suffix == ".raw" else "qcow2")


def copied(to: Path, done: Backup, disk: str) -> bytes:
    """What its copy has, by qemu-img alone."""
    copy = done.point.copy_of(disk)
    assert copy is not None
    return content(to / copy.file)


def fulls(done: Backup) -> dict[str, str | None]:
    """Of disks that were copied in full, the reason."""
    return {copy.disk: copy.reason for copy in done.point.copies if copy.parent is None}


def ours(store: LocalStore | Qcow2Store) -> set[str]:
    """Bitmaps of backups in a store that nobody has open; none is in use."""
    bitmaps = [each for node in store.entries() for each in node.bitmaps]
    assert not any(each.in_use for each in bitmaps)
    return {each.name for each in bitmaps if each.name.startswith("pybitmap-")}


def needed(done: Backup, disk: str) -> set[str | None]:
    """Bitmaps that a disk is to have now, and no others of backups."""
    copy = done.point.copy_of(disk)
    assert copy is not None
    return {copy.bitmap, f"{copy.bitmap}-uncut"}


def settled(machine: Machine, done: Backup, *disks: str) -> None:
    """Nothing of ours is left in a machine but the bitmaps of the newest point."""
    assert machine.jobs() == []
    assert [each for each in machine.nodes() if each.startswith("pybitmap")] == []
    for disk in disks:
        assert {each for each in machine.bitmaps(disk) if each.startswith("pybitmap-")} == needed(
            done, disk
        )


def nothing_left(to: Path, points: int) -> None:
    """In a backup directory, of what no point names."""
    with Repository.open(to) as repository:
        assert len(repository.manifest.points) == points
        assert repository.leftovers() == []


def killed(
    sources: Iterable[Place], to: Path, step: str, number: int = signal.SIGKILL, **how: Any
) -> int:
    """A backup in a process of its own, which gets a signal when it has come to a step.

    :returns: the signal that it has died of; 0: none
    """

    def end(name: str) -> None:
        if name == step:
            os.kill(os.getpid(), number)

    child = os.fork()
    if not child:
        with suppress(BaseException):
            signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
            backup(list(sources), to, hooks=Hooks(step=end), **how)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
