# SPDX-License-Identifier: MIT
"""Sizes in bytes as people write and read them (4096, 64K, 1.3 MiB), and granularities."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_SIZE = (1 << 63) - 1

SIZE = re.compile(r"([0-9]{1,19})(?:([KMGTPE])(?:iB)?)?", re.ASCII | re.IGNORECASE)
_SUFFIXES = "KMGTPE"


def parse_size(text: str) -> int:
    """Bytes: decimal, with one of K, M, G, T, P, E for powers of 1024.  ValueError."""
    match = SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size in bytes, such as 4096, 64K or 1G")
    digits, suffix = match.groups()
    size = int(digits) << (10 * (1 + _SUFFIXES.index(suffix.upper())) if suffix else 0)
    if size > MAX_SIZE:
        raise ValueError(f"{text!r} is beyond 2^63 - 1 bytes")
    return size


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
    """For people, from 1 KiB up: 1313280 -> 1.3 MiB."""
    unit = (nbytes.bit_length() - 1) // 10
    number = f"{nbytes / (1 << 10 * unit):.1f}"
    return f"{number[:-2] if number.endswith('.0') else number} {_SUFFIXES[unit - 1]}iB"


def is_granularity(nbytes: int) -> bool:
    """Is it a power of 2?"""
    return nbytes > 0 and nbytes & (nbytes - 1) == 0


def granularity_bits(granularity: int) -> int:
    """log2 of a granularity in bytes, as :class:`~pybitmap.HBitmap` takes it: 4096 -> 12."""
    return granularity.bit_length() - 1
