# SPDX-License-Identifier: MIT
"""What a backup decides, without QEMU."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

from pybitmap.errors import InvalidError
from pybitmap.tools.backup.manifest import Copy, Manifest, Point
from pybitmap.tools.backup.plan import (
    LONGEST,
    UNCUT,
    Disk,
    Found,
    Names,
    kept,
    leftovers,
    node_of,
    plan,
    tag_of,
    was_cut,
)

K = 1 << 16
POINT, TAG = "1" * 32, "0a0b0c0d"
NAMES = Names(TAG, POINT)
BITMAP = NAMES.bitmap("d")
OLD = Found(BITMAP, K, True, 3 * K)
WHOLE = Found(NAMES.uncut("d"), K, False, 8 * K)
NOW = datetime.now(timezone.utc)


def listed(bitmap: str | None = BITMAP, size: int = 8 * K) -> Manifest:
    file = f"d-{POINT}.qcow2"
    copy = Copy("d", file, None, size, bitmap, K, None, "0" * 64, "0" * 64, 1)
    return Manifest((Point(POINT, NOW, NOW, (copy,)),))


def disk(*bitmaps: Found, size: int = 8 * K, grows: bool = True, cluster: int = K) -> Disk:
    return Disk("d", "d", size, {each.name: each for each in bitmaps}, grows, cluster)


def test_an_increment_lies_over_the_newest_copy_and_has_what_its_bitmap_has() -> None:
    found = plan(listed(), disk(OLD, WHOLE), "auto")
    assert found.parent is not None
    assert (found.parent[0], found.old, found.reason) == (POINT, OLD, None)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (disk(), "has no bitmap"),
        (disk(replace(OLD, reason="torn"), WHOLE), "inconsistent: torn"),
        (disk(replace(OLD, recording=False), WHOLE), "disabled"),
        (disk(OLD), "missing"),
        (disk(OLD, replace(WHOLE, reason="torn")), "inconsistent: torn"),
        (disk(OLD, replace(WHOLE, recording=True)), "enabled"),
        (disk(OLD, replace(WHOLE, count=7 * K)), "smaller for a while"),
        (disk(OLD, replace(WHOLE, count=7 * K), size=9 * K), "smaller for a while"),
        (disk(OLD, replace(WHOLE, count=4 * K), size=5 * K), "smaller for a while"),
        (disk(OLD, WHOLE, size=9 * K, grows=False), "not known"),
    ],
)
def test_whatever_makes_an_increment_unsafe_is_a_full_copy_with_its_reason(
    found: Disk, words: str
) -> None:
    made = plan(listed(), found, "auto")
    assert made.full
    assert made.reason is not None
    assert words in made.reason
    assert "\n" not in made.reason
    with pytest.raises(InvalidError, match=r"in full.*Nothing was done"):
        plan(listed(), found, "incremental")


def test_a_disk_that_only_shrank_or_only_grew_is_an_increment() -> None:
    assert not plan(listed(), disk(OLD, replace(WHOLE, count=5 * K), size=5 * K), "auto").full
    assert not plan(listed(), disk(OLD, replace(WHOLE, count=6 * K), size=5 * K + 512), "auto").full
    assert not plan(listed(), disk(OLD, WHOLE, size=99 * K), "auto").full


def test_the_last_group_of_a_smaller_disk_is_not_known_unless_it_was_the_last_before() -> None:
    for size, shrunk in ((5 * K, True), (7 * K, True), (7 * K + 512, False), (9 * K, False)):
        uncut = replace(WHOLE, count=min(8, -(-size // K)) * K)
        assert plan(listed(), disk(OLD, uncut, size=size), "auto").shrunk == shrunk
    assert not plan(listed(), disk(size=5 * K), "auto").shrunk


def test_growth_from_amid_a_cluster_larger_than_a_group_is_a_full_copy() -> None:
    odd, even = listed(size=8 * K - 512), listed()
    large = disk(OLD, WHOLE, size=99 * K, cluster=4 * K)
    assert plan(odd, large, "auto").full
    assert not plan(even, large, "auto").full
    assert not plan(odd, replace(large, cluster=K), "auto").full


def test_what_is_not_listed_is_a_full_copy() -> None:
    assert plan(Manifest(), disk(OLD, WHOLE), "auto").reason == "there is no copy of it yet"
    assert plan(listed(None), disk(OLD, WHOLE), "auto").full
    assert plan(listed(), disk(OLD, WHOLE), "full").full


def test_a_chain_that_qemu_would_not_open_any_more_is_not_made() -> None:
    points: list[Point] = []
    for number in range(LONGEST):
        below = points[-1].id if points else None
        name = f"{number:032x}"
        [copy] = listed().points[0].copies
        copy = replace(copy, file=f"d-{name}.qcow2", parent=below, reason=None if below else "x")
        points.append(Point(name, NOW, NOW, (copy,)))
    found = disk(OLD, WHOLE)
    assert not plan(Manifest(tuple(points[:-1])), found, "auto").full
    assert f"its chain has {LONGEST} copies" in str(
        plan(Manifest(tuple(points)), found, "auto").reason
    )


def test_cuts_are_told_by_whole_groups() -> None:
    assert not was_cut(WHOLE, 8 * K, 8 * K)
    assert not was_cut(WHOLE, 8 * K - 1, 8 * K)
    assert was_cut(replace(WHOLE, count=7 * K), 8 * K, 7 * K + 1)
    assert not was_cut(replace(WHOLE, count=0), 0, 8 * K)


def test_leftovers_are_what_this_directory_made_and_does_not_need() -> None:
    other = Names("ffffffff", POINT).bitmap("d")
    unlisted = Names(TAG, "2" * 32)
    gone = [unlisted.bitmap("d"), unlisted.uncut("d"), NAMES.bitmap("e")]
    there = [BITMAP, NAMES.uncut("d"), *gone, other, "daily", "pybitmap-mine"]
    keep = kept(listed(), "d")
    assert set(keep) == {BITMAP, BITMAP + UNCUT}
    assert leftovers(there, TAG, keep) == gone
    assert kept(listed(), "another") == ()


def test_a_directory_keeps_its_tag_wherever_it_goes(tmp_path: Path) -> None:
    assert tag_of(listed(), tmp_path) == TAG
    here, there = tag_of(Manifest(), tmp_path), tag_of(Manifest(), tmp_path / "other")
    assert here != there
    assert here == tag_of(Manifest(), tmp_path)


@pytest.mark.parametrize("name", ["sda", "#block123", "a/b c", "\udcff", "x" * 500, "-"])
def test_a_job_leads_to_the_node_of_its_target(name: str) -> None:
    job, node = NAMES.job(11, name), NAMES.node(11)
    assert node_of(job) == node
    assert len(node) <= 31
    assert node_of("pybitmap-other") is None
