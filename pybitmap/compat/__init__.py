# SPDX-License-Identifier: MIT
"""HBitmap behind the interfaces of others, for code that is written against these::

    BitMap, FrozenBitMap, BitMap64, FrozenBitMap64    pyroaring's
    bitarray                                          bitarray's, as far as it is about flags
    pybitmap.compat.bits                              that, and what bitarray.util has for flags

Each is a thin cover of one :class:`pybitmap.HBitmap`, its attribute ``hbitmap``; ``of(hbitmap)``
makes one of a bitmap that is there. So what that has they get: marks of several threads, of which
none is lost, :meth:`~pybitmap.HBitmap.drain`, searches, pins. ``docs/compat.md`` says
what is different, on purpose or not yet. Each is imported when it is first asked for.

>>> from pybitmap.compat import BitMap
>>> pages = BitMap([3, 4, 5])
>>> pages.add(4711)
>>> list(pages.hbitmap.drain().areas()), len(pages)
([(3, 3), (4711, 1)], 0)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bits import bitarray
    from .roaring import BitMap, BitMap64, FrozenBitMap, FrozenBitMap64

__all__ = ["BitMap", "BitMap64", "FrozenBitMap", "FrozenBitMap64", "bitarray"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".bits" if name == "bitarray" else ".roaring", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
