# SPDX-License-Identifier: MIT
"""Graphs that nobody closed: collecting them gives their stores back, and says so."""

from __future__ import annotations

import gc
import sqlite3
import warnings
from pathlib import Path

import pytest
from stores import PLACES, SIZE, Place
from support import run_python

from pybitmap import BlockGraph, LocalStore, LockedError

G = 4096


@pytest.fixture(params=PLACES[1:], ids=lambda kind: kind.__name__)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    found: Place = request.param(tmp_path)
    with BlockGraph() as graph:
        graph.add_node("n", SIZE, found.store()).add_bitmap("a", G, persistent=True)
    return found


def opened(place: Place, *, read_only: bool = False) -> BlockGraph:
    graph = BlockGraph()
    graph.add_node("n", None, place.store(), read_only=read_only)
    return graph


@pytest.mark.parametrize("read_only", [False, True])
def test_a_graph_that_nobody_has_gives_its_store_back(place: Place, read_only: bool) -> None:
    graph = opened(place, read_only=read_only)
    gc.collect()
    gc.disable()
    try:
        del graph  # there is a cycle in it
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # As a notebook does whose cell is run again.
            graph = opened(place)
    finally:
        gc.enable()
    graph.nodes["n"].mark_dirty(0, 1)
    graph.close()
    [told] = [each for each in caught if "was dropped without close()" in str(each.message)]
    assert issubclass(told.category, ResourceWarning)
    assert "node 'n' of " in str(told.message)
    assert ("still in use" in str(told.message)) is not read_only


def test_who_looks_at_a_connection_keeps_no_lock(tmp_path: Path) -> None:
    """As what records warnings does: that of a connection's own end names it (Python 3.13)."""
    store = tmp_path / "store"
    graph = BlockGraph()
    graph.add_node("n", SIZE, LocalStore(store))
    kept = [each for each in gc.get_objects() if isinstance(each, sqlite3.Connection)]
    assert kept
    del graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = BlockGraph()
        graph.add_node("n", SIZE, LocalStore(store))
    graph.close()


def test_marks_in_a_dropped_graph(place: Place) -> None:
    graph = opened(place)
    graph.nodes["n"].mark_dirty(0, 1)
    del graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
    with opened(place) as graph:
        bitmap = graph.nodes["n"].bitmaps["a"]
        assert bitmap.inconsistent is not place.exact_after_kill
        if place.exact_after_kill:
            assert list(bitmap.areas()) == [(0, G)]


def test_a_graph_that_somebody_has_keeps_its_store(place: Place) -> None:
    with opened(place) as graph:
        for read_only in (False, True):
            with pytest.raises(LockedError, match="in this process already"):
                opened(place, read_only=read_only)
        graph.nodes["n"].mark_dirty(0, 1)
    with opened(place, read_only=True) as graph:
        with pytest.raises(LockedError, match="in this process already"):
            opened(place)
        opened(place, read_only=True).close()
        assert list(graph.nodes["n"].bitmaps["a"].areas()) == [(0, G)]


@pytest.mark.parametrize("end", ["graph.close()", "graph.remove_node('n')", "node.close()", ""])
def test_with_errors_for_warnings(place: Place, end: str) -> None:
    """Nothing is said of what was closed, nor of what could not be opened."""
    kind, folder = type(place).__name__, str(place.folder)
    program = f"""
import gc, sys, warnings
sys.path[:0] = {[str(Path(__file__).parent.parent / "support")]!r}
from pathlib import Path
from stores import {kind}
from pybitmap import BlockGraph
told = []
sys.unraisablehook = lambda what: told.append(str(what.exc_value))
warnings.simplefilter("error")
graph = BlockGraph()
node = graph.add_node("n", None, {kind}(Path({folder!r})).store())
for size in (None, 512):
    try:
        graph.add_node("m", size, {kind}(Path({folder!r})).store())
    except (OSError, ValueError):
        pass
{end}
del graph, node
gc.collect()
print(len([text for text in told if text.startswith("node 'n' of ")]), told)
"""
    number, told = run_python(program).split(" ", 1)
    assert number == ("0" if end else "1"), told
    assert (told == "[]\n") is bool(end), told
