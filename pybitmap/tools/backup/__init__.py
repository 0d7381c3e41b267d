# SPDX-License-Identifier: MIT
"""Backups of disks in a directory: made, verified, restored, listed, pruned.

The commands ``pybitmap backup``, ``verify``, ``restore``, ``list`` and ``prune`` as a library:
typed results, progress told to whoever asks, nothing printed, no state but that of the directory.
"""
