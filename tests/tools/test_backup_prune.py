# SPDX-License-Identifier: MIT
"""Points taken out: those that stay hold what they held. (Kills: test_points_faults.py.)"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from filesystems import filesystem, mounted
from images import MIB, qemu_img
from lines import at_every_line
from peers import lacking
from points import History, content, new_id, now
from support import collect

from pybitmap import InvalidError, NotFoundError
from pybitmap.errors import CorruptError, LockedError, StoreError
from pybitmap.tools.backup import Point, Repository, points, prune, restore, verify
from pybitmap.tools.backup.manifest import LEAVES, MANIFEST


@pytest.fixture
def history(memory_path: Path) -> History:
    """Four points; the disk is smaller in the second."""
    history = History(memory_path / "backups")
    for number, size in enumerate([2 * MIB, MIB, 2 * MIB, 2 * MIB], 1):
        history.point(size, [f"write -P {number} {number * 200}k 300k"])
    return history


def ids(history: History) -> list[str]:
    return [each.id for each in points(history.path)]


def check(history: History, *, leftovers: int = 0) -> None:
    """All that is listed is there, for us and for qemu-img, and nothing else is."""
    for point in points(history.path):
        [copy] = point.copies
        assert content(history.path / copy.file) == history.contents[point.id]
    found = verify(history.path, full=True)
    assert found.good, found
    assert len(found.leftovers) == leftovers


def test_the_newest_stay(history: History) -> None:
    before = ids(history)
    done = prune(history.path, keep=2)
    assert [each.id for each in done.points] == before[:2]
    assert ids(history) == before[2:]
    [rebased] = done.rebased
    first, second = points(history.path)
    assert first.copies == (rebased,)
    assert rebased.parent is None
    assert rebased.reason == "what lay below was pruned"
    assert second.copies[0].parent == first.id
    assert len(done.deleted) == 4
    check(history)


def test_any_points_but_the_newest_go(history: History) -> None:
    """What was cut off by the second, and has not come back in the third, is not brought back."""
    before = ids(history)
    done = prune(history.path, points=[before[1][:8], before[1]])
    assert ids(history) == [before[0], *before[2:]]
    [rebased] = done.rebased
    assert rebased.parent == before[0]
    assert rebased.reason is None
    check(history)
    restored = history.path.with_name("x")
    restore(history.path, at=before[2], to=restored)
    assert restored.read_bytes()[MIB : MIB + 1000] == bytes(1000)


def test_all_but_one_go_at_once_or_one_after_the_other(history: History) -> None:
    twin = history.copy_to(history.path.with_name("twin"))
    while len(ids(twin)) > 1:
        prune(twin.path, keep=len(ids(twin)) - 1)
        check(twin)
    prune(history.path, keep=1)
    check(history)
    assert ids(history) == ids(twin)


def test_a_dry_run_changes_nothing(history: History) -> None:
    before = {each.name: each.read_bytes() for each in history.path.iterdir()}
    os.chmod(history.path, 0o500)
    try:
        done = prune(history.path, keep=2, dry_run=True)
    finally:
        os.chmod(history.path, 0o700)
    assert ([each.id for each in done.points], len(done.rebased)) == (ids(history)[:2], 1)
    assert done.deleted == ()
    assert {each.name: each.read_bytes() for each in history.path.iterdir()} == before


def test_what_does_not_make_sense_is_refused(history: History) -> None:
    before = (history.path / MANIFEST).read_bytes()
    for arguments, words in (
        ({}, "say either"),
        ({"keep": 1, "points": ["x"]}, "say either"),
        ({"keep": 0}, "the newest stays"),
        ({"keep": -1}, "the newest stays"),
        ({"points": [ids(history)[-1]]}, "is the newest"),
    ):
        with pytest.raises(InvalidError, match=words):
            prune(history.path, **arguments)
    with pytest.raises(NotFoundError):
        prune(history.path, points=["0" * 32])
    assert (history.path / MANIFEST).read_bytes() == before
    assert prune(history.path, keep=4).points == ()
    assert prune(history.path, keep=100).points == ()


def test_the_only_copies_of_a_disk_stay_unless_they_are_named(memory_path: Path) -> None:
    """A disk that was in the first point only."""
    history = History(memory_path / "backups")
    history.disk = "old"
    [first] = [history.point(MIB, ["write -P 1 0 64k"]).id]
    history.disk = "vda"
    history.point(MIB, ["write -P 2 0 64k"], full=True)
    history.point(MIB, ["write -P 3 0 64k"])
    prune(history.path, keep=1)
    assert ids(history)[0] == first
    check(history)
    prune(history.path, points=[first])
    check(history)
    assert len(ids(history)) == 1


def test_several_disks_of_a_point_go_together(memory_path: Path) -> None:
    history = History(memory_path / "backups")
    contents: dict[tuple[str, str], bytes] = {}
    with Repository.open(history.path, writing=True) as repository:
        for number in range(3):
            identifier, last = new_id(), repository.manifest.last
            copies = []
            for disk in ("vda", "vdb"):
                history.disk = disk
                path = repository.new_file(disk, identifier)
                below = last.copy_of(disk) if last else None
                more = ["-b", below.file, "-F", "qcow2"] if below else []
                qemu_img("create", "-q", "-f", "qcow2", *more, path, str(MIB + number * 512))
                copies.append(history.copy(repository, path, last.id if last else None))
                contents[identifier, disk] = content(path)
            repository.append(Point(identifier, now(), now(), tuple(copies)))
    done = prune(history.path, keep=1)
    assert len(done.points) == 2
    assert len(done.rebased) == 2
    [point] = points(history.path)
    for copy in point.copies:
        assert content(history.path / copy.file) == contents[point.id, copy.disk]
    assert verify(history.path, full=True).good


# ---- damage ---------------------------------------------------------------------------------


def spoilt(path: Path, pattern: int) -> None:
    """A byte of data."""
    data = path.read_bytes()
    place = data.index(bytes([pattern]) * 512, 4 * 65536)
    path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_is_damaged_is_not_carried_on(history: History, number: int) -> None:
    """A copy that lies below one that stays, or that one itself: nothing changes."""
    repository = Repository.open(history.path)
    spoilt(repository.path_of(repository.manifest.points[number].copies[0]), number + 1)
    before = {each.name: each.read_bytes() for each in history.path.iterdir()}
    with pytest.raises(CorruptError, match="is not what was copied"):
        prune(history.path, keep=2)
    assert {each.name: each.read_bytes() for each in history.path.iterdir()} == before


def test_damaged_points_can_go_if_nothing_of_them_stays(history: History) -> None:
    history.point(MIB, ["write -P 9 0 64k"], full=True)
    repository = Repository.open(history.path)
    spoilt(repository.path_of(repository.manifest.points[1].copies[0]), 2)
    repository.path_of(repository.manifest.points[0].copies[0]).unlink()
    assert not verify(history.path).good
    prune(history.path, keep=1)
    check(history)


def test_a_rebase_that_went_wrong_is_noticed(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a `qemu-img` that only rewrites the name, as ``rebase -u`` does."""
    real = shutil.which("qemu-img")
    folder = history.path.with_name("bin")
    folder.mkdir()
    script = folder / "qemu-img"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = rebase ]; then shift; exec {real} rebase -u "$@"; fi\n'
        f'exec {real} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    before = (history.path / MANIFEST).read_bytes()
    with pytest.raises(CorruptError, match="is not what was copied"):
        prune(history.path, points=[ids(history)[1]])
    assert (history.path / MANIFEST).read_bytes() == before
    check(history)


# ---- ends -----------------------------------------------------------------------------------


def test_a_second_one_is_refused(history: History) -> None:
    with Repository.open(history.path, writing=True), pytest.raises(LockedError):
        prune(history.path, keep=1)
    check(history)


def test_a_full_disk_changes_nothing(history: History, tmp_path: Path) -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        lacking("only root of a Linux machine can mount a small file system")
    nbytes = sum(each.stat().st_size for each in history.path.iterdir())
    with mounted(tmp_path / "m", "-t", "tmpfs", "-o", f"size={nbytes + 300_000}", "tmpfs") as small:
        twin = history.copy_to(small / "backups")
        before = ids(twin)
        with pytest.raises(StoreError, match="No space left"):
            prune(twin.path, keep=1)
        assert ids(twin) == before
        with Repository.open(twin.path) as repository:
            assert repository.leftovers() == []


def test_where_files_share_their_blocks_it_is_right_too(history: History, tmp_path: Path) -> None:
    with filesystem("btrfs", tmp_path) as folder:
        twin = history.copy_to(folder / "backups")
        prune(twin.path, points=[ids(twin)[1]])
        check(twin)


def files(path: Path) -> set[tuple[str, bytes]]:
    return {(each.name, each.read_bytes()) for each in path.iterdir()}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_an_interruption_at_any_line_leaves_every_point(
    memory_path: Path,
) -> None:
    """Of prune.py. What is left over goes with the next one."""
    history = History(memory_path / "backups")
    for number in (1, 2, 3):
        history.point(65536, [f"write -P {number} 0 {number}k"])
    base = history.copy_to(memory_path / "base")
    before, unchanged = ids(history), files(base.path)

    def attempt() -> None:
        shutil.rmtree(history.path)
        base.copy_to(history.path)
        prune(history.path, keep=1)

    for where in at_every_line(attempt, "tools/backup/prune.py"):
        collect()
        assert ids(history) in (before, before[-1:]), where
        if files(history.path) >= unchanged:
            continue
        for point in points(history.path):
            path = Repository.open(history.path).path_of(point.copies[0])
            assert content(path) == history.contents[point.id], where


def test_what_was_begun_is_brought_to_its_end(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prune that was killed behind its first manifest; then one that only wants to go on."""
    with monkeypatch.context() as patch:
        patch.setattr(Repository, "sweep", lambda self: [])
        patch.setattr(Repository, "settle", lambda self: True)
        prune(history.path, points=[ids(history)[1]])
    repository = Repository.open(history.path)
    copy = repository.manifest.points[1].copies[0]
    assert copy.new is not None
    assert repository.path_of(copy).name == copy.new
    check(history, leftovers=2)
    with repository.reading([copy]):
        with pytest.raises(LockedError, match="is being read"):
            prune(history.path, keep=100)
        with Repository.open(history.path, writing=True) as writer:
            assert writer.sweep() == []
    assert repository.path_of(copy).name == copy.new
    history.point(2 * MIB, ["write -P 9 0 64k"])  # a backup may go on
    check(history, leftovers=2)
    prune(history.path, keep=100)
    assert not (history.path / copy.new).exists()
    assert not (history.path / (copy.new + LEAVES)).exists()
    check(history)
