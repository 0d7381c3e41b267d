# SPDX-License-Identifier: MIT
"""Named bitmaps of nodes: states, the one commit, and what users have of them.

From below: :mod:`.state` (what a bitmap is), :mod:`.device` (what a node is made of), :mod:`.draft`
(what is to be different), :mod:`.commit` (how it comes to be so), :mod:`.coordinator` (who may, and
when); and what users call: :mod:`.bitmap`, :mod:`.writing`, :mod:`.node`, :mod:`.graph`.
"""
