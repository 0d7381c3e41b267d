# SPDX-License-Identifier: MIT
"""A point, restored: exactly, at once, and nothing where that cannot be."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filesystems import loop_device, mounted
from images import MIB, qemu, qemu_img
from lines import at_every_line
from machines import Machine
from peers import lacking, peer
from points import History
from support import collect

from pybitmap import InvalidError, NotFoundError
from pybitmap.errors import CorruptError, ExistsError, LockedError, StoreError
from pybitmap.tools.backup import Repository, prune, restore


@pytest.fixture
def history(memory_path: Path) -> History:
    """Three points: the disk shrinks, and grows again."""
    history = History(memory_path / "backups")
    history.point(2 * MIB, ["write -P 1 0 2M"])
    history.point(MIB + 512, ["write -P 2 100k 1k", "write -z 256k 128k"])
    history.point(3 * MIB, ["write -P 3 2M 64k"])
    return history


def folder_of(history: History) -> set[str]:
    return {each.name for each in history.path.parent.iterdir()}


def test_every_point_is_restored_in_both_formats(history: History) -> None:
    for number, (point, data) in enumerate(history.contents.items()):
        raw = history.path.with_name(f"{number}.raw")
        done = restore(history.path, "vda", to=raw, at=point)
        assert (done.point.id, done.path, done.format) == (point, raw, "raw")
        assert raw.read_bytes() == data
        image = history.path.with_name(f"{number}.qcow2")
        restore(history.path, to=image, at=point[:8], format="qcow2")
        qemu_img("compare", "-f", "qcow2", "-F", "raw", image, raw)
        assert b"backups" not in image.read_bytes()[:65536]  # it stands for itself


def test_without_a_point_it_is_the_newest_that_has_the_disk(history: History) -> None:
    target = history.path.with_name("x")
    done = restore(history.path, to=target)
    assert target.read_bytes() == list(history.contents.values())[-1]
    assert done.point.id == list(history.contents)[-1]


def test_what_is_restored_is_sparse(memory_path: Path) -> None:
    history = History(memory_path / "backups")
    history.point(256 * MIB, ["write -P 1 128M 4k"])
    target = memory_path / "x"
    restore(history.path, to=target)
    assert target.stat().st_size == 256 * MIB
    assert target.stat().st_blocks * 512 < MIB


def test_what_cannot_be_is_refused_before_anything_is_written(history: History) -> None:
    before = folder_of(history)
    target = history.path.with_name("x")
    with pytest.raises(NotFoundError, match=r"no copy of disk 'vdb'.*'vda'"):
        restore(history.path, "vdb", to=target)
    with pytest.raises(NotFoundError, match="no point"):
        restore(history.path, to=target, at="0000")
    with pytest.raises(InvalidError, match="format"):
        restore(history.path, to=target, format="vmdk")
    with pytest.raises(InvalidError, match="in the backup directory itself"):
        restore(history.path, to=history.path / "x")
    with pytest.raises(StoreError, match="No such file"):
        restore(history.path, to=target / "y")
    with pytest.raises(InvalidError, match="neither a file nor a block device"):
        restore(history.path, to=history.path.parent, force=True)
    assert folder_of(history) == before


def test_what_is_there_is_replaced_if_it_is_asked_for_only(history: History) -> None:
    target = history.path.with_name("x")
    target.write_text("precious")
    target.chmod(0o640)
    with pytest.raises(ExistsError, match="is there already"):
        restore(history.path, to=target)
    assert target.read_text() == "precious"
    restore(history.path, to=target, force=True)
    assert target.read_bytes() == list(history.contents.values())[-1]
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_link_is_followed_and_stays(history: History) -> None:
    link, target = history.path.with_name("link"), history.path.with_name("x")
    link.symlink_to(target)
    with pytest.raises(ExistsError):
        restore(history.path, to=link)
    assert not target.exists()
    restore(history.path, to=link, force=True)
    assert link.is_symlink()
    assert target.read_bytes() == list(history.contents.values())[-1]
    copies = history.path.with_name("into")
    copies.symlink_to(next(history.path.glob("*.qcow2")))
    with pytest.raises(InvalidError, match="in the backup directory itself"):
        restore(history.path, to=copies, force=True)


def test_a_disk_that_a_machine_has_open_is_not_replaced(history: History) -> None:
    target = history.path.with_name("x.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", target, "1M")
    with qemu(target, read_only=False), pytest.raises(LockedError, match="another program"):
        restore(history.path, to=target, force=True, format="qcow2")


def test_what_comes_meanwhile_is_not_replaced(history: History) -> None:
    target = history.path.with_name("x")

    def come(what: str, done: int, total: int | None) -> None:
        target.write_text("precious")

    before = folder_of(history)
    with pytest.raises(ExistsError, match="meanwhile"):
        restore(history.path, to=target, progress=come)
    assert target.read_text() == "precious"
    assert folder_of(history) == before | {"x"}


def test_a_file_system_without_links_will_do(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FAT: what is there is looked for, and then renamed."""

    def refused(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    target = history.path.with_name("x")
    restore(history.path, to=target)
    assert target.read_bytes() == list(history.contents.values())[-1]
    target.unlink()

    def come(what: str, done: int, total: int | None) -> None:
        target.write_text("precious")

    with pytest.raises(ExistsError, match="meanwhile"):
        restore(history.path, to=target, progress=come)
    assert target.read_text() == "precious"


# ---- damage ---------------------------------------------------------------------------------


def test_a_damaged_copy_is_an_error_and_no_disk(history: History) -> None:
    """Of data of whatever copy in the chain, of which nothing but the content tells."""
    repository = Repository.open(history.path)
    last = list(history.contents)[-1]
    target = history.path.with_name("x")
    for point in repository.manifest.points:
        path = repository.path_of(point.copies[0])
        whole = path.read_bytes()
        [number] = [k for k, each in enumerate(history.contents) if each == point.id]
        place = whole.index(bytes([number + 1]) * 512, 4 * 65536)
        path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        with pytest.raises(CorruptError, match="is not what was copied"):
            restore(history.path, to=target, at=last)
        assert not target.exists()
        path.write_bytes(whole)
    restore(history.path, to=target, at=last)


def test_no_file_is_opened_that_a_header_names(history: History) -> None:
    """An increment of which the header says that it lies over another file."""
    repository = Repository.open(history.path)
    [copy] = repository.manifest.points[2].copies
    secret = history.path.with_name("secret")
    secret.write_bytes(b"s" * 3 * MIB)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", secret, "-F", "raw", repository.path_of(copy))
    with pytest.raises(CorruptError, match="the backing file of"):
        restore(history.path, to=history.path.with_name("x"))


# ---- ends -----------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_and_leaves_nothing(history: History, tmp_path: Path) -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        lacking("only root of a Linux machine can mount a small file system")
    with mounted(tmp_path / "m", "-t", "tmpfs", "-o", "size=512k", "tmpfs") as small:
        with pytest.raises(StoreError, match="No space left"):
            restore(history.path, to=small / "x")
        assert list(small.iterdir()) == []


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
def test_an_interruption_at_any_line_leaves_nothing_or_the_disk(
    memory_path: Path,
) -> None:
    """Of restore.py; what it calls is interrupted by signals, below."""
    history = History(memory_path / "backups")
    history.point(65536, ["write -P 1 0 64k"])
    target = memory_path / "x"
    for where in at_every_line(lambda: restore(history.path, to=target), "tools/backup/restore.py"):
        collect()
        if target.exists():
            assert target.read_bytes() == b"\1" * 65536, where
            target.unlink()
        left = folder_of(history) - {"backups"}
        assert not left, where


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_program_and_no_half_disk(history: History, number: int) -> None:
    """While `qemu-img` is at work, of which a stand-in takes its time."""
    folder = history.path.with_name("bin")
    folder.mkdir()
    slow = folder / "qemu-img"
    pid = history.path.with_name("pid")
    real = peer("qemu-img", "qemu-utils")
    slow.write_text(
        f'#!/bin/sh\n[ "$1" = convert ] || exec {real} "$@"\n'
        f"echo $$ > {pid}.new; mv {pid}.new {pid}\nexec sleep 1000\n"
    )
    slow.chmod(0o755)
    target = history.path.with_name("x")
    process = subprocess.Popen(
        [sys.executable, "-m", "pybitmap", "restore", history.path, "--to", target, "--force"],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    target.write_text("old")
    deadline = time.monotonic() + 60
    while not pid.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = int(pid.read_text())
    process.send_signal(number)
    if number == signal.SIGTERM:  # it counts with the next progress, which a stand-in never tells
        time.sleep(0.1)
        os.kill(child, signal.SIGKILL)
    assert process.wait(60) != 0
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the program goes on")
    assert target.read_text() == "old"
    if number != signal.SIGKILL:
        assert not list(history.path.parent.glob(".pybitmap-*"))


def test_a_prune_leaves_what_is_being_restored(history: History) -> None:
    pruned: list[int] = []

    def meanwhile(what: str, done: int, total: int | None) -> None:
        if not pruned:
            pruned.append(0)
            done_ = prune(history.path, keep=1)
            pruned[0] = len(done_.deleted)

    target = history.path.with_name("x")
    last = list(history.contents)[-1]
    restore(history.path, to=target, at=last, progress=meanwhile)
    assert target.read_bytes() == history.contents[last]
    assert pruned == [0]
    with Repository.open(history.path, writing=True) as repository:
        assert len(repository.sweep()) == 4
    restore(history.path, to=target, force=True)
    assert target.read_bytes() == history.contents[last]


# ---- block devices --------------------------------------------------------------------------


@contextmanager
def device_of(path: Path, nbytes: int) -> Iterator[Path]:
    path.write_bytes(b"\xee" * nbytes)
    with loop_device(path) as device:
        yield device


def test_a_block_device_is_written_at_its_beginning(history: History, tmp_path: Path) -> None:
    first, _, last = history.contents
    with device_of(tmp_path / "disk", 4 * MIB) as device:
        with pytest.raises(ExistsError):
            restore(history.path, to=device)
        with pytest.raises(InvalidError, match="takes format raw only"):
            restore(history.path, to=device, force=True, format="qcow2")
        for point in (first, last):
            restore(history.path, to=device, at=point, force=True)
            data = history.contents[point]
            assert device.read_bytes()[: len(data)] == data
        assert device.read_bytes()[3 * MIB :] == b"\xee" * MIB
    with device_of(tmp_path / "small", MIB) as device:
        with pytest.raises(InvalidError, match="has 1048576 bytes, and the disk 3145728"):
            restore(history.path, to=device, force=True)
        assert device.read_bytes() == b"\xee" * MIB


def test_a_block_device_that_is_in_use_is_not_written(history: History, tmp_path: Path) -> None:
    with device_of(tmp_path / "disk", 4 * MIB) as device:
        subprocess.run([peer("mkfs.ext4", "e2fsprogs"), "-q", "-F", str(device)], check=True)
        with mounted(tmp_path / "m", str(device)) as point:
            (point / "x").write_text("x")
            with pytest.raises(LockedError, match="in use"):
                restore(history.path, to=device, force=True)
            assert (point / "x").read_text() == "x"
        with mounted(tmp_path / "again", str(device)) as point:
            assert (point / "x").read_text() == "x"


def test_a_block_device_that_a_machine_has_is_not_written(history: History, tmp_path: Path) -> None:
    with device_of(tmp_path / "disk", 4 * MIB) as device:
        file = {"driver": "host_device", "filename": str(device)}
        with Machine({}) as machine:
            machine.must("blockdev-add", driver="raw", node_name="x", file=file)
            machine.must(
                "block-export-add", type="nbd", id="e", node_name="x", name="x", writable=True
            )
            with pytest.raises(LockedError, match="open in another program"):
                restore(history.path, to=device, force=True)
        assert device.read_bytes() == b"\xee" * 4 * MIB
