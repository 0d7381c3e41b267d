# SPDX-License-Identifier: MIT
"""A scan of real targets: what is in the tables is what is in the images and stores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from images import asked, create, qemu_img, qemu_io
from peers import package, peer

pytest.importorskip("duckdb", reason="fleets are an extra: pip install '.[fleet]'")
pytest.importorskip("numpy", reason="fleets are an extra: pip install '.[fleet]'")

import numpy as np
from fleet_run import AtOnce
from fleets import extents_in, rows_in

from pybitmap import BlockGraph, InvalidError, LockedError, StoreError
from pybitmap.store import LocalStore, Qcow2Store, Store
from pybitmap.store import local as local_store
from pybitmap.store.qcow2 import store as qcow2_store
from pybitmap.tools import fleet
from pybitmap.tools.fleet import Disk, Result, State, Target
from pybitmap.tools.fleet.reading import read
from pybitmap.tools.fleet.rows import text_of

ROW = Disk("h", "d", "/a", State.READY, 1.0, bitmap="b", size=1 << 20, granularity=4096)
SIZE = (1 << 30) + 512
GROUP = 64 << 10


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def scan(tmp_path: Path, threads: Executor) -> Any:
    """Of some targets to ``tmp_path / 'fleet'``, by threads."""

    def scan(targets: list[Target], **options: Any) -> fleet.Report:
        options.setdefault("executor", threads)
        return fleet.scan(targets, tmp_path / "fleet", **options)

    return scan


def mark(store: Store, node: str, ranges: list[tuple[int, int]], bitmap: str = "daily") -> None:
    """A new bitmap with these bits."""
    with BlockGraph() as graph:
        host = graph.add_node(node, None if isinstance(store, Qcow2Store) else SIZE, store)
        host.add_bitmap(bitmap, GROUP, persistent=True)
        for offset, nbytes in ranges:
            host.bitmaps[bitmap].set(offset, nbytes)


def groups_of(extents: list[tuple[int, int]]) -> set[int]:
    """The groups that they touch: the oracle, which knows no bitmap."""
    return {
        group
        for offset, nbytes in extents
        for group in range(offset // GROUP, (offset + nbytes - 1) // GROUP + 1)
    }


def ranges_of(number: int) -> list[tuple[int, int]]:
    """Some, other for each number; the last group of the disk, which is cut, in every third."""
    ranges = [((number * 7919 * k) % (SIZE - 200_000), 1 + number * k * 911) for k in range(1, 6)]
    return [*ranges, (SIZE - 1, 1)] if number % 3 == 0 else ranges


# ---- what is read ---------------------------------------------------------------------------


def test_200_images_and_stores_are_in_the_tables_as_they_are(
    memory_path: Path, tmp_path: Path, scan: Any
) -> None:
    template = create(memory_path / "template", SIZE, cluster_size=GROUP)
    expected: dict[str, set[int]] = {}
    for number in range(100):
        image = memory_path / f"{number}.qcow2"
        shutil.copy(template, image)
        mark(Qcow2Store(image), "n", ranges_of(number))
        expected[str(image)] = groups_of(ranges_of(number))
    for number in range(0, 100, 2):  # two disks each
        store = memory_path / f"store{number}"
        for node in (number, number + 1):
            mark(LocalStore(store), f"disk{node}", ranges_of(node))
            expected[f"{store}//disk{node}"] = groups_of(ranges_of(node))
    template.unlink()
    targets = fleet.find([memory_path], host="h")
    assert len(targets) == 150
    report = scan(targets)
    assert report.states == {State.READY: 200}
    rows = rows_in(tmp_path / "fleet", "SELECT disk, dirty_bytes, extents FROM disks")
    assert {disk for disk, _, _ in rows} == expected.keys()
    found: dict[str, set[int]] = {disk: set() for disk in expected}
    lengths = dict.fromkeys(expected, 0)
    query = 'SELECT disk, "offset", length FROM extents'
    for disk, offset, length in rows_in(tmp_path / "fleet", query):
        found[disk] |= groups_of([(offset, length)])
        lengths[disk] += length
    assert found == expected
    assert lengths == {disk: nbytes for disk, nbytes, _ in rows}
    for disk, groups in expected.items():
        cut = (GROUP - 512) if SIZE // GROUP in groups else 0
        assert lengths[disk] == len(groups) * GROUP - cut
    assert report.dirty_bytes == sum(lengths.values())


def test_qemu_says_the_same(tmp_path: Path, scan: Any) -> None:
    image = create(tmp_path / "a.qcow2", 1 << 30)
    qemu_img("bitmap", "--add", image, "daily")
    qemu_io(image, "write 1M 3M", "write 100M 1", "write 1023M 1M")
    (count, _) = asked(image)["daily"]
    scan(fleet.find([image]))
    assert rows_in(tmp_path / "fleet", "SELECT dirty_bytes FROM disks") == [(count,)]
    assert extents_in(tmp_path / "fleet", str(image)) == [
        (1 << 20, 3 << 20),
        (100 << 20, GROUP),
        (1023 << 20, 1 << 20),
    ]


def test_a_row_says_what_is_known_of_a_bitmap(tmp_path: Path, scan: Any) -> None:
    mark(LocalStore(tmp_path / "s"), "n", [(0, 1)])
    with BlockGraph() as graph:
        node = graph.add_node("n", SIZE, LocalStore(tmp_path / "s"))
        node.add_bitmap("coarse", 1 << 20, persistent=True, disabled=True)
    scan(fleet.find([tmp_path / "s"], host="h"))
    query = "SELECT host, disk, target, node, bitmap, size, granularity, recording, dirty_bytes,"
    query += " extents, state, reason, epoch, chain_length FROM disks ORDER BY bitmap"
    path = str(tmp_path / "s")
    disk = ("h", f"{path}//n", path, "n")
    rest = ("ready", None, "0", None)
    assert rows_in(tmp_path / "fleet", query) == [
        (*disk, "coarse", SIZE, 1 << 20, False, 0, 0, *rest),
        (*disk, "daily", SIZE, GROUP, True, GROUP, 1, *rest),
    ]


def test_only_bitmaps_that_were_asked_for(tmp_path: Path, scan: Any) -> None:
    for name in ("daily", "weekly"):
        mark(LocalStore(tmp_path / "s"), "a", [(0, 1)], name)
    mark(LocalStore(tmp_path / "s"), "b", [(0, 1)], "weekly")
    scan(fleet.find([tmp_path / "s"], bitmaps=["daily"]))
    query = "SELECT node, bitmap, state, reason FROM disks ORDER BY node"
    assert rows_in(tmp_path / "fleet", query) == [
        ("a", "daily", "ready", None),
        ("b", None, "no bitmap", "it has no bitmap 'daily'"),
    ]


@pytest.mark.parametrize("kind", ["image", "store"])
def test_an_extent_over_many_pieces_is_one(
    tmp_path: Path, scan: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for module in (local_store, qcow2_store):
        monkeypatch.setattr(module, "_PIECE", 512)  # bytes of bits: 256 MiB of the disk
    store: Store = LocalStore(tmp_path / "s")
    if kind == "image":
        store = Qcow2Store(create(tmp_path / "a.qcow2", SIZE, cluster_size=512))
    mark(store, "n", [(GROUP, SIZE - GROUP)])
    scan(fleet.find([store.path]))
    [(disk, count)] = rows_in(tmp_path / "fleet", "SELECT disk, extents FROM disks")
    assert count == 1
    assert extents_in(tmp_path / "fleet", disk) == [(GROUP, SIZE - GROUP)]


# ---- what cannot be read --------------------------------------------------------------------


def states(folder: Path) -> dict[str, tuple[str, str]]:
    rows = rows_in(folder / "fleet", "SELECT disk, state, reason FROM disks")
    return {os.path.basename(disk): (state, reason) for disk, state, reason in rows}


def test_what_cannot_be_read_is_a_row_with_the_reason(tmp_path: Path, scan: Any) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    image = create(folder / "good.qcow2", SIZE)
    mark(Qcow2Store(image), "n", [(0, 1)])
    create(folder / "old.qcow2", 1 << 20, compat="0.10")
    create(folder / "bare.qcow2", 1 << 20)
    (folder / "cut.qcow2").write_bytes(image.read_bytes()[:100])
    (folder / "text").write_text("not an image")
    inconsistent = create(folder / "unclean.qcow2", SIZE)
    graph = BlockGraph()
    graph.add_node("n", None, Qcow2Store(inconsistent)).add_bitmap("daily", persistent=True)
    mark(LocalStore(folder / "damaged"), "n", [(0, 1)])
    (folder / "damaged" / "catalog.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    mark(LocalStore(folder / "open"), "n", [(0, 1)])
    opened = BlockGraph()
    opened.add_node("n", SIZE, LocalStore(folder / "open"))
    shutil.copy(inconsistent, folder / "copied.qcow2")
    names: list[str | Path] = [*folder.iterdir(), folder / "nothing", "/proc/self/mem/x"]
    report = scan(fleet.find(names))
    opened.close()
    graph.close()
    found = states(tmp_path)
    assert {name: state for name, (state, _) in found.items()} == {
        "good.qcow2": "ready",
        "old.qcow2": "no bitmap",
        "bare.qcow2": "no bitmap",
        "cut.qcow2": "broken",
        "text": "broken",
        "unclean.qcow2": "locked",
        "copied.qcow2": "inconsistent",
        "damaged": "broken",
        "open": "locked",
        "nothing": "vanished",
        "x": "vanished",
    }
    assert all(reason for name, (_, reason) in found.items() if name != "good.qcow2")
    assert "in use" in found["open"][1]
    assert report.unread == 7


def test_a_disk_that_cannot_be_read_leaves_the_others_of_its_store(
    tmp_path: Path, scan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in ("a", "b", "c"):
        mark(LocalStore(tmp_path / "s"), node, [(0, 1)])
    opens = LocalStore.open

    def fail(self: LocalStore, node: str, *args: Any, **options: Any) -> Any:
        if node == "b":
            raise StoreError("no sector there", 5)
        return opens(self, node, *args, **options)

    monkeypatch.setattr(LocalStore, "open", fail)
    scan(fleet.find([tmp_path / "s"]))
    assert states(tmp_path) == {
        "a": ("ready", None),
        "b": ("unreadable", "no sector there"),
        "c": ("ready", None),
    }


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("odd"),
        MemoryError("9 GiB"),
        OSError(5, "I/O"),
        PermissionError(13, "no"),
        SystemExit(7),
    ],
)
def test_whatever_a_reader_raises_is_a_row(scan: Any, tmp_path: Path, error: BaseException) -> None:
    def raises(target: Target) -> Any:
        raise error

    report = scan([Target("/a", "h")], reader=raises)
    assert report.states == {State.UNREADABLE: 1}
    [(reason,)] = rows_in(tmp_path / "fleet", "SELECT reason FROM disks")
    assert str(error.args[-1]) in reason


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "answered NoneType"),
        (Result([ROW], []), "1 disks have 0 contents"),
        (Result([ROW], [None]), "'d' is ready, and has no extents"),
        (Result([replace(ROW, state=State.NONE, reason="\udcff")], [None]), "surrogates"),
        (Result([replace(ROW, state=State.NONE, size=np.int64(7))], [None]), "int64"),  # type: ignore[arg-type]
    ],
)
def test_what_a_reader_cannot_answer_is_a_row_and_the_others_are_read(
    scan: Any, tmp_path: Path, ten: list[Target], answer: Any, words: str
) -> None:
    def reader(target: Target) -> Any:
        return read(target) if target in ten else answer

    assert scan([*ten, Target("/a", "h")], reader=reader).states == {
        State.READY: 10,
        State.UNREADABLE: 1,
    }
    query = "SELECT reason FROM disks WHERE state <> 'ready'"
    [(reason,)] = rows_in(tmp_path / "fleet", query)
    assert words in reason


def test_a_running_machines_image_is_read_only_if_that_is_asked_for(
    tmp_path: Path, scan: Any
) -> None:
    image = create(tmp_path / "a.qcow2", SIZE)
    mark(Qcow2Store(image), "n", [(0, 1)])
    with BlockGraph() as graph:
        graph.add_node("n", None, Qcow2Store(image))
        scan(fleet.find([image]))
        assert states(tmp_path)["a.qcow2"][0] == "locked"
        scan(fleet.find([image], force_share=True))
        assert states(tmp_path)["a.qcow2"][0] == "in use"


# ---- names ----------------------------------------------------------------------------------

HOSTILE = [
    b"quote'",
    b'double"',
    b"'); DROP TABLE disks; --",
    b"new\nline",
    b"\xff\xfe not utf-8",
    b"\\xff",
    b"[a]*?",
    b"$(touch x)`id`",
    b"-rf",
    b"host=x",
    "ü \u202e".encode(),
    b"\x1b[31m",
]


def test_names_are_data(tmp_path: Path, scan: Any) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"images")
    os.mkdir(folder)
    template = create(tmp_path / "template", SIZE)
    mark(Qcow2Store(template), "n", [(0, 1)], 'it\'s "b"\n\x1b')
    for name in HOSTILE:
        try:
            shutil.copy(os.fsencode(template), os.path.join(folder, name))
        except OSError:
            pytest.skip("this file system takes no such names")
    store = tmp_path / "images" / "s'tore"
    mark(LocalStore(store), 'node/../"\n', [(GROUP, 1)])
    host = "../h'\"\n=%/*\x00é" + "x" * 300
    report = scan(fleet.find([os.fsdecode(folder)], host=host))
    assert report.states == {State.READY: len(HOSTILE) + 1}
    disks = rows_in(tmp_path / "fleet", "SELECT disk, host, bitmap FROM disks")
    images = {os.fsdecode(os.path.join(folder, name)) for name in HOSTILE}
    wanted = {(text_of(name), host, 'it\'s "b"\n\x1b') for name in images}
    wanted.add((text_of(f'{store}//node/../"\n'), host, "daily"))
    assert set(disks) == wanted
    assert set(rows_in(tmp_path / "fleet", "SELECT disk, host, bitmap FROM extents")) == wanted
    # Nothing has left the folder.
    assert {path.name for path in tmp_path.iterdir()} == {"fleet", "images", "template"}


def test_other_names_are_other_texts() -> None:
    names = ["\\xff", "\udcff", "\\\\xff", "\ud800", "\\ud800", "a\\", "a", "\\", "\\\\", "ÿ"]
    texts = [text_of(name) for name in names]
    assert len(set(texts)) == len(names)
    for text in texts:
        text.encode()


def test_a_list_says_hosts(tmp_path: Path, scan: Any) -> None:
    mark(LocalStore(tmp_path / 'a,"\n'), "n", [(0, 1)])
    lists = tmp_path / "disks.csv"
    lists.write_bytes(
        b'host,rack,path\nh1,7,"a,""\n"\n"h,2",7,'
        + os.fsencode(tmp_path)
        + b'/b\xff\nh1,8,"a,""\n"\n'
    )
    targets = fleet.listed(lists)
    assert [(each.host, os.path.basename(each.path)) for each in targets] == [
        ("h1", 'a,"\n'),
        ("h,2", "b\udcff"),
    ]
    scan(targets)
    query = "SELECT host, state FROM disks ORDER BY host"
    assert rows_in(tmp_path / "fleet", query) == [("h,2", "vanished"), ("h1", "ready")]


def test_a_list_means_each_target_of_a_host_once(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    image = create(folder / "disk")
    (tmp_path / "link").symlink_to(image)
    os.link(image, folder / "hard")
    mark(LocalStore(folder / "store"), "n", [])
    (folder / "again").symlink_to("store")
    (tmp_path / "l").write_text(
        "host,path\nh1,images/disk\nh1,link\nh1,images/hard\nh2,images/hard\nh1,images/store\n"
        "h1,images/again\nh1,not there\nh1,not there\n"
    )
    found = [
        (each.host, os.path.relpath(each.path, tmp_path)) for each in fleet.listed(tmp_path / "l")
    ]
    assert found == [
        ("h1", "link"),
        ("h2", "images/hard"),
        ("h1", "images/again"),
        ("h1", "not there"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "name the columns: host,path"),
        ("path\na\n", "name the columns: host,path"),
        ("host,path\nh,\n", "line 2 has no path"),
        ("host,path\nh,a\n,b\n", "line 3 has no host"),
        ('host,path\nh,"a\n', "unexpected end"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "l").write_text(text)
    with pytest.raises(InvalidError, match=words):
        fleet.listed(tmp_path / "l")


# ---- which targets --------------------------------------------------------------------------


def test_folders_globs_and_names_find_each_target_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / "a" / "b[1]"
    deep.mkdir(parents=True)
    image = create(deep / "x.qcow2")
    store = tmp_path / "a" / "store"
    mark(LocalStore(store), "n", [])
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "b[1]" / "link").symlink_to(image)
    os.link(image, tmp_path / "a" / "b[1]" / "z.qcow2")
    (tmp_path / "a" / "notes").write_text("nothing")
    os.mkfifo(tmp_path / "a" / "fifo")  # which nobody waits for
    image = image.with_name("link")  # the first of its names
    both = sorted([str(image), str(store)])

    def found(*names: str | Path) -> list[str]:
        return [target.path for target in fleet.find(names)]

    assert found(tmp_path) == both
    assert found(tmp_path, image, f"{tmp_path}/a/../a", f"{tmp_path}//a") == both
    assert found(f"{tmp_path}/**/*.qcow2") == [str(deep / "x.qcow2")]
    assert found(deep) == [str(image)]  # a name, although it could be a glob
    assert found(tmp_path / "nothing", f"{tmp_path}/no*") == [
        str(tmp_path / "no*"),
        str(tmp_path / "nothing"),
    ]
    monkeypatch.chdir(tmp_path)
    assert found("a") == both
    with pytest.raises(InvalidError, match="host"):
        fleet.find(["a"], host="")


def test_what_cannot_be_looked_at_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may list a folder may be refused what is in it: its files, and folders in it."""
    for name in ("closed/disk", "closed/sub/disk", "whole/disk"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        create(tmp_path / name)
    status = os.stat

    def refused(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and "/closed/" in os.fspath(path):
            raise PermissionError(13, "Permission denied")
        return status(path, *args, **options)

    monkeypatch.setattr(os, "stat", refused)
    found = {os.path.relpath(target.path, tmp_path) for target in fleet.find([tmp_path])}
    assert found == {"closed/disk", "closed/sub", "whole/disk"}


def test_links_that_lead_nowhere_are_rows_as_if_they_were_named(tmp_path: Path, scan: Any) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "unmounted").symlink_to("/nowhere/vm1.qcow2")
    (folder / "itself").symlink_to("itself")
    scan(fleet.find([folder]))
    found = {name: state for name, (state, _) in states(tmp_path).items()}
    assert found == {"unmounted": "vanished", "itself": "unreadable"}
    assert fleet.find([folder]) == fleet.find([folder / "unmounted", folder / "itself"])


def test_folders_are_walked_however_deep(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth = sys.getrecursionlimit() + 10
    if os.pathconf(memory_path, "PC_PATH_MAX") < 3 * depth:
        pytest.skip("no path is so long here")
    monkeypatch.chdir(memory_path)
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    create(Path("disk"))
    os.chdir(memory_path)
    try:
        [target] = fleet.find(["d"])
        assert target.path == f"{memory_path}/{'d/' * depth}disk"
        with suppress(InvalidError):  # glob.glob calls itself, as a rule
            assert fleet.find(["d/**/disk"]) == [target]
    finally:
        subprocess.run(["rm", "-r", "d"], check=True)


# ---- backup directories ---------------------------------------------------------------------


def repository(folder: Path, disk: str, bitmap: str, length: int) -> list[str]:
    """A backup directory with a chain; the ids of its points."""
    from datetime import datetime, timezone

    from pybitmap.tools.backup.manifest import Copy, Manifest, Point, written

    folder.mkdir()
    points: list[Point] = []
    for number in range(length):
        name = f"{number:032x}"
        copy = Copy(
            disk=disk,
            file=f"d-{name}.qcow2",
            parent=points[-1].id if points else None,
            size=SIZE,
            bitmap=bitmap if number == length - 1 else f"old{number}",
            granularity=GROUP,
            reason=None,
            sha256="0" * 64,
            root="0" * 64,
            nbytes=1,
        )
        when = datetime(2025, 1, 1 + number, tzinfo=timezone.utc)
        points.append(Point(name, when, when, (copy,)))
    (folder / "manifest.json").write_bytes(written(Manifest(tuple(points))))
    return [point.id for point in points]


def test_a_backup_directory_says_which_epoch_a_bitmap_is_of(tmp_path: Path, scan: Any) -> None:
    image = create(tmp_path / "vm1.qcow2", SIZE)
    mark(Qcow2Store(image), "n", [(0, 1)], "point-3")
    ids = repository(tmp_path / "backup", "vm1.qcow2", "point-3", 4)
    report = scan(fleet.find([image, tmp_path / "backup"]))
    assert report.states == {State.READY: 1}
    query = "SELECT bitmap, epoch, chain_length FROM disks"
    assert rows_in(tmp_path / "fleet", query) == [("point-3", ids[3], 4)]
    assert rows_in(tmp_path / "fleet", "SELECT epoch FROM extents") == [(ids[3],)]
    assert rows_in(tmp_path / "fleet", "SELECT disk, length FROM chains") == [("vm1.qcow2", 4)]
    [path] = (tmp_path / "fleet" / "current" / "extents").glob("*/*")
    assert path.name == f"epoch={ids[3]}"


def test_a_bitmap_that_a_backup_rests_on_and_no_disk_has_is_a_row(
    tmp_path: Path, scan: Any
) -> None:
    image = create(tmp_path / "vm1.qcow2", SIZE)
    mark(Qcow2Store(image), "n", [(0, 1)], "mine")
    [*_, last] = repository(tmp_path / "b1", "vm1", "lost", 2)
    repository(tmp_path / "b2", "other", "lost2", 1)
    scan(fleet.find([image, tmp_path / "b1", tmp_path / "b2"]))
    query = "SELECT disk, bitmap, state, epoch, chain_length FROM disks ORDER BY bitmap"
    assert rows_in(tmp_path / "fleet", query) == [
        (str(image), "lost", "no bitmap", last, 2),
        (f"{tmp_path / 'b2'}//other", "lost2", "no bitmap", "0" * 32, 1),
        (str(image), "mine", "ready", "0", None),
    ]
    jobs = {row["disk"]: row for row in fleet.plan(tmp_path / "fleet", "full")}
    assert jobs[str(image)]["why"] == (
        "its last backup began the bitmap 'lost', which is not there"
    )


def test_a_bitmap_that_was_not_asked_for_is_not_missing(tmp_path: Path, scan: Any) -> None:
    image = create(tmp_path / "vm1.qcow2", SIZE)
    mark(Qcow2Store(image), "n", [(0, 1)], "point")
    mark(Qcow2Store(image), "n", [(GROUP, 1)], "mine")
    [first] = repository(tmp_path / "b1", "vm1.qcow2", "point", 1)
    repository(tmp_path / "b2", "vm1.qcow2", "lost", 1)
    query = "SELECT bitmap, state, epoch FROM disks ORDER BY bitmap"
    for asked_for, rows in {
        "mine": [("mine", "ready", "0")],
        "point": [("point", "ready", first)],
        "lost": [(None, "no bitmap", "0"), ("lost", "no bitmap", first)],
    }.items():
        scan(fleet.find([image, tmp_path / "b1", tmp_path / "b2"], bitmaps=[asked_for]))
        assert rows_in(tmp_path / "fleet", query + " NULLS FIRST") == rows
        [job] = fleet.plan(tmp_path / "fleet", "order")
        assert job["job"] == ("full" if asked_for == "lost" else "increment")


def test_of_a_disk_that_could_not_be_read_no_bitmap_is_known_to_be_missing(
    tmp_path: Path, scan: Any
) -> None:
    image = create(tmp_path / "vm1.qcow2", SIZE)
    mark(Qcow2Store(image), "n", [(0, 1)], "point")
    repository(tmp_path / "b1", "vm1", "point", 1)
    with BlockGraph() as graph:
        graph.add_node("n", None, Qcow2Store(image))
        scan(fleet.find([image, tmp_path / "b1"]))
    query = "SELECT state FROM disks"
    assert rows_in(tmp_path / "fleet", query) == [("locked",)]


def test_after_a_backup_what_was_written_is_all_that_is_dirty(tmp_path: Path, scan: Any) -> None:
    """A backup's second bitmap is all dirty: the union with it would be the whole disk."""
    package("qemu.qmp")
    peer("qemu-storage-daemon", "qemu-system-common")
    from pybitmap.tools.backup import backup

    image = create(tmp_path / "vm1.qcow2", 1 << 30)
    backup([str(image)], tmp_path / "b")
    qemu_io(image, "write 0 1M")
    nbytes = (1 << 20) + GROUP  # and the last group, which a backup begins with
    report = scan(fleet.find([image, tmp_path / "b"]))
    assert (report.states, report.dirty_bytes) == ({State.READY: 1}, nbytes)
    fleet.union([tmp_path / "fleet"], tmp_path / "u")
    for folder in ("fleet", "u"):
        [row] = fleet.plan(tmp_path / folder, "order")
        assert (row["job"], row["nbytes"]) == ("increment", nbytes)
    [bitmap] = rows_in(tmp_path / "fleet", "SELECT bitmap FROM disks")[0]
    report = scan(fleet.find([image], bitmaps=[f"{bitmap}-uncut"]))
    assert report.dirty_bytes == 1 << 30
    mark(Qcow2Store(image), "n", [(0, 1)], "mine-uncut")
    assert scan(fleet.find([image])).states == {State.READY: 2}


def test_a_backup_directory_that_is_damaged_is_a_row(tmp_path: Path, scan: Any) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text('{"version": 1, "points": [7]}')
    assert scan(fleet.find([tmp_path / "b"])).states == {State.BROKEN: 1}


# ---- resumed --------------------------------------------------------------------------------


class Counting:
    """A reader that counts."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, target: Target) -> Any:
        self.read.append(target.path)
        return read(target)


@pytest.fixture
def ten(tmp_path: Path) -> list[Target]:
    (tmp_path / "in").mkdir()
    for number in range(10):
        mark(LocalStore(tmp_path / "in" / f"{number}"), "n", [(number * GROUP, 1)])
    return fleet.find([tmp_path / "in"], host="h")


def interrupted(scan: Any, targets: list[Target], after: int, **options: Any) -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        if what == "reading targets" and done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(targets, progress=progress, **options)


def test_a_run_goes_on_where_one_was_interrupted(
    scan: Any, tmp_path: Path, ten: list[Target]
) -> None:
    interrupted(scan, ten, 4)
    assert not (tmp_path / "fleet" / "current").exists()
    counting = Counting()
    report = scan(ten, reader=counting)
    assert report.resumed == 4
    assert len(counting.read) == 6
    assert report.states == {State.READY: 10}
    query = "SELECT disk, count(*) FROM extents GROUP BY disk HAVING count(*) <> 1"
    assert rows_in(tmp_path / "fleet", query) == []
    assert rows_in(tmp_path / "fleet", "SELECT count(*), sum(length) FROM extents") == [
        (10, 10 * GROUP)
    ]
    assert scan(ten).resumed == 0  # all of it was tabulated


def test_what_was_read_long_ago_or_is_not_wanted_is_read_again(
    scan: Any, ten: list[Target]
) -> None:
    for options in ({"fresh": True}, {"max_age": -1.0}):
        interrupted(scan, ten, 4)
        assert scan(ten, **options).resumed == 0


def test_a_result_that_is_damaged_is_read_again(
    scan: Any, tmp_path: Path, ten: list[Target]
) -> None:
    interrupted(scan, ten, 4)
    files = sorted((tmp_path / "fleet" / "results").iterdir())
    for file, damage in zip(files, (b"", file_cut(files[1]), file_flipped(files[2]))):
        file.write_bytes(damage)
    report = scan(ten)
    assert report.resumed == 1
    assert report.states == {State.READY: 10}


def file_cut(path: Path) -> bytes:
    return path.read_bytes()[:-1]


def file_flipped(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


def test_a_result_that_cannot_be_read_is_told(scan: Any, tmp_path: Path, ten: list[Target]) -> None:
    scan([])
    (tmp_path / "fleet" / "results" / ten[0].key).mkdir()
    with pytest.raises(StoreError, match=r"cannot read .*: Is a directory"):
        scan(ten)


def test_extents_that_are_damaged_are_told_and_read_again(
    scan: Any, tmp_path: Path, ten: list[Target]
) -> None:
    interrupted(scan, ten, 4)
    [file, *_] = (tmp_path / "fleet" / "results").iterdir()
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match="damaged"):
        scan(ten)
    assert scan(ten).states == {State.READY: 10}


def test_old_results_of_other_targets_are_not_taken(
    scan: Any, tmp_path: Path, ten: list[Target]
) -> None:
    interrupted(scan, ten, 4)
    others = [replace(each, host="other") for each in ten]
    assert scan(others).resumed == 0
    assert rows_in(tmp_path / "fleet", "SELECT DISTINCT host FROM disks") == [("other",)]


# ---- the folder -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["letter", "results/letter", "results/0123.new", "new-vms/disk", "tables-2025/1", "current"],
)
def test_a_folder_of_something_else_is_refused(scan: Any, tmp_path: Path, name: str) -> None:
    """Also one in which something has nearly a name of ours: it is never deleted."""
    other = tmp_path / "fleet" / name
    other.parent.mkdir(parents=True)
    other.write_text("dear")
    with pytest.raises(InvalidError, match=r"'[a-z0-9./-]+' is in it"):
        scan([])
    assert [path for path in (tmp_path / "fleet").rglob("*") if path.is_file()] == [other]


@pytest.mark.parametrize("name", ["results/letter", "new-vms/disk", "tables-2025/1"])
def test_what_others_put_into_the_folder_meanwhile_is_not_deleted(
    scan: Any, tmp_path: Path, ten: list[Target], name: str
) -> None:
    def put(what: str, done: int, total: int | None) -> None:
        (tmp_path / "fleet" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "fleet" / name).write_text("dear")

    assert scan(ten, progress=put).states == {State.READY: 10}
    assert (tmp_path / "fleet" / name).read_text() == "dear"


@pytest.mark.parametrize("name", ["a*", "a?", "[a]", "{a,b}", b"\xff"])
def test_a_folder_that_sql_would_misread_is_refused(tmp_path: Path, name: str | bytes) -> None:
    where = os.path.join(tmp_path, os.fsdecode(name))
    with pytest.raises(InvalidError, match="choose another"):
        fleet.scan([], where)


def test_a_folders_name_may_have_quotes(tmp_path: Path, threads: Executor) -> None:
    mark(LocalStore(tmp_path / "s"), "n", [(0, 1)])
    where = tmp_path / 'it\'s "x"; --'
    fleet.scan(fleet.find([tmp_path / "s"]), where, executor=threads)
    assert [row["state"] for row in fleet.plan(where, "states")] == ["ready"]


def test_a_folder_below_names_of_columns_has_its_own_rows(tmp_path: Path, scan: Any) -> None:
    """Hive's folders are called so, and readers of Parquet may take them at their word."""
    mark(LocalStore(tmp_path / "s"), "n", [(0, 1)])
    targets = fleet.find([tmp_path / "s"], host="h")
    where = tmp_path / "host=x" / "state=vanished" / "size=5" / "length=7" / "epoch=1"
    where.mkdir(parents=True)
    scan(targets)
    shutil.copytree(tmp_path / "fleet", where / "fleet", symlinks=True)
    for query in fleet.queries():
        assert fleet.plan(where / "fleet", query) == fleet.plan(tmp_path / "fleet", query)
    fleet.union([tmp_path / "fleet"], tmp_path / "u")
    fleet.union([where / "fleet"], where / "u")
    assert list(fleet.plan(where / "u", "order")) == list(fleet.plan(tmp_path / "u", "order"))


def test_tables_stay_if_it_is_not_known_which_count(
    scan: Any, tmp_path: Path, ten: list[Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(ten)
    with monkeypatch.context() as patch:

        def fail(path: Any) -> str:
            raise OSError(5, "Input/output error")

        def stop(what: str, done: int, total: int | None) -> None:
            if what == "writing tables":
                raise KeyboardInterrupt

        patch.setattr(os, "readlink", fail)
        with pytest.raises(KeyboardInterrupt):
            scan(ten[:3], progress=stop)
    assert rows_in(tmp_path / "fleet", "SELECT count(*) FROM disks") == [(10,)]


def test_a_second_scan_of_the_same_folder_is_refused(scan: Any, ten: list[Target]) -> None:
    refused: list[object] = []

    def again(what: str, done: int, total: int | None) -> None:
        if not refused:
            with pytest.raises(LockedError, match="in this process already") as error:
                scan(ten)
            refused.append(error)

    assert scan(ten, progress=again).states == {State.READY: 10}
    assert refused


def test_another_process_is_told_who_is_at_it(scan: Any, tmp_path: Path, ten: list[Target]) -> None:
    code = (
        "import sys; from pybitmap.tools import fleet\n"
        "try: fleet.scan([], sys.argv[1])\n"
        "except OSError as error: print(error)"
    )
    said: list[str] = []

    def other(what: str, done: int, total: int | None) -> None:
        if not said:
            command = [sys.executable, "-c", code, str(tmp_path / "fleet")]
            said.append(subprocess.run(command, capture_output=True, text=True).stdout)

    scan(ten, progress=other)
    assert f"being changed by another process (process {os.getpid()})" in said[0]


def test_no_targets_are_empty_tables(scan: Any, tmp_path: Path) -> None:
    assert scan([]).states == {}
    for query in fleet.queries():
        rows = list(fleet.plan(tmp_path / "fleet", query))
        assert not rows or query == "granularity"


def test_the_old_tables_count_until_the_new_are_whole(
    scan: Any, tmp_path: Path, ten: list[Target]
) -> None:
    scan(ten)
    before = os.readlink(tmp_path / "fleet" / "current")

    def stop(what: str, done: int, total: int | None) -> None:
        if what == "writing tables" and done == 5:
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        scan(ten[:6], progress=stop)
    assert os.readlink(tmp_path / "fleet" / "current") == before
    assert not list((tmp_path / "fleet").glob("new-*"))
    assert rows_in(tmp_path / "fleet", "SELECT count(*) FROM disks") == [(10,)]
    assert scan(ten[:6]).resumed == 6
    assert rows_in(tmp_path / "fleet", "SELECT count(*) FROM disks") == [(6,)]
    assert len(list((tmp_path / "fleet").glob("tables-*"))) == 1


def killed_at(step: int, work: Any) -> bool:
    """Does it in a child, which is killed before that step on the file system; was it?"""
    child = os.fork()
    if not child:
        steps = iter(range(step))

        def counted(function: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                if next(steps, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return call

        for name in ("rename", "replace", "symlink", "mkdir", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_a_kill_at_any_step_leaves_the_old_tables_or_the_new(
    tmp_path: Path, ten: list[Target]
) -> None:
    """With a child whose scan reads in its own thread, since threads are not forked."""
    where = tmp_path / "fleet"
    fleet.scan(ten[:1], where, executor=AtOnce())
    found = []
    for step in range(200):
        new = ten[: 2 + step % 2]
        again = killed_at(step, partial(fleet.scan, new, where, executor=AtOnce()))
        [(count,)] = rows_in(where, "SELECT count(*) FROM disks")
        assert rows_in(where, "SELECT count(*) FROM extents") == [(count,)]
        found.append(count)
        if not again:
            break
    assert not again
    assert step > 8, "those of the results, the tables, the link, and what is swept"
    assert found[0] == 1
    assert found[-1] == len(new)
    names = {path.name for path in where.iterdir()}
    assert names == {"lock", "results", "current", os.readlink(where / "current")}


def test_a_reader_keeps_its_tables_while_a_scan_replaces_them(
    scan: Any, tmp_path: Path, ten: list[Target]
) -> None:
    from pybitmap.tools.fleet.folder import reading

    scan(ten)
    with reading(tmp_path / "fleet") as tables:
        scan(ten[:3])
        assert (tables / "disks.parquet").exists()
        assert rows_in(tmp_path / "fleet", "SELECT count(*) FROM disks") == [(3,)]
    scan(ten[:3])
    assert not tables.exists()


def test_a_full_disk_ends_the_run_and_the_next_goes_on(
    tmp_path: Path, threads: Executor, ten: list[Target]
) -> None:
    from filesystems import mounted

    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root of a Linux machine can mount")
    with mounted(tmp_path / "m", "-t", "tmpfs", "-o", "size=1M", "tmpfs") as small:
        filler = small / "filler"
        filler.write_bytes(bytes(1012 << 10))
        with pytest.raises(StoreError, match="No space left"):
            fleet.scan(ten, small / "fleet", executor=threads)
        filler.unlink()
        assert fleet.scan(ten, small / "fleet", executor=threads).states == {State.READY: 10}

        def fill(what: str, done: int, total: int | None) -> None:
            if what == "writing tables" and done == 1:
                with suppress(OSError), open(small / "other", "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))

        before = os.readlink(small / "fleet" / "current")
        with pytest.raises(StoreError, match=r"No space left|cannot write"):
            fleet.scan(ten[:5], small / "fleet", executor=threads, progress=fill)
        assert os.readlink(small / "fleet" / "current") == before
        assert rows_in(small / "fleet", "SELECT count(*) FROM disks") == [(10,)]
        (small / "other").unlink()
        assert fleet.scan(ten[:5], small / "fleet", executor=threads).resumed == 5


def test_the_report_is_what_the_command_prints(tmp_path: Path, run: Any) -> None:
    mark(LocalStore(tmp_path / "s"), "n", [(0, 1)])
    done = run("fleet", "scan", tmp_path / "s", tmp_path / "no", "--to", tmp_path / "f", "--json")
    assert done.code == 1
    assert json.loads(done.out) == {
        "targets": 2,
        "resumed": 0,
        "unread": 1,
        "dirty_bytes": GROUP,
        "extents": 1,
        "states": {"ready": 1, "vanished": 1},
    }
