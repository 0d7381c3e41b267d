# SPDX-License-Identifier: MIT
"""Backups of disks that nobody has open: qcow2 images, and raw disks with a local store."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from backing_up import K, M, Place, Raw, copied, fulls, needed, new_image, ours
from daemon import qemu_img
from filesystems import loop_device, mounted
from machines import Machine, content, write
from peers import package, peer

from pybitmap import BlockGraph
from pybitmap.errors import (
    BitmapError,
    InvalidError,
    LockedError,
    MismatchError,
    NotFoundError,
    StateError,
)
from pybitmap.store import LocalStore, Qcow2Store
from pybitmap.tools.backup import Hooks, Repository, Source, backup, restore, verify
from pybitmap.tools.backup.run import STEPS

package("qemu.qmp")
peer("qemu-storage-daemon", "qemu-system-common")


def fill_up(folder: Path) -> None:
    """Until there is no room left."""
    file = os.open(folder / "fill", os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while True:
            os.write(file, bytes(4096))
    os.close(file)


@pytest.fixture
def folder(memory_path: Path) -> Path:
    return memory_path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_images_and_raw_disks_in_one_call_restore_each_point(folder: Path) -> None:
    a, raw, to = new_image(folder, "a"), Raw(folder, "r"), folder / "to"
    write(a, "write -P 1 0 2M", format="qcow2")
    raw.write(1, 0, 2 * M)
    points = []
    for number in range(4):
        write(a, f"write -P {number + 2} {number * 300}k 100k", "write -z 1M 64k", format="qcow2")
        raw.write(number + 9, number * 300 * K, 100 * K)
        done = backup([a, raw.source], to)
        points.append((done, content(a), raw.path.read_bytes()))
        assert set(fulls(done)) == ({"a.qcow2", "r"} if number == 0 else set())
        assert done.notes == ()
        assert ours(Qcow2Store(a)) == needed(done, "a.qcow2")
        assert ours(LocalStore(raw.store)) == needed(done, "r")
    for done, of_a, of_raw in points:
        assert copied(to, done, "a.qcow2") == of_a
        assert copied(to, done, "r") == of_raw
    assert max(copy.nbytes for done, *_ in points[1:] for copy in done.point.copies) < 2 * M
    [node] = LocalStore(raw.store).entries()
    assert node.bitmaps[0].name == "daily"
    qemu_img("check", str(a))


def test_a_machine_goes_on_where_the_image_was_backed_up_and_the_other_way_round(
    folder: Path,
) -> None:
    a, to = new_image(folder, "a"), folder / "to"
    backup([Source(str(a), "a")], to)
    with Machine({"a": a}) as machine:
        machine.write("a", "write -P 3 1M 64k")
        done = backup(["a"], to, qmp=machine.qmp)
        assert not fulls(done)
        machine.write("a", "write -P 4 2M 64k")
        machine.stop()
    done = backup([Source(str(a), "a")], to)
    assert not fulls(done)
    assert copied(to, done, "a") == content(a)


@pytest.mark.parametrize("small", [M + 512, 4 * M - 512])
def test_what_a_disk_loses_by_shrinking_does_not_come_back(folder: Path, small: int) -> None:
    a, raw, to = new_image(folder, "a"), Raw(folder, "r"), folder / "to"
    write(a, "write -P 7 0 4M", format="qcow2")
    raw.write(7, 0, 4 * M)
    backup([a, raw.source], to)
    qemu_img("resize", "-q", "--shrink", str(a), str(small))
    qemu_img("resize", "-q", str(a), "4M")
    raw.resize(small, 4 * M)
    write(a, "write -P 8 4194176 128", format="qcow2")
    raw.write(8, 4 * M - 128, 128)
    done = backup([a, raw.source], to)
    assert copied(to, done, "a.qcow2") == content(a)
    assert copied(to, done, "r") == raw.path.read_bytes()
    if 4 * M - small >= 64 * K:
        assert {str(each)[:26] for each in fulls(done).values()} == {"the disk was smaller for a"}
    qemu_img("resize", "-q", "--shrink", str(a), str(small))
    raw.resize(small)
    between = backup([a, raw.source], to)
    assert not fulls(between)
    assert copied(to, between, "a.qcow2") == content(a)
    qemu_img("resize", "-q", str(a), "4M")
    raw.resize(4 * M)
    done = backup([a, raw.source], to)
    assert copied(to, done, "a.qcow2") == content(a)
    assert copied(to, done, "r") == raw.path.read_bytes()


def test_an_image_that_a_machine_has_open_is_refused_and_points_to_its_monitor(
    folder: Path,
) -> None:
    a, to = new_image(folder, "a"), folder / "to"
    with Machine({"a": a}), pytest.raises(LockedError, match="--qmp"):
        backup([a], to)
    assert ours(Qcow2Store(a)) == set()


def test_a_raw_disk_that_is_served_is_refused(folder: Path) -> None:
    raw, to = Raw(folder, "r"), folder / "to"
    with BlockGraph() as graph:
        graph.add_node("vm", store=LocalStore(raw.store))
        with pytest.raises(LockedError, match="program that serves it"):
            backup([raw.source], to)
    assert ours(LocalStore(raw.store)) == set()


@pytest.mark.parametrize("step", ["prepared", "instant", "copied"])
def test_nobody_can_write_to_a_disk_while_it_is_copied(folder: Path, step: str) -> None:
    a, raw, to = new_image(folder, "a"), Raw(folder, "r"), folder / "to"
    refused = []

    def attempt(now: str) -> None:
        if now == step:
            with pytest.raises(BitmapError):
                raw.write(3, 0, 512)
            said = subprocess.run(
                ["qemu-io", "-c", "write 0 1k", str(a)], capture_output=True, text=True
            )
            assert "lock" in said.stderr
            refused.append(now)

    backup([a, raw.source], to, hooks=Hooks(step=attempt))
    assert refused == [step]


def test_a_disk_that_is_in_use_afterwards_keeps_its_old_bitmap_until_the_next_time(
    folder: Path,
) -> None:
    a, to = new_image(folder, "a"), folder / "to"
    backup([a], to)
    machines = []

    def start(step: str) -> None:
        if step == "listed":
            machines.append(Machine({"a.qcow2": a}))

    done = backup([a], to, hooks=Hooks(step=start))
    assert not fulls(done)
    assert len(done.notes) == 1
    assert "until its next backup" in done.notes[0]
    with machines[0] as machine:
        machine.write("a.qcow2", "write -P 3 0 64k")
        done = backup(["a.qcow2"], to, qmp=machine.qmp)
        assert not fulls(done)
        assert len([each for each in machine.bitmaps("a.qcow2") if "pybitmap" in each]) == 2
        assert copied(to, done, "a.qcow2") == content(a, shared=True)


def test_a_raw_disk_of_another_size_than_its_node_is_refused(folder: Path) -> None:
    raw, to = Raw(folder, "r"), folder / "to"
    os.truncate(raw.path, 5 * M)
    with pytest.raises(MismatchError, match="pybitmap resize"):
        backup([raw.source], to)


def test_a_raw_disk_that_qemu_would_round_is_refused(folder: Path) -> None:
    raw, to = Raw(folder, "r", size=4 * M + 100), folder / "to"
    with pytest.raises(InvalidError, match="multiple of 512"):
        backup([raw.source], to)


def _plain(folder: Path) -> Source:
    (folder / "p.raw").write_bytes(bytes(M))
    return Source(str(folder / "p.raw"))


def _wrong_node(folder: Path) -> Source:
    return Source(Raw(folder, "r").source.place, store=str(folder / "store"), node="other")


def _image_and_store(folder: Path) -> Source:
    Raw(folder, "r")
    return Source(str(new_image(folder, "a")), store=str(folder / "store"))


def _folder(folder: Path) -> Source:
    return Source(str(folder))


def _no_store(folder: Path) -> Source:
    return Source(_plain(folder).place, store=str(folder))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_plain, "store=DIR"),
        (_wrong_node, "nodes there: vm"),
        (_image_and_store, "leave out"),
        (_folder, "neither a file"),
        (_no_store, "not a local store"),
    ],
)
def test_what_is_no_such_disk_is_refused(
    folder: Path, make: Callable[[Path], Source], words: str
) -> None:
    with pytest.raises((InvalidError, NotFoundError), match=words):
        backup([make(folder)], folder / "to")


def test_the_same_disk_twice_is_refused(folder: Path) -> None:
    a = new_image(folder, "a")
    (folder / "link").symlink_to(a)
    with pytest.raises(InvalidError, match="same disk"):
        backup([a, folder / "link"], folder / "to")


def test_several_nodes_of_one_store_are_backed_up_together(folder: Path) -> None:
    one, two = Raw(folder, "one", "vm1"), Raw(folder, "two", "vm2", 2 * M)
    to = folder / "to"
    for pattern in (1, 2):
        one.write(pattern, 0, 100 * K)
        two.write(pattern, M, 100 * K)
        done = backup([one.source, two.source], to)
        assert copied(to, done, "one") == one.path.read_bytes()
        assert copied(to, done, "two") == two.path.read_bytes()
    assert not fulls(done)


def test_a_node_may_be_called_anything(folder: Path) -> None:
    for name in ("marks", "target", "a/b", "pybitmap-disk-0", "x" * 200):
        (folder / name[:5].replace("/", "")).mkdir()
        raw = Raw(folder / name[:5].replace("/", ""), "r", name)
        to = folder / name[:5].replace("/", "") / "to"
        for pattern in (1, 2):
            raw.write(pattern, 0, 512)
            done = backup([raw.source], to)
        assert not fulls(done)
        assert copied(to, done, "r") == raw.path.read_bytes()


def test_a_block_device_is_backed_up_as_a_raw_disk(folder: Path) -> None:
    raw, to = Raw(folder, "r"), folder / "to"
    with loop_device(raw.path) as device:
        source = Source(str(device), "r", str(raw.store), "vm")
        for pattern in (1, 2):
            raw.write(pattern, M, 64 * K)
            subprocess.run(["blockdev", "--flushbufs", device], check=True)
            done = backup([source], to)
            assert copied(to, done, "r") == raw.path.read_bytes()
        assert not fulls(done)


def test_an_image_over_another_is_copied_whole(folder: Path) -> None:
    base, to = new_image(folder, "base"), folder / "to"
    write(base, "write -P 5 0 4M", format="qcow2")
    top = folder / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", str(top))
    for number in (1, 2):
        write(top, f"write -P {number} {number}M 64k", format="qcow2")
        done = backup([top], to)
        assert copied(to, done, "top.qcow2") == content(top)
    assert not fulls(done)


def test_an_image_that_was_replaced_by_an_older_copy_is_copied_in_full(folder: Path) -> None:
    a, to = new_image(folder, "a"), folder / "to"
    write(a, "write -P 1 0 1M", format="qcow2")
    backup([a], to)
    kept = a.read_bytes()
    write(a, "write -P 2 0 1M", format="qcow2")
    backup([a], to)
    a.write_bytes(kept)
    done = backup([a], to)
    assert "restored" in str(fulls(done)["a.qcow2"])
    assert copied(to, done, "a.qcow2") == content(a)


def test_no_room_in_the_image_for_bitmaps_changes_nothing(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    with mounted(folder / "m", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as small:
        a, to = new_image(small, "a"), folder / "to"
        write(a, "write -P 1 0 512k", format="qcow2")
        fill_up(small)
        before = sha256(a)
        with pytest.raises(BitmapError):
            backup([a], to)
        assert sha256(a) == before
        with Repository.open(to) as repository:
            assert repository.leftovers() == []


def test_temporary_files_may_be_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where paths are too long for sockets, or have what QEMU's options are made of."""
    a, to, place = new_image(folder, "a"), folder / "to", folder / ("x" * 200) / "a,b=c d"
    place.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    for number in range(2):
        write(a, f"write -P {number} {number}M 1M", format="qcow2")
        backup([a], to)
    assert verify(to, full=True, against=a).good
    restored = restore(to, to=folder / "restored")
    assert restored.path.read_bytes() == content(a)
    assert list(place.iterdir()) == []


def test_a_file_that_nothing_can_be_written_to_is_refused_and_nothing_is_left(
    folder: Path,
) -> None:
    a = new_image(folder, "a")
    (folder / "file").write_text("x")
    for to in (folder / "file", folder / "missing" / "to", folder):
        with pytest.raises((BitmapError, OSError)):
            backup([a], to)
    assert ours(Qcow2Store(a)) == set()


def cut_by_truncate(raw: Raw) -> None:
    os.truncate(raw.path, M)
    os.truncate(raw.path, 4 * M)


def punch_a_hole(raw: Raw) -> None:
    write(raw.path, "discard 3M 64k", format="raw")


@pytest.mark.parametrize("change", [cut_by_truncate, punch_a_hole])
def test_holes_that_nobody_marked_are_found(folder: Path, change: Callable[[Raw], None]) -> None:
    raw, to = Raw(folder, "r"), folder / "to"
    raw.write(7, 2 * M, 2 * M)
    backup([raw.source], to)
    change(raw)
    raw.write(8, 0, 512)
    with pytest.raises(InvalidError, match="there is a hole at"):
        backup([raw.source], to, mode="incremental")
    done = backup([raw.source], to)
    assert "which no bitmap tells" in str(fulls(done)["r"])
    assert copied(to, done, "r") == raw.path.read_bytes()


def test_holes_beside_small_data_and_marked_ones_are_no_reason(folder: Path) -> None:
    raw, to = Raw(folder, "r"), folder / "to"
    raw.write(7, M, 4096)  # which is copied with the zeroes around it
    raw.write(7, 2 * M, 128 * K)
    backup([raw.source], to)
    raw.write(0, 2 * M, 128 * K)
    punch = ("discard 2M 128k",)
    write(raw.path, *punch, format="raw")
    done = backup([raw.source], to)
    assert not fulls(done)
    assert copied(to, done, "r") == raw.path.read_bytes()


@pytest.mark.parametrize("kind", ["image", "raw"])
@pytest.mark.parametrize(("old", "new"), [(64 * K, 64 * K), (M, 512), (4 * K, M)])
def test_a_disk_that_was_cut_amid_the_group_that_is_its_last_does_not_get_that_back(
    folder: Path, kind: str, old: int, new: int
) -> None:
    a, raw, to = new_image(folder, "a"), Raw(folder, "r"), folder / "to"
    write(a, "write -P 7 0 4M", format="qcow2")
    raw.write(7, 0, 4 * M)
    source: Place = a if kind == "image" else raw.source
    backup([source], to, granularity=old)
    sizes = old // 2, 4 * M, old
    raw.resize(*sizes)
    for size in sizes:
        qemu_img("resize", "-q", "--shrink", str(a), str(size))
    for _ in range(2):
        done = backup([source], to, granularity=new)
        assert not fulls(done) or kind == "raw"
        copy = done.point.copies[0]
        assert content(to / copy.file) == (content(a) if kind == "image" else raw.path.read_bytes())


@pytest.mark.parametrize("kind", ["image", "raw"])
@pytest.mark.parametrize("step", ["recovered", "planned"])
def test_a_disk_resized_before_it_is_locked_is_not_copied_wrong(
    folder: Path, kind: str, step: str
) -> None:
    a, raw, to = new_image(folder, "a"), Raw(folder, "r"), folder / "to"
    write(a, "write -P 7 0 4M", format="qcow2")
    raw.write(7, 0, 4 * M)
    source: Place = a if kind == "image" else raw.source
    backup([source], to)

    def resize(now: str) -> None:
        if now != step:
            return
        if kind == "raw":
            raw.resize(M, 4 * M)
        else:
            qemu_img("resize", "-q", "--shrink", str(a), str(M))
            qemu_img("resize", "-q", str(a), "4M")

    with pytest.raises(StateError, match="resized while the backup began"):
        backup([source], to, hooks=Hooks(step=resize))
    with Repository.open(to) as repository:
        assert len(repository.manifest.points) == 1
        assert repository.leftovers() == []
    done = backup([source], to)
    copy = done.point.copies[0]
    assert copy.parent is None
    assert content(to / copy.file) == (content(a) if kind == "image" else raw.path.read_bytes())


@pytest.mark.parametrize("kind", ["image", "raw"])
@pytest.mark.parametrize("step", STEPS[: STEPS.index("instant")])
def test_a_disk_replaced_before_it_is_copied_is_not_taken_for_what_it_was(
    folder: Path, kind: str, step: str
) -> None:
    to, disk, other = folder / "to", Raw(folder, "a"), folder / "other"
    image = new_image(folder, "a")
    disk.write(7, 0, M)
    write(image, "write -P 7 0 1M", format="qcow2")
    path, source = (image, Source(str(image))) if kind == "image" else (disk.path, disk.source)
    backup([source], to)
    before = content(image) if kind == "image" else path.read_bytes()
    if kind == "image":
        qemu_img("create", "-q", "-f", "qcow2", str(other), "4M")
        write(other, "write -P 8 0 4M", format="qcow2")
    else:
        other.write_bytes(bytes([8]) * 4 * M)

    def replace(now: str) -> None:
        if now == step:
            other.rename(path)

    with suppress(StateError):
        done = backup([source], to, hooks=Hooks(step=replace))
        now = content(path) if kind == "image" else path.read_bytes()
        assert copied(to, done, source.name) in (before, now)
    done = backup([source], to)
    assert copied(to, done, source.name) == (
        content(path) if kind == "image" else path.read_bytes()
    )
