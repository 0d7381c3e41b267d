# SPDX-License-Identifier: MIT
"""Answers and unions, beside an oracle: sums over sets of groups, by NumPy, without a bitmap."""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("duckdb", reason="fleets are an extra: pip install '.[fleet]'")
pytest.importorskip("numpy", reason="fleets are an extra: pip install '.[fleet]'")

import fleets
import numpy as np
from fleets import GROUP, SIZE, WHY, groups_of, made, rows_in
from hypothesis import given, settings
from hypothesis import strategies as st

from pybitmap import BitmapError, HBitmap, InvalidError, NotFoundError, StoreError
from pybitmap.sizes import granularity_bits
from pybitmap.tools import fleet
from pybitmap.tools.fleet import Chain, Disk, Result, State, Target
from pybitmap.tools.fleet.rows import Packed, areas_of, packed, text_of
from pybitmap.tools.fleet.tables import translated

COUNT = 10_000
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def targets() -> list[Target]:
    return fleets.targets(COUNT)


@pytest.fixture(scope="module")
def groups(targets: list[Target]) -> dict[str, Any]:
    """The oracle: the dirty groups of each disk of which they are known, and are not all."""
    return {each.path: groups_of(each) for each in targets if not is_full_or_broken(each)}


def is_full_or_broken(target: Target) -> bool:
    return target.path.split("/")[2] in ("full", "broken")


@pytest.fixture(scope="module")
def fulls(targets: list[Target]) -> list[str]:
    """Disks of which all is dirty."""
    return [each.path for each in targets if "/full/" in each.path]


@pytest.fixture(scope="module")
def folder(targets: list[Target], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of 10,000 disks; made once for all processes that run tests."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    with open(base / "fleet.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "fleet" / "current").exists():
            fleet.scan(targets, base / "fleet", reader=made, processes=2)
    return base / "fleet"


def rows(folder: Path, query: str, **options: Any) -> list[dict[str, Any]]:
    return list(fleet.plan(folder, query, **options))


def by_host(targets: list[Target], groups: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for each in targets:
        if each.path in groups:
            found[each.host] += len(groups[each.path]) * GROUP
    return found


# ---- 10,000 disks ---------------------------------------------------------------------------


def test_tables_have_each_extent_of_10000_disks_once(
    folder: Path, groups: dict[str, Any], fulls: list[str]
) -> None:
    counts = rows_in(folder, "SELECT state, count(*) FROM disks GROUP BY state")
    nready = len(groups) + len(fulls)
    assert dict(counts) == {"ready": nready, "inconsistent": COUNT - nready}
    found = rows_in(folder, "SELECT disk, dirty_bytes, extents FROM disks WHERE state = 'ready'")
    expected = [(path, len(each) * GROUP, len(fleets.runs(each))) for path, each in groups.items()]
    expected += [(path, SIZE, 1) for path in fulls]
    assert sorted(found) == sorted(expected)
    query = 'SELECT disk, sum(length)::BIGINT, count(*), sum("offset" // 65536)::BIGINT'
    sums = rows_in(folder, f"{query} FROM extents GROUP BY disk")
    runs = {path: fleets.runs(each) for path, each in groups.items()}
    wanted = [
        (path, len(groups[path]) * GROUP, len(each), int(each[:, 0].sum()))
        for path, each in runs.items()
        if len(each)
    ]
    assert sorted(sums) == sorted([*wanted, *((path, SIZE, 1, 0) for path in fulls)])


def test_bytes_of_hosts_and_links(
    folder: Path, targets: list[Target], groups: dict[str, Any], tmp_path: Path
) -> None:
    increments = by_host(targets, groups)
    found = {row["host"]: row for row in rows(folder, "links", bandwidth=10**9, window=100)}
    assert {host: row["increment_bytes"] for host, row in found.items()} == increments
    fulls: dict[str, int] = defaultdict(int)
    for each in targets:
        fulls[each.host] += "/full/" in each.path or "/broken/" in each.path
    assert {host: row["full_bytes"] for host, row in found.items()} == {
        host: count * SIZE for host, count in fulls.items()
    }
    assert sum(row["increments"] + row["fulls"] for row in found.values()) == COUNT
    for row in found.values():
        nbytes = row["increment_bytes"] + row["full_bytes"]
        assert row["seconds"] == pytest.approx(nbytes / 10**9, abs=0.06)
        assert row["link_share_of_window"] == pytest.approx(nbytes / 10**11, abs=0.001)
    # Two links for all hosts but one, which has its own.
    links = tmp_path / "links.csv"
    lines = [f"host{n:02},link{n % 2},10G" for n in range(19)]
    links.write_text("host,link,bandwidth\n" + "\n".join(lines) + "\n")
    found_links = {(row["link"], row["host"]) for row in rows(folder, "links", links=links)}
    assert found_links == {(f"link{n % 2}", f"host{n:02}") for n in range(19)} | {
        ("host19", "host19")
    }


def test_the_order_fits_as_many_as_can_be(
    folder: Path, targets: list[Target], groups: dict[str, Any]
) -> None:
    bandwidth, window = 4 << 30, 3600
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows(folder, "order", bandwidth=bandwidth, window=window):
        found[row["link"]].append(row)
    assert sum(map(len, found.values())) == COUNT
    for host, jobs in found.items():
        here = [each for each in targets if each.host == host]
        increments = sorted(len(groups[each.path]) * GROUP for each in here if each.path in groups)
        sizes = [*increments, *[SIZE] * (len(here) - len(increments))]
        assert [row["nbytes"] for row in jobs] == sizes
        ends = list(itertools.accumulate(sizes))
        for row, end, size in zip(jobs, ends, sizes):
            assert row["ends"] == pytest.approx(end / bandwidth, abs=0.06)
            assert row["begins"] == pytest.approx((end - size) / bandwidth, abs=0.06)
            assert row["fits"] == (end <= bandwidth * window)
        assert any(row["fits"] for row in jobs)
        assert not all(row["fits"] for row in jobs)


def test_who_needs_a_full_copy_and_why(folder: Path, targets: list[Target]) -> None:
    found = {row["disk"]: row["why"] for row in rows(folder, "full")}
    kinds = {"broken": WHY, "full": "nearly all of it is dirty, or all"}
    assert found == {
        each.path: kinds[kind] for each in targets if (kind := each.path.split("/")[2]) in kinds
    }


def test_coarser_groups_cost_what_the_oracle_says(
    folder: Path, groups: dict[str, Any], fulls: list[str]
) -> None:
    found = rows(folder, "granularity")
    assert [row["granularity"] for row in found] == [GROUP << n for n in range(9)]
    now = sum(map(len, groups.values())) * GROUP
    for row in found:
        ratio = row["granularity"] // GROUP
        ngroups = sum(len(np.unique(each // ratio)) for each in groups.values())
        nbytes = row["granularity"] * ngroups + len(fulls) * SIZE
        assert row["nbytes"] == nbytes
        assert row["times_now"] == pytest.approx(nbytes / (now + len(fulls) * SIZE), abs=0.001)


def test_the_hottest_regions_are_the_oracles(
    folder: Path, groups: dict[str, Any], fulls: list[str]
) -> None:
    region = 1 << 34
    counts = []
    for path, each in groups.items():
        places, count = np.unique(each // (region // GROUP), return_counts=True)
        counts += [(int(n) * GROUP, path, int(p) * region) for p, n in zip(places, count)]
    counts.sort(reverse=True)
    found = rows(folder, "hottest", region=region, rows=len(fulls) + 30)
    whole, found = found[: len(fulls)], found[len(fulls) :]
    assert sorted(row["disk"] for row in whole) == sorted(fulls)
    assert {(row["offset"], row["length"], row["dirty_bytes"]) for row in whole} == {
        (0, SIZE, SIZE)
    }
    assert [row["dirty_bytes"] for row in found] == [each[0] for each in counts[:30]]
    assert {row["length"] for row in found} == {region}
    known = {(path, offset): nbytes for nbytes, path, offset in counts}
    for row in found:
        assert known[row["disk"], row["offset"]] == row["dirty_bytes"]


def test_offsets_are_delta_encoded_and_all_is_zstd(folder: Path) -> None:
    import duckdb

    files = str(folder / "current" / "extents" / "*" / "*" / "*.parquet")
    query = "SELECT path_in_schema, encodings, compression, num_values FROM parquet_metadata(?)"
    found = duckdb.connect().execute(query, [files]).fetchall()
    assert {compression for *_, compression, _ in found} == {"ZSTD"}
    offsets = [encodings for name, encodings, _, _ in found if name == "offset"]
    assert offsets
    assert all("DELTA_BINARY_PACKED" in each for each in offsets)
    for name in ("disk", "host", "bitmap", "epoch"):
        encodings = {each for column, each, _, _ in found if column == name}
        assert encodings == {"RLE_DICTIONARY"}, name
    nextents = sum(count for name, *_, count in found if name == "offset")
    nbytes = sum(path.stat().st_size for path in (folder / "current").rglob("*.parquet"))
    assert nbytes < 8 * nextents, "less than a number each, where an extent has two and four names"


# ---- union ----------------------------------------------------------------------------------


def test_a_union_of_two_nights_of_10000_disks(
    folder: Path, targets: list[Target], groups: dict[str, Any], tmp_path: Path
) -> None:
    # The second night every disk has what its neighbour had in the first.
    night = [each for each in targets if "/full/" not in each.path][:1000]
    paths = [each.path for each in night]
    other = dict(zip(paths, [*paths[1:], paths[0]]))

    def shifted(target: Target) -> Result:
        result = made(replace(target, path=other[target.path]))
        rows = [replace(row, disk=target.path, target=target.path) for row in result.disks]
        return Result(rows, result.contents)

    with ThreadPoolExecutor(1) as threads:
        fleet.scan(night, tmp_path / "first", reader=made, executor=threads)
        fleet.scan(night, tmp_path / "second", reader=shifted, executor=threads)
    assert fleet.union([tmp_path / "first", tmp_path / "second"], tmp_path / "both") == 1000
    found = {
        disk: (state, nbytes, count)
        for disk, state, nbytes, count in rows_in(
            tmp_path / "both", "SELECT disk, state, dirty_bytes, extents FROM disks"
        )
    }
    for path in paths:
        if path not in groups or other[path] not in groups:
            assert found[path] == ("inconsistent", None, None)
            continue
        both = np.union1d(groups[path], groups[other[path]])
        assert found[path] == ("ready", len(both) * GROUP, len(fleets.runs(both)))
    query = 'SELECT disk, sum(length)::BIGINT, count(*), sum("offset" // 65536)::BIGINT'
    for disk, nbytes, count, offsets in rows_in(
        tmp_path / "both", f"{query} FROM extents GROUP BY disk"
    ):
        both = fleets.runs(np.union1d(groups[disk], groups[other[disk]]))
        expected = (int(both[:, 1].sum()) * GROUP, len(both), int(both[:, 0].sum()))
        assert (nbytes, count, offsets) == expected
    assert rows_in(tmp_path / "both", "SELECT DISTINCT bitmap, epoch FROM extents") == [
        ("union", "0")
    ]


def given_rows(*disks: tuple[Disk, list[tuple[int, int]]]) -> Any:
    """A reader that says of any target that it has these."""

    def reader(target: Target) -> Result:
        contents = [
            packed(np.array(extents, np.uint64).reshape(-1, 2), row.size or 0, row.granularity or 1)
            if row.state is State.READY
            else None
            for row, extents in disks
        ]
        return Result([row for row, _ in disks], contents)

    return reader


def disk(name: str = "d", **fields: Any) -> Disk:
    known = {
        "host": "h",
        "disk": name,
        "target": name,
        "state": State.READY,
        "read_at": 1.0,
        "bitmap": "daily",
        "size": 1 << 20,
        "granularity": 4096,
        "recording": True,
    }
    return Disk(**{**known, **fields})


@pytest.fixture
def tables(tmp_path: Path) -> Any:
    """A folder with the tables of these disks."""
    numbers = itertools.count()

    def tables(*disks: tuple[Disk, list[tuple[int, int]]]) -> Path:
        path = tmp_path / f"tables{next(numbers)}"
        with ThreadPoolExecutor(1) as threads:
            fleet.scan([Target("/t", "h")], path, reader=given_rows(*disks), executor=threads)
        return path

    return tables


def merged(tmp_path: Path, *sources: Path, **options: Any) -> list[tuple[Any, ...]]:
    fleet.union(sources, tmp_path / "u", **options)
    query = "SELECT disk, state, size, granularity, dirty_bytes, reason FROM disks ORDER BY disk"
    return rows_in(tmp_path / "u", query)


def test_a_union_has_the_finest_granularity_and_the_newest_size(
    tmp_path: Path, tables: Any
) -> None:
    first = tables((disk(granularity=65536, size=1 << 20), [(0, 65536), (983040, 65536)]))
    second = tables((disk(read_at=2.0, size=1 << 19), [(65536, 4096), (8192, 4096)]))
    assert merged(tmp_path, first, second) == [("d", "ready", 1 << 19, 4096, 69632, None)]
    assert fleets.extents_in(tmp_path / "u", "d") == [(0, 69632)]


def test_a_union_of_a_disk_that_outgrew_its_granularity_is_coarser(
    tmp_path: Path, tables: Any
) -> None:
    size = (1 << 63) - 1
    first = tables((disk(granularity=512), [(512, 512)]), (disk("other"), [(0, 4096)]))
    second = tables((disk(granularity=1 << 30, size=size, read_at=2.0), [(1 << 60, 1 << 30)]))
    assert merged(tmp_path, first, second) == [
        ("d", "ready", size, 1 << 22, (1 << 22) + (1 << 30), None),
        ("other", "ready", 1 << 20, 4096, 4096, None),
    ]
    assert fleets.extents_in(tmp_path / "u", "d") == [(0, 1 << 22), (1 << 60, 1 << 30)]


def test_a_union_with_what_cannot_be_used_cannot_be_used(tmp_path: Path, tables: Any) -> None:
    good = tables(
        (disk("a"), [(0, 4096)]), (disk("b"), [(0, 4096)]), (disk("s//n", target="s"), [])
    )
    bad = tables(
        (disk("a", state=State.INCONSISTENT, reason="torn"), []),
        (disk("b"), [(4096, 4096)]),
        (disk("s", target="s", state=State.LOCKED, reason="open", bitmap=None, size=None), []),
    )
    found = merged(tmp_path, good, bad)
    assert [(row[0], row[1], row[-1]) for row in found] == [
        ("a", "inconsistent", "bitmap 'daily': torn"),
        ("b", "ready", None),
        ("s//n", "locked", "open"),  # all of its store could not be read
    ]
    assert [(row[0], row[1]) for row in merged(tmp_path, good)] == [
        ("a", "ready"),
        ("b", "ready"),
        ("s//n", "ready"),
    ]


def test_a_union_of_some_bitmaps_only(tmp_path: Path, tables: Any) -> None:
    source = tables(
        (disk(), [(0, 4096)]),
        (disk(bitmap="weekly"), [(4096, 4096)]),
        (disk(bitmap="other", state=State.INCONSISTENT, reason="torn"), []),
    )
    [(*_, nbytes, _)] = merged(tmp_path, source, bitmaps=["daily", "weekly"])
    assert nbytes == 8192
    [(*_, nbytes, _)] = merged(tmp_path, source, bitmaps=["weekly"])
    assert nbytes == 4096
    [(_, state, *_)] = merged(tmp_path, source)
    assert state == "inconsistent"


def test_a_union_of_a_bitmap_that_a_disk_lacks_on_one_night_cannot_be_used(
    tmp_path: Path, tables: Any
) -> None:
    """What was written that night is in none of those that are asked for."""
    monday = tables((disk("a"), [(0, 4096)]), (disk("b"), [(0, 4096)]), (disk("c"), []))
    tuesday = tables(
        (disk("a", read_at=2.0), [(4096, 4096)]),
        (disk("b", bitmap="weekly", read_at=2.0), [(4096, 4096)]),
        (disk("e", bitmap="weekly", read_at=2.0), [(4096, 4096)]),
    )
    found = merged(tmp_path, monday, tuesday, bitmaps=["daily"])
    assert [(row[0], row[1], row[2], row[4]) for row in found] == [
        ("a", "ready", 1 << 20, 8192),
        ("b", "no bitmap", 1 << 20, None),
        ("c", "ready", 1 << 20, 0),  # which Tuesday does not name at all
        ("e", "no bitmap", 1 << 20, None),
    ]
    assert found[1][-1] == "it has no bitmap of the name that was asked for"
    full = {row["disk"]: row["job"] for row in rows(tmp_path / "u", "order")}
    assert full == {"a": "increment", "b": "full", "c": "increment", "e": "full"}
    assert len(merged(tmp_path, monday, tuesday, epochs=["1"])) == 0


def test_a_union_into_a_source_or_of_nothing_is_refused(tmp_path: Path, tables: Any) -> None:
    source = tables((disk(), []))
    with pytest.raises(InvalidError, match="into itself"):
        fleet.union([source], source)
    with pytest.raises(InvalidError, match="one folder"):
        fleet.union([], tmp_path / "u")
    with pytest.raises(NotFoundError, match="has no tables"):
        fleet.union([tmp_path / "u"], tmp_path / "v")
    assert rows_in(source, "SELECT count(*) FROM disks") == [(1,)]


Ranges = st.lists(st.tuples(st.integers(0, 299), st.integers(1, 90)), max_size=12)


@settings(max_examples=6)
@given(st.lists(st.tuples(Ranges, st.sampled_from([1, 4, 16])), min_size=1, max_size=4))
def test_a_union_is_that_of_sets(nights: list[tuple[list[tuple[int, int]], int]]) -> None:
    from tempfile import TemporaryDirectory

    size = 300 * 512 - 100
    expected: set[int] = set()
    bitmaps = []
    finest = min(granularity for _, granularity in nights)
    for number, (ranges, granularity) in enumerate(nights):
        bitmap = HBitmap(size, granularity_bits(granularity * 512))
        for first, count in ranges:
            bitmap.set(first * 512, min(count * 512, size - first * 512))
            for sector in range(first, min(first + count, 300)):
                begin = sector // granularity * granularity
                expected.update(range(begin, min(begin + granularity, 300)))
        row = disk(bitmap=f"b{number}", size=size, granularity=granularity * 512)
        bitmaps.append((row, list(bitmap.areas())))
    with TemporaryDirectory() as name, ThreadPoolExecutor(1) as threads:
        reader: Any = given_rows(*bitmaps)
        fleet.scan([Target("/t", "h")], Path(name, "f"), reader=reader, executor=threads)
        fleet.union([Path(name, "f")], Path(name, "u"))
        found = {
            sector
            for offset, length in fleets.extents_in(Path(name, "u"), "d")
            for sector in range(offset // 512, -(-(offset + length) // 512))
        }
        [(granularity,)] = rows_in(Path(name, "u"), "SELECT granularity FROM disks")
    assert found == expected
    assert granularity == finest * 512


# ---- which job ------------------------------------------------------------------------------


def jobs(folder: Path, **variables: Any) -> dict[str, tuple[Any, ...]]:
    found = {row["disk"]: (row["job"], row["why"]) for row in rows(folder, "full", **variables)}
    for row in rows(folder, "order"):
        found.setdefault(row["disk"], (row["job"], row["nbytes"]))
    return found


def test_what_the_job_of_a_disk_is(tables: Any) -> None:
    folder = tables(
        (disk("some"), [(0, 4096)]),
        (disk("all"), [(0, 1 << 20)]),
        (disk("empty", size=0), []),
        (disk("off", recording=False), [(0, 4096)]),
        (disk("torn", state=State.INCONSISTENT, reason="torn"), []),
        (disk("none", state=State.NONE, bitmap=None, reason="it has no bitmap"), []),
        (disk("open", state=State.LOCKED, bitmap=None, size=None, reason="open"), []),
        (disk("gone", state=State.VANISHED, bitmap=None, size=None, reason="No such file"), []),
        (disk("runs", state=State.IN_USE, reason="ask it"), []),
        # Of several bitmaps: the one with the most that is dirty, of those that record.
        (disk("two"), [(0, 4096)]),
        (disk("two", bitmap="weekly"), [(0, 8192)]),
        (disk("two", bitmap="taken", recording=False), [(0, 65536)]),
        (disk("two", bitmap="bad", state=State.INCONSISTENT, reason="torn"), []),
    )
    assert jobs(folder) == {
        "some": ("increment", 4096),
        "all": ("full", "nearly all of it is dirty, or all"),
        "empty": ("increment", 0),
        "off": ("full", "its bitmap does not record"),
        "torn": ("full", "torn"),
        "none": ("full", "it has no bitmap"),
        "open": ("unknown", "open"),
        "gone": ("unknown", "No such file"),
        "runs": ("unknown", "ask it"),
        "two": ("increment", 8192),
    }
    taken = {row["disk"]: row["why"] for row in rows(folder, "full", bitmap="taken")}
    assert "two" not in taken
    assert taken["some"] == "it has no bitmap taken"
    assert taken["open"] == "open"
    half = {row["disk"] for row in rows(folder, "full", full_share=0.003)}
    assert {"some", "two"} <= half


def test_regions_and_groups_of_any_extents(tables: Any) -> None:
    """Those of one disk, by a set of bytes."""
    size, region = 4096 * 100, 4096 * 8
    ranges = [(0, 1), (2, 1), (7, 2), (10, 30), (41, 7), (56, 8), (72, 8), (81, 1), (95, 5)]
    extents = [(first * 4096, count * 4096) for first, count in ranges]
    folder = tables((disk(size=size), extents))
    dirty = {byte for offset, nbytes in extents for byte in range(offset, offset + nbytes, 4096)}
    expected = {}
    for place in range(-(-size // region)):
        nbytes = 4096 * sum(byte // region == place for byte in dirty)
        if nbytes:
            expected[place * region] = nbytes
    found: dict[int, int] = {}
    for row in rows(folder, "hottest", region=region, rows=1000):
        assert row["share"] == pytest.approx(row["dirty_bytes"] / row["length"], abs=0.001)
        for offset in range(row["offset"], row["offset"] + row["length"], region):
            assert offset not in found
            found[offset] = row["dirty_bytes"] * region // row["length"]
    assert found == expected


def test_disks_as_large_as_can_be_are_summed(tables: Any) -> None:
    size = (1 << 63) - 1
    group = 1 << 40
    ends = [(0, group), (size // group * group, size % group)]
    folder = tables(
        *((disk(f"all{n}", size=size, granularity=group), [(0, size)]) for n in range(3)),
        (disk("ends", size=size, granularity=group), ends),
    )
    for query in fleet.queries():
        rows(folder, query)
    [links] = rows(folder, "links")
    assert links["full_bytes"] == 3 * size
    assert {row["nbytes"] for row in rows(folder, "granularity")} == {3 * size + 2 * group - 1}
    assert [row["dirty_bytes"] for row in rows(folder, "hottest")][:3] == [
        (1 << 63) - (1 << 30)
    ] * 3
    fleet.union([folder], folder.with_name("u"))
    assert rows_in(folder.with_name("u"), "SELECT sum(dirty_bytes) FROM disks") == [
        (3 * size + 2 * group - 1,)
    ]


def test_the_order_names_disks_of_which_nothing_is_known_last(tables: Any) -> None:
    folder = tables(
        (disk("all"), [(0, 1 << 20)]),
        (disk("some"), [(0, 4096)]),
        (disk("open", state=State.LOCKED, bitmap=None, size=None, reason="open"), []),
        (disk("old", state=State.NONE, bitmap=None, size=None, reason="of version 2"), []),
    )
    found = rows(folder, "order", bandwidth=1 << 20, window=1)
    assert [(row["disk"], row["job"], row["nbytes"]) for row in found] == [
        ("some", "increment", 4096),
        ("all", "full", 1 << 20),
        ("old", "full", None),
        ("open", "unknown", None),
    ]
    assert [row["fits"] for row in found] == [True, False, None, None]
    assert [row["begins"] for row in found] == [0.0, 0.0, None, None]


def test_a_hosts_own_link_is_none_that_is_called_as_the_host(tables: Any, tmp_path: Path) -> None:
    folder = tables((disk("mine"), [(0, 4096)]), (disk("other", host="g"), [(0, 8192)]))
    (tmp_path / "links.csv").write_text("host,link,bandwidth\ng,h,1K\n")
    known: dict[str, Any] = {"links": tmp_path / "links.csv", "bandwidth": 4096, "window": 100}
    ends = {row["disk"]: (row["link"], row["ends"]) for row in rows(folder, "order", **known)}
    assert ends == {"mine": ("h", 1.0), "other": ("h", 8.0)}
    shares = {row["host"]: row["link_share_of_window"] for row in rows(folder, "links", **known)}
    assert shares == {"h": 0.01, "g": 0.08}


def test_the_bitmap_that_is_asked_for_comes_before_none(tables: Any, tmp_path: Path) -> None:
    """As of a disk whose last backup began none."""
    chain = Chain("h", "/b", "d", 1 << 20, None, "1" * 32, 1.0, 1)

    def reader(target: Target) -> Result:
        result = given_rows((disk(), [(0, 4096)]))(target)
        return Result(result.disks, result.contents, [chain])

    with ThreadPoolExecutor(1) as threads:
        fleet.scan([Target("/t", "h")], tmp_path / "t", reader=reader, executor=threads)
    assert [row["job"] for row in rows(tmp_path / "t", "order")] == ["full"]
    [row] = rows(tmp_path / "t", "order", bitmap="daily")
    assert (row["job"], row["nbytes"]) == ("increment", 4096)


def test_each_disk_has_one_job(folder: Path, targets: list[Target]) -> None:
    found = [row["disk"] for row in rows(folder, "order")]
    assert len(found) == len(set(found)) == COUNT


# ---- queries of one's own -------------------------------------------------------------------


def test_queries_can_be_copied_and_changed(tables: Any, tmp_path: Path) -> None:
    folder = tables((disk(), [(0, 4096)]))
    mine = tmp_path / "mine"
    mine.mkdir()
    text = fleet.queries()["order"].text
    (mine / "order.sql").write_text(text.replace("AS fits", "AS in_time"))
    (mine / "size.sql").write_text(
        "-- How large\nSELECT sum(size) AS s, getvariable('x') AS x FROM disks"
    )
    assert rows(folder, "order", queries=mine)[0]["in_time"] is True
    assert rows(folder, "size", queries=mine, x="'; --") == [{"s": 1 << 20, "x": "'; --"}]
    known = fleet.queries(mine)
    assert list(known) == ["order", "size"]
    assert known["size"].about == "How large"
    (mine / "common.sql").write_text("CREATE VIEW mine AS SELECT 7 AS n")
    (mine / "seven.sql").write_text("FROM mine")
    assert rows(folder, "seven", queries=mine) == [{"n": 7}]


def test_columns_of_one_name_are_all_in_the_answer(tables: Any, tmp_path: Path) -> None:
    (tmp_path / "two.sql").write_text("SELECT 1 AS a, 2 AS a, 3 AS a_1, 4 AS a")
    answer = fleet.plan(tables((disk(), [])), "two", queries=tmp_path)
    assert [sorted(row.values()) for row in answer] == [[1, 2, 3, 4]]


@pytest.mark.parametrize("name", ["a\\b", "\udcff", "\\xff", "7"])
def test_a_bitmap_is_asked_for_by_the_name_that_it_has_on_the_disk(
    tables: Any, tmp_path: Path, name: str
) -> None:
    """Whatever the tables make of its bytes; as a scan and other commands take it."""
    folder = tables((disk(bitmap=text_of(name)), [(0, 4096)]), (disk(bitmap="b"), [(0, 8192)]))
    [row] = rows(folder, "order", bitmap=name)
    assert (row["job"], row["nbytes"]) == ("increment", 4096)
    [(*_, nbytes, _)] = merged(tmp_path, folder, bitmaps=[name])
    assert nbytes == 4096


def test_what_cannot_be_asked_is_told(tables: Any, tmp_path: Path) -> None:
    folder = tables((disk(), [(0, 4096)]))
    with pytest.raises(NotFoundError, match="there is no query 'ordre'; queries there: chains"):
        fleet.plan(folder, "ordre")
    with pytest.raises(NotFoundError, match="has no tables"):
        fleet.plan(tmp_path / "nothing", "order")
    with pytest.raises(InvalidError, match=r"looks at no variable 'windw'; at these: .*window"):
        fleet.plan(folder, "order", windw=7)
    with pytest.raises(StoreError, match="cannot read"):
        fleet.plan(folder, "order", queries=tmp_path / "nothing")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "wrong.sql").write_text("SELEC 1")
    with pytest.raises(StoreError, match=r"query 'wrong': .*SELEC"):
        fleet.plan(folder, "wrong", queries=mine)
    for text in ("", "-- nothing\n", ";"):
        (mine / "empty.sql").write_text(text)
        with pytest.raises(InvalidError, match="asks nothing"):
            fleet.plan(folder, "empty", queries=mine)
    for name in ("bandwidth", "window"):
        wrong: list[Any] = [0, -1, 0.0, math.nan, math.inf, "x"]
        for value in wrong:
            with pytest.raises(InvalidError, match=f"{name} is .*number above 0"):
                rows(folder, "order", **{name: value})
    (mine / "bytes.sql").write_bytes(b"\xff")
    with pytest.raises(StoreError, match="no UTF-8"):
        fleet.plan(folder, "bytes", queries=mine)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("host,link\nh,l\n", "name the columns: host,link,bandwidth"),
        ("host,link,bandwidth\nh,l,fast\n", "line 2: bandwidth: 'fast' is not a size"),
        ("host,link,bandwidth\nh,l,0\n", "0 bytes a second"),
        ("host,link,bandwidth\nh,l,1M\nh,k,1M\n", "host 'h' is there twice"),
        ("host,link,bandwidth\nh,l,1M\ng,l,2M\n", "link 'l' has another bandwidth above"),
    ],
)
def test_links_that_cannot_be_are_refused(
    tables: Any, tmp_path: Path, lines: str, words: str
) -> None:
    (tmp_path / "links.csv").write_text(lines)
    with pytest.raises(InvalidError, match=words):
        fleet.plan(tables((disk(), [])), "links", links=tmp_path / "links.csv")


def test_tables_that_are_damaged_are_told(tables: Any) -> None:
    folder = tables((disk(), [(0, 4096)]))
    current = (folder / "current").resolve()
    (current / "chains.parquet").write_bytes(b"PAR1")
    with pytest.raises(BitmapError, match="cannot read"):
        fleet.plan(folder, "order")
    (current / "chains.parquet").unlink()
    with pytest.raises(BitmapError, match=r"'chains.parquet' is missing"):
        fleet.plan(folder, "order")
    shutil.rmtree(current)
    with pytest.raises(BitmapError, match="are missing"):
        fleet.plan(folder, "order")


def test_tables_of_something_else_are_told(tables: Any, tmp_path: Path) -> None:
    import duckdb

    folder = tables((disk(), [(0, 4096)]))
    with duckdb.connect() as db:
        db.execute(f"COPY (SELECT 1 AS n) TO '{folder / 'current' / 'disks.parquet'}'")
    cases: list[dict[str, Any]] = [{}, {"epochs": ["0"]}, {"bitmaps": ["daily"]}]
    for options in cases:
        with pytest.raises(StoreError, match=r"cannot read tables: .*not found"):
            fleet.union([folder], tmp_path / "u", **options)
    with pytest.raises(StoreError, match=r"query 'order': .*not found"):
        fleet.plan(folder, "order")


def test_ctrl_c_within_a_query_is_none_of_duckdbs_errors() -> None:
    with pytest.raises(KeyboardInterrupt), translated("cannot write"):
        raise RuntimeError("Query interrupted")  # as it says then
    with pytest.raises(RuntimeError, match="other"), translated("cannot write"):
        raise RuntimeError("other")


def test_the_picture_of_a_night_is_that_of_the_real_plan(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "fleet_night.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("40 disks, ")
    assert done.stdout.endswith(" of 40 disks are done in 6 h\n")
    picture = (ROOT / "docs" / "pictures" / "fleet-night.svg").read_text(encoding="utf-8")
    assert (tmp_path / "night.svg").read_text(encoding="utf-8") == picture


# ---- how extents travel ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "granularity"),
    [
        (SIZE, GROUP),
        (1, 1),
        (65, 1),
        ((1 << 20) + 1, 512),
        ((1 << 62) + 5, 1 << 30),
        (1 << 40, 512),
    ],
)
def test_extents_come_out_as_they_went_in(size: int, granularity: int) -> None:
    for ranges in (
        [],
        [(0, 1)],
        [(size - 1, 1)],
        [(0, size)],
        [(0, 1), (size // 2, 1), (size - 1, 1)],
    ):
        bitmap = HBitmap(size, granularity_bits(granularity))
        for start, count in ranges:
            bitmap.set(start, count)
        extents = areas_of(bitmap)
        assert np.array_equal(packed(extents, size, granularity).unpacked(), extents)


def test_extents_travel_as_what_is_smaller() -> None:
    import pickle

    ngroups = 1 << 16
    words = ngroups // 8
    for step in (2, 3, 8, 63, 64, 1000):
        bitmap = HBitmap(ngroups * GROUP, granularity_bits(GROUP))
        bitmap.update(range(0, ngroups * GROUP, step * GROUP))
        extents = areas_of(bitmap)
        small = packed(extents, bitmap.size, GROUP)
        assert len(small.data) == min(words, 8 * len(extents))
        assert np.array_equal(small.unpacked(), extents)
        buffers: list[pickle.PickleBuffer] = []
        outside = pickle.dumps(small, 5, buffer_callback=buffers.append)
        assert len(outside) < 300
        assert pickle.loads(outside, buffers=buffers) == small
        for protocol in (2, 4, 5):
            assert pickle.loads(pickle.dumps(small, protocol)) == small


def test_packed_extents_that_are_none_are_refused() -> None:
    for data in (b"x", b"12345678" * 3 + b"1"):
        with pytest.raises(ValueError, match=r".+"):
            Packed(SIZE, GROUP, False, data).unpacked()
    with pytest.raises(ValueError, match=r".+"):
        Packed(SIZE, GROUP, True, b"x").unpacked()
