# SPDX-License-Identifier: MIT
"""Both sides of a lockstep: ours has what a `Daemon` has, and both are asked and compared alike."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from daemon import Daemon, Json
from support import set_flag

from pybitmap import BlockGraph, DirtyBitmap
from pybitmap.qmp import execute
from pybitmap.store import Qcow2Store

#: A node of the daemon's that only backups need, which freeze a bitmap; ours has none.
TARGET = "target"

PREFIX = "block-dirty-bitmap-"

LONGEST = "é" * 511 + "z"
TOO_LONG = LONGEST + "z"


def command(name: str, /, **arguments: Any) -> Json:
    return {"execute": name, "arguments": arguments}


def action(kind: str, /, **data: Any) -> Json:
    return {"type": kind if kind == "abort" else PREFIX + kind, "data": data}


def transaction(*actions: Json) -> Json:
    return command("transaction", actions=list(actions))


def error(desc: str) -> Json:
    return {"error": {"class": "GenericError", "desc": desc}}


def in_use(name: str) -> Json:
    text = f"Bitmap '{name}' is currently in use by another operation and cannot be used"
    return error(text)


ABORTED = error("Transaction aborted using Abort action")


#: QEMU since when it has a text, a pattern of it, and what it said before (asked: 7.2, 10.0, 11.1).
#: Ours are the newest. The last is of nodes that can store none; where they could, earlier versions
#: did not refuse it (see qemu-differences.md).
NEWER_TEXTS = (
    ((8, 1), "support transaction property", "support Transaction property"),
    (
        (11, 1),
        r"Cannot remove persistent bitmap '(.*)': no write access to node '.*'",
        r"Bitmap '\1' is readonly and cannot be modified",
    ),
    (
        (11, 1),
        r"Cannot add a persistent bitmap to read-only or inactive node '(.*)'",
        r"Can't store persistent bitmaps to \1: Operation not supported",
    ),
)


def as_of(version: tuple[int, int], reply: Json) -> Json:
    """What QEMU of that version replies where we reply so."""
    if "error" not in reply:
        return reply
    desc = reply["error"]["desc"]
    for since, newer, older in NEWER_TEXTS:
        if version < since:
            desc = re.sub(newer, older, desc)
    return {**reply, "error": {**reply["error"], "desc": desc}}


def same(daemon: Daemon, ours: Ours, request: Json, *, theirs: Json | None = None) -> Json:
    """Our reply, which is QEMU's of today; both are in the same state afterwards.

    :param theirs: what the daemon answers instead
    """
    reply = ours.execute(request)
    expected = as_of(daemon.version, reply) if theirs is None else theirs
    assert daemon.execute(request) == expected, request
    assert state(ours) == state(daemon), request
    return reply


class Ours:
    """A graph with the daemon's nodes, and new, empty images of its own."""

    def __init__(self, daemon: Daemon) -> None:
        self.nodes = {node: disk for node, disk in daemon.nodes.items() if node != TARGET}
        self.images: dict[str, Path] = {}
        for node, disk in self.nodes.items():
            if disk.format == "qcow2":
                self.images[node] = daemon.folder / f"ours-{node}.qcow2"
                disk.create(self.images[node])
        self.graph = BlockGraph()
        self.start()

    def start(self, read_only: Collection[str] = ()) -> None:
        """Open all nodes."""
        for node in self.nodes:
            self.open_node(node, read_only=node in read_only)

    def stop(self, *, kill: bool = False) -> None:
        for node in list(self.graph.nodes):
            self.close_node(node, kill=kill)

    def open_node(self, node: str, *, read_only: bool = False) -> None:
        if node in self.images:
            store = Qcow2Store(self.images[node])
            self.graph.add_node(node, store=store, read_only=read_only)
        else:
            self.graph.add_node(node, self.nodes[node].size, read_only=read_only)

    def close_node(self, node: str, *, kill: bool = False) -> None:
        """
        :param kill: as if the process ended now
        """
        self.graph.nodes[node].close(discard=kill)
        self.graph.remove_node(node)

    def execute(self, request: Json) -> Json:
        # As it would come over the wire.
        reply: Json = json.loads(json.dumps(execute(self.graph, json.loads(json.dumps(request)))))
        return reply

    def bitmap(self, node: str, name: str) -> DirtyBitmap:
        return self.graph.nodes[node].bitmaps[name]

    def hold(self, node: str, name: str, busy: bool = True) -> None:
        set_flag(self.bitmap(node, name), "busy", busy)

    def freeze(self, node: str, name: str) -> None:
        """Until the node is closed."""
        self.frozen = self.bitmap(node, name).freeze()

    def write(self, node: str, writes: list[tuple[int, int]]) -> None:
        for offset, nbytes in writes:
            self.graph.nodes[node].mark_dirty(offset, nbytes)


def state(side: Ours | Daemon) -> Json:
    """Per node: what the query tells of its bitmaps, None without any, and their SHA-256.

    QEMU also lists what has no name, successors and a backup's own bitmaps; we do not.
    """
    nodes = side.execute({"execute": "query-named-block-nodes"})["return"]
    answer: Json = {}
    for node in nodes:
        name = node["node-name"]
        if name == TARGET or name.startswith("#"):
            continue
        listed = node.get("dirty-bitmaps", [None])
        bitmaps = [each for each in listed if each is None or "name" in each]
        answer[name] = None if bitmaps in ([], [None]) else bitmaps
        assert listed, "no bitmap: no list"
        for bitmap in answer[name] or []:
            asked = command("x-debug-block-dirty-bitmap-sha256", node=name, name=bitmap["name"])
            bitmap["reply to sha256"] = side.execute(asked)
    return answer


def on_disk(daemon: Daemon) -> dict[str, list[str]]:
    """Per qcow2 node of QEMU's: the names of the bitmaps that its image has now."""
    found = {}
    for node in daemon.must("query-named-block-nodes", flat=True):
        if not node["node-name"].startswith("#") and node["drv"] == "qcow2":
            info = node["image"]["format-specific"]["data"]
            found[node["node-name"]] = [each["name"] for each in info.get("bitmaps", [])]
    return found
