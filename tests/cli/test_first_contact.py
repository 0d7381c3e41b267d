# SPDX-License-Identifier: MIT
"""What a stranger tries in the first hour: no option is ignored in silence, and what comes as
other programs leave it is read, or refused with what to do."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Run
from images import create
from peers import package

pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")

import click

from pybitmap.cli import cli

CSV = b"offset,length\n4096,512\n"
JSON = b'[{"offset": 4096, "length": 512}]'
EXTENTS = [{"offset": 4096, "length": 512}]


def written(tmp_path: Path, data: bytes, name: str = "given") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


# ---- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--block-size", "64K", "--to", "csv"], "-g"),  # no rounding, where one was asked for
        (["--block-size", "64K", "--from", "json"], "from json to json"),
        (["--bit-order", "lsb"], "from json to json, but to bits"),
        (["--since", "3"], "but to era-dump"),
        (["-U"], "--bitmap"),
        (["--no-lock"], "--into"),
    ],
)
def test_an_option_that_means_nothing_is_refused(
    run: Run, tmp_path: Path, words: list[str], why: str
) -> None:
    result = run("convert", written(tmp_path, JSON), *words)
    assert (result.code, result.out) == (2, "")
    assert why in result.err


def test_nor_does_a_bitmap_heed_them(run: Run, tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", "1M")
    assert run("add", image, "daily").code == 0
    for words, why in [
        ((image, "--bitmap", "daily", "--block-size", "4K"), "from a bitmap to json"),
        ((written(tmp_path, JSON), image, "--into", "daily", "--block-size", "4K"), "to a bitmap"),
    ]:
        result = run("convert", *words)
        assert result.code == 2
        assert why in result.err
    assert run("dump", image, "daily", "--format", "csv").out == "offset,length\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--to", "csi", "--block-size", "512", "--size", "8K"],
        ["--to", "thin-delta", "--block-size", "512"],
        ["--to", "bits", "--block-size", "512", "--bit-order", "lsb"],
    ],
)
def test_one_that_means_something_is_heeded(run: Run, tmp_path: Path, words: list[str]) -> None:
    given = written(tmp_path, JSON)
    out = tmp_path / "out"
    assert run("convert", given, out, *words).code == 0
    if "bits" in words:
        back = ["--from", "bits", "--block-size", "512", "--bit-order", "lsb"]
        assert json.loads(run("convert", out, *back).out) == EXTENTS
    else:
        assert json.loads(run("convert", out).out) == EXTENTS


# ---- texts as other programs leave them -----------------------------------------------------

MARK = b"\xef\xbb\xbf"
XML = b'<blocks><block block="8"/></blocks>'
TEXTS = {
    "csv": CSV,
    "json": JSON,
    "rbd": b"Offset  Length  Type\n4096  512  data\n",
    "nbdinfo": b"      4096         512    0  data\n",
    "era": XML,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("said", [True, False])
def test_a_mark_of_the_encoding_and_line_ends_of_windows_are_read_over(
    run: Run, tmp_path: Path, name: str, said: bool
) -> None:
    data = MARK + TEXTS[name].replace(b"\n", b"\r\n")
    words = ["--from", name] if said else []
    words += ["--block-size", "512"] if name == "era" else []
    result = run("convert", written(tmp_path, data), *words)
    assert (result.code, json.loads(result.out)) == (0, EXTENTS)


@pytest.mark.parametrize("name", ["csv", "json", "rbd", "nbdinfo"])
@pytest.mark.parametrize("said", [True, False])
def test_what_is_no_text_yet_is_refused_with_what_makes_it_text(
    run: Run, tmp_path: Path, name: str, said: bool
) -> None:
    words = ["--from", name] if said else []
    for data, instead in [
        (gzip.compress(TEXTS[name]), "zcat"),
        (TEXTS[name].decode().encode("utf-16"), "iconv"),
    ]:
        result = run("convert", written(tmp_path, data), *words)
        assert (result.code, result.out) == (1, "")
        assert instead in result.err


def test_bits_that_look_like_a_mark_are_bits(run: Run, tmp_path: Path) -> None:
    for data in (MARK, gzip.compress(b"")[:2]):
        words = ["--from", "bits", "--bit-order", "lsb", "--block-size", "512"]
        found = json.loads(run("convert", written(tmp_path, data), *words).out)
        dirty = [
            8 * at + bit for at, byte in enumerate(data) for bit in range(8) if byte >> bit & 1
        ]
        blocks = [n for each in found for n in range(each["offset"], sum(each.values()), 512)]
        assert blocks == [512 * n for n in dirty]


def test_that_nothing_came_is_said(run: Run, tmp_path: Path) -> None:
    result = run("convert", written(tmp_path, b""))
    assert result.code == 1
    assert "it is empty" in result.err


# ---- ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\u65e5"])
def test_a_file_may_have_the_longest_name_there_is(run: Run, tmp_path: Path, letter: str) -> None:
    name = letter * (251 // len(letter.encode())) + ".csv"
    try:
        (tmp_path / name).touch()
    except (OSError, UnicodeError):
        pytest.skip("names of 255 bytes are not for this file system")
    result = run("convert", written(tmp_path, JSON), tmp_path / name)
    assert result.code == 0, result.err
    assert (tmp_path / name).read_bytes() == CSV
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["given", name])


def test_a_file_that_root_replaces_stays_its_owners(run: Run, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    there = written(tmp_path, b"", "there.csv")
    os.chown(there, 1234, 4321)
    there.chmod(0o640)
    assert run("convert", written(tmp_path, JSON), there).code == 0
    found = there.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1234, 4321, 0o640)
    assert there.read_bytes() == CSV


@pytest.mark.parametrize("name", ["roaring", "roaring64", "era", "thin-delta"])
@pytest.mark.parametrize("block_size", ["32T", "48T"])
def test_the_last_block_of_the_largest_disk_comes_back(
    run: Run, tmp_path: Path, name: str, block_size: str
) -> None:
    end = (1 << 63) - 1
    last = [{"offset": end - 1, "length": 1}]
    given = written(tmp_path, json.dumps(last).encode())
    words = ["--block-size", block_size, "-g", "4E"]
    result = run("convert", given, tmp_path / "out", "--to", name, *words)
    assert result.code == 0, result.err
    back = ["--from", name, "-g", "4E"]
    back += [] if name == "thin-delta" else words[:2]
    result = run("convert", tmp_path / "out", *back, "--size", str(end))
    assert result.code == 0, result.err
    [extent] = json.loads(result.out)
    assert extent["offset"] + extent["length"] == end


# ---- what a program that failed has left ----------------------------------------------------


@pytest.mark.parametrize("name", ["rbd", "nbdinfo", "csi", "bits"])
def test_that_nothing_came_is_said_of_a_format_that_may_be_empty(
    run: Run, tmp_path: Path, name: str
) -> None:
    more = ["--block-size", "512", "--bit-order", "lsb"] if name == "bits" else []
    result = run("convert", written(tmp_path, b""), "--from", name, *more)
    assert (result.code, result.out) == (0, "[]\n")
    assert "it is empty" in result.err


def test_a_map_of_a_whole_disk_is_not_empty(run: Run, tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", "1M")
    assert run("add", image, "daily").code == 0
    for data in (b"", b"\n"):
        given = written(tmp_path, data)
        for words in ([image, "--into", "daily"], ["--size", "1M"]):
            result = run("convert", given, *words, "--from", "nbdinfo")
            assert (result.code, result.out) == (1, "")
            assert "did it fail?" in result.err


# ---- notes ----------------------------------------------------------------------------------


def test_rounding_that_added_nothing_is_not_told(run: Run, tmp_path: Path) -> None:
    given = written(tmp_path, b"offset,length\n0,100\n100,412\n")
    result = run("convert", given, "--to", "csv", "-g", "4K")
    assert result == (0, "offset,length\n0,512\n", ""), "the disk ends with the last extent"
    assert "3584 bytes more" in run("convert", given, "-g", "4K", "--size", "1M").err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"Offset          Length          Mapped to       File\n", "map --output=json"),
        (b"length,offset\n512,4096\n", "CSV begins with offset,length"),
        (b"4096,512\n", "CSV begins with offset,length"),
    ],
)
def test_a_kindred_text_is_told_from_what_is_read(
    run: Run, tmp_path: Path, text: bytes, why: str
) -> None:
    result = run("convert", written(tmp_path, text))
    assert (result.code, result.out) == (1, "")
    assert why in result.err


# ---- machines -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [("info",), ("dump", "disk0", "daily"), ("take", "disk0", "daily", "--as", "copying")]
)
def test_an_empty_path_of_a_monitor_is_told(run: Run, words: tuple[str, ...]) -> None:
    package("qemu.qmp")
    result = run(*words, "--qmp", "")
    assert (result.code, result.out) == (2, "")
    assert "'--qmp': it is empty" in result.err


# ---- paths ----------------------------------------------------------------------------------


def paths(command: click.Command, *words: str) -> Iterator[tuple[str, click.Parameter]]:
    """The arguments and options of a command, and of those below it, that take a path."""
    ctx = click.Context(command)
    for param in command.params:
        if isinstance(param.type, click.Path):
            yield " ".join((*words, param.human_readable_name)), param
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            assert below is not None
            yield from paths(below, *words, name)


def test_no_command_takes_an_empty_path() -> None:
    """As `"$UNSET"` is one: it would be the folder where the command runs."""
    found = dict(paths(cli))
    assert {"add TARGET", "prune DIR", "backup to", "fleet scan [TARGET]..."} <= set(found)
    for name, param in found.items():
        with pytest.raises(click.BadParameter, match="empty"):
            print(name, param.type.convert("", param, click.Context(cli)))


def test_an_empty_path_is_not_the_folder_where_one_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("add", "", "vm1/daily", "--size", "1M")
    assert (result.code, result.out) == (2, "")
    assert "'TARGET': it is empty" in result.err
    assert list(tmp_path.iterdir()) == []


def test_that_a_path_cannot_be_read_is_told_by_who_opens_it() -> None:
    """In a line, with the exit code of the command; and what is only written need not be read."""
    assert [name for name, param in paths(cli) if getattr(param.type, "readable", None)] == []
