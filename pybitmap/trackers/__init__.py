# SPDX-License-Identifier: MIT
"""Writes that reach a bitmap by themselves: the kernel, KVM or an emulator says what was written.

All have one protocol, :class:`Tracker`; those of extras are imported when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Tracker
from .memory import MemoryTracker
from .snapshot import Snapshot

if TYPE_CHECKING:
    from .unicorn import UnicornTracker

__all__ = ["MemoryTracker", "Snapshot", "Tracker", "UnicornTracker"]

_MODULES = {
    "UnicornTracker": "unicorn",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
