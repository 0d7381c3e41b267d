# SPDX-License-Identifier: MIT
"""Persistent bitmaps in qcow2 images."""

from .store import Qcow2Store

__all__ = ["Qcow2Store"]
