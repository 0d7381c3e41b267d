# SPDX-License-Identifier: MIT
"""Backups of disks that were tampered with: changed places, resized at the wrong moment, written by
a guest to look like something else; and directories that are moved, or take turns.

Each listed point has what its disk had, or nothing is listed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from backing_up import K, M, Raw, copied, fulls, new_image, nothing_left, ours
from daemon import qemu_img
from machines import Machine, content, write

from pybitmap import errors
from pybitmap.store import LocalStore, Qcow2Store
from pybitmap.tools.backup import Hooks, Source, backup


def filled(folder: Path, name: str, pattern: int, size: int = 1 * M) -> Path:
    path = new_image(folder, name, size)
    write(path, f"write -P {pattern} 0 {size}", format="qcow2")
    return path


# ---- disks that are others than before ------------------------------------------------------


def test_images_that_have_changed_places_are_copied_in_full(tmp_path: Path) -> None:
    to, a, b = tmp_path / "to", filled(tmp_path, "a", 1), filled(tmp_path, "b", 2)
    backup([a, b], to)
    a.rename(tmp_path / "c")
    b.rename(a)
    (tmp_path / "c").rename(b)
    done = backup([a, b], to)
    assert set(fulls(done)) == {"a.qcow2", "b.qcow2"}
    for disk in (a, b):
        assert copied(to, done, disk.name) == content(disk)


def test_disks_of_a_machine_that_have_changed_places_are_copied_in_full(tmp_path: Path) -> None:
    to, a, b = tmp_path / "to", filled(tmp_path, "a", 1), filled(tmp_path, "b", 2)
    with Machine({"a": a, "b": b}, nbd=False) as machine:
        backup(["a", "b"], to, qmp=machine.qmp)
        machine.stop()
    with Machine({"a": b, "b": a}, nbd=False) as machine:
        done = backup(["a", "b"], to, qmp=machine.qmp)
        assert set(fulls(done)) == {"a", "b"}
    assert copied(to, done, "a") == content(b)
    assert copied(to, done, "b") == content(a)


def test_nodes_of_a_store_that_have_changed_places_are_copied_in_full(tmp_path: Path) -> None:
    to, a, b = tmp_path / "to", Raw(tmp_path, "a", "a", M), Raw(tmp_path, "b", "b", M)
    a.write(1, 0, M)
    b.write(2, 0, M)
    backup([a.source, b.source], to)
    swapped = [
        Source(str(b.path), "a", str(b.store), "b"),
        Source(str(a.path), "b", str(a.store), "a"),
    ]
    done = backup(swapped, to)
    assert set(fulls(done)) == {"a", "b"}
    assert copied(to, done, "a") == b.path.read_bytes()
