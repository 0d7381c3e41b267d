# SPDX-License-Identifier: MIT
"""Persistent bitmaps in qcow2 images."""
