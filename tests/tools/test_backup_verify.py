# SPDX-License-Identifier: MIT
"""What is wrong with a backup directory is named, and only that."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from images import MIB, qemu_img, qemu_io
from points import History

from pybitmap import InvalidError, NotFoundError
from pybitmap.errors import StoreError
from pybitmap.tools.backup import Repository, Verification, points, prune, verify
from pybitmap.tools.backup.manifest import LEAVES, MANIFEST


@pytest.fixture
def history(memory_path: Path) -> History:
    """Three points over each other, and a full one."""
    history = History(memory_path / "backups")
    for number in (1, 2, 3):
        history.point(MIB, [f"write -P {number} {number * 200}k 100k"])
    history.point(MIB, ["write -P 4 0 64k"], full=True)
    return history


def broken(found: Verification) -> list[int]:
    return [number for number, each in enumerate(found.copies) if each.problems]


def path_of(history: History, number: int) -> Path:
    return history.path / points(history.path)[number].copies[0].file


def test_what_is_right_is_good(history: History) -> None:
    before = {each.name: each.read_bytes() for each in history.path.iterdir()}
    found = verify(history.path)
    assert found.good
    assert [each.sha256 for each in found.copies] == [None] * 4
    found = verify(history.path, full=True)
    assert found.good
    for each in found.copies:
        assert each.sha256 == hashlib.sha256(history.contents[each.point.id]).hexdigest()
    assert {each.name: each.read_bytes() for each in history.path.iterdir()} == before


def test_an_empty_directory_is_good(memory_path: Path) -> None:
    Repository.create(memory_path / "b").close()
    assert verify(memory_path / "b", full=True) == Verification((), (), None)


@pytest.mark.parametrize(
    ("number", "all_broken"), [(0, [0, 1, 2]), (1, [1, 2]), (2, [2]), (3, [3])]
)
def test_a_damaged_file_breaks_what_lies_over_it(
    history: History, number: int, all_broken: list[int]
) -> None:
    """Missing, shorter, longer, one bit of it, a link, a folder, another's; the leaves, too."""
    path = path_of(history, number)
    whole = path.read_bytes()
    other = path_of(history, (number + 1) % 4).read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0", other):
        path.write_bytes(damaged)
        found = verify(history.path)
        assert broken(found) == all_broken, len(damaged)
        assert path.name in found.copies[number].problems[0]
    for place in (0, 10, 100, 65536, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        assert broken(verify(history.path)) == all_broken, place
    path.unlink()
    assert broken(verify(history.path, full=True)) == all_broken
    path.mkdir()
    assert broken(verify(history.path)) == all_broken
    path.rmdir()
    elsewhere = history.path.with_name("elsewhere")
    elsewhere.write_bytes(whole)
    path.symlink_to(elsewhere)
    found = verify(history.path)
    assert broken(found) == all_broken
    assert "symbolic link" in found.copies[number].problems[0]
    path.unlink()
    path.write_bytes(whole)
    leaves = path.with_name(path.name + LEAVES)
    leaves.write_bytes(leaves.read_bytes()[:-1])
    assert broken(verify(history.path)) == all_broken
    leaves.unlink()
    assert broken(verify(history.path)) == all_broken


def test_only_some_are_looked_at_if_that_is_asked_for(history: History) -> None:
    path_of(history, 1).unlink()
    ids = [each.id for each in points(history.path)]
    found = verify(history.path, at=ids[3])
    assert found.good
    assert [each.point.id for each in found.copies] == ids[3:]
    assert broken(verify(history.path, at=ids[2])) == [0]
    assert broken(verify(history.path, disk="vda")) == [1, 2]
    with pytest.raises(NotFoundError):
        verify(history.path, disk="vdb")
    with pytest.raises(NotFoundError):
        verify(history.path, at="0000")


def test_a_manifest_of_which_the_hashes_were_made_up_is_found_out(history: History) -> None:
    """The root of another content; then a file that was exchanged, with its hash listed."""
    value = json.loads((history.path / MANIFEST).read_bytes())
    copies = [each["copies"][0] for each in value["points"]]
    copies[1]["root"], root = copies[2]["root"], copies[1]["root"]
    (history.path / MANIFEST).write_text(json.dumps(value))
    found = verify(history.path)
    assert broken(found) == [1]
    assert "the leaves of" in found.copies[1].problems[0]
    copies[1]["root"] = root
    path = history.path / copies[1]["file"]
    qemu_io(path, "write -P 9 200k 4k")
    copies[1].update(
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(), nbytes=path.stat().st_size
    )
    (history.path / MANIFEST).write_text(json.dumps(value))
    assert broken(verify(history.path)) == []  # files and leaves are as listed
    found = verify(history.path, full=True)
    assert broken(found) == [1, 2]
    assert found.copies[1].problems == ("what it holds is not what was copied",)


def test_an_image_that_qemu_finds_fault_with_is_broken(history: History) -> None:
    """With a hash that is listed: a refcount of 0 for a cluster that is used."""
    value = json.loads((history.path / MANIFEST).read_bytes())
    [copy] = value["points"][3]["copies"]
    path = history.path / copy["file"]
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    data[block + 2 * 5 : block + 2 * 6] = bytes(2)
    path.write_bytes(data)
    copy["sha256"] = hashlib.sha256(data).hexdigest()
    (history.path / MANIFEST).write_text(json.dumps(value))
    found = verify(history.path)
    assert broken(found) == [3]
    assert "qemu-img" in found.copies[3].problems[0]


def test_nothing_is_opened_that_a_header_names(history: History) -> None:
    """Hostile ones, of which the hash is listed: a backing file, and an external data file."""
    secret = history.path.with_name("secret")
    secret.write_bytes(bytes(MIB))
    for number, options, words in (
        (
            3,
            ["-b", f'json:{{"driver":"raw","file.filename":"{secret}"}}', "-F", "raw"],
            "the backing file of",
        ),
        (2, ["-b", str(secret), "-F", "raw"], "the backing file of"),
        (0, ["-o", f"data_file={secret}"], "has its data in another file"),
    ):
        path = path_of(history, number)
        qemu_img("create", "-q", "-u", "-f", "qcow2", *options, path, "1M")
        value = json.loads((history.path / MANIFEST).read_bytes())
        value["points"][number]["copies"][0].update(
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(), nbytes=path.stat().st_size
        )
        (history.path / MANIFEST).write_text(json.dumps(value))
        assert words in verify(history.path, full=True).copies[number].problems[0]


def test_leftovers_are_told_and_no_problem(history: History) -> None:
    name = "vda-" + "0" * 32 + ".qcow2"
    (history.path / name).touch()
    (history.path / "notes.txt").touch()
    found = verify(history.path)
    assert found.good
    assert [each.name for each in found.leftovers] == [name]


# ---- against a disk -------------------------------------------------------------------------


def test_a_disk_is_compared_with_its_copy(history: History) -> None:
    point, data = list(history.contents.items())[-1]
    disk = history.path.with_name("disk")
    disk.write_bytes(data)
    assert verify(history.path, against=disk).good
    image = history.path.with_name("disk.qcow2")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, image)
    assert verify(history.path, against=image).good
    found = verify(history.path, against=image, against_format="raw")
    assert not found.good
    assert "bytes, and the copy 1048576" in str(found.difference)
    disk.write_bytes(data[:70000] + b"\xff" + data[70001:])
    found = verify(history.path, against=disk, at=point)
    assert not found.good
    assert str(found.difference) == f"'{disk}' and the copy differ at byte {70000 // 512 * 512}"
    for shorter in (data[:-512], data + bytes(512)):
        disk.write_bytes(shorter)
        assert f"has {len(shorter)} bytes" in str(verify(history.path, against=disk).difference)
    path_of(history, 3).unlink()
    assert verify(history.path, against=disk).difference == "the copy of disk 'vda' is broken"
    first, data = next(iter(history.contents.items()))
    disk.write_bytes(data)
    assert verify(history.path, against=disk, at=first).good


def test_what_cannot_be_compared_is_an_error(history: History) -> None:
    with pytest.raises(StoreError, match="No such file"):
        verify(history.path, against=history.path.with_name("nothing"))
    history.disk = "vdb"
    history.point(MIB, full=True)
    history.path.with_name("x").touch()
    with pytest.raises(InvalidError, match=r"with which disk.*'vda', 'vdb'"):
        verify(history.path, against=history.path.with_name("x"))


# ---- beside others --------------------------------------------------------------------------


def test_what_is_pruned_meanwhile_is_try_again(history: History) -> None:
    pruned: list[object] = []

    def meanwhile(what: str, done: int, total: int | None) -> None:
        if not pruned:
            pruned.append(prune(history.path, keep=1))

    with pytest.raises(StoreError, match="try again"):
        verify(history.path, progress=meanwhile)
    assert verify(history.path).good


def test_a_backup_beside_it_does_not_matter(history: History) -> None:
    appended: list[object] = []

    def meanwhile(what: str, done: int, total: int | None) -> None:
        if not appended:
            appended.append(history.point(MIB))

    assert len(verify(history.path, progress=meanwhile).copies) == 4
    assert len(verify(history.path).copies) == 5
