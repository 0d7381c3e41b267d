# SPDX-License-Identifier: MIT
"""Uses a LocalStore for a while, and logs what it does to its files.

    LD_PRELOAD=faults.so python local_crash.py faults.so DIRECTORY LOG

The log holds every write and sync in order (see faults.c), what the mapped files hold by then, and
notes: after each step, as JSON, what a crash of the system must leave from then on, by node and
bitmap: the dirty areas, or null for one that was in use. test_local_crash.py reads it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import silent

from pybitmap import BlockGraph, DirtyBitmap, offline
from pybitmap.store import LocalStore

GROUP = 512
SIZE = 3 * 8 * 4096 * GROUP  # three pages of words
NODES = ("one", "two")
BOTH = [("one", "c"), ("two", "a")]


def successor_areas(bitmap: DirtyBitmap) -> list[tuple[int, int]]:
    successor = bitmap._state.successor
    return [] if successor is None else list(successor.content.areas())


def main(library: str, directory: Path, log: str) -> None:
    faults = ctypes.CDLL(library)
    faults.faults_watch(str(directory).encode())
    faults.faults_log(os.open(log, os.O_WRONLY | os.O_CREAT, 0o600))
    path = directory / "store"
    sizes = dict.fromkeys(NODES, SIZE)

    def opened() -> BlockGraph:
        store = LocalStore(path)
        graph = BlockGraph()
        for name in NODES:
            graph.add_node(name, sizes[name], store)
        return graph

    def done(step: str, graph: BlockGraph, *, whole: bool = True) -> None:
        """whole: a crash within the step leaves all or nothing of it."""
        for file in path.glob("*.words"):
            data = file.read_bytes()
            faults.faults_mapped(str(file).encode(), data, ctypes.c_long(len(data)))
        state: dict[str, Any] = {}
        for name, node in graph.nodes.items():
            in_use = dict.fromkeys(node.bitmaps)
            state[name] = [node.size, in_use if node.bitmaps or not stored else stored[name]]
        text = json.dumps({"step": step, "whole": whole, "state": state})
        faults.faults_note(text.encode())

    def closed(step: str, graph: BlockGraph) -> None:
        for name, node in graph.nodes.items():
            stored[name] = {
                bitmap.name: sorted(
                    {
                        *bitmap.areas(),
                        *(
                            bitmap._state.successor.content.areas()
                            if bitmap._state.successor
                            else ()
                        ),
                    }
                )
                for bitmap in node.bitmaps.values()
            }
        graph.close()
        done(step, graph, whole=False)
        stored.clear()

    def at_rest(step: str, change: Callable[[LocalStore], None]) -> None:
        """What no program has open is never in use, not even for a moment."""
        change(LocalStore(path))
        store = LocalStore(path)
        with BlockGraph() as graph:
            for name in NODES:
                node = graph.add_node(name, sizes[name], store, read_only=True)
                stored[name] = {each.name: list(each.areas()) for each in node.bitmaps.values()}
        done(step, graph)
        stored.clear()

    stored: dict[str, Any] = {}
    faults.faults_note(json.dumps({"step": "begin", "whole": False, "state": {}}).encode())

    graph = opened()
    done("open", graph, whole=False)
    one, two = graph.nodes.values()
    one.add_bitmap("a", GROUP, persistent=True)
    done("add", graph)
    one.mark_dirty(0, 5 * GROUP)
    one.mark_dirty(SIZE - 1, 1)
    two.add_bitmap("b", GROUP, persistent=True)
    done("add another", graph)
    two.mark_dirty(SIZE // 2, 1 << 20)
    graph.flush()
    done("flush", graph)
    with graph.transaction() as tx:
        tx.add("two", "a", GROUP, persistent=True)
        tx.merge("two", "a", [("one", "a")])
        tx.remove("one", "a")
        tx.clear("two", "b")
    done("move", graph)
    two.mark_dirty(3 * GROUP, SIZE // 2)
    frozen = two.bitmaps["a"].freeze()
    done("freeze", graph)
    two.mark_dirty(SIZE // 2 + 8 * GROUP, GROUP)
    closed("close while frozen", graph)
    frozen.close()

    graph = opened()
    done("open again", graph, whole=False)
    one, two = graph.nodes.values()
    two.mark_dirty(SIZE - GROUP, GROUP)
    one.add_bitmap("c", GROUP, persistent=True)
    one.mark_dirty(7 * GROUP, 64 * GROUP)
    done("add c", graph)
    two.remove_bitmap("b")
    done("remove b", graph)
    sizes["two"] = SIZE // 2
    two.truncate(SIZE // 2)
    done("truncate", graph)
    two.mark_dirty(0, SIZE // 4)
    closed("close", graph)

    graph = opened()
    done("open a third time", graph, whole=False)
    graph.nodes["two"].bitmaps["a"].clear()
    done("clear", graph)
    closed("close again", graph)

    at_rest("offline add", lambda store: offline.add(store, ("one", "d"), silent))
    at_rest("offline clear", lambda store: offline.clear(store, [("two", "a")], silent))
    at_rest(
        "offline merge", lambda store: offline.merge(store, ("one", "d"), [("one", "c")], silent)
    )
    at_rest("offline take", lambda store: offline.take(store, ("one", "d"), "e", silent))
    at_rest(
        "offline put back",
        lambda store: offline.put_back(store, ("one", "e"), ("one", "d"), silent),
    )
    for sizes["two"] in (SIZE, SIZE // 2, 2 * SIZE):
        at_rest(
            f"offline resize {sizes['two']}",
            lambda store: offline.resize(store, "two", sizes["two"], silent, shrink=True),
        )
    at_rest("offline disable", lambda store: offline.enable(store, BOTH, False, silent))
    at_rest("offline remove", lambda store: offline.remove(store, BOTH, silent))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
