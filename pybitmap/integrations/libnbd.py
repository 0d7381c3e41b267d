# SPDX-License-Identifier: MIT
"""A dirty bitmap that an NBD server exports, read by libnbd's Python into an HBitmap.

QEMU exports bitmaps as metadata contexts ``qemu:dirty-bitmap:NAME`` (``qemu-nbd -B NAME``, or
``bitmaps`` of a ``block-export-add``); NBD's protocol has how they are asked for
(`proto.md, "Block status" <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>`_),
QEMU's ``docs/interop/nbd.txt`` what their flags mean.

libnbd is not imported here: the handle is the caller's, connected as it wants.
"""

from __future__ import annotations

from typing import Any, Callable, Protocol

from ..errors import CorruptError, InvalidError, NotFoundError
from ..hbitmap import HBitmap
from ..sizes import granularity_bits, is_granularity

_DIRTY = 1  # the only flag of this context

#: Asked for at once, in bytes: NBD's lengths have 32 bits, and ranges are in whole blocks.
_PIECE = 1 << 31


class Handle(Protocol):
    """What is used of ``nbd.NBD``."""

    def can_meta_context(self, metacontext: str) -> bool: ...

    def get_size(self) -> int: ...

    def block_status(self, count: int, offset: int, extent: Callable[..., int]) -> Any: ...


def context(name: str) -> str:
    """What ``handle.add_meta_context`` is to be told of, before the handle connects.

    >>> context("daily")
    'qemu:dirty-bitmap:daily'
    """
    return f"qemu:dirty-bitmap:{name}"


def dirty_bitmap(handle: Handle, name: str, granularity: int = 65536) -> HBitmap:
    """What a server's dirty bitmap has, in a new bitmap whose items are bytes.

    Writer: the server answers piece by piece, so the bitmap has to be at rest meanwhile: disabled,
    or of an export that nobody writes to. Kill, drop: nothing is taken away from the server. Twin:
    a handle is one thread's; several handles may ask at the same time.

    :param handle: an ``nbd.NBD`` that is connected, and before that was told
        ``add_meta_context(context(name))``
    :param granularity: bytes that a bit of the new bitmap stands for, a power of 2. That of the
        server is not told over NBD; with a coarser one here more is dirty, never less
    :raises NotFoundError: if the server does not offer it, or was not asked
    :raises CorruptError: if it does not answer as the protocol has it
    :raises InvalidError: for a granularity that is none
    :raises nbd.Error: libnbd's own, as when the connection ends

    >>> class Server:                           # in place of a connected nbd.NBD
    ...     def can_meta_context(self, name):
    ...         return name == "qemu:dirty-bitmap:daily"
    ...     def get_size(self):
    ...         return 1 << 20
    ...     def block_status(self, count, offset, extent):
    ...         extent("qemu:dirty-bitmap:daily", offset, [65536, 1, count - 65536, 0], 0)
    >>> list(dirty_bitmap(Server(), "daily").areas())
    [(0, 65536)]
    """
    if not is_granularity(granularity):
        raise InvalidError(f"granularity {granularity} is not a power of 2")
    wanted = context(name)
    if not handle.can_meta_context(wanted):
        raise NotFoundError(
            f"the export has no bitmap '{name}': serve it (qemu-nbd -B '{name}'), and before the "
            f"handle connects, handle.add_meta_context('{wanted}')"
        )
    size = handle.get_size()
    bitmap = HBitmap(size, granularity_bits(granularity))
    at = 0
    while at < size:
        extents = _status(handle, wanted, at, min(size - at, _PIECE))
        before = at
        for length, flags in zip(extents[::2], extents[1::2]):
            length = min(length, size - at)  # the last may be longer than what was asked for
            if flags & _DIRTY:
                bitmap.set(at, length)
            at += length
        if at == before:
            raise CorruptError(f"the server does not say what of bitmap '{name}' is at {at}")
    return bitmap


def _status(handle: Handle, wanted: str, offset: int, nbytes: int) -> list[int]:
    """Lengths and flags in turn, from an offset on; as far as the server says at once."""
    extents: list[int] = []

    def answer(metacontext: str, offset: int, entries: list[int], error: object) -> int:
        if metacontext == wanted:
            extents.extend(entries)
        return 0

    handle.block_status(nbytes, offset, answer)
    return extents
