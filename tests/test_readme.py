# SPDX-License-Identifier: MIT
"""What the README shows is what happens."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


@pytest.mark.core
def test_the_python_examples_give_what_they_show() -> None:
    failed, tried = doctest.testfile(
        str(README), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert tried > 20
    assert failed == 0


def console_lines() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("line", [x for x in console_lines() if x.startswith("pybitmap ")])
def test_the_commands_shown_succeed(line: str) -> None:
    pytest.importorskip("click")
    pytest.importorskip("rich")
    command = [sys.executable, "-m", "pybitmap", *shlex.split(line)[1:]]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)


def test_every_make_target_shown_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = re.findall(r"^make (\w+)", "\n".join(console_lines()), re.MULTILINE)
    assert shown == ["run", "test"]
    for target in shown:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
