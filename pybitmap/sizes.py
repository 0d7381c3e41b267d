# SPDX-License-Identifier: MIT
"""Sizes in bytes as people write and read them (4096, 64K, 1.3 MiB), and granularities."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_SIZE = (1 << 63) - 1

_SUFFIXES = "KMGTPE"
_DIGITS = "[0-9]+(?:_[0-9]+)*"  # 1_000, as in Python
_SIZE = re.compile(
    rf"(?P<hex>0x[0-9a-f]+(?:_[0-9a-f]+)*)"
    rf"|(?P<number>{_DIGITS}(?:\.{_DIGITS})?)(?P<unit>[{_SUFFIXES}]?)(?P<bytes>(?:(?<=[a-z])i)?b)?",
    re.ASCII | re.IGNORECASE,
)
_LONGEST = 64  # characters of a size

#: What a SIZE is, for help texts.
SYNTAX = (
    "Sizes are in bytes, or have a unit: K, M, G, T, P, E (and KiB, MiB, ...) are powers of 1024,"
    " kB, MB, ... powers of 1000. 1.5G, 1_000 and 0x1000 will do."
)


def is_size(text: str) -> bool:
    """Is it written as a size? It may be too large all the same, or end within a byte."""
    return len(text) <= _LONGEST and _SIZE.fullmatch(text) is not None


def parse_size(text: str) -> int:
    """Bytes: a number, and after a decimal one a unit, in capitals or not.

    ``K M G T P E`` and ``KiB`` ... are powers of 1024, as in QEMU's tools; ``kB MB`` ... powers of
    1000, as in dd and truncate; ``B`` is a byte. A fraction has to come out as whole bytes: what
    was rounded would be another disk.

    :raises ValueError: if it is none, with what to write instead where that is known
    """
    match = _SIZE.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise ValueError(f"{text[:_LONGEST]!r} is not a size in bytes, such as 4096, 64K or 1.5G")
    rest = 0
    if match["hex"]:
        size = int(match["hex"], 16)
    else:
        power = 1 + _SUFFIXES.index(match["unit"].upper()) if match["unit"] else 0
        base = 1000 if len(match["bytes"] or "") == 1 else 1024
        whole, _, places = match["number"].replace("_", "").partition(".")
        size, rest = divmod(int(whole + places) * base**power, 10 ** len(places))
    if size + (rest > 0) > MAX_SIZE:
        raise ValueError(f"{text!r} is beyond 2^63 - 1 bytes")
    if rest:
        raise ValueError(f"{text!r} is no whole number of bytes; {size} and {size + 1} are near")
    return size


def granularity_hint(text: str) -> str:
    """What to write for a granularity that is no power of 2 because of its unit; else nothing.

    64KB -> 64K
    """
    match = _SIZE.fullmatch(text)
    if match is None or not match["unit"] or len(match["bytes"] or "") != 1:
        return ""
    binary = f"{match['number']}{match['unit'].upper()}"
    return f" ({text} is in powers of 1000: write {binary})"


def exact_size(nbytes: int) -> str:
    """The shortest text from which parse_size makes `nbytes` again: 65536 -> 64K."""
    unit = 0
    while nbytes and nbytes % 1024 == 0 and unit < len(_SUFFIXES):
        nbytes //= 1024
        unit += 1
    return f"{nbytes}{_SUFFIXES[unit - 1] if unit else ''}"


def exact_sizes(sizes: Iterable[int]) -> str:
    """Several of them, for people: 512, 64K."""
    return ", ".join(map(exact_size, sizes))


def rough_size(nbytes: int) -> str:
    """For people, from 1 KiB up: 1313280 -> 1.3 MiB. Sums of sizes may be beyond EiB."""
    unit = min((nbytes.bit_length() - 1) // 10, len(_SUFFIXES))
    number = f"{nbytes / (1 << 10 * unit):.1f}"
    return f"{number[:-2] if number.endswith('.0') else number} {_SUFFIXES[unit - 1]}iB"


def is_granularity(nbytes: int) -> bool:
    """Is it a power of 2?"""
    return nbytes > 0 and nbytes & (nbytes - 1) == 0


def granularity_bits(granularity: int) -> int:
    """log2 of a granularity in bytes, as :class:`~pybitmap.HBitmap` takes it: 4096 -> 12."""
    return granularity.bit_length() - 1
