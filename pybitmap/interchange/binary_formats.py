# SPDX-License-Identifier: MIT
"""A bit, or a number, for each block: raw bitmaps, and Roaring's portable format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .._core import MAX_GROUPS
from ..compat.roaring_format import dump32, dump64, load32, load64
from ..errors import FormatError, InvalidError, RangeError
from ..extent import Extent
from ..hbitmap import HBitmap
from ..sizes import MAX_SIZE
from .base import MSB, Format, Malformed, Options, Order, Output, Source

_PIECE = 1 << 20  # bytes of a raw bitmap that are looked at together
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

_BIT = "bits: a bit stands for a block"
_NUMBER = "roaring: a number stands for a block"


def _bit_order(options: Options) -> str:
    if options.bit_order is None:
        raise FormatError(
            "bits: say which bit of a byte is the first, by bit_order (--bit-order): lsb, the"
            " lowest, as KVM, vhost and DRBD have it, or msb, the highest, as XenServer has"
        )
    return options.bit_order


def read_bits(source: Source, options: Options) -> Iterator[Extent]:
    """A flat bitmap: bit n is bit n % 8 of byte n // 8, from the lowest or from the highest.

    As the logs of KVM (https://docs.kernel.org/virt/kvm/api.html, KVM_GET_DIRTY_LOG) and of
    XenServer (https://docs.xenserver.com/en-us/xenserver/8/developer/changed-block-tracking). Bits
    that begin beyond the size of the disk are to be 0; if it is known, no block may lack its bit.
    """
    block_size = options.blocks(_BIT)
    msb_first = _bit_order(options) == MSB
    order, nread = Order(options), 0
    while True:
        data = b""
        while len(data) < _PIECE and (more := source.read(_PIECE - len(data))):
            data += more
        bits = HBitmap(8 * len(data))
        bits.merge_bits(data, msb_first=msb_first)
        for first, count in bits.areas():
            try:
                yield order.blocks(8 * nread + first, count)
            except Malformed as error:
                source.refuse(str(error), byte=nread + first // 8)
        nread += len(data)
        if not data:
            break
    if options.size is not None:
        if 8 * nread * block_size < options.size:
            source.refuse(
                f"it ends after {8 * nread} bits, of {block_size} bytes each, and the disk has"
                f" {options.size} bytes: is it cut short?"
            )
    else:
        try:
            yield order.blocks(8 * nread, 0)
        except Malformed as error:
            source.refuse(str(error), byte=nread)


def _blocks(extents: Iterable[Extent], options: Options, what: str) -> HBitmap:
    """A bit for each block.

    :raises FormatError: if there are too many, or those that are dirty take more than the memory
        limit: blocks may be much smaller than the groups that the extents come from
    """
    block_size, limit, ndirty = options.blocks(what), options.memory_limit, 0
    nblocks = -(-(options.size or 0) // block_size)
    if nblocks > MAX_GROUPS:
        raise FormatError(
            f"{what}, of which the disk has {nblocks}, and {MAX_GROUPS} is the most: take larger"
            " ones (--block-size)"
        )
    blocks = HBitmap(nblocks)
    for start, length, _ in extents:
        first = start // block_size
        count = -(-(start + length) // block_size) - first
        ndirty += count
        if ndirty > 8 * limit:
            raise FormatError(
                f"{what}, and those that are dirty take more than {limit} bytes of memory: take"
                " larger ones (--block-size), or allow more, by memory_limit (--memory-limit)"
            )
        blocks.set(first, count)
    return blocks


def write_bits(extents: Iterable[Extent], out: Output, options: Options) -> None:
    """Of as many whole bytes as it takes."""
    msb_first = _bit_order(options) == MSB
    bits = _blocks(extents, options, _BIT)
    left = -(-bits.size // 8)
    for first in range(0, bits.size, 8 * _PIECE):
        data = bits.serialize(first, min(8 * _PIECE, bits.size - first))[:left]
        out.write(data.translate(_REVERSED) if msb_first else data)
        left -= len(data)


def _read_roaring(source: Source, options: Options, bits: int) -> Iterator[Extent]:
    block_size = options.blocks(_NUMBER)
    allowed = 8 * options.memory_limit  # of a few bytes, all below the largest number may be in it
    most = min(1 << bits, -(-MAX_SIZE // block_size), allowed, MAX_GROUPS)
    parts, length = [], 0
    while part := source.read():
        parts.append(part)
        length += len(part)
        if length > options.memory_limit:
            source.refuse(
                f"it has more than {options.memory_limit} bytes: allow more, by memory_limit"
                " (--memory-limit)"
            )
    numbers = HBitmap(most)
    try:
        (load32 if bits == 32 else load64)(memoryview(b"".join(parts)), numbers)
    except InvalidError as error:
        more = isinstance(error, RangeError) and most == allowed
        instead = ": allow more, by memory_limit (--memory-limit)" if more else ""
        source.refuse(f"{error}{instead}")
    order = Order(options)
    for first, count in numbers.areas():
        try:
            yield order.blocks(first, count)
        except Malformed as error:
            source.refuse(str(error))


def read_roaring(source: Source, options: Options) -> Iterator[Extent]:
    """The portable format of Roaring bitmaps, of 32 bits; a number stands for a block.

    Source: https://github.com/RoaringBitmap/RoaringFormatSpec. It is read as a whole.
    """
    return _read_roaring(source, options, 32)


def read_roaring64(source: Source, options: Options) -> Iterator[Extent]:
    """The same of 64 bits."""
    return _read_roaring(source, options, 64)


def write_roaring(extents: Iterable[Extent], out: Output, options: Options) -> None:
    blocks = _blocks(extents, options, _NUMBER)
    if blocks.size > 1 << 32:
        raise FormatError(
            f"roaring: {blocks.size} blocks are more than 2^32: take larger ones, or roaring64"
        )
    out.write(dump32(blocks))


def write_roaring64(extents: Iterable[Extent], out: Output, options: Options) -> None:
    out.write(dump64(_blocks(extents, options, _NUMBER)))


FORMATS = (
    Format(
        "bits", "a bit for each block", ".bits", read_bits, write_bits, blocks=True, binary=True
    ),
    Format(
        "roaring",
        "Roaring's portable format",
        ".roaring",
        read_roaring,
        write_roaring,
        blocks=True,
        binary=True,
    ),
    Format(
        "roaring64",
        "the same, of 64 bits",
        "",
        read_roaring64,
        write_roaring64,
        blocks=True,
        binary=True,
    ),
)
