# SPDX-License-Identifier: MIT
"""Running the `pybitmap` command in tests; in this process the fixture `run` does it."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]
Complete = Callable[..., list[str]]


def spawn(*args: str | Path, **options: Any) -> Result:
    """Runs it as a process of its own."""
    options.setdefault("stdout", subprocess.PIPE)
    command = [sys.executable, "-m", "pybitmap", *map(str, args)]
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=120, **options)
    return Result(done.returncode, (done.stdout or b"").decode(), done.stderr.decode())


def heed_signals() -> None:
    """In a child: whoever runs the tests in the background (nohup) may have had them ignored."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def serving(path: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`pybitmap serve` on a socket, with further arguments; killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pybitmap", "serve", "--socket", str(path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


class Terminal:
    """The command in a terminal of its own: what it has shown so far, and its process."""

    def __init__(self, args: tuple[str | Path, ...], columns: int, program: list[str]) -> None:
        self.shown = b""
        self._deadline = time.monotonic() + 120
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *program, *map(str, args)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "50"},
            preexec_fn=heed_signals,
        )
        os.close(slave)

    def read_until(self, words: bytes) -> None:
        while words not in self.shown:
            assert self._read(), f"it ended: {self.shown!r}"

    def end(self) -> int:
        """Reads all there is and gives the exit code."""
        while self._read():
            pass
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self) -> bool:
        left = self._deadline - time.monotonic()
        ready, _, _ = select.select([self._master], [], [], max(0, left))
        assert ready, f"it hangs: {self.shown[-1000:]!r}"
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # how Linux says that the other end was closed
            data = b""
        self.shown += data
        return bool(data)


@contextmanager
def terminal(*args: str | Path, columns: int = 80, before: str | None = None) -> Iterator[Terminal]:
    """:param before: a statement that its process runs first"""
    program = ["-m", "pybitmap"]
    if before is not None:
        run = "import sys; from pybitmap.__main__ import main; sys.exit(main())"
        program = ["-c", f"{before}\n{run}"]
    child = Terminal(args, columns, program)
    try:
        yield child
    finally:
        child.close()


def cursor_is_visible(shown: bytes) -> bool:
    return shown.rfind(SHOW_CURSOR) >= shown.rfind(HIDE_CURSOR)
