# SPDX-License-Identifier: MIT
"""What users have of graphs, nodes and bitmaps: there is one of each."""

from __future__ import annotations

import copy
import pickle

import pytest

from pybitmap import BlockGraph, HBitmap

pytestmark = pytest.mark.core


def test_what_there_is_one_of_is_neither_copied_nor_pickled() -> None:
    graph = BlockGraph()
    node = graph.add_node("n", 1 << 20)
    bitmap = node.add_bitmap("b")
    with graph.transaction() as tx:
        pass
    with bitmap.freeze() as frozen:
        for each in (graph, node, bitmap, frozen, tx):
            for make in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="neither copied nor pickled"):
                    make(each)


def test_a_bitmap_is_the_same_object_wherever_it_comes_from() -> None:
    graph = BlockGraph()
    node = graph.add_node("n", 1 << 20)
    with graph.transaction() as tx:
        bitmap = tx.add("n", "b")
    assert bitmap is node.bitmaps["b"] is node.find_bitmap("b")
    with bitmap.freeze() as frozen:
        assert [*frozen] == [bitmap]


def test_questions_are_answered_as_an_hbitmap_answers_them() -> None:
    node = BlockGraph().add_node("n", 100_000)
    bitmap = node.add_bitmap("b", 4096)
    plain = HBitmap(100_000, 12)
    for offset, nbytes in ((5000, 10_000), (70_000, 1), (99_999, 1)):
        node.mark_dirty(offset, nbytes)
        plain.set(offset, nbytes)
    assert list(bitmap.areas()) == list(plain.areas())
    for start in (0, 4096, 20_000, 99_999, 100_000):
        for count in (None, 0, 1, 5000):
            assert bitmap.next_dirty(start, count) == plain.next_dirty(start, count)
            assert bitmap.next_zero(start, count) == plain.next_zero(start, count)
            assert bitmap.status(start, count) == plain.status(start, count)
        assert bitmap.next_dirty_area(start, max_count=512) == plain.next_dirty_area(
            start, max_count=512
        )
        assert bitmap.get(start) == plain.get(start)
