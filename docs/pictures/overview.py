# SPDX-License-Identifier: MIT
"""Draws the picture at the head of README.md, docs/pictures/overview.svg, beside itself:
``python docs/pictures/overview.py``.

The bitmap in it is one: what is dirty, which words are not zero, and which areas are to be copied,
the library says. It has a ground of its own, and colours for a reader whose system is dark, so it
is legible on whatever page it stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from pybitmap import HBitmap

TARGET = Path(__file__).with_name("overview.svg")

#: A disk of 16 MiB, in groups of 64 KiB: four words of bits. And writes to it, offset and length.
SIZE, GROUP = 16 << 20, 64 << 10
WRITES = [
    *((100_000, 200_000), (1_200_000, 4096), (1_600_000, 600_000), (2_900_000, 60_000)),
    *((9_000_000, 700_000), (10_100_000, 512), (12_900_000, 1_400_000), (15_600_000, 4096)),
]

SOURCES = [
    ("a program", "Python, C, a JIT"),
    ("memory", "kernel, Unicorn, KVM"),
    ("a disk", "QEMU, qcow2, NBD"),
    ("logs of others", "vhost, DRBD, Xen"),
]
USES = ["an incremental backup", "a live copy", "a snapshot, a reset"]

SUMMARY = (
    "a bit for each 64 bits, 1 if one of them is, and so on: what is clean is passed over at once"
)
MEANWHILE = "marks go on meanwhile, and wait for nobody: each is in this round or in the next"

WIDTH, HEIGHT, LEFT, RIGHT = 760, 396, 96, 736

STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
.small { font-size: 12px; fill: #59636e }
.left { text-anchor: end }
.strong { font-weight: 600 }
.ground { fill: #ffffff; stroke: #d1d9e0 }
.box { fill: #f6f8fa; stroke: #d1d9e0 }
.clean { fill: #e6eaef }
.disk { fill: #f0f3f6; stroke: #818b98 }
.write { fill: #5b9bd5 }
.dirty { fill: #e5703a }
.line { stroke: #818b98; stroke-width: 1.5; fill: none }
.copy { stroke: #9a3f12; stroke-width: 2; fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .small { fill: #9198a1 }
  .ground { fill: #151b23; stroke: #3d444d }
  .box { fill: #212830; stroke: #3d444d }
  .clean { fill: #2f3742 }
  .disk { fill: #262c36; stroke: #656c76 }
  .line { stroke: #9198a1 }
  .copy { stroke: #f0a37e }
}
"""


def x_of(offset: float) -> float:
    return LEFT + (RIGHT - LEFT) * offset / SIZE


def rect(kind: str, left: float, top: float, width: float, height: float, radius: int = 0) -> str:
    return (
        f'<rect class="{kind}" x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'
        f' rx="{radius}"/>'
    )


def text(kind: str, x: float, y: float, words: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>'


def spans(kind: str, top: float, height: float, areas: Iterable[tuple[int, int]]) -> str:
    """Where something is, on the scale of the disk, at least 2 pixels wide."""
    ways = ""
    for offset, nbytes in areas:
        width = max(2, x_of(nbytes) - LEFT)
        ways += f"M{x_of(offset):.1f} {top:g}h{width:.1f}v{height:g}h{-width:.1f}z"
    return f'<path class="{kind}" d="{ways}"/>'


def boxes(top: float, height: float, words: list[tuple[str, str]]) -> Iterable[str]:
    step = (RIGHT - LEFT) / len(words)
    for number, (first, second) in enumerate(words):
        left = LEFT + number * step
        middle = left + step / 2
        yield rect("box", left + 4, top, step - 8, height, 5)
        yield text("strong" if second else "", middle, top + 20, first)
        if second:
            yield text("small", middle, top + 37, second)


def arrows(top: float, height: float, number: int) -> str:
    step = (RIGHT - LEFT) / number
    ways = ""
    for n in range(number):
        ways += f"M{LEFT + (n + 0.5) * step:g} {top:g}v{height:g}m-4 -6l4 6l4 -6"
    return f'<path class="line" d="{ways}"/>'


def picture() -> str:
    hb = HBitmap(SIZE, group_size=GROUP)
    for offset, nbytes in WRITES:
        hb.set(offset, nbytes)
    areas = list(hb.areas())
    groups = [(n * GROUP, GROUP - 8192) for n in range(SIZE // GROUP)]  # a gap between them
    dirty = [(start, GROUP - 8192) for start in hb]
    nwords = len(hb.words)
    words = [(n * SIZE // nwords, SIZE // nwords - 40_000) for n in range(nwords)]
    named = [word for word, bits in zip(words, hb.words) if bits]
    title = (
        f"Writes from many sources to a disk of 16 MiB; a bitmap with a bit for each 64 KiB: "
        f"{len(hb)} of {len(groups)} are dirty, in {len(areas)} areas, which are what is copied"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
        f' height="{HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        rect("ground", 0.5, 0.5, WIDTH - 1, HEIGHT - 1, 8),
        text("small left", LEFT - 10, 42, "writes"),
        text("small left", LEFT - 10, 57, "come from"),
        *boxes(20, 48, SOURCES),
        arrows(74, 22, len(SOURCES)),
        text("left", LEFT - 10, 122, "disk, RAM"),
        rect("disk", LEFT, 104, RIGHT - LEFT, 26, 3),
        spans("write", 108, 18, WRITES),
        text("left", LEFT - 10, 171, "bits"),
        spans("clean", 156, 20, groups),
        spans("dirty", 156, 20, dirty),
        text("left", LEFT - 10, 209, "summary"),
        spans("clean", 198, 14, words),
        spans("dirty", 198, 14, named),
        text("small", (LEFT + RIGHT) / 2, 148, "a bit for each group of 64 KiB"),
        text("small", (LEFT + RIGHT) / 2, 232, SUMMARY),
        text("left", LEFT - 10, 263, "areas"),
        f'<path class="copy" d="{brackets(areas)}"/>',
        text(
            "small", (LEFT + RIGHT) / 2, 291, f"{len(areas)} areas, {hb.count() >> 10} KiB, go into"
        ),
        arrows(299, 22, len(USES)),
        *boxes(330, 32, [(each, "") for each in USES]),
        text("small left", LEFT - 10, 351, "taken once"),
        text("small", (LEFT + RIGHT) / 2, 382, MEANWHILE),
        "</svg>",
        "",
    ]
    return "\n".join(parts)


def brackets(areas: list[tuple[int, int]]) -> str:
    return "".join(
        f"M{x_of(offset):.1f} 253v9h{max(2, x_of(nbytes) - LEFT):.1f}v-9"
        for offset, nbytes in areas
    )


if __name__ == "__main__":
    TARGET.write_text(picture(), encoding="utf-8")
