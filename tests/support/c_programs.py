# SPDX-License-Identifier: MIT
"""Builds and runs the programs of tests/c, with whatever C compiler there is.

The core's sources are compiled often, with many flags, of which most change nothing in most of
them. So objects are kept in `build/objects`, under a hash of what they follow from: the source
after the preprocessor, the other flags, and what the compiler says that it is.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PROGRAMS = TESTS / "c"
CSRC = TESTS.parent / "csrc"
OBJECTS = TESTS.parent / "build" / "objects"
CORE = sorted(CSRC.glob("*.c"))


def run(command: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def succeed(command: list[str], stdin: str = "") -> str:
    done = run(command, stdin)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def compiler() -> list[str]:
    """The command of the C compiler; skips the test where there is none."""
    command = os.environ.get("CC", "cc").split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C compiler: {command[0]} is not installed (Debian package gcc)")
    return command


@functools.cache
def identity(*command: str) -> str:
    return run([*command, "-v"]).stderr


def compiled(source: Path, flags: Sequence[str], objects: Path = OBJECTS) -> Path:
    """The object of a C source.  May be called by several processes at once.

    :param flags: all that is for the compiler, ``-I`` too
    """
    command = [*compiler(), *flags]
    text = succeed([*command, "-E", str(source)])
    others = [flag for flag in command if not flag.startswith(("-D", "-I"))]  # they are in the text
    facts = [identity(*compiler()), *others, text]
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()
    kept = objects / f"{source.stem}-{key[:32]}.o"
    if not kept.exists():
        objects.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=objects) as folder:
            fresh = Path(folder) / "o"
            succeed([*command, "-c", "-o", str(fresh), str(source)])
            fresh.replace(kept)  # whole, or not there
    return kept


def link(output: Path, sources: Sequence[Path], *flags: str) -> Path:
    """A program (or, with ``-shared``, a library) of these sources."""
    to_compile = [flag for flag in flags if not flag.startswith(("-Wl,", "-l", "-shared"))]
    objects = [str(compiled(source, to_compile)) for source in sources]
    libraries = [flag for flag in flags if flag.startswith("-l")]
    rest = [flag for flag in flags if flag not in libraries]
    succeed([*compiler(), *rest, "-o", str(output), *objects, *libraries])
    return output


def build(tmp_path: Path, program: str, *flags: str) -> str:
    """A program of tests/c, with the core."""
    options = ["-std=c11", "-O1", "-g", f"-I{CSRC}", "-pthread", *flags]
    return str(link(tmp_path / program, [PROGRAMS / f"{program}.c", *CORE], *options))
