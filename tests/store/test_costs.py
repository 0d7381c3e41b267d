# SPDX-License-Identifier: MIT
"""What an action costs in a local store: the table of docs/design.md, "Costs"."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pybitmap import BlockGraph, BlockNode, Frozen
from pybitmap.store import LocalStore
from pybitmap.store.catalog import Catalog

G = 4096


def done(node: BlockNode) -> Callable[[], object]:
    frozen: Frozen = node.bitmaps["a"].freeze()
    return frozen.done


#: What is prepared, and then what is counted.
ACTIONS: dict[str, Callable[[BlockNode], Callable[[], object]]] = {
    "add": lambda node: lambda: node.add_bitmap("new", G, persistent=True),
    "remove": lambda node: lambda: node.remove_bitmap("a"),
    "enable": lambda node: node.bitmaps["off"].enable,
    "disable": lambda node: node.bitmaps["a"].disable,
    "clear": lambda node: node.bitmaps["a"].clear,
    "merge": lambda node: lambda: node.bitmaps["a"].merge(node.bitmaps["off"]),
    "merge of one that records": lambda node: lambda: node.bitmaps["a"].merge(node.bitmaps["b"]),
    "freeze": lambda node: node.bitmaps["a"].freeze,
    "done": done,
}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    counts = {"files": 0, "commits": 0}
    make, transaction = LocalStore._make, Catalog.transaction

    def counting_make(*args: Any) -> Any:
        counts["files"] += 1
        return make(*args)

    def counting_transaction(self: Catalog, change: Any) -> None:
        counts["commits"] += 1
        transaction(self, change)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "_make", counting_make)
        patch.setattr(Catalog, "transaction", counting_transaction)
        yield counts


def cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str) -> tuple[int, int]:
    with BlockGraph() as graph:
        node = graph.add_node("n", 1 << 20, LocalStore(tmp_path / action.replace(" ", "-")))
        node.add_bitmap("a", G, persistent=True)
        node.add_bitmap("b", G, persistent=True)
        node.add_bitmap("off", G, persistent=True, disabled=True)
        run = ACTIONS[action](node)
        with counted(monkeypatch) as counts:
            kept = run()
        if isinstance(kept, Frozen):
            kept.close()
        return counts["files"], counts["commits"]


def test_the_table_of_costs_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "design.md").read_text(encoding="utf-8")
    table = text[text.index("| action, on bitmaps that record |") :]
    rows = re.findall(r"^\| ([a-z, ]+) \| (\d)[^|]* \| (\d) \|$", table, re.MULTILINE)
    told = {
        action: (int(files), int(commits))
        for actions, files, commits in rows
        for action in actions.split(", ")
    }
    found = {action: cost(tmp_path, monkeypatch, action) for action in ACTIONS}
    one_more = found.pop("merge of one that records")
    assert told == found
    assert one_more == (found["merge"][0] + 1, found["merge"][1])
