# SPDX-License-Identifier: MIT
"""Does an installed package work at all? Run with nothing but pybitmap installed, not by pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pybitmap
import pybitmap.qmp
from pybitmap import _entry

hb = pybitmap.HBitmap(1 << 40, granularity=16)
hb.set(1_000_000, 100_000)
assert list(hb.areas()) == [(983040, 131072)]
assert len(hb.drain()) == 2
assert not hb

names = {Path(source).name for source in pybitmap.get_sources()}
assert {"block.c", "mark.c", "clear.c", "search.c", "ops.c", "tracker.c", "words.c"} <= names, names
assert {"copies.c", "threads.c", "files.c"} <= names, names
include = {path.name for path in Path(pybitmap.get_include()).iterdir()}
assert {"hbitmap.h", "tracker.h", "pybitmap_api.h", "pybitmap_table.h", "pybitmap.pc"} <= include
for name in ("py.typed", "native.pxd"):
    assert (Path(pybitmap.__file__).parent / name).is_file()

# Flags need no extra.
flags = subprocess.run(
    [sys.executable, "-m", "pybitmap", "--cflags"], capture_output=True, text=True, check=True
)
assert flags.stdout == f"-I{pybitmap.get_include()}\n", flags

# Without the extra, the command says how to get it.
command = subprocess.run([sys.executable, "-m", "pybitmap"], capture_output=True, text=True)
assert command.returncode == 2, command
assert "[cli]" in command.stderr, command

fast = "with" if _entry._fast else "without"
print(f"smoke test passed, {fast} the fast entry:", pybitmap.__file__)
