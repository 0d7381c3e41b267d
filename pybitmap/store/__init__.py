# SPDX-License-Identifier: MIT
"""Where persistent bitmaps live: the protocol, and the stores themselves."""

from .base import Change, Loaded, Purpose, Record, Store, Volume, Wanted
from .local import LocalStore

__all__ = ["Change", "Loaded", "LocalStore", "Purpose", "Record", "Store", "Volume", "Wanted"]
