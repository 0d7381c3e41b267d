# SPDX-License-Identifier: MIT
"""An allocation of Python's that fails, anywhere in a change: it has happened or it has not.

What is looked at then: trials.py. Descriptors are not: where memory fails, Python 3.11 itself loses
references (to what a comprehension or a closure had), and what they refer to stays.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from stores import Place
from trials import CHANGES, KINDS, Disturbance, Trials

if sys.implementation.name != "cpython":
    pytest.skip("relies on counted references and on _fast", allow_module_level=True)
_testcapi = pytest.importorskip("_testcapi", reason="this Python has no _testcapi")

ALL = os.environ.get("PYBITMAP_ALL_LINES") == "1"
#: Allocations in a row that fail, and of how many: more than a change has, as a rule.
SAMPLE, MOST = (400, 400) if ALL else (4, 200)


class WithoutMemory:
    """``with``: the n-th allocation fails, or a few from there on."""

    def __init__(self, at: int, count: int) -> None:
        # What Python makes of it: where no lock can be had, where os.fspath finds no __fspath__,
        # and where it does not know itself.
        kinds = (MemoryError, RuntimeError, TypeError, SystemError)
        self._disturbance = Disturbance(
            kinds,
            told=False,
            end=_testcapi.remove_mem_hooks,
        )
        self._disturbance.where = f"allocation {at}, {count}"
        self._arguments = at, at + count

    def __enter__(self) -> Disturbance:
        _testcapi.set_nomemory(*self._arguments)
        return self._disturbance

    def __exit__(self, *_: object) -> None:
        _testcapi.remove_mem_hooks()


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__ if kind else "no store")
def test_an_allocation_that_fails_leaves_all_or_nothing(
    kind: type[Place] | None, name: str, memory_path: Path
) -> None:
    trials = Trials(kind, memory_path, name)
    for at in sorted(random.sample(range(1, MOST + 1), SAMPLE)):
        trials.disturb(WithoutMemory(at, random.choice([1, 1, 2, 5])))
