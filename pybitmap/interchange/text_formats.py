# SPDX-License-Identifier: MIT
"""Extents in lines of text: CSV, and the tables of nbdinfo and rbd."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Callable

from ..extent import Extent
from .base import SECTOR, Format, Malformed, Options, Order, Output, Source, batched, number, shown
from .json_formats import nbd_dirty

CSV_HEADINGS = ("offset,length", "offset,length,dirty")
RBD_HEADING = ("Offset", "Length", "Type")
NBDINFO_LINE = re.compile(r" *([0-9]+) +([0-9]+) +([0-9]+)(?:  (.*))?")


def _lines(
    source: Source,
    options: Options,
    make: Callable[[str, Order], Extent],
    *,
    skip: int = 0,
    unit: int = 1,
) -> Iterator[Extent]:
    """
    :param skip: lines of a heading
    :param unit: see :class:`Order`
    """
    order = Order(options, unit)
    for line, text in source.lines():
        if line <= skip or not text.strip():
            continue
        try:
            extent = make(text, order)
        except Malformed as error:
            source.refuse(str(error), line=line)
        yield extent


# ---- CSV ------------------------------------------------------------------------------------


def read_csv(source: Source, options: Options) -> Iterator[Extent]:
    """As `pybitmap dump` has it: the heading ``offset,length``, and bytes in decimal; a third
    column, ``dirty``, has true or false. Source: RFC 4180 (https://www.rfc-editor.org/rfc/rfc4180).
    """
    source.as_text()
    head = source.head().partition(b"\n")[0].strip().decode("ascii", "replace").replace(" ", "")
    if head.lower() not in CSV_HEADINGS:
        source.refuse(f"expected the heading {CSV_HEADINGS[0]}, found {shown(head)}", line=1)
    columns = head.count(",") + 1

    def make(text: str, order: Order) -> Extent:
        fields = [each.strip() for each in text.split(",")]
        if len(fields) != columns:
            raise Malformed(f"expected {columns} columns, found {len(fields)}")
        start, length, *more = fields
        dirty = True
        if more:
            word = more[0].lower()
            if word not in ("true", "false", "1", "0"):
                raise Malformed(f"dirty is {shown(more[0])}, and should be true or false")
            dirty = word in ("true", "1")
        return order.extent(number(start), number(length), dirty)

    return _lines(source, options, make, skip=1)


def write_csv(extents: Iterable[Extent], out: Output, options: Options) -> None:
    out.write(b"offset,length\n")
    batched((f"{each.start},{each.length}\n" for each in extents), out)


# ---- nbdinfo --map --------------------------------------------------------------------------


def read_nbdinfo(source: Source, options: Options) -> Iterator[Extent]:
    """``nbdinfo --map``: offset, length, type and what that means; see the same in JSON.

    Source: https://libguestfs.org/nbdinfo.1.html (MAP OPTION). It has all of the disk, so that it
    ends before is an error where the size of the disk is known.
    """

    def make(text: str, order: Order) -> Extent:
        match = NBDINFO_LINE.fullmatch(text.rstrip())
        if match is None or match[4] is None:
            raise Malformed(f"expected OFFSET LENGTH TYPE DESCRIPTION, found {shown(text)}")
        return order.extent(number(match[1]), number(match[2]), nbd_dirty(match[4].strip()))

    end = 0
    for extent in _lines(source, options, make, unit=SECTOR):
        end = max(end, extent.end)
        yield extent
    if options.size is not None and end < options.size:
        source.refuse(
            f"extents up to {end}, where nbdinfo prints those of all the disk, of {options.size}"
            " bytes: did it fail?"
        )


def write_nbdinfo(extents: Iterable[Extent], out: Output, options: Options) -> None:
    batched(
        (
            f"{start:>10}  {length:>10}  {int(dirty):>3}  {'dirty' if dirty else 'clean'}\n"
            for start, length, dirty in extents
        ),
        out,
    )


# ---- rbd diff -------------------------------------------------------------------------------


def read_rbd(source: Source, options: Options) -> Iterator[Extent]:
    """``rbd diff``: a table of offset, length, and data or zero; all is dirty.

    Source: https://docs.ceph.com/en/latest/man/8/rbd/ (diff).
    """
    source.as_text()
    head = source.head().partition(b"\n")[0].decode("ascii", "replace")
    if head and tuple(head.split()) != RBD_HEADING:
        source.refuse(f"expected the heading {' '.join(RBD_HEADING)}, found {shown(head)}", line=1)

    def make(text: str, order: Order) -> Extent:
        fields = text.split()
        if len(fields) != 3 or fields[2] not in ("data", "zero"):
            raise Malformed(f"expected OFFSET LENGTH data|zero, found {shown(text)}")
        return order.extent(number(fields[0]), number(fields[1]))

    return _lines(source, options, make, skip=1)


def write_rbd(extents: Iterable[Extent], out: Output, options: Options) -> None:
    """Columns as wide as the size of the disk may need, as not all are known before."""
    width = max(len(str(options.size)), len(RBD_HEADING[0]))

    def lines() -> Iterator[str]:
        heading = f"{RBD_HEADING[0]:<{width}}  {RBD_HEADING[1]:<{width}}  {RBD_HEADING[2]}\n"
        for start, length, _ in extents:
            yield f"{heading}{start:<{width}}  {length:<{width}}  data\n"
            heading = ""

    batched(lines(), out)


FORMATS = (
    Format("csv", "offset and length, as pybitmap dump", ".csv", read_csv, write_csv),
    Format("nbdinfo", "nbdinfo --map", "", read_nbdinfo, write_nbdinfo, whole=True),
    Format("rbd", "rbd diff", "", read_rbd, write_rbd),
)
