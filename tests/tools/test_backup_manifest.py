# SPDX-License-Identifier: MIT
"""A backup directory: its manifest, its lock, its names, and what is hostile in it. No QEMU."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lines import at_every_line
from points import new_id, now
from support import collect

from pybitmap import BitmapError, InvalidError, NotFoundError
from pybitmap.errors import (
    CorruptError,
    ExistsError,
    LockedError,
    StateError,
    StoreError,
    UnsupportedError,
)
from pybitmap.tools.backup.manifest import (
    LEAVES,
    MANIFEST,
    Copy,
    Manifest,
    Point,
    Repository,
    parsed,
    points,
    written,
)
from pybitmap.tools.backup.run import _opened

#: What is dropped is told by Python.
dropped = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def copy_in(
    repository: Repository, point: str, parent: str | None = None, disk: str = "vda"
) -> Copy:
    """Of files that only have names, and a length."""
    path = repository.new_file(disk, point)
    path.write_bytes(b"disk")
    path.with_name(path.name + LEAVES).write_bytes(b"leaves")
    reason = None if parent else "the first"
    return Copy(disk, path.name, parent, 1 << 20, "b", 65536, reason, "0" * 64, "f" * 64, 4)


def append(repository: Repository, parent: str | None = None) -> Point:
    identifier = new_id()
    point = Point(identifier, now(), now(), (copy_in(repository, identifier, parent),))
    repository.append(point)
    return point


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A directory with two points, the second over the first."""
    path = tmp_path / "backups"
    with Repository.create(path) as repository:
        append(repository, append(repository).id)
    return path


# ---- what is written is read ----------------------------------------------------------------


def test_what_is_appended_is_listed_in_order(path: Path) -> None:
    with Repository.open(path, writing=True) as repository:
        first, second = repository.manifest.points
        third = append(repository, first.id)
    assert points(path) == (first, second, third)
    manifest = Repository.open(path).manifest
    assert manifest.last == third
    assert manifest.chain(third.copies[0]) == [third.copies[0], first.copies[0]]
    assert manifest.copy("vda", second.id[:4]) == (second, second.copies[0])


def test_a_manifest_survives_its_json() -> None:
    zone = timezone(timedelta(hours=5, minutes=30))
    identifier = new_id()
    copy = Copy(
        "a\n\u2028\0/é", f"x-{identifier}.qcow2", None, 0, None, None, "?", "0" * 64, "1" * 64, 0
    )
    manifest = Manifest((Point(identifier, datetime.now(zone), now(), (copy,)),))
    assert parsed(written(manifest)) == manifest


def test_points_that_are_asked_for_by_too_little(path: Path) -> None:
    manifest = Repository.open(path).manifest
    first = manifest.points[0]
    assert manifest.point(first.id.upper()) == first
    for name in ("", first.id[:3], "0" * 32, "x"):
        with pytest.raises(NotFoundError, match="there is no point"):
            manifest.point(name)
    twins = ["abcd" + new_id()[4:] for _ in range(2)]
    copies = [replace(first.copies[0], file=f"x-{each}.qcow2") for each in twins]
    several = Manifest(
        tuple(Point(each, now(), now(), (copy,)) for each, copy in zip(twins, copies))
    )
    with pytest.raises(InvalidError, match="may be 2 of them"):
        several.point("abcd")
    with pytest.raises(NotFoundError, match=r"no copy of disk 'vdb'.*'vda'"):
        manifest.copy("vdb")


# ---- hostile manifests ----------------------------------------------------------------------

Value = dict[str, Any]


def spoil_copy(**fields: object) -> Callable[[Value], object]:
    return lambda value: value["points"][1]["copies"][0].update(fields)


def spoil_point(**fields: object) -> Callable[[Value], object]:
    return lambda value: value["points"][1].update(fields)


def double_file(value: Value) -> None:
    first, second = value["points"]
    second["copies"][0]["file"] = first["copies"][0]["file"]


def swap(value: Value) -> None:
    value["points"].reverse()


def own_parent(value: Value) -> None:
    value["points"][1]["copies"][0]["parent"] = value["points"][1]["id"]


NAME = "vda-" + "0" * 32 + ".qcow2"
HOSTILE: dict[str, tuple[Callable[[Value], object], str]] = {
    "a path upwards": (spoil_copy(file="../" + NAME), "no name of a copy"),
    "a path downwards": (spoil_copy(file="x/" + NAME), "no name of a copy"),
    "an absolute path": (spoil_copy(file="/etc/passwd"), "no name of a copy"),
    "a protocol": (spoil_copy(file="nbd:" + NAME), "no name of a copy"),
    "json": (spoil_copy(file='json:{"driver":"raw"}'), "no name of a copy"),
    "an option": (spoil_copy(file="-" + NAME), "no name of a copy"),
    "another line": (spoil_copy(file=NAME + "\n"), "no name of a copy"),
    "the manifest": (spoil_copy(file=MANIFEST), "no name of a copy"),
    "a new file elsewhere": (spoil_copy(new="../" + NAME), "no name of a copy"),
    "a new file that is the file": (
        lambda v: v["points"][1]["copies"][0].update(new=v["points"][1]["copies"][0]["file"]),
        "twice",
    ),
    "a file twice": (double_file, "is there twice"),
    "a disk twice": (
        lambda v: v["points"][1]["copies"].append({**v["points"][1]["copies"][0], "file": NAME}),
        "disk 'vda' is there twice",
    ),
    "a point twice": (lambda v: v["points"].append(v["points"][1]), "is there twice"),
    "children before parents": (swap, "no earlier point"),
    "its own parent": (own_parent, "no earlier point"),
    "a parent that is none": (spoil_copy(parent="0" * 32), "no earlier point"),
    "a parent without the disk": (spoil_copy(disk="vdb"), "has no copy of the disk"),
    "a huge size": (spoil_copy(size=1 << 63), "size is"),
    "a negative size": (spoil_copy(nbytes=-1), "nbytes is"),
    "a huge number": (spoil_copy(size=10**400), "size is"),
    "a fraction": (spoil_copy(size=1.5), "field 'size' is 1.5"),
    "a bool": (spoil_copy(size=True), "field 'size' is True"),
    "a size as text": (spoil_copy(size="1"), "field 'size' is '1'"),
    "a granularity": (spoil_copy(granularity=3), "granularity 3"),
    "no name": (spoil_copy(disk=""), "has 0 characters"),
    "a long name": (spoil_copy(disk="x" * 5000), "has 5000 characters"),
    "a hash": (spoil_copy(sha256="0" * 63), "sha256"),
    "a root": (spoil_copy(root="G" * 64), "root"),
    "an unknown field of a copy": (spoil_copy(compressed=True), "field 'compressed' is not known"),
    "an unknown field of a point": (spoil_point(tag="x"), "field 'tag' is not known"),
    "an unknown field": (lambda v: v.update(x=1), "field 'x' is not known"),
    "a missing field": (lambda v: v["points"][1]["copies"][0].pop("root"), "'root' is missing"),
    "an id": (spoil_point(id="../x"), "32 hexadecimal digits"),
    "a time": (spoil_point(begun="yesterday"), "is no time"),
    "a time without zone": (spoil_point(begun="2026-01-01T00:00:00"), "no time zone"),
    "no copies": (spoil_point(copies=[]), "no copies"),
    "copies of another type": (spoil_point(copies={}), "field 'copies' is"),
    "a point of another type": (lambda v: v["points"].append(None), "where an object should"),
    "points of another type": (lambda v: v.update(points="x"), "field 'points' is"),
    "no version": (lambda v: v.update(version=0), "version"),
    "a version of another type": (lambda v: v.update(version="1"), "field 'version' is"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_with_the_reason(path: Path, name: str) -> None:
    spoil, words = HOSTILE[name]
    value = json.loads((path / MANIFEST).read_bytes())
    spoil(value)
    (path / MANIFEST).write_text(json.dumps(value))
    with pytest.raises(CorruptError, match=words) as error:
        Repository.open(path)
    assert len(str(error.value)) < 1000
    with pytest.raises(CorruptError):
        Repository.open(path, writing=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ("null", "where an object should"),
        ("[" * 100_000, "no JSON"),
        ("\xff", "no JSON"),
        ('{"version": 1, "version": 1, "points": []}', "a field twice"),
        ('{"version": NaN, "points": []}', "NaN is no number"),
        ('{"version": 1, "points": [' + "1" * 10_000 + "]}", "."),
    ],
)
def test_what_is_no_manifest_is_refused(path: Path, text: str, words: str) -> None:
    (path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptError, match=words):
        Repository.open(path)


def test_a_newer_version_asks_for_a_newer_program(path: Path) -> None:
    (path / MANIFEST).write_text('{"version": 2, "disks": []}')
    with pytest.raises(UnsupportedError, match="newer pybitmap"):
        Repository.open(path)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_do_anything_but_raise_our_errors(data: bytes) -> None:
    with pytest.raises((CorruptError, UnsupportedError)):
        parsed(data)


@pytest.mark.parametrize("what", ["link", "fifo", "folder"])
@pytest.mark.parametrize("name", [MANIFEST, "lock"])
def test_what_is_no_file_is_not_followed(path: Path, tmp_path: Path, what: str, name: str) -> None:
    (path / name).rename(tmp_path / "elsewhere")
    if what == "link":
        (path / name).symlink_to(tmp_path / "elsewhere")
    elif what == "fifo":
        os.mkfifo(path / name)
    else:
        (path / name).mkdir()
    with pytest.raises(BitmapError, match=name):
        Repository.open(path, writing=True)


def test_a_copy_that_is_a_link_is_not_listed(tmp_path: Path) -> None:
    with Repository.create(tmp_path / "b") as repository:
        identifier = new_id()
        copy = copy_in(repository, identifier)
        (tmp_path / "elsewhere").write_bytes(b"disk")
        repository.path_of(copy).unlink()
        repository.path_of(copy).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CorruptError, match="symbolic link"):
            repository.append(Point(identifier, now(), now(), (copy,)))
        assert repository.manifest.points == ()


# ---- names ----------------------------------------------------------------------------------

DISKS = [
    "vda",
    "VDA",
    "",
    "..",
    "a/b",
    "a-b",
    "a b",
    "-rf",
    "é",
    "\0",
    "x" * 300,
    "disk.qcow2",
    "con",
    "#block123",
    "\ud800",
]


def test_names_of_files_are_safe_and_differ(tmp_path: Path) -> None:
    identifier = new_id()
    with Repository.create(tmp_path / "b") as repository:
        made = {}
        for disk in filter(None, DISKS):
            made[disk] = repository.new_file(disk, identifier)
        stolen = made["a b"].name.partition("-" + identifier)[0]
        made[stolen] = repository.new_file(stolen, identifier)
        for path in made.values():
            assert path.parent == repository.path
            assert path.name.isascii()
            assert path.name == path.name.lower()
            assert len(path.name) < 130
        assert len(set(made.values())) == len(made)
        assert made["vda"].name == f"vda-{identifier}.qcow2"
        for disk in ("", "x" * 5000):
            with pytest.raises(InvalidError):
                repository.new_file(disk, identifier)
        with pytest.raises(InvalidError):
            repository.new_file("vda", "../x")


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    identifier = new_id()
    with Repository.create(tmp_path / "b") as repository:
        first = repository.new_file("vda", identifier)
        first.with_name(first.name + LEAVES).touch()
        second = repository.new_file("vda", identifier)
        assert second.name == f"vda-{identifier}-1.qcow2"
        second.symlink_to("nowhere")
        assert repository.new_file("vda", identifier).name == f"vda-{identifier}-2.qcow2"


# ---- making, and leftovers ------------------------------------------------------------------


def test_what_cannot_be_looked_at_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a directory of another user: a backup into it would be told that it is none."""
    path = tmp_path / "b"
    Repository.create(path).close()
    lstat = os.lstat

    def refused(looked: str | os.PathLike[str], **options: Any) -> os.stat_result:
        if os.path.dirname(looked) == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(looked))
        return lstat(looked, **options)

    monkeypatch.setattr(os, "lstat", refused)
    for look in (Repository.open, _opened):
        with pytest.raises(StoreError, match=r"cannot look at .*json': Permission denied"):
            look(path)
    with pytest.raises(StoreError, match=r"cannot look at .*: File name too long"):
        Repository.open(tmp_path / ("x" * 300))


def test_a_directory_is_made_where_nothing_else_is(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no backup directory"):
        Repository.open(tmp_path)
    with pytest.raises(NotFoundError, match="nothing is there"):
        Repository.open(tmp_path / "x")
    with pytest.raises(StoreError, match="No such file"):
        Repository.create(tmp_path / "x" / "y")
    Repository.create(tmp_path / "b").close()
    with pytest.raises(ExistsError):
        Repository.create(tmp_path / "b")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidError, match="not empty: '"):
        Repository.create(tmp_path)
    with pytest.raises(InvalidError, match="no directory"):
        Repository.create(tmp_path / "file")


def test_a_directory_of_which_only_the_lock_was_made_is_made(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / "manifest.json.new").write_text("half")
    Repository.create(tmp_path).close()
    assert points(tmp_path) == ()


def test_leftovers_are_what_is_ours_and_not_named(path: Path) -> None:
    identifier = new_id()
    ours = [f"vda-{identifier}.qcow2", f"vda-{identifier}.qcow2{LEAVES}", "manifest.json.new"]
    others = ["notes.txt", "vda.qcow2", f"vda-{identifier}.raw", f".vda-{identifier}.qcow2"]
    for name in [*ours, *others]:
        (path / name).write_text("x")
    before = {each.name for each in path.iterdir()}
    with Repository.open(path, writing=True) as repository:
        assert sorted(each.name for each in repository.leftovers()) == sorted(ours)
        assert sorted(each.name for each in repository.sweep()) == sorted(ours)
    assert {each.name for each in path.iterdir()} == before - set(ours)


def test_a_sweep_removes_a_link_and_not_what_it_leads_to(path: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    name = f"vda-{new_id()}.qcow2"
    for each in (name, name + LEAVES):
        (path / each).symlink_to(tmp_path / "precious")
    with Repository.open(path, writing=True) as repository:
        assert len(repository.sweep()) == 2
    assert (tmp_path / "precious").read_text() == "x"


def test_a_sweep_leaves_what_somebody_reads(path: Path) -> None:
    reader = Repository.open(path)
    first, second = reader.manifest.points
    with Repository.open(path, writing=True) as repository:
        with reader.reading([first.copies[0]]):
            repository.replace([])
            gone = {each.name for each in repository.sweep()}
            assert gone == {second.copies[0].file, second.copies[0].file + LEAVES}
            assert reader.path_of(first.copies[0]).exists()
        assert len(repository.sweep()) == 2
    with (
        pytest.raises(StoreError, match="has changed meanwhile: try again"),
        reader.reading(first.copies),
    ):
        pass


# ---- one at a time --------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_told_who_is_at_it(path: Path) -> None:
    code = (
        "import sys; from pybitmap.tools.backup import Repository;"
        f"held = Repository.open({os.fspath(path)!r}, writing=True);"
        "print(flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        with pytest.raises(LockedError, match="another process") as error:
            Repository.open(path, writing=True)
        if os.path.exists("/proc/locks"):
            assert f"process {process.pid}" in str(error.value)
        assert len(points(path)) == 2  # reading needs no lock
    finally:
        process.kill()
        process.communicate()
    Repository.open(path, writing=True).close()  # a kill leaves no lock


@dropped
def test_a_second_writer_in_this_process_is_refused(path: Path) -> None:
    with Repository.open(path, writing=True), pytest.raises(LockedError, match="in this process"):
        Repository.open(path, writing=True)
    cycle: list[Any] = [Repository.open(path, writing=True)]
    cycle.append(cycle)
    del cycle
    collect()
    Repository.open(path, writing=True).close()


def test_the_child_of_a_fork_is_refused_and_keeps_no_lock(path: Path) -> None:
    repository = Repository.open(path, writing=True)
    waits, goes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(goes)
        code = 1
        try:
            repository.sweep()
        except StateError:
            code = 2
        except StoreError as error:
            code = 0 if "both sides of a fork" in str(error) else 3
        finally:
            repository.close()
            os.read(waits, 1)
            os._exit(code)
    with pytest.raises(LockedError):
        Repository.open(path, writing=True)  # the child's close has not unlocked it
    repository.close()
    Repository.open(path, writing=True).close()
    os.close(goes)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(waits)


def test_who_only_reads_may_not_change_anything(path: Path) -> None:
    with Repository.open(path) as repository:
        for change in (
            repository.sweep,
            repository.settle,
            lambda: repository.replace([]),
            lambda: repository.new_file("vda", new_id()),
        ):
            with pytest.raises(StateError, match="not open for writing"):
                change()
    assert len(points(path)) == 2


@pytest.mark.parametrize("what", ["folder", "lock"])
def test_what_was_replaced_while_it_was_open_is_left_alone(path: Path, what: str) -> None:
    with Repository.open(path, writing=True) as repository:
        if what == "folder":
            path.rename(path.with_name("old"))
            Repository.create(path).close()
        else:
            (path / "lock").unlink()
            (path / "lock").touch()
        with pytest.raises(StoreError, match="was removed, or another put in its place"):
            repository.replace([])


def test_a_lock_file_that_is_missing_is_made_anew(path: Path) -> None:
    (path / "lock").unlink()
    Repository.open(path, writing=True).close()


def test_a_directory_that_may_not_be_written_to_is_read(path: Path) -> None:
    (path / "lock").unlink()
    os.chmod(path, 0o500)
    try:
        assert len(points(path)) == 2
        with Repository.open(path) as reader, reader.reading(reader.manifest.points[0].copies):
            pass
        assert not (path / "lock").exists()
    finally:
        os.chmod(path, 0o700)


# ---- appending ------------------------------------------------------------------------------


def test_a_point_that_cannot_stand_there_is_refused(path: Path) -> None:
    with Repository.open(path, writing=True) as repository:
        before = (path / MANIFEST).read_bytes()
        identifier = new_id()
        copy = copy_in(repository, identifier)
        point = Point(identifier, now(), now(), (copy,))
        for wrong, words in (
            (replace(copy, nbytes=5), "has 4 bytes, and not 5"),
            (replace(copy, parent=new_id()), "no earlier point"),
            (replace(copy, file=f"vda-{new_id()}.qcow2"), "is missing"),
            (replace(copy, file="../x"), "no name of a copy"),
        ):
            with pytest.raises(CorruptError, match=words):
                repository.append(replace(point, copies=(wrong,)))
        with pytest.raises(CorruptError, match="is there twice"):
            repository.append(repository.manifest.points[0])
        repository.leaves_of(copy).unlink()
        with pytest.raises(CorruptError, match="is missing"):
            repository.append(point)
        assert (path / MANIFEST).read_bytes() == before


@dropped
def test_an_append_that_is_interrupted_at_any_line_has_happened_or_not(memory_path: Path) -> None:
    path = memory_path / "backups"
    with Repository.create(path) as repository:
        append(repository)
        before = repository.manifest.points
        identifier = new_id()
        point = Point(identifier, now(), now(), (copy_in(repository, identifier),))

        def attempt() -> None:
            repository.replace(before)
            repository.append(point)

        for where in at_every_line(attempt, "tools/backup"):
            assert repository.manifest.points in (before, (*before, point)), where
            assert points(path) == repository.manifest.points, where
            assert not (path / "manifest.json.new").exists(), where


@dropped
def test_opening_that_is_interrupted_at_any_line_leaves_no_lock(path: Path) -> None:
    def attempt() -> None:
        with Repository.open(path, writing=True):
            pass

    for where in at_every_line(attempt, "tools/backup"):
        collect()
        with open(path / "lock", "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pytest.fail(f"it is locked: {where}")
