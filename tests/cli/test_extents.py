# SPDX-License-Identifier: MIT
"""The extents that `pybitmap dump` and `pybitmap replay --format` print: the same, both ways."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Run, heed_signals, spawn

pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")

EXAMPLES = Path(__file__).parents[2] / "examples" / "traces"
TINY, TINY_TRUTH = EXAMPLES / "tiny.trace.gz", EXAMPLES / "tiny.json"
MANY = 100_000  # extents: some megabytes of text

FORMATS = pytest.mark.parametrize("form", ["json", "csv"])


@pytest.fixture
def many(tmp_path: Path) -> Path:
    path = tmp_path / "many"
    path.write_text("".join(f"write {1024 * i} 512\n" for i in range(MANY)))
    return path


def read(text: str, form: str) -> list[tuple[int, int]]:
    if form == "json":
        return [(each["offset"], each["length"]) for each in json.loads(text)]
    rows = csv.DictReader(io.StringIO(text))
    return [(int(each["offset"]), int(each["length"])) for each in rows]


def truth() -> dict[int, Any]:
    """QEMU's answers for `tiny`, by granularity."""
    data = json.loads(TINY_TRUTH.read_text())
    return {each["granularity"]: each for each in data["bitmaps"]}


@FORMATS
@pytest.mark.parametrize("granularity", [512, 4096, 65536, 1 << 20])
def test_extents_are_those_of_qemu(run: Run, form: str, granularity: int) -> None:
    options = ["--granularity", str(granularity), "--format", form]
    result = run("replay", TINY, "--expect", TINY_TRUTH, *options)
    assert (result.code, result.err) == (0, "")
    expected = [tuple(each) for each in truth()[granularity]["extents_list"]]
    assert read(result.out, form) == expected


@FORMATS
def test_replay_prints_what_dump_prints(run: Run, tmp_path: Path, form: str) -> None:
    image = tmp_path / "tiny.qcow2"
    image.write_bytes(gzip.decompress((EXAMPLES / "tiny.qcow2.gz").read_bytes()))
    [name, *_] = json.loads(run("info", image, "--json").out)["bitmaps"]
    dumped = run("dump", image, name["name"], "--format", form)
    options = ["--granularity", str(name["granularity"]), "--format", form]
    assert run("replay", TINY, *options) == dumped
    assert dumped.code == 0


def test_without_a_granularity_it_is_the_default(run: Run) -> None:
    text = run("replay", TINY, "--format", "csv").out
    assert text == run("replay", TINY, "--granularity", "64K", "--format", "csv").out


@pytest.mark.parametrize(("form", "text"), [("json", "[]\n"), ("csv", "offset,length\n")])
def test_nothing_dirty_is_an_empty_list(run: Run, tmp_path: Path, form: str, text: str) -> None:
    (tmp_path / "t").write_bytes(b"")
    assert run("replay", tmp_path / "t", "--format", form) == (0, text, "")


@FORMATS
def test_many_extents_are_one_list(run: Run, many: Path, form: str) -> None:
    result = run("replay", many, "--granularity", "512", "--format", form)
    assert read(result.out, form) == [(1024 * i, 512) for i in range(MANY)]


@FORMATS
def test_what_differs_from_qemu_is_told_beside_them(run: Run, tmp_path: Path, form: str) -> None:
    data = json.loads(TINY_TRUTH.read_text())
    data["bitmaps"][1]["count"] = 7
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(data))
    options = ["--granularity", "4K", "--format", form]
    result = run("replay", TINY, "--expect", path, *options)
    assert result.code == 1
    assert result.err.startswith("Different from QEMU 7.2.22 at 4K.\n4K count\n    ours  ")
    assert result.out == run("replay", TINY, *options).out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--json"], "either --json or --format"),
        (["--granularity", "512", "4K"], "choose one --granularity"),
        (["--expect", str(TINY_TRUTH)], "choose one --granularity"),
        (["--format", "xml"], "'xml' is not one of"),
    ],
)
def test_what_has_no_one_list_is_refused(run: Run, options: list[str], words: str) -> None:
    result = run("replay", TINY, "--format", "csv", *options)
    assert (result.code, result.out) == (2, "")
    assert words in result.err


@FORMATS
def test_a_malformed_trace_prints_no_extents(run: Run, tmp_path: Path, form: str) -> None:
    (tmp_path / "bad").write_text("write 0 1\nwrite 0\n")
    result = run("replay", tmp_path / "bad", "--format", form)
    assert (result.code, result.out) == (2, "")
    assert ":2: expected" in result.err


@FORMATS
def test_a_reader_that_has_enough_is_no_error_to_speak_of(many: Path, form: str) -> None:
    with _printing(many, form) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@FORMATS
def test_a_full_disk_is_told(many: Path, form: str) -> None:
    with open("/dev/full", "wb") as full:
        result = spawn("replay", many, "--format", form, stdout=full)
    assert result.code == 2
    assert result.err == "pybitmap: standard output: No space left on device\n"


@FORMATS
def test_ctrl_c_amid_the_list_is_told(many: Path, form: str) -> None:
    with _printing(many, form) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"pybitmap: interrupted\n")


def _printing(trace: Path, form: str) -> subprocess.Popen[bytes]:
    """More than a pipe holds."""
    options = ["--granularity", "512", "--format", form]
    return subprocess.Popen(
        [sys.executable, "-m", "pybitmap", "replay", str(trace), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_signals,
    )
