# SPDX-License-Identifier: MIT
"""`pybitmap convert`: what is read and written, what is told, and what stays when it fails."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from commands import Run, heed_signals, spawn
from filesystems import loop_device
from images import create, qemu_img, qemu_io
from peers import package

pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")

from pybitmap import BlockGraph, StoreError, Transaction
from pybitmap.interchange import FORMATS
from pybitmap.store import LocalStore

MIB = 1 << 20
K64 = 65536


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(text: str | bytes) -> None:
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.json"
    path.write_text('[{"offset": 0, "length": 512}, {"offset": 65536, "length": 4096}]')
    return path


@pytest.fixture
def store(tmp_path: Path, run: Run) -> Path:
    """A local store with two nodes of 1 MiB; vm0/daily has something dirty."""
    path = tmp_path / "store"
    for name in ("vm0/daily", "vm1/daily"):
        assert run("add", path, name, "--size", "1M", "-g", "4K").code == 0
    with BlockGraph() as graph:
        graph.add_node("vm0", store=LocalStore(path)).mark_dirty(8192, 1)
    return path


def areas(run: Run, path: Path, name: str) -> list[tuple[int, int]]:
    found = json.loads(run("dump", path, name, "--format", "json").out)
    return [(each["offset"], each["length"]) for each in found]


# ---- done -----------------------------------------------------------------------------------


def test_from_a_pipe_to_standard_output(run: Run, stdin: Any) -> None:
    stdin("offset,length\n0,512\n4096,1024\n")
    assert run("convert", "-") == (
        0,
        '[\n{"offset": 0, "length": 512},\n{"offset": 4096, "length": 1024}\n]\n',
        "",
    )
    stdin("offset,length\n0,512\n")
    assert run("convert", "-", "-", "--to", "csv") == (0, "offset,length\n0,512\n", "")


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.bits", "a.roaring", "a.arrow", "a.parquet"])
def test_the_extension_tells_the_format(run: Run, source: Path, tmp_path: Path, name: str) -> None:
    if name in ("a.arrow", "a.parquet"):
        package("pyarrow")
    block_size, bit_order = ("--block-size", "512"), ("--bit-order", "msb")
    options = {"a.bits": (*block_size, *bit_order), "a.roaring": block_size}.get(name, ())
    assert run("convert", source, tmp_path / name, *options) == (0, "", "")
    back = ("--from", "bits") if name == "a.bits" else ()
    found = run("convert", tmp_path / name, *back, *options)
    assert json.loads(found.out) == json.loads(source.read_text())


def test_what_rounding_adds_is_told(run: Run, stdin: Any) -> None:
    text = '[{"offset": 5, "length": 700}, {"offset": 4000, "length": 10}]'
    stdin(text)
    result = run("convert", "-", "--to", "csv", "-g", "4K")
    assert result.out == "offset,length\n0,4010\n", "the disk ends with the last extent"
    assert result.err == (
        "pybitmap: rounded outwards to multiples of 4K: 3300 bytes more are dirty, 4010 instead of"
        " 710\n"
    )
    stdin(text)
    result = run("convert", "-", "--to", "era", "--block-size", "1M", "--size", "8M")
    assert "multiples of 512 and 1M: 1047866 bytes more" in result.err
    assert '<block block="0"/>' in result.out
    stdin(text)
    assert run("convert", "-", "--to", "csv", "-g", "4K", "-q").err == ""
    stdin(text)
    assert run("convert", "-", "--to", "csv", "-g", "1").err == ""


def test_a_list_that_was_cut_goes_on(run: Run, source: Path) -> None:
    assert run("convert", source, "--to", "csv", "--start", "64K") == (
        0,
        "offset,length\n65536,4096\n",
        "",
    )
    found = json.loads(
        run("convert", source, "--to", "csi", "--block-size", "512", "--start", "66000").out
    )
    assert [each["byte_offset"] for each in found[0]["block_metadata"]][:2] == [65536, 66048]


def test_in_verbose_it_says_what_it_takes_it_for(run: Run, source: Path) -> None:
    assert f"{source}: json" in run("convert", source, "-v").err


def test_from_a_bitmap_of_a_store_and_of_an_image(run: Run, store: Path, tmp_path: Path) -> None:
    result = run("convert", store, "--bitmap", "vm0/daily", "--to", "nbdinfo")
    assert result.err == ""
    assert result.out.splitlines() == [
        "         0        8192    0  clean",
        "      8192        4096    1  dirty",
        "     12288     1036288    0  clean",
    ]
    image = create(tmp_path / "disk", "8M")
    qemu_img("bitmap", "--add", image, "b")
    qemu_io(image, "write 1M 1k")
    assert run("convert", image, "--bitmap", "b", "--to", "csv").out == (
        f"offset,length\n{MIB},{K64}\n"
    )
    assert run("convert", image, "--bitmap", "b", "--to", "csv", "-g", "1M").out == (
        f"offset,length\n{MIB},{MIB}\n"
    )


def test_into_a_bitmap_beside_what_is_dirty_there(run: Run, store: Path, stdin: Any) -> None:
    stdin("offset,length\n0,100\n65536,4096\n")
    result = run("convert", "-", store, "--into", "vm0/daily")
    assert (result.code, result.out) == (0, "")
    assert result.err == (
        "pybitmap: rounded outwards to multiples of 4K: 3996 bytes more are dirty, 8192 instead of"
        " 4196\n"
    )
    assert areas(run, store, "vm0/daily") == [(0, 4096), (8192, 4096), (65536, 4096)]
    assert areas(run, store, "vm1/daily") == []


def test_into_an_image_that_qemu_reads(run: Run, tmp_path: Path, source: Path) -> None:
    image = create(tmp_path / "disk", "8M")
    qemu_img("bitmap", "--add", image, "b")
    assert run("convert", source, image, "--into", "b", "-q").code == 0
    qemu_img("check", image)
    assert areas(run, image, "b") == [(0, 131072)]


def test_from_one_store_into_another(run: Run, store: Path, tmp_path: Path) -> None:
    assert run("convert", store, store, "--bitmap", "vm0/daily", "--into", "vm1/daily").code == 0
    assert areas(run, store, "vm1/daily") == [(8192, 4096)]


# ---- not done: exit code 1, why, and all as before ------------------------------------------


def refused(run: Run, *words: str | Path, code: int = 1) -> str:
    result = run("convert", *words)
    assert (result.code, result.out) == (code, "")
    assert result.err.count("\n") == 1 or code == 2
    return result.err


def test_a_wrong_line_is_named_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    path, dest = tmp_path / "a", tmp_path / "b.json"
    path.write_text("offset,length\n0,5\n-5,1\n")
    dest.write_text("before")
    assert f"{path}:3: " in refused(run, path, dest)
    assert dest.read_text() == "before"
    assert f"{path}:3: " in refused(run, path)
    path.write_text("offset,length\n0,5\n3,5\n")
    assert "--any-order" in refused(run, path)
    assert run("convert", path, "--any-order", "-g", "1").code == 0


def test_standard_input_is_named(run: Run, stdin: Any) -> None:
    stdin("what")
    assert "<stdin>: cannot tell the format" in refused(run, "-")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--to", "bits", "--bit-order", "lsb"], "--block-size"),
        (["--to", "bits", "--block-size", "512"], "--bit-order"),
        (["--to", "roaring"], "--block-size"),
        (["--to", "thin-delta"], "--block-size"),
        (["--to", "thin-delta", "--block-size", "1000"], "whole sectors"),
        (["--to", "csi", "--block-size", "1000"], "do not fill"),
        (["--to", "era-dump"], "only read"),
        (["--size", "512"], "beyond the size"),
        (["--size", "1E", "-g", "512"], "-g"),
        (["--size", "4T", "-g", "512", "--memory-limit", "1M"], "--memory-limit"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_say(
    run: Run, source: Path, words: list[str], why: str
) -> None:
    assert why in refused(run, source, *words)


def test_usage(run: Run, source: Path, store: Path) -> None:
    for words, why in [
        ((source, "--to", "parket"), "parquet"),
        ((source, "-g", "1000"), "power of 2"),
        ((source, "--block-size", "0", "--to", "era"), "at least a byte"),
        ((source, "--bit-order", "big"), "lsb"),
        ((source, "--since", "-1"), "-1"),
        ((source, "--into", "b"), "no --to, no -"),
        ((source, store, "--into", "vm0/daily", "--to", "csv"), "no --to, no -"),
        ((source, store, "--into", "vm0/daily", "-g", "4K"), "of the bitmap there"),
        (("-", "--bitmap", "b"), "no --from, no -"),
        ((store, "--bitmap", "vm0/daily", "--size", "4K"), "of the disk there"),
        ((), "SRC"),
    ]:
        assert why in refused(run, *words, code=2)


def test_images_and_stores_are_no_lists_and_are_never_written_over(
    run: Run, source: Path, store: Path, tmp_path: Path
) -> None:
    image = create(tmp_path / "disk.csv", "8M")
    before = image.read_bytes()
    for path in (image, store):
        assert "by --into NAME" in refused(run, source, path)
        assert "by --into NAME" in refused(run, source, path, "--to", "csv")
        assert "by --bitmap NAME" in refused(run, path)
    assert "a directory" in refused(run, source, tmp_path)
    assert image.read_bytes() == before


def test_names_that_are_not_there_are_refused(run: Run, source: Path, store: Path) -> None:
    assert "vm0/daily" in refused(run, store, "--bitmap", "weekly")
    assert "vm0/daily" in refused(run, source, store, "--into", "weekly")
    assert "No such file" in refused(run, "none")
    assert "No such file" in refused(run, source, "none/a.csv")


def test_extents_beyond_the_disk_mark_nothing(run: Run, store: Path, stdin: Any) -> None:
    stdin("offset,length\n0,100\n1048575,2\n")
    assert "<stdin>:3: " in refused(run, "-", store, "--into", "vm1/daily")
    assert areas(run, store, "vm1/daily") == []


def test_a_disk_of_another_size_is_refused(
    run: Run, store: Path, tmp_path: Path, source: Path
) -> None:
    other = tmp_path / "other"
    assert run("add", other, "n/b", "--size", "2M").code == 0
    assert "2097152" in refused(run, other, store, "--bitmap", "b", "--into", "vm0/daily")


@pytest.mark.parametrize("step", ["merge", "_switch"])
def test_a_store_that_fails_is_as_before(
    run: Run, store: Path, source: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    owner: Any = Transaction if step == "merge" else LocalStore
    original, failed = getattr(owner, step), False

    def fail(*arguments: Any) -> Any:
        nonlocal failed
        if failed:
            return original(*arguments)
        failed = True
        raise StoreError("no space")

    before = areas(run, store, "vm0/daily")
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail)
        assert "no space" in refused(run, source, store, "--into", "vm0/daily", "-q")
    assert areas(run, store, "vm0/daily") == before


def test_beside_a_program_that_has_it_open(run: Run, store: Path, source: Path) -> None:
    with BlockGraph() as graph:
        node = graph.add_node("vm0", store=LocalStore(store))
        assert "-U reads it all the same" in refused(run, store, "--bitmap", "vm0/daily")
        assert run("convert", store, "--bitmap", "vm1/daily", "-U").code == 0
        refused(run, source, store, "--into", "vm0/daily")
        refused(run, source, store, "--into", "vm0/daily", "-U", code=2)
        node.mark_dirty(0, 1)
    assert areas(run, store, "vm0/daily") == [(0, 4096), (8192, 4096)]


def test_standard_output_that_is_closed_or_full_is_told(source: Path) -> None:
    assert spawn("convert", source, preexec_fn=lambda: os.close(1)).code == 1
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            result = spawn("convert", source, stdout=full)
        assert (result.code, "No space left" in result.err) == (1, True)
    result = spawn("convert", "-", preexec_fn=lambda: os.close(0))
    assert (result.code, "<stdin>" in result.err) == (1, True)


def test_a_reader_that_ends_early_is_no_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("offset,length\n" + "".join(f"{1024 * i},512\n" for i in range(100_000)))
    with subprocess.Popen(
        [sys.executable, "-m", "pybitmap", "convert", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


def test_interrupted_while_it_reads_it_leaves_all_as_before(tmp_path: Path, store: Path) -> None:
    dest = tmp_path / "a.csv"
    dest.write_text("before")
    for words in [(str(dest),), (str(store), "--into", "vm0/daily")]:
        with subprocess.Popen(
            [sys.executable, "-m", "pybitmap", "convert", "-", "--from", "csv", *words],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=heed_signals,
        ) as process:
            assert process.stdin is not None
            process.stdin.write(b"offset,length\n0,512\n" + b"\n" * 100_000)  # more than a pipe has
            process.stdin.flush()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
    assert dest.read_text() == "before"
    assert {each.name for each in tmp_path.iterdir()} == {"a.csv", "store"}


def test_the_example_brings_a_copy_up_to_date(tmp_path: Path) -> None:
    disk, copy, changes = tmp_path / "disk", tmp_path / "copy", tmp_path / "changes.json"
    old, new = bytearray(b"a" * 3 * MIB), bytearray(b"a" * 3 * MIB)
    new[5:7], new[-1:], old[400:401] = b"bc", b"d", b"z"
    disk.write_bytes(new)
    copy.write_bytes(old)
    changes.write_text('[{"offset": 5, "length": 2}, {"offset": 3145727, "length": 1}]')
    example = Path(__file__).parents[2] / "examples" / "apply_changes.py"
    command = [sys.executable, *map(str, [example, changes, disk, copy])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1024 bytes copied\n"), done.stderr
    assert copy.read_bytes() == new
    changes.write_text('[{"offset": 5, "length": 20000000}]')
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "beyond the size of the disk" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[list[Path]]:
    """Of 3 MiB, 3 MiB and 2 MiB."""
    with ExitStack() as stack:
        made = []
        for number, size in enumerate((3 * MIB, 3 * MIB, 2 * MIB)):
            path = tmp_path / f"device{number}"
            path.write_bytes(bytes(size))
            made.append(stack.enter_context(loop_device(path)))
        yield made


def test_the_example_takes_devices_which_have_no_size_as_files(
    tmp_path: Path, devices: list[Path]
) -> None:
    example = Path(__file__).parents[2] / "examples" / "apply_changes.py"
    copy, changes = tmp_path / "copy", tmp_path / "changes.json"

    def applied(disk: Path, copy: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, [example, changes, disk, copy])]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    old, new = b"a" * 3 * MIB, b"b" * 3 * MIB
    devices[0].write_bytes(new)
    copy.write_bytes(old)
    devices[1].write_bytes(old)
    for target in (copy, devices[1]):
        changes.write_text("[]")
        done = applied(devices[0], target)
        assert (done.returncode, done.stdout) == (0, "0 bytes copied\n"), done.stderr
        assert target.read_bytes() == old
        changes.write_text('[{"offset": 512, "length": 1024}]')
        done = applied(devices[0], target)
        assert (done.returncode, done.stdout) == (0, "1024 bytes copied\n"), done.stderr
        assert target.read_bytes() == old[:512] + new[:1024] + old[1536:]
    done = applied(devices[0], devices[2])
    assert (done.returncode, "is smaller than" in done.stderr) == (1, True), done.stderr
    assert not any(devices[2].read_bytes())


# ---- help and completion --------------------------------------------------------------------


def test_the_help_has_every_format(run: Run) -> None:
    text = run("convert", "--help").out
    _, _, listed = text.partition("Formats:")
    names = [
        word.strip()
        for line in listed.partition("Examples:")[0].splitlines()
        for word in line.strip().split("  ")[0].split(",")
    ]
    assert {name for name in names if name} == set(FORMATS)


def test_formats_and_names_are_completed(
    run: Run, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    from pybitmap.cli import completion

    monkeypatch.setattr(completion, "PATIENCE", 600.0)

    def completed(*words: str | Path) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setenv("_PYBITMAP_COMPLETE", "bash_complete")
            patch.setenv("COMP_WORDS", " ".join(map(str, ["pybitmap", "convert", *words])))
            patch.setenv("COMP_CWORD", str(len(words) + 1))
            return run().out.split()

    assert completed("a", "b", "--to", "q") == ["plain,qemu-map", "plain,qemu-map-bitmap"]
    assert completed(store, "--bitmap", "vm1") == ["plain,vm1/daily"]
    assert completed("a", store, "--into", "vm0") == ["plain,vm0/daily"]


def test_twice_at_once_into_one_file_leaves_a_whole_one(tmp_path: Path, source: Path) -> None:
    dest = tmp_path / "a.csv"
    command = [sys.executable, "-m", "pybitmap", "convert", str(source), str(dest)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert dest.read_text() == "offset,length\n0,512\n65536,4096\n"
    assert not list(tmp_path.glob(".*.part"))
