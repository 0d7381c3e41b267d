# SPDX-License-Identifier: MIT
"""The bitmaps of many disks, as tables: scanned, merged, and asked what a night has to copy.

The commands ``pybitmap fleet scan``, ``union`` and ``plan`` as a library. It needs the extra
``fleet`` (DuckDB and NumPy)::

    from pybitmap.tools import fleet

    if __name__ == "__main__":                      # processes are started
        fleet.scan(fleet.find(["/srv/images"]), "tonight")
        table = fleet.plan("tonight", "order", window=8 * 3600)

No engine of our own: targets are read by any ``concurrent.futures.Executor``, extents rest as
Parquet, questions are SQL, and :class:`~pybitmap.HBitmap` merges. Nothing is printed.

Examples have a local store ``vm1.bitmaps`` with a node ``vm1`` of 1 GiB, in whose bitmap ``daily``
64 KiB are dirty, and a folder ``tonight``, to which it was scanned as of host ``h1``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError

if TYPE_CHECKING:
    from .finding import find, listed, once
    from .merging import union
    from .planning import Answer, Query, plan, queries
    from .rows import Chain, Disk, Result, State, Target
    from .scanning import Report, scan

__all__ = [
    "Answer",
    "Chain",
    "Disk",
    "Query",
    "Report",
    "Result",
    "State",
    "Target",
    "find",
    "listed",
    "once",
    "plan",
    "queries",
    "scan",
    "union",
]

_PLACES = {
    **dict.fromkeys(["find", "listed", "once"], "finding"),
    **dict.fromkeys(["union"], "merging"),
    **dict.fromkeys(["Answer", "Query", "plan", "queries"], "planning"),
    **dict.fromkeys(["Chain", "Disk", "Result", "State", "Target"], "rows"),
    **dict.fromkeys(["Report", "scan"], "scanning"),
}


def __getattr__(name: str) -> Any:
    # Each when it is asked for: who reads targets on other machines needs no DuckDB there.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in ("duckdb", "numpy"):
            raise
        raise UnsupportedError(
            f"fleets need {error.name}, which is not installed. In a clone of this project: "
            "pip install '.[fleet]'"
        ) from error
