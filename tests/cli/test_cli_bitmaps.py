# SPDX-License-Identifier: MIT
"""The commands for bitmaps that no program has open, on a local store and on a qcow2 image."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from commands import Run, spawn
from commands import serving as served
from peers import peer

pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")

from pybitmap import BlockGraph, BlockNode, HBitmap
from pybitmap.cli import bitmaps as commands
from pybitmap.cli import main
from pybitmap.errors import StoreError
from pybitmap.sizes import parse_size
from pybitmap.store import LocalStore, Qcow2Store, Store
from pybitmap.store.local import LocalVolume

SIZE = (64 << 20) + 512


class Disk(ABC):
    """A target with one disk, and the programs that use it."""

    #: Of a program's node.
    node: str

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def store(self) -> Store: ...

    @contextmanager
    def open(self) -> Iterator[BlockNode]:
        """As a program does that closes it."""
        with BlockGraph() as graph:
            yield graph.add_node(self.node, store=self.store())

    def mark(self, name: str, *ranges: tuple[int, int]) -> None:
        with self.open() as node:
            for offset, length in ranges:
                node.bitmaps[name].set(offset, length)

    @abstractmethod
    def spoil(self) -> None:
        """Whatever bitmaps there are, they are inconsistent afterwards."""

    def areas(self, name: str) -> list[tuple[int, int]]:
        with self.open() as node:
            return list(node.bitmaps[name].areas())

    def flags(self) -> dict[str, str]:
        """As a program finds it: what each bitmap is."""
        with self.open() as node:
            return {
                name: "inconsistent"
                if bitmap.inconsistent
                else "enabled"
                if bitmap.enabled
                else "disabled"
                for name, bitmap in node.bitmaps.items()
            }


class LocalDisk(Disk):
    node = "disk0"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "disks.bitmaps")
        with BlockGraph() as graph:
            node = graph.add_node(self.node, SIZE, self.store())
            node.add_bitmap("first", persistent=True)
            node.remove_bitmap("first")

    def store(self) -> Store:
        return LocalStore(self.path)

    def spoil(self) -> None:
        with closing(sqlite3.connect(self.path / "catalog.sqlite")) as catalog, catalog:
            catalog.execute("UPDATE bitmap SET in_use = 'another-boot 1'")


class Image(Disk):
    node = "qcow2"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "disk.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", self.path, SIZE)

    def store(self) -> Store:
        return Qcow2Store(self.path)

    def spoil(self) -> None:
        graph = BlockGraph()
        graph.add_node(self.node, store=self.store()).close(discard=True)


def qemu_img(*args: object) -> str:
    command = [peer("qemu-img", "qemu-utils"), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def qemu_flags(path: Path) -> dict[str, list[str]]:
    """What `qemu-img info` says of the bitmaps."""
    info = json.loads(qemu_img("info", "--output=json", path))
    found = info["format-specific"]["data"].get("bitmaps", [])
    return {bitmap["name"]: bitmap["flags"] for bitmap in found}


DISKS: list[type[Disk]] = [LocalDisk, Image]


@pytest.fixture(params=DISKS, ids=["local", "qcow2"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    made: Disk = request.param(tmp_path)
    return made


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path)


@pytest.fixture
def done(run: Run) -> Callable[..., str]:
    """Runs a command that succeeds, in silence but for its output."""

    def done(*args: str | Path) -> str:
        result = run(*args)
        assert (result.code, result.err) == (0, "")
        return result.out

    return done


Done = Callable[..., str]


def listed(done: Done, disk: Disk, *options: str) -> dict[str, dict[str, Any]]:
    report = json.loads(done("info", disk.path, "--json", *options))
    return {bitmap["name"]: bitmap for bitmap in report["bitmaps"]}


# ---- add, remove, enable, disable, clear ----------------------------------------------------


def test_add_makes_a_clean_bitmap_that_records(done: Done, disk: Disk) -> None:
    assert done("add", disk.path, "daily") == ""
    with disk.open() as node:
        bitmap = node.bitmaps["daily"]
        assert (bitmap.granularity, bitmap.count(), bitmap.enabled) == (65536, 0, True)
        assert bitmap.persistent


def test_add_has_options(done: Done, disk: Disk) -> None:
    done("add", disk.path, "weekly", "-g", "1M", "--disabled")
    with disk.open() as node:
        assert node.bitmaps["weekly"].granularity == 1 << 20
        assert not node.bitmaps["weekly"].enabled


def test_the_name_of_a_bitmap_may_have_slashes(done: Done, disk: Disk) -> None:
    done("add", disk.path, "a/b", *(["--node", "disk0"] if disk.node == "disk0" else []))
    assert list(listed(done, disk)) == ["a/b"]
    done("remove", disk.path, "a/b")
    assert listed(done, disk) == {}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["daily"], "Bitmap already exists: daily"),
        (["x", "-g", "1000"], "1000 is not a power of 2"),
        (["x", "-g", "64KB"], "64000 is not a power of 2 (64KB is in powers of 1000: write 64K)"),
        (["x", "-g", "256"], "Granularity must be power of 2 and at least 512"),
        (["x", "-g", "many"], "'many' is not a size in bytes"),
        (["x", "--size", "1M"], "1048576"),
        ([""], "Bitmap name cannot be empty"),
        (["x", "--node", "other"], "node"),
        (["x\udcff"], "Bitmap name is no valid Unicode: 'x\\udcff'"),
        ([], "Missing argument 'NAME'"),
    ],
)
def test_a_bitmap_that_cannot_be_is_refused(
    run: Run, done: Done, disk: Disk, args: list[str], words: str
) -> None:
    done("add", disk.path, "daily")
    disk.mark("daily", (0, 1))
    result = run("add", disk.path, *args)
    assert (result.code, result.out) == (2, "")
    assert words in result.err
    assert list(disk.flags().items()) == [("daily", "enabled")]
    assert disk.areas("daily") == [(0, 65536)]


def test_several_are_enabled_disabled_cleared_removed(done: Done, disk: Disk) -> None:
    for name in "abc":
        done("add", disk.path, name)
        disk.mark(name, (0, 1))
    done("disable", disk.path, "a", "c")
    assert disk.flags() == {"a": "disabled", "b": "enabled", "c": "disabled"}
    done("enable", disk.path, "c")
    assert disk.flags() == {"a": "disabled", "b": "enabled", "c": "enabled"}
    done("clear", disk.path, "a", "b")
    assert [disk.areas(name) for name in "abc"] == [[], [], [(0, 65536)]]
    done("remove", disk.path, "a", "c")
    assert disk.flags() == {"b": "enabled"}


@pytest.mark.parametrize("command", ["remove", "clear", "enable", "disable", "repair", "dump"])
def test_a_missing_bitmap_is_named_and_nothing_changes(
    run: Run, done: Done, disk: Disk, command: str
) -> None:
    done("add", disk.path, "daily")
    disk.mark("daily", (0, 1))
    names = ["dayly"] if command == "dump" else ["daily", "dayly"]
    assert run(command, disk.path, *names) == (
        2,
        "",
        f"pybitmap: {disk.path}: Dirty bitmap 'dayly' not found; bitmaps there: daily\n",
    )
    assert disk.flags() == {"daily": "enabled"}
    assert disk.areas("daily") == [(0, 65536)]


# ---- inconsistent ones ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["clear", "enable", "disable", "dump", "merge", "take", "put-back"]
)
def test_an_inconsistent_bitmap_is_refused_with_the_reason(
    run: Run, done: Done, disk: Disk, command: str
) -> None:
    done("add", disk.path, "old")
    disk.spoil()
    done("add", disk.path, "new")
    args = {
        "merge": ["new", "old"],
        "take": ["old", "--as", "taken"],
        "put-back": ["old", "--into", "new"],
    }
    result = run(command, disk.path, *args.get(command, ["old"]))
    assert (result.code, result.out) == (2, "")
    words = "Bitmap 'old' is inconsistent and cannot be used: it was in use when"
    assert result.err.startswith(f"pybitmap: {disk.path}: {words}")
    assert disk.flags() == {"old": "inconsistent", "new": "enabled"}


def test_all_inconsistent_ones_are_removed(done: Done, disk: Disk) -> None:
    done("add", disk.path, "a")
    done("add", disk.path, "b")
    assert done("remove", disk.path, "--stale") == ""
    disk.spoil()
    done("add", disk.path, "c")
    assert done("remove", disk.path, "--stale") == "a\nb\n"
    assert disk.flags() == {"c": "enabled"}


def test_a_repaired_bitmap_is_all_dirty_and_records_if_it_did(done: Done, disk: Disk) -> None:
    done("add", disk.path, "a")
    done("add", disk.path, "b", "--disabled")
    disk.spoil()
    done("repair", disk.path, "a")
    assert disk.flags() == {"a": "enabled", "b": "inconsistent"}
    assert done("repair", disk.path, "--all") == "b\n"
    assert [disk.areas(name) for name in "ab"] == [[(0, SIZE)], [(0, SIZE)]]
    assert disk.flags() == {"a": "enabled", "b": "disabled"}


def test_a_bitmap_that_is_not_inconsistent_is_not_repaired(
    run: Run, done: Done, disk: Disk
) -> None:
    done("add", disk.path, "broken")
    disk.spoil()
    done("add", disk.path, "a")
    for names in (["a"], ["broken", "a"]):
        assert run("repair", disk.path, *names) == (
            2,
            "",
            "pybitmap: Bitmap 'a' is not inconsistent\n",
        )
    assert disk.flags() == {"broken": "inconsistent", "a": "enabled"}
    assert disk.areas("a") == []
    assert done("repair", disk.path, "--all") == "broken\n"
    assert done("repair", disk.path, "--all") == ""


@pytest.mark.parametrize(
    ("command", "option", "changed"),
    [("remove", "--stale", "removed"), ("repair", "--all", "repaired")],
)
def test_what_was_changed_is_told_in_json(
    run: Run, done: Done, disk: Disk, command: str, option: str, changed: str
) -> None:
    def told(*args: str) -> list[Any]:
        report = json.loads(done(command, disk.path, "--json", *args))
        assert set(report) == {"target", "format", changed}
        assert report["target"] == str(disk.path)
        assert report["format"] == json.loads(done("info", disk.path, "--json"))["format"]
        assert len({each["node"] for each in report[changed]}) <= 1
        return [each["name"] for each in report[changed]]

    done("add", disk.path, "a")
    assert told(option) == []
    for name in ("b", "c"):
        done("add", disk.path, name)
    disk.spoil()
    assert told("b", "-q") == ["b"]
    assert told(option) == ["a", "c"]
    result = run(command, disk.path, "none", "--json", "-q")
    assert (result.code, result.out) == (2, "")
    assert "'none' not found" in result.err
    with open("/dev/full", "w") as full:
        failed = spawn(command, disk.path, option, "--json", stdout=full)
    assert failed.code == 2
    assert "standard output: No space left" in failed.err


@pytest.mark.parametrize(("command", "option"), [("remove", "--stale"), ("repair", "--all")])
def test_names_or_all_but_not_both(run: Run, disk: Disk, command: str, option: str) -> None:
    for args in ([], ["a", option]):
        result = run(command, disk.path, *args)
        assert result.code == 2
        assert f"Give either the names of bitmaps or {option}." in result.err


# ---- take, put-back -------------------------------------------------------------------------


def test_take_leaves_a_bitmap_clean_and_put_back_undoes_it(
    run: Run, done: Done, disk: Disk
) -> None:
    done("add", disk.path, "daily", "-g", "4K")
    disk.mark("daily", (1000, 5000))
    done("take", disk.path, "daily", "--as", "copying")
    assert (disk.areas("daily"), disk.areas("copying")) == ([], [(0, 8192)])
    assert disk.flags() == {"daily": "enabled", "copying": "disabled"}
    disk.mark("daily", (1 << 20, 1))  # the machine runs
    assert disk.areas("copying") == [(0, 8192)]
    result = run("take", disk.path, "daily", "--as", "copying")
    assert (result.code, result.err) == (2, "pybitmap: Bitmap already exists: copying\n")
    result = run("put-back", disk.path, "daily", "--into", "daily")
    assert (result.code, "they are to be two" in result.err) == (2, True)
    done("put-back", disk.path, "copying", "--into", "daily")
    assert disk.flags() == {"daily": "enabled"}
    assert disk.areas("daily") == [(0, 8192), (1 << 20, 4096)]


def test_what_is_taken_stays_in_its_node(run: Run, done: Done, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for node in ("one", "two"):
        done("add", store, f"{node}/daily", "--size", "1M")
    done("take", store, "one/daily", "--as", "one/a")
    done("take", store, "two/daily", "--as", "b")
    result = run("put-back", store, "one/a", "--into", "two/daily")
    assert (result.code, "they are to be two" in result.err) == (2, True)
    nodes = LocalStore(store).entries()
    assert [[each.name for each in node.bitmaps] for node in nodes] == [
        ["daily", "a"],
        ["daily", "b"],
    ]


# ---- resize ---------------------------------------------------------------------------------


def test_resize_takes_the_bitmaps_of_a_node_along(run: Run, done: Done, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for node in ("one", "two"):
        done("add", store, f"{node}/daily", "--size", "1M", "-g", "4K")

    def sizes() -> list[int]:
        return [node.size for node in LocalStore(store).entries()]

    done("resize", store, "2M", "--node", "two")
    assert sizes() == [1 << 20, 2 << 20]
    for args, why in (
        (["1M", "--node", "two"], "allow that with --shrink"),
        (["4M"], "choose a node with --node; nodes there: one, two"),
        (["4M", "--node", "three"], "Node 'three' not found; nodes there: one, two"),
        ([1 << 63, "--node", "one"], ""),
    ):
        result = run("resize", store, *args)
        assert result.code == 2
        assert why in result.err
    assert sizes() == [1 << 20, 2 << 20]
    done("resize", store, "512K", "--node", "two", "--shrink")
    done("resize", store, "1M", "--node", "two")
    assert done("dump", store, "two/daily", "--format", "csv").split() == [
        "offset,length",
        "524288,524288",
    ]


def test_the_size_of_an_image_is_for_qemu_img(run: Run, tmp_path: Path) -> None:
    image = Image(tmp_path)
    result = run("resize", image.path, "4M")
    assert result.code == 2
    assert "see qemu-img resize" in result.err


# ---- merge ----------------------------------------------------------------------------------


def test_merge_adds_what_is_dirty_in_the_sources(done: Done, disk: Disk) -> None:
    for name, granularity in (("week", "1M"), ("monday", "64K"), ("tuesday", "512")):
        done("add", disk.path, name, "-g", granularity)
    disk.mark("week", (0, 1))
    disk.mark("monday", (5 << 20, 1))
    disk.mark("tuesday", (SIZE - 1, 1))
    done("merge", disk.path, "week", "monday", "tuesday")
    assert disk.areas("week") == [(0, 1 << 20), (5 << 20, 1 << 20), (64 << 20, 512)]
    assert disk.areas("monday") == [(5 << 20, 65536)]


@pytest.mark.parametrize("kind", DISKS)
def test_merge_takes_sources_of_another_target(
    done: Done, disk: Disk, kind: type[Disk], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = kind(tmp_path / "other")
    done("add", other.path, "source", "-g", "512")
    other.mark("source", (1000, 1))
    done("add", disk.path, "week")
    done("merge", disk.path, "week", "source", "-b", other.path)
    assert disk.areas("week") == [(0, 65536)]
    assert other.flags() == {"source": "enabled"}


def test_merge_takes_the_target_for_the_source_if_it_is(done: Done, disk: Disk) -> None:
    done("add", disk.path, "a")
    done("add", disk.path, "b")
    disk.mark("b", (0, 1))
    done("merge", disk.path, "a", "b", "-b", disk.path.parent / "." / disk.path.name)
    assert disk.areas("a") == [(0, 65536)]


def test_sources_of_another_size_are_refused(
    run: Run, done: Done, disk: Disk, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    done("add", disk.path, "week")
    done("add", other, "n/b", "--size", "1M")
    result = run("merge", disk.path, "week", "b", "-b", other)
    assert result.code == 2
    assert f"(destination size is {SIZE}, source size is 1048576)" in result.err
    assert disk.areas("week") == []


# ---- dump -----------------------------------------------------------------------------------


def test_dump_prints_extents(done: Done, disk: Disk) -> None:
    done("add", disk.path, "b", "-g", "4K")
    assert done("dump", disk.path, "b") == "[]\n"
    assert done("dump", disk.path, "b", "--format", "csv") == "offset,length\n"
    disk.mark("b", (5000, 1), (1 << 20, 8192), (SIZE - 1, 1))
    extents = [(4096, 4096), (1 << 20, 8192), (64 << 20, 512)]
    assert json.loads(done("dump", disk.path, "b")) == [
        {"offset": offset, "length": length} for offset, length in extents
    ]
    rows = list(csv.reader(io.StringIO(done("dump", disk.path, "b", "--format", "csv"))))
    assert rows == [["offset", "length"], *([str(a), str(b)] for a, b in extents)]


def test_dump_prints_what_is_coarser_as_a_coarser_bitmap_has_it(done: Done, disk: Disk) -> None:
    done("add", disk.path, "fine", "-g", "512")
    disk.mark("fine", (1000, 1), (40_000, 30_000), (262_144, 1), (5 << 20, 1), (SIZE - 1, 1))
    fine = disk.areas("fine")
    for size in ("512", "1K", "64K", "1M", "1T"):
        coarse = HBitmap(SIZE, group_size=parse_size(size))
        for offset, length in fine:
            coarse.set(offset, length)
        found = json.loads(done("dump", disk.path, "fine", "-g", size, "--json"))
        assert [(each["offset"], each["length"]) for each in found] == list(coarse.areas())


def test_dump_in_json_is_not_csv(run: Run, done: Done, disk: Disk) -> None:
    done("add", disk.path, "a")
    assert json.loads(done("dump", disk.path, "a", "--json", "--format", "json")) == []
    result = run("dump", disk.path, "a", "--json", "--format", "csv")
    assert (result.code, result.out) == (2, "")
    assert "Give either --json or --format csv." in result.err


def test_check_in_json(run: Run, done: Done, disk: Disk) -> None:
    done("add", disk.path, "a")
    node = None if isinstance(disk, Image) else "disk0"
    report = json.loads(done("check", disk.path, "--json"))
    assert report["good"] is True
    assert report["bitmaps"] == [{"node": node, "name": "a", "reason": None}]
    disk.spoil()
    result = run("check", disk.path, "--json")
    report = json.loads(result.out)
    assert (result.code, result.err, report["good"]) == (1, "", False)
    assert report["bitmaps"][0]["reason"].startswith("it was in use when")
    assert (report["target"], report["problems"]) == (str(disk.path), [])


def test_sizes_of_all_kinds_are_taken(done: Done, tmp_path: Path) -> None:
    done("add", tmp_path / "s", "n/b", "--size", "1.5MB", "-g", "0x1000")
    info = json.loads(done("info", tmp_path / "s", "--json"))["bitmaps"][0]
    assert (info["size"], info["granularity"]) == (1_500_000, 4096)
    done("resize", tmp_path / "s", "1_600_000")
    assert json.loads(done("info", tmp_path / "s", "--json"))["nodes"][0]["size"] == 1_600_000


def test_dump_prints_more_than_it_takes_at_once(done: Done, disk: Disk) -> None:
    done("add", disk.path, "b", "-g", "512")
    disk.mark("b", *((offset, 1) for offset in range(0, 10_000 * 1024, 1024)))
    extents = json.loads(done("dump", disk.path, "b"))
    assert extents == [{"offset": i * 1024, "length": 512} for i in range(10_000)]
    assert len(done("dump", disk.path, "b", "--format", "csv").splitlines()) == 10_001


def test_a_reader_of_extents_may_go_away(done: Done, disk: Disk) -> None:
    done("add", disk.path, "b", "-g", "512")
    disk.mark("b", *((offset, 1) for offset in range(0, 30_000 * 1024, 1024)))
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        assert spawn("dump", disk.path, "b", stdout=write_end) == (141, "", "")
    finally:
        os.close(write_end)
    assert disk.flags() == {"b": "enabled"}


# ---- info -----------------------------------------------------------------------------------


def test_info_lists_bitmaps(done: Done, disk: Disk) -> None:
    done("add", disk.path, "daily")
    done("add", disk.path, "weekly", "-g", "1M", "--disabled")
    disk.mark("weekly", (0, 1))
    first, *_, daily, weekly = done("info", disk.path).splitlines()
    assert first.startswith(f"{disk.path}: ")
    assert daily.split() == ["daily", "64K", "enabled"]
    assert weekly.split() == ["weekly", "1M", "disabled"]
    daily, weekly = done("info", disk.path, "--count").splitlines()[-2:]
    assert daily.split() == ["daily", "64K", "0", "enabled"]
    assert weekly.split() == ["weekly", "1M", "1048576", "(1", "MiB)", "disabled"]


def test_info_in_json_has_all_there_is_to_say(done: Done, disk: Disk) -> None:
    done("add", disk.path, "daily", "-g", "4K")
    disk.mark("daily", (0, 1))
    report = json.loads(done("info", disk.path, "--json"))
    node = None if isinstance(disk, Image) else "disk0"
    assert report == {
        "target": str(disk.path),
        "format": "qcow2" if isinstance(disk, Image) else "local",
        "nodes": [{"name": node, "size": SIZE}],
        "bitmaps": [
            {
                "node": node,
                "name": "daily",
                "size": SIZE,
                "granularity": 4096,
                "count": 4096,
                "enabled": True,
                "persistent": True,
                "in_use": False,
                "inconsistent": False,
                "reason": None,
            }
        ],
    }
    assert listed(done, disk, "--no-count")["daily"]["count"] is None


def test_info_says_why_a_bitmap_is_broken(done: Done, disk: Disk) -> None:
    done("add", disk.path, "a b")
    disk.spoil()
    bitmap = listed(done, disk)["a b"]
    assert (bitmap["inconsistent"], bitmap["in_use"], bitmap["count"]) == (True, True, None)
    assert bitmap["reason"].startswith("it was in use when")
    out = done("info", disk.path)
    assert "inconsistent, enabled, in use" in out
    assert f"Bitmap 'a b' is inconsistent: {bitmap['reason']}.\n" in out
    assert f"pybitmap repair {disk.path} 'a b'\n" in out


def test_info_without_counts_does_not_read_bits(
    done: Done, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("add", disk.path, "b")

    def counted(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(commands, "counted", counted)
    done("info", disk.path)
    listed(done, disk, "--no-count")
    with pytest.raises(AssertionError):
        main(["info", str(disk.path), "--count"])


def test_control_characters_of_a_bitmap_do_not_reach_the_terminal(
    run: Run, done: Done, disk: Disk
) -> None:
    name = "\x1b[31mred"
    done("add", disk.path, name)
    assert "\\x1b[31mred" in done("info", disk.path)
    assert "\\x1b[31mred" in done("check", disk.path)
    assert "\x1b" not in run("clear", disk.path, "x").err
    assert list(listed(done, disk)) == [name]


def test_info_where_there_is_nothing(done: Done, disk: Disk) -> None:
    assert done("info", disk.path).endswith("\nNo bitmaps.\n")
    assert listed(done, disk) == {}
    assert done("check", disk.path) == f"{disk.path}: no bitmaps\n"


# ---- check ----------------------------------------------------------------------------------


def test_check_finds_what_is_broken(run: Run, done: Done, disk: Disk) -> None:
    done("add", disk.path, "a")
    assert done("check", disk.path) == "a: good\n"
    disk.spoil()
    done("add", disk.path, "b")
    result = run("check", disk.path)
    assert (result.code, result.err) == (1, "")
    broken, good = result.out.splitlines()
    assert broken.startswith("a: it was in use when")
    assert good == "b: good"


def test_check_finds_bits_that_are_cut_short(run: Run, done: Done, tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path)
    done("add", disk.path, "a")
    (words,) = disk.path.glob("*.words")
    os.truncate(words, 8)
    result = run("check", disk.path)
    assert result.code == 1
    assert "cut short" in result.out


def test_check_finds_a_catalog_that_is_none(run: Run, tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path)
    (disk.path / "catalog.sqlite").write_bytes(b"nonsense" * 1000)
    result = run("check", disk.path)
    assert (result.code, result.err) == (1, "")
    assert "catalog.sqlite" in result.out
    assert len(result.out.splitlines()) == 1


def test_check_finds_a_bitmap_whose_clusters_are_free(run: Run, done: Done, image: Image) -> None:
    done("add", image.path, "a")
    with open(image.path, "r+b") as file:
        file.seek(48)  # refcount_table_offset
        file.seek(int.from_bytes(file.read(8), "big"))
        file.seek(int.from_bytes(file.read(8), "big"))
        file.write(bytes(2 * 1000))
    result = run("check", image.path)
    assert result.code == 1
    assert "which is said to be free: run qemu-img check -r all" in result.out
    assert result.out.endswith("\na: good\n")


def test_what_cannot_be_checked_is_an_error(run: Run, tmp_path: Path) -> None:
    assert run("check", tmp_path / "none").code == 2


# ---- QEMU -----------------------------------------------------------------------------------


def test_qemu_sees_what_was_done(done: Done, image: Image) -> None:
    done("add", image.path, "a")
    done("add", image.path, "b", "-g", "512", "--disabled")
    assert qemu_flags(image.path) == {"a": ["auto"], "b": []}
    done("disable", image.path, "a")
    done("enable", image.path, "b")
    assert qemu_flags(image.path) == {"a": [], "b": ["auto"]}
    image.spoil()
    assert qemu_flags(image.path) == {"a": ["in-use"], "b": ["in-use", "auto"]}
    done("repair", image.path, "--all")
    assert qemu_flags(image.path) == {"a": [], "b": ["auto"]}
    done("remove", image.path, "a")
    assert qemu_flags(image.path) == {"b": ["auto"]}
    assert "No errors were found" in qemu_img("check", image.path)


def test_what_qemu_did_is_seen(done: Done, image: Image) -> None:
    qemu_img("bitmap", "--add", "-g", "1M", image.path, "a")
    qemu_img("bitmap", "--add", "--disable", image.path, "b")
    command = [peer("qemu-io", "qemu-utils"), "-c", "write 3M 2M", str(image.path)]
    subprocess.run(command, check=True, capture_output=True)
    bitmaps = listed(done, image)
    assert {name: each["granularity"] for name, each in bitmaps.items()} == {
        "a": 1 << 20,
        "b": 65536,
    }
    assert {name: each["enabled"] for name, each in bitmaps.items()} == {"a": True, "b": False}
    assert json.loads(done("dump", image.path, "a")) == [{"offset": 3 << 20, "length": 2 << 20}]
    qemu_img("bitmap", "--merge", "a", image.path, "b")
    done("clear", image.path, "a")
    qemu_img("bitmap", "--merge", "b", image.path, "a")
    assert json.loads(done("dump", image.path, "a")) == [{"offset": 3 << 20, "length": 2 << 20}]


# ---- what is no target ----------------------------------------------------------------------

EVERY_COMMAND = [
    ["info"],
    ["check"],
    ["add", "b"],
    ["remove", "b"],
    ["remove", "--stale"],
    ["clear", "b"],
    ["enable", "b"],
    ["disable", "b"],
    ["merge", "b", "c"],
    ["dump", "b"],
    ["repair", "b"],
    ["repair", "--all"],
]


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=" ".join)
def test_every_command_refuses_what_is_no_target(
    run: Run, tmp_path: Path, command: list[str]
) -> None:
    raw, empty, folder, pipe = (tmp_path / name for name in ("raw", "empty", "folder", "pipe"))
    raw.write_bytes(bytes(1 << 16))
    empty.mkdir()
    folder.mkdir()
    (folder / "x").touch()
    os.mkfifo(pipe)
    for path, words in (
        (tmp_path / "none", "No such file or directory"),
        (raw, "not a qcow2 image; bitmaps of other disks can be in a local store, a directory"),
        (empty, "an empty directory: it has no catalog.sqlite"),
        (folder, "a directory, but no local store: it has no catalog.sqlite"),
        (pipe, "neither a qcow2 image nor the directory of a local store"),
    ):
        if command[0] == "add" and path in (tmp_path / "none", empty):
            words = "neither an image nor a local store is there; with the --size of the disk, "
            words += "a store is made"
        assert run(command[0], path, *command[1:]) == (2, "", f"pybitmap: {path}: {words}\n")
    assert sorted(os.listdir(tmp_path)) == ["empty", "folder", "pipe", "raw"]
    assert os.listdir(empty) == []


def test_version_2_of_the_format_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "v2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "1M")
    result = run("info", path)
    assert result.code == 2
    assert "version 2, which has no bitmaps" in result.err
    qemu_img("amend", "-f", "qcow2", "-o", "compat=1.1", path)  # as the message says
    assert run("add", path, "b").code == 0


def test_a_target_that_is_open_elsewhere_is_refused(run: Run, done: Done, disk: Disk) -> None:
    done("add", disk.path, "b")
    with disk.open():
        for command in EVERY_COMMAND:
            if command[0] != "add":
                result = run(command[0], disk.path, *command[1:])
                assert (result.code, result.out) == (2, "")
                assert len(result.err.splitlines()) == 1, result.err
                assert str(disk.path) in result.err
    assert disk.flags() == {"b": "enabled"}


# ---- nodes of a local store -----------------------------------------------------------------


@pytest.fixture
def shared(done: Done, tmp_path: Path) -> Path:
    """A local store with two nodes."""
    path = tmp_path / "shared"
    done("add", path, "d0/daily", "--size", "1M")
    done("add", path, "d1/daily", "--size", "2M")
    return path


def names(done: Done, path: Path) -> list[tuple[str, str]]:
    report = json.loads(done("info", path, "--json"))
    return [(bitmap["node"], bitmap["name"]) for bitmap in report["bitmaps"]]


def test_a_store_is_made_with_the_first_node(done: Done, tmp_path: Path) -> None:
    done("add", tmp_path / "new", "disk0/daily", "--size", "20G")
    done("add", tmp_path / "new", "weekly")
    done("add", tmp_path / "new", "disk0/monthly")
    (tmp_path / "empty").mkdir()
    done("add", tmp_path / "empty", "a/b", "--node", "disk0", "--size", "20G")
    assert names(done, tmp_path / "new") == [("disk0", x) for x in ("daily", "weekly", "monthly")]
    assert names(done, tmp_path / "empty") == [("disk0", "a/b")]


def test_a_new_node_needs_a_size_and_a_name(run: Run, shared: Path, tmp_path: Path) -> None:
    result = run("add", shared, "d2/b")
    assert result.code == 2
    assert "a new node 'd2' needs its --size; nodes there: d0, d1\n" in result.err
    result = run("add", shared, "b")
    assert result.code == 2
    assert "'b' is to be a bitmap of which node: d0, d1? Write NODE/b\n" in result.err
    result = run("add", tmp_path / "new", "b", "--size", "1M")
    assert result.code == 2
    assert "'b' is to be a bitmap of which node? Write NODE/b\n" in result.err
    for args in (["n/"], ["n/b", "-g", "1000"], ["/b"]):
        assert run("add", tmp_path / "new", *args, "--size", "1M").code == 2
    assert not (tmp_path / "new").exists()


def test_a_slash_without_a_size_names_no_bitmap_of_the_only_node(
    run: Run, done: Done, tmp_path: Path
) -> None:
    """Whoever forgets the size of a new disk must not get a bitmap of another disk."""
    path = tmp_path / "new"
    done("add", path, "vm1/daily", "--size", "1M")
    result = run("add", path, "vm2/daily")
    assert (result.code, result.out) == (2, "")
    assert "a new node 'vm2' needs its --size; nodes there: vm1" in result.err
    assert names(done, path) == [("vm1", "daily")]


def test_an_add_that_fails_leaves_no_node(run: Run, done: Done, shared: Path) -> None:
    for args in (["d2/b", "--size", "1E"], ["d2/" + "x" * 1024, "--size", "1M"]):
        assert run("add", shared, *args).code == 2
        assert "d2" not in done("info", shared)
    done("add", shared, "d2/b", "--size", "3M")


def test_a_node_without_bitmaps_may_have_another_size(run: Run, done: Done, shared: Path) -> None:
    result = run("add", shared, "d0/b", "--size", "2M")
    assert result.code == 2
    assert "1048576" in result.err
    done("remove", shared, "d0/daily")
    done("add", shared, "d0/b", "--size", "2M")
    assert "node d0: 2097152 (2 MiB)\n" in done("info", shared)
    assert names(done, shared) == [("d0", "b"), ("d1", "daily")]


def test_bitmaps_of_several_nodes_are_changed_at_once(done: Done, shared: Path) -> None:
    done("disable", shared, "d0/daily", "d1/daily")
    assert [line.split() for line in done("info", shared).splitlines()[-2:]] == [
        ["d0/daily", "64K", "disabled"],
        ["d1/daily", "64K", "disabled"],
    ]
    assert done("check", shared) == "d0/daily: good\nd1/daily: good\n"
    done("add", shared, "weekly", "--node", "d1")
    done("remove", shared, "daily", "weekly", "--node", "d1")
    assert names(done, shared) == [("d0", "daily")]


def test_the_node_has_to_be_said_where_there_are_several(
    run: Run, done: Done, shared: Path
) -> None:
    result = run("clear", shared, "daily")
    assert "Dirty bitmap 'daily' not found; bitmaps there: d0/daily, d1/daily" in result.err, (
        result.err
    )
    result = run("clear", shared, "daily", "--node", "d2")
    assert "Node 'd2' not found; nodes there: d0, d1" in result.err
    done("add", shared, "d0/x/b", "--node", "d0")
    done("add", shared, "d0/daily/b", "--size", "1M", "--node", "d0/x")
    done("add", shared, "b", "--node", "d0/x")
    done("add", shared, "x/b", "--node", "d0")
    result = run("clear", shared, "d0/x/b")
    assert "'d0/x/b' can mean a bitmap of several nodes, d0, d0/x: choose" in result.err
    done("clear", shared, "x/b", "--node", "d0")


def test_an_image_has_no_named_node(run: Run, done: Done, image: Image) -> None:
    result = run("add", image.path, "b", "--node", "n")
    assert result.err == f"pybitmap: {image.path}: a qcow2 image has one node, without a name\n"
    assert result.code == 2


# ---- interruptions and full disks -----------------------------------------------------------


@contextmanager
def interrupted_while(
    what: str, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT
) -> Iterator[list[str]]:
    """The signal comes with the first progress of that kind."""
    heard: list[str] = []

    @contextmanager
    def progress_bars() -> Iterator[Callable[[str, int, int | None], None]]:
        def show(work: str, done: int, total: int | None) -> None:
            if work.startswith(what) and not heard:
                heard.append(work)
                os.kill(os.getpid(), number)

        yield show

    monkeypatch.setattr(commands, "progress_bars", progress_bars)
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield heard
    finally:
        signal.signal(number, before)


@pytest.fixture
def ready(done: Done, disk: Disk) -> Disk:
    done("add", disk.path, "a", "-g", "512")
    disk.mark("a", (0, 1), (1 << 20, 1 << 20))
    done("add", disk.path, "b", "-g", "512")
    return disk


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_while_storing_counts_when_all_is_stored(
    ready: Disk, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with interrupted_while("stor", monkeypatch, number) as heard, pytest.raises(KeyboardInterrupt):
        main(["merge", str(ready.path), "b", "a"])
    assert heard
    assert ready.flags() == {"a": "enabled", "b": "enabled"}
    assert ready.areas("b") == [(0, 512), (1 << 20, 1 << 20)]


def test_an_interruption_while_loading_changes_nothing(
    ready: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted_while("load", monkeypatch) as heard, pytest.raises(KeyboardInterrupt):
        main(["merge", str(ready.path), "b", "a"])
    assert heard
    assert ready.flags() == {"a": "enabled", "b": "enabled"}


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield path
    finally:
        # Not before the last file there is unmapped: garbage may map one.
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> None:
    """Take all the space that is left."""
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))


@pytest.mark.parametrize("kind", DISKS, ids=["local", "qcow2"])
def test_where_there_is_no_space_everything_stays_as_it_was(
    run: Run, done: Done, small: Path, kind: type[Disk], tmp_path: Path
) -> None:
    source = LocalDisk(tmp_path)
    done("add", source.path, "noise", "-g", "512")
    source.mark("noise", *((offset, 1) for offset in range(0, 64 << 20, 1024)))
    disk = kind(small)
    done("add", disk.path, "a", "-g", "64K")
    disk.mark("a", (0, 1))
    done("add", disk.path, "b", "-g", "512" if kind is Image else "64K", "--disabled")
    fill(small / "filling")
    before = disk.flags()
    for args in (["merge", "b", "noise", "-b", source.path], ["add", "c", "-g", "512"]):
        result = run(args[0], disk.path, *args[1:])
        if kind is Image and args[0] == "add":
            continue  # the image may have room within
        assert result.code == 2
        assert result.err.endswith("No space left on device\n")
        assert len(result.err.splitlines()) == 1
        assert disk.flags() == before == {"a": "enabled", "b": "disabled"}
        assert disk.areas("a") == [(0, 65536)]
        assert disk.areas("b") == []
    (small / "filling").unlink()
    done("merge", disk.path, "b", "noise", "-b", source.path)
    assert len(disk.areas("b")) in (1, 65536)


FAILING = {
    "size": ["n/b", "--size", "1E", "-g", "512"],
    "name": ["n/" + "x" * 1024, "--size", "1M"],
    "node": ["n\udcff/b", "--size", "1M"],
}


@pytest.mark.parametrize("args", FAILING.values(), ids=FAILING)
@pytest.mark.parametrize("there", [False, True], ids=["none", "empty"])
def test_a_store_that_no_bitmap_came_of_is_not_there(
    run: Run, tmp_path: Path, args: list[str], there: bool
) -> None:
    path = tmp_path / "new"
    if there:
        path.mkdir()
    result = run("add", path, *args)
    assert (result.code, result.out) == (2, "")
    assert os.path.lexists(path) is there
    assert not there or os.listdir(path) == []


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (step, error)
        for step in ("prepare", "switch", "load", "add_node")
        for error in (KeyboardInterrupt, MemoryError, StoreError)
        if (step, error) != ("switch", KeyboardInterrupt)  # that one is heard when all is stored
    ],
)
def test_nor_if_making_it_is_interrupted_or_fails(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error("now")

    where = {
        "prepare": (LocalStore, "prepare"),
        "switch": (LocalStore, "_switch"),
        "load": (LocalVolume, "load"),
        "add_node": (BlockGraph, "add_node"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*where[step], fail)
        args = ["add", str(tmp_path / "new"), "n/b", "--size", "1M"]
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                main(args)
        else:
            assert run(*args).code == 2
    assert os.listdir(tmp_path) == []
    assert run(*args) == (0, "", "")


def test_what_another_process_has_stored_meanwhile_stays(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new"

    def refuse(graph: BlockGraph, *args: object, **options: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(BlockGraph, "add_node", add_node)
            assert spawn("add", path, "other/b", "--size", "1M").code == 0
        raise StoreError("now")

    add_node = BlockGraph.add_node
    with monkeypatch.context() as patch:
        patch.setattr(BlockGraph, "add_node", refuse)
        assert run("add", path, "n/b", "--size", "1M").code == 2
    report = json.loads(run("info", path, "--json").out)
    assert [(each["node"], each["name"]) for each in report["bitmaps"]] == [("other", "b")]


@pytest.mark.parametrize("there", [False, True], ids=["none", "empty"])
def test_what_a_kill_leaves_of_a_store_is_made_whole_by_the_next(
    run: Run, done: Done, tmp_path: Path, there: bool
) -> None:
    path = tmp_path / "new"
    if there:
        path.mkdir()
    killed = (
        "import os; from pybitmap.store import LocalStore;"
        "LocalStore.prepare = lambda *args: os.kill(os.getpid(), 9);"
        "from pybitmap.__main__ import main; main()"
    )
    command = [sys.executable, "-c", killed, "add", str(path), "n/b", "--size", "1M"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    if there:
        assert json.loads(done("info", path, "--json"))["nodes"] == []
    else:
        assert run("info", path).code == 2
    assert run("add", path, *FAILING["size"]).code == 2
    done("add", path, "n/b", "--size", "1M")
    assert names(done, path) == [("n", "b")]
    assert os.listdir(tmp_path) == ["new"]


def killed_at_line(number: int, args: list[str]) -> bool:
    """The command in a child that a kill ends at one of our lines; False: it came to its end."""
    child = os.fork()
    if not child:
        left = number

        def trace(frame: Any, event: str, arg: object) -> Any:
            nonlocal left
            if "pybitmap" not in frame.f_code.co_filename:
                return None
            left -= event == "line"
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        code = main(args)
        sys.settrace(None)
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_line_of_an_add_leaves_no_store_or_one_with_the_bitmap(
    run: Run, done: Done, tmp_path: Path
) -> None:
    """At each line with PYBITMAP_ALL_LINES=1; else at some, more of the last, where it appears."""
    path = tmp_path / "new"
    args = ["add", str(path), "n/b", "--size", "1M"]
    run(*args)  # what is loaded once
    shutil.rmtree(path)
    last = 0
    while killed_at_line(last, args):
        shutil.rmtree(path, ignore_errors=True)
        last += 200
    shutil.rmtree(path)
    every, dense = (1, 1) if os.environ.get("PYBITMAP_ALL_LINES") == "1" else (173, 17)
    found = set()
    for number in [*range(0, last - 400, every), *range(last - 400, last, dense)]:
        if not killed_at_line(number, args):
            break
        found.add(path.exists())
        if path.exists():
            assert names(done, path) == [("n", "b")]
            done("check", path)
            shutil.rmtree(path)
    assert found == {False, True}
    shutil.rmtree(path, ignore_errors=True)
    done(*args)
    assert os.listdir(tmp_path) == ["new"]


def test_of_two_that_make_a_store_one_is_refused(
    run: Run, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new"
    prepare, appear = LocalStore.prepare, LocalStore._appear
    second: list[Any] = []

    def beside(store: LocalStore, *args: Any) -> Any:
        second.append(spawn("add", path, "other/b", "--size", "1M"))
        return prepare(store, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "prepare", beside)
        done("add", path, "n/b", "--size", "1M")
    assert second[0].code == 2
    assert f"store '{path}' is in use by another process" in second[0].err
    assert names(done, path) == [("n", "b")]
    shutil.rmtree(path)

    def made_meanwhile(store: LocalStore) -> None:
        if store._held:
            with BlockGraph() as graph:
                node = graph.add_node("other", 1 << 20, store=LocalStore(path))
                node.add_bitmap("b", persistent=True)
        appear(store)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "_appear", made_meanwhile)
        result = run("add", path, "n/b", "--size", "1M")
    assert result.code == 2
    assert f"store '{path}' was made by another process just now" in result.err
    assert names(done, path) == [("other", "b")]
    assert os.listdir(tmp_path) == ["new"]


def test_what_lies_where_a_store_is_made_is_not_touched(
    run: Run, done: Done, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path / "new")
    with store.making(at_once=True):
        aside = store._aside
    assert aside is not None
    aside.mkdir()
    (aside / "precious").write_text("not ours")
    result = run("add", tmp_path / "new", "n/b", "--size", "1M")
    assert result.code == 2
    assert f"'{aside}' is no store: it has no catalog, but 'precious'" in result.err
    assert sorted(os.listdir(tmp_path)) == [aside.name]
    assert (aside / "precious").read_text() == "not ours"


def test_the_child_of_a_fork_that_unwinds_makes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new"
    store = LocalStore(path)
    with store.making(at_once=True), BlockGraph() as graph:
        node = graph.add_node("n", 1 << 20, store=store)
        child = os.fork()
        if not child:
            code = 1
            try:
                with pytest.raises(StoreError), store._lock:
                    store._appear()
                store._unmake()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        node.add_bitmap("b", persistent=True)
        assert not path.exists()
    assert [each.name for node in LocalStore(path).entries() for each in node.bitmaps] == ["b"]
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize(
    "second", ["image=none", "store=NEW", "size=1M,store=/dev/null", "size=1M"]
)
def test_serve_that_does_not_begin_leaves_no_store(run: Run, tmp_path: Path, second: str) -> None:
    path, new = tmp_path / "s", tmp_path / "new"
    words = ["--node", f"a,size=1M,store={new}", "--node", f"b,{second.replace('NEW', str(new))}"]
    if second == "size=1M":
        path.write_text("no socket")
    assert run("serve", "--socket", path, *words).code == 2
    assert not new.exists()


def test_a_store_that_could_not_be_made_is_made_later(run: Run, done: Done, small: Path) -> None:
    filling = small / "filling"
    filling.write_bytes(bytes((1 << 20) - 4096))
    result = run("add", small / "new", "n/b", "--size", "1G")
    assert result.code == 2
    assert not (small / "new").exists()
    filling.unlink()
    done("add", small / "new", "n/b", "--size", "1G")
    assert names(done, small / "new") == [("n", "b")]


def test_a_full_disk_for_the_output_is_told(ready: Disk) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    for command in (["info"], ["info", "--json"], ["dump", "a"], ["check"]):
        with open("/dev/full", "wb") as full:
            result = spawn(command[0], ready.path, *command[1:], stdout=full)
        assert result.code == 2
        assert result.err == "pybitmap: standard output: No space left on device\n"


# ---- serve ----------------------------------------------------------------------------------


def serving(path: Path, *nodes: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return served(path, *(word for node in nodes for word in ("--node", node)))


def ask(path: Path, *commands: dict[str, Any]) -> list[Any]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        with sock.makefile("rwb") as file:
            file.readline()
            replies = []
            for command in ({"execute": "qmp_capabilities"}, *commands):
                file.write(json.dumps(command).encode())
                file.flush()
                replies.append(json.loads(file.readline()))
    return replies[1:]


def add_over_qmp(node: str, name: str) -> dict[str, Any]:
    arguments = {"node": node, "name": name, "persistent": True}
    return {"execute": "block-dirty-bitmap-add", "arguments": arguments}


@pytest.mark.parametrize("end", ["quit", "SIGINT", "SIGTERM", "SIGHUP"])
def test_served_nodes_have_persistent_bitmaps(done: Done, disk: Disk, end: str) -> None:
    path = disk.path.parent / "qmp.sock"
    key = "image" if isinstance(disk, Image) else "store"
    with serving(path, f"{disk.node},{key}={disk.path}", "n,size=1M") as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line == f"pybitmap: listening on {path}: {disk.node}, n\n"
        assert ask(path, add_over_qmp(disk.node, "b")) == [{"return": {}}]
        if end == "quit":
            ask(path, {"execute": "quit"})
        else:
            process.send_signal(getattr(signal, end))
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0
    assert disk.flags() == {"b": "enabled"}


def test_served_nodes_may_share_a_new_store(done: Done, tmp_path: Path) -> None:
    path, store = tmp_path / "qmp.sock", tmp_path / "a, new store"
    doubled = str(store).replace(",", ",,")
    nodes = f"x,store={doubled},size=1M", f"y,size=2M,store={doubled}/."
    with serving(path, *nodes) as process:
        assert process.stderr is not None
        assert process.stderr.readline().endswith("qmp.sock: x, y\n")
        replies = ask(path, add_over_qmp("x", "b"), add_over_qmp("y", "b"))
        assert replies == [{"return": {}}, {"return": {}}]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert names(done, store) == [("x", "b"), ("y", "b")]


def test_a_read_only_node_is_served(done: Done, disk: Disk) -> None:
    done("add", disk.path, "b")
    path = disk.path.parent / "qmp.sock"
    key = "image" if isinstance(disk, Image) else "store"
    with serving(path, f"{disk.node},{key}={disk.path},read-only") as process:
        assert process.stderr is not None
        process.stderr.readline()
        arguments = {"node": disk.node, "name": "b"}
        (reply,) = ask(path, {"execute": "block-dirty-bitmap-clear", "arguments": arguments})
        assert reply["error"]["desc"] == "Bitmap 'b' is readonly and cannot be modified"


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("n", "'n' is not NAME,size=SIZE, NAME,store=DIR or NAME,image=FILE"),
        ("n,read-only", "'n,read-only' is not NAME,size=SIZE"),
        ("n,size=1M,size=2M", "has size twice"),
        ("n,size=1M,read-only,read-only", "has read-only twice"),
        ("n,bogus=1,size=1G", "there is no option 'bogus', only size, store, image, read-only"),
        ("n,size=1G,readonly", "there is no option 'readonly'; did you mean 'read-only'?"),
        ("n,size=1G,read_only", "there is no option 'read_only'; did you mean 'read-only'?"),
        ("n,Size=1G", "there is no option 'Size'; did you mean 'size'?"),
        ("n,size=1G,nolock", "did you mean 'no-lock'?"),
        ("n,size=1.1K", "'1.1K' is no whole number of bytes; 1126 and 1127 are near"),
        ("n,size=1G,read-only=off", "read-only has no value"),
        ("a,b,size=1G", "there is no option 'b'"),
        ("n,size=1G,", "there is no option ''"),
        ("n,store=", "store needs a path"),
        ("n,store=a,image=b", "has store and image, and can have one of them"),
        ("n,image=none", "none: No such file or directory"),
        ("n,image=/dev/null", "/dev/null"),
        ("n,store=/dev/null", "/dev/null"),
    ],
)
def test_nodes_that_cannot_be_served(run: Run, tmp_path: Path, node: str, words: str) -> None:
    result = run("serve", "--socket", tmp_path / "s", "--node", node)
    assert (result.code, result.out) == (2, "")
    assert words in result.err


def test_bitmaps_that_cannot_be_stored_at_the_end_are_an_error(
    done: Done, small: Path, tmp_path: Path
) -> None:
    image = Image(small)
    path = tmp_path / "qmp.sock"
    source = LocalDisk(tmp_path)
    done("add", source.path, "noise", "-g", "512")
    source.mark("noise", *((offset, 1) for offset in range(0, 64 << 20, 1024)))
    with serving(path, f"i,image={image.path}", f"{source.node},store={source.path}") as process:
        assert process.stderr is not None
        process.stderr.readline()
        sources = [{"node": source.node, "name": "noise"}]
        arguments = {"node": "i", "target": "b", "bitmaps": sources}
        fine = {**add_over_qmp("i", "b")}
        fine["arguments"]["granularity"] = 512
        replies = ask(path, fine, {"execute": "block-dirty-bitmap-merge", "arguments": arguments})
        assert replies == [{"return": {}}, {"return": {}}]
        fill(small / "filling")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert err == f"pybitmap: {image.path} cannot be written: No space left on device\n"
    assert image.flags() == {"b": "inconsistent"}
    assert source.flags() == {"noise": "enabled"}
