# SPDX-License-Identifier: MIT
"""Plugins of other programs, each a module of its own that needs its program only."""
