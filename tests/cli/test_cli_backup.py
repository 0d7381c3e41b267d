# SPDX-License-Identifier: MIT
"""`pybitmap verify`, `restore`, `list`, `prune`: what they print, and their exit codes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from commands import Complete, Run
from images import MIB, qemu_img
from points import History

from pybitmap.tools.backup import Repository, points

pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")


@pytest.fixture
def history(memory_path: Path) -> History:
    """Two points, of a disk whose name would steer a terminal."""
    history = History(memory_path / "backups", disk="vda\x1b[2J")
    history.point(2 * MIB, ["write -P 1 0 1M"])
    history.point(3 * MIB, ["write -P 2 100k 1k"])
    return history


def test_list_shows_a_row_for_each_copy(run: Run, history: History) -> None:
    first, second = points(history.path)
    code, out, err = run("list", history.path)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()[2:]]
    assert [line[0] for line in lines] == [first.id[:8], second.id[:8]]
    assert "\x1b" not in out
    assert "2 MiB" in out.splitlines()[2]
    assert out.splitlines()[2].endswith("full: it is the first")
    assert out.splitlines()[3].endswith(f"over {first.id[:8]}")


def test_list_in_json_is_what_the_manifest_says(run: Run, history: History) -> None:
    (history.path / ("vda-" + "0" * 32 + ".qcow2")).touch()
    code, out, err = run("list", history.path, "--json")
    assert (code, err) == (0, "")
    value = json.loads(out)
    manifest = json.loads((history.path / "manifest.json").read_bytes())
    for point in manifest["points"]:
        for copy in point["copies"]:
            assert copy.pop("new") is None
    assert value == {
        "directory": str(history.path),
        "points": manifest["points"],
        "leftovers": ["vda-" + "0" * 32 + ".qcow2"],
    }
    assert "1 files that no point names" in run("list", history.path).err


def test_list_of_nothing(run: Run, tmp_path: Path) -> None:
    code, out, err = run("list", tmp_path)
    assert (code, out) == (2, "")
    assert "no backup directory" in err
    Repository.create(tmp_path / "b").close()
    assert run("list", tmp_path / "b") == (0, f"{tmp_path}/b: no points\n", "")
    assert run("verify", tmp_path / "b") == (0, f"{tmp_path}/b: no points\n", "")


def test_verify_says_good_or_broken_by_its_exit_code(run: Run, history: History) -> None:
    first, second = points(history.path)
    code, out, err = run("verify", history.path, "--full")
    assert (code, err) == (0, "")
    digest = hashlib.sha256(history.contents[second.id]).hexdigest()
    assert out.splitlines()[1] == f"{second.id} vda\\x1b[2J: good, SHA-256 {digest}"
    (history.path / first.copies[0].file).unlink()
    code, out, err = run("verify", history.path)
    assert (code, err) == (1, "")
    assert [": broken: " in line for line in out.splitlines()] == [True, True]
    code, out, err = run("verify", history.path, "--json")
    assert (code, err) == (1, "")
    value = json.loads(out)
    assert value["good"] is False
    assert [len(each["problems"]) for each in value["copies"]] == [1, 1]
    (history.path / "manifest.json").write_text("{}")
    code, out, err = run("verify", history.path)
    assert (code, out) == (2, "")
    assert "'version' is missing" in err


def test_verify_compares_with_a_disk(run: Run, history: History) -> None:
    disk = history.path.with_name("disk")
    data = list(history.contents.values())[-1]
    disk.write_bytes(data)
    assert run("verify", history.path, "--against", disk, "-f", "raw").code == 0
    disk.write_bytes(b"\xff" + data[1:])
    code, out, err = run("verify", history.path, "--against", disk)
    assert (code, err) == (1, "")
    assert out.splitlines()[-1] == f"different: '{disk}' and the copy differ at byte 0"


def test_restore_is_silent_unless_it_is_asked(run: Run, history: History) -> None:
    target = history.path.with_name("x")
    assert run("restore", history.path, "--to", target) == (0, "", "")
    assert target.read_bytes() == list(history.contents.values())[-1]
    code, out, err = run("restore", history.path, "--to", target)
    assert (code, out) == (1, "")
    assert "is there already: --force" in err
    first, _ = points(history.path)
    words = ["--at", first.id[:6], "--to", target, "--force", "--format", "qcow2"]
    code, out, err = run("restore", history.path, *words, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "point": first.id,
        "disk": "vda\x1b[2J",
        "size": 2 * MIB,
        "file": str(target),
        "format": "qcow2",
    }
    assert "1048576" in qemu_img("map", "--output=json", "-f", "qcow2", target)
    code, out, err = run("restore", history.path, "-v", "--to", target.with_name("y"))
    assert (code, out) == (0, "")
    assert "Restoring vda\\x1b[2J" in err
    assert "Reading what was restored" in err


def test_a_restore_that_has_not_restored_exits_with_1(run: Run, history: History) -> None:
    target = history.path.with_name("x")
    for words, why in (
        (["--disk", "vdb"], "no copy of disk 'vdb'"),
        (["--at", "0000"], "no point '0000'"),
    ):
        code, out, err = run("restore", history.path, "--to", target, *words)
        assert (code, out) == (1, "")
        assert why in err
    (history.path / points(history.path)[0].copies[0].file).unlink()
    code, out, err = run("restore", history.path, "--to", target)
    assert (code, out) == (1, "")
    assert "is missing" in err
    assert not target.exists()
    assert run("restore", history.path).code == 2  # --to is missing


def test_prune_says_what_has_gone(run: Run, history: History) -> None:
    first, second = points(history.path)
    code, out, err = run("prune", history.path, "--keep", "1", "--dry-run")
    assert (code, out) == (0, "")
    assert f"point {first.id}" in err
    assert "would go" in err
    assert points(history.path) == (first, second)
    code, out, err = run("prune", history.path, "--point", first.id[:8], "--json")
    assert (code, err) == (0, "")
    value = json.loads(out)
    assert value["points"] == [first.id]
    assert value["rebased"] == [second.copies[0].file]
    assert first.copies[0].file in value["deleted"]
    assert [each.id for each in points(history.path)] == [second.id]
    code, out, err = run("prune", history.path, "--keep", "1")
    assert (code, out) == (0, "")
    assert "nothing to take out" in err
    assert run("prune", history.path, "--keep", "1", "-q") == (0, "", "")


def test_a_prune_that_changes_nothing_exits_with_1(run: Run, history: History) -> None:
    first, second = points(history.path)
    for words, why in (
        (["--point", second.id], "is the newest"),
        (["--point", "0000"], "no point"),
    ):
        code, out, err = run("prune", history.path, *words)
        assert (code, out) == (1, "")
        assert why in err
    with Repository.open(history.path, writing=True):
        code, out, err = run("prune", history.path, "--keep", "1")
        assert (code, out) == (1, "")
        assert "in this process already" in err
    for usage in (["--keep", "0"], [], ["--keep", "1", "--point", first.id]):
        assert run("prune", history.path, *usage).code == 2
    assert points(history.path) == (first, second)


def test_disks_and_points_are_completed(completed: Complete, history: History) -> None:
    """But no name that a shell would take apart; and nothing where there is no backup."""
    history.disk = "vdb"
    history.point(MIB, full=True)

    ids = [each.id for each in points(history.path)]
    assert completed("restore", history.path, "--disk", "") == ["plain,vdb"]
    assert completed("prune", history.path, "--point", "") == [f"plain,{each}" for each in ids]
    assert completed("verify", history.path, "--at", ids[0][:8]) == [f"plain,{ids[0]}"]
    assert completed("verify", history.path.parent, "--at", "") == []
