# SPDX-License-Identifier: MIT
"""An exception at any line of any change: it has happened or it has not, and nothing stays behind.

What a signal handler raises comes at any line of Python. Here a trace function raises at the n-th
line that is run in the package, for every n (of which a sample is taken; all of them with
PYBITMAP_ALL_LINES=1, ``make interrupts``). What is looked at then: trials.py.
"""

from __future__ import annotations

import os
import random
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from lines import Interruption, interrupted
from stores import Place
from trials import CHANGES, KINDS, Disturbance, Trials

pytestmark = pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="relies on counted references and on _fast"
)

ALL = os.environ.get("PYBITMAP_ALL_LINES") == "1"
SAMPLE = 10  # of the lines of a change


def disturbed(at: int) -> AbstractContextManager[Disturbance]:
    """Raises at that line, once; 0: never."""
    return interrupted(at, Disturbance((Interruption,)))


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__ if kind else "no store")
def test_an_exception_at_any_line_leaves_all_or_nothing(
    kind: type[Place] | None, name: str, memory_path: Path
) -> None:
    trials = Trials(kind, memory_path, name)
    scene = trials.scene()
    with disturbed(0) as calm:
        trials.attempt(scene)
    scene.graph.close()
    every = range(1, calm.passed + 1)
    at = every if ALL or len(every) < SAMPLE else sorted(random.sample(every, SAMPLE))
    for line in at:
        trials.disturb(disturbed(line))
