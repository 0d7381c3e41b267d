# SPDX-License-Identifier: MIT
"""What holds for every store: bitmaps of nodes survive in it, through the store protocol."""

# ruff: noqa: PT012 (what raises is the end of a transaction)

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from memory_store import Medium, MemoryChange, MemoryStore, MemoryVolume
from stores import PLACES, SIZE, Place
from support import query, silent, transaction, writers

from pybitmap import (
    AbortedError,
    BlockGraph,
    BlockNode,
    BusyError,
    DirtyBitmap,
    ExistsError,
    Frozen,
    HBitmap,
    InconsistentError,
    InvalidError,
    LockedError,
    MismatchError,
    ReadonlyError,
    StateError,
    StoreError,
    UnsupportedError,
    offline,
)
from pybitmap.store import Purpose, Volume, Wanted, probe

pytestmark = pytest.mark.core


@pytest.fixture(params=PLACES, ids=lambda kind: kind.__name__)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    made: Place = request.param(tmp_path)
    return made


@contextmanager
def opened(place: Place, *, medium: int = 0, read_only: bool = False) -> Iterator[BlockNode]:
    """The node of a medium, as a program that starts, and ends in an orderly way, has it."""
    with BlockGraph() as graph:
        size = None if read_only else SIZE
        yield graph.add_node("n", size, place.store(medium), read_only)


def killed(graph: BlockGraph) -> None:
    """As if the process ended now."""
    for node in graph.nodes.values():
        node.close(discard=True)


def state(node: BlockNode) -> list[tuple[object, ...]]:
    """All that is to survive, but for the order."""
    return sorted(
        (each.name, each.granularity, each.enabled, each.reason, list(each.areas()))
        for each in node.bitmaps.values()
    )


# ---- what survives ----------------------------------------------------------


def test_bitmaps_come_back_as_they_were(place: Place) -> None:
    with opened(place) as node:
        for i, granularity in enumerate((512, 4096, 65536, 1 << 20)):
            node.add_bitmap(f"b{i}", granularity, persistent=True, disabled=i == 2)
        node.add_bitmap("ünï", persistent=True)
        node.mark_dirty(1000, 1)
        node.mark_dirty(SIZE - 1, 1)
        node.bitmaps["b2"].set(300_000, 100_000)
        node.bitmaps["b0"].set(0, SIZE)
        node.bitmaps["b1"].disable()
        before, sums = state(node), {each.name: each.sha256() for each in node.bitmaps.values()}
    with opened(place) as node:
        assert state(node) == before
        assert {each.name: each.sha256() for each in node.bitmaps.values()} == sums
        node.mark_dirty(200_000, 1)
        assert not node.bitmaps["b1"].get(200_000)
        assert node.bitmaps["b0"].get(200_000)
        info = query(node)
    names = [each["name"] for each in info]
    newest_first = ["ünï", "b3", "b2", "b1", "b0"]
    assert names == (newest_first if place.keeps_order else newest_first[::-1])
    assert all(each["persistent"] and "inconsistent" not in each for each in info)


def test_only_persistent_bitmaps_are_stored(place: Place) -> None:
    with opened(place) as node:
        node.add_bitmap("gone")
        node.add_bitmap("stays", persistent=True)
    with opened(place) as node:
        assert list(node.bitmaps) == ["stays"]


def test_a_node_without_bitmaps_is_stored_too(place: Place) -> None:
    with opened(place):
        pass
    with opened(place) as node:
        assert (node.size, list(node.bitmaps)) == (SIZE, [])


def test_every_change_survives(place: Place) -> None:
    with opened(place) as node:
        for name in ("merged", "cleared", "enabled", "disabled", "removed", "reset"):
            node.add_bitmap(name, 512, persistent=True, disabled=name == "enabled")
        node.mark_dirty(0, 2048)
    with opened(place) as node:
        source = node.add_bitmap("source", 4096)
        source.set(65536, 1)
        node.bitmaps["merged"].merge(source)
        node.bitmaps["cleared"].clear()
        node.bitmaps["enabled"].enable()
        node.bitmaps["disabled"].disable()
        node.remove_bitmap("removed")
        node.bitmaps["reset"].reset(512, 1024)
        node.remove_bitmap("source")
        node.add_bitmap("removed", 65536, persistent=True)
        before = state(node)
    with opened(place) as node:
        assert state(node) == before
        assert list(node.bitmaps["merged"].areas()) == [(0, 2048), (65536, 4096)]
        assert list(node.bitmaps["reset"].areas()) == [(0, 512), (1536, 512)]


def test_a_flush_stores_and_goes_on(place: Place) -> None:
    with opened(place) as node:
        bitmap = node.add_bitmap("b", 512, persistent=True)
        node.flush()
        node.mark_dirty(0, 1)
        node.flush()
        node.flush()
        node.mark_dirty(4096, 1)
    with opened(place) as node:
        assert list(node.bitmaps["b"].areas()) == [(0, 512), (4096, 512)]
    with pytest.raises(ValueError, match="is closed"):
        node.flush()
    assert bitmap.name == "b"


def test_after_a_kill_a_bitmap_is_exact_or_inconsistent(place: Place) -> None:
    graph = BlockGraph()
    node = graph.add_node("n", SIZE, place.store())
    bitmap = node.add_bitmap("b", 512, persistent=True)
    node.mark_dirty(0, 1)
    node.flush()
    node.mark_dirty(8192, 1)
    killed(graph)
    with opened(place) as node:
        bitmap = node.bitmaps["b"]
        if place.exact_after_kill:
            assert list(bitmap.areas()) == [(0, 512), (8192, 512)]
            assert bitmap.enabled
            assert bitmap.reason is None
            return
        assert (bitmap.inconsistent, bitmap.recording, bitmap.count()) == (True, False, 0)
        assert bitmap.reason
        with pytest.raises(InconsistentError):
            bitmap.clear()
    with opened(place) as node:  # and stays so
        bitmap = node.bitmaps["b"]
        assert bitmap.inconsistent
        bitmap.repair()
        assert (bitmap.count(), bitmap.recording) == ((SIZE + 511) // 512 * 512, True)
        bitmap.reset(0, 4096)
    with opened(place) as node:
        assert not node.bitmaps["b"].inconsistent
        assert list(node.bitmaps["b"].areas()) == [(4096, SIZE - 4096)]
        with pytest.raises(StateError, match="not inconsistent"):
            node.bitmaps["b"].repair()


def test_a_store_lists_what_it_holds(place: Place) -> None:
    """Also beside the node that has it open."""
    with opened(place) as node:
        node.add_bitmap("a", 512, persistent=True)
        node.add_bitmap("b", 4096, persistent=True, disabled=True)
    store = place.store()
    graph = BlockGraph()
    found = []
    for _ in range(3):
        (listed,) = store.entries()
        assert (listed.name, listed.size) == ("n" if place.shared else None, SIZE)
        assert sorted((e.name, e.granularity, e.enabled) for e in listed.bitmaps) == [
            ("a", 512, True),
            ("b", 4096, False),
        ]
        found.append([(each.in_use, bool(each.reason)) for each in listed.bitmaps])
        if graph.nodes:
            killed(graph)
        else:
            graph.add_node("n", SIZE, store)
    lost = not place.exact_after_kill
    assert found == [[(False, False)] * 2, [(True, False)] * 2, [(True, lost)] * 2]
    store.check()


def test_an_inconsistent_bitmap_can_be_removed(place: Place) -> None:
    if place.exact_after_kill:
        pytest.skip("a kill leaves nothing inconsistent here")
    graph = BlockGraph()
    node = graph.add_node("n", SIZE, place.store())
    node.add_bitmap("b", persistent=True)
    killed(graph)
    with opened(place) as node:
        assert node.bitmaps["b"].inconsistent
        node.remove_bitmap("b")
        node.add_bitmap("b", persistent=True)
    with opened(place) as node:
        assert not node.bitmaps["b"].inconsistent


# ---- opening ----------------------------------------------------------------


def test_a_size_is_taken_from_the_store_and_must_not_differ(place: Place) -> None:
    with opened(place) as node:
        node.add_bitmap("b", persistent=True)
    with BlockGraph() as graph:
        assert graph.add_node("n", store=place.store()).size == SIZE
    with BlockGraph() as graph, pytest.raises(MismatchError, match=str(SIZE)):
        graph.add_node("n", 2 * SIZE, place.store())
    with opened(place) as node:  # nothing is left of the attempt
        assert list(node.bitmaps) == ["b"]


def test_a_node_without_bitmaps_has_the_size_of_whoever_opens_it(place: Place) -> None:
    with opened(place):
        pass
    with BlockGraph() as graph:
        if not place.resizes:
            with pytest.raises(MismatchError, match=str(SIZE)):
                graph.add_node("n", 2 * SIZE, place.store())
            return
        graph.add_node("n", 2 * SIZE, place.store()).close(discard=True)
        assert place.store().entries()[0].size == SIZE
    with BlockGraph() as graph:
        node = graph.add_node("n", 2 * SIZE, place.store())
        node.add_bitmap("b", 512, persistent=True).set(2 * SIZE - 1, 1)
    with BlockGraph() as graph:
        node = graph.add_node("n", store=place.store())
        assert list(node.bitmaps["b"].areas()) == [(2 * SIZE - 512, 512)]


def test_a_store_is_known_by_what_is_at_its_path(place: Place, tmp_path: Path) -> None:
    with opened(place) as node:
        node.add_bitmap("b", persistent=True)
        store = place.store()
        assert not store.path or probe(store.path) is type(store)
    assert not store.path or probe(store.path) is type(store)
    raw, empty = tmp_path / "raw", tmp_path / "empty"
    raw.write_bytes(bytes(512))
    empty.mkdir()
    for path in (raw, empty, tmp_path):
        assert not type(store).probe(path)
        assert probe(path) is None
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "none")


def test_what_is_open_is_refused_to_others(place: Place) -> None:
    with opened(place) as node:
        bitmap = node.add_bitmap("b", persistent=True)
        with BlockGraph() as graph, pytest.raises(LockedError):
            graph.add_node("n", SIZE, place.store())
        bitmap.set(0, 1)
    with opened(place) as node:
        assert node.bitmaps["b"].count()


def test_a_read_only_node_reads_and_changes_nothing(place: Place) -> None:
    with opened(place) as node:
        node.add_bitmap("on", persistent=True).set(0, 1)
        node.add_bitmap("off", persistent=True, disabled=True)
        before = state(node)
    with opened(place, read_only=True) as node:
        assert state(node) == before
        on, off = node.bitmaps["on"], node.bitmaps["off"]
        assert on.readonly
        assert on.persistent
        text = "Bitmap '(on|off)' is readonly and cannot be modified"
        with pytest.raises(ReadonlyError, match=text):
            node.mark_dirty(0, 1)
        for change in (on.clear, lambda: on.set(0, 1)):
            with pytest.raises(ReadonlyError, match=text):
                change()
        with pytest.raises(ReadonlyError, match="bitmap 'on': no write access to node 'n'"):
            node.remove_bitmap("on")
        for name in ("new", "on"):  # there or not
            with pytest.raises(UnsupportedError, match=r"persistent bitmap to read-only .* 'n'"):
                node.add_bitmap(name, persistent=True)
        with pytest.raises(ExistsError):
            node.add_bitmap("on")
        on.disable()
        off.enable()
        node.add_bitmap("copy").merge(on)
        assert node.bitmaps["copy"].count() == on.count()
        node.flush()
    with opened(place) as node:
        assert state(node) == before


def test_a_node_without_a_store_has_no_persistent_bitmaps() -> None:
    graph = BlockGraph()
    node = graph.add_node("n", SIZE)
    text = "^Can't store persistent bitmaps to n: Operation not supported$"
    with pytest.raises(UnsupportedError, match=text) as caught:
        node.add_bitmap("b", persistent=True)
    assert isinstance(caught.value, StoreError)
    with pytest.raises(InvalidError, match="needs a size"):
        graph.add_node("m")


# ---- resizing ---------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE // 2, 4 * SIZE])
def test_a_new_size_is_stored_or_refused(place: Place, size: int) -> None:
    with opened(place) as node:
        bitmap = node.add_bitmap("b", 4096, persistent=True)
        node.mark_dirty(0, SIZE)
        if not node.volume or not node.volume.resizable:
            with pytest.raises(UnsupportedError):
                node.truncate(size)
            assert (node.size, bitmap.size) == (SIZE, SIZE)
            return
        node.truncate(size)
        node.mark_dirty(size - 1, 1)
        before = list(bitmap.areas())
        assert bitmap.size == size
    with BlockGraph() as graph:
        node = graph.add_node("n", store=place.store())
        assert node.size == size
        assert list(node.bitmaps["b"].areas()) == before


# ---- transactions -----------------------------------------------------------


def test_a_transaction_is_stored_whole_or_not_at_all(place: Place) -> None:
    with opened(place) as node:
        for name in ("a", "b", "c"):
            node.add_bitmap(name, 512, persistent=True).set(0, 512)
        before = state(node)
        with pytest.raises(AbortedError), transaction(node) as tx:
            tx.remove("n", "a")
            tx.clear("n", "b")
            tx.add("n", "d", persistent=True)
            tx.merge("n", "c", ["d"])
            tx.disable("n", "c")
            node.flush()  # passes over all of that
            tx.abort()
        assert state(node) == before
    with opened(place) as node:
        assert state(node) == before
        with transaction(node) as tx:
            tx.remove("n", "a")
            tx.clear("n", "b")
            tx.add("n", "d", 512, persistent=True)
            tx.merge("n", "d", ["c"])
            tx.disable("n", "c")
        after = state(node)
        assert [each[0] for each in after] == ["b", "c", "d"]
    with opened(place) as node:
        assert state(node) == after


def test_a_bitmap_whose_removal_is_prepared_is_busy_and_not_stored(place: Place) -> None:
    with opened(place) as node:
        bitmap = node.add_bitmap("b", 512, persistent=True)
        with pytest.raises(AbortedError), transaction(node) as tx:
            tx.remove("n", "b")
            assert (bitmap.busy, bitmap.skip_store, bitmap.persistent) == (True, True, False)
            assert node.bitmaps["b"] is bitmap
            node.flush()
            node.mark_dirty(0, 1)
            tx.abort()
        assert (bitmap.busy, bitmap.skip_store, bitmap.persistent) == (False, False, True)
        assert bitmap.count() == 512
    with opened(place) as node:
        assert node.bitmaps["b"].count() == 512


@pytest.mark.parametrize("change", ["enable", "clear", "set", "freeze", "add", "close", "truncate"])
def test_inside_a_transaction_only_its_own_methods_change(place: Place, change: str) -> None:
    with opened(place) as node:
        bitmap = node.add_bitmap("b", 512, persistent=True)
        changes: dict[str, Callable[[], object]] = {
            "enable": bitmap.enable,
            "clear": bitmap.clear,
            "set": lambda: bitmap.set(0, 1),
            "freeze": bitmap.freeze,
            "add": lambda: node.add_bitmap("c"),
            "close": node.close,
            "truncate": lambda: node.truncate(512),
        }
        before = state(node)
        with transaction(node) as tx:
            tx.disable("n", "b")
            with pytest.raises(StateError, match="this thread has a transaction open already"):
                changes[change]()
            tx.enable("n", "b")
        assert state(node) == before


@pytest.mark.parametrize("same_store", [True, False])
@pytest.mark.parametrize("abort", [True, False])
def test_a_bitmap_moves_between_nodes(place: Place, same_store: bool, abort: bool) -> None:
    if same_store and not place.shared:
        pytest.skip("one node per store")

    def nodes(graph: BlockGraph) -> tuple[BlockNode, BlockNode]:
        first = place.store()
        second = first if same_store else place.store(1)
        return graph.add_node("base", SIZE, first), graph.add_node("top", SIZE, second)

    with BlockGraph() as graph:
        base, top = nodes(graph)
        base.add_bitmap("daily", 4096, persistent=True)
        base.mark_dirty(10_000, 1)
        with suppress(AbortedError), graph.transaction() as tx:
            tx.add("top", "daily", 4096, persistent=True)
            tx.merge("top", "daily", [("base", "daily")])
            tx.remove("base", "daily")
            base.mark_dirty(500_000, 1)
            top.mark_dirty(600_000, 1)  # before the bitmap records there
            if abort:
                tx.abort()
        (base if abort else top).mark_dirty(700_000, 1)
        marks = [(each // 4096 * 4096, 4096) for each in (10_000, 500_000, 700_000)]
    with BlockGraph() as graph:
        base, top = nodes(graph)
        assert [list(base.bitmaps), list(top.bitmaps)] == (
            [["daily"], []] if abort else [[], ["daily"]]
        )
        assert list((base if abort else top).bitmaps["daily"].areas()) == marks


# ---- freezing ---------------------------------------------------------------


def test_a_frozen_bitmap_is_stored_with_its_successor(place: Place) -> None:
    with opened(place) as node:
        bitmap = node.add_bitmap("b", 512, persistent=True)
        node.mark_dirty(0, 1)
        with bitmap.freeze() as frozen:
            node.mark_dirty(4096, 1)
            with pytest.raises(BusyError):
                node.remove_bitmap("b")
            node.flush()
            frozen.done()
        assert list(bitmap.areas()) == [(4096, 512)]
        with pytest.raises(ZeroDivisionError), bitmap.freeze():
            node.mark_dirty(0, 1)
            raise ZeroDivisionError
        frozen = bitmap.freeze()
        node.mark_dirty(8192, 1)
        expected = [(0, 512), (4096, 512), (8192, 512)]
    assert not list(frozen)
    with opened(place) as node:
        bitmap = node.bitmaps["b"]
        assert list(bitmap.areas()) == expected
        assert (bitmap.enabled, bitmap.busy) == (True, False)


def test_a_node_may_be_closed_while_a_bitmap_is_frozen(place: Place) -> None:
    with opened(place) as node:
        bitmap = node.add_bitmap("b", 512, persistent=True)
        node.mark_dirty(0, 1)
        with bitmap.freeze():
            node.mark_dirty(4096, 1)
            node.close()
    with opened(place) as node:
        assert list(node.bitmaps["b"].areas()) == [(0, 512), (4096, 512)]


# ---- writers ----------------------------------------------------------------


def test_no_mark_is_lost_beside_all_of_that(place: Place) -> None:
    with opened(place) as node:
        always = node.add_bitmap("always", 512, persistent=True)
        merged = node.add_bitmap("merged", 512, persistent=True)
        with writers(node) as written:
            for _i in range(20):
                node.flush()
                with pytest.raises(ZeroDivisionError), always.freeze():
                    raise ZeroDivisionError
                with transaction(node) as tx:
                    tx.add("n", "guest", 512, persistent=True)
                    tx.merge("n", "merged", ["always"])
                with pytest.raises(AbortedError), transaction(node) as tx:
                    tx.clear("n", "always")
                    tx.disable("n", "merged")
                    tx.remove("n", "guest")
                    tx.abort()
                node.remove_bitmap("guest")
        expected = HBitmap(SIZE, 9)
        for offset in written:
            expected.set(offset, 1)
        assert always.sha256() == merged.sha256() == expected.sha256()
    with opened(place) as node:
        assert node.bitmaps["always"].sha256() == expected.sha256()
        assert node.bitmaps["merged"].sha256() == expected.sha256()


# ---- faults, with the store in memory ---------------------------------------


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(Medium())


CHANGES = {
    "add": ("make", "prepare", "switch"),
    "remove": ("prepare", "switch"),
    "clear": ("make", "prepare", "switch"),
    "merge": ("make", "prepare", "switch"),
    "disable": ("prepare", "switch"),
    "freeze": ("make", "prepare", "switch"),
    "truncate": ("make", "prepare", "switch"),
    "flush": ("prepare", "switch"),
    "close": ("prepare", "switch"),
    "transaction": ("make", "prepare", "switch"),
}


@pytest.mark.parametrize(
    ("change", "step"), [(change, step) for change, steps in CHANGES.items() for step in steps]
)
def test_a_change_that_cannot_be_stored_changes_nothing_and_can_be_retried(
    store: MemoryStore, change: str, step: str
) -> None:
    graph = BlockGraph()
    node = graph.add_node("n", SIZE, store)
    bitmap = node.add_bitmap("b", 512, persistent=True)
    node.add_bitmap("source", 512).set(4096, 1)
    node.mark_dirty(0, 1)
    held: list[Frozen] = []

    def transact() -> None:
        with graph.transaction() as tx:
            tx.disable("n", "b")
            tx.add("n", "c", persistent=True)
            tx.remove("n", "b")

    changes = {
        "add": lambda: node.add_bitmap("c", persistent=True),
        "remove": lambda: node.remove_bitmap("b"),
        "clear": bitmap.clear,
        "merge": lambda: bitmap.merge(node.bitmaps["source"]),
        "disable": bitmap.disable,
        "freeze": lambda: held.append(bitmap.freeze()),
        "truncate": lambda: node.truncate(2 * SIZE),
        "flush": node.flush,
        "close": node.close,
        "transaction": transact,
    }
    before, size = query(node), node.size
    stored = repr(store.medium.nodes)
    store.fail(step)
    with pytest.raises(StoreError, match="no space") as caught:
        changes[change]()
    assert caught.value.errno == 28
    assert (query(node), node.size) == (before, size)
    assert repr(store.medium.nodes) == stored
    node.mark_dirty(12288, 1)  # recorded as before
    assert bitmap.get(12288)
    store.mend()
    changes[change]()
    if change != "close":
        assert (query(node), node.size) != (before, size) or change == "flush"
        node.close()
    with BlockGraph() as graph:
        names = list(graph.add_node("n", store=store).bitmaps)
    assert names == {"add": ["b", "c"], "remove": [], "transaction": ["c"]}.get(change, ["b"])


def test_a_reclaim_that_cannot_be_stored_is_done_in_memory(store: MemoryStore) -> None:
    with BlockGraph() as graph:
        node = graph.add_node("n", SIZE, store)
        bitmap = node.add_bitmap("b", 512, persistent=True)
        frozen = bitmap.freeze()
        node.mark_dirty(0, 1)
        store.fail("switch")
        with pytest.raises(StoreError):
            frozen.close()
        assert (bitmap.count(), bitmap.busy, bitmap.recording) == (512, False, True)
        assert node.volume
        assert node.volume.pending
        store.mend()
        bitmap.disable()
        assert not node.volume.pending


@pytest.mark.parametrize("step", ["prepare", "switch"])
def test_a_freeze_whose_end_cannot_be_stored_puts_everything_back(
    store: MemoryStore, step: str
) -> None:
    with BlockGraph() as graph:
        node = graph.add_node("n", SIZE, store)
        bitmap = node.add_bitmap("b", 512, persistent=True)
        node.mark_dirty(0, 1)
        with pytest.raises(StoreError), bitmap.freeze() as frozen:
            node.mark_dirty(4096, 1)
            store.fail(step)
            frozen.done()
        store.mend()
        assert list(bitmap.areas()) == [(0, 512), (4096, 512)]
        assert (bitmap.busy, bitmap.recording) == (False, True)


def test_a_close_that_fails_leaves_the_others_closed_and_itself_open(store: MemoryStore) -> None:
    other = MemoryStore(Medium())
    graph = BlockGraph()
    node, fine = graph.add_node("n", SIZE, store), graph.add_node("fine", SIZE, other)
    bitmap = node.add_bitmap("b", 512, persistent=True)
    fine.add_bitmap("b", 512, persistent=True)
    store.fail("prepare")
    with pytest.raises(StoreError, match="no space"):
        graph.close()
    node.mark_dirty(0, 1)
    assert bitmap.count() == 512
    with pytest.raises(ValueError, match="is closed"):
        fine.mark_dirty(0, 1)
    with pytest.raises(StoreError):
        graph.remove_node("n")
    assert "n" in graph.nodes
    node.close(discard=True)
    graph.close()
    store.mend()
    with BlockGraph() as graph:
        assert graph.add_node("n", store=store).bitmaps["b"].inconsistent


def test_a_close_that_is_interrupted_behind_its_switch_leaves_nothing_valid(
    store: MemoryStore,
) -> None:
    graph = BlockGraph()
    node = graph.add_node("n", SIZE, store)
    bitmap = node.add_bitmap("b", 512, persistent=True)

    def interrupt(step: str) -> None:
        if step == "switched":
            store.mend()
            raise KeyboardInterrupt

    store.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        node.close()
    node.mark_dirty(0, 1)  # neither waits nor fails, so what is stored must not look valid
    assert bitmap.count() == 512
    killed(graph)
    with BlockGraph() as graph:
        assert graph.add_node("n", store=store).bitmaps["b"].inconsistent


# ---- order across stores ----------------------------------------------------


def in_stores(*stores: MemoryStore) -> list[list[str]]:
    return [
        [stored.name for _, bitmaps in store.medium.nodes.values() for stored in bitmaps]
        for store in stores
    ]


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_bitmap_that_moves_is_never_in_no_store(order: tuple[str, str]) -> None:
    a, b = MemoryStore(Medium()), MemoryStore(Medium())
    seen: list[list[list[str]]] = []
    with BlockGraph() as graph:
        for name in order:  # whichever is touched first
            graph.add_node(name, SIZE, {"a": a, "b": b}[name])
        graph.nodes["a"].add_bitmap("moves", persistent=True)
        graph.nodes["b"].add_bitmap("back", persistent=True)
        for store in (a, b):
            store.fault = lambda step: seen.append(in_stores(a, b))
        with graph.transaction() as tx:
            tx.add("b", "moves", persistent=True)
            tx.add("a", "back", persistent=True)
            tx.remove("a", "moves")
            tx.remove("b", "back")
        for store in (a, b):
            store.mend()
        assert in_stores(a, b) == [["back"], ["moves"]]
    for in_a, in_b in seen:
        assert {"moves", "back"} <= {*in_a, *in_b}


def test_a_later_store_that_fails_stays_pending_and_the_transaction_stands() -> None:
    a, b = MemoryStore(Medium()), MemoryStore(Medium())
    graph = BlockGraph()
    base, top = graph.add_node("base", SIZE, a), graph.add_node("top", SIZE, b)
    base.add_bitmap("b", 512, persistent=True)
    a.fail("switch")
    text = "the transaction is done, but not stored everywhere"
    with pytest.raises(StoreError, match=text), graph.transaction() as tx:
        tx.add("top", "b", 512, persistent=True)
        tx.remove("base", "b")
    assert (list(base.bitmaps), list(top.bitmaps)) == ([], ["b"])
    assert in_stores(a, b) == [["b"], ["b"]]
    with pytest.raises(StoreError, match="no space"):
        base.flush()
    base.add_bitmap("volatile").clear()  # needs no store
    a.mend()
    graph.flush()
    assert in_stores(a, b) == [[], ["b"]]
    graph.close()


def test_a_store_that_is_to_lose_does_not_when_the_one_that_gains_fails() -> None:
    first, gains, loses = (MemoryStore(Medium()) for _ in range(3))
    with BlockGraph() as graph:
        nodes = [graph.add_node(f"n{i}", SIZE, s) for i, s in enumerate((first, gains, loses))]
        nodes[2].add_bitmap("b", persistent=True)
        gains.fail("switch")
        with pytest.raises(StoreError, match="done, but not stored"), graph.transaction() as tx:
            tx.add("n0", "x", persistent=True)
            tx.add("n1", "b", persistent=True)
            tx.remove("n2", "b")
        assert in_stores(first, gains, loses) == [["x"], [], ["b"]]
        gains.mend()
        graph.flush()
        assert in_stores(first, gains, loses) == [["x"], ["b"], []]


def test_a_transaction_whose_first_store_fails_is_as_if_it_never_was() -> None:
    a, b = MemoryStore(Medium()), MemoryStore(Medium())
    with BlockGraph() as graph:
        base, top = graph.add_node("base", SIZE, a), graph.add_node("top", SIZE, b)
        bitmap: DirtyBitmap = base.add_bitmap("b", 512, persistent=True)
        b.fail("switch")
        with pytest.raises(StoreError, match="no space"), graph.transaction() as tx:
            tx.add("top", "b", 512, persistent=True)
            tx.remove("base", "b")
        assert (list(base.bitmaps), list(top.bitmaps)) == (["b"], [])
        assert (bitmap.busy, bitmap.persistent) == (False, True)
        assert in_stores(a, b) == [["b"], []]
        b.mend()
        with pytest.raises(ExistsError):
            base.add_bitmap("b")


def test_what_was_given_up_is_not_told_to_its_store_again() -> None:
    """A node that was pending and closed without storing has no part in what follows."""
    store = MemoryStore(Medium())
    graph = BlockGraph()
    stays, goes = (graph.add_node(name, SIZE, store) for name in ("stays", "goes"))
    goes.add_bitmap("b", persistent=True)
    store.fail("switch")
    with pytest.raises(StoreError, match="no space"):
        goes.add_bitmap("c", persistent=True)
    store.mend()
    goes.close(discard=True)
    stays.add_bitmap("b", persistent=True)
    assert [[each.name for each in node.bitmaps] for node in store.entries()] == [["b"], ["b"]]
    graph.close()


# ---- bitmaps that no program has open ---------------------------------------


OFFLINE: dict[str, Callable[[MemoryStore], None]] = {
    "add": lambda store: offline.add(store, ("n", "new"), silent),
    "add to a new node": lambda store: offline.add(store, ("new", "b"), silent, size=SIZE),
    "add to an empty node": lambda store: offline.add(store, ("none", "b"), silent, size=2 * SIZE),
    "remove": lambda store: offline.remove(store, [("n", "b"), ("m", "b")], silent),
    "clear": lambda store: offline.clear(store, [("n", "b"), ("m", "b")], silent),
    "enable": lambda store: offline.enable(store, [("m", "off")], True, silent),
    "disable": lambda store: offline.enable(store, [("n", "b"), ("m", "b")], False, silent),
    "merge": lambda store: offline.merge(store, ("n", "b"), [("m", "b"), ("n", "c")], silent),
    "take": lambda store: offline.take(store, ("n", "b"), "new", silent),
    "put back": lambda store: offline.put_back(store, ("n", "b"), ("n", "c"), silent),
    "repair": lambda store: offline.repair(store, [("n", "broken")], silent),
}


def two_nodes() -> MemoryStore:
    """With bitmaps of every kind, and a node that has none."""
    medium = Medium()
    with BlockGraph() as graph:
        store = MemoryStore(medium)
        n, m = (graph.add_node(name, SIZE, store) for name in "nm")
        graph.add_node("none", SIZE, store)
        for node, name in ((n, "broken"), (n, "b"), (n, "c"), (m, "b")):
            node.add_bitmap(name, persistent=True).set(0, 512)
        m.add_bitmap("off", persistent=True, disabled=True)
        m.bitmaps["b"].set(8192, 512)
    medium.nodes["n"][1][0].in_use = True
    return MemoryStore(medium)


def everything(store: MemoryStore) -> list[object]:
    return [store.medium.opened, store.entries(), offline.counted(store, silent)]


def usable(store: MemoryStore) -> dict[tuple[str | None, str], tuple[bool, int | None]]:
    return {
        (node.name, each.name): (each.enabled, each.count)
        for node in offline.counted(store, silent)
        for each in node.bitmaps
        if not each.in_use
    }


ALL_DIRTY = (True, -(-SIZE // 4096) * 4096)


@pytest.mark.parametrize("change", OFFLINE.values(), ids=OFFLINE)
def test_a_change_that_no_program_sees_leaves_nothing_open(
    change: Callable[[MemoryStore], None],
) -> None:
    store = two_nodes()
    before = everything(store)
    change(store)
    assert everything(store) != before
    assert not store.medium.opened
    used = [each.name for node in store.entries() for each in node.bitmaps if each.in_use]
    assert used in ([], ["broken"])


@pytest.mark.parametrize("kind", [StoreError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["make", "prepare", "switch", "switched"])
@pytest.mark.parametrize("change", OFFLINE.values(), ids=OFFLINE)
def test_a_change_that_no_program_sees_is_done_or_leaves_all_as_it_was(
    change: Callable[[MemoryStore], None], step: str, kind: type[BaseException]
) -> None:
    """One step fails, whichever, and what closes the nodes then does not.

    If nobody knows whether a switch came through, a node that is new may stay, without bitmaps, and
    a bitmap be repaired, as all dirty is right in either case.
    """
    for nth in range(10):
        store = two_nodes()
        before = everything(store)
        left = nth

        def fault(now: str) -> None:
            nonlocal left
            left -= now == step
            if now == step and left == -1:
                raise kind("no space")

        store.fault = fault
        try:
            change(store)
        except kind:
            store.mend()
            if step in ("make", "prepare"):
                assert everything(store) == before
            assert not store.medium.opened
            after = usable(store)
            assert after.pop(("n", "broken"), ALL_DIRTY) == ALL_DIRTY
            assert after == usable(two_nodes())
            continue
        assert left >= 0
        return
    raise AssertionError("it never succeeds")


class Telling(MemoryStore):
    """Says what it does."""

    def open(self, node: str, size: int | None, *, read_only: bool) -> MemoryVolume:
        self._tell("loading")
        return super().open(node, size, read_only=read_only)

    def prepare(self, wanted: Mapping[Volume, Wanted], purpose: Purpose) -> MemoryChange:
        self._tell("storing")
        return super().prepare(wanted, purpose)

    def _tell(self, what: str) -> None:
        assert self.progress is not None
        self.progress(what, 0, None)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_progress_stops_a_change_until_all_is_loaded(
    number: int, kind: type[BaseException]
) -> None:
    store = two_nodes()
    before = everything(store)
    told = []

    def progress(what: str, done: int, total: int | None) -> None:
        told.append(what)
        if len(told) == number:
            raise kind

    names = [("n", "b"), ("m", "b")]
    if number < 3:
        with pytest.raises(kind):
            offline.clear(Telling(store.medium), names, progress)
        assert everything(store) == before
    else:
        offline.clear(Telling(store.medium), names, progress)
        assert told == ["loading", "loading", "storing"]
        assert [usable(store)[name] for name in names] == [(True, 0)] * 2


def test_sources_of_another_store_are_only_read(tmp_path: Path) -> None:
    """Of a node of the same name, too."""
    target, source = two_nodes(), two_nodes()
    before = everything(source)
    source.fault = lambda step: pytest.fail(f"{step} of what is only read")
    offline.merge(target, ("n", "b"), [("m", "b"), ("n", "c")], silent, source)
    with offline.areas(target, ("n", "b"), silent) as found:
        assert list(found) == [(0, 4096), (8192, 4096)]
    assert everything(source) == before
    with pytest.raises(InconsistentError, match=r"^Bitmap 'broken' is inconsistent .* in use"):
        offline.merge(target, ("n", "b"), [("n", "broken")], silent, source)
    assert everything(source) == before
