# SPDX-License-Identifier: MIT
"""What gathering makes of extents, and files that take the place of others."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lines import at_every_line
from peers import lacking

from pybitmap import HBitmap
from pybitmap.errors import InvalidError, RangeError
from pybitmap.interchange import (
    Extent,
    FormatError,
    read_bitmap,
    read_extents,
    write_bitmap,
)
from pybitmap.interchange.conversion import gather, replacing

TIB = 1 << 40


def extents(*each: tuple[int, int]) -> Iterator[Extent]:
    return (Extent(start, length) for start, length in each)


# ---- gathering ------------------------------------------------------------------------------


def test_it_counts_what_rounding_adds() -> None:
    found = gather(extents((0, 512), (1000, 100), (4096, 1)), size=8192)
    assert list(found.bitmap.areas()) == [(0, 1536), (4096, 512)]
    assert (found.extents, found.rounded, found.given, found.added) == (3, 2, 613, 2048 - 613)


def test_the_end_of_the_disk_is_no_rounding() -> None:
    found = gather(extents((512, 88)), size=600)
    assert (found.rounded, found.added, list(found.bitmap.areas())) == (0, 0, [(512, 88)])


def test_what_overlaps_is_not_counted_twice_in_silence() -> None:
    assert gather(extents((0, 1000), (10, 1000))).added is None


def test_the_size_is_that_of_the_furthest_extent_however_far() -> None:
    ends = [Extent(0, 1), Extent(5 * TIB, 1), Extent(7 * TIB, 5, False)]
    found = gather(iter(ends)).bitmap
    assert found.size == 7 * TIB + 5
    assert found.group_size == 4096  # the finest in 256 MiB
    assert list(found.areas()) == [(0, 4096), (5 * TIB, 4096)]


def test_a_coarser_granularity_is_taken_where_the_finest_needs_too_much() -> None:
    near, far = (0, 512), (1 << 62, 4096)
    found = gather(extents(near, far), memory_limit=1 << 20).bitmap
    assert list(found.areas()) == [(0, found.group_size), (1 << 62, 4096)]
    assert found.size == (1 << 62) + 4096
    assert found.group_size == 1 << 41


@pytest.mark.parametrize("granularity", [None, 1 << 20])
def test_bitmaps_grow_rarely(monkeypatch: pytest.MonkeyPatch, granularity: int | None) -> None:
    """Beside other threads each keeps the memory that it had before."""
    from pybitmap import extent
    from pybitmap.interchange import conversion

    sizes: list[int] = []
    grow = conversion._grow

    def counted(found: conversion.Gathered, size: int, group: int) -> None:
        sizes.append(size)
        grow(found, size, group)

    monkeypatch.setattr(extent, "_AT_ONCE", 1)
    monkeypatch.setattr(conversion, "_grow", counted)
    found = gather(
        extents(*((i << 30, 4096) for i in range(3000))),
        granularity=granularity,
        memory_limit=1 << 20,
    )
    assert found.bitmap.size == (2999 << 30) + 4096
    assert 5 < len(sizes) < 30


def test_a_granularity_that_was_asked_for_is_kept_or_refused() -> None:
    assert gather(extents((5, 1)), granularity=1).bitmap.group_size == 1
    with pytest.raises(FormatError, match=r"granularity of 4K .*-g.*--memory-limit"):
        gather(extents((0, 1), (TIB, 1)), granularity=4096, memory_limit=1 << 20)
    with pytest.raises(FormatError, match="granularity of 4K"):
        gather(iter(()), size=TIB, granularity=4096, memory_limit=1 << 20)


@pytest.mark.parametrize("granularity", [0, -1, -512, 3, 1000])
def test_a_granularity_that_is_no_power_of_2_is_refused(granularity: int) -> None:
    for size in (None, TIB):
        with pytest.raises(InvalidError, match=f"{granularity} is not a power of 2"):
            gather(extents((5, 1)), size=size, granularity=granularity)


def test_one_beyond_the_size_is_refused() -> None:
    with pytest.raises(RangeError, match="beyond the size, 100"):
        gather(extents((99, 2)), size=100)


@pytest.mark.parametrize("size", [None, 100, 1 << 40])
def test_no_memory_at_all_is_refused(size: int | None) -> None:
    with pytest.raises(FormatError, match="--memory-limit"):
        gather(extents((0, 1)), size=size, memory_limit=0)


def test_no_extents() -> None:
    found = gather(iter(()))
    assert (found.bitmap.size, found.extents, found.added) == (0, 0, 0)


# ---- files ----------------------------------------------------------------------------------


@pytest.fixture
def hb() -> HBitmap:
    return HBitmap.from_extents([(0, 512), (8192, 512)], 1 << 20, group_size=512)


def test_a_file_is_written_and_read(hb: HBitmap, tmp_path: Path) -> None:
    each: list[tuple[str, str | None, dict[str, Any]]] = [
        ("a.json", None, {}),
        ("a.csv", None, {}),
        ("a.xml", "thin-delta", {"block_size": 512}),
        ("a.bits", None, {"block_size": 512, "bit_order": "msb"}),
        ("a.roaring", None, {"block_size": 512}),
    ]
    for name, fmt, options in each:
        path = tmp_path / name
        write_bitmap(hb, path, fmt, **options)
        given = "bits" if name == "a.bits" else None
        assert read_bitmap(path, given, size=1 << 20, granularity=512, **options) == hb
    assert sorted(os.listdir(tmp_path)) == sorted(name for name, _, _ in each)


def test_a_name_that_tells_no_format_is_refused(hb: HBitmap, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not tell the format"):
        write_bitmap(hb, tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_a_new_file_has_the_mode_that_files_have(hb: HBitmap, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_bitmap(hb, tmp_path / "a.csv")
    assert os.stat(tmp_path / "a.csv").st_mode == os.stat(tmp_path / "usual").st_mode
    os.chmod(tmp_path / "a.csv", 0o640)
    write_bitmap(hb, tmp_path / "a.csv")
    assert stat.S_IMODE(os.stat(tmp_path / "a.csv").st_mode) == 0o640


def test_a_link_leads_to_the_file_that_is_replaced(hb: HBitmap, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "folder" / "file")
    write_bitmap(hb, tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "folder" / "file").read_text().startswith("offset,length\n0,512\n")


def test_an_error_leaves_what_was_there(hb: HBitmap, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")

    def fail() -> None:
        with replacing(str(path)) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_interrupted_at_any_line_the_file_is_the_old_one_or_the_new_one(
    hb: HBitmap, tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")

    def attempt() -> None:
        write_bitmap(hb, path)

    new = "offset,length\n0,512\n8192,512\n"
    for _ in at_every_line(attempt, within="interchange"):
        assert path.read_text() in ("before", new)
        assert len(os.listdir(tmp_path)) <= 2
        path.write_text("before")
        for left in tmp_path.glob(".a.csv.*.part"):
            left.unlink()


def test_a_missing_folder_is_named(hb: HBitmap, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        write_bitmap(hb, tmp_path / "none" / "a.csv")
    assert error.value.filename == str(tmp_path / "none" / "a.csv")


def test_a_pipe_is_written_to(hb: HBitmap, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    os.mkfifo(path)
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as cat:
        write_bitmap(hb, path)
        assert cat.stdout is not None
        assert cat.stdout.read() == b"offset,length\n0,512\n8192,512\n"
    assert stat.S_ISFIFO(os.stat(path).st_mode)


def test_descriptors_by_name_are_written_to(hb: HBitmap, tmp_path: Path) -> None:
    """As `convert list >(gzip > list.gz)` has them."""
    reading, writing = os.pipe()
    with open(reading, "rb") as out, open(writing, "wb"):
        write_bitmap(hb, f"/dev/fd/{writing}", "csv")
        assert out.read1() == b"offset,length\n0,512\n8192,512\n"


def test_a_block_device_is_refused(hb: HBitmap, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    try:
        os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(7, 250))
    except OSError:
        lacking("devices can be made by root only")
    with pytest.raises(FormatError, match="block device"):
        write_bitmap(hb, path)


def test_a_full_disk_leaves_what_was_there(hb: HBitmap, tmp_path: Path) -> None:
    script = f"""
import resource, signal
from pybitmap import HBitmap
from pybitmap.interchange import write_bitmap
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
write_bitmap(HBitmap.from_extents((2 * i, 1) for i in range(10_000)), {str(tmp_path)!r} + "/a.csv")
"""
    (tmp_path / "a.csv").write_text("before")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"File too large: '{tmp_path}/a.csv'" in done.stderr
    assert (tmp_path / "a.csv").read_text() == "before"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_killed_at_any_moment_the_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    script = f"""
from pybitmap import HBitmap
from pybitmap.interchange import write_bitmap
print(flush=True)
for n in range(1_000_000):
    write_bitmap(HBitmap.from_extents((2 * i, 1) for i in range(500 + n % 2)), {str(path)!r})
"""
    for wait in (1, 2000, 10_000, 50_000):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            while not path.exists():
                assert process.poll() is None
            for _ in range(wait):
                os.getpid()
            process.send_signal(signal.SIGKILL)
        lines = path.read_text().splitlines()
        assert len(lines) in (501, 502)
        assert lines[-1] == f"{2 * (len(lines) - 2)},1"
        assert {each.suffix for each in tmp_path.iterdir()} <= {".csv", ".part"}


# ---- beside others --------------------------------------------------------------------------


def test_the_child_of_a_fork_reads_on_from_where_its_parent_was(tmp_path: Path) -> None:
    """As with every file: a stream has one place. Here each has a stream of its own."""
    text = b"offset,length\n" + b"".join(b"%d,1\n" % (2 * i) for i in range(1000))
    reader = read_extents(io.BytesIO(text))
    assert next(reader) == (0, 1, True)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if len(list(reader)) == 999 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(list(reader)) == 999


@pytest.mark.parametrize("how", ["end", "exception", "exit"])
def test_a_child_that_leaves_the_block_leaves_the_file_alone(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    pid = -1
    try:
        with replacing(str(path)) as file:
            file.write(b"one, ")
            pid = os.fork()
            if pid == 0 and how == "exception":
                raise ZeroDivisionError
            if pid == 0 and how == "exit":
                sys.exit(0)
            if pid > 0:
                assert os.waitpid(pid, 0)[1] == 0
                file.write(b"two")
    finally:
        if pid == 0:
            os._exit(0)
    assert path.read_bytes() == b"one, two"
    assert os.listdir(tmp_path) == ["a"]


def test_two_writers_of_one_path_leave_a_whole_file(hb: HBitmap, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    with replacing(path) as one, replacing(path) as two:
        one.write(b"one")
        two.write(b"two, longer")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_what_is_marked_beside_a_writer_is_in_it_or_not(tmp_path: Path) -> None:
    hb = HBitmap(1 << 20)
    hb.set(0)

    class Out(io.BytesIO):
        def write(self, data: Any) -> int:
            hb.set(1 << 19)
            return super().write(data)

    from pybitmap.interchange import FORMATS, Options
    from pybitmap.interchange.conversion import write_as

    out = Out()
    write_as(FORMATS["csv"], hb, out, Options())
    rows = out.getvalue().split()[1:]
    assert rows in ([b"0,1"], [b"0,1", b"524288,1"])
