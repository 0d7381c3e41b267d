# SPDX-License-Identifier: MIT
"""What the README shows is what happens."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from peers import peer

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader tries it: empty, but for the examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.core
def test_the_python_examples_give_what_they_show(folder: Path) -> None:
    failed, tried = doctest.testfile(
        str(README), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert tried > 20
    assert failed == 0


def test_the_first_screen_says_what_for_whom_and_how() -> None:
    text = README.read_text(encoding="utf-8")
    places = [
        text.index(each)
        for each in ("It is for", "![", ">>> ", "## Where writes come", "## Install")
    ]
    assert places == sorted(places)
    assert text[: places[-1]].count("\n") < 60


def blocks(kind: str) -> list[str]:
    return [block.text for block in pages.blocks(README) if block.kind == kind]


def commands(block: str) -> list[list[str]]:
    """The lines of a block that can be tried."""
    lines = [shlex.split(line[2:], comments=True) for line in block.splitlines()]
    return [line for line in lines if line[0] in ("pybitmap", "qemu-img", "qemu-io")]


def run_all(block: str) -> list[str]:
    printed = []
    for name, *args in commands(block):
        program = [sys.executable, "-m", name] if name == "pybitmap" else [peer(name, "qemu-utils")]
        done = subprocess.run(
            [*program, *args], check=True, capture_output=True, timeout=120, encoding="utf-8"
        )
        printed.append(done.stdout)
    return printed


@pytest.mark.parametrize("block", [block for block in blocks("console") if commands(block)])
def test_the_commands_shown_succeed(folder: Path, block: str) -> None:
    pytest.importorskip("click")
    pytest.importorskip("rich")
    if "pybitmap fleet" in block:
        pytest.importorskip("duckdb")
    run_all(block)


def test_the_backup_shown_is_what_it_prints(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("click")
    pytest.importorskip("rich")
    (block,) = [block for block in blocks("console") if "pybitmap take" in block]
    (program,) = [block for block in blocks("python") if "Qcow2Store(" in block]
    _, _, _, _, info, dump, *_ = run_all(block)
    (shown,) = [block for block in blocks("text") if "offset,length" in block]
    assert shown == info[info.index("bitmap ") :] + "\n" + dump
    run_all("$ qemu-io -c 'write 64k 64k' disk.qcow2\n")
    exec(program, {})
    assert capsys.readouterr().out == "copy 65536 bytes at 65536\n"
    assert "0   enabled" in run_all("$ pybitmap info disk.qcow2 --count\n")[0]


def test_every_make_target_shown_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [line[2:] for block in blocks("console") for line in block.splitlines()]
    shown = re.findall(r"^make (\w+)", "\n".join(lines), re.MULTILINE)
    assert shown == ["run", "test"]
    for target in shown:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
