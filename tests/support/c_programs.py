# SPDX-License-Identifier: MIT
"""Builds and runs the programs of tests/c, with whatever C compiler there is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PROGRAMS = TESTS / "c"
CSRC = TESTS.parent / "csrc"


def run(command: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def succeed(command: list[str], stdin: str = "") -> str:
    done = run(command, stdin)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def build(tmp_path: Path, program: str, *flags: str) -> str:
    compiler = os.environ.get("CC", "cc").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C compiler: {compiler[0]} is not installed (Debian package gcc)")
    binary = str(tmp_path / program)
    sources = [str(PROGRAMS / f"{program}.c"), *sorted(map(str, CSRC.glob("*.c")))]
    options = ["-std=c11", "-O1", "-g", f"-I{CSRC}", "-pthread", *flags]
    succeed([*compiler, *options, "-o", binary, *sources])
    return binary
