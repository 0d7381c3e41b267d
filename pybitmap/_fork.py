# SPDX-License-Identifier: MIT
"""What is to be done in the child of a fork, by each module that has something of its parent's."""

from __future__ import annotations

import os
from typing import Callable


def in_child(function: Callable[[], None]) -> Callable[[], None]:
    """A decorator: to be called there right after the fork, those that are named first at first."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
    return function
