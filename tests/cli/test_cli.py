# SPDX-License-Identifier: MIT
"""The `pybitmap` command: what it prints, and how it ends."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import (
    HIDE_CURSOR,
    Result,
    Run,
    Terminal,
    cursor_is_visible,
    heed_signals,
    spawn,
    terminal,
)
from hypothesis import given
from hypothesis import strategies as st
from peers import peer

pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")

from pybitmap import __version__, replay
from pybitmap.cli.replay import picture
from pybitmap.replay import Marking
from pybitmap.sizes import exact_size, parse_size, rough_size
from pybitmap.trace import Requests

EXAMPLES = Path(__file__).parents[2] / "examples" / "traces"
TINY, TINY_TRUTH = str(EXAMPLES / "tiny.trace.gz"), str(EXAMPLES / "tiny.json")
DELIVERED = sorted(path.stem for path in EXAMPLES.glob("*.json"))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t.trace"
    path.write_text("write 0 4096\nzero 65536 1\ndiscard 200000 512\n")
    return path


@pytest.fixture
def truth() -> dict[str, Any]:
    """QEMU's answer for `tiny`, to be spoilt."""
    data: dict[str, Any] = json.loads(Path(TINY_TRUTH).read_text())
    return data


def saved(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(data))
    return path


# ---- sizes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("512", 512), ("4K", 4096), ("4k", 4096), ("64KiB", 65536), ("1M", 1 << 20),
     ("3G", 3 << 30), ("2T", 2 << 40), ("7E", 7 << 60), (str((1 << 63) - 1), (1 << 63) - 1),
     ("1.5G", 3 << 29), ("0.5k", 512), ("1.0", 1), ("1.25MiB", 5 << 18), ("1_000", 1000),
     ("1_0.5_0K", 10752), ("0x1000", 4096), ("0XfF_f", 4095), ("0x10B", 267), ("10MB", 10**7),
     ("1.5kB", 1500), ("64KB", 64000), ("2TB", 2 * 10**12), ("512B", 512),
     ("9.223372036854775807EB", (1 << 63) - 1)],
)  # fmt: skip
def test_sizes_are_bytes_with_suffixes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "K", "4 K", "-1", "+1", ".5G", "5.G", "1,5G", "1__0", "_1", "1_", "1.5.5K", "0x", "0x1K",
     "0x1.8", "1e3", "4X", "4i", "4iB", "4Ki", "4KBi", "\u212a", "4\u212a", "٣", "8E",
     "7.9999999999999999999999E", "1.5", "1.1K", "0.0001kB", "9" * 64],
)  # fmt: skip
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size|is beyond|is no whole number"):
        parse_size(text)


def test_a_size_that_is_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match=r"^'9{64}' is not a size"):
        parse_size("9" * 5000)


def test_a_fraction_of_a_byte_is_refused_with_what_is_near() -> None:
    with pytest.raises(ValueError, match=r"'1\.1K' is no whole number of bytes; 1126 and 1127 are"):
        parse_size("1.1K")


@given(st.integers(0, (1 << 63) - 1), st.sampled_from(["K", "M", "GiB", "kB", "MB", "TB"]))
def test_a_size_with_a_fraction_is_that_size_or_none(nbytes: int, unit: str) -> None:
    base, power = (1000 if unit[1:] == "B" else 1024), "KMGT".index(unit[0].upper()) + 1
    whole, rest = divmod(nbytes, base**power)
    places = 10 * power  # enough for any rest of powers of 2 to end
    text = f"{whole}.{rest * 10**places // base**power:0{places}}{unit}"
    exact = rest * 10**places % base**power == 0
    if exact:
        assert parse_size(text) == nbytes
    else:
        with pytest.raises(ValueError, match="no whole number"):
            parse_size(text)


@pytest.mark.parametrize("size", ["1.5G", "0x1000", "4K", "1M", "1.5K"])
def test_sizes_are_those_of_qemu_img_where_it_has_them(tmp_path: Path, size: str) -> None:
    raw = tmp_path / "raw"
    command = [peer("qemu-img", "qemu-utils"), "create", "-q", "-f", "raw", str(raw), size]
    subprocess.run(command, check=True, capture_output=True)
    assert parse_size(size) == raw.stat().st_size


@pytest.mark.parametrize(
    ("args", "nbytes"),
    [
        (["replay", "TRACE", "--size", "1.5M", "--json"], 3 << 19),
        (["replay", "TRACE", "--size", "0x100000", "--granularity", "0x200", "1_024", "--json"],
         1 << 20),
        (["replay", "TRACE", "--size", "1MB", "--memory-limit", "1.5M", "--json"], 10**6),
    ],
)  # fmt: skip
def test_replay_takes_sizes_of_all_kinds(
    run: Run, trace: Path, args: list[str], nbytes: int
) -> None:
    result = run(*(trace if arg == "TRACE" else arg for arg in args))
    assert json.loads(result.out)["size"] == nbytes


@given(st.integers(0, (1 << 63) - 1) | st.integers(0, 62).map(lambda bit: 1 << bit))
def test_an_exact_size_is_read_as_what_it_was(nbytes: int) -> None:
    assert parse_size(exact_size(nbytes)) == nbytes


def test_a_rough_size_is_for_people() -> None:
    assert [rough_size(n) for n in (1024, 1313280, 64 << 30)] == ["1 KiB", "1.3 MiB", "64 GiB"]
    assert [rough_size(n << 60) for n in (1, 1 << 10, 1 << 40)] == [
        "1 EiB",
        "1024 EiB",
        "1099511627776 EiB",
    ]


# ---- against QEMU -----------------------------------------------------------


def test_there_are_delivered_traces() -> None:
    assert {"tiny", "guest-files", "fio-a"} <= set(DELIVERED)


@pytest.mark.parametrize("name", DELIVERED)
def test_a_delivered_trace_is_equal_to_qemu(run: Run, name: str) -> None:
    result = run("replay", EXAMPLES / f"{name}.trace.gz", "--expect", EXAMPLES / f"{name}.json")
    assert (result.code, result.err) == (0, "")
    assert "Equal to QEMU 7.2.22 in count, extents and SHA-256 at 512, 4K, 64K, 1M." in result.out


@pytest.mark.parametrize("name", DELIVERED)
def test_json_has_the_numbers_that_qemu_has(run: Run, name: str) -> None:
    truth = json.loads((EXAMPLES / f"{name}.json").read_text())
    trace = EXAMPLES / f"{name}.trace.gz"
    report = json.loads(run("replay", trace, "--expect", EXAMPLES / f"{name}.json", "--json").out)
    assert report["size"] == truth["disk_size"]
    assert report["requests"] == truth["trace"]["requests"]
    assert report["text_sha256"] == truth["trace"]["text_sha256"]
    assert report["expect"]["equal"] is True
    assert report["expect"]["differences"] == []
    assert len(report["bitmaps"]) == len(truth["bitmaps"])
    for ours, qemu in zip(report["bitmaps"], truth["bitmaps"]):
        for field in ("granularity", "count", "extents_bytes", "extents_sha256", "sha256"):
            assert ours[field] == qemu[field]
        assert ours["areas"] == qemu["extents"]


def test_some_granularities_of_the_truth_may_be_chosen(run: Run) -> None:
    result = run("replay", TINY, "--expect", TINY_TRUTH, "--granularity", "4K", "--json")
    assert [each["granularity"] for each in json.loads(result.out)["bitmaps"]] == [4096]
    assert result.code == 0


def test_another_order_of_requests_is_equal_too(run: Run, tmp_path: Path) -> None:
    lines = gzip.decompress(Path(TINY).read_bytes()).splitlines(keepends=True)
    path = tmp_path / "reversed"
    path.write_bytes(b"".join(reversed(lines)))
    assert run("replay", path, "--expect", TINY_TRUTH).code == 0


SPOILT = [
    ("count", 483841, "ours  483840\n    QEMU  483841"),
    ("extents", 18, "ours  17\n    QEMU  18"),
    ("extents_bytes", 1, "ours  483840\n    QEMU  1"),
    ("extents_sha256", "0" * 64, f"QEMU  {'0' * 64}"),
    ("sha256", "f" * 64, f"QEMU  {'f' * 64}"),
]


@pytest.mark.parametrize(("field", "wrong", "shown"), SPOILT)
def test_a_different_value_is_shown_and_exits_1(
    run: Run, tmp_path: Path, truth: dict[str, Any], field: str, wrong: object, shown: str
) -> None:
    truth["bitmaps"][0][field] = wrong
    result = run("replay", TINY, "--expect", saved(tmp_path, truth))
    assert result.code == 1
    assert f"Different from QEMU 7.2.22 at 512.\n512 {field}\n    ours  " in result.out
    assert shown in result.out
    assert "the truth is of" not in result.out


def test_the_first_extents_that_differ_are_shown(
    run: Run, tmp_path: Path, truth: dict[str, Any]
) -> None:
    truth["bitmaps"][1]["extents_list"][3][1] += 4096
    del truth["bitmaps"][1]["extents_list"][-1]
    result = run("replay", TINY, "--expect", saved(tmp_path, truth))
    assert result.code == 1
    assert (
        "4K extents_list[3]\n    ours  [262144, 135168]\n    QEMU  [262144, 139264]" in result.out
    )
    assert "4K extents_list[12]\n    ours  [1310720, 2560]\n    QEMU  none" in result.out


def test_json_lists_the_differences(run: Run, tmp_path: Path, truth: dict[str, Any]) -> None:
    truth["bitmaps"][2]["count"] = 0
    result = run("replay", TINY, "--expect", saved(tmp_path, truth), "--json")
    expect = json.loads(result.out)["expect"]
    assert result.code == 1
    assert expect["equal"] is False
    assert expect["differences"] == [
        {"granularity": 65536, "field": "count", "ours": 1179648, "qemu": 0}
    ]


def test_another_trace_is_named_and_nothing_else_is_said(run: Run, trace: Path) -> None:
    result = run("replay", trace, "--expect", TINY_TRUTH)
    assert result == (
        1,
        f"{trace} is not what {TINY_TRUTH} is of:\n"
        "  the truth is of 22 requests, not 3\n"
        "  the truth is of another trace: their texts' SHA-256 differ\n"
        "Without --expect it is shown what is dirty.\n",
        "",
    )


def test_another_trace_of_another_disk_takes_five_lines(run: Run, trace: Path) -> None:
    args = ["replay", trace, "--expect", TINY_TRUTH, "--size", "1M", "-g", "4K"]
    result = run(*args)
    assert (result.code, result.err) == (1, "")
    lines = result.out.splitlines()
    assert len(lines) == 5
    assert lines[1] == "  the truth is of a disk of 1313280 bytes, not 1048576"
    report = json.loads(run(*args, "--json").out)
    assert (report["expect"]["equal"], len(report["expect"]["hints"])) == (False, 3)
    extents = run(*args, "--format", "csv")
    assert (extents.code, len(extents.err.splitlines())) == (1, 5)
    assert extents.out.startswith("offset,length\n0,4096\n")


def test_a_disk_of_another_size_is_named(run: Run) -> None:
    result = run("replay", TINY, "--expect", TINY_TRUTH, "--size", "1313792")
    assert (result.code, len(result.out.splitlines())) == (1, 3)
    assert "  the truth is of a disk of 1313280 bytes, not 1313792\n" in result.out


def test_a_granularity_that_the_truth_lacks_is_refused(run: Run) -> None:
    result = run("replay", TINY, "--expect", TINY_TRUTH, "--granularity", "512", "8K")
    assert result.code == 2
    assert "has no bitmap of granularity 8K; it has 512, 4K, 64K, 1M\n" in result.err


def set_in(data: Any, value: object, *path: str | int) -> Any:
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["disk_size"], "64G", 'disk_size: expected a number from 0 to 2^63 - 1, found "64G"'),
        (["disk_size"], True, "disk_size: expected a number from 0 to 2^63 - 1, found true"),
        (["disk_size"], -1, "disk_size: expected a number from 0 to 2^63 - 1, found -1"),
        (["disk_size"], 1e9, "found 1000000000.0"),
        (["disk_size"], 1 << 63, "found 9223372036854775808"),
        (["bitmaps"], {}, "bitmaps: expected a list, found {}"),
        (["bitmaps"], [], "bitmaps: there is none"),
        (["bitmaps", 1], None, "bitmaps[1]: expected an object"),
        (["bitmaps", 1, "granularity"], 4097, "bitmaps[1].granularity: 4097 is no power of 2"),
        (["bitmaps", 1, "granularity"], 0, "bitmaps[1].granularity: 0 is no power of 2"),
        (["bitmaps", 1, "granularity"], 512, "bitmaps[1].granularity: 512 is there already"),
        (["bitmaps", 1, "count"], None, "bitmaps[1].count: expected a number"),
        (["bitmaps", 1, "extents"], 1.5, "bitmaps[1].extents: expected a number"),
        (["bitmaps", 1, "sha256"], "abc", "bitmaps[1].sha256: expected 64 digits of lowercase"),
        (["bitmaps", 1, "sha256"], 5, "bitmaps[1].sha256: expected 64 digits of lowercase"),
        (["bitmaps", 1, "extents_list"], 5, "bitmaps[1].extents_list: expected a list, found 5"),
        (["bitmaps", 1, "extents_list"], [[1]], "extents_list: expected [offset, length] each"),
        (["bitmaps", 1, "extents_list"], ["ab"], "extents_list: expected [offset, length] each"),
        (["trace"], [], "trace: expected an object"),
        (["trace", "requests"], "many", "trace.requests: expected a number"),
        (["qemu", "version"], 7, "qemu.version: expected text, found 7"),
    ],
)
def test_a_malformed_truth_is_refused(
    run: Run, tmp_path: Path, truth: Any, path: list[str | int], value: object, words: str
) -> None:
    file = saved(tmp_path, set_in(truth, value, *path))
    result = run("replay", TINY, "--expect", file)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"pybitmap: {file}: not a truth: ")
    assert words in result.err


@pytest.mark.parametrize("field", ["granularity", "count", "extents", "extents_sha256", "sha256"])
def test_a_truth_without_a_field_is_refused(
    run: Run, tmp_path: Path, truth: dict[str, Any], field: str
) -> None:
    del truth["bitmaps"][0][field]
    result = run("replay", TINY, "--expect", saved(tmp_path, truth))
    assert result.code == 2
    assert f"bitmaps[0].{field}: expected " in result.err
    assert result.err.endswith(", found nothing\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON: Expecting value"),
        (b'{"disk_size": ', "not JSON: Expecting value: line 1 column 15"),
        (b"[]", "not a truth: the file: expected an object"),
        (b"\xff\xfe", "not a truth: not UTF-8"),
        (b"[" * 100_000, "not a truth: nested too deep"),
    ],
)
def test_what_is_no_json_is_refused(run: Run, tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "truth.json"
    file.write_bytes(content)
    result = run("replay", TINY, "--expect", file)
    assert result.code == 2
    assert result.err.startswith(f"pybitmap: {file}: {words}")


def test_a_missing_truth_is_refused(run: Run, tmp_path: Path) -> None:
    result = run("replay", TINY, "--expect", tmp_path / "none")
    assert result == (2, "", f"pybitmap: {tmp_path}/none: No such file or directory\n")


# ---- arguments --------------------------------------------------------------


def granularities(result: Result) -> list[int]:
    assert result.code == 0, result.err
    return [each["granularity"] for each in json.loads(result.out)["bitmaps"]]


def test_the_defaults_are_the_furthest_end_and_64k(run: Run, trace: Path) -> None:
    report = json.loads(run("replay", trace, "--json").out)
    assert report["size"] == 200512
    assert [each["granularity"] for each in report["bitmaps"]] == [65536]


@pytest.mark.parametrize(
    "args",
    [
        ["--granularity", "512", "4096", "64K"],
        ["--granularity", "512,4K,64K"],
        ["--granularity=512,4K", "64K"],
        ["--granularity", "512", "--granularity", "4K", "--granularity=64K"],
        ["--granularity", "512", "4K,64KiB", "--size", "1M"],
        ["--granularity", "512", "512", "4K", "64K", "4K"],
    ],
)
def test_several_granularities_may_be_given(run: Run, trace: Path, args: list[str]) -> None:
    assert granularities(run("replay", trace, "--json", *args)) == [512, 4096, 65536]
    assert granularities(run("replay", *args, trace, "--json")) == [512, 4096, 65536]


def test_after_two_dashes_a_number_is_the_name_of_a_trace(run: Run, tmp_path: Path) -> None:
    result = run("replay", "--granularity", "512", "--", "4096")
    assert result == (2, "", "pybitmap: 4096: No such file or directory\n")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--granularity", "1000"], "1000 is not a power of 2"),
        (["--granularity", "0"], "0 is not a power of 2"),
        (["--granularity", "512,"], "'' is not a size in bytes"),
        (["--granularity", "fine"], "'fine' is not a size in bytes"),
        (["--granularity"], "requires an argument"),
        (["--size", "big"], "'big' is not a size in bytes"),
        (["--size", "8E"], "'8E' is beyond 2^63 - 1 bytes"),
        (["--fast"], "--fast"),
        (["another"], "another"),
    ],
)
def test_wrong_arguments_are_refused(run: Run, trace: Path, args: list[str], words: str) -> None:
    result = run("replay", trace, *args)
    assert (result.code, result.out) == (2, "")
    assert words in result.err


def test_no_trace_is_refused(run: Run) -> None:
    assert run("replay").code == 2


def test_an_unknown_command_is_refused(run: Run) -> None:
    result = run("replya")
    assert result.code == 2
    assert "No such command 'replya'" in result.err


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["replay", "--help"]])
def test_help_has_a_usage_line(run: Run, args: list[str]) -> None:
    result = run(*args)
    assert result.code == 0
    assert result.out.startswith("Usage: pybitmap ")


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version") == (0, f"pybitmap {__version__}\n", "")


# ---- bad input --------------------------------------------------------------


def test_a_malformed_line_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_text("write 0 1\nwrite 0\n")
    assert run("replay", path) == (
        2,
        "",
        f"pybitmap: {path}:2: expected `write|zero|discard OFFSET LENGTH`, found 'write 0'\n",
    )


def test_a_request_beyond_the_size_is_named(run: Run, trace: Path) -> None:
    assert run("replay", trace, "--size", "65536") == (
        2,
        "",
        f"pybitmap: {trace}:2: offset 65536 + length 1 is beyond the size of the disk, 65536\n",
    )


def test_a_missing_trace_is_refused(run: Run, tmp_path: Path) -> None:
    result = run("replay", tmp_path / "none")
    assert result == (2, "", f"pybitmap: {tmp_path}/none: No such file or directory\n")


def test_a_directory_is_refused(run: Run, tmp_path: Path) -> None:
    assert run("replay", tmp_path) == (2, "", f"pybitmap: {tmp_path}: Is a directory\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_trace_is_refused(run: Run, trace: Path) -> None:
    trace.chmod(0)
    assert run("replay", trace) == (2, "", f"pybitmap: {trace}: Permission denied\n")


def test_too_many_groups_are_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "far"
    path.write_text("write 9000000000000000000 1\n")
    result = run("replay", path)
    assert result.code == 2
    refused = f"pybitmap: {path}:1: offset 9000000000000000000 + length 1: "
    assert result.err.startswith(f"{refused}a disk of 9000000000000000001 bytes at granularity 64K")
    assert len(result.err.splitlines()) == 1


def test_a_lack_of_memory_is_told(run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(size: int, granularity: int) -> None:
        raise MemoryError

    monkeypatch.setattr(replay, "HBitmap", no_memory)
    result = run("replay", trace)
    assert (result.code, result.out) == (2, "")
    assert result.err.endswith("at granularity 65536: not enough memory for the bitmap\n")


def test_control_characters_of_a_name_do_not_reach_the_terminal(run: Run) -> None:
    result = run("replay", "\x1b[31m\udcff")
    assert result.err == "pybitmap: \\x1b[31m\\udcff: No such file or directory\n"


# ---- fio --------------------------------------------------------------------


def test_an_iolog_of_fio_is_replayed(run: Run, tmp_path: Path) -> None:
    command = [peer("fio", "fio"), "--name=x", "--ioengine=null", "--size=1M", "--rw=randwrite"]
    subprocess.run([*command, "--write_iolog=log"], cwd=tmp_path, check=True, capture_output=True)
    report = json.loads(run("replay", tmp_path / "log", "--granularity", "4K", "--json").out)
    assert report["requests"] == 256  # each 4 KiB block once
    assert report["bitmaps"][0]["count"] == 1 << 20
    assert report["bitmaps"][0]["areas"] == 1


def test_an_iolog_of_several_files_needs_a_choice(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("fio version 2 iolog\na write 0 512\nb write 512 512\n")
    refused = run("replay", path)
    assert refused.code == 2
    assert "writes to 2 files, 'a', 'b'" in refused.err
    assert "--file NAME" in refused.err
    assert json.loads(run("replay", path, "--file", "b", "--json").out)["writes"] == 1


# ---- what is printed --------------------------------------------------------


def test_the_table_has_whole_hashes_when_it_is_no_terminal(run: Run) -> None:
    out = run("replay", TINY, "--expect", TINY_TRUTH).out
    for bitmap in json.loads(Path(TINY_TRUTH).read_text())["bitmaps"]:
        (row,) = [line for line in out.splitlines() if bitmap["sha256"] in line]
        assert str(bitmap["count"]) in row.split()


def test_a_trace_without_requests_is_replayed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"")
    result = run("replay", tmp_path / "t")
    assert result.code == 0
    assert "0 requests" in result.out
    assert "on a disk of 0 bytes\n" in result.out


def test_json_is_one_object_and_nothing_else(run: Run, trace: Path) -> None:
    result = run("replay", trace, "--json", "--granularity", "4K")
    report = json.loads(result.out)
    assert result.err == ""
    assert (report["writes"], report["zeroes"], report["discards"]) == (1, 1, 1)
    assert report["bitmaps"][0]["areas"] == 3
    assert report["bitmaps"][0]["share"] == report["bitmaps"][0]["extents_bytes"] / report["size"]


def test_without_unicode_everything_is_ascii() -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = spawn("replay", TINY, "--expect", TINY_TRUTH, env=env)
    assert result.code == 0
    assert result.out.isascii()
    assert "|####" in result.out


def test_a_trace_is_read_from_standard_input() -> None:
    result = spawn("replay", "-", "--expect", TINY_TRUTH, input=Path(TINY).read_bytes())
    assert (result.code, result.err) == (0, "")


def test_an_error_in_standard_input_names_it() -> None:
    assert spawn("replay", "-", input=b"bad\n").err.startswith("pybitmap: <stdin>:1: expected ")


def test_numpy_is_not_imported() -> None:
    code = (
        "import sys; from pybitmap.cli import main; "
        f"code = main(['replay', {TINY!r}]); sys.exit(code or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0


@pytest.mark.parametrize(("name", "args"), [("click", []), ("rich", ["info", "x"])])
def test_a_missing_package_is_named_with_the_way_to_get_it(name: str, args: list[str]) -> None:
    code = (
        f"import sys; sys.modules[{name!r}] = None; from pybitmap.__main__ import main; "
        "sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pybitmap: the command line needs {name}".encode())
    assert b"pip install '.[cli]'" in done.stderr


# ---- the picture ------------------------------------------------------------


def drawn(
    writes: list[tuple[int, int]],
    size: int,
    granularity: int,
    width: int = 80,
    ascii_only: bool = False,
) -> tuple[list[str], list[str]]:
    """The rows of cells, and all lines."""
    starts, counts = array("Q", [at for at, _ in writes]), array("Q", [n for _, n in writes])
    marking = Marking(size, granularity)
    marking.mark(Requests("t", starts, counts, starts), lambda nrequests: None)
    lines = list(picture(marking.done(size), size, width, ascii_only))
    border = "|" if ascii_only else "│"
    return [line.split(border)[1] for line in lines if border in line], lines


@given(st.data(), st.integers(1, 1 << 50), st.integers(0, 20), st.integers(20, 250))
def test_a_single_dirty_byte_is_seen(data: Any, size: int, log: int, width: int) -> None:
    granularity = max(1 << log, 1 << max(0, size.bit_length() - 30))
    at = data.draw(st.integers(0, size - 1))
    rows, lines = drawn([(at, 1)], size, granularity, width)
    assert len("".join(rows).replace(" ", "")) == 1
    assert all(len(line) <= max(width, 32) for line in lines if "│" in line)
    assert 1 <= len(rows) <= 16


def test_a_dirty_disk_is_full() -> None:
    rows, _ = drawn([(0, 1000)], 1000, 1)
    assert set("".join(rows)) == {"█"}


def test_shades_tell_the_share() -> None:
    writes = [(0, 1), (4096, 1366), (8192, 2800), (12288, 4096)]
    rows, _ = drawn(writes, 4096 * 1024, 1)
    assert rows[0][:6] == "░▒▓█  "


def test_the_picture_may_be_ascii() -> None:
    rows, lines = drawn([(0, 1), (12288, 4096)], 4096 * 1024, 1, ascii_only=True)
    assert rows[0][:5] == ".  # "
    assert "".join(lines).isascii()


def test_cells_are_not_finer_than_the_granularity() -> None:
    rows, lines = drawn([(0, 1)], 3000, 512)
    assert rows == ["█     "]
    assert lines[-2].startswith("One cell is 512: ")


# ---- how it ends ------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error_to_speak_of() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        assert spawn("replay", TINY, stdout=write_end) == (141, "", "")
    finally:
        os.close(write_end)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("args", [["replay", TINY], ["replay", TINY, "--json"], ["--help"]])
def test_a_full_disk_is_told(args: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        result = spawn(*args, stdout=full)
    assert result.code == 2
    assert result.err.endswith("No space left on device\n")
    assert len(result.err.splitlines()) == 1


def without(stream: str, *args: str | Path) -> tuple[int, str]:
    """Exit code and stderr of a command that is started with a stream closed: ">&-"."""
    command = ["sh", "-c", f'exec "$@" {stream}', "sh", sys.executable, "-m", "pybitmap", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "args",
    [["replay", TINY], ["replay", TINY, "--expect", TINY_TRUTH], ["--help"], ["--version"]],
)
def test_what_cannot_be_printed_is_an_error(args: list[str]) -> None:
    assert without(">&-", *args) == (2, "pybitmap: standard output: it is closed\n")


def test_a_command_that_prints_nothing_needs_no_standard_output(tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert without(">&-", "add", store, "disk/daily", "--size", "1M") == (0, "")
    assert without(">&- <&-", "info", store)[0] == 2


def test_without_standard_error_the_exit_code_tells() -> None:
    assert without("2>&-", "replay", "--bogus") == (2, "")


def test_without_standard_input_reading_it_is_refused() -> None:
    command = 'exec "$0" -m pybitmap replay - <&-'
    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True)
    assert (done.returncode, done.stderr) == (2, b"pybitmap: <stdin>: Bad file descriptor\n")


def test_a_wrong_usage_that_cannot_be_told_still_has_its_exit_code() -> None:
    command = 'exec "$0" -m pybitmap replay --bogus 2>/dev/full'
    assert subprocess.run(["sh", "-c", command, sys.executable]).returncode == 2


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_in_a_terminal_hashes_are_whole_where_they_fit(columns: int) -> None:
    with terminal("replay", TINY, "--expect", TINY_TRUTH, columns=columns) as child:
        assert child.end() == 0
    sha256 = json.loads(Path(TINY_TRUTH).read_text())["bitmaps"][0]["sha256"]
    assert (sha256.encode() in child.shown) == (columns >= 80)
    assert cursor_is_visible(child.shown)


@contextmanager
def feeding(pipe: Path) -> Iterator[None]:
    """Holds the writing end of a named pipe from when somebody reads it; nothing is written."""
    deadline = time.monotonic() + 60
    while True:
        try:
            writing = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:  # nobody reads yet
            assert time.monotonic() < deadline
            time.sleep(0.01)
    try:
        yield
    finally:
        os.close(writing)


def assert_interrupted_cleanly(child: Terminal) -> None:
    assert child.end() == 130
    assert HIDE_CURSOR in child.shown
    assert cursor_is_visible(child.shown)
    assert child.shown.endswith(b"pybitmap: interrupted\r\n")
    assert b"Traceback" not in child.shown


def test_ctrl_c_while_reading_leaves_the_terminal_clean(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with terminal("replay", pipe) as child, feeding(pipe):
        child.read_until(b"Reading")
        child.process.send_signal(signal.SIGINT)
        assert_interrupted_cleanly(child)


def test_signals_are_for_the_thread_that_works(tmp_path: Path) -> None:
    """One that the thread of the bars got would not end the other's wait for a pipe."""
    before = (
        "import signal; from pybitmap.cli import common; common.PATIENCE = 0\n"
        "blocked = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "common._Bars.start = lambda self: print(f'blocked: {signal.SIGINT in blocked()}')"
    )
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with terminal("replay", pipe, before=before) as child, feeding(pipe):
        child.read_until(b"blocked: ")
        child.process.send_signal(signal.SIGINT)
        assert child.end() == 130
    assert b"blocked: True" in child.shown


def test_ctrl_c_while_marking_leaves_the_terminal_clean(tmp_path: Path) -> None:
    path = tmp_path / "long"  # some 30 s of marking: 2 MiB of bits for each request
    path.write_bytes(b"write 0 16777216\n" * 100_000)
    with terminal("replay", path, "--granularity", "1") as child:
        child.read_until(b"Marking")
        child.process.send_signal(signal.SIGINT)
        assert_interrupted_cleanly(child)


def test_ctrl_c_without_a_terminal_is_one_line(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "pybitmap", "replay", str(pipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_signals,
    )
    with feeding(pipe):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"pybitmap: interrupted\n")
