# SPDX-License-Identifier: MIT
"""Named bitmaps: what their flags forbid, in whose words, and how they are frozen."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
from support import set_flag

from pybitmap import (
    BitmapError,
    BlockGraph,
    BlockNode,
    BusyError,
    DirtyBitmap,
    InconsistentError,
    InvalidError,
    MismatchError,
    NotFoundError,
    RangeError,
    ReadonlyError,
    StateError,
)
from pybitmap.qmp import bitmap_info

pytestmark = pytest.mark.core

SIZE = 1 << 20


@pytest.fixture
def node() -> BlockNode:
    return BlockGraph().add_node("n", SIZE)


@pytest.fixture
def bitmap(node: BlockNode) -> DirtyBitmap:
    return node.add_bitmap("b", 4096)


def flagged(bitmap: DirtyBitmap, flag: str) -> DirtyBitmap:
    """With a flag that so far only a store sets."""
    set_flag(bitmap, flag, True)
    return bitmap


# ---- what flags forbid ------------------------------------------------------

BUSY = "Bitmap 'b' is currently in use by another operation and cannot be used"
READONLY = "Bitmap 'b' is readonly and cannot be modified"
INCONSISTENT = "Bitmap 'b' is inconsistent and cannot be used"
NO_REMOVAL = "Cannot remove persistent bitmap 'b': no write access to node 'n'"

ACTIONS: dict[str, Callable[[BlockNode, DirtyBitmap], object]] = {
    "enable": lambda node, bitmap: bitmap.enable(),
    "disable": lambda node, bitmap: bitmap.disable(),
    "clear": lambda node, bitmap: bitmap.clear(),
    "set": lambda node, bitmap: bitmap.set(0, 1),
    "set_many": lambda node, bitmap: bitmap.set_many(array("Q", [0]), array("Q", [1])),
    "reset": lambda node, bitmap: bitmap.reset(0, 4096),
    "merge into": lambda node, bitmap: bitmap.merge(node.bitmaps["other"]),
    "merge from": lambda node, bitmap: node.bitmaps["other"].merge(bitmap),
    "freeze": lambda node, bitmap: bitmap.freeze().close(),
    "remove": lambda node, bitmap: node.remove_bitmap("b"),
}
FORBIDDEN = {
    "busy": (BusyError, BUSY, set(ACTIONS)),
    "readonly": (
        ReadonlyError,
        READONLY,
        {"clear", "set", "set_many", "reset", "merge into", "freeze", "remove"},
    ),
    "inconsistent": (InconsistentError, INCONSISTENT, set(ACTIONS) - {"remove"}),
}


@pytest.mark.parametrize("flag", FORBIDDEN)
@pytest.mark.parametrize("action", ACTIONS)
def test_a_flag_forbids_what_it_should_and_says_so(
    node: BlockNode, bitmap: DirtyBitmap, action: str, flag: str
) -> None:
    error, text, forbidden = FORBIDDEN[flag]
    node.add_bitmap("other").set(0, 1)
    bitmap.set(8192, 1)
    before = bitmap_info(flagged(bitmap, flag))
    if action not in forbidden:
        ACTIONS[action](node, bitmap)
        return
    with pytest.raises(error) as caught:
        ACTIONS[action](node, bitmap)
    assert str(caught.value) == (NO_REMOVAL if (action, flag) == ("remove", "readonly") else text)
    assert isinstance(caught.value, BitmapError)
    assert bitmap_info(bitmap) == before
    assert node.bitmaps["other"].count() == 65536


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("busy", "readonly", "inconsistent"), BUSY),
        (("readonly", "inconsistent"), READONLY),
    ],
)
def test_flags_are_asked_in_qemus_order(
    bitmap: DirtyBitmap, flags: tuple[str, ...], text: str
) -> None:
    for flag in flags:
        flagged(bitmap, flag)
    with pytest.raises(StateError) as caught:
        bitmap.clear()
    assert str(caught.value) == text


@pytest.mark.parametrize("action", [action for action in ACTIONS if action != "merge from"])
def test_a_removed_bitmap_can_only_be_read(
    node: BlockNode, bitmap: DirtyBitmap, action: str
) -> None:
    node.add_bitmap("other")
    bitmap.set(0, 1)
    node.remove_bitmap("b")
    with pytest.raises(NotFoundError) as caught:
        ACTIONS[action](node, bitmap)
    assert str(caught.value) == "Dirty bitmap 'b' not found"
    assert isinstance(caught.value, KeyError)
    assert list(bitmap.areas()) == [(0, 4096)]


# ---- information ------------------------------------------------------------


def test_info_is_what_qmp_reports(bitmap: DirtyBitmap) -> None:
    bitmap.set(5000, 1)
    assert bitmap_info(bitmap) == {
        "name": "b",
        "count": 4096,
        "granularity": 4096,
        "recording": True,
        "busy": False,
        "persistent": False,
    }


def test_info_tells_of_inconsistency_only_where_there_is_one(bitmap: DirtyBitmap) -> None:
    assert "inconsistent" not in bitmap_info(bitmap)
    assert bitmap_info(flagged(bitmap, "inconsistent"))["inconsistent"] is True


def test_a_bitmap_that_is_not_to_be_stored_does_not_report_persistence(
    bitmap: DirtyBitmap,
) -> None:
    assert flagged(bitmap, "persistent").persistent
    assert not flagged(bitmap, "skip_store").persistent


def test_repr_names_the_flags(bitmap: DirtyBitmap) -> None:
    assert repr(bitmap) == "<DirtyBitmap 'b' granularity=4096 count=0 recording>"


# ---- recording and content --------------------------------------------------


def test_a_disabled_bitmap_records_no_write_but_can_be_changed(
    node: BlockNode, bitmap: DirtyBitmap
) -> None:
    bitmap.disable()
    node.mark_dirty(0, 1)
    assert (bitmap.count(), bitmap.enabled, bitmap.recording) == (0, False, False)
    bitmap.set(0, 1)
    bitmap.merge(node.add_bitmap("other"))
    assert bitmap.count() == 4096
    bitmap.clear()
    assert bitmap.count() == 0
    bitmap.enable()
    node.mark_dirty(0, 1)
    assert bitmap.count() == 4096


def test_content_is_in_bytes(bitmap: DirtyBitmap) -> None:
    bitmap.set(5000, 10_000)
    assert list(bitmap.areas()) == [(4096, 12288)]
    rows: Any = bitmap.areas_array().tolist()
    assert rows == [[4096, 12288]]
    assert bitmap.get(5000)
    assert not bitmap.get(0)
    assert not bitmap.get(SIZE)
    bitmap.reset(4096, 4096)
    assert bitmap.count() == 8192
    assert bitmap.size == SIZE


def test_what_is_not_inside_is_refused(bitmap: DirtyBitmap) -> None:
    with pytest.raises(RangeError):
        bitmap.set(SIZE, 1)
    with pytest.raises(InvalidError):
        bitmap.reset(1, 4096)
    assert bitmap.count() == 0


# ---- merging ----------------------------------------------------------------


def test_several_bitmaps_of_several_nodes_are_merged_at_once(bitmap: DirtyBitmap) -> None:
    graph = BlockGraph()
    sources = [
        graph.add_node(f"n{i}", SIZE).add_bitmap("s", 512 << i, disabled=i == 1) for i in range(3)
    ]
    for i, source in enumerate(sources):
        source.set(i * 65536, 1)
    bitmap.merge(*sources)
    assert [offset for offset, _ in bitmap.areas()] == [0, 65536, 131072]


def test_merging_a_bitmap_into_itself_changes_nothing(bitmap: DirtyBitmap) -> None:
    bitmap.set(0, 1)
    bitmap.merge(bitmap)
    assert bitmap.count() == 4096


def test_merging_nothing_changes_nothing(bitmap: DirtyBitmap) -> None:
    bitmap.merge()
    assert bitmap.count() == 0


def test_a_merge_of_which_one_source_is_refused_changes_nothing(
    node: BlockNode, bitmap: DirtyBitmap
) -> None:
    good = node.add_bitmap("good")
    good.set(0, 1)
    larger = BlockGraph().add_node("larger", 2 * SIZE).add_bitmap("x")
    with pytest.raises(MismatchError) as caught:
        bitmap.merge(good, larger)
    assert str(caught.value) == (
        f"Bitmaps are of different sizes (destination size is {SIZE}, source size is {2 * SIZE})"
        " and can't be merged"
    )
    assert bitmap.count() == 0


# ---- freezing ---------------------------------------------------------------


def test_a_frozen_bitmap_is_constant_and_busy_while_its_successor_records(
    node: BlockNode, bitmap: DirtyBitmap
) -> None:
    node.mark_dirty(0, 1)
    with bitmap.freeze() as frozen:
        node.mark_dirty(65536, 1)
        assert list(frozen) == [bitmap]
        assert list(bitmap.areas()) == [(0, 4096)]
        assert (bitmap.busy, bitmap.enabled, bitmap.recording) == (True, False, True)
        assert bitmap_info(bitmap)["count"] == 4096


def test_done_drops_what_was_read_and_keeps_what_was_written(
    node: BlockNode, bitmap: DirtyBitmap
) -> None:
    node.mark_dirty(0, 1)
    with bitmap.freeze() as frozen:
        node.mark_dirty(65536, 1)
        frozen.done()
        assert not bitmap.busy
        assert not list(frozen)
    node.mark_dirty(131072, 1)
    assert list(bitmap.areas()) == [(65536, 4096), (131072, 4096)]
    assert (bitmap.busy, bitmap.enabled) == (False, True)


def test_an_exception_puts_back_what_was_read(node: BlockNode, bitmap: DirtyBitmap) -> None:
    node.mark_dirty(0, 1)

    def fail() -> None:
        with bitmap.freeze():
            node.mark_dirty(65536, 1)
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fail()
    node.mark_dirty(131072, 1)
    assert list(bitmap.areas()) == [(0, 4096), (65536, 4096), (131072, 4096)]
    assert (bitmap.busy, bitmap.enabled) == (False, True)


@pytest.mark.parametrize("end", ["done", "close"])
def test_a_disabled_bitmap_stays_disabled_through_a_freeze(
    node: BlockNode, bitmap: DirtyBitmap, end: str
) -> None:
    bitmap.set(0, 1)
    bitmap.disable()
    frozen = bitmap.freeze()
    node.mark_dirty(65536, 1)
    assert not bitmap.recording
    getattr(frozen, end)()
    assert not bitmap.enabled
    assert bitmap.count() == (0 if end == "done" else 4096)


def test_an_iterator_over_what_was_frozen_outlives_the_freeze(
    node: BlockNode, bitmap: DirtyBitmap
) -> None:
    node.mark_dirty(0, 1)
    with bitmap.freeze() as frozen:
        areas = bitmap.areas()
        frozen.done()
    node.mark_dirty(65536, 1)
    assert list(areas) == [(0, 4096)]
