# SPDX-License-Identifier: MIT
"""Backups of disks that have changed places, or that a guest has written to look like something
else; and directories that are moved, or take turns.

Each listed point has what its disk had, or nothing is listed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from backing_up import (
    K,
    M,
    Raw,
    copied,
    fulls,
    killed,
    needed,
    new_image,
    nothing_left,
    of,
    ours,
    settled,
)
from daemon import qemu_img
from machines import Machine, content, write

from pybitmap import errors, offline
from pybitmap.store import LocalStore, Qcow2Store
from pybitmap.tools.backup import (
    Hooks,
    JobError,
    Source,
    backup,
    points,
    prune,
    restore,
    verify,
)


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


# ---- directories that go elsewhere ----------------------------------------------------------


@pytest.mark.parametrize("how", ["moved", "deleted", "kept"])
def test_a_job_whose_directory_is_elsewhere_is_in_nobodys_way(tmp_path: Path, how: str) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    with Machine({"a": filled(tmp_path, "a", 1)}) as machine:
        backup(["a"], old, qmp=machine.qmp)
        machine.write("a", "write -P 2 0 1M")
        assert killed(["a"], old, "instant", qmp=machine.qmp, speed=65536) == signal.SIGKILL
        assert len(machine.jobs()) == 1
        if how == "moved":
            old.rename(new)
        elif how == "deleted":
            shutil.rmtree(old)
        done = backup(["a"], new, qmp=machine.qmp)
        assert copied(new, done, "a") == of(machine, "a")
        assert bool(fulls(done)) == (how != "moved")
        if how == "kept":  # another's, who may be at it
            assert len(machine.jobs()) == 1
            done = backup(["a"], old, qmp=machine.qmp)
            assert not fulls(done)
        assert machine.jobs() == []
        assert [each for each in machine.nodes() if each.startswith("pybitmap-")] == []


def test_directories_at_one_path_by_turns_each_go_on(tmp_path: Path) -> None:
    place, disk = tmp_path / "mounted", filled(tmp_path, "a", 1)
    for number in range(4):
        other = tmp_path / f"disk-{number % 2}"
        if other.exists():
            other.rename(place)
        write(disk, f"write -P {number} {number * 64}k 64k", format="qcow2")
        done = backup([disk], place)
        assert bool(fulls(done)) == (number < 2)
        assert copied(place, done, disk.name) == content(disk)
        place.rename(other)


# ---- what a guest writes into its disk, and who may read it ---------------------------------


def looks_like_an_image(disk: Path, names: Path) -> None:
    """Begins as a qcow2 image over another file, as a guest could write it."""
    fake = disk.with_name("fake.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(names), "-F", "raw", str(fake), "1M")
    with disk.open("r+b") as file:
        file.write(fake.read_bytes())
    fake.unlink()


def test_a_raw_disk_that_looks_like_an_image_is_raw(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 100000)
    to, disk = tmp_path / "to", Raw(tmp_path, "a", size=2 * M)
    for _ in range(2):
        disk.write(1, 0, M)
        looks_like_an_image(disk.path, secret)
        done = backup([disk.source], to)
        restored = restore(to, to=tmp_path / "restored.raw", force=True)
        assert restored.path.read_bytes() == disk.path.read_bytes()
        assert b"secretsecret" not in copied(to, done, "a")
    with pytest.raises(errors.InvalidError, match="that names"):
        verify(to, against=disk.path)
    assert verify(to, against=disk.path, against_format="raw").good


def test_copies_and_restored_disks_are_for_their_user_alone(tmp_path: Path) -> None:
    to, disk = tmp_path / "to", filled(tmp_path, "a", 1)
    to.mkdir(mode=0o755)
    before = os.umask(0o022)
    try:
        for _ in range(2):
            backup([disk], to)
        made = [restore(to, to=tmp_path / each, format=each).path for each in ("raw", "qcow2")]
    finally:
        os.umask(before)
    for path in [*to.iterdir(), *made]:
        assert path.stat().st_mode & 0o077 == 0, path


# ---- bitmaps of which somebody thinks that they are his -------------------------------------


def test_a_bitmap_that_somebody_has_cleared_is_not_believed(tmp_path: Path) -> None:
    """Of a machine; and what is written after that does not hide it."""
    to, a, b = tmp_path / "to", filled(tmp_path, "a", 1), filled(tmp_path, "b", 1)
    with Machine({"a": a, "b": b}) as machine:
        done = backup(["a", "b"], to, qmp=machine.qmp)
        machine.write("a", "write -P 2 0 64k")
        cleared = done.point.copies[0].bitmap
        machine.must("block-dirty-bitmap-clear", node="a", name=cleared)
        machine.write("a", "write -P 3 128k 64k")
        done = backup(["a", "b"], to, qmp=machine.qmp)
        assert f"cleared bitmap '{cleared}'" in done.failed["a"]
        assert [each.disk for each in done.point.copies] == ["b"]
        done = backup(["a", "b"], to, qmp=machine.qmp)
        assert list(fulls(done)) == ["a"]
        settled(machine, done, "a", "b")
        assert copied(to, done, "a") == of(machine, "a")


@pytest.mark.parametrize("raw", [False, True])
def test_a_cleared_bitmap_of_a_disk_that_is_off_is_not_believed(tmp_path: Path, raw: bool) -> None:
    to = tmp_path / "to"
    disk = Raw(tmp_path, "a", size=M)
    image = filled(tmp_path, "a", 1)
    store = LocalStore(disk.store) if raw else Qcow2Store(str(image))
    source = disk.source if raw else image
    done = backup([source], to)
    disk.write(2, 0, 64 * K)
    write(image, "write -P 2 0 64k", format="qcow2")
    name = "vm" if raw else None, str(done.point.copies[0].bitmap)
    offline.clear(store, [name], lambda *_: None)
    with pytest.raises(JobError, match="cleared bitmap"):
        backup([source], to)
    nothing_left(to, 1)
    done = backup([source], to)
    assert fulls(done)
    now = disk.path.read_bytes() if raw else content(image)
    assert copied(to, done, done.point.copies[0].disk) == now
    assert not fulls(backup([source], to))


# ---- disks that are something else ----------------------------------------------------------


@pytest.mark.parametrize("link", [False, True])
def test_a_copy_is_no_disk_to_be_backed_up_where_it_lies(tmp_path: Path, link: bool) -> None:
    to = tmp_path / "to"
    done = backup([filled(tmp_path, "a", 1)], to)
    source = to / done.point.copies[0].file
    if link:
        (tmp_path / "link").symlink_to(source)
        source = tmp_path / "link"
    with pytest.raises(errors.InvalidError, match="lies in the backup directory itself"):
        backup([source], to)
    assert verify(to).good


def test_a_snapshot_right_before_the_instant_is_noticed(tmp_path: Path) -> None:
    to, overlay = tmp_path / "to", tmp_path / "overlay.qcow2"
    drive = f"file={filled(tmp_path, 'a', 1)},format=qcow2,if=virtio,id=vda"
    with Machine({}, system=True, drive=drive, nbd=False) as machine:

        def snapshot() -> None:
            machine.must(
                "blockdev-snapshot-sync",
                device="vda",
                snapshot_file=str(overlay),
                format="qcow2",
                snapshot_node_name="overlay",
            )

        backup(["vda"], to, qmp=machine.qmp)
        assert not fulls(backup(["vda"], to, qmp=machine.qmp))
        with pytest.raises(errors.StateError, match="became another node"):
            backup(["vda"], to, qmp=machine.qmp, hooks=Hooks(before=snapshot))
        assert machine.jobs() == []
        nothing_left(to, 2)
        done = backup(["vda"], to, qmp=machine.qmp)
        assert "snapshotted" in str(fulls(done)["vda"])
        assert set(machine.bitmaps("overlay")) == needed(done, "vda")


@pytest.mark.parametrize("step", ["", "planned", "targets", "before"])
def test_a_machine_that_has_not_arrived_or_has_gone_is_not_backed_up(
    tmp_path: Path, step: str
) -> None:
    """Its disks are written to by another one."""
    to = tmp_path / "to"
    drive = f"file={filled(tmp_path, 'a', 1)},format=qcow2,if=virtio,id=vda"
    with (
        Machine({}, system=True, drive=drive, nbd=False) as here,
        Machine({}, system=True, drive=drive, nbd=False, incoming=True) as there,
    ):

        def go(name: str) -> None:
            if name == step:
                here.migrate(there)

        first = backup(["vda"], to, qmp=here.qmp)
        with pytest.raises(errors.StateError, match="'inmigrate', in which its disks are those of"):
            backup(["vda"], to, qmp=there.qmp)
        go("")
        with pytest.raises(errors.StateError, match="'postmigrate', in which its disks are those"):
            backup(["vda"], to, qmp=here.qmp, hooks=Hooks(step=go))
        assert here.jobs() == there.jobs() == []
        nothing_left(to, 1)
        there.must("cont")  # before that, disks are nobody's for QEMU 10
        there.must("stop")
        done = backup(["vda"], to, qmp=there.qmp)
        assert not fulls(done)
        assert done.point.copies[0].parent == first.point.id


PLACES = ["missing", "folder", "pipe", "socket", "loop", "file/below", "x" * 5000]


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_disk_no_directory_and_no_monitor_is_refused_by_errors_of_ours(
    tmp_path: Path, place: str
) -> None:
    """And none is waited for."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "file").write_bytes(bytes(M))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    to, disk, other = tmp_path / "to", filled(tmp_path, "a", 1), tmp_path / "other"
    backup([disk], to)
    wrong = tmp_path / place
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(errors.BitmapError):
            backup([disk, wrong], other)
        assert not other.exists()
        calls: list[Callable[[], object]] = [
            lambda: backup([wrong], other),
            lambda: backup([Source(str(tmp_path / "file"), store=str(wrong))], other),
            lambda: backup(["vda"], other, qmp=wrong),
            lambda: restore(wrong, to=tmp_path / "restored"),
            lambda: verify(wrong),
            lambda: verify(to, against=wrong),
            lambda: verify(to, against=wrong, against_format="raw"),
            lambda: prune(wrong, keep=1),
            lambda: points(wrong),
        ]
        if place != "missing":
            calls += [
                lambda: backup([disk], wrong),
                lambda: restore(to, to=wrong),
                lambda: restore(to, to=wrong, force=True),
            ]
        for call in calls:
            with pytest.raises(errors.BitmapError):
                call()


def test_a_working_directory_that_is_gone_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to, disk, gone = tmp_path / "to", filled(tmp_path, "a", 1), tmp_path / "gone"
    backup([disk], to)
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    calls: list[Callable[[], object]] = [
        lambda: backup([disk], "other"),
        lambda: backup(["a.qcow2"], to),
        lambda: restore("to", to=tmp_path / "restored"),
        lambda: restore(to, to="restored"),
        lambda: verify(to, against="a.qcow2"),
        lambda: prune("to", keep=1),
        lambda: points("to"),
    ]
    for call in calls:
        with pytest.raises(errors.StoreError, match="cannot look at"):
            call()
    assert not fulls(backup([disk], to))
    assert verify(to, against=disk).good


def test_an_encrypted_image_is_not_touched(tmp_path: Path) -> None:
    image = filled(tmp_path, "a", 1)
    with image.open("r+b") as file:  # the method: making a key takes what processors are busy with
        file.seek(32)
        file.write((1).to_bytes(4, "big"))
    before = image.read_bytes()
    with pytest.raises(errors.UnsupportedError, match="encrypted"):
        backup([image], tmp_path / "to")
    assert image.read_bytes() == before


def test_a_raw_disk_of_a_machine_that_runs_is_not_touched(tmp_path: Path) -> None:
    to, disk = tmp_path / "to", Raw(tmp_path, "a", size=M)
    with Machine({"a": disk.path}), pytest.raises(errors.LockedError, match="by a machine"):
        backup([disk.source], to)
    assert ours(LocalStore(disk.store)) == set()
    backup([disk.source], to)


def test_a_raw_disk_that_was_restored_is_copied_in_full(tmp_path: Path) -> None:
    """Its store does not know of that."""
    to, disk = tmp_path / "to", Raw(tmp_path, "a", size=M)
    disk.write(1, 0, M)
    first = backup([disk.source], to)
    disk.write(2, 0, 512 * K)
    backup([disk.source], to)
    assert not fulls(backup([disk.source], to))
    restore(to, at=first.point.id, to=disk.path, force=True)
    done = backup([disk.source], to)
    assert "its file is another" in str(fulls(done)["a"])
    assert copied(to, done, "a") == disk.path.read_bytes() == bytes([1]) * M
    disk.path.rename(tmp_path / "moved")
    shutil.copy(tmp_path / "moved", disk.path)
    disk.path.unlink()
    (tmp_path / "moved").rename(disk.path)
    assert not fulls(backup([disk.source], to))
