# SPDX-License-Identifier: MIT
"""Where a bitmap is dirty, as a picture: rows of cells, dark where much is dirty.

Workload: `pybitmap replay` draws one with characters, notebooks one as SVG whenever a bitmap is the
last word of a cell. So a picture has a bounded number of cells, whatever the size, and what is
looked at is bounded, too: of very large bitmaps a sample (:data:`MOST_GROUPS`).

Nothing is locked for longer than the look at one cell, so beside marks the cells are of different
moments: a mark that returned before shows, one made meanwhile may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from typing import TYPE_CHECKING

from .sizes import exact_size

if TYPE_CHECKING:
    from .hbitmap import HBitmap

#: Levels of a cell: clean, up to a third dirty, up to two thirds, more, all.
CLEAN, ALL = 0, 4

#: Of larger bitmaps each cell is looked at in SAMPLES places of SAMPLE groups each.
MOST_GROUPS = 1 << 32
SAMPLES, SAMPLE = 16, 1 << 16


class Cells:
    """The levels of the cells of a bitmap, ``columns`` of them in a row, ``rows`` rows at most.

    :param columns: as many as there are cells, if these are fewer
    """

    def __init__(self, hb: HBitmap, columns: int, rows: int) -> None:
        size = hb.size
        cell = hb.group_size
        while cell * columns * rows < size:
            cell *= 2
        self.size = size  #: in items
        self.cell = cell  #: items of a cell, a power of 2
        self.columns = columns
        #: Was a sample looked at? Then no cell is said to be dirty throughout.
        self.sampled = size >> hb.granularity > MOST_GROUPS
        #: Dirty items, as far as was looked at.
        self.dirty = 0
        levels = bytearray()
        for start in range(0, size, cell):
            nitems = min(cell, size - start)
            if self.sampled:
                levels.append(_sample(hb, start, nitems))
            else:
                dirty = hb.count(start, nitems)
                self.dirty += dirty
                levels.append(_level(dirty, nitems))
        #: From :data:`CLEAN` to :data:`ALL`; only clean cells are clean, and only what is all dirty
        #: is all.
        self.levels = bytes(levels)

    def rows(self) -> Iterator[tuple[int, bytes]]:
        """The item that a row begins with, and its levels."""
        for at in range(0, len(self.levels), self.columns):
            yield at * self.cell, self.levels[at : at + self.columns]


def _level(dirty: int, nitems: int) -> int:
    return ALL if dirty >= nitems else -(-3 * dirty // nitems)


def _sample(hb: HBitmap, start: int, nitems: int) -> int:
    """The level of a cell by some places in it; one that has anything dirty is not clean."""
    if hb.next_dirty(start, nitems) is None:
        return CLEAN
    step = nitems // SAMPLES
    length = min(step, SAMPLE << hb.granularity)
    dirty = sum(hb.count(start + n * step, length) for n in range(SAMPLES))
    return min(max(_level(dirty, SAMPLES * length), 1), ALL - 1)


def percent(share: float) -> str:
    """For people; what is not nothing, or not all, is not said to be that."""
    if 0 < share < 0.0001:
        return "< 0.01 %"
    if 0.9999 < share < 1:
        return "> 99.99 %"
    return f"{share:.2%}".replace("%", " %")


# ---- SVG ------------------------------------------------------------------------------------

#: In pixels: of all cells of a row, of a row, of what is left of it and above it.
WIDTH, ROW, LEFT, TOP = 512, 12, 64, 22
COLUMNS, ROWS = 64, 16
LONGEST = 30  # characters of a name

#: Of a colour that stands out from white and from black, and the shares of it that levels have.
COLOUR = "#2a8be0"
OPACITY = {1: 0.4, 2: 0.6, 3: 0.8, ALL: 1}
LEGEND = {1: "up to 1/3", 2: "up to 2/3", 3: "more", ALL: "all"}


def picture(hb: HBitmap, name: str, unit: str = "items") -> str:
    """A picture in SVG, for HTML: text and frame have the colour of the text around it.

    At most some 16 KiB, without scripts, links, styles or ids that could meet others.

    :param name: what the title begins with
    :param unit: of what is counted
    """
    found = Cells(hb, COLUMNS, ROWS)
    if found.sampled:
        share = "a sample was looked at" if any(found.levels) else "nothing dirty"
    else:
        share = f"{found.dirty} dirty"
        if found.size:
            share += f" ({percent(found.dirty / found.size)})"
    name = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\u2026"
    title = f"{name}: {found.size} {unit}, {share}, in groups of {exact_size(hb.group_size)}"
    return svg(found, title)


def svg(cells: Cells, title: str) -> str:
    """The same of cells, below a title."""
    rows = list(cells.rows())
    columns = min(cells.columns, len(cells.levels)) or 1
    height = TOP + ROW * len(rows) + 24
    title = escape("".join(each if each.isprintable() else "\ufffd" for each in title))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 8} {height}" '
        f'width="{LEFT + WIDTH + 8}" height="{height}" style="max-width:100%;height:auto" '
        f'role="img" aria-label="{title}" fill="currentColor" font-family="sans-serif" '
        f'font-size="11"><title>{title}</title><text x="4" y="13">{title}</text>'
    ]
    for number, (start, _) in enumerate(rows):
        y = TOP + ROW * number + 10
        label = exact_size(start)
        parts.append(f'<text x="{LEFT - 6}" y="{y}" text-anchor="end" opacity=".7">{label}</text>')
    # In cells.
    parts.append(f'<g transform="translate({LEFT} {TOP}) scale({WIDTH / columns:g} {ROW})">')
    for level in range(ALL + 1):
        path = "".join(
            f"M{start} {y}h{stop - start}v1h-{stop - start}z"
            for y, (_, levels) in enumerate(rows)
            for start, stop in _runs(levels, level)
        )
        if path and level == CLEAN:
            parts.append(f'<path d="{path}" opacity=".1"/>')
        elif path:
            parts.append(f'<path d="{path}" fill="{COLOUR}" fill-opacity="{OPACITY[level]:g}"/>')
    parts.append("</g>")
    y = TOP + ROW * len(rows) + 16
    legend = f"One cell is {exact_size(cells.cell)}:" if rows else "There is nothing in it."
    parts.append(f'<text x="{LEFT}" y="{y}" opacity=".7">{legend}</text>')
    if rows:
        for n, (level, text) in enumerate(LEGEND.items()):
            x = LEFT + 130 + 90 * n
            parts.append(
                f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{COLOUR}" '
                f'fill-opacity="{OPACITY[level]:g}"/>'
                f'<text x="{x + 15}" y="{y}" opacity=".7">{text}</text>'
            )
    return "".join([*parts, "</svg>"])


def _runs(levels: bytes, level: int) -> Iterator[tuple[int, int]]:
    """Where cells of that level follow each other, ``(start, stop)``."""
    start = None
    for at, each in enumerate([*levels, -1]):
        if each == level and start is None:
            start = at
        elif each != level and start is not None:
            yield start, at
            start = None


def shown(thing: object, draw: Callable[[], str]) -> str:
    """For ``_repr_html_``: what is drawn or, if it cannot be, what the thing says of itself."""
    try:
        return draw()
    except (
        Exception
    ):  # closed, torn by a fork, not made yet: a notebook shows something all the same
        try:
            text = repr(thing)
        except Exception:
            text = f"<{type(thing).__name__}>"
        return f"<pre>{escape(text)}</pre>"
