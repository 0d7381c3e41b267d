# SPDX-License-Identifier: MIT
"""`pybitmap serve`: named bitmaps over QMP."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import click

from ..block.graph import BlockGraph
from ..errors import InvalidError
from ..store import Store
from .common import FilePath, deferred, note, progress_bars, size_of, tell, warn_unlocked
from .group import command, did_you_mean


@dataclass
class _Node:
    """What `--node` asks for."""

    name: str
    size: int | None = None
    store: str | None = None
    image: str | None = None
    read_only: bool = False
    no_lock: bool = False


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FLAGS = ("read-only", "no-lock")
_KEYS = ("size", "store", "image", *_FLAGS)


def _node(text: str) -> _Node:
    # As QEMU has it: a comma in a name or a path is written twice.
    name, *options = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    node = _Node(name)
    for option in options:
        key, equals, value = option.partition("=")
        if key not in _KEYS:
            raise click.BadParameter(f"{text!r}: {_unknown(key)}")
        field = key.replace("-", "_")
        if getattr(node, field):
            raise click.BadParameter(f"{text!r} has {key} twice")
        if key in _FLAGS:
            if equals:
                raise click.BadParameter(f"{text!r}: {key} has no value")
            setattr(node, field, True)
        elif key == "size":
            node.size = size_of(value)
        elif not value:
            raise click.BadParameter(f"{text!r}: {key} needs a path")
        else:
            setattr(node, field, value)
    if node.store is not None and node.image is not None:
        raise click.BadParameter(f"{text!r} has store and image, and can have one of them")
    if node.size is None and node.store is None and node.image is None:
        raise click.BadParameter(
            f"{text!r} is not NAME,size=SIZE, NAME,store=DIR or NAME,image=FILE"
        )
    return node


def _unknown(key: str) -> str:
    meant = did_you_mean(key.replace("_", "-"), _KEYS)
    if meant.endswith("?"):
        return f"there is no option {key!r}{meant}"
    return (
        f"there is no option {key!r}, only {', '.join(_KEYS)}; a comma in a name or a path is "
        "written twice"
    )


def _nodes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[_Node]:
    """Callback of an option that describes a node, repeatedly."""
    return [_node(value) for value in values]


@command("serve")
@click.option(
    "--socket",
    "path",
    required=True,
    type=FilePath(),
    metavar="PATH",
    help="The unix socket to create; only its owner can connect.",
)
@click.option(
    "--node",
    "nodes",
    metavar="NAME,OPTION[,OPTION...]",
    required=True,
    multiple=True,
    callback=_nodes,
    help="A device with bitmaps; may be repeated. Options: size=SIZE; store=DIR, a local store,"
    " made if missing (it knows the sizes of nodes that it has); image=FILE, a qcow2 image;"
    " read-only; no-lock, which goes on where the file system has no locks: nothing then keeps"
    " another program from writing there at the same time, which destroys it. A comma in a name or"
    " a path is written twice.",
)
def serve_command(path: str, nodes: list[_Node]) -> None:
    """Serve named bitmaps over QEMU's monitor protocol, QMP.

    Until a client sends `quit`, or Ctrl-C, or SIGTERM. Persistent bitmaps of nodes with a store or
    an image are stored then; the others are kept in memory. No lock of others keeps it from
    starting or ending, but for those on a store or an image, which are an error.

    64 clients can be connected. One more takes the place of the one that has been silent longest
    (5 s at least) and has nothing frozen, or waits. Who does not read replies is disconnected when
    others need the room, and what it had frozen is put back: see docs/qmp.md.

    \b
    Examples:
      pybitmap serve --socket qmp.sock --node vm0,size=20G
      pybitmap serve --socket qmp.sock \\
        --node vm0,image=disk.qcow2 \\
        --node vm1,store=vm.bitmaps,size=1.5T
      qmp-shell qmp.sock

    Exit code: 0 ended as asked, 2 for an error, also if the bitmaps cannot be stored.
    """
    from ..qmp import serve  # the other commands start sooner without it

    stores: dict[str, Store] = {}
    listening = False

    def ready() -> None:
        nonlocal listening
        if came:  # since it was looked at; from now on signals are the server's
            raise KeyboardInterrupt
        listening = True
        names = ", ".join(node.name for node in nodes)
        note(f"listening on {path}: {names}")

    # Whatever asks for an end, bitmaps are stored first.
    with deferred(*_ENDING) as came, ExitStack() as making, BlockGraph() as graph:
        try:
            with progress_bars() as progress:
                for node in nodes:
                    known = len(stores)
                    store = _store(node, stores)
                    if store is not None:
                        if len(stores) > known:
                            making.enter_context(store.making())
                        store.progress = progress
                    graph.add_node(node.name, node.size, store, node.read_only)
                    tell(f"node {node.name}: {graph.nodes[node.name].size} bytes")
            for store in stores.values():
                store.progress = None
            if came:
                raise KeyboardInterrupt
            serve(graph, path, ready)
        except BaseException:
            if not listening:  # nodes that were not there before are not to be stored
                for each in list(graph.nodes.values()):
                    if not each.bitmaps:
                        each.close(discard=True)
            raise


def _store(node: _Node, stores: dict[str, Store]) -> Store | None:
    """That of a node; a local store is one for all its nodes."""
    from ..store import LocalStore, Qcow2Store

    kind: Callable[..., Store] = LocalStore if node.image is None else Qcow2Store
    path = node.store if node.image is None else node.image
    if path is None:
        return None
    store = stores.setdefault(os.path.realpath(path), kind(path, lock=not node.no_lock))
    if store.lock is node.no_lock:
        raise InvalidError(f"{path}: give all of its nodes no-lock, or none")
    if node.no_lock:
        warn_unlocked(path, read_only=node.read_only)
    return store
