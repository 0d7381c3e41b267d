# SPDX-License-Identifier: MIT
"""Where persistent bitmaps live: the protocol, the stores, and which of them is at a path."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import (
    Change,
    Piece,
    Purpose,
    Reading,
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
    "LocalStore",
    "Piece",
    "Purpose",
    "Qcow2Store",
    "Reading",
    "Record",
    "Store",
    "StoredBitmap",
    "StoredNode",
    "Volume",
    "Wanted",
    "probe",
]

#: By name, in the order in which :func:`probe` asks: that of images is imported sooner.
_STORES = {"Qcow2Store": ".qcow2", "LocalStore": ".local"}


def __getattr__(name: str) -> Any:
    # Each store when it is asked for: who uses one does not wait for the others.
    if name in _STORES:
        return getattr(import_module(_STORES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def probe(path: str | os.PathLike[str]) -> type[Store] | None:
    """Which store there is at a path, see :meth:`Store.probe`; None: none of these.

    :raises UnsupportedError: if it can have no bitmaps, as a qcow2 image of version 2
    :raises OSError: if it cannot be looked at, for example because nothing is there

    >>> from pybitmap import BlockGraph, LocalStore
    >>> with BlockGraph() as graph:
    ...     disk = graph.add_node("disk", 1 << 20, LocalStore("disks.bitmaps"))
    >>> probe("disks.bitmaps").__name__, probe(".")
    ('LocalStore', None)
    """
    for name in _STORES:
        store: type[Store] = __getattr__(name)
        if store.probe(path):
            return store
    return None
