# SPDX-License-Identifier: MIT
"""QMP's commands on a BlockGraph.

Names, arguments, replies and messages are QEMU's; where several arguments are wrong, so is the
order in which they are complained of. A single change is a transaction of one action. Some commands
are ours, named as QMP asks of vendors; ``docs/qmp.md`` describes them:

``__org.pybitmap_mark``    a write of the guest
``__org.pybitmap_areas``   dirty areas, a page of them; takes nothing away
``__org.pybitmap_freeze``  bitmaps, constant from one instant on
``__org.pybitmap_done``    what was read of these is dropped
``__org.pybitmap_thaw``    all is put back

What a client has frozen and did not say is done is put back when it leaves: the last three are for
a :class:`Session`. So no reply takes anything away that its client has not confirmed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

from .. import __version__
from ..block.bitmap import DirtyBitmap, Frozen
from ..block.graph import BlockGraph, Source, Transaction
from ..block.node import BlockNode
from ..errors import BitmapError, InvalidError, UnsupportedError
from . import schema
from .introspection import schema_info
from .schema import SchemaError, Struct, Type, Where

#: Whose commands, checks and messages these are.
QEMU_VERSION = "10.2"

Arguments = dict[str, Any]
Reply = dict[str, Any]


#: Of one reply.
MAX_AREAS = 10_000


def execute(graph: BlockGraph, command: Any) -> Reply:
    """Run one command, ``{"execute": name, "arguments": {...}, "id": ...}``.

    Never raises for what the command is: the reply is ``{"return": ...}``, or ``{"error": {"class":
    ..., "desc": ...}}`` and then nothing has changed. An ``id`` comes back as it is. ``quit``
    succeeds and leaves the rest to the caller; to negotiate capabilities is the server's as well.
    What outlives the command, as a freeze, is for a :class:`Session`, and refused here.

    >>> from pybitmap import BlockGraph
    >>> execute(BlockGraph(), {"execute": "query-status", "id": 1})
    {'return': {'running': True, 'status': 'running'}, 'id': 1}
    >>> execute(BlockGraph(), {"execute": "no-such"})["error"]["desc"]
    'The command no-such has not been found'
    """
    return answer(command, lambda name, arguments: _run(graph, None, name, arguments))


class Session:
    """The commands of one client, one after the other, from one thread at a time.

    Closed, left in whichever way, or dropped: what was frozen, and was not said to be done, is put
    back. Kill: a store then has the marks of before and after the freeze. Fork: of a graph without
    stores, what is frozen stays so in the child. Twin: what another session has frozen is busy.

    >>> from pybitmap import BlockGraph
    >>> graph = BlockGraph()
    >>> node = graph.add_node("disk", size=1 << 20)
    >>> daily = node.add_bitmap("daily", 65536)
    >>> node.mark_dirty(70000, 1)
    >>> this = {"node": "disk", "name": "daily"}
    >>> with Session(graph) as session:
    ...     for name, arguments in [
    ...         ("freeze", {"bitmaps": [this]}), ("areas", this), ("done", {"bitmaps": [this]})
    ...     ]:
    ...         command = {"execute": f"__org.pybitmap_{name}", "arguments": arguments}
    ...         print(session.execute(command)["return"])
    {}
    {'areas': [{'offset': 65536, 'length': 65536}]}
    {}
    >>> daily.count()
    0
    """

    def __init__(self, graph: BlockGraph) -> None:
        self._graph = graph
        self._frozen: list[Frozen] = []

    def execute(self, command: Any) -> Reply:
        """As :func:`execute`.

        >>> from pybitmap import BlockGraph
        >>> with Session(BlockGraph()) as session:
        ...     session.execute({"execute": "query-name"})
        {'return': {}}
        """
        return answer(command, lambda name, arguments: _run(self._graph, self, name, arguments))

    def freeze(self, bitmaps: list[DirtyBitmap]) -> None:
        """
        :raises BitmapError: as :meth:`BlockGraph.freeze`

        >>> from pybitmap import BlockGraph
        >>> graph = BlockGraph()
        >>> daily = graph.add_node("disk", size=1 << 20).add_bitmap("daily")
        >>> with Session(graph) as session:
        ...     session.freeze([daily])
        ...     daily.busy, session.has_frozen
        (True, True)
        >>> daily.busy
        False
        """
        # Those that have come to their end go. An interruption right behind the freeze drops it,
        # so it is put back.
        self._frozen = [each for each in self._frozen if len(each)]
        self._frozen.append(self._graph.freeze(bitmaps))

    @property
    def has_frozen(self) -> bool:
        """Is anything frozen that was not said to be done, or thawed?

        >>> from pybitmap import BlockGraph
        >>> Session(BlockGraph()).has_frozen
        False
        """
        return any(len(each) for each in self._frozen)

    def end(self, bitmaps: list[DirtyBitmap], *, done: bool) -> None:
        """
        :raises InvalidError: if this session has not frozen one of them; nothing has changed
        :raises StoreError: as :meth:`Frozen.done` and :meth:`Frozen.close`

        >>> from pybitmap import BlockGraph
        >>> graph = BlockGraph()
        >>> daily = graph.add_node("disk", size=1 << 20).add_bitmap("daily")
        >>> daily.set(0, 1)
        >>> with Session(graph) as session:
        ...     session.freeze([daily])
        ...     session.end([daily], done=True)
        >>> daily.count()
        0
        """
        parts = [[each for each in bitmaps if each in frozen] for frozen in self._frozen]
        known = [bitmap for part in parts for bitmap in part]
        for bitmap in bitmaps:
            if bitmap not in known:
                raise InvalidError(f"Bitmap '{bitmap.name}' is not frozen by this client")
        for frozen, part in zip(self._frozen, parts):
            if part:
                (frozen.done if done else frozen.close)(*part)

    def close(self) -> None:
        """May be called twice.

        :raises StoreError: that could not be stored; it is so all the same

        >>> from pybitmap import BlockGraph
        >>> graph = BlockGraph()
        >>> daily = graph.add_node("disk", size=1 << 20).add_bitmap("daily")
        >>> session = Session(graph)
        >>> session.freeze([daily])
        >>> session.close()
        >>> daily.busy
        False
        """
        while self._frozen:
            self._frozen[-1].close()
            self._frozen.pop()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    """The version of this package, where clients look for QEMU's: who asks whether some feature of
    QEMU is there is not told so of what is no QEMU."""
    major, minor, micro = map(int, re.findall("[0-9]+", __version__)[:3])
    return {
        "qemu": {"major": major, "minor": minor, "micro": micro},
        "package": f"pybitmap {__version__}, not QEMU; bitmaps as in QEMU {QEMU_VERSION}",
    }


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


def _run(graph: BlockGraph, session: Session | None, name: str, arguments: Arguments) -> Any:
    if name == "qmp_capabilities":
        raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
    if name in SESSION_COMMANDS:
        struct, _, run_in = SESSION_COMMANDS[name]
        check(arguments, struct)
        if session is None:
            raise UnsupportedError(f"The command {name} needs a session, which ends what it begins")
        return run_in(graph, session, arguments)
    if name not in COMMANDS:
        raise CommandNotFound(f"The command {name} has not been found")
    struct, _, run = COMMANDS[name]
    check(arguments, struct)
    return run(graph, arguments)


# ---- queries ----------------------------------------------------------------------------------


def _query_commands(graph: BlockGraph, arguments: Arguments) -> list[dict[str, str]]:
    return [{"name": name} for name in ("qmp_capabilities", *COMMANDS, *SESSION_COMMANDS)]


def _query_version(graph: BlockGraph, arguments: Arguments) -> dict[str, Any]:
    return query_version()


def _query_qmp_schema(graph: BlockGraph, arguments: Arguments) -> list[dict[str, Any]]:
    return _schema()


@cache
def _schema() -> list[dict[str, Any]]:
    negotiate = ("qmp_capabilities", schema.CAPABILITIES, schema.NOTHING)
    every: dict[str, _Command | _SessionCommand] = {**COMMANDS, **SESSION_COMMANDS}
    others = ((name, each.arguments, each.returns) for name, each in every.items())
    return schema_info([negotiate, *others])


def _query_status(graph: BlockGraph, arguments: Arguments) -> dict[str, Any]:
    return {"running": True, "status": "running"}  # whatever writes, its writes are marked


def _query_name(graph: BlockGraph, arguments: Arguments) -> dict[str, Any]:
    return {}  # as of a machine that was not given one


def _query_block(graph: BlockGraph, arguments: Arguments) -> list[Any]:
    return []  # there are nodes, but no guest devices that they stand behind


def _query_named_block_nodes(graph: BlockGraph, arguments: Arguments) -> list[dict[str, Any]]:
    with graph.locked():
        return [node_info(node) for node in reversed(list(graph.nodes.values()))]


def node_info(node: BlockNode) -> dict[str, Any]:
    """A node as ``query-named-block-nodes`` lists it: some members of BlockDeviceInfo.

    >>> from pybitmap import BlockGraph
    >>> node_info(BlockGraph().add_node("disk", size=1 << 20))["image"]
    {'filename': '', 'format': 'pybitmap', 'virtual-size': 1048576}
    """
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
    """A bitmap as queries list it: BlockDirtyInfo of QEMU's QMP reference.

    >>> from pybitmap import BlockGraph
    >>> daily = BlockGraph().add_node("disk", size=1 << 20).add_bitmap("daily")
    >>> info = bitmap_info(daily)
    >>> info["name"], info["count"], info["granularity"], info["recording"]
    ('daily', 0, 65536, True)
    """
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


def _find(graph: BlockGraph, arguments: Arguments) -> DirtyBitmap:
    return graph.find_node(arguments["node"]).find_bitmap(arguments["name"])


def _sha256(graph: BlockGraph, arguments: Arguments) -> dict[str, str]:
    return {"sha256": _find(graph, arguments).sha256()}


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


def _areas(graph: BlockGraph, arguments: Arguments) -> dict[str, Any]:
    bitmap = _find(graph, arguments)
    start, limit = arguments.get("start", 0), arguments.get("limit", 1000)
    if start < 0:
        raise InvalidError(f"Parameter 'start' is {start}, which is no offset")
    if not 1 <= limit <= MAX_AREAS:
        raise InvalidError(f"Parameter 'limit' is {limit}, which is not in 1..{MAX_AREAS}")
    found = list(islice(bitmap.areas(start), limit + 1))
    reply: dict[str, Any] = {
        "areas": [{"offset": offset, "length": nbytes} for offset, nbytes in found[:limit]]
    }
    if len(found) > limit:
        reply["next"] = found[limit][0]
    return reply


def _freeze(graph: BlockGraph, session: Session, arguments: Arguments) -> dict[str, Any]:
    session.freeze([_find(graph, each) for each in arguments["bitmaps"]])
    return {}


def _ending(*, done: bool) -> Callable[[BlockGraph, Session, Arguments], dict[str, Any]]:
    def run(graph: BlockGraph, session: Session, arguments: Arguments) -> dict[str, Any]:
        session.end([_find(graph, each) for each in arguments["bitmaps"]], done=done)
        return {}

    return run


def _quit(graph: BlockGraph, arguments: Arguments) -> dict[str, Any]:
    return {}


class _Command(NamedTuple):
    arguments: Struct
    returns: Type
    run: Callable[[BlockGraph, Arguments], Any]


class _SessionCommand(NamedTuple):
    """The same, of a session."""

    arguments: Struct
    returns: Type
    run: Callable[[BlockGraph, Session, Arguments], Any]


#: By name.
COMMANDS: dict[str, _Command] = {
    "query-commands": _Command(schema.NOTHING, schema.COMMAND_INFOS, _query_commands),
    "query-version": _Command(schema.NOTHING, schema.VERSION, _query_version),
    "query-qmp-schema": _Command(schema.NOTHING, schema.SCHEMA_INFOS, _query_qmp_schema),
    "query-status": _Command(schema.NOTHING, schema.STATUS, _query_status),
    "query-name": _Command(schema.NOTHING, schema.NAME, _query_name),
    "query-block": _Command(schema.NOTHING, schema.NO_BLOCK_INFOS, _query_block),
    "query-named-block-nodes": _Command(
        schema.NAMED_BLOCK_NODES, schema.NODE_INFOS, _query_named_block_nodes
    ),
    **{
        f"block-dirty-bitmap-{name}": _Command(
            struct, schema.NOTHING, _single(f"block-dirty-bitmap-{name}")
        )
        for name, struct in schema.BITMAP_COMMANDS.items()
    },
    "transaction": _Command(schema.TRANSACTION, schema.NOTHING, _transaction),
    "x-debug-block-dirty-bitmap-sha256": _Command(schema.BITMAP, schema.SHA256, _sha256),
    "quit": _Command(schema.NOTHING, schema.NOTHING, _quit),
    "__org.pybitmap_mark": _Command(schema.MARK, schema.NOTHING, _mark),
    "__org.pybitmap_areas": _Command(schema.AREAS, schema.AREAS_FOUND, _areas),
}

#: By name.
SESSION_COMMANDS: dict[str, _SessionCommand] = {
    "__org.pybitmap_freeze": _SessionCommand(schema.BITMAPS, schema.NOTHING, _freeze),
    "__org.pybitmap_done": _SessionCommand(schema.BITMAPS, schema.NOTHING, _ending(done=True)),
    "__org.pybitmap_thaw": _SessionCommand(schema.BITMAPS, schema.NOTHING, _ending(done=False)),
}
