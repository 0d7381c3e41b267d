# SPDX-License-Identifier: MIT
"""Pictures of where a bitmap is dirty: each cell is right, they are small, and they never fail."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybitmap import BlockGraph, HBitmap
from pybitmap import picture as drawing
from pybitmap.picture import ALL, CLEAN, COLOUR, COLUMNS, ROWS, Cells
from pybitmap.store import LocalStore

pytestmark = pytest.mark.core

SVG = "{http://www.w3.org/2000/svg}"


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html)


@given(st.data(), st.integers(0, 1 << 41), st.integers(0, 12))
def test_each_cell_has_the_level_of_its_share(data: Any, size: int, granularity: int) -> None:
    hb = HBitmap(size, granularity)
    for _ in range(data.draw(st.integers(0, 5)) if size else 0):
        start = data.draw(st.integers(0, size - 1))
        hb.set(start, min(data.draw(st.integers(1, 1 << 30)), size - start))
    cells = Cells(hb, COLUMNS, ROWS)
    assert len(cells.levels) == -(-size // cells.cell) <= COLUMNS * ROWS
    if cells.sampled:
        return
    assert cells.dirty == hb.count(0, size)
    for number, level in enumerate(cells.levels):
        start = number * cells.cell
        nitems = min(cells.cell, size - start)
        dirty = hb.count(start, nitems)
        assert (level == CLEAN) is (dirty == 0)
        assert (level == ALL) is (dirty == nitems)
        if level not in (CLEAN, ALL):
            assert (level - 1) * nitems < 3 * dirty <= level * nitems
    rows = list(cells.rows())
    assert b"".join(levels for _, levels in rows) == cells.levels
    assert [start for start, _ in rows] == list(range(0, size, COLUMNS * cells.cell))


def test_of_large_bitmaps_a_sample_is_looked_at_and_nothing_dirty_looks_clean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drawing, "MOST_GROUPS", 1 << 16)
    monkeypatch.setattr(drawing, "SAMPLE", 1 << 4)
    hb = HBitmap((1 << 24) - 5)
    cell = Cells(hb, COLUMNS, ROWS).cell
    hb.add(10 * cell + 4711)
    hb.set(20 * cell, 10 * cell)
    looked: list[int] = []

    class Counted(HBitmap):
        def count(self, start: Any = None, count: Any = None) -> int:
            looked.append(count)
            return super().count(start, count)

    counted = Counted(hb.size)
    counted |= hb
    cells = Cells(counted, COLUMNS, ROWS)
    assert cells.sampled
    assert sum(looked) <= 11 * drawing.SAMPLES * drawing.SAMPLE
    assert len(looked) == 11 * drawing.SAMPLES
    shown = {number: level for number, level in enumerate(cells.levels) if level}
    assert shown == {10: 1, **dict.fromkeys(range(20, 30), ALL - 1)}
    assert "a sample was looked at" in hb._repr_html_()
    hb.clear()
    assert "nothing dirty" in hb._repr_html_()


SIZES = [0, 1, 63, 64, 65, 1023, 1024, 1025, 10**6 + 1, 1 << 40, (1 << 41) - 1, 1 << 41]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pattern", ["clean", "ends", "stripes"])
def test_a_picture_is_small_and_stands_alone_whatever_the_size(size: int, pattern: str) -> None:
    hb = HBitmap(size)
    if pattern == "ends" and size:
        hb.update([0, size - 1])
    if pattern == "stripes":  # neighbours differ, in each way
        cell = Cells(hb, COLUMNS, ROWS).cell
        shares = [1, cell // 2, cell, 0]
        for number, start in enumerate(range(0, size, cell)):
            nitems = min(shares[number % 4], size - start, 1 << 20)
            hb.set(start, nitems)
    html = hb._repr_html_()
    assert len(html) < 16 << 10
    assert html.startswith("<svg ")
    root = parsed(html)
    title = root.find(f"{SVG}title")
    assert title is not None
    assert root.get("role") == "img"
    assert root.get("aria-label") == title.text
    assert title.text is not None
    assert title.text.startswith(f"HBitmap: {size} items, ")
    for element in root.iter():
        assert element.tag.removeprefix(SVG) in ("svg", "title", "text", "g", "path", "rect")
        assert not {"id", "class", "href", "onload"} & set(element.attrib)
    drawn = [path for path in root.iter(f"{SVG}path") if path.get("fill") == COLOUR]
    assert bool(drawn) is not hb.empty()


def test_the_words_say_how_much_is_dirty() -> None:
    hb = HBitmap(1 << 20, group_size=4096)
    hb.set(0, 1 << 18)
    title = "HBitmap: 1048576 items, 262144 dirty (25.00 %), in groups of 4K"
    assert title in hb._repr_html_()


def test_what_shows_is_as_dark_as_it_is_dirty() -> None:
    hb = HBitmap(8)
    hb.set(2, 3)
    paths = [path.get("d") for path in parsed(hb._repr_html_()).iter(f"{SVG}path")]
    assert paths == ["M0 0h2v1h-2zM5 0h3v1h-3z", "M2 0h3v1h-3z"]


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", 'a"b&c', "x" * 1000, "\x1b[31m\n", "\udc80"]
)
def test_a_name_stays_a_name(name: str) -> None:
    html = drawing.picture(HBitmap(5), name)
    html.encode()
    root = parsed(html)
    label = root.get("aria-label") or ""
    assert label.startswith(name[0] if name.isprintable() else "\ufffd")
    assert len(label) < 120
    assert not list(root.iter("script"))


def test_whatever_has_become_of_a_bitmap_it_is_shown(tmp_path: Path) -> None:
    graph = BlockGraph()
    disk = graph.add_node("disk", size=1 << 20)
    daily, gone = disk.add_bitmap("daily"), disk.add_bitmap("gone")
    disk.mark_dirty(0, 1)
    with daily.freeze():
        disk.mark_dirty(1 << 19, 1)
        assert "65536 dirty (6.25 %)" in daily._repr_html_()
    assert "131072 dirty" in daily._repr_html_()
    disk.remove_bitmap("gone")
    graph.close()
    for bitmap in (daily, gone):
        html = bitmap._repr_html_()
        assert html.startswith(("<svg ", "<pre>"))
    assert HBitmap.__new__(HBitmap)._repr_html_() == "<pre>&lt;HBitmap&gt;</pre>"
    taken = HBitmap(5).taking()
    taken.close()
    assert taken._repr_html_().startswith("<svg ")


class Broken(HBitmap):
    def __repr__(self) -> str:
        raise ValueError("no words")

    def count(self, start: Any = None, count: Any = None) -> int:
        raise ValueError("no number")


def test_a_subclass_that_cannot_be_counted_is_named_and_an_interruption_goes_on() -> None:
    assert Broken(5)._repr_html_() == "<pre>&lt;Broken&gt;</pre>"

    class Interrupted(HBitmap):
        def count(self, start: Any = None, count: Any = None) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(5)._repr_html_()


def test_in_the_child_of_a_fork_what_has_a_store_is_shown(tmp_path: Path) -> None:
    with BlockGraph() as graph:
        disk = graph.add_node("disk", size=1 << 20, store=LocalStore(tmp_path / "store"))
        daily = disk.add_bitmap("daily", persistent=True)
        child = os.fork()
        if not child:
            good = False
            try:
                good = daily._repr_html_().startswith(("<svg ", "<pre>"))
            finally:
                os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_beside_marks_clears_and_truncates_pictures_are_whole() -> None:
    hb, running = HBitmap(1 << 20), True

    def change() -> None:
        n = 0
        while running:
            hb.set(n % 1000, 20)
            hb.reset(n % 500, 10)
            hb.truncate((1 << 20) - n % 3 * 100_000)
            n += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(30):
            assert parsed(hb._repr_html_()).tag == f"{SVG}svg"
    finally:
        running = False
        thread.join()
