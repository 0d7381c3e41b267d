# SPDX-License-Identifier: MIT
"""Extents as other programs have them, read into bitmaps and written from them::

    read_bitmap(path)       an HBitmap of what a file has, in whatever format
    write_bitmap(hb, path)  such a file of a bitmap's dirty extents
    read_extents(stream)    the extents one by one
    FORMATS                 by name: JSON and CSV, of qemu-img, nbdinfo, rbd, oVirt
                            imageio, CSI, VMware, thin_delta, dm-era, raw bitmaps,
                            Roaring, Arrow, Parquet

Offsets and lengths are in bytes. On the command line: ``pybitmap convert``; docs/howto/convert.md.

>>> from pybitmap import HBitmap
>>> from pybitmap.interchange import FORMATS, LSB, MSB, read_bitmap, write_bitmap
>>> hb = HBitmap.from_extents([(4096, 512)], 1 << 20, group_size=512)
>>> write_bitmap(hb, "day.csv")
>>> read_bitmap("day.csv", size=1 << 20) == hb
True
>>> FORMATS["csi"].title, LSB, MSB          # orders of bits in a byte
("CSI's SnapshotMetadata, as JSON", 'lsb', 'msb')
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from ..errors import FormatError
from ..extent import Extent
from ..hbitmap import HBitmap
from .base import LSB, MSB, Format, Options, Source
from .conversion import gather, replacing, write_as
from .formats import FORMATS, detect, find_format, format_of_name

__all__ = [
    "FORMATS",
    "LSB",
    "MSB",
    "Extent",
    "Format",
    "FormatError",
    "Options",
    "Source",
    "detect",
    "find_format",
    "format_of_name",
    "read_bitmap",
    "read_extents",
    "write_bitmap",
]


def read_extents(
    stream: BinaryIO, fmt: str | None = None, *, name: str = "<stream>", **options: Any
) -> Iterator[Extent]:
    """The extents of a stream, in bytes, one by one, clean ones too if the format has them.

    :param stream: of bytes; it is read piece by piece, and not closed
    :param fmt: the name of one of FORMATS; None: the one that it is recognised as
    :param name: what errors call it
    :param options: see :class:`Options`: size, block_size, bit_order, since, any_order,
        memory_limit
    :raises FormatError: for whatever is not in the format; line or byte is named
    :raises InvalidError: for an option that cannot be

    Left early, or by an error: what was given was right so far. Writer: who writes to the file
    meanwhile may make an error of it, or a mixture. Kill, fork, twin: nothing is changed, but a
    stream has one place, for whoever reads it.

    >>> import io
    >>> list(read_extents(io.BytesIO(b"offset,length\\n4096,512\\n")))
    [Extent(start=4096, length=512, dirty=True)]
    """
    source = Source(stream, name)
    found = detect(source) if fmt is None else find_format(fmt)
    return found.read(source, Options(guessed=fmt is None, **options))


def read_bitmap(
    path: str | os.PathLike[str],
    fmt: str | None = None,
    *,
    granularity: int | None = None,
    **options: Any,
) -> HBitmap:
    """A bitmap of bytes of the disk, in which is dirty what the file has.

    :param fmt: see :func:`read_extents`, as for the options
    :param granularity: in bytes, a power of 2, to which extents are rounded outwards; None: 512, or
        the finest with which the bitmap takes no more than ``memory_limit``
    :raises FormatError: for whatever is not in the format
    :raises OSError: if it cannot be read

    An error leaves nothing. Visitors: see :func:`read_extents`; the bitmap is the caller's alone.

    >>> with open("day.csv", "w") as file:
    ...     print("offset,length", "4096,512", sep="\\n", file=file)
    >>> list(read_bitmap("day.csv", size=1 << 20, granularity=4096).areas())
    [(4096, 4096)]
    """
    with open(path, "rb") as stream:
        extents = read_extents(stream, fmt, name=os.fspath(path), **options)
        limits = {key: options[key] for key in ("size", "memory_limit") if key in options}
        return gather(extents, granularity=granularity, **limits).bitmap


def write_bitmap(
    bitmap: HBitmap,
    path: str | os.PathLike[str],
    fmt: str | None = None,
    *,
    start: int = 0,
    **options: Any,
) -> None:
    """A file of what is dirty in a bitmap of bytes, in the place of what is at the path.

    :param fmt: the name of one of FORMATS; None: by the extension
    :param start: where to go on; see :meth:`HBitmap.to_extents`
    :param options: see :class:`Options`: block_size, bit_order
    :raises FormatError: if the format cannot have it, or it is not told which
    :raises InvalidError: for an option that cannot be
    :raises OSError: if it cannot be written

    Writer: what is marked meanwhile is in it or not. Kill: what was there is there, or the new
    file, whole; perhaps ``.NAME.*.part`` beside it. Drop: after an error, or Ctrl-C, what was there
    is there. Fork: the child has nothing to do with it. Twin: the last one has the path.

    >>> write_bitmap(HBitmap.from_extents([(4096, 512)], 1 << 20), "day.json")
    >>> with open("day.json") as file:
    ...     print(file.read(), end="")
    [
    {"offset": 4096, "length": 512}
    ]
    """
    name = os.fspath(path)
    found = format_of_name(name) if fmt is None else find_format(fmt)
    if found is None:
        raise FormatError(
            f"{name}: its name does not tell the format: say fmt=..., one of {', '.join(FORMATS)}"
        )
    told = Options(**options)
    with replacing(name) as file:
        write_as(found, bitmap, file, told, start=start)
