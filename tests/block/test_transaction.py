# SPDX-License-Identifier: MIT
"""Transactions: every action, on bitmaps in every state, with a commit and an abort everywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from support import publish, set_flag, writers

from pybitmap import (
    AbortedError,
    BitmapError,
    BlockGraph,
    BusyError,
    ExistsError,
    HBitmap,
    NotFoundError,
    StateError,
    Transaction,
    _core,
)
from pybitmap.qmp import bitmap_info

pytestmark = pytest.mark.core

SIZE = 1 << 20

Action = Callable[[Transaction], object]
ACTIONS: dict[str, Action] = {
    "add": lambda tx: tx.add("n", "new", 512),
    "add elsewhere": lambda tx: tx.add("m", "b", 512, disabled=True),
    "remove": lambda tx: tx.remove("n", "b"),
    "remove other": lambda tx: tx.remove("n", "other"),
    "clear": lambda tx: tx.clear("n", "b"),
    "enable": lambda tx: tx.enable("n", "b"),
    "disable": lambda tx: tx.disable("n", "b"),
    "merge into": lambda tx: tx.merge("n", "b", ["other", ("m", "far")]),
    "merge from": lambda tx: tx.merge("m", "far", [("n", "b")]),
}
FLAGS = ("enabled", "busy", "readonly", "inconsistent", "skip_store")


def a_graph(states: dict[str, bool]) -> BlockGraph:
    """Two nodes; the bitmap `b` of `n` is in the state under test."""
    graph = BlockGraph()
    node, far = graph.add_node("n", SIZE), graph.add_node("m", SIZE)
    first = node.add_bitmap("first", 4096)
    bitmap = node.add_bitmap("b", 4096)
    node.add_bitmap("other", 65536).set(131072, 1)
    far.add_bitmap("far", 512).set(524288, 1)
    bitmap.set(0, 1)
    first.set(8192, 1)
    for flag, value in states.items():
        set_flag(bitmap, flag, value)
    publish(node)
    return graph


def snapshot(graph: BlockGraph) -> Any:
    """All that can be told of a graph, but for who would record a write: see `probe`."""
    return [
        (
            node.name,
            node.size,
            [
                (bitmap_info(bitmap), *(getattr(bitmap, flag) for flag in FLAGS), bitmap.sha256())
                for bitmap in node.bitmaps.values()
            ],
        )
        for node in graph.nodes.values()
    ]


def probe(graph: BlockGraph) -> Any:
    """What a write changes on each node."""
    for node in graph.nodes.values():
        for bitmap in node.bitmaps.values():
            set_flag(bitmap, "readonly", False)
        publish(node)
        node.mark_dirty(SIZE - 1, 1)
    return snapshot(graph)


def states() -> list[dict[str, bool]]:
    combinations = itertools.product([False, True], repeat=len(FLAGS))
    return [
        dict(zip(FLAGS, values))
        for values in combinations
        if not (values[0] and values[3])  # an inconsistent bitmap is never enabled
    ]


def attempt(graph: BlockGraph, actions: list[Action]) -> BitmapError | None:
    try:
        with graph.transaction() as tx:
            for action in actions:
                action(tx)
    except BitmapError as error:
        return error
    return None


def one_by_one(graph: BlockGraph, action: str) -> BitmapError | None:
    """The same without a transaction."""
    node, far = graph.nodes["n"], graph.nodes["m"]
    bitmap = node.bitmaps["b"]
    calls: dict[str, Callable[[], object]] = {
        "add": lambda: node.add_bitmap("new", 512),
        "add elsewhere": lambda: far.add_bitmap("b", 512, disabled=True),
        "remove": lambda: node.remove_bitmap("b"),
        "remove other": lambda: node.remove_bitmap("other"),
        "clear": bitmap.clear,
        "enable": bitmap.enable,
        "disable": bitmap.disable,
        "merge into": lambda: bitmap.merge(node.bitmaps["other"], far.bitmaps["far"]),
        "merge from": lambda: far.bitmaps["far"].merge(bitmap),
    }
    try:
        calls[action]()
    except BitmapError as error:
        return error
    return None


@pytest.mark.parametrize("action", ACTIONS)
def test_one_action_does_what_it_does_outside(action: str) -> None:
    for state in states():
        inside, outside = a_graph(state), a_graph(state)
        error, expected = attempt(inside, [ACTIONS[action]]), one_by_one(outside, action)
        assert (type(error), str(error)) == (type(expected), str(expected)), state
        assert snapshot(inside) == snapshot(outside), state
        assert probe(inside) == probe(outside), state


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_an_abort_at_every_position_leaves_the_graph_as_it_was(length: int) -> None:
    for state in states() if length < 3 else [{"enabled": True}, {"enabled": False}]:
        before, probed = snapshot(a_graph(state)), probe(a_graph(state))
        for names in itertools.product(ACTIONS, repeat=length):
            graph = a_graph(state)
            error = attempt(graph, [*(ACTIONS[name] for name in names), Transaction.abort])
            assert isinstance(error, BitmapError), (state, names)
            assert snapshot(graph) == before, (state, names)
            assert probe(graph) == probed, (state, names)


def test_an_exception_of_the_callers_aborts_too() -> None:
    graph = a_graph({})
    before = snapshot(graph)

    def fail() -> None:
        with graph.transaction() as tx:
            tx.clear("n", "b")
            tx.remove("n", "other")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert snapshot(graph) == before


def test_the_abort_action_says_so() -> None:
    error = attempt(a_graph({}), [Transaction.abort])
    assert isinstance(error, AbortedError)
    assert str(error) == "Transaction aborted using Abort action"


def test_a_failure_that_the_caller_swallows_aborts_all_the_same() -> None:
    graph = a_graph({})
    before = snapshot(graph)

    def swallow() -> None:
        with graph.transaction() as tx:
            tx.clear("n", "b")
            with pytest.raises(NotFoundError):
                tx.clear("n", "missing")
            assert snapshot(graph) == before
            with pytest.raises(AbortedError):
                tx.enable("n", "b")

    with pytest.raises(AbortedError):
        swallow()
    assert snapshot(graph) == before


# ---- what later actions see -------------------------------------------------


def test_a_bitmap_that_is_to_be_removed_keeps_its_name_and_is_busy() -> None:
    graph = a_graph({"persistent": True})
    bitmap = graph.nodes["n"].bitmaps["b"]
    with graph.transaction() as tx:
        tx.remove("n", "b")
        assert (bitmap.busy, bitmap.skip_store, bitmap.persistent) == (True, True, False)
        assert bitmap_info(bitmap)["busy"]
        graph.nodes["n"].mark_dirty(65536, 1)
        assert bitmap.count() == 8192
    assert "b" not in graph.nodes["n"].bitmaps


@pytest.mark.parametrize("second", ["clear", "enable", "disable", "merge into", "merge from"])
def test_no_later_action_touches_what_is_to_be_removed(second: str) -> None:
    error = attempt(a_graph({}), [ACTIONS["remove"], ACTIONS[second]])
    assert isinstance(error, BusyError)
    assert str(error) == ("Bitmap 'b' is currently in use by another operation and cannot be used")


def test_the_name_of_what_is_to_be_removed_is_taken() -> None:
    error = attempt(a_graph({}), [ACTIONS["remove"], lambda tx: tx.add("n", "b")])
    assert isinstance(error, ExistsError)
    assert str(error) == "Bitmap already exists: b"


def test_what_was_added_can_be_merged_into_and_removed() -> None:
    graph = a_graph({})
    actions: list[Action] = [
        ACTIONS["add"],
        lambda tx: tx.merge("n", "new", ["b"]),
        lambda tx: tx.merge("m", "far", [("n", "new")]),
        lambda tx: tx.remove("n", "new"),
    ]
    assert attempt(graph, actions) is None
    assert list(graph.nodes["n"].bitmaps) == ["first", "b", "other"]
    assert list(graph.nodes["m"].bitmaps["far"].areas()) == [(0, 4096), (524288, 512)]


def test_a_merge_takes_what_an_earlier_clear_left() -> None:
    graph = a_graph({})
    assert attempt(graph, [ACTIONS["clear"], ACTIONS["merge from"]]) is None
    assert graph.nodes["m"].bitmaps["far"].count() == 512


def test_clear_and_merge_in_turn_end_as_the_last_has_it() -> None:
    graph = a_graph({})
    bitmap = graph.nodes["n"].bitmaps["b"]
    assert attempt(graph, [ACTIONS["merge into"], ACTIONS["clear"]]) is None
    assert bitmap.count() == 0
    bitmap.set(0, 1)
    assert attempt(graph, [ACTIONS["clear"], ACTIONS["merge into"]]) is None
    assert list(bitmap.areas()) == [(131072, 65536), (524288, 4096)]


def test_flags_change_at_once_and_recording_at_the_commit() -> None:
    graph = a_graph({"enabled": False})
    node = graph.nodes["n"]
    bitmap, other = node.bitmaps["b"], node.bitmaps["other"]
    with graph.transaction() as tx:
        tx.enable("n", "b")
        tx.disable("n", "other")
        assert (bitmap.enabled, bitmap.recording, other.recording) == (True, True, False)
        tx.clear("n", "first")  # publishes
        node.mark_dirty(524288, 1)
    assert (bitmap.count(), other.count()) == (4096, 131072)
    node.mark_dirty(SIZE - 1, 1)
    assert (bitmap.count(), other.count()) == (8192, 131072)


def test_a_write_within_the_block_is_before_the_instant() -> None:
    for end in ("commit", "abort"):
        for action in ("clear", "merge into"):
            graph = a_graph({})
            node = graph.nodes["n"]
            with suppress(AbortedError), graph.transaction() as tx:
                ACTIONS[action](tx)
                node.mark_dirty(SIZE - 1, 1)
                if end == "abort":
                    tx.abort()
            cleared = (end, action) == ("commit", "clear")
            assert node.bitmaps["b"].get(SIZE - 1) != cleared, (end, action)


def test_a_bitmap_moves_to_another_node() -> None:
    graph = a_graph({})
    move: list[Action] = [
        lambda tx: tx.add("m", "b", 4096),
        lambda tx: tx.merge("m", "b", [("n", "b")]),
        lambda tx: tx.remove("n", "b"),
    ]
    before = snapshot(graph)
    assert attempt(graph, [*move, Transaction.abort]) is not None
    assert snapshot(graph) == before
    assert attempt(graph, move) is None
    assert "b" not in graph.nodes["n"].bitmaps
    assert list(graph.nodes["m"].bitmaps["b"].areas()) == [(0, 4096)]


# ---- errors -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (lambda tx: tx.add("x", "b"), "Cannot find device='x' nor node-name='x'"),
        (lambda tx: tx.clear("x", "b"), "Node 'x' not found"),
        (lambda tx: tx.enable("n", "x"), "Dirty bitmap 'x' not found"),
        (lambda tx: tx.merge("n", "b", [("x", "b")]), "Node 'x' not found"),
        (lambda tx: tx.merge("n", "b", ["other", "x"]), "Dirty bitmap 'x' not found"),
    ],
)
def test_what_is_not_there_is_told_in_qemus_words(action: Action, text: str) -> None:
    error = attempt(a_graph({}), [action])
    assert isinstance(error, NotFoundError)
    assert str(error) == text


def test_a_second_transaction_in_one_thread_is_refused() -> None:
    graph = BlockGraph()

    def twice() -> None:
        with graph.transaction(), graph.transaction():
            pass

    with pytest.raises(StateError):
        twice()
    with graph.transaction():
        pass


@pytest.mark.parametrize("calls", range(9))
def test_without_memory_nothing_changes(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """For any of the sets of the commit: four for each of two nodes."""
    graph = a_graph({})
    before, left = snapshot(graph), calls
    real = _core.hbtracker_set_alloc

    def scarce(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError
        return real(*args)

    actions = [ACTIONS[name] for name in ("add", "clear", "merge from", "remove other")]
    with monkeypatch.context() as patch:
        patch.setattr(_core, "hbtracker_set_alloc", scarce)
        try:
            assert attempt(graph, actions) is None
        except MemoryError:
            assert calls < 8
            assert snapshot(graph) == before
            # What was dropped may go on being marked, what is there has to be.
            graph.nodes["n"].mark_dirty(SIZE - 1, 1)
            assert graph.nodes["n"].bitmaps["b"].get(SIZE - 1)
        else:
            assert calls == 8
    publish(graph.nodes["n"])


# ---- threads ----------------------------------------------------------------


def test_no_write_is_lost_beside_transactions_that_commit_and_abort() -> None:
    graph = BlockGraph()
    node = graph.add_node("n", SIZE)
    always, merged = node.add_bitmap("always", 512), node.add_bitmap("merged", 512)
    aborted = node.add_bitmap("aborted", 512)
    with writers(node) as written:
        for _ in range(150):
            commit: list[Action] = [
                lambda tx: tx.add("n", "guest", 512),
                lambda tx: tx.merge("n", "merged", ["guest"]),
                lambda tx: tx.disable("n", "guest"),
            ]
            abort: list[Action] = [
                lambda tx: tx.clear("n", "aborted"),
                lambda tx: tx.disable("n", "aborted"),
                lambda tx: tx.remove("n", "aborted"),
                Transaction.abort,
            ]
            assert attempt(graph, commit) is None
            guest = node.bitmaps["guest"]
            count = guest.count()
            assert isinstance(attempt(graph, abort), AbortedError)
            assert guest.count() == count
            assert attempt(graph, [lambda tx: tx.remove("n", "guest")]) is None
    expected = HBitmap(SIZE, 9)
    for offset in written:
        expected.set(offset, 1)
    for bitmap in (always, merged, aborted):
        assert bitmap.sha256() == expected.sha256(), bitmap
