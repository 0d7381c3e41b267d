# SPDX-License-Identifier: MIT
"""What is to be done in the child of a fork, by each module that has something of its parent's.

Python calls nothing in a child that C forks; what must not be done there asks a :class:`Process`.
"""

from __future__ import annotations

import os
from typing import Callable

from . import _core


def in_child(function: Callable[[], None]) -> Callable[[], None]:
    """A decorator: to be called there right after the fork, those that are named first at first."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
    return function


class Process:
    """The one that makes this. ``csrc/process.h`` says why its pid is not enough."""

    __slots__ = ("_number", "pid")

    def __init__(self) -> None:
        self.pid = os.getpid()  #: for messages
        self._number = _core.hbprocess_number()

    def is_this(self) -> bool:
        """False in its children. Any thread, and a finalizer, may ask."""
        return self._number == _core.hbprocess_number()
