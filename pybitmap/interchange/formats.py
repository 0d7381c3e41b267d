# SPDX-License-Identifier: MIT
"""The formats by name, and which of them a text is in, by its beginning."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from ..errors import FormatError
from . import arrow_formats, binary_formats, json_formats, text_formats, xml_formats
from .base import Format, Source, shown

#: All formats, by name.
FORMATS: Mapping[str, Format] = {
    each.name: each
    for module in (json_formats, text_formats, xml_formats, binary_formats, arrow_formats)
    for each in module.FORMATS
}


def find_format(name: str) -> Format:
    """
    :raises FormatError: if there is none of that name

    >>> find_format("csi").title
    "CSI's SnapshotMetadata, as JSON"
    >>> find_format("qemu-mpa")
    Traceback (most recent call last):
    pybitmap.errors.FormatError: no format 'qemu-mpa'; did you mean 'qemu-map'?
    """
    try:
        return FORMATS[name]
    except KeyError:
        near = get_close_matches(name, FORMATS, 1)
        meant = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(FORMATS)}"
        raise FormatError(f"no format {name!r}{meant}") from None


def format_of_name(path: str) -> Format | None:
    """That of files with such an extension; None if it says nothing.

    >>> found = format_of_name("day.csv")
    >>> found.name
    'csv'
    >>> format_of_name("day.txt")
    """
    found = [each for each in FORMATS.values() if each.extension and path.endswith(each.extension)]
    return found[0] if found else None


def _kindred(head: bytes) -> str:
    """What a text may be that is none that is recognised."""
    first = head.partition(b"\n")[0].decode("ascii", "replace")
    if not head:
        return "it is empty, as after a program that failed"
    if first.split() == ["Offset", "Length", "Mapped", "to", "File"]:
        return "it is a table of qemu-img's, for people; programs read that of map --output=json"
    if first.startswith("{"):
        return "JSON of extents is a list of objects, and this an object (of several: jq -s .)"
    if "," in first and "{" not in first:
        return f"CSV begins with {text_formats.CSV_HEADINGS[0]}, and this with {shown(first)}"
    return "it is none that is recognised"


def detect(source: Source) -> Format:
    """The format of what is to be read.

    :raises FormatError: if it cannot be told, or could be several

    >>> import io
    >>> detect(Source(io.BytesIO(b"offset,length\\n4096,512\\n"), "day")).name
    'csv'
    """
    names = list(dict.fromkeys(_detected(source.head())))
    if len(names) == 1:
        return FORMATS[names[0]]
    source.as_text()
    could = f"it could be {' or '.join(names)}" if names else _kindred(source.head())
    source.refuse(
        f"cannot tell the format: {could}. Say which it is, by --from: {', '.join(FORMATS)}"
    )


def _detected(head: bytes) -> Iterator[str]:
    if head.startswith(arrow_formats.PARQUET_MAGIC):
        yield "parquet"
        return
    if head.startswith((arrow_formats.ARROW_MAGIC, arrow_formats.STREAM_MAGIC)):
        yield "arrow"
        return
    if _roaring(head):
        yield "roaring"
        return
    if head.startswith(BOM_UTF8):
        head = head[len(BOM_UTF8) :]
    text = head.decode("utf-8", "replace").lstrip()
    if text.startswith("<"):
        yield from _xml(text)
    elif text.startswith(("[", "{")):
        yield from _json(text)
    else:
        first = text.partition("\n")[0].strip()
        if first.lower().replace(" ", "") in text_formats.CSV_HEADINGS:
            yield "csv"
        elif tuple(first.split()) == text_formats.RBD_HEADING:
            yield "rbd"
        elif text_formats.NBDINFO_LINE.fullmatch(first):
            yield "nbdinfo"


def _roaring(head: bytes) -> bool:
    cookie = int.from_bytes(head[:4], "little")
    if cookie == 12346:
        return 0 <= int.from_bytes(head[4:8], "little") <= 1 << 16 and len(head) >= 8
    return cookie & 0xFFFF == 12347 and len(head) >= 8


def _xml(text: str) -> Iterator[str]:
    # Of a name that is all of it no shorter one is tried: that would be a search for each letter.
    root = re.search(r"<([a-z_]+)(?![a-z_])([^<>]*)>", text)
    if root is None:
        return
    if root[1] == "blocks":
        yield "era"
    elif root[1] == "superblock":
        if re.search(r"\sdata_block_size\s*=", root[2]):
            yield "thin-delta"
        elif re.search(r"\sblock_size\s*=", root[2]):
            yield "era-dump"


#: By keys that the first extent of a list has, from the most special one on.
_BY_KEYS = (
    ({"start", "length", "data", "zero"}, "qemu-map"),
    ({"offset", "length", "type", "description"}, "nbdinfo-json"),
    ({"offset", "length", "exists"}, "rbd-json"),
    ({"start", "length", "dirty"}, "imageio"),
    ({"start", "length", "zero"}, "imageio"),
    ({"offset", "length"}, "json"),
)


def _json(text: str) -> Iterator[str]:
    inside = re.match(r"\[\s*", text)
    if inside and text[inside.end() :].startswith("]"):
        yield "json"  # no extents, in whatever format
        return
    first = text[inside.end() :] if inside else text
    keys = _keys(first)
    for key in keys:
        if key == "changedArea":
            yield "vmware"
        elif key.replace("_", "").lower() in ("blockmetadata", "volumecapacitybytes"):
            yield "csi"
    if inside:
        for wanted, name in _BY_KEYS:
            if wanted <= set(keys):
                yield name
                return


def _keys(text: str) -> list[str]:
    """Those of the object that a text begins with, as far as it goes."""
    try:
        found: Any = json.JSONDecoder(parse_int=str).raw_decode(text)[0]
        return list(found) if isinstance(found, dict) else []
    except (ValueError, RecursionError):
        # It is longer than the text: a message with a list of extents in it.
        return re.findall(r'"([A-Za-z_]+)"\s*:', text[:4096])


__all__ = ["FORMATS", "Format", "FormatError", "detect", "find_format", "format_of_name"]
