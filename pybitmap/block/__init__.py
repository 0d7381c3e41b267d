# SPDX-License-Identifier: MIT
"""Named bitmaps of nodes: states, the one commit, and what users have of them.

From below: :mod:`.state` (what a bitmap is), :mod:`.device` (what a node is made of),
:mod:`.commit` (how it changes), :mod:`.bitmap`, :mod:`.node`, :mod:`.graph` (what users call).
"""
