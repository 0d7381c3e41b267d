# SPDX-License-Identifier: MIT
"""An exception at any line: what a signal handler raises comes at any line of Python.

A trace function raises at the n-th line that is run in the package; or something else comes there.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from support import collect

import pybitmap

PACKAGE = os.path.dirname(pybitmap.__file__)


class Interruption(BaseException):
    """As KeyboardInterrupt."""


class Lines:
    """What was run."""

    passed = 0
    came = False
    where = ""


def interrupt() -> None:
    raise Interruption


@contextmanager
def interrupted(
    at: int,
    lines: Lines | None = None,
    within: str = "",
    do: Callable[[], object] = interrupt,
) -> Iterator[Any]:
    """Raises at that line, once; 0: never. Gives ``lines``.

    :param within: of files in the package that begin so
    :param do: instead of raising
    """
    lines = Lines() if lines is None else lines
    files = os.path.join(PACKAGE, within)

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(files):
            return None
        # A `with` is a line again when its block is left, and a `try` is one that no handler
        # covers; but no signal handler of Python's can run there.
        skipped = _source(frame).startswith(("with ", "try:"))
        if event == "line" and not skipped:
            lines.passed += 1
            if lines.passed == at:
                lines.came = True
                lines.where = f"{frame.f_code.co_filename}:{frame.f_lineno}, line {at}"
                do()
        return trace

    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(None)


def _source(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def at_every_line(attempt: Callable[[], object], within: str = "") -> Iterator[str]:
    """Attempts it with an interruption at line 1, 2, ... until none comes; gives where each came.

    The attempt begins anew each time; what is to be looked at is looked at between two of them.
    """
    number = 1
    while True:
        with interrupted(number, within=within) as lines, suppress(Interruption):
            attempt()
        if not lines.came:
            assert number > 3, "nothing was interrupted"
            return
        if sys.implementation.name != "cpython":
            collect()
        yield lines.where
        number += 1
