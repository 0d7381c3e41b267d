# SPDX-License-Identifier: MIT
"""Writes that reach a bitmap by themselves: the kernel, KVM or an emulator says what was written.

All have one protocol, :class:`Tracker`. What an extra brings is imported when it is needed.
"""

from __future__ import annotations

from .base import Tracker
from .kvm import KvmDirtyLog, KvmDirtyRing
from .memory import MemoryTracker
from .snapshot import Snapshot
from .unicorn import UnicornTracker

__all__ = [
    "KvmDirtyLog",
    "KvmDirtyRing",
    "MemoryTracker",
    "Snapshot",
    "Tracker",
    "UnicornTracker",
]
