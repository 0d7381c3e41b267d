# SPDX-License-Identifier: MIT
"""A database that is written to while its disks are backed up: each point is one of its states.

The database and its journal are two disks of a machine, mounted by FUSE, so what is restored can be
opened only if both are of one instant: then SQLite takes back what was not committed.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from daemon import qemu_img
from machines import Machine
from peers import lacking, package

from pybitmap.tools.backup import backup, restore, verify

package("qemu.qmp")
WRITER = Path(__file__).parent.parent / "support" / "database_writer.py"
SIZE = 8 << 20
#: By its disk.
FILES = {"data": "database", "journal": "database-journal"}


class Writer:
    """:mod:`database_writer`, in a process of its own."""

    def __init__(self, database: Path) -> None:
        self.committed = 0
        self.process = subprocess.Popen(
            [sys.executable, WRITER, database],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.committed = int(line)

    def wait_for(self, more: int) -> None:
        until = self.committed + more
        while self.committed < until:
            assert self.process.poll() is None, "the writer has ended"
            time.sleep(0.001)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        with self.process:
            self._thread.join()


def new_disks(folder: Path) -> dict[str, Path]:
    """An empty database, with room to grow, and a journal in which nothing is."""
    seed = folder / "seed"
    database = sqlite3.connect(seed)
    database.execute("CREATE TABLE entry (number INTEGER, place INTEGER PRIMARY KEY, data BLOB)")
    database.execute("CREATE TABLE total (number INTEGER)")
    database.execute("INSERT INTO total VALUES (0)")
    database.commit()
    database.close()
    os.truncate(seed, SIZE)
    disks = {disk: folder / f"{disk}.qcow2" for disk in FILES}
    qemu_img("convert", "-f", "raw", "-O", "qcow2", str(seed), str(disks["data"]))
    qemu_img("create", "-q", "-f", "qcow2", str(disks["journal"]), str(SIZE))
    return disks


@contextmanager
def mounted(machine: Machine, folder: Path) -> Iterator[Path]:
    """The disks of a machine as files."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        lacking("disks that are mounted by FUSE (/dev/fuse)")
    folder.mkdir()
    exports = []
    try:
        for disk, name in FILES.items():
            (folder / name).touch()
            reply = machine.execute(
                "block-export-add",
                {
                    "type": "fuse",
                    "id": f"x-{disk}",
                    "node-name": disk,
                    "mountpoint": str(folder / name),
                    "writable": True,
                },
            )
            if "error" in reply:
                lacking(f"disks that are mounted by FUSE ({reply['error']['desc']})")
            exports.append(disk)
        yield folder / "database"
    finally:
        for disk in exports:
            machine.must("block-export-del", id=f"x-{disk}", mode="hard")
        while machine.must("query-block-exports"):
            pass


def transactions(database: Path) -> int:
    """How many a database has had, which is whole."""
    with closing(sqlite3.connect(database)) as opened:
        assert opened.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        [(sum_of_all,)] = opened.execute("SELECT coalesce(sum(number), 0) FROM entry")
        [(newest,)] = opened.execute("SELECT coalesce(max(number), 0) FROM entry")
        [(total,)] = opened.execute("SELECT number FROM total")
    assert (sum_of_all, newest) == (0, total)
    return int(total)


def restored(to: Path, points: Mapping[str, str], folder: Path) -> Path:
    """
    :param points: by disk
    """
    folder.mkdir()
    for disk, name in FILES.items():
        restore(to, disk, at=points[disk], to=folder / name)
    return folder / "database"


def test_each_point_is_a_state_of_the_database(memory_path: Path) -> None:
    to, between = memory_path / "to", []
    with Machine(new_disks(memory_path), nbd=False) as machine:
        with mounted(machine, memory_path / "disks") as database:
            writer = Writer(database)
            try:
                for _ in range(5):
                    writer.wait_for(20)
                    before = writer.committed
                    done = backup(list(FILES), to, qmp=machine.qmp)
                    writer.wait_for(2)
                    between.append((before, done.point.id, writer.committed))
            finally:
                writer.stop()
        machine.stop()
    assert verify(to, full=True).good
    for number, (before, point, after) in enumerate(between):
        database = restored(to, dict.fromkeys(FILES, point), memory_path / str(number))
        assert before <= transactions(database) <= after


def test_disks_of_two_instants_are_no_state_of_the_database(memory_path: Path) -> None:
    """So the test above can fail."""
    to, torn = memory_path / "to", False
    machine = Machine(new_disks(memory_path), nbd=False)
    with machine, mounted(machine, memory_path / "disks") as database:
        writer = Writer(database)
        try:
            for number in range(20):
                points = {}
                for disk in ("journal", "data"):
                    writer.wait_for(3)
                    points[disk] = backup([disk], to, qmp=machine.qmp).point.id
                try:
                    transactions(restored(to, points, memory_path / str(number)))
                except (AssertionError, sqlite3.DatabaseError):
                    torn = True
                    break
        finally:
            writer.stop()
    assert torn


@pytest.fixture(autouse=True)
def _no_mounts_are_left(memory_path: Path) -> Iterator[None]:
    yield
    for name in FILES.values():
        subprocess.run(
            ["umount", "-l", memory_path / "disks" / name], check=False, capture_output=True
        )
