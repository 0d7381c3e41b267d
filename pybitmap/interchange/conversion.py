# SPDX-License-Identifier: MIT
"""Extents of one format, through a bitmap, to another: what `pybitmap convert` does.

A :class:`Gathered` is what was read: a bitmap, and what rounding outwards to its groups has added.
Files are written beside their place and moved there when they are whole and on the disk.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

from .._core import MAX_GROUPS, granularity_of
from .._fork import Process
from ..errors import FormatError
from ..extent import Extent, batches, rounded, with_gaps
from ..hbitmap import HBitmap
from ..replay import DEFAULT_MEMORY_LIMIT, bitmaps_nbytes, largest_size
from ..sizes import exact_size
from ..store.files import sync_directory, sync_file
from .base import Format, Options, Output

#: The granularity that is tried first, in bytes.
FINEST = 512
_FIRST_SIZE = 1 << 30


@dataclass
class Gathered:
    """What was read.

    :ivar bitmap: of bytes of the disk
    :ivar extents: dirty ones
    :ivar rounded: of these, how many do not begin and end with a group
    :ivar given: bytes that they have, each extent for itself
    :ivar overlapping: some may share bytes, so that `given` counts these more than once
    """

    bitmap: HBitmap
    extents: int = 0
    rounded: int = 0
    given: int = 0
    overlapping: bool = False

    @property
    def dirty(self) -> int:
        """Bytes of the disk that are dirty."""
        return self.bitmap.count(0, self.bitmap.size)

    @property
    def added(self) -> int | None:
        """Bytes that are dirty by rounding alone; None if it is not known, as extents overlap."""
        return None if self.overlapping else self.dirty - self.given


def gather(
    extents: Iterable[Extent],
    *,
    size: int | None = None,
    granularity: int | None = None,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> Gathered:
    """A bitmap with what is dirty.

    :param size: of the disk, in bytes; None: the end of the furthest extent
    :param granularity: in bytes, a power of 2; None: the finest, from 512 on, with which the bitmap
        keeps to the limit
    :param memory_limit: bytes that the bitmap may take, if all of the disk is dirty; half of that
        where the size is not known, since bitmaps that grow keep what they were
    :raises RangeError: if an extent is beyond the size
    :raises FormatError: if the bitmap would take more
    :raises InvalidError: for a granularity that is no power of 2

    Memory does not grow with the number of extents. Writer, twin, fork, kill, drop: nothing of it
    is anybody else's.
    """
    memory_limit = memory_limit if size is not None else memory_limit // 2
    group = FINEST if granularity is None else 1 << granularity_of(None, granularity)
    room = _FIRST_SIZE if size is None else size
    group = _fitting(room, group, granularity is not None, memory_limit)
    found = Gathered(HBitmap(room, group_size=group))
    furthest = last = 0
    for starts, lengths, end in batches(extents, size):
        furthest = max(furthest, end)
        if end > found.bitmap.size:
            group = _fitting(end, group, granularity is not None, memory_limit)
            largest = min(largest_size([group], memory_limit), MAX_GROUPS * group)
            # Rarely, since what a bitmap was is kept beside it.
            _grow(found, max(end, min(2 * end, largest)), group)
        found.bitmap.set_many(starts, lengths)
        found.extents += len(starts)
        found.given += sum(lengths)
        for start, length in zip(starts, lengths):
            found.overlapping |= start < last and length > 0
            last = max(last, start + length)
        found.rounded += _unaligned(starts, lengths, group, size)
    if size is None:
        found.bitmap.truncate(furthest)
    return found


def _unaligned(starts: Iterable[int], lengths: Iterable[int], group: int, size: int | None) -> int:
    """How many do not begin and end with a group, or with the disk."""
    return sum(
        (start % group or ((start + length) % group and start + length != size)) and length > 0
        for start, length in zip(starts, lengths)
    )


def _grow(found: Gathered, size: int, group: int) -> None:
    if group == found.bitmap.group_size:
        found.bitmap.truncate(size)
    else:
        coarser = HBitmap(found.bitmap.size, group_size=group)
        coarser.merge(found.bitmap)
        coarser.truncate(size)
        found.bitmap = coarser


def _fitting(size: int, group: int, exactly: bool, memory_limit: int) -> int:
    """The granularity with which a bitmap of that size keeps to the limit.

    :raises FormatError: if it has to be `group`, and does not
    """
    while (nbytes := bitmaps_nbytes(size, [group])) > memory_limit or size > MAX_GROUPS * group:
        if exactly or group > size:
            raise FormatError(
                f"a bitmap of {size} bytes with a granularity of {exact_size(group)} may take"
                f" {nbytes} bytes of memory, more than {memory_limit}: take a coarser granularity"
                " (-g), or allow more, by memory_limit (--memory-limit)"
            )
        group *= 2
    return group


def write_as(fmt: Format, bitmap: HBitmap, out: Output, options: Options, *, start: int = 0) -> int:
    """What is dirty in a bitmap of bytes, in a format; how many bytes that is there.

    :param start: where to go on; formats of blocks begin with the one that it is in
    :raises FormatError: if the format is only read, or cannot have it
    """
    if fmt.write is None:
        raise FormatError(f"{fmt.name} is only read; choose another format, by --to")
    size, block_size = bitmap.size, options.block_size
    extents: Iterator[Extent]
    if fmt.blocks and block_size is not None:
        areas = rounded(bitmap.areas(start), block_size, size)
        extents = (Extent(*area) for area in areas)
        if fmt.whole:
            extents = with_gaps(extents, start // block_size * block_size, size)
    else:
        fixed = block_size if fmt.fixed else None
        extents = bitmap.to_extents(start, block_size=fixed, clean=fmt.whole)
    written = 0

    def counted() -> Iterator[Extent]:
        nonlocal written
        for extent in extents:
            written += extent.length if extent.dirty else 0
            yield extent

    fmt.write(counted(), out, replace(options, size=size))
    return written


@contextmanager
def replacing(path: str) -> Iterator[Output]:
    """A file that takes the place of what is at a path when the block ends without an error.

    Kill: what was there is there, or the new file, whole and on the disk; at most a file beside it,
    ``.NAME.*.part``, is left. Drop: left by an exception, Ctrl-C, or for lack of space, what was
    there stays, and that file goes. Twin: whoever ends last has the place. Fork: the child of a
    fork within the block may leave it in any way, which does nothing; it is not to write.

    Links are followed; of a file that was there, the mode stays, and the owner as far as we may
    give files away. A pipe, or a terminal, is written to as it is.

    :raises FormatError: for a block device, whose data would be gone
    :raises OSError: if it cannot be written; its filename is the path
    """
    try:
        real = os.path.realpath(path)
        before = _there(path)
        if before is not None and not stat.S_ISREG(before.st_mode):
            with open(path, "wb", buffering=0) as file:
                yield _Whole(file)
            return
        process = Process()
        folder, name = os.path.split(real)
        # A name of 255 bytes, the most that there is, has room for no more.
        begin = os.fsdecode(os.fsencode(name)[:200])
        part = os.path.join(folder, f".{begin}.{secrets.token_hex(8)}.part")
        try:
            with open(part, "xb", buffering=0) as file:
                if before is not None:
                    with suppress(PermissionError):
                        os.fchown(file.fileno(), before.st_uid, before.st_gid)
                    os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
                yield _Whole(file)
                if not process.is_this():
                    return
                sync_file(file.fileno())
            os.replace(part, real)
        except BaseException:
            if process.is_this():
                with suppress(OSError):
                    os.unlink(part)
            raise
        sync_directory(Path(folder))
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(".part"):
            error.filename, error.filename2 = path, None
        raise


def _there(path: str) -> os.stat_result | None:
    """
    :raises FormatError: for a block device
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISBLK(found.st_mode):
        raise FormatError(f"{path} is a block device; extents go to a file")
    return found


class _Whole:
    """A file without a buffer of its own, which both sides of a fork would write; all of what it is
    given is written."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) or 0 :]
        return len(data)
