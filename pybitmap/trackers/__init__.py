# SPDX-License-Identifier: MIT
"""Writes that reach a bitmap by themselves: the kernel, KVM or an emulator says what was written.

All have one protocol, :class:`Tracker`; each is imported when it is first asked for.
"""

from __future__ import annotations

from .base import Tracker

__all__ = ["Tracker"]
