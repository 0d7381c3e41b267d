# SPDX-License-Identifier: MIT
"""How commands print extents: the formats of `pybitmap dump` and `pybitmap replay --format`."""

from __future__ import annotations

from collections.abc import Iterator

from .common import write

#: The values of an option `--format`.
FORMATS = ("json", "csv")


class _StandardOutput:
    def write(self, data: bytes) -> None:
        write(data.decode())


def write_extents(extents: Iterator[tuple[int, int]], form: str) -> None:
    """(offset, length) each, in bytes, as they come; form: one of FORMATS.

    Left by an exception, what was printed so far stays: a list without its end, or fewer lines.
    """
    from ..extent import Extent
    from ..interchange.base import Options
    from ..interchange.json_formats import write_json
    from ..interchange.text_formats import write_csv

    each = (Extent(*extent) for extent in extents)
    (write_json if form == "json" else write_csv)(each, _StandardOutput(), Options())
