# SPDX-License-Identifier: MIT
"""Reading a store piece by piece (`Volume.read`): what its pieces say, and who may have them.

What commands make of them, and at every edge of a piece, is in tests/tools/test_offline.py.
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
from images import create
from stores import PLACES, SIZE, MemoryPlace, Place

from pybitmap import BlockGraph, HBitmap, StoreError
from pybitmap.sizes import granularity_bits
from pybitmap.store import Qcow2Store, Reading, Volume

GRANULARITIES = (512, 4096, 1 << 20)


@pytest.fixture(params=PLACES, ids=lambda kind: kind.__name__)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    made: Place = request.param(tmp_path)
    with BlockGraph() as graph:
        node = graph.add_node("n", SIZE, made.store())
        for granularity in GRANULARITIES:
            node.add_bitmap(f"b{granularity}", granularity, persistent=True)
        node.mark_dirty(5000, 70_000)
        node.mark_dirty(SIZE - 1, 1)
    return made


def opened(place: Place) -> Volume:
    return place.store().open("n", None, read_only=True)


def whole(reading: Reading) -> HBitmap:
    content = HBitmap(SIZE, granularity_bits(reading.bitmap.granularity))
    end = 0
    for start, bits in reading.pieces():
        assert end <= start
        end = start + bits.size
        for offset, nbytes in bits.areas():
            content.set(start + offset, nbytes)
    assert end <= SIZE
    return content


def test_the_pieces_are_what_is_loaded(place: Place) -> None:
    with closing(opened(place)) as volume:
        loaded = volume.load()
    with closing(opened(place)) as volume:
        readings = volume.read()
        assert [each.bitmap for each in readings] == loaded
        assert all(each.bitmap.content is None for each in readings)
        for _ in range(2):
            for reading, each in zip(readings, loaded):
                assert each.content is not None
                assert each.content.count() > 0
                assert whole(reading) == each.content


def test_an_inconsistent_bitmap_has_no_pieces(place: Place) -> None:
    if place.exact_after_kill:
        pytest.skip("a kill leaves nothing inconsistent here")
    graph = BlockGraph()
    graph.add_node("n", store=place.store()).close(discard=True)
    with closing(opened(place)) as volume:
        readings = volume.read()
        assert len(readings) == len(GRANULARITIES)
        assert all(each.bitmap.inconsistent for each in readings)
        assert [list(each.pieces()) for each in readings] == [[], [], []]


def test_ones_of_an_image_take_no_bits(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 1 << 40)
    with BlockGraph() as graph:
        node = graph.add_node("n", store=Qcow2Store(path))
        node.add_bitmap("b", 65536, persistent=True)
        node.mark_dirty(65536, (1 << 40) - 65536)
    with closing(Qcow2Store(path).open("n", None, read_only=True)) as volume:
        [reading] = volume.read()
        pieces = list(reading.pieces())
        assert [bits.granularity for _, bits in pieces] == [16, 63, 63]
        assert sum(bits.count(0, bits.size) for _, bits in pieces) == (1 << 40) - 65536
        assert max(len(bits.words) for _, bits in pieces) == 65536 // 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_the_child_of_a_fork_gets_no_pieces(place: Place) -> None:
    """There the file is another, and would read as clean."""
    if isinstance(place, MemoryPlace):
        pytest.skip("what is in memory goes on in the child")
    with closing(opened(place)) as volume:
        [*_, reading] = volume.read()
        begun = reading.pieces()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for each in (begun, reading.pieces()):
                    with pytest.raises(StoreError):
                        list(each)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert list(begun)
