# SPDX-License-Identifier: MIT
"""Completion: shells complete commands, options, files, and the names that are in a TARGET.

The shell runs the command with a variable in its environment, for each press of the key. What is
at TARGET may be in use, broken, or not there: it is read without a lock, nothing is written to it,
nothing is waited for, and whatever goes wrong, there are just no words.
"""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from .common import write
from .group import COMPLETE_VAR, command

if TYPE_CHECKING:
    from ..tools.monitor import Monitor

SHELLS = ("bash", "zsh", "fish")

#: Seconds after which a person has typed on.
PATIENCE = 1.0

#: A node (None: that of an image) and its bitmaps.
_Nodes = list[tuple["str | None", list[str]]]


def complete(cli: click.Command, instruction: str) -> int:
    """Print the words for a shell, as it asks in its environment; the exit code."""
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(1))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        with suppress(Exception):
            return shell_complete(cli, {}, "pybitmap", COMPLETE_VAR, instruction)
        return 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def names_in(option: str = "path") -> Callable[..., list[str]]:
    """What completes the name of a bitmap there is.

    :param option: that says where, if it is given; else TARGET
    """

    def words(ctx: click.Context, param: click.Parameter, begin: str) -> list[str]:
        given = ctx.params.get(param.name or "") or ()
        node = ctx.params.get("node")
        path = ctx.params.get(option) or ctx.params["path"]
        qmp = ctx.params.get("qmp")
        nodes = _nodes(path) if qmp is None else _live_nodes(qmp, path)
        found = _labels(nodes) if node is None else _bitmaps(nodes, node)
        return [word for word in found if word not in given and fits(word, begin)]

    return words


def targets_in(ctx: click.Context, param: click.Parameter, begin: str) -> list[CompletionItem]:
    """What completes a TARGET: a file, or after --qmp a node or a device of the machine."""
    qmp = ctx.params.get("qmp")
    if qmp is None:
        return [CompletionItem(begin, type="file")]
    from ..tools import live

    with _monitor(qmp) as monitor:
        known = [str(node.name) for node in live.nodes(monitor)] + live.device_names(monitor)
    return [CompletionItem(each) for each in known if fits(each, begin)]


def nodes_in(ctx: click.Context, param: click.Parameter, begin: str) -> list[str]:
    """What completes the name of a node of TARGET."""
    return [node for node, _ in _nodes(ctx.params["path"]) if node and fits(node, begin)]


def fits(word: str, begin: str) -> bool:
    """No words that a shell would take apart, or run: click has them inserted as they are."""
    return word.startswith(begin) and shlex.quote(word) == word


def _labels(nodes: _Nodes) -> Iterator[str]:
    for node, bitmaps in nodes:
        yield from (f"{node}/{each}" if len(nodes) > 1 else each for each in bitmaps)


def _bitmaps(nodes: _Nodes, wanted: str) -> Iterator[str]:
    for node, bitmaps in nodes:
        if node == wanted:
            yield from bitmaps


def _live_nodes(qmp: str, name: str) -> _Nodes:
    """The node of a machine.

    :raises Exception: if it cannot be told
    """
    from ..tools import live

    with _monitor(qmp) as monitor:
        node = live.find_node(monitor, name)
    return [(None, [bitmap.name for bitmap in node.bitmaps])]


def _monitor(qmp: str) -> Monitor:
    from ..tools.monitor import Monitor

    return Monitor(qmp, timeout=PATIENCE / 2, patience=PATIENCE / 2)


def _nodes(path: str) -> _Nodes:
    """What is at a path, by its directory alone.

    :raises Exception: if it cannot be told
    """
    from ..store import Qcow2Store, probe

    found = probe(path)
    if found is Qcow2Store:
        [node] = Qcow2Store(path, lock=False).entries()
        return [(None, [bitmap.name for bitmap in node.bitmaps])]
    if found is None:
        return []
    # A store that is opened makes a lock file where there is none, and syncs what is in use.
    from ..store.catalog import Catalog, open_file

    folder = Path(os.path.abspath(path))
    open_file(folder, writing=False).close()  # if it is to be trusted
    with closing(Catalog(folder, writing=False, lock=False)) as catalog:
        return [(name, [row.name for row in catalog.rows(name)]) for name, _ in catalog.nodes()]


@command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> None:
    """Print what makes a shell complete commands and names.

    Commands, options, files, nodes and bitmaps of TARGET are completed then, those of TARGET also
    while a program has it open; names that a shell would not take as they are are left out.

    \b
    Examples:
      source <(pybitmap completion bash)     # in ~/.bashrc
      source <(pybitmap completion zsh)      # in ~/.zshrc
      pybitmap completion fish | source      # in config.fish
    """
    made = get_completion_class(shell)
    assert made is not None
    from . import cli

    completion = made(cli, {}, "pybitmap", COMPLETE_VAR)
    write(completion.source_template % completion.source_vars() + "\n")
