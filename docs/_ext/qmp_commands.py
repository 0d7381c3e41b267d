# SPDX-License-Identifier: MIT
"""``.. qmp-commands::``: arguments and replies of all commands, by the schema that checks them."""

from __future__ import annotations

from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pybitmap.qmp import schema
from pybitmap.qmp.commands import COMMANDS, SESSION_COMMANDS

_NAMES = {
    schema.Str: "string",
    schema.Bool: "boolean",
    schema.Int: "integer",
    schema.Uint32: "integer of 32 bits",
    schema.Anything: "any value",
}


def members(struct: schema.Struct) -> Iterator[tuple[str, schema.Type, bool]]:
    """The name of each, its type, and whether it may be left out."""
    yield from ((name, kind, False) for name, kind in struct.required.items())
    yield from ((name, kind, True) for name, kind in struct.optional.items())


def words(kind: schema.Type) -> str:
    """A type as it is said to people."""
    if isinstance(kind, schema.ListOf):
        return f"list of {words(kind.element)}"
    if isinstance(kind, schema.Enum):
        return " or ".join(f'"{value}"' for value in kind.values)
    if isinstance(kind, schema.Alternate):
        return f"string, or {words(kind.struct)}"
    if isinstance(kind, schema.Union):
        return 'object with "type" (' + ", ".join(kind.branches) + ') and "data"'
    if isinstance(kind, schema.Struct):
        inside = ", ".join(
            f"{name}{'?' if optional else ''}: {words(each)}"
            for name, each, optional in members(kind)
        )
        return f"{{{inside}}}"
    return _NAMES[type(kind)]


def row(*cells: str | nodes.Node) -> nodes.row:
    made = nodes.row()
    for cell in cells:
        node = nodes.literal(cell, cell) if isinstance(cell, str) else cell
        made += nodes.entry("", nodes.paragraph("", "", node))
    return made


def table(head: list[str], rows: list[nodes.row]) -> nodes.table:
    group = nodes.tgroup(cols=len(head))
    group.extend(nodes.colspec(colwidth=1) for _ in head)
    group += nodes.thead("", row(*(nodes.inline(text, text) for text in head)))
    group += nodes.tbody("", *rows)
    return nodes.table("", group)


class QmpCommands(SphinxDirective):
    """A section of a command each."""

    def run(self) -> list[nodes.Node]:
        made: list[nodes.Node] = []
        every = {
            "qmp_capabilities": (schema.CAPABILITIES, schema.NOTHING),
            **{name: (each.arguments, each.returns) for name, each in COMMANDS.items()},
            **{name: (each.arguments, each.returns) for name, each in SESSION_COMMANDS.items()},
        }
        for name, (arguments, returns) in every.items():
            section = nodes.section(ids=[nodes.make_id(f"qmp {name}")], names=[name])
            section += nodes.title(name, "", nodes.literal(name, name))
            rows = [
                row(member, nodes.inline("", words(kind)), nodes.inline("", "no" if may else "yes"))
                for member, kind, may in members(arguments)
            ]
            if rows:
                section += table(["argument", "type", "has to be there"], rows)
            else:
                section += nodes.paragraph("", "Takes no arguments.")
            answer = nodes.paragraph("", "Replies ")
            answer += nodes.literal("", words(returns) if returns != schema.NOTHING else "{}")
            section += answer
            made.append(section)
        return made


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("qmp-commands", QmpCommands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
