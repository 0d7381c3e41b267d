# SPDX-License-Identifier: MIT
"""What each command takes in memory at most, whatever it is given: the bounds of docs/memory.md.

Each input here is small as it lies on the disk, and asks for more than the bound.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from daemon import Daemon, Disk
from images import MIB, create
from peak import Peak, peak
from peers import package

pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")

from hypothesis import given
from hypothesis import strategies as st

from pybitmap import BlockGraph
from pybitmap.replay import DEFAULT_MEMORY_LIMIT, bitmaps_nbytes, largest_size
from pybitmap.sizes import MAX_SIZE, exact_size, parse_size
from pybitmap.store import LocalStore, Qcow2Store
from pybitmap.store.qcow2.bitmaps import ONES, read_directory
from pybitmap.store.qcow2.file import File
from pybitmap.store.qcow2.image import Image

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "traces" / "tiny.trace.gz"

#: In MiB, above the bare command; as docs/memory.md has them.
BOUNDS = {
    "`replay`, whatever the trace": 32,
    "`replay --memory-limit 64M`, all dirty": 64 + 32,
    "`replay --expect`, whatever the truth": 64 + 32,
    "`convert`, whatever the text": 24,
    "`convert --memory-limit 64M`, all dirty": 64 + 32,
    "`info`, `dump`, `check`": 16,
    "`add`, `remove`, `clear`, `enable`, `disable`, `merge`, `repair`": 16,
    "`info`, `dump`, `take` and the like with `--qmp`, of QEMU": 16,
    "`serve`": 32,
}
TRACE, FULL, TRUTH, TEXT, EXTENTS, ASK, CHANGE, LIVE, SERVE = BOUNDS


def within(bound: str, taken: Peak, code: int = 0) -> str:
    """What it says, once it has ended as it should."""
    assert (taken.code, "Traceback" in taken.err) == (code, False), taken.err
    assert taken.nbytes <= BOUNDS[bound] * MIB, f"{taken.nbytes / MIB:.1f} MiB"
    return taken.err


def test_the_bounds_in_the_docs_are_those_of_the_tests() -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| ([0-9]+) MiB \|", text, re.MULTILINE)
    assert {name: int(bound) for name, bound in rows} == BOUNDS


def test_the_disks_in_the_docs_are_those_that_fit_by_default() -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--granularity (\w+)` \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for granularity, without, known in rows:
        each = [parse_size(granularity)]
        assert exact_size(largest_size(each, DEFAULT_MEMORY_LIMIT // 2)) == without
        assert exact_size(largest_size(each, DEFAULT_MEMORY_LIMIT)) == known


def test_what_a_process_takes_is_seen() -> None:
    """64 MiB of bits, all of them touched; what the bound of another command would not allow."""
    size = largest_size([65536], 64 * MIB)
    taken = trace_of_all(size, "--memory-limit", "64M")
    assert taken.nbytes >= 60 * MIB
    assert taken.nbytes > BOUNDS[TRACE] * MIB


# ---- convert ---------------------------------------------------------------------------------

EXTENT = b'{"offset": 0, "length": 1, "size_bytes": 1, "x": "' + b"x" * 300 + b'"},\n'


@pytest.mark.parametrize(
    ("fmt", "parts", "code"),
    [
        ("json", [(b"[", 1), (EXTENT, 100_000), (b"{}]", 1)], 1),
        ("json", [(b"[", 1), (b" " * 7 + b"\n", 4 * MIB), (b"]", 1)], 0),
        ("json", [(b'["', 1), (b"x", 32 * MIB)], 1),
        ("json", [(b"[", 32 * MIB)], 1),
        ("csi", [(b'{"x": 1, "block_metadata": [', 1), (EXTENT, 100_000)], 1),
        ("csv", [(b"offset,length\n", 1), (b"0,1" + b" " * 300 + b"\n", 100_000)], 0),
        ("csv", [(b"offset,length\n", 1), (b"0", 32 * MIB)], 1),
        ("thin-delta", [(b"<superblock ", 1), (b"a", 32 * MIB)], 1),
        ("thin-delta", [(b"<a>", 800)], 1),
        ("era", [(b"<blocks>", 1), (b" " * 100, 320_000), (b"</blocks>", 1)], 0),
    ],
)
def test_a_long_list_of_extents_takes_no_memory(
    tmp_path: Path, fmt: str, parts: list[tuple[bytes, int]], code: int
) -> None:
    path = tmp_path / "list"
    with path.open("wb") as file:
        for part, times in parts:
            file.write(part * times)
    blocks = ["--block-size", "512"] if fmt == "era" else []
    options = ("--any-order", *blocks, "--to", "csv", "--from", fmt)
    within(TEXT, peak("convert", path, *options), code)


def test_extents_that_mark_all_take_what_the_limit_allows(tmp_path: Path) -> None:
    size = largest_size([512], 64 * MIB)
    (tmp_path / "list").write_text(f"offset,length\n0,{size}\n")
    options = ("--memory-limit", "64M", "-g", "512", "--to", "csv")
    taken = peak("convert", tmp_path / "list", "--size", str(size), *options)
    within(EXTENTS, taken)
    assert taken.nbytes > 60 * MIB
    assert "--memory-limit" in within(EXTENTS, peak("convert", tmp_path / "list", *options), 1)


# ---- replay: traces --------------------------------------------------------------------------


def zipped(folder: Path, *parts: tuple[bytes, int]) -> Path:
    """A trace of parts, each so many times."""
    path = folder / "trace.gz"
    with gzip.open(path, "wb", 1) as file:
        for part, times in parts:
            block = max(1, min(times, MIB // len(part)))
            for _ in range(times // block):
                file.write(part * block)
    return path


def names(action: bytes) -> Iterable[tuple[bytes, int]]:
    yield b"fio version 2 iolog\n", 1
    for i in range(1000):
        yield b"%d%s %s 0 1\n" % (i, b"x" * 60_000, action), 1


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([(b"zero 0 0\n", 2_500_000)], 0),
        ([(b"zero  0 0\n", 500_000)], 0),
        ([(b"fio version 2 iolog\n", 1), (b"f write 0 1\n", 500_000)], 0),
        ([(b"\n", 2 * MIB)], 0),
        ([(b" " * 60_000 + b"\n", 1000)], 0),
        ([(b"x", 64 * MIB)], 2),
        ([(b" ", 64 * MIB)], 2),
        ([(b"fio version 2 iolog", 1), (b" ", 64 * MIB)], 2),
        ([*names(b"read")], 0),
        ([*names(b"write")], 2),
    ],
    ids=["requests", "requests-slowly", "iolog", "empty-lines", "blank-lines", "endless-line",
         "endless-blank", "endless-header", "names-read", "names-written"],
)  # fmt: skip
def test_a_small_gzip_file_takes_no_memory(
    tmp_path: Path, parts: list[tuple[bytes, int]], code: int
) -> None:
    path = zipped(tmp_path, *parts)
    assert path.stat().st_size < 2 * MIB
    err = within(TRACE, peak("replay", path, "--size", "1M"), code)
    assert len(err) < 4000


def test_a_file_is_chosen_among_many_without_memory(tmp_path: Path) -> None:
    path = zipped(tmp_path, *names(b"write"), (b"mine write 0 1\n", 1))
    within(TRACE, peak("replay", path, "--file", "mine"))
    err = within(TRACE, peak("replay", path, "--file", "none"), 2)
    assert len(err) < 4000


def test_extents_are_printed_as_they_are_found(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("".join(f"write {8192 * i} 1\n" for i in range(200_000)))
    command = ("replay", path, "--granularity", "4K", "--size", "1640M")
    within(TRACE, peak(*command, "--format", "json"))
    within(TRACE, peak(*command))


# ---- replay: bitmaps -------------------------------------------------------------------------


def trace_of_all(size: int, *options: str, known: bool = True) -> Peak:
    given = ("--size", str(size)) if known else ()
    read, write = socket.socketpair()
    with read, write:
        write.sendall(f"write 0 {size}\n".encode())
        write.shutdown(socket.SHUT_WR)
        return peak("replay", "-", *given, *options, stdin=read)


@pytest.mark.parametrize(
    ("granularities", "known"),
    [([65536], True), ([65536], False), ([4096, 8192, 16384, 1 << 20], True), ([512, 1024], False)],
)
def test_the_bitmaps_of_the_largest_disk_that_is_allowed_fit(
    granularities: list[int], known: bool
) -> None:
    size = largest_size(granularities, 64 * MIB if known else 32 * MIB)
    each = ("--granularity", ",".join(map(str, granularities)), "--memory-limit", "64M")
    within(FULL, trace_of_all(size, *each, known=known))
    err = within(TRACE, trace_of_all(size + 1, *each, known=known), 2)
    (more,) = re.findall(r"--memory-limit ([0-9]+)\)", err)
    assert 64 * MIB < int(more) <= 65 * MIB


@pytest.mark.parametrize("options", [[], ["--size", "1P"], ["--size", "7E", "--granularity", "8M"]])
def test_a_line_that_marks_more_than_fits_is_refused_by_default(
    tmp_path: Path, options: list[str]
) -> None:
    path = tmp_path / "trace"
    path.write_text("write 0 1125899906842624\n")
    err = within(TRACE, peak("replay", path, *options), 2)
    assert "512M are allowed" in err
    assert "--memory-limit" in err
    assert ("trace:1: offset 0 + length 1125899906842624: " in err) == (not options)


def test_what_an_error_advises_is_enough(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("write 1099511627775 1\n")  # which takes next to nothing
    for options in ([], ["--size", "1T"], ["--granularity", "64K", "128K"]):
        refused = run("replay", path, *options, "--memory-limit", "1M")
        assert refused.code == 2
        (advised,) = re.findall(r"--memory-limit ([0-9]+)\)", refused.err)
        assert run("replay", path, *options, "--memory-limit", advised).code == 0
        assert run("replay", path, *options, "--memory-limit", str(int(advised) - 2)).code == 2


GRANULARITIES = st.lists(st.integers(0, 30).map(lambda bits: 1 << bits), min_size=1, unique=True)


@given(GRANULARITIES, st.integers(0, 1 << 40))
def test_the_largest_size_is_the_largest_that_fits(granularities: list[int], nbytes: int) -> None:
    size = largest_size(granularities, nbytes)
    assert bitmaps_nbytes(size, granularities) <= nbytes
    assert size == MAX_SIZE or bitmaps_nbytes(size + 1, granularities) > nbytes


@given(GRANULARITIES, st.integers(0, MAX_SIZE))
def test_bits_and_summaries_are_counted(granularities: list[int], size: int) -> None:
    leaves = sum(-(-size // granularity) / 8 for granularity in granularities)
    most = len(granularities) * max(granularities) // min(granularities) + 8
    counted = bitmaps_nbytes(size, granularities)
    assert leaves * 1.0158 <= counted + 1e-9 * counted + 1
    assert counted <= leaves * 1.0159 + most + 1e-9 * counted


# ---- replay: truths --------------------------------------------------------------------------


def truth(folder: Path, element: bytes, nbytes: int) -> Path:
    """JSON of so many bytes: a list of one element, over and over."""
    path = folder / "truth.json"
    head, tail = b'{"bitmaps": [', b"0]}"
    times = (nbytes - len(head) - len(tail)) // (len(element) + 1)
    path.write_bytes(head + (element + b",") * times + tail)
    return path


@pytest.mark.parametrize(
    "element",
    [b"[]", b"{}", b'{"":0}', b"[[],[]]", b"1.5", b'"ab"', b'"' + b"\xf0\x9f\x98\x80" * 9 + b'"'],
)
def test_the_longest_truth_that_is_allowed_takes_no_more(tmp_path: Path, element: bytes) -> None:
    err = within(TRUTH, peak("replay", TINY, "--expect", truth(tmp_path, element, 2 * MIB)), 2)
    assert "not a truth: bitmaps" in err


def test_a_longer_truth_is_refused_before_it_is_looked_at(tmp_path: Path) -> None:
    path = truth(tmp_path, b"[]", 8 * MIB)
    err = within(TRACE, peak("replay", TINY, "--expect", path), 2)
    assert f"{path}: a truth of more than 2097152 bytes" in err
    assert "--memory-limit SIZE" in err
    err = within(TRACE, peak("replay", TINY, "--expect", path, "--memory-limit", "32M"), 2)
    assert "more than 131072 bytes" in err


def test_a_truth_without_end_is_refused() -> None:
    err = within(TRACE, peak("replay", TINY, "--expect", "/dev/zero"), 2)
    assert "a truth of more than" in err


def test_a_version_of_qemu_without_end_is_not_repeated(run: Run, tmp_path: Path) -> None:
    data: dict[str, Any] = json.loads(TINY.with_name("tiny.json").read_text())
    data["qemu"]["version"] = "7" * MIB
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(data))
    result = run("replay", TINY, "--expect", path)
    assert result.code == 0
    assert f"QEMU {'7' * 60} in count" in result.out
    assert len(result.out) < 5000


# ---- the others ------------------------------------------------------------------------------


def local(folder: Path, size: int, nbitmaps: int, granularity: int) -> Path:
    """A local store of sparse files, clean and disabled bitmaps b0, b1, ..."""
    path = folder / "disks.bitmaps"
    with BlockGraph() as graph:
        node = graph.add_node("vm", size, LocalStore(path))
        for i in range(nbitmaps):
            node.add_bitmap(f"b{i}", granularity, persistent=True, disabled=True)
    return path


def make_sparse(path: Path) -> None:
    """The files of a store without the blocks that hold zeros, as an archive may have them."""
    for words in path.glob("*.words"):
        with open(words, "r+b") as file:
            end = file.seek(-64, 2) + 64  # what says of which time the bits are
            tail = file.read()
            file.truncate(0)
            file.seek(end - len(tail))
            file.write(tail)


def image(folder: Path, size: int, nbitmaps: int, granularity: int) -> Path:
    """An image with clean and disabled bitmaps b0, b1, ..."""
    path = create(folder / "disk.qcow2", size)
    with BlockGraph() as graph:
        node = graph.add_node("n", store=Qcow2Store(path))
        for i in range(nbitmaps):
            node.add_bitmap(f"b{i}", granularity, persistent=True, disabled=True)
    return path


def make_all_ones(path: Path) -> None:
    """All bitmaps of an image, by their tables alone, which have 8 bytes for a cluster of ones."""
    with closing(File(str(path), read_only=True)) as file:
        entries = read_directory(Image(file, read_only=True))
    with open(path, "r+b") as raw:
        for entry in entries:
            raw.seek(entry.table_offset)
            raw.write(struct.pack(">Q", ONES) * entry.table_size)


@pytest.mark.parametrize("make", [local, image])
def test_commands_for_bitmaps_take_little(tmp_path: Path, make: Any) -> None:
    target = make(tmp_path, 64 * MIB, 3, 65536)
    for words in (
        ["info", "--count"],
        ["add", "more"],
        ["clear", "b0"],
        ["enable", "b0"],
        ["disable", "b0"],
        ["merge", "b0", "b1"],
        ["dump", "b0"],
        ["check"],
        ["remove", "b0", "b1"],
        ["repair", "--all"],
    ):
        command, *rest = words
        options = rest if command != "add" or make is image else ["vm/more"]
        within(ASK if command in ASK else CHANGE, peak(command, target, *options))


def test_commands_for_a_machine_that_runs_take_little() -> None:
    package("qemu.qmp")
    with Daemon({"q": Disk(1 << 37, cluster_size=65536)}) as daemon:
        qmp = ("--qmp", str(daemon.monitor))
        # 32 MiB of bits
        within(LIVE, peak("add", "q", "b", "-g", "512", *qmp))
        daemon.write("q", [(at << 27, 512) for at in range(1000)])
        for words in (["info", "q", "--json"], ["dump", "q", "b"], ["take", "q", "b"]):
            within(LIVE, peak(*words, *qmp))


def test_serving_takes_little(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"

    def quit_it() -> None:
        deadline = time.monotonic() + 60
        with socket.socket(socket.AF_UNIX) as client:
            while time.monotonic() < deadline:
                try:
                    client.connect(str(path))
                    break
                except OSError:
                    time.sleep(0.01)
            client.sendall(b'{"execute": "qmp_capabilities"} {"execute": "quit"}')
            while client.recv(4096):
                pass

    client = threading.Thread(target=quit_it)
    client.start()
    try:
        taken = peak("serve", "--socket", path, "--node", "disk,size=1T")
    finally:
        client.join()
    assert "listening" in within(SERVE, taken)


ASKING = [["info", "--count"], ["check"], ["dump", "b0"]]


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
@pytest.mark.parametrize(("nbitmaps", "nbytes"), [(24, MIB), (1, 64 * MIB)])
def test_large_bitmaps_of_a_local_store_take_a_piece_at_a_time(
    tmp_path: Path, words: list[str], nbitmaps: int, nbytes: int
) -> None:
    target = local(tmp_path, 8 * nbytes * 4096, nbitmaps, 4096)
    make_sparse(target)
    command, *rest = words
    within(ASK, peak(command, target, *rest))


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
def test_an_image_full_of_ones_takes_no_bits(tmp_path: Path, words: list[str]) -> None:
    target = image(tmp_path, 64 << 30, 4, 512)  # of 16 MiB of bits each
    make_all_ones(target)
    command, *rest = words
    within(ASK, peak(command, target, *rest))
