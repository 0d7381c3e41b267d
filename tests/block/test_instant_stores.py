# SPDX-License-Identifier: MIT
"""Transactions on stored bitmaps beside threads that write: one instant, and all is stored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import preload
import pytest
from beside import NODES, Beside, often, sequences_of
from instant import UNIT, World, difference, world_of
from kept_store import KeptStore, Shelf
from sequences import ROUNDS
from stores import LocalPlace, MemoryPlace, Place, Qcow2Place

from pybitmap import BlockGraph
from pybitmap.store import Store

LIMIT = (1 << 20) - 128 + 1  # units of a node


class KeptPlace(MemoryPlace):
    exact_after_kill = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.shelves: dict[int, Shelf] = {}

    def store(self, medium: int = 0) -> KeptStore:
        return KeptStore(self.shelves.setdefault(medium, Shelf()))


#: By node: what kind of store, and which of these.
SETTINGS: dict[str, dict[str, tuple[type[Place], int]]] = {
    "local": {"a": (LocalPlace, 0), "b": (LocalPlace, 0), "c": (LocalPlace, 0)},
    "two local": {"a": (LocalPlace, 0), "b": (LocalPlace, 1), "c": (LocalPlace, 0)},
    "local and memory": {"a": (LocalPlace, 0), "c": (MemoryPlace, 0)},
    "qcow2": {"a": (Qcow2Place, 0), "b": (Qcow2Place, 1), "c": (Qcow2Place, 2)},
    "qcow2 and local": {"b": (Qcow2Place, 0), "a": (LocalPlace, 0)},
    "kept": {"a": (KeptPlace, 0), "b": (KeptPlace, 1)},
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with preload.memory_folder(tmp_path) as folder:
        yield folder


@contextmanager
def opened(
    setting: dict[str, tuple[type[Place], int]], places: dict[str, Place]
) -> Iterator[BlockGraph]:
    """As a program that starts; let go of as it is, if it was not closed."""
    stores: dict[tuple[type[Place], int], Store] = {}
    graph = BlockGraph()
    for name in NODES:
        store = None
        if name in setting:
            kind, medium = setting[name]
            store = stores.get((kind, medium))
            if store is None:
                store = stores[kind, medium] = places[kind.__name__].store(medium)
        graph.add_node(name, LIMIT * UNIT, store)
    try:
        yield graph
    finally:
        for node in graph.nodes.values():
            node.close(discard=True)


@pytest.mark.parametrize("how", ["python", "qmp"])
@pytest.mark.parametrize("name", SETTINGS)
def test_one_instant_and_all_is_stored(
    folder: Path, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stores.SIZE", LIMIT * UNIT)
    setting = SETTINGS[name]
    for number in range(ROUNDS):
        seed = random.randrange(2**32)
        print("seed", seed)
        kinds = random.Random(seed).choice(["n", "m", "h", "np", "mq"])
        place = folder / str(number)
        place.mkdir()
        places = {kind.__name__: kind(place) for kind, _ in setting.values()}
        with opened(setting, places) as graph:
            sequences = sequences_of(kinds, LIMIT, folder)
            beside = Beside(graph, sequences, seed, tuple(setting))
            with often(), beside.writing():
                for _ in range(20):
                    beside.transact(how)
            graph.close()
        expected: World = {
            key: bits.loaded for key, bits in beside.world.items() if bits.persistent
        }
        with opened(setting, places) as graph:
            wrong = difference(expected, world_of(graph))
        assert wrong is None, wrong
