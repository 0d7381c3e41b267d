# SPDX-License-Identifier: MIT
"""Backups of disks in a directory: made, verified, restored, listed, pruned.

The commands ``pybitmap backup``, ``verify``, ``restore``, ``list`` and ``prune`` as a library:
typed results, progress told to whoever asks, nothing printed, no state but that of the directory.
What all of them raise is a :class:`~pybitmap.errors.BitmapError`.
"""

from .manifest import Copy, Manifest, Point, Repository, points
from .prune import Pruned, prune
from .restore import Restored, restore
from .verify import Verification, Verified, verify

__all__ = [
    "Copy",
    "Manifest",
    "Point",
    "Pruned",
    "Repository",
    "Restored",
    "Verification",
    "Verified",
    "points",
    "prune",
    "restore",
    "verify",
]
