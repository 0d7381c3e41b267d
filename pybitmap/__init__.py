# SPDX-License-Identifier: MIT
"""QEMU-class dirty bitmaps: what was written to, exactly, and fast enough for every write::

    HBitmap                a bitmap of ranges: marks, searches, set operations, one bit for a group
    BlockGraph             nodes (disks) with named bitmaps: node.mark_dirty, node.writing,
                           bitmap.freeze, graph.transaction
    LocalStore             keeps bitmaps in a directory; a killed process loses no mark
    Qcow2Store             keeps them in qcow2 images, as QEMU does
    pybitmap.trackers      writes that reach a bitmap by themselves: memory, KVM, Unicorn
    pybitmap.livecopy      copies what is being written to
    pybitmap.interchange   lists of dirty extents, as other programs have them
    pybitmap.tools.backup  backups of disks by increments; tools.live, tools.monitor: bitmaps of a
                           machine that runs; tools.fleet: those of many disks
    pybitmap.compat        pyroaring's and bitarray's interfaces over HBitmap
    pybitmap.native        the same from C, Cython, Numba
    pybitmap.qmp           the same over QEMU's monitor protocol

All errors are :class:`BitmapError`. The command line is ``pybitmap --help``.

>>> from pybitmap import HBitmap
>>> hb = HBitmap(1 << 30, group_size=4096)    # 1 GiB in bytes, a bit for each page
>>> hb.set(10_000, 512)                       # a write
>>> list(hb.areas())                          # what is to be copied
[(8192, 4096)]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._sources import get_include, get_sources
    from .block.bitmap import DirtyBitmap, Frozen
    from .block.graph import BlockGraph, Transaction
    from .block.node import BlockNode
    from .errors import (
        AbortedError,
        BitmapError,
        BusyError,
        ClosedError,
        CorruptError,
        ExistsError,
        FormatError,
        InconsistentError,
        InvalidError,
        LockedError,
        MismatchError,
        NotFoundError,
        RangeError,
        ReadonlyError,
        StateError,
        StoreError,
        TraceError,
        UnsupportedError,
    )
    from .hbitmap import HBitmap
    from .store import LocalStore, Qcow2Store

#: As pyproject.toml and csrc/pybitmap.pc have it.
__version__ = "0.2.0"

__all__ = [
    "AbortedError",
    "BitmapError",
    "BlockGraph",
    "BlockNode",
    "BusyError",
    "ClosedError",
    "CorruptError",
    "DirtyBitmap",
    "ExistsError",
    "FormatError",
    "Frozen",
    "HBitmap",
    "InconsistentError",
    "InvalidError",
    "LocalStore",
    "LockedError",
    "MismatchError",
    "NotFoundError",
    "Qcow2Store",
    "RangeError",
    "ReadonlyError",
    "StateError",
    "StoreError",
    "TraceError",
    "Transaction",
    "UnsupportedError",
    "get_include",
    "get_sources",
]


#: Where the public names are, but for errors. Modules are imported when a name is asked for: who
#: wants the version, or flags for a compiler, does not wait for the core, nor others for SQLite.
_MODULES = {
    "BlockGraph": "block.graph",
    "BlockNode": "block.node",
    "DirtyBitmap": "block.bitmap",
    "Frozen": "block.bitmap",
    "HBitmap": "hbitmap",
    "LocalStore": "store",
    "Qcow2Store": "store",
    "Transaction": "block.graph",
    "get_include": "_sources",
    "get_sources": "_sources",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        try:
            module = import_module(f".{_MODULES.get(name, 'errors')}", __name__)
        except AttributeError as error:  # as of a name that there is not, Python would say
            raise ImportError(
                f"pybitmap cannot be loaded ({error}): perhaps its compiled module is of another "
                "version of the sources"
            ) from error
        return globals().setdefault(name, getattr(module, name))
    if name in ("block", "errors", "hbitmap"):  # there without an import of their own
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
