# SPDX-License-Identifier: MIT
"""QMP's commands on a BlockGraph.

Names, arguments, replies and messages are QEMU's; where several arguments are wrong, so is the
order in which they are complained of. A single change is a transaction of one action. Two commands
are ours, named as QMP asks of vendors:

``__org.pybitmap_mark``   ``node``, ``offset``, ``length``: a write of the guest, in bytes
``__org.pybitmap_drain``  ``node``, ``name``: the dirty extents, ``[{"offset": .., "length": ..}]``,
                          which are clean then; no write between is lost, but the extents are if
                          the reply is: who cannot afford that adds a second bitmap and merges
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as metadata_version
from typing import Any

from ..block.bitmap import DirtyBitmap
from ..block.graph import BlockGraph, Source, Transaction
from ..block.node import BlockNode
from ..errors import BitmapError, InvalidError
from . import schema
from .schema import SchemaError, Struct, Where

#: Whose commands, checks and messages these are.
QEMU_VERSION = {"major": 10, "minor": 2, "micro": 0}

Arguments = dict[str, Any]
Reply = dict[str, Any]


def execute(graph: BlockGraph, command: Any) -> Reply:
    """Run one command, ``{"execute": name, "arguments": {...}, "id": ...}``.

    Never raises for what the command is: the reply is ``{"return": ...}``, or ``{"error": {"class":
    ..., "desc": ...}}`` and then nothing has changed. An ``id`` comes back as it is. ``quit``
    succeeds and leaves the rest to the caller; to negotiate capabilities is the server's as well.
    """
    return answer(command, lambda name, arguments: _run(graph, name, arguments))


class CommandNotFound(BitmapError):
    """There is no such command, or not now."""


def answer(command: Any, run: Callable[[str, Arguments], Any]) -> Reply:
    """The reply to a command that ``run(name, arguments)`` carries out."""
    try:
        name, arguments = _taken_apart(command)
        reply = {"return": run(name, arguments)}
    except BitmapError as error:
        kind = "CommandNotFound" if isinstance(error, CommandNotFound) else "GenericError"
        reply = error_reply(str(error), kind)
    except MemoryError as error:
        reply = error_reply(str(error) or "out of memory")
    except OSError as error:
        reply = error_reply(error.strerror or str(error))
    except Exception as error:
        logging.getLogger(__name__).exception("a command failed by a mistake of pybitmap's own")
        reply = error_reply(f"internal error: {type(error).__name__}")
    if isinstance(command, dict) and "id" in command:
        reply["id"] = command["id"]
    return reply


def error_reply(desc: str, kind: str = "GenericError") -> Reply:
    return {"error": {"class": kind, "desc": desc}}


def check(arguments: Arguments, struct: Struct) -> None:
    """
    :raises SchemaError: if they are not such
    """
    struct.check(arguments, Where())


def query_version() -> dict[str, Any]:
    return {"qemu": dict(QEMU_VERSION), "package": f"pybitmap {_version()}".rstrip()}


@cache
def _version() -> str:
    try:
        return metadata_version("pybitmap")
    except PackageNotFoundError:  # run from its sources
        return ""


def _taken_apart(command: Any) -> tuple[str, Arguments]:
    if not isinstance(command, dict):
        raise SchemaError("QMP input must be a JSON object")
    for member, value in command.items():
        if member == "execute":
            if not isinstance(value, str):
                raise SchemaError("QMP input member 'execute' must be a string")
        elif member == "arguments":
            if not isinstance(value, dict):
                raise SchemaError("QMP input member 'arguments' must be an object")
        elif member != "id":
            raise SchemaError(f"QMP input member '{member}' is unexpected")
    if "execute" not in command:
        raise SchemaError("QMP input lacks member 'execute'")
    return command["execute"], command.get("arguments", {})


def _run(graph: BlockGraph, name: str, arguments: Arguments) -> Any:
    if name == "qmp_capabilities":
        raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
    if name not in COMMANDS:
        raise CommandNotFound(f"The command {name} has not been found")
    struct, run = COMMANDS[name]
    check(arguments, struct)
    return run(graph, arguments)


# ---- queries ----------------------------------------------------------------------------------


def _query_commands(graph: BlockGraph, arguments: Arguments) -> list[dict[str, str]]:
    return [{"name": name} for name in ("qmp_capabilities", *COMMANDS)]


def _query_version(graph: BlockGraph, arguments: Arguments) -> dict[str, Any]:
    return query_version()


def _query_block(graph: BlockGraph, arguments: Arguments) -> list[Any]:
    return []  # there are nodes, but no guest devices that they stand behind


def _query_named_block_nodes(graph: BlockGraph, arguments: Arguments) -> list[dict[str, Any]]:
    with graph.locked():
        return [node_info(node) for node in reversed(list(graph.nodes.values()))]


def node_info(node: BlockNode) -> dict[str, Any]:
    """A node as ``query-named-block-nodes`` lists it: some members of BlockDeviceInfo."""
    volume = node.volume
    driver, filename = (volume.driver, volume.filename) if volume else ("pybitmap", "")
    info: dict[str, Any] = {
        "node-name": node.name,
        "drv": driver,
        "ro": node.read_only,
        "file": filename,
        "image": {"filename": filename, "format": driver, "virtual-size": node.size},
    }
    bitmaps = [bitmap_info(bitmap) for bitmap in node.newest_first()]
    if bitmaps:
        info["dirty-bitmaps"] = bitmaps
    return info


def bitmap_info(bitmap: DirtyBitmap) -> dict[str, Any]:
    """A bitmap as queries list it: BlockDirtyInfo of QEMU's QMP reference."""
    info: dict[str, Any] = {
        "name": bitmap.name,
        "count": bitmap.count(),
        "granularity": bitmap.granularity,
        "recording": bitmap.recording,
        "busy": bitmap.busy,
        "persistent": bitmap.persistent,
    }
    if bitmap.inconsistent:
        info["inconsistent"] = True
    return info


def _sha256(graph: BlockGraph, arguments: Arguments) -> dict[str, str]:
    return {"sha256": graph.find_node(arguments["node"]).find_bitmap(arguments["name"]).sha256()}


# ---- changes ----------------------------------------------------------------------------------


def _add(tx: Transaction, data: Arguments) -> None:
    tx.add(
        data["node"],
        data["name"],
        data.get("granularity"),
        persistent=data.get("persistent", False),
        disabled=data.get("disabled", False),
    )


def _remove(tx: Transaction, data: Arguments) -> None:
    tx.remove(data["node"], data["name"])


def _clear(tx: Transaction, data: Arguments) -> None:
    tx.clear(data["node"], data["name"])


def _enable(tx: Transaction, data: Arguments) -> None:
    tx.enable(data["node"], data["name"])


def _disable(tx: Transaction, data: Arguments) -> None:
    tx.disable(data["node"], data["name"])


def _merge(tx: Transaction, data: Arguments) -> None:
    sources: list[Source] = [
        each if isinstance(each, str) else (each["node"], each["name"]) for each in data["bitmaps"]
    ]
    tx.merge(data["node"], data["target"], sources)


def _abort(tx: Transaction, data: Arguments) -> None:
    tx.abort()


#: What a transaction may hold, by type.
ACTIONS: dict[str, Callable[[Transaction, Arguments], None]] = {
    "abort": _abort,
    "block-dirty-bitmap-add": _add,
    "block-dirty-bitmap-remove": _remove,
    "block-dirty-bitmap-clear": _clear,
    "block-dirty-bitmap-enable": _enable,
    "block-dirty-bitmap-disable": _disable,
    "block-dirty-bitmap-merge": _merge,
}


def _transaction(graph: BlockGraph, arguments: Arguments) -> dict[str, Any]:
    actions = arguments["actions"]
    if arguments.get("properties", {}).get("completion-mode") == "grouped":
        for action in actions:
            raise InvalidError(
                f"Action '{action['type']}' does not support transaction property"
                " completion-mode = grouped"
            )
    with graph.transaction() as tx:
        for action in actions:
            ACTIONS[action["type"]](tx, action["data"])
    return {}


def transact(graph: BlockGraph, actions: list[dict[str, Any]]) -> None:
    """Carry out a list of actions as QMP's ``transaction`` has them, all or none.

    >>> from pybitmap import BlockGraph
    >>> graph = BlockGraph()
    >>> node = graph.add_node("disk", size=1 << 20)
    >>> add = {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "b"}}
    >>> transact(graph, [add])
    >>> list(node.bitmaps)
    ['b']

    :raises SchemaError: (a ValueError) if they are no such list, in QEMU's words
    :raises BitmapError: what :meth:`BlockGraph.transaction` and the actions raise
    """
    arguments = {"actions": actions}
    check(arguments, schema.TRANSACTION)
    _transaction(graph, arguments)


def _single(kind: str) -> Callable[[BlockGraph, Arguments], dict[str, Any]]:
    """The command that is a transaction of one action."""

    def run(graph: BlockGraph, arguments: Arguments) -> dict[str, Any]:
        with graph.transaction() as tx:
            ACTIONS[kind](tx, arguments)
        return {}

    return run


def _mark(graph: BlockGraph, arguments: Arguments) -> dict[str, Any]:
    graph.find_node(arguments["node"]).mark_dirty(arguments["offset"], arguments["length"])
    return {}


def _drain(graph: BlockGraph, arguments: Arguments) -> list[dict[str, int]]:
    bitmap = graph.find_node(arguments["node"]).find_bitmap(arguments["name"])
    drained = bitmap.drain()
    try:
        return [{"offset": offset, "length": nbytes} for offset, nbytes in drained.areas()]
    except BaseException:
        for offset, nbytes in drained.areas():
            bitmap.set(offset, nbytes)
        raise


def _quit(graph: BlockGraph, arguments: Arguments) -> dict[str, Any]:
    return {}


#: By name: the arguments, and what runs it.
COMMANDS: dict[str, tuple[Struct, Callable[[BlockGraph, Arguments], Any]]] = {
    "query-commands": (schema.NOTHING, _query_commands),
    "query-version": (schema.NOTHING, _query_version),
    "query-block": (schema.NOTHING, _query_block),
    "query-named-block-nodes": (schema.NAMED_BLOCK_NODES, _query_named_block_nodes),
    **{
        f"block-dirty-bitmap-{name}": (struct, _single(f"block-dirty-bitmap-{name}"))
        for name, struct in schema.BITMAP_COMMANDS.items()
    },
    "transaction": (schema.TRANSACTION, _transaction),
    "x-debug-block-dirty-bitmap-sha256": (schema.BITMAP, _sha256),
    "quit": (schema.NOTHING, _quit),
    "__org.pybitmap_mark": (schema.MARK, _mark),
    "__org.pybitmap_drain": (schema.BITMAP, _drain),
}
