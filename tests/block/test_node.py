# SPDX-License-Identifier: MIT
"""Nodes: the path of a write, bitmaps that come and go, and truncation."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import publish, query, set_flag, writers

from pybitmap import (
    BlockGraph,
    BlockNode,
    ClosedError,
    DirtyBitmap,
    ExistsError,
    HBitmap,
    InvalidError,
    NotFoundError,
    RangeError,
    ReadonlyError,
    UnsupportedError,
    _core,
)
from pybitmap.store import LocalStore

pytestmark = pytest.mark.core

SIZE = 1 << 20


@pytest.fixture
def graph() -> BlockGraph:
    return BlockGraph()


@pytest.fixture
def node(graph: BlockGraph) -> BlockNode:
    return graph.add_node("n", SIZE)


# ---- adding, looking up, removing -------------------------------------------


@pytest.mark.parametrize(
    ("name", "granularity", "text"),
    [
        ("", None, "Bitmap name cannot be empty"),
        ("", 100, "Bitmap name cannot be empty"),
        ("b", 0, "Granularity must be power of 2 and at least 512"),
        ("b", 256, "Granularity must be power of 2 and at least 512"),
        ("b", 4097, "Granularity must be power of 2 and at least 512"),
        ("there", None, "Bitmap already exists: there"),
        ("x\udcff", None, r"Bitmap name is no valid Unicode: 'x\udcff'"),
        ("x" * 1024, None, f"Bitmap name too long: {'x' * 1024}"),
        ("ü" * 512, None, f"Bitmap name too long: {'ü' * 512}"),
    ],
)
def test_a_bitmap_that_cannot_be_is_refused_in_qemus_words(
    node: BlockNode, name: str, granularity: int | None, text: str
) -> None:
    node.add_bitmap("there")
    with pytest.raises(InvalidError) as caught:
        node.add_bitmap(name, granularity)
    assert str(caught.value) == text
    assert list(node.bitmaps) == ["there"]


def test_the_longest_name_is_accepted(node: BlockNode) -> None:
    assert node.add_bitmap("x" * 1023).name == "x" * 1023


def test_a_taken_name_is_told_apart(node: BlockNode) -> None:
    node.add_bitmap("b")
    with pytest.raises(ExistsError):
        node.add_bitmap("b")


def test_a_node_that_stores_nothing_has_no_persistent_bitmaps(node: BlockNode) -> None:
    with pytest.raises(UnsupportedError) as caught:
        node.add_bitmap("b", persistent=True)
    assert str(caught.value) == "Can't store persistent bitmaps to n: Operation not supported"


def test_the_default_granularity_is_64_kib(node: BlockNode) -> None:
    assert node.add_bitmap("b").granularity == 65536


def test_what_is_not_there_is_not_found_in_qemus_words(graph: BlockGraph, node: BlockNode) -> None:
    with pytest.raises(NotFoundError) as caught:
        node.find_bitmap("b")
    assert str(caught.value) == "Dirty bitmap 'b' not found"
    with pytest.raises(NotFoundError) as caught:
        node.remove_bitmap("b")
    with pytest.raises(NotFoundError) as caught:
        graph.find_node("m")
    assert str(caught.value) == "Node 'm' not found"


def test_bitmaps_are_a_mapping_that_cannot_be_written(node: BlockNode) -> None:
    bitmap = node.add_bitmap("b")
    assert node.bitmaps["b"] is bitmap
    assert node.find_bitmap("b") is bitmap
    with pytest.raises(TypeError):
        node.bitmaps["c"] = bitmap  # type: ignore[index]


def test_a_query_lists_the_newest_first(node: BlockNode) -> None:
    for name in ("a", "b", "c"):
        node.add_bitmap(name)
    assert [info["name"] for info in query(node)] == ["c", "b", "a"]


def test_a_removed_bitmap_frees_its_name_and_records_no_more(node: BlockNode) -> None:
    old = node.add_bitmap("b")
    node.remove_bitmap("b")
    new = node.add_bitmap("b")
    node.mark_dirty(0, 1)
    assert (old.count(), new.count()) == (0, 65536)
    assert (old.recording, new.recording) == (False, True)


@pytest.mark.parametrize("frozen", [False, True])
def test_of_a_closed_node_no_bitmap_says_that_it_records(frozen: bool) -> None:
    node = BlockGraph().add_node("n", SIZE)
    bitmap = node.add_bitmap("b")
    held = bitmap.freeze() if frozen else None
    node.close()
    assert not bitmap.recording
    assert "recording" not in repr(bitmap)
    if held is not None:
        held.close()


@pytest.mark.parametrize("change", ["add", "remove", "disable", "freeze", "thaw"])
def test_without_memory_to_publish_nothing_changes(
    node: BlockNode, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    node.add_bitmap("a")
    bitmap = node.add_bitmap("b")
    if change == "thaw":
        frozen = bitmap.freeze()
    before = query(node)
    changes: dict[str, Callable[[], object]] = {
        "add": lambda: node.add_bitmap("c"),
        "remove": lambda: node.remove_bitmap("a"),
        "disable": bitmap.disable,
        "freeze": bitmap.freeze,
        "thaw": lambda: frozen.close(),
    }

    def no_memory(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(_core, "hbtracker_set_alloc", no_memory)
        with pytest.raises(MemoryError):
            changes[change]()
    assert query(node) == before
    node.mark_dirty(0, 1)
    if change == "thaw":
        frozen.close()
    assert [each.count() for each in node.bitmaps.values()] == [65536, 65536]


# ---- writes -----------------------------------------------------------------


def test_a_write_is_marked_in_every_enabled_bitmap(node: BlockNode) -> None:
    fine, coarse = node.add_bitmap("fine", 512), node.add_bitmap("coarse", 65536)
    off = node.add_bitmap("off", disabled=True)
    node.mark_dirty(1000, 100)
    assert list(fine.areas()) == [(512, 1024)]
    assert list(coarse.areas()) == [(0, 65536)]
    assert off.count() == 0


def test_many_writes_are_marked_at_once(node: BlockNode) -> None:
    bitmap = node.add_bitmap("b", 512)
    node.mark_dirty_many(array("Q", range(0, SIZE, 64)), array("Q", [1]) * (SIZE // 64))
    assert bitmap.count() == SIZE


@pytest.mark.parametrize(
    ("offset", "length"), [(SIZE, 1), (0, SIZE + 1), (-1, 1), (0, -1), (2**64, 1)]
)
def test_a_write_that_is_not_inside_is_refused(node: BlockNode, offset: int, length: int) -> None:
    bitmap = node.add_bitmap("b")
    with pytest.raises(RangeError, match=f"{offset}.* is not inside node 'n' of {SIZE} bytes"):
        node.mark_dirty(offset, length)
    assert bitmap.count() == 0


def test_of_many_writes_with_one_outside_none_is_marked(node: BlockNode) -> None:
    bitmap = node.add_bitmap("b")
    with pytest.raises(RangeError):
        node.mark_dirty_many(array("Q", [0, SIZE]), array("Q", [1, 1]))
    with pytest.raises(InvalidError):
        node.mark_dirty_many(array("Q", [0, 1]), array("Q", [1]))
    assert bitmap.count() == 0


@pytest.mark.parametrize("bad", ["1", 1.0, None])
def test_a_write_of_no_integer_is_a_type_error(node: BlockNode, bad: object) -> None:
    with pytest.raises(TypeError):
        node.mark_dirty(bad, 1)  # type: ignore[arg-type]


def test_an_empty_write_marks_nothing(node: BlockNode) -> None:
    bitmap = node.add_bitmap("b")
    node.mark_dirty(0, 0)
    assert bitmap.count() == 0


def test_a_readonly_bitmap_makes_writes_fail(node: BlockNode) -> None:
    bitmap = node.add_bitmap("b")
    set_flag(bitmap, "readonly", True)
    publish(node)
    with pytest.raises(ReadonlyError) as caught:
        node.mark_dirty(0, 1)
    assert str(caught.value) == "Bitmap 'b' is readonly and cannot be modified"


def test_a_read_only_node_is_not_written_to(graph: BlockGraph) -> None:
    node = graph.add_node("ro", SIZE, read_only=True)
    bitmap = node.add_bitmap("b")
    bitmap.disable()
    bitmap.enable()
    with pytest.raises(ReadonlyError):
        node.mark_dirty(0, 1)


# ---- truncation -------------------------------------------------------------


def test_truncation_takes_all_bitmaps_along_frozen_ones_too(node: BlockNode) -> None:
    a, b = node.add_bitmap("a", 512), node.add_bitmap("b", 4096)
    node.mark_dirty(SIZE - 1, 1)
    frozen = b.freeze()
    node.mark_dirty(0, 1)
    node.truncate(2 * SIZE)
    node.mark_dirty(2 * SIZE - 1, 1)
    frozen.close()
    assert node.size == a.size == b.size == 2 * SIZE
    assert [offset for offset, _ in a.areas()] == [0, SIZE - 512, 2 * SIZE - 512]
    assert [offset for offset, _ in b.areas()] == [0, SIZE - 4096, 2 * SIZE - 4096]
    node.truncate(1000)
    assert list(a.areas()) == [(0, 512)]
    with pytest.raises(RangeError):
        node.mark_dirty(1000, 1)


@pytest.mark.parametrize(
    ("stored", "closed"), [(False, "never"), (True, "never"), (True, "small"), (True, "large")]
)
def test_what_is_cut_off_and_comes_back_is_dirty_and_what_is_new_is_not(
    tmp_path: Path, stored: bool, closed: str
) -> None:
    """It reads as zeroes then, while a backup has what was there."""
    store = LocalStore(tmp_path / "store") if stored else None
    node = BlockGraph().add_node("n", SIZE, store)

    def again(when: str) -> BlockNode:
        if closed != when:
            return node
        node.close()
        return BlockGraph().add_node("n", None, LocalStore(tmp_path / "store"))

    for name in ("recording", "frozen", "off"):
        node.add_bitmap(name, 512, persistent=stored, disabled=name == "off")
    node.truncate(2 * SIZE)
    assert node.bitmaps["recording"].count() == 0
    node.truncate(SIZE + 100)
    node.truncate(1000)
    node = again("small")
    assert node.bitmaps["recording"].count() == 0
    frozen = node.bitmaps["frozen"].freeze()
    node.truncate(SIZE)
    node.bitmaps["recording"].reset(SIZE - 512, 512)
    node = again("large")
    assert list(node.bitmaps["recording"].areas()) == [(512, SIZE - 1024)]
    node.truncate(4 * SIZE)
    assert list(node.bitmaps["recording"].areas()) == [(512, SIZE - 1024), (SIZE, SIZE)]
    if closed != "large":
        assert node.bitmaps["frozen"].count() == 0  # it is constant
        frozen.close()
    assert list(node.bitmaps["frozen"].areas()) == [(512, 2 * SIZE - 512)]
    assert node.bitmaps["off"].count() == 0
    node.close()


def test_what_was_cut_off_before_there_were_bitmaps_comes_back_clean(node: BlockNode) -> None:
    node.truncate(512)
    bitmap = node.add_bitmap("b", 512)
    node.truncate(SIZE)
    assert bitmap.count() == 0


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE])
def test_a_truncation_that_is_refused_changes_nothing(
    node: BlockNode, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = node.add_bitmap("a", 512), node.add_bitmap("b", 512)
    node.mark_dirty(0, SIZE)
    copies, copy = [0], HBitmap.copy

    def fails_at_the_second(content: HBitmap) -> HBitmap:
        copies[0] += 1
        if copies[0] == 2:
            raise MemoryError
        return copy(content)

    monkeypatch.setattr(HBitmap, "copy", fails_at_the_second)
    with pytest.raises(MemoryError):
        node.truncate(size)
    monkeypatch.undo()
    assert node.size == first.size == second.size == SIZE
    assert first.count() == second.count() == SIZE
    node.mark_dirty(SIZE - 1, 1)
    for bad in (-1, 2**63):
        with pytest.raises(InvalidError):
            node.truncate(bad)
    assert node.size == SIZE


def test_a_write_waits_for_a_truncation_and_is_not_lost(node: BlockNode) -> None:
    bitmap = node.add_bitmap("b", 512)
    done = threading.Event()

    def grow() -> None:
        while not done.is_set():
            node.truncate(node.size + 512)

    thread = threading.Thread(target=grow)
    thread.start()
    for offset in range(0, SIZE, 512):
        node.mark_dirty(offset, 1)
    done.set()
    thread.join()
    assert bitmap.count() == SIZE


# ---- life -------------------------------------------------------------------


def test_nodes_have_unique_names_and_sizes_that_can_be(graph: BlockGraph, node: BlockNode) -> None:
    with pytest.raises(ExistsError):
        graph.add_node("n", SIZE)
    with pytest.raises(InvalidError):
        graph.add_node("", SIZE)
    for size in (-1, 2**63):
        with pytest.raises(InvalidError):
            graph.add_node("m", size)
    assert list(graph.nodes) == ["n"]


@pytest.mark.parametrize("store", ["disks.bitmaps", Path("disks.bitmaps"), LocalStore])
def test_what_is_no_store_is_told(graph: BlockGraph, store: Any) -> None:
    with pytest.raises(TypeError, match=f"or a Qcow2Store, not {type(store).__name__}"):
        graph.add_node("m", SIZE, store)
    assert list(graph.nodes) == []


def test_leaving_the_graph_closes_its_nodes() -> None:
    with BlockGraph() as graph:
        node = graph.add_node("n", SIZE)
        bitmap = node.add_bitmap("b")
    assert not node.bitmaps
    for call in (
        lambda: node.mark_dirty(0, 1),
        lambda: node.add_bitmap("c"),
        lambda: node.find_bitmap("b"),
        lambda: node.truncate(5),
    ):
        with pytest.raises(ClosedError):
            call()
    with pytest.raises(NotFoundError):
        bitmap.enable()
    graph.close()
    node.close()


def test_a_removed_node_frees_its_name(graph: BlockGraph, node: BlockNode) -> None:
    graph.remove_node("n")
    assert graph.add_node("n", SIZE) is not node
    with pytest.raises(NotFoundError):
        graph.remove_node("m")


# ---- threads ----------------------------------------------------------------


def test_no_write_is_lost_and_none_appears_in_a_frozen_bitmap(node: BlockNode) -> None:
    """Writers mark while bitmaps are added, removed, disabled, frozen and given back."""
    always = node.add_bitmap("always", 512)
    frozen = node.add_bitmap("frozen", 512)
    with writers(node) as written:
        for turn in range(150):
            guest = node.add_bitmap("guest", 512)
            check_frozen(frozen, succeed=turn % 3 == 0)
            guest.disable()
            count = guest.count()
            assert guest.count() == count
            node.remove_bitmap("guest")
    assert {offset for offset, _ in areas_of_512(always)} == written


def check_frozen(bitmap: DirtyBitmap, succeed: bool) -> None:
    try:
        with bitmap.freeze() as frozen:
            before = bitmap.sha256()
            for _ in range(20):
                assert bitmap.sha256() == before
            if not succeed:
                raise InterruptedError
            frozen.done()
    except InterruptedError:
        pass


def areas_of_512(bitmap: DirtyBitmap) -> list[tuple[int, int]]:
    return [
        (offset, 512)
        for start, nbytes in bitmap.areas()
        for offset in range(start, start + nbytes, 512)
    ]
