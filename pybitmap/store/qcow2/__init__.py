# SPDX-License-Identifier: MIT
"""Persistent bitmaps in qcow2 images."""

from .store import Qcow2Store, StoredBitmap, check, entries

__all__ = ["Qcow2Store", "StoredBitmap", "check", "entries"]
