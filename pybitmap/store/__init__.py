# SPDX-License-Identifier: MIT
"""Where persistent bitmaps live: the protocol, and the stores themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import (
    Change,
    Loaded,
    Purpose,
    Record,
    Store,
    StoredBitmap,
    StoredNode,
    Volume,
    Wanted,
)

if TYPE_CHECKING:
    from .local import LocalStore
    from .qcow2 import Qcow2Store

__all__ = [
    "Change",
    "Loaded",
    "LocalStore",
    "Purpose",
    "Qcow2Store",
    "Record",
    "Store",
    "StoredBitmap",
    "StoredNode",
    "Volume",
    "Wanted",
]


def __getattr__(name: str) -> Any:
    # Each store when it is asked for: who uses one does not wait for the others.
    if name == "LocalStore":
        from .local import LocalStore

        return LocalStore
    if name == "Qcow2Store":
        from .qcow2 import Qcow2Store

        return Qcow2Store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
