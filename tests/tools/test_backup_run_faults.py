# SPDX-License-Identifier: MIT
"""Backups that something is in the way of: disks that fail, are full, are not to be written to."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from backing_up import (
    K,
    M,
    copied,
    fulls,
    needed,
    new_image,
    nothing_left,
    of,
    ours,
    settled,
)
from daemon import qemu_img
from filesystems import mounted
from machines import Machine, write
from peers import package, peer

from pybitmap.errors import (
    BitmapError,
    InvalidError,
    NotFoundError,
    StateError,
    StoreError,
    UnsupportedError,
)
from pybitmap.store import Qcow2Store
from pybitmap.tools.backup import Hooks, JobError, backup

package("qemu.qmp")
peer("qemu-storage-daemon", "qemu-system-common")


@pytest.fixture
def folder(memory_path: Path) -> Path:
    return memory_path


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    with Machine({"a": new_image(folder, "a"), "b": new_image(folder, "b")}) as made:
        yield made


@pytest.fixture
def small(folder: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    with mounted(folder / "m", "-t", "tmpfs", "-o", "size=3m", "tmpfs") as point:
        yield point


def fail_reads(machine: Machine, node: str, offset: int) -> None:
    """From now on reads of a disk fail at an offset: its image is under blkdebug."""
    machine.write(node, "flush")
    told = qemu_img("map", "-U", "--output=json", str(machine.disks[node]))
    [at] = [
        each["offset"] + offset - each["start"]
        for each in json.loads(told)
        if each["start"] <= offset < each["start"] + each["length"]
    ]
    take_away(machine, node)
    file = {"driver": "file", "filename": str(machine.disks[node])}
    inject = [{"event": "read_aio", "iotype": "read", "errno": 5, "sector": at // 512}]
    debug = {"driver": "blkdebug", "image": file, "inject-error": inject}
    machine.must("blockdev-add", driver="qcow2", node_name=node, file=debug)


def take_away(machine: Machine, node: str) -> None:
    machine.must("block-export-del", id=f"x-{node}", mode="hard")
    while any(each["id"] == f"x-{node}" for each in machine.must("query-block-exports")):
        pass
    machine.must("blockdev-del", node_name=node)


def test_a_disk_that_cannot_be_read_is_left_out_and_keeps_its_bitmap(
    machine: Machine, folder: Path
) -> None:
    to = folder / "to"
    for disk in "ab":
        machine.write(disk, "write -P 1 0 2M")
    first = backup(["a", "b"], to, qmp=machine.qmp)
    for disk in "ab":
        machine.write(disk, "write -P 2 1M 256k")
    fail_reads(machine, "b", M)
    done = backup(["a", "b"], to, qmp=machine.qmp)
    assert list(done.failed) == ["b"]
    assert "Input/output error" in done.failed["b"]
    assert [copy.disk for copy in done.point.copies] == ["a"]
    settled(machine, done, "a")
    settled(machine, first, "b")
    assert copied(to, done, "a") == of(machine, "a")
    with pytest.raises(JobError, match=r"'b' was not copied: Input/output error: nothing"):
        backup(["b"], to, qmp=machine.qmp)
    nothing_left(to, 2)
    machine.restart()
    done = backup(["a", "b"], to, qmp=machine.qmp)
    assert not fulls(done)
    nothing_left(to, 3)
    for disk in "ab":
        assert copied(to, done, disk) == of(machine, disk)


@pytest.mark.parametrize("full", [False, True])
def test_no_room_is_told_before_it_begins(machine: Machine, small: Path, full: bool) -> None:
    """Since QEMU fails the guest's writes while a job finds no room."""
    to = small / "to"
    machine.write("a", "write -P 1 0 256k")
    first = backup(["a"], to, qmp=machine.qmp)
    machine.write("b" if full else "a", "write -P 2 0 4M")
    with pytest.raises(StoreError, match="make room"):
        backup(["a", "b"] if full else ["a"], to, qmp=machine.qmp)
    assert machine.bitmaps("b") == {}
    settled(machine, first, "a")
    nothing_left(to, 1)


def test_no_room_while_it_is_copied_puts_all_back(machine: Machine, small: Path) -> None:
    to = small / "to"
    machine.write("a", "write -P 1 0 256k")
    first = backup(["a"], to, qmp=machine.qmp)
    machine.write("b", "write -P 2 0 1M")

    def fill(step: str) -> None:
        if step == "before":
            fill_up(small)
            os.truncate(small / "fill", (small / "fill").stat().st_size - 256 * K)

    with pytest.raises(JobError, match="No space left"):
        backup(["b"], to, qmp=machine.qmp, hooks=Hooks(step=fill))
    (small / "fill").unlink()
    nothing_left(to, 1)
    assert machine.bitmaps("b") == {}
    settled(machine, first, "a")
    machine.write("a", "write -P 3 1M 64k")
    done = backup(["a"], to, qmp=machine.qmp)
    assert not fulls(done)
    assert copied(to, done, "a") == of(machine, "a")


def fill_up(folder: Path) -> None:
    file = os.open(folder / "fill", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(file, bytes(4096))
    except OSError:
        os.close(file)


@pytest.mark.parametrize("step", ["planned", "targets", "copied", "closed", "hashed"])
def test_no_room_from_a_step_on_lists_nothing_wrong(
    machine: Machine, small: Path, step: str
) -> None:
    """From some on there is room enough: then it is listed, and right."""
    to = small / "to"
    machine.write("a", "write -P 1 0 512k")
    first = backup(["a"], to, qmp=machine.qmp)
    machine.write("a", "write -P 2 256k 512k")

    def fill(now: str) -> None:
        if now == step:
            fill_up(small)

    try:
        done = backup(["a"], to, qmp=machine.qmp, hooks=Hooks(step=fill))
    except (BitmapError, OSError):
        nothing_left(to, 1)
        settled(machine, first, "a")
    else:
        assert step == "hashed"
        settled(machine, done, "a")
        assert copied(to, done, "a") == of(machine, "a")
    (small / "fill").unlink()
    done = backup(["a"], to, qmp=machine.qmp)
    assert not fulls(done)
    assert copied(to, done, "a") == of(machine, "a")


def test_a_directory_that_cannot_be_written_to_is_refused_before_the_disks_are_touched(
    folder: Path,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    path = new_image(folder, "a")
    with mounted(folder / "m", "-t", "tmpfs", "tmpfs") as point:
        backup([path], point / "to")
        write(path, "write -P 1 0 64k", format="qcow2")
        before = path.read_bytes()
        subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
        with pytest.raises((BitmapError, OSError), match=r"[Rr]ead-only"):
            backup([path], point / "to")
        assert path.read_bytes() == before
        subprocess.run(["mount", "-o", "remount,rw", str(point)], check=True)
        done = backup([path], point / "to")
        assert not fulls(done)
        assert ours(Qcow2Store(path)) == needed(done, "a.qcow2")


def test_a_machine_without_the_disks_node_is_told_so(machine: Machine, folder: Path) -> None:
    def remove(step: str) -> None:
        if step == "planned":
            take_away(machine, "a")

    with pytest.raises(NotFoundError, match="has no disk 'a'; disks there"):
        backup(["a", "b"], folder / "to", qmp=machine.qmp, hooks=Hooks(step=remove))
    nothing_left(folder / "to", 0)
    assert machine.bitmaps("b") == {}
    assert machine.jobs() == []


def test_a_job_of_somebody_else_with_the_same_disk_goes_on(machine: Machine, folder: Path) -> None:
    to = folder / "to"
    machine.write("a", "write -P 1 0 2M")
    other = new_image(folder, "other")
    file = {"driver": "file", "filename": str(other)}
    machine.must("blockdev-add", driver="qcow2", node_name="other", file=file)
    machine.must(
        "blockdev-backup", job_id="mine", device="a", target="other", sync="full", speed=64 * K
    )
    done = backup(["a", "b"], to, qmp=machine.qmp)
    assert [each["id"] for each in machine.jobs()] == ["mine"]
    assert copied(to, done, "a") == of(machine, "a")
    machine.must("job-cancel", id="mine")


def test_jobs_of_another_directory_are_left_alone(machine: Machine, folder: Path) -> None:
    """As of a backup that is under way there."""
    file = {"driver": "file", "filename": str(new_image(folder, "pybitmap-other"))}
    node, job = "pybitmap-0123456789abcdef-0", f"pybitmap-{'0123456789abcdef' * 2}-0.b"
    machine.must("blockdev-add", driver="qcow2", node_name=node, file=file)
    machine.must(
        "blockdev-backup", job_id=job, device="b", target=node, sync="full", auto_finalize=False
    )
    done = backup(["a"], folder / "to", qmp=machine.qmp)
    assert not done.failed
    assert [each["id"] for each in machine.jobs()] == [job]
    assert node in machine.nodes()


@pytest.mark.parametrize("step", ["after", "copied"])
@pytest.mark.parametrize("dismissed", [False, True])
def test_a_job_that_somebody_else_cancels_is_a_disk_left_out(
    machine: Machine, folder: Path, step: str, dismissed: bool
) -> None:
    to = folder / "to"
    machine.write("a", "write -P 1 0 2M")

    def cancel(now: str) -> None:
        if now == step:
            [job] = [each["id"] for each in machine.jobs() if each["id"].endswith(".a")]
            machine.must("job-cancel", id=job)
            while dismissed and "error" in machine.execute("job-dismiss", {"id": job}):
                pass  # until it has ended

    done = backup(["a", "b"], to, qmp=machine.qmp, speed=M, hooks=Hooks(step=cancel))
    assert list(done.failed) == ["a"]
    assert machine.bitmaps("a") == {}
    assert machine.jobs() == []
    nothing_left(to, 1)
    assert set(fulls(backup(["a", "b"], to, qmp=machine.qmp))) == {"a"}


def test_a_job_that_somebody_else_finalizes_is_as_right(machine: Machine, folder: Path) -> None:
    to = folder / "to"
    machine.write("a", "write -P 1 0 2M")

    def finalize(step: str) -> None:
        if step == "copied":
            for job in machine.jobs():
                machine.must("job-finalize", id=job["id"])

    done = backup(["a", "b"], to, qmp=machine.qmp, hooks=Hooks(step=finalize))
    assert done.failed == {}
    settled(machine, done, "a", "b")
    assert copied(to, done, "a") == of(machine, "a")


def test_a_bitmap_that_somebody_else_removes_at_the_instant_is_said_to_be_lost(
    machine: Machine, folder: Path
) -> None:
    to = folder / "to"
    first = backup(["a"], to, qmp=machine.qmp)

    def remove(step: str) -> None:
        if step == "instant":
            name = f"{first.point.copies[0].bitmap}-uncut"
            machine.must("block-dirty-bitmap-remove", node="a", name=name)

    with pytest.raises(StateError, match="lost a bitmap"):
        backup(["a"], to, qmp=machine.qmp, hooks=Hooks(step=remove))
    assert "missing" in str(fulls(backup(["a"], to, qmp=machine.qmp))["a"])


@pytest.mark.parametrize(
    ("live", "step"),
    [(True, "instant"), (False, "planned"), (False, "instant"), (False, "closed")],
)
def test_the_child_of_a_fork_leaves_all_to_its_parent(folder: Path, live: bool, step: str) -> None:
    """Also where it unwinds the backup, and whatever it returns."""
    to, path = folder / "to", new_image(folder, "a")
    write(path, "write -P 1 0 1M", format="qcow2")

    def fork(now: str) -> None:
        if now == step:
            child = os.fork()
            if not child:
                raise SystemExit
            os.waitpid(child, 0)

    parent = os.getpid()
    with Machine({"a": path}) as machine:
        if not live:
            machine.stop()
        places, qmp = (["a"], machine.qmp) if live else ([str(path)], None)
        first = backup(places, to, qmp=qmp)
        assert not first.failed
        try:
            done = backup(places, to, qmp=qmp, hooks=Hooks(step=fork))
        finally:
            if os.getpid() != parent:
                os._exit(0)
        assert not fulls(done)
        assert not done.failed
        assert done.notes == ()
        nothing_left(to, 2)
        if live:
            settled(machine, done, "a")
        else:
            assert ours(Qcow2Store(path)) == needed(done, "a.qcow2")


@pytest.mark.parametrize(
    ("which", "harm"),
    [
        ("newest", "missing"),
        ("oldest", "cut"),
        ("newest", "leaves"),
        ("newest", "L1 table"),
        ("oldest", "L1 table"),
        ("newest", "refcount table"),
    ],
)
def test_nothing_is_laid_over_a_copy_that_is_broken(
    machine: Machine, folder: Path, which: str, harm: str
) -> None:
    to = folder / "to"
    points = []
    for pattern in (1, 2):
        machine.write("a", f"write -P {pattern} {pattern}M 100k")
        points.append(backup(["a", "b"], to, qmp=machine.qmp))
    copy = points[0 if which == "oldest" else 1].point.copy_of("a")
    assert copy is not None
    file = to / copy.file
    if harm == "cut":
        os.truncate(file, copy.nbytes - 65536)
    elif harm.endswith("table"):  # only QEMU looks at these fields of the header when it opens one
        with open(file, "r+b") as header:
            header.seek({"L1 table": 36, "refcount table": 48}[harm])
            header.write(bytes(4) if harm == "L1 table" else bytes(7) + b"\x01")
    else:
        Path(f"{file}.leaves" if harm == "leaves" else file).unlink()
    with pytest.raises(InvalidError, match="is broken"):
        backup(["a", "b"], to, qmp=machine.qmp, mode="incremental")
    done = backup(["a", "b"], to, qmp=machine.qmp)
    assert list(fulls(done)) == ["a"]
    assert "is broken" in str(fulls(done)["a"])
    assert copied(to, done, "a") == of(machine, "a")
    assert not fulls(backup(["a", "b"], to, qmp=machine.qmp))


@pytest.mark.parametrize("missing", ["qemu-img", "qemu-storage-daemon"])
def test_without_qemus_programs_nothing_is_touched(
    folder: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = new_image(folder, "a")
    before = path.read_bytes()
    bin = folder / "bin"
    bin.mkdir()
    for name in {"qemu-img", "qemu-storage-daemon", "setpriv"} - {missing}:
        (bin / name).symlink_to(peer(name, "qemu-utils"))
    monkeypatch.setenv("PATH", str(bin))
    with pytest.raises(UnsupportedError, match=f"{missing} is not installed"):
        backup([path], folder / "to")
    assert path.read_bytes() == before


def test_if_the_daemon_does_not_start_nothing_is_touched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = new_image(folder, "a")
    before = path.read_bytes()
    bin = folder / "bin"
    bin.mkdir()
    (bin / "qemu-storage-daemon").write_text("#!/bin/sh\necho it is broken >&2; exit 1\n")
    (bin / "qemu-storage-daemon").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    with pytest.raises(StoreError, match="does not start: it is broken"):
        backup([path], folder / "to")
    assert path.read_bytes() == before
    nothing_left(folder / "to", 0)
