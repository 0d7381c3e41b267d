# SPDX-License-Identifier: MIT
"""What a run of the `pybitmap` command takes in memory at its peak, above the bare command.

The kernel's number (ru_maxrss) counts what is resident, mapped files included. A process begins
with the number of whoever started it, so pytest itself would hide every small command: this file is
also the script of a small process in between, which starts the command and hands on what it took.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


class Peak(NamedTuple):
    code: int
    err: str
    nbytes: int  #: above that of a command that is loaded, and does nothing


def peak(*args: str | Path, **options: Any) -> Peak:
    """Runs `pybitmap` with these arguments; its standard output goes nowhere, by default.

    options: of Popen
    """
    code, err, nbytes = _run(*args, **options)
    return Peak(code, err, max(0, nbytes - _bare()))


@functools.cache
def _bare() -> int:
    code, err, nbytes = _run("info", "--help")
    assert (code, err) == (0, "")
    return nbytes


def _run(*args: str | Path, **options: Any) -> tuple[int, str, int]:
    reading, writing = os.pipe()
    with open(reading, "rb") as answer:
        with open(writing, "wb"):
            options.setdefault("stdout", subprocess.DEVNULL)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(writing), *map(str, args)],
                stderr=subprocess.PIPE,
                pass_fds=[writing],
                start_new_session=True,
                **options,
            )
        try:
            _, err = process.communicate(timeout=120)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        code, maxrss = json.loads(answer.read())
    return code, err.decode(), maxrss * _UNIT


def _between(writing: int, command: list[str]) -> None:
    os.set_inheritable(writing, False)
    child = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
    os.write(writing, json.dumps([code, usage.ru_maxrss]).encode())


if __name__ == "__main__":
    _between(int(sys.argv[1]), [sys.executable, "-m", "pybitmap", *sys.argv[2:]])
