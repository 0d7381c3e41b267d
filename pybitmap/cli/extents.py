# SPDX-License-Identifier: MIT
"""How commands print extents: the formats of `pybitmap dump` and `pybitmap replay --format`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from .common import write

#: The values of an option `--format`.
FORMATS = ("json", "csv")

_BATCH = 4096  # extents printed at once


def write_extents(extents: Iterator[tuple[int, int]], form: str) -> None:
    """(offset, length) each, in bytes, as they come; form: one of FORMATS.

    Left by an exception, what was printed so far stays: a list without its end, or fewer lines.
    """
    (_write_json if form == "json" else _write_csv)(extents)


def _write_json(extents: Iterator[tuple[int, int]]) -> None:
    """One extent a line."""
    before = "[\n"
    while batch := list(islice(extents, _BATCH)):
        lines = (f'{{"offset": {offset}, "length": {length}}}' for offset, length in batch)
        write(before + ",\n".join(lines))
        before = ",\n"
    write("[]\n" if before == "[\n" else "\n]\n")


def _write_csv(extents: Iterator[tuple[int, int]]) -> None:
    write("offset,length\n")
    while batch := list(islice(extents, _BATCH)):
        write("".join(f"{offset},{length}\n" for offset, length in batch))
