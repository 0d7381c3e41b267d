# SPDX-License-Identifier: MIT
"""Backups of disks in a directory: made, verified, restored, listed, pruned.

The commands ``pybitmap backup``, ``verify``, ``restore``, ``list`` and ``prune`` as a library:
typed results, progress told to whoever asks, nothing printed, no state but that of the directory.
What all of them raise is a :class:`~pybitmap.errors.BitmapError`.

Examples have a directory ``backups`` with two points of a disk ``vda`` of 1 MiB, the second one an
increment, and an image ``disk.qcow2`` that no program has open.
"""

from .guest import GuestError, qga_hook
from .jobs import JobError
from .manifest import Copy, Manifest, Point, Repository, points
from .prune import Pruned, prune
from .restore import Restored, restore
from .run import Backup, Hooks, backup
from .source import Source
from .verify import Verification, Verified, verify

__all__ = [
    "Backup",
    "Copy",
    "GuestError",
    "Hooks",
    "JobError",
    "Manifest",
    "Point",
    "Pruned",
    "Repository",
    "Restored",
    "Source",
    "Verification",
    "Verified",
    "backup",
    "points",
    "prune",
    "qga_hook",
    "restore",
    "verify",
]
