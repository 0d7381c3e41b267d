# SPDX-License-Identifier: MIT
"""An exception at any line of any change: it has happened or it has not, and nothing stays behind.

What a signal handler raises comes at any line of Python. Here a trace function raises at the n-th
line that is run in the package, for every n (of which a sample is taken; all of them with
PYBITMAP_ALL_LINES=1, ``make interrupts``). What is looked at then: trials.py.
"""

from __future__ import annotations

import linecache
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from stores import Place
from trials import CHANGES, KINDS, Disturbance, Trials

import pybitmap

pytestmark = pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="relies on counted references and on _fast"
)

PACKAGE = os.path.dirname(pybitmap.__file__)
ALL = os.environ.get("PYBITMAP_ALL_LINES") == "1"
SAMPLE = 10  # of the lines of a change


class Interruption(BaseException):
    """As KeyboardInterrupt."""


@contextmanager
def interrupted(at: int) -> Iterator[Disturbance]:
    """Raises at that line, once; 0: never."""
    disturbance = Disturbance((Interruption,))

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # A `with` is a line again when its block is left, and a `try` is one that no handler
        # covers; but no signal handler of Python's can run there.
        skipped = source(frame).startswith(("with ", "try:"))
        if event == "line" and not skipped:
            disturbance.passed += 1
            if disturbance.passed == at:
                disturbance.came = True
                disturbance.where = f"{frame.f_code.co_filename}:{frame.f_lineno}, line {at}"
                raise Interruption
        return trace

    sys.settrace(trace)
    try:
        yield disturbance
    finally:
        sys.settrace(None)


def source(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__ if kind else "no store")
def test_an_exception_at_any_line_leaves_all_or_nothing(
    kind: type[Place] | None, name: str, tmp_path: Path
) -> None:
    trials = Trials(kind, tmp_path, name)
    scene = trials.scene()
    with interrupted(0) as calm:
        trials.attempt(scene)
    scene.graph.close()
    every = range(1, calm.passed + 1)
    at = every if ALL or len(every) < SAMPLE else sorted(random.sample(every, SAMPLE))
    for line in at:
        trials.disturb(interrupted(line))
