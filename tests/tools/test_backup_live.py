# SPDX-License-Identifier: MIT
"""Backups of machines that run: increments, instants, reasons for full copies, leftovers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backing_up import K, M, copied, fulls, new_image, new_raw, of, settled
from daemon import qemu_img
from machines import Machine, content, write
from peers import package

from pybitmap.errors import InvalidError, LockedError, NotFoundError, StateError
from pybitmap.tools.backup import Hooks, Repository, Source, backup

package("qemu.qmp")


@pytest.fixture
def folder(memory_path: Path) -> Path:
    return memory_path


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    raw = new_raw(folder, "r")
    with Machine({"a": new_image(folder, "a"), "b": new_image(folder, "b"), "r": raw}) as made:
        yield made


def test_increments_have_what_was_written_and_restore_each_point(
    machine: Machine, folder: Path
) -> None:
    to = folder / "to"
    machine.write("a", "write -P 1 0 2M")
    machine.write("r", "write -P 1 0 2M")
    points = []
    for number in range(4):
        machine.write("a", f"write -P {number + 2} {number * 300}k 100k", "write -z 1M 70k")
        machine.write("r", f"write -P {number + 9} {number * 300}k 100k", "discard 1M 256k")
        done = backup(["a", "b", "r"], to, qmp=machine.qmp)
        points.append((done, {disk: of(machine, disk) for disk in "abr"}))
        assert set(fulls(done)) == (set("abr") if number == 0 else set())
        settled(machine, done, *"abr")
    for done, contents in points:
        for disk in "abr":
            assert copied(to, done, disk) == contents[disk]
    sizes = [copy.nbytes for done, _ in points[1:] for copy in done.point.copies]
    assert max(sizes) < 2 * M
    assert len(os.listdir(to)) == 2 + 2 * 12


def test_what_is_written_from_the_instant_on_is_in_the_next_point(
    machine: Machine, folder: Path
) -> None:
    to = folder / "to"

    def write_both(step: str) -> None:
        if step == "before":
            machine.write("a", "write -P 5 0 64k")
            machine.write("b", "write -P 5 0 64k")
        elif step == "instant":
            machine.write("a", "write -P 6 0 128k")
            machine.write("b", "write -P 6 0 128k")

    for _ in range(3):
        done = backup(["a", "b"], to, qmp=machine.qmp, hooks=Hooks(step=write_both))
        for disk in "ab":
            assert copied(to, done, disk)[: 64 * K] == bytes([5]) * (64 * K)
        now = backup(["a", "b"], to, qmp=machine.qmp)
        for disk in "ab":
            assert copied(to, now, disk) == of(machine, disk)
        assert not fulls(now)


def test_hooks_enclose_the_instant(machine: Machine, folder: Path) -> None:
    told: list[str] = []
    hooks = Hooks(lambda: told.append("freeze"), lambda: told.append("thaw"), told.append)
    backup(["a"], folder / "to", qmp=machine.qmp, hooks=hooks)
    begin = told.index("freeze")
    assert told[begin : begin + 5] == ["freeze", "before", "instant", "thaw", "after"]


@pytest.mark.parametrize("failing", ["before", "after"])
def test_a_hook_that_raises_puts_all_back(machine: Machine, folder: Path, failing: str) -> None:
    to = folder / "to"
    first = backup(["a"], to, qmp=machine.qmp)
    told: list[str] = []

    def fail() -> None:
        raise OSError("the guest does not answer")

    hooks = {"before": Hooks(fail, lambda: told.append("thaw")), "after": Hooks(after=fail)}
    with pytest.raises(OSError, match="does not answer"):
        backup(["a"], to, qmp=machine.qmp, hooks=hooks[failing])
    assert told == (["thaw"] if failing == "before" else [])
    settled(machine, first, "a")
    with Repository.open(to) as repository:
        assert len(repository.manifest.points) == 1
        assert repository.leftovers() == []
    machine.write("a", "write -P 3 0 64k")
    assert not fulls(backup(["a"], to, qmp=machine.qmp))


def test_after_a_restart_of_the_machine_images_go_on_and_raw_disks_begin_anew(
    machine: Machine, folder: Path
) -> None:
    to = folder / "to"
    backup(["a", "r"], to, qmp=machine.qmp)
    machine.restart()
    machine.write("a", "write -P 3 0 64k")
    done = backup(["a", "r"], to, qmp=machine.qmp)
    assert list(fulls(done)) == ["r"]
    assert "has no bitmap" in str(fulls(done)["r"])
    assert copied(to, done, "a") == of(machine, "a")


def test_after_a_kill_of_the_machine_that_disk_alone_is_copied_in_full(folder: Path) -> None:
    to = folder / "to"
    with Machine({"a": new_image(folder, "a"), "b": new_image(folder, "b")}) as machine:
        backup(["a", "b"], to, qmp=machine.qmp)
        machine.stop()
        with Machine({"a": machine.disks["a"]}) as other:
            other.write("a", "write -P 3 0 64k")
            other.kill()
        machine.start()
        done = backup(["a", "b"], to, qmp=machine.qmp)
        assert list(fulls(done)) == ["a"]
        assert "inconsistent" in str(fulls(done)["a"])
        settled(machine, done, "a", "b")
        assert copied(to, done, "a") == of(machine, "a")
        assert not fulls(backup(["a", "b"], to, qmp=machine.qmp))


def test_a_snapshot_on_top_is_copied_in_full(machine: Machine, folder: Path) -> None:
    to = folder / "to"
    machine.write("a", "write -P 3 0 1M")
    backup(["a"], to, qmp=machine.qmp)
    overlay = folder / "over.qcow2"
    base = machine.disks["a"]
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(overlay))
    file = {"driver": "file", "filename": str(overlay)}
    machine.must("blockdev-add", driver="qcow2", node_name="top", file=file, backing=None)
    machine.must("blockdev-snapshot", node="a", overlay="top")
    done = backup([Source("top", "a")], to, qmp=machine.qmp)
    assert "snapshotted" in str(fulls(done)["a"])
    assert copied(to, done, "a") == content(overlay, shared=True)


@pytest.mark.parametrize(
    ("kind", "small"),
    [
        ("qcow2", M),
        ("qcow2", M + 512),
        ("qcow2", 4 * M - 512),
        ("2M clusters", M + 512),
        ("2M clusters", 512),
        ("raw", M + 512),
    ],
)
def test_what_a_disk_loses_by_shrinking_does_not_come_back(
    folder: Path, kind: str, small: int
) -> None:
    to = folder / "to"
    if kind == "raw":
        path = new_raw(folder, "d")
    else:
        path = new_image(folder, "d", cluster_size="2M" if kind == "2M clusters" else "64k")
    with Machine({"d": path}) as machine:
        machine.write("d", "write -P 7 0 4M")
        backup(["d"], to, qmp=machine.qmp)
        machine.resize("d", small, 4 * M)
        machine.write("d", "write -P 8 4194176 128", "write -P 8 0 128")
        done = backup(["d"], to, qmp=machine.qmp)
        assert copied(to, done, "d") == of(machine, "d")
        if 4 * M - small >= 64 * K:
            assert "smaller for a while" in str(fulls(done)["d"])
        # and with a point at the smaller size between the two
        machine.write("d", "write -P 9 0 4M")
        backup(["d"], to, qmp=machine.qmp)
        machine.resize("d", small)
        between = backup(["d"], to, qmp=machine.qmp)
        assert not fulls(between)
        assert copied(to, between, "d") == of(machine, "d")
        machine.resize("d", 4 * M)
        done = backup(["d"], to, qmp=machine.qmp)
        assert copied(to, done, "d") == of(machine, "d")


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
@pytest.mark.parametrize("old", [4 * K, 64 * K, M])
@pytest.mark.parametrize("new", [512, 64 * K, M])
def test_a_disk_that_was_cut_amid_the_group_that_is_its_last_does_not_get_that_back(
    folder: Path, kind: str, old: int, new: int
) -> None:
    to = folder / "to"
    path = new_raw(folder, "d") if kind == "raw" else new_image(folder, "d", cluster_size="4k")
    with Machine({"d": path}) as machine:
        machine.write("d", "write -P 7 0 4M")
        backup(["d"], to, qmp=machine.qmp, granularity=old)
        machine.resize("d", old // 2, 4 * M, old)
        done = backup(["d"], to, qmp=machine.qmp, granularity=new)
        assert not fulls(done)
        assert copied(to, done, "d") == of(machine, "d")
        machine.write("d", "write -P 8 0 512")
        done = backup(["d"], to, qmp=machine.qmp)
        assert not fulls(done)
        assert copied(to, done, "d") == of(machine, "d")


def test_a_smaller_disk_that_is_read_only_is_copied_in_full(folder: Path) -> None:
    to, path = folder / "to", new_image(folder, "d")
    write(path, "write -P 7 0 4M", format="qcow2")
    backup([Source(str(path), "d")], to)
    for size in (512, 4 * M, 64 * K):
        qemu_img("resize", "-q", "--shrink", str(path), str(size))
    with Machine({}, nbd=False) as machine:
        file = {"driver": "file", "filename": str(path)}
        machine.must("blockdev-add", driver="qcow2", node_name="d", file=file, read_only=True)
        done = backup(["d"], to, qmp=machine.qmp)
        assert "read only" in str(fulls(done)["d"])
        assert copied(to, done, "d") == content(path, shared=True)


def test_two_directories_take_from_the_same_disk(machine: Machine, folder: Path) -> None:
    daily, weekly = folder / "daily", folder / "weekly"
    backup(["a"], weekly, qmp=machine.qmp)
    for number in range(2):
        machine.write("a", f"write -P {number + 1} {number}M 64k")
        done = backup(["a"], daily, qmp=machine.qmp)
    assert not fulls(done)
    done = backup(["a"], weekly, qmp=machine.qmp)
    assert not fulls(done)
    assert copied(weekly, done, "a") == of(machine, "a")


def test_a_moved_directory_goes_on(machine: Machine, folder: Path) -> None:
    backup(["a"], folder / "one", qmp=machine.qmp)
    (folder / "one").rename(folder / "two")
    machine.write("a", "write -P 3 0 64k")
    done = backup(["a"], folder / "two", qmp=machine.qmp)
    assert not fulls(done)
    settled(machine, done, "a")


def test_a_second_backup_into_the_directory_is_refused(machine: Machine, folder: Path) -> None:
    to = folder / "to"

    def second(step: str) -> None:
        if step == "instant":
            with pytest.raises(LockedError, match="this process"):
                backup([str(folder / "b.qcow2")], to)

    done = backup(["a"], to, qmp=machine.qmp, hooks=Hooks(step=second))
    settled(machine, done, "a")


def test_disks_are_named_as_people_name_them(folder: Path) -> None:
    a, b = new_image(folder, "a"), new_image(folder, "b")
    with Machine({}, system=True, drive=f"file={a},if=none,id=drv0") as machine:
        file = {"driver": "file", "filename": str(b)}
        machine.must("blockdev-add", driver="qcow2", node_name="fmt", file=file)
        [device] = machine.must("query-block")
        auto = device["inserted"]["node-name"]
        assert auto.startswith("#block")
        to = folder / "to"
        done = backup(["drv0", "fmt"], to, qmp=machine.qmp)
        assert [copy.disk for copy in done.point.copies] == ["drv0", "fmt"]
        done = backup([Source(auto, "drv0")], to, qmp=machine.qmp)
        assert not fulls(done)
        with pytest.raises(InvalidError, match="the same disk"):
            backup(["drv0", auto], to, qmp=machine.qmp)
        with pytest.raises(NotFoundError, match="disks there: drv0"):
            backup(["drv1"], to, qmp=machine.qmp)


def test_compressed_and_slow_copies_are_as_right(machine: Machine, folder: Path) -> None:
    to = folder / "to"
    machine.write("a", "write -P 1 0 3M")
    told: list[tuple[str, int, int | None]] = []
    for pattern in (1, 2):
        machine.write("a", f"write -P {pattern} 512k 300k", "write -z 64k 64k")
        done = backup(
            ["a"],
            to,
            qmp=machine.qmp,
            compress=True,
            speed=64 * M,
            progress=lambda *each: told.append(each),
        )
        assert copied(to, done, "a") == of(machine, "a")
        [copy] = done.point.copies
        assert copy.nbytes < M
    assert {what for what, _, _ in told} >= {"copying a"}
    assert all(total is None or done <= total for _, done, total in told)


def test_a_new_disk_is_full_and_the_others_go_on(machine: Machine, folder: Path) -> None:
    to = folder / "to"
    backup(["a"], to, qmp=machine.qmp)
    assert list(fulls(backup(["a", "b"], to, qmp=machine.qmp))) == ["b"]
    assert not fulls(backup(["b"], to, qmp=machine.qmp))
    machine.write("a", "write -P 3 0 64k")
    done = backup(["a", "b"], to, qmp=machine.qmp)
    assert not fulls(done)
    assert copied(to, done, "a") == of(machine, "a")


def test_an_increment_that_was_asked_for_and_cannot_be_changes_nothing(
    machine: Machine, folder: Path
) -> None:
    to = folder / "to"
    with pytest.raises(InvalidError, match="no copy of it yet"):
        backup(["a"], to, qmp=machine.qmp, mode="incremental")
    assert machine.bitmaps("a") == {}
    backup(["a"], to, qmp=machine.qmp)
    assert not fulls(backup(["a"], to, qmp=machine.qmp, mode="incremental"))
    done = backup(["a"], to, qmp=machine.qmp, mode="full")
    assert fulls(done) == {"a": "a full one was asked for"}
    settled(machine, done, "a")


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "sometimes"},
        {"granularity": 1000},
        {"granularity": 256},
        {"speed": -1},
        {"sources": []},
        {"sources": ["a", "a"]},
    ],
)
def test_what_cannot_be_right_is_refused_at_once(folder: Path, wrong: dict[str, Any]) -> None:
    sources = wrong.pop("sources", ["a"])
    with pytest.raises(InvalidError):
        backup(sources, folder / "to", qmp=folder / "none", **wrong)
    assert not (folder / "to").exists()


def test_a_bitmap_that_a_user_disabled_is_a_full_copy(machine: Machine, folder: Path) -> None:
    to = folder / "to"
    [copy] = backup(["a"], to, qmp=machine.qmp).point.copies
    machine.must("block-dirty-bitmap-disable", node="a", name=copy.bitmap)
    machine.write("a", "write -P 3 0 64k")
    done = backup(["a"], to, qmp=machine.qmp)
    assert "disabled" in str(fulls(done)["a"])
    assert copied(to, done, "a") == of(machine, "a")


def test_a_disk_resized_between_look_and_instant_is_not_copied_wrong(
    machine: Machine, folder: Path
) -> None:
    to = folder / "to"
    machine.write("a", "write -P 7 0 4M")
    first = backup(["a"], to, qmp=machine.qmp)

    def resize(step: str) -> None:
        if step == "before":
            machine.resize("a", M, 4 * M)

    with pytest.raises(StateError, match="resized while the backup began"):
        backup(["a"], to, qmp=machine.qmp, hooks=Hooks(step=resize))
    settled(machine, first, "a")
    done = backup(["a"], to, qmp=machine.qmp)
    assert copied(to, done, "a") == of(machine, "a")


def test_files_have_what_their_manifest_says_and_qemu_finds_no_fault(
    machine: Machine, folder: Path
) -> None:
    to = folder / "to"
    for _ in range(2):
        machine.write("a", "write -P 3 0 64k")
        done = backup(["a"], to, qmp=machine.qmp)
    [copy] = done.point.copies
    said = subprocess.run(
        ["qemu-img", "info", "--output=json", to / copy.file], capture_output=True, check=True
    ).stdout
    assert b'"bitmaps"' not in said
    qemu_img("check", str(to / copy.file))
    with Repository.open(to) as repository:
        parent = repository.manifest.parent(copy)
    assert parent is not None
    assert f'"backing-filename": "{parent.file}"'.encode() in said


def test_a_write_to_an_image_between_machines_is_found(folder: Path) -> None:
    """By QEMU's own tools, which record it."""
    to = folder / "to"
    with Machine({"a": new_image(folder, "a")}) as machine:
        backup(["a"], to, qmp=machine.qmp)
        machine.stop()
        write(machine.disks["a"], "write -P 4 1M 64k", format="qcow2")
        machine.start()
        done = backup(["a"], to, qmp=machine.qmp)
        assert not fulls(done)
        assert copied(to, done, "a") == of(machine, "a")


@pytest.mark.parametrize("kind", ["old qcow2", "read only"])
def test_images_that_can_keep_no_bitmap_have_them_in_the_machines_memory(
    folder: Path, kind: str
) -> None:
    to = folder / "to"
    path = new_image(folder, "d", compat="0.10" if kind == "old qcow2" else "1.1")
    write(path, "write -P 5 1M 64k", format="qcow2")
    with Machine({}) as machine:
        file = {"driver": "file", "filename": str(path)}
        machine.must(
            "blockdev-add",
            driver="qcow2",
            node_name="d",
            file=file,
            read_only=kind == "read only",
        )
        assert set(fulls(backup(["d"], to, qmp=machine.qmp))) == {"d"}
        done = backup(["d"], to, qmp=machine.qmp)
        assert not fulls(done)
        assert copied(to, done, "d") == content(path, shared=True)


def test_a_disk_of_nothing_is_refused_and_one_of_a_sector_is_not(folder: Path) -> None:
    to = folder / "to"
    with Machine({"d": new_image(folder, "d", 0), "a": new_image(folder, "a", 512)}) as machine:
        with pytest.raises(InvalidError, match="'d' has 0 bytes"):
            backup(["d", "a"], to, qmp=machine.qmp)
        for pattern in (1, 2):
            machine.write("a", f"write -P {pattern} 0 512")
            done = backup(["a"], to, qmp=machine.qmp)
            assert copied(to, done, "a") == bytes([pattern]) * 512
        assert not fulls(done)
