# SPDX-License-Identifier: MIT
"""Runs commands on a file system without locks: see `c/nolocks.c`, which is below this script.

Usage: unlocked.py LIBRARY CASES. A case is what flock and fcntl answer (0: they work), and the
arguments of a `pybitmap` command; CASES is a JSON list of them. Prints the exit code, what was
printed and what was complained of, for each: JSON, too.
"""

from __future__ import annotations

import ctypes
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

from pybitmap.cli import main


def run(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    library = ctypes.CDLL(sys.argv[1])
    results = []
    for flock, fcntl, arguments in json.loads(sys.argv[2]):
        library.nolocks_fail(flock, fcntl)
        results.append(run(arguments))
        library.nolocks_fail(0, 0)
    print(json.dumps(results))
