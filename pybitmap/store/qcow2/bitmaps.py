# SPDX-License-Identifier: MIT
"""The bitmap directory and the bitmap tables ("Bitmaps").

What a directory says of one bitmap may be nonsense without harm for the others: such an entry is
kept byte for byte, and says why its bitmap cannot be used. Where entries cannot even be told apart,
the image is damaged.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...errors import CorruptError, UnsupportedError
from ..base import MAX_NAME
from .image import OFFSET_MASK, Claims, Image

#: QEMU's limits.
MAX_BITMAPS = 65535
MAX_DIRECTORY = MAX_BITMAPS * 1024
MAX_DATA = 512 << 20
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31

#: Of entries.
IN_USE, AUTO, EXTRA_COMPATIBLE = 1 << 0, 1 << 1, 1 << 2
DIRTY_TRACKING = 1

#: In a table: clusters that take no space.
ZEROES, ONES = 0, 1

_ENTRY = struct.Struct(">QIIBBHI")

EXTRA = "it has extra data, and must not be used by programs that do not know what it is"
NOT_CLOSED = "it was in use when the image was last open, so writes may be missing in it"


@dataclass(frozen=True)
class Entry:
    """A bitmap as the directory has it ("Bitmap directory").

    :param name: what is no UTF-8 in it as Python has it in file names ("surrogateescape")
    :param table: offsets, or ZEROES or ONES; None: there is none that could be trusted
    :param reason: why the bitmap cannot be used, a sentence; None if it can
    """

    raw_name: bytes
    table_offset: int
    table_size: int
    flags: int
    granularity_bits: int
    kind: int = DIRTY_TRACKING
    extra: bytes = b""
    table: array[int] | None = None
    reason: str | None = None

    @property
    def name(self) -> str:
        return self.raw_name.decode("utf-8", "surrogateescape")

    @property
    def granularity(self) -> int:
        """In bytes; something that a bitmap can have."""
        bits = self.granularity_bits
        return 1 << min(max(bits, MIN_GRANULARITY_BITS), MAX_GRANULARITY_BITS)

    @property
    def enabled(self) -> bool:
        return bool(self.flags & AUTO)

    @property
    def in_use(self) -> bool:
        return bool(self.flags & IN_USE)

    def pack(self) -> bytes:
        fixed = _ENTRY.pack(
            self.table_offset,
            self.table_size,
            self.flags,
            self.kind,
            self.granularity_bits,
            len(self.raw_name),
            len(self.extra),
        )
        data = fixed + self.extra + self.raw_name
        return data.ljust(_padded(len(data)), b"\0")


def data_clusters(image: Image, table: array[int]) -> list[int]:
    if max(table, default=ZEROES) <= ONES:
        return []
    return [value >> image.cluster_bits for value in table if value > ONES]


def table_clusters(image: Image, entry: Entry) -> range:
    first = entry.table_offset >> image.cluster_bits
    return range(first, first + image.clusters(8 * entry.table_size))


def entry_nbytes(name_nbytes: int, extra_nbytes: int = 0) -> int:
    """Of an entry in the directory."""
    return _padded(_ENTRY.size + extra_nbytes + name_nbytes)


def _padded(nbytes: int) -> int:
    return -(-nbytes // 8) * 8


def raw_name(name: str) -> bytes:
    """As the directory has it.

    :raises UnsupportedError: if it is no name
    """
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise UnsupportedError(f"bitmap name {name!r} is no valid Unicode") from None


def pack_directory(entries: Iterable[Entry]) -> bytes:
    return b"".join(entry.pack() for entry in entries)


def data_nbytes(size: int, granularity_bits: int) -> int:
    """Of the bits of a bitmap, for a disk of ``size`` bytes."""
    nbits = (size + (1 << granularity_bits) - 1) >> granularity_bits
    return (nbits + 7) // 8


def read_directory(image: Image) -> list[Entry]:
    """What the image holds, in its order, without tables.

    :raises CorruptError: if the directory cannot be read
    """
    directory = image.directory
    if directory is None:
        return []
    if not 1 <= directory.nbitmaps <= MAX_BITMAPS:
        raise image.bad_bitmaps(f"there are said to be {directory.nbitmaps} bitmaps")
    if directory.nbytes > MAX_DIRECTORY:
        raise image.bad_bitmaps(f"the bitmap directory has {directory.nbytes} bytes")
    bad = image.bad_area(directory.offset, directory.nbytes)
    if bad:
        raise image.bad_bitmaps(f"the bitmap directory {bad}")
    data = image.file.read_padded(directory.offset, directory.nbytes)
    entries: list[Entry] = []
    offset = 0
    for _ in range(directory.nbitmaps):
        entry = unpack_entry(data, offset)
        if entry is None:
            raise image.bad_bitmaps("the bitmap directory is too short for its entries")
        entries.append(entry)
        offset += entry_nbytes(len(entry.raw_name), len(entry.extra))
    if offset != len(data):
        raise image.bad_bitmaps("the bitmap directory is longer than its entries")
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise image.bad_bitmaps(f"two bitmaps are named '{twice}'")
    return entries


def unpack_entry(data: bytes, offset: int) -> Entry | None:
    """What stands there in a directory; None if it is too short for that."""
    if offset + _ENTRY.size > len(data):
        return None
    table_offset, table_size, flags, kind, bits, name_nbytes, extra_nbytes = _ENTRY.unpack_from(
        data, offset
    )
    start = offset + _ENTRY.size
    middle, end = start + extra_nbytes, start + extra_nbytes + name_nbytes
    if offset + entry_nbytes(name_nbytes, extra_nbytes) > len(data):
        return None
    extra, name = data[start:middle], data[middle:end]
    return Entry(name, table_offset, table_size, flags, bits, kind, extra)


def why_unusable(image: Image, entry: Entry) -> str | None:
    """What forbids to use a bitmap, or even to look at its table; None if nothing does.

    Not that it is in use: its table is in order then.
    """
    reason = why_unknown(image, entry)
    if reason:
        return reason
    nclusters = image.clusters(data_nbytes(image.size, entry.granularity_bits))
    if entry.table_size != nclusters and not entry.in_use:
        return f"its table has {entry.table_size} entries where {nclusters} belong"
    if not 0 < entry.table_size << image.cluster_bits <= MAX_DATA:
        return f"its table has {entry.table_size} entries"
    bad = image.bad_area(entry.table_offset, 8 * entry.table_size)
    return f"its table {bad}" if bad else None


def why_unknown(image: Image, entry: Entry) -> str | None:
    """What keeps us from storing a bitmap as the entry describes it, wherever its table is."""
    if entry.kind != DIRTY_TRACKING:
        return f"it is of type {entry.kind}, which is not known"
    if entry.flags & ~(IN_USE | AUTO | EXTRA_COMPATIBLE):
        return f"it has flags that are not known: {entry.flags:#x}"
    bits = entry.granularity_bits
    if not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
        return f"its granularity of 2**{bits} bytes is not supported"
    if not 1 <= len(entry.raw_name) <= MAX_NAME:
        return f"its name has {len(entry.raw_name)} bytes"
    if b"\0" in entry.raw_name:
        return "its name has a NUL in it"
    nbytes = image.clusters(data_nbytes(image.size, bits)) << image.cluster_bits
    if not 0 < nbytes <= MAX_DATA:
        return f"its granularity of 2**{bits} bytes does not go with a disk of {image.size} bytes"
    return None


def read_table(image: Image, entry: Entry) -> array[int]:
    """The table of a bitmap that :func:`why_unusable` has nothing against.

    :raises CorruptError: if an entry is no cluster of the file
    """
    table = image.read_table(entry.table_offset, entry.table_size)
    if max(table) <= ONES:
        return table
    # Its size now: who reads without a lock may see a table that is younger than the header.
    limit = image.clusters(image.file.size()) << image.cluster_bits
    reserved = ~(OFFSET_MASK & -image.cluster_size)
    for i, value in enumerate(table):
        if value > ONES and (value & reserved or value >= limit):
            raise CorruptError(f"entry {i} of its table is no cluster of the file: {value:#x}")
    return table


def read_entries(image: Image, claims: Claims) -> list[Entry]:
    """What the image holds, in its order, with tables; no data is read.

    :param claims: takes the clusters of the bitmaps
    :raises CorruptError: if the directory cannot be read, or bitmaps share clusters
    """
    entries = read_directory(image)
    directory = image.directory
    if directory is not None:
        clusters = image.check_area("the bitmap directory", directory.offset, directory.nbytes)
        claims.claim("the bitmap directory", clusters)
    return [_with_table(image, entry, claims) for entry in entries]


def _with_table(image: Image, entry: Entry, claims: Claims) -> Entry:
    reason = why_unusable(image, entry)
    if reason:
        return replace(entry, reason=reason)
    what = f"bitmap '{entry.name}'"
    # Before it is read, so that all tables together are not larger than the file.
    claims.claim(what, table_clusters(image, entry), 8 * entry.table_size)
    try:
        table = read_table(image, entry)
    except CorruptError as error:
        return replace(entry, reason=str(error))
    claims.claim(what, data_clusters(image, table))
    if entry.extra and not entry.flags & EXTRA_COMPATIBLE:
        reason = EXTRA
    elif entry.in_use:
        reason = NOT_CLOSED
    return replace(entry, table=table, reason=reason)
