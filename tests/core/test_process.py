# SPDX-License-Identifier: MIT
"""Which process this is: a number that no child of a fork has, whoever forks."""

from __future__ import annotations

import ctypes
import os
import sys
import threading

import pytest

from pybitmap import _core
from pybitmap._fork import Process

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


def descendants(depth: int, known: frozenset[int]) -> bool:
    """Has no child of this process a number that is known, nor a child of it?"""
    known |= {_core.hbprocess_number()}
    for number in range(2):
        pid = ctypes.PyDLL(None).fork() if number and sys.platform == "linux" else os.fork()
        if not pid:
            good = False
            try:
                own = _core.hbprocess_number()
                good = own not in known and own == _core.hbprocess_number()
                good = good and (depth == 1 or descendants(depth - 1, known))
            finally:
                os._exit(not good)
        if os.waitpid(pid, 0)[1]:
            return False
    return _core.hbprocess_number() in known


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy does not bear a fork by C")
def test_none_has_the_number_of_what_it_descends_from() -> None:
    assert descendants(3, frozenset())


def test_threads_that_ask_at_once_are_told_the_same() -> None:
    """Also in a child, where nobody has asked before; and it is not the parent's."""
    made = Process()
    pid = os.fork()
    if not pid:
        good = False
        try:
            told: list[int] = []
            begin = threading.Barrier(4)

            def ask() -> None:
                begin.wait()
                told.append(_core.hbprocess_number())

            threads = [threading.Thread(target=ask) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            good = len(set(told)) == 1 and not made.is_this() and Process().is_this()
        finally:
            os._exit(not good)
    assert os.waitpid(pid, 0)[1] == 0
    assert made.is_this()
    assert made.pid == os.getpid()
