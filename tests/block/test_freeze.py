# SPDX-License-Identifier: MIT
"""Freezing: several bitmaps at one instant, and what is kept however the block is left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from memory_store import Medium, MemoryStore
from stores import PLACES, SIZE, Place
from support import collect

from pybitmap import (
    BlockGraph,
    BusyError,
    DirtyBitmap,
    Frozen,
    InvalidError,
    NotFoundError,
    ReadonlyError,
    StateError,
    StoreError,
)

pytestmark = pytest.mark.core

G = 512


def two() -> tuple[BlockGraph, DirtyBitmap, DirtyBitmap]:
    graph = BlockGraph()
    a, b = (graph.add_node(name, SIZE).add_bitmap("daily", G) for name in "ab")
    for node in graph.nodes.values():
        node.mark_dirty(0, 1)
    return graph, a, b


def mark(graph: BlockGraph, group: int) -> None:
    for node in graph.nodes.values():
        node.mark_dirty(group * G, 1)


def groups(bitmap: DirtyBitmap) -> list[int]:
    return [
        offset // G
        for start, nbytes in bitmap.areas()
        for offset in range(start, start + nbytes, G)
    ]


# ---- how the block is left --------------------------------------------------


def returns(graph: BlockGraph, a: DirtyBitmap, b: DirtyBitmap) -> None:
    with graph.freeze([a, b]):
        mark(graph, 1)
        return


def breaks(graph: BlockGraph, a: DirtyBitmap, b: DirtyBitmap) -> None:
    for _ in range(2):
        with graph.freeze([a, b]):
            mark(graph, 1)
            break


def raises(graph: BlockGraph, a: DirtyBitmap, b: DirtyBitmap) -> None:
    with suppress(ZeroDivisionError), graph.freeze([a, b]):
        mark(graph, 1)
        raise ZeroDivisionError


def is_interrupted(graph: BlockGraph, a: DirtyBitmap, b: DirtyBitmap) -> None:
    with suppress(KeyboardInterrupt), graph.freeze([a, b]):
        mark(graph, 1)
        raise KeyboardInterrupt


def closes(graph: BlockGraph, a: DirtyBitmap, b: DirtyBitmap) -> None:
    frozen = graph.freeze([a, b])
    mark(graph, 1)
    frozen.close()
    frozen.close()


def is_dropped(graph: BlockGraph, a: DirtyBitmap, b: DirtyBitmap) -> None:
    frozen = graph.freeze([a, b])
    mark(graph, 1)
    text = "frozen bitmaps were dropped.*'daily', 'daily'"
    with pytest.warns(ResourceWarning, match=text):  # noqa: PT031
        del frozen
        collect()
    graph.find_node("a")  # any call


def drops_a_generator(graph: BlockGraph, a: DirtyBitmap, b: DirtyBitmap) -> None:
    def generate() -> object:
        with graph.freeze([a, b]):
            mark(graph, 1)
            yield

    generator = generate()
    next(generator)  # type: ignore[call-overload]
    del generator
    collect()


LEAVING: list[Callable[[BlockGraph, DirtyBitmap, DirtyBitmap], None]] = [
    returns,
    breaks,
    raises,
    is_interrupted,
    closes,
    is_dropped,
    drops_a_generator,
]


@pytest.mark.parametrize("leave", LEAVING, ids=lambda leave: leave.__name__)
def test_whoever_leaves_without_done_has_everything_put_back(
    leave: Callable[[BlockGraph, DirtyBitmap, DirtyBitmap], None],
) -> None:
    graph, a, b = two()
    leave(graph, a, b)
    mark(graph, 2)
    for bitmap in (a, b):
        assert groups(bitmap) == [0, 1, 2]
        assert (bitmap.busy, bitmap.enabled) == (False, True)


def test_some_are_done_and_the_others_put_back() -> None:
    graph, a, b = two()
    with graph.freeze([a, b]) as frozen:
        mark(graph, 1)
        assert list(frozen) == [a, b]
        assert len(frozen) == 2
        frozen.done(a, a)
        assert list(frozen) == [b]
        assert (a in frozen, b in frozen) == (False, True)
    assert (groups(a), groups(b)) == ([1], [0, 1])


def test_done_takes_all_that_are_left() -> None:
    graph, a, b = two()
    with graph.freeze([a, b]) as frozen:
        mark(graph, 1)
        frozen.done(b)
        frozen.done()
        frozen.done()
    assert (groups(a), groups(b)) == ([1], [1])


def test_what_is_not_frozen_cannot_be_done() -> None:
    graph, a, b = two()
    with graph.freeze([a]) as frozen:
        with pytest.raises(InvalidError, match="'daily' is not among the frozen"):
            frozen.done(b)
        with pytest.raises(InvalidError):
            frozen.done(a, b)
        assert a.busy
        frozen.done(a)
        with pytest.raises(StateError, match="not frozen any more"):
            frozen.done(a)
    with pytest.raises(StateError):
        frozen.done(a)


def test_the_end_of_one_freeze_is_not_that_of_the_next() -> None:
    _graph, a, _ = two()
    first = a.freeze()
    first.close()
    with a.freeze():
        assert not list(first)
        first.close()
        with pytest.raises(StateError):
            first.done(a)
        del first
        collect()
        assert a.busy


# ---- who is frozen ----------------------------------------------------------


def test_one_refusal_freezes_none() -> None:
    graph, a, b = two()
    other = BlockGraph().add_node("x", SIZE).add_bitmap("x")
    gone = graph.nodes["b"].add_bitmap("gone")
    graph.nodes["b"].remove_bitmap("gone")
    cases: list[tuple[list[DirtyBitmap], type[Exception]]] = [
        ([a, b, a], InvalidError),
        ([a, other], InvalidError),
        ([a, gone], NotFoundError),
    ]
    for bitmaps, error in cases:
        with pytest.raises(error):
            graph.freeze(bitmaps)
        assert not a.busy
    with b.freeze():
        with pytest.raises(BusyError):
            graph.freeze([a, b])
        assert not a.busy
    with graph.freeze([]) as frozen:
        frozen.done()


def test_inside_a_transaction_nothing_is_frozen() -> None:
    graph, a, _ = two()
    with graph.transaction() as tx:
        tx.disable("a", "daily")
        with pytest.raises(StateError, match="transaction open already"):
            a.freeze()
        tx.enable("a", "daily")
    assert not a.busy


def test_a_frozen_bitmap_is_busy_to_everybody_else() -> None:
    graph, a, _ = two()
    with a.freeze():
        for change in (
            a.clear,
            a.disable,
            a.freeze,
            lambda: graph.nodes["a"].remove_bitmap("daily"),
        ):
            with pytest.raises(BusyError):
                change()


def test_a_read_only_node_freezes_nothing(tmp_path: Path) -> None:
    medium = Medium()
    with BlockGraph() as graph:
        graph.add_node("n", SIZE, MemoryStore(medium)).add_bitmap("b", persistent=True)
    with BlockGraph() as graph:
        node = graph.add_node("n", None, MemoryStore(medium), read_only=True)
        with pytest.raises(ReadonlyError):
            node.bitmaps["b"].freeze()


def test_a_node_that_is_closed_meanwhile_has_stored_everything() -> None:
    medium = Medium()
    graph = BlockGraph()
    node = graph.add_node("n", SIZE, MemoryStore(medium))
    bitmap = node.add_bitmap("b", G, persistent=True)
    node.mark_dirty(0, 1)
    with bitmap.freeze() as frozen:
        node.mark_dirty(G, 1)
        node.close()
        assert not list(frozen)
        with pytest.raises(StateError, match="not frozen any more"):
            frozen.done(bitmap)
        frozen.done()
    with BlockGraph() as graph:
        node = graph.add_node("n", None, MemoryStore(medium))
        assert groups(node.bitmaps["b"]) == [0, 1]


# ---- writers ----------------------------------------------------------------


def test_all_are_frozen_at_one_instant_and_each_write_is_copied_once() -> None:
    """A thread marks group i on one node, then on the other."""
    graph = BlockGraph()
    count = 4000
    a, b = (graph.add_node(name, count * G).add_bitmap("daily", G) for name in "ab")
    first, second = graph.nodes.values()

    def write() -> None:
        for i in range(count):
            first.mark_dirty(i * G, 1)
            second.mark_dirty(i * G, 1)

    thread = threading.Thread(target=write)
    thread.start()
    copied: list[list[int]] = [[], []]
    while thread.is_alive():
        with graph.freeze([b, a]) as frozen:
            cut = groups(a), groups(b)
            copied[0] += cut[0]
            copied[1] += cut[1]
            # a is at most one write ahead, never behind
            assert len(copied[1]) <= len(copied[0]) <= len(copied[1]) + 1
            frozen.done()
    thread.join()
    for mine, bitmap in zip(copied, (a, b)):
        assert mine + groups(bitmap) == list(range(count))


# ---- stores -----------------------------------------------------------------


@pytest.mark.parametrize("kind", PLACES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("end", ["done", "put back"])
def test_what_a_freeze_leaves_is_stored(kind: type[Place], end: str, tmp_path: Path) -> None:
    place = kind(tmp_path)
    with BlockGraph() as graph:
        bitmaps = []
        for medium in (0, 1):
            node = graph.add_node(f"n{medium}", SIZE, place.store(medium))
            bitmaps.append(node.add_bitmap("b", G, persistent=True))
        mark(graph, 0)
        with graph.freeze(bitmaps) as frozen:
            mark(graph, 1)
            if end == "done":
                frozen.done()
    for medium in (0, 1):
        with BlockGraph() as graph:
            node = graph.add_node(f"n{medium}", None, place.store(medium))
            assert groups(node.bitmaps["b"]) == ([1] if end == "done" else [0, 1])


@pytest.mark.parametrize("step", ["prepare", "switch"])
def test_a_store_that_refuses_does_not_undo_the_others(step: str) -> None:
    stores = [MemoryStore(Medium()) for _ in range(3)]
    with BlockGraph() as graph:
        bitmaps = [
            graph.add_node(f"n{i}", SIZE, store).add_bitmap("b", G, persistent=True)
            for i, store in enumerate(stores)
        ]
        mark(graph, 0)
        with graph.freeze(bitmaps) as frozen:
            mark(graph, 1)
            stores[1].fail(step)
            with pytest.raises(StoreError, match="no space"):
                frozen.done()
            assert not list(frozen)
            assert [groups(each) for each in bitmaps] == [[1], [0, 1], [1]]
        stores[1].mend()


@pytest.mark.parametrize("step", ["make", "prepare", "switch"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_store_without_space_freezes_none(step: str, failing: int) -> None:
    stores = [MemoryStore(Medium()) for _ in range(2)]
    with BlockGraph() as graph:
        bitmaps = [
            graph.add_node(f"n{i}", SIZE, store).add_bitmap("b", G, persistent=True)
            for i, store in enumerate(stores)
        ]
        mark(graph, 0)
        stores[failing].fail(step)
        with pytest.raises(StoreError, match="no space"):
            graph.freeze(bitmaps)
        stores[failing].mend()
        mark(graph, 1)
        assert [groups(each) for each in bitmaps] == [[0, 1], [0, 1]]
        assert not any(each.busy for each in bitmaps)
        with graph.freeze(bitmaps) as frozen:
            frozen.done()


def test_what_was_said_of_it_is_in_its_repr() -> None:
    graph, a, b = two()
    with graph.freeze([a, b]) as frozen:
        assert isinstance(frozen, Frozen)
        assert repr(frozen) == "<Frozen ['daily', 'daily']>"
        frozen.done(a)
        assert repr(frozen) == "<Frozen ['daily']>"


def test_done_inside_locked_does_not_wait_for_a_write_that_waits_for_it() -> None:
    graph = BlockGraph()
    node = graph.add_node("n", SIZE)
    bitmap = node.add_bitmap("b", G)
    node.mark_dirty(0, 1)
    inside, held = threading.Event(), threading.Event()
    found: list[DirtyBitmap] = []

    def before(*_: object) -> None:
        inside.set()
        held.wait()
        found.append(node.find_bitmap("b"))

    def write() -> None:
        with node.writing(0, 1, before=before):
            pass

    frozen = bitmap.freeze()
    thread = threading.Thread(target=write)
    thread.start()
    inside.wait()
    with graph.locked():
        held.set()
        for end in (frozen.done, frozen.close):
            with pytest.raises(StateError, match=r"outside of graph\.locked"):
                end()
    thread.join()
    assert found == [bitmap]
    frozen.done()
    assert bitmap.count() == G
