# SPDX-License-Identifier: MIT
"""Draws README's picture and those of docs/concepts.md: ``python docs/pictures/draw.py``.

Each has a ground of its own, and colours for a reader whose system is dark, so it is legible on
whatever page it stands. What is dirty in README's, which words are not zero, and what is to be
copied, the library says. They are drawn beside this file.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Callable, TypeVar

HERE = Path(__file__).parent

_T = TypeVar("_T")

STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1f2328 }
.small { font-size: 13px; fill: #59636e }
.strong { font-weight: 600 }
.code { font: 14px ui-monospace, monospace }
.centre { text-anchor: middle }
.end { text-anchor: end }
.ground { fill: #ffffff; stroke: #d1d9e0 }
.clean { fill: #f0f3f6; stroke: #818b98 }
.dirty { fill: #e5703a; stroke: #9a3f12 }
.other { fill: #5b9bd5; stroke: #20588f }
.source { fill: #f6f8fa; stroke: #d1d9e0 }
.bit { fill: #e6eaef }
.marked { fill: #e5703a }
.write { fill: #5b9bd5 }
.line { stroke: #59636e; stroke-width: 1.5; fill: none }
.copy { stroke: #9a3f12; stroke-width: 2; fill: none }
.cut { stroke: #8250df; stroke-width: 2.5; fill: none; stroke-dasharray: 7 4 }
.cut-text { fill: #8250df; font-weight: 600 }
.way { stroke: #1a7f37; stroke-width: 2; fill: none; marker-end: url(#head) }
.way-text { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .small { fill: #9198a1 }
  .ground { fill: #151b23; stroke: #3d444d }
  .clean { fill: #262c36; stroke: #656c76 }
  .dirty { fill: #c8592a; stroke: #f0a37e }
  .other { fill: #2f6ea8; stroke: #8bc0f0 }
  .source { fill: #212830; stroke: #3d444d }
  .bit { fill: #2f3742 }
  .line { stroke: #9198a1 }
  .copy { stroke: #f0a37e }
  .cut { stroke: #ab7df8 }
  .cut-text { fill: #ab7df8 }
  .way { stroke: #3fb950 }
  .way-text { fill: #3fb950 }
  .head { fill: #3fb950 }
}
"""


class Picture:
    """What is drawn so far; places are in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
            ' markerHeight="7" orient="auto-start-reverse">'
            '<path class="head" d="M0 0L8 4L0 8z" fill="#1a7f37"/></marker></defs>',
            f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}"'
            ' rx="8"/>',
        ]

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str = "clean") -> None:
        self.parts.append(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="2"/>'
        )

    def path(self, way: str, kind: str = "line") -> None:
        self.parts.append(f'<path class="{kind}" d="{way}"/>')

    def done(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


#: Of README's picture: a disk of 16 MiB, in groups of 64 KiB, and writes to it.
SIZE, GROUP = 16 << 20, 64 << 10
WRITES = [
    *((100_000, 200_000), (1_200_000, 4096), (1_600_000, 600_000), (2_900_000, 60_000)),
    *((9_000_000, 700_000), (10_100_000, 512), (12_900_000, 1_400_000), (15_600_000, 4096)),
]
LEFT, RIGHT = 96, 736  # where that disk is


def overview() -> str:
    """A bitmap over a disk: where writes come from, and what becomes of what is dirty."""
    from pybitmap import HBitmap

    hb = HBitmap(SIZE, group_size=GROUP)
    for offset, nbytes in WRITES:
        hb.set(offset, nbytes)
    areas, nwords = list(hb.areas()), len(hb.words)
    ngroups, middle = SIZE // GROUP, (LEFT + RIGHT) / 2
    picture = Picture(
        760,
        396,
        f"Writes from many sources to a disk of 16 MiB; a bitmap with a bit for each 64 KiB: "
        f"{len(hb)} of {ngroups} are dirty, in {len(areas)} areas, which are what is copied",
    )
    for y, words in ((42, "writes"), (57, "come from"), (351, "taken once")):
        picture.text(LEFT - 10, y, words, "small end")
    for y, words in ((122, "disk, RAM"), (171, "bits"), (209, "summary"), (263, "areas")):
        picture.text(LEFT - 10, y, words, "end")
    sources = [
        ("a program", "Python, C, a JIT"),
        ("memory", "kernel, Unicorn, KVM"),
        ("a disk", "QEMU, qcow2, NBD"),
        ("logs of others", "vhost, DRBD, Xen"),
    ]
    for x, width, (first, second) in _columns(sources):
        picture.box(x, 20, width, 48, "source")
        picture.text(x + width / 2, 40, first, "strong centre")
        picture.text(x + width / 2, 57, second, "small centre")
        picture.path(_arrow(x + width / 2, 74))
    picture.box(LEFT, 104, RIGHT - LEFT, 26)
    picture.path(_spans(108, 18, WRITES), "write")
    picture.text(middle, 148, "a bit for each group of 64 KiB", "small centre")
    gap, word = 8192, SIZE // nwords
    picture.path(_spans(156, 20, ((n * GROUP, GROUP - gap) for n in range(ngroups))), "bit")
    picture.path(_spans(156, 20, ((start, GROUP - gap) for start in hb)), "marked")
    for kind, named in ("bit", range(nwords)), ("marked", [n for n, b in enumerate(hb.words) if b]):
        picture.path(_spans(198, 14, ((n * word, word - 5 * gap) for n in named)), kind)
    picture.text(
        middle,
        232,
        "a bit for each 64 bits, 1 if one of them is, and so on: what is clean is passed over at "
        "once",
        "small centre",
    )
    picture.path(
        "".join(f"M{_x(at):.1f} 253v9h{_width(nbytes):.1f}v-9" for at, nbytes in areas), "copy"
    )
    picture.text(
        middle, 291, f"{len(areas)} areas, {hb.count() >> 10} KiB, go into", "small centre"
    )
    for x, width, words in _columns(
        ["an incremental backup", "a live copy", "a snapshot, a reset"]
    ):
        picture.path(_arrow(x + width / 2, 299))
        picture.box(x, 330, width, 32, "source")
        picture.text(x + width / 2, 351, words, "centre")
    picture.text(
        middle,
        382,
        "marks go on meanwhile, and wait for nobody: each is in this round or in the next",
        "small centre",
    )
    return picture.done()


def _x(offset: float) -> float:
    return LEFT + (RIGHT - LEFT) * offset / SIZE


def _width(nbytes: float) -> float:
    """At least 2 pixels, so that it is seen."""
    return max(2, _x(nbytes) - LEFT)


def _spans(y: float, height: float, areas: Iterable[tuple[int, int]]) -> str:
    """Where something is, on the scale of the disk."""
    return "".join(
        f"M{_x(offset):.1f} {y}h{_width(nbytes):.1f}v{height}h{-_width(nbytes):.1f}z"
        for offset, nbytes in areas
    )


def _columns(things: list[_T]) -> Iterable[tuple[float, float, _T]]:
    """The left edge, the width, and what stands there."""
    step = (RIGHT - LEFT) / len(things)
    for number, thing in enumerate(things):
        yield round(LEFT + number * step + 4, 1), round(step - 8, 1), thing


def _arrow(x: float, y: float) -> str:
    return f"M{x:g} {y}v22m-4 -6l4 6l4 -6"


def groups() -> str:
    """A write, the groups that it touches, and their bits."""
    picture = Picture(760, 250, "A write marks every group that it touches")
    left, width, y = 40, 170, 90
    picture.text(left, 34, "HBitmap(16384, group_size=4096); hb.set(5000, 4096)", "code")
    for number in range(4):
        x = left + number * width
        dirty = number in (1, 2)
        picture.box(x, y, width, 46, "dirty" if dirty else "clean")
        picture.text(x, y - 10, str(number * 4096), "small centre")
        picture.text(x + width / 2, y + 28, f"group {number}", "centre")
        picture.text(x + width / 2, y + 118, "1" if dirty else "0", "code centre strong")
    picture.text(left + 4 * width, y - 10, "16384", "small centre")
    at, end = left + 5000 / 4096 * width, left + 9096 / 4096 * width
    picture.path(f"M{at} {y + 60}H{end}M{at} {y + 54}v12M{end} {y + 54}v12", "line")
    picture.text((at + end) / 2, y + 82, "the write: 5000 to 9096", "small centre")
    picture.text(left, y + 118, "bits", "small")
    picture.text(left, y + 146, "areas(): [(4096, 8192)]   count(): 8192   len(): 2", "code")
    return picture.done()


def levels() -> str:
    """A search goes down where something is, and passes over what is clean."""
    picture = Picture(760, 300, "Levels of summaries over the bits")
    picture.text(40, 32, "next_dirty(0): one look at each level", "strong")
    cells = 16
    rows = [("level 2 (top)", 60, 1, {0}), ("level 1", 130, 4, {2}), ("leaf", 200, 16, {9, 11})]
    for name, y, count, full in rows:
        picture.text(40, y + 24, name)
        width = 560 / count
        for number in range(count):
            kind = "dirty" if number in full else "clean"
            picture.box(160 + number * width + 2, y, width - 4, 38, kind)
    leaf = 560 / cells
    picture.path(f"M440 98C440 115 470 112 {160 + 2.5 * 140} 126", "way")
    picture.path(f"M{160 + 2.5 * 140} 168C505 185 500 182 {160 + 9.5 * leaf} 196", "way")
    picture.text(160 + 9.5 * leaf, 260, "the first dirty word", "small centre")
    picture.text(
        40,
        284,
        "A bit of a level says: the word below is not zero. Clean stretches cost nothing.",
        "small",
    )
    return picture.done()


def freeze() -> str:
    """What is marked before and after a freeze, and what becomes of both."""
    picture = Picture(760, 390, "A freeze: constant from one instant on")
    for x, words in ((250, "freeze()"), (560, "the block ends")):
        picture.path(f"M{x} 52V230", "cut")
        picture.text(x, 40, words, "cut-text centre")
    for y, words in ((86, "writes"), (146, "daily"), (206, "its successor")):
        picture.text(30, y, words)
    picture.path("M150 81H720")
    for x, kind in ((180, "dirty"), (215, "dirty"), (320, "other"), (420, "other"), (640, "clean")):
        picture.box(x - 8, 73, 16, 16, kind)
    picture.box(150, 124, 100, 34, "dirty")
    picture.text(200, 146, "records", "centre")
    picture.box(250, 124, 310, 34, "dirty")
    picture.text(405, 146, "constant: this is read, and copied", "centre")
    picture.box(250, 184, 310, 34, "other")
    picture.text(405, 206, "records what is written meanwhile", "centre")
    picture.text(30, 268, "done() was said", "strong")
    picture.text(30, 292, "What was read is dropped. daily is what the successor has:", "small")
    picture.box(570, 276, 22, 22, "other")
    picture.box(596, 276, 22, 22, "other")
    picture.text(30, 330, "left in any other way", "strong")
    picture.text(
        30,
        354,
        "return, break, an exception, Ctrl-C: daily is all of it, as if never frozen:",
        "small",
    )
    for x, kind in ((570, "dirty"), (596, "dirty"), (622, "other"), (648, "other")):
        picture.box(x, 338, 22, 22, kind)
    return picture.done()


def instant() -> str:
    """One instant over two nodes."""
    picture = Picture(760, 330, "A transaction is one instant over all nodes")
    picture.text(
        30, 34, "merge(week <- daily); clear(daily), of two disks at one instant", "strong"
    )
    picture.path("M400 56V230", "cut")
    picture.text(400, 250, "T: one instant for both", "cut-text centre")
    for y, name in ((92, "disk"), (172, "log")):
        picture.text(30, y + 5, name)
        picture.path(f"M110 {y}H720")
    for x, y, kind in ((190, 92, "dirty"), (340, 172, "dirty"), (270, 92, "dirty")):
        picture.box(x - 9, y - 9, 18, 18, kind)
    for x, y, kind in ((470, 92, "other"), (560, 172, "other"), (640, 92, "other")):
        picture.box(x - 9, y - 9, 18, 18, kind)
    picture.text(190, 76, "A", "centre strong")
    picture.text(340, 156, "B", "centre strong")
    picture.path("M200 102C240 150 290 172 326 172", "way")
    picture.text(195, 148, "A returned, then B began", "small way-text end")
    picture.box(30, 276, 16, 16, "dirty")
    picture.text(54, 289, "before T: now in week")
    picture.box(280, 276, 16, 16, "other")
    picture.text(304, 289, "after T: now in daily")
    picture.text(
        30, 314, "B is before T, so A is. No write waits, none is in both or in neither.", "small"
    )
    return picture.done()


def waiting() -> str:
    """Who may wait, and for what."""
    picture = Picture(760, 330, "Who may wait for whom")
    columns = [(400, "a mark"), (510, "a change"), (620, "a disk"), (710, "a copy")]
    picture.text(30, 40, "who", "strong")
    for x, words in columns:
        picture.text(x, 40, words, "strong centre")
    rows = [
        ("a mark: set, mark_dirty", "----"),
        ("a question: areas, count, next_dirty", "-b--"),
        ("a clear of an HBitmap: reset, drain", "bb--"),
        ("a write: with node.writing(...)", "-b--"),
        ("the same, with before= of yours", "-yyy"),
        ("freeze, transaction, add, enable", "yyy-"),
        ("truncate, close, flush", "yyy-"),
    ]
    for number, (words, waits) in enumerate(rows):
        y = 74 + number * 30
        picture.path(f"M30 {y - 20}H730", "line")
        picture.text(30, y, words)
        for (x, _), how in zip(columns, waits):
            if how == "-":
                picture.text(x, y, "never", "small centre")
            else:
                picture.box(x - 8, y - 13, 16, 16, "other" if how == "b" else "dirty")
    picture.box(30, 284, 16, 16, "other")
    picture.text(54, 297, "as long as a call of C")
    picture.box(270, 284, 16, 16, "dirty")
    picture.text(294, 297, "as long as that takes")
    picture.text(
        30,
        320,
        "While a node is truncated or closed, its marks wait, too, and are then made or refused.",
        "small",
    )
    return picture.done()


PICTURES: dict[str, Callable[[], str]] = {
    "overview": overview,
    "groups": groups,
    "levels": levels,
    "freeze": freeze,
    "instant": instant,
    "waiting": waiting,
}


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / f"{name}.svg").write_text(draw(), encoding="utf-8")
