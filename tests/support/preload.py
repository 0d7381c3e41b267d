# SPDX-License-Identifier: MIT
"""Runs a script with `c/faults.c`, or another such library, below it: see there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent


def build(folder: Path, name: str = "faults") -> Path:
    """The library of `c/NAME.c`; skips the test where it cannot be."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("LD_PRELOAD as it is used here needs Linux and glibc")
    compiler = os.environ.get("CC", "cc").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C compiler: {compiler[0]} is not installed (Debian package gcc)")
    library = folder / f"{name}.so"
    source = str(SUPPORT.parent / "c" / f"{name}.c")
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*compiler, *flags, "-o", str(library), source, "-ldl"], check=True)
    return library


def run(library: Path, script: str, *arguments: object) -> str:
    """What it prints."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / script), str(library), *map(str, arguments)],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        cwd=SUPPORT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def memory_folder(fallback: Path) -> Iterator[Path]:
    """A folder where syncing costs nothing, if there is one."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else fallback) as folder:
        yield Path(folder)
