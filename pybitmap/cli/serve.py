# SPDX-License-Identifier: MIT
"""`pybitmap serve`: named bitmaps over QMP."""

from __future__ import annotations

import click

from ..node import BlockGraph
from .common import size_of


def _nodes(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, int]]:
    """Callback of an option that takes NAME,size=SIZE, repeatedly."""
    nodes = []
    for value in values:
        name, separator, size = value.rpartition(",size=")
        if not separator:
            raise click.BadParameter(f"{value!r} is not NAME,size=SIZE")
        nodes.append((name, size_of(size)))
    return nodes


@click.command("serve")
@click.option(
    "--socket",
    "path",
    required=True,
    type=click.Path(),
    metavar="PATH",
    help="The unix socket to create; only its owner can connect.",
)
@click.option(
    "--node",
    "nodes",
    metavar="NAME,size=SIZE",
    required=True,
    multiple=True,
    callback=_nodes,
    help="A device with bitmaps; may be repeated.",
)
def serve_command(path: str, nodes: list[tuple[str, int]]) -> None:
    """Serve named bitmaps to clients of QEMU's monitor protocol, QMP.

    They are kept in memory, until a client sends `quit`, or Ctrl-C, or SIGTERM.

    Sizes are in bytes; K, M, G and T stand for powers of 1024.

    \b
    Examples:
      pybitmap serve --socket qmp.sock --node disk0,size=20G --node disk1,size=1T
      qmp-shell qmp.sock

    Exit code: 0 ended as asked, 2 for an error.
    """
    from ..qmp import serve  # the other commands start sooner without it

    with BlockGraph() as graph:
        for name, size in nodes:
            graph.add_node(name, size)
        serve(graph, path)
