# SPDX-License-Identifier: MIT
"""``.. c-header:: hbitmap.h``: the reference of a header, made of its own comments.

The headers are the contract of the C core: a head, and a comment over each declaration or group of
them, in plain words and with drawings. Tools that read headers (Doxygen with Breathe, Hawkmoth)
want markup in the comments and a parser of C; what is needed here is which comment stands over
which declaration, between the marks that cffi reads from as well (``csrc/ffi_build.py``).

In comments, what is indented is a drawing, `this` is code, and functions become links.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from docutils import nodes
from sphinx.addnodes import desc_content, pending_xref
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

CSRC = Path(__file__).resolve().parents[2] / "csrc"

_TOKENS = re.compile(
    r"/\*(?P<comment>.*?)\*/"
    r"|(?P<define>\#define[^\n]*)"
    r"|(?P<struct>typedef\s+(?:struct|enum)\s+\w+\s*\{.*?\}\s*\w+\s*;)"
    r"|(?P<block>(?:struct|enum)\s+\w+\s*\{.*?\}\s*;)"
    r"|(?P<declaration>[^/;\#\s][^;]*;)"
    r"|(?P<gap>\n[ \t]*(?=\n))",
    re.DOTALL,
)
_SECTION = re.compile(r"-{4} (.*?) -{4,}")


class Group(NamedTuple):
    """Declarations that one comment is over; of a section: none, and its title."""

    comment: str
    declarations: list[str]
    section: str = ""


def text_of(comment: str) -> str:
    """A comment without its stars."""
    lines = [
        re.sub(r"^\s*\*? ?", "", line) if i else line.lstrip("* ")
        for i, line in enumerate(comment.split("\n"))
    ]
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def head(source: str) -> str:
    """The comment that a header begins with, behind its licence."""
    found = re.search(r"/\*\n(.*?)\*/", source, re.DOTALL)
    if found is None:
        raise ValueError("the header has no comment at its head")
    return text_of("\n" + found[1])


def groups(source: str) -> Iterator[Group]:
    """What stands between the marks, in order."""
    marked = re.search(r"/\* cdef: begin \*/(.*)/\* cdef: end \*/", source, re.DOTALL)
    if marked is None:
        return
    comment: str = ""
    found: list[str] = []
    for token in _TOKENS.finditer(marked[1]):
        kind, text = token.lastgroup, token[0]
        if kind in ("comment", "gap") and (found or (kind == "comment" and comment)):
            yield Group(comment, found)
            comment, found = "", []
        if kind == "comment":
            section = _SECTION.search(text)
            if section:
                yield Group("", [], section[1].strip())
            else:
                comment = text_of(token["comment"])
        elif kind != "gap":
            found.append(text)
    if found or comment:
        yield Group(comment, found)


def directive_of(declaration: str) -> tuple[str, str]:
    """Which directive of Sphinx's describes it, and with what signature."""
    plain = re.sub(r"/\*.*?\*/", "", declaration, flags=re.DOTALL)
    plain = re.sub(r"\s+", " ", plain).strip().rstrip(";").strip()
    if plain.startswith("#define"):
        return "c:macro", plain.split()[1].split("(")[0]
    if "{" in plain:
        return "c:struct", re.findall(r"\w+", plain.split("{")[0])[-1]
    if plain.startswith("typedef struct"):
        return "c:struct", plain.split()[-1]
    if plain.startswith("typedef"):
        return "c:type", plain[len("typedef ") :]
    if "(" in plain:
        return "c:function", plain
    if plain.startswith(("struct ", "enum ")):
        return "c:struct", plain.split()[1]
    return "c:var", plain


def members_of(declaration: str) -> str:
    """The lines of a struct, or of a macro with a value, as they are; of others nothing."""
    if "{" in declaration:
        return declaration
    if declaration.startswith("#define"):
        return declaration
    return ""


_POINT = re.compile(r" +\([a-z]\) ")


def blocks(text: str) -> Iterator[list[str]]:
    """The lines of a comment by paragraphs, drawings (from four blanks on) and points ("  (a) ...",
    of which further lines are indented, too)."""
    block: list[str] = []
    for line in text.split("\n"):
        points = bool(block) and _POINT.match(block[0]) is not None
        drawing = bool(block) and block[0].startswith("    ")
        if block and (
            (not line and not drawing)
            or (line and drawing and not line.startswith("    "))
            or (line and points and not line.startswith("  "))
            or (not points and not drawing and _POINT.match(line))
            or (not points and not drawing and line.startswith("    "))
        ):
            yield block
            block = []
        if line or block:
            block.append(line)
    while block and not block[-1]:
        block.pop()
    if block:
        yield block


_INLINE = re.compile(r"`([^`]+)`|\b(hb[a-z]*_\w+|pybitmap_\w+)\b(?!\.h\b)")


class CHeader(SphinxDirective):
    """See the head of this module."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = CSRC / self.arguments[0]
        self.env.note_dependency(str(path))
        source = path.read_text(encoding="utf-8")
        made: list[nodes.Node] = list(self._prose(head(source)))
        for group in groups(source):
            if group.section:
                made.append(nodes.rubric(text=group.section.capitalize()))
            elif not group.declarations:
                made.extend(self._prose(group.comment))
            else:
                made.extend(self._described(group))
        return made

    def _described(self, group: Group) -> Iterator[nodes.Node]:
        kinds: dict[str, list[str]] = {}
        for declaration in group.declarations:
            kind, signature = directive_of(declaration)
            kinds.setdefault(kind, []).append(signature)
        shown = "\n".join(filter(None, map(members_of, group.declarations)))
        content: list[nodes.Node] = list(self._prose(group.comment))
        if shown:
            content.append(nodes.literal_block(shown, shown, language="c"))
        for kind, signatures in kinds.items():
            indent = "\n" + " " * (len(kind) + 7)
            for node in self.parse_text_to_nodes(f".. {kind}:: {indent.join(signatures)}\n"):
                for body in node.findall(desc_content):
                    body.extend(content)
                    content = []
                yield node

    def _prose(self, text: str) -> Iterator[nodes.Node]:
        for block in blocks(text):
            if block[0].startswith("    "):
                drawing = "\n".join(line[4:] for line in block)
                yield nodes.literal_block(drawing, drawing, language="none")
            elif _POINT.match(block[0]):
                points = nodes.enumerated_list(enumtype="loweralpha", prefix="(", suffix=")")
                for point in re.split(r"\n(?= +\([a-z]\) )", "\n".join(block)):
                    words = " ".join(_POINT.sub("", point).split())
                    points += nodes.list_item("", nodes.paragraph("", "", *self._inline(words)))
                yield points
            else:
                yield nodes.paragraph("", "", *self._inline(" ".join(block)))

    def _inline(self, text: str) -> Iterator[nodes.Node]:
        begin = re.match(r"[A-Z][A-Z' ]+\.(?= )|[A-Z][A-Z ]+[A-Z](?= [a-z])", text)
        if begin:
            yield nodes.strong(begin[0], begin[0])
            text = text[begin.end() :]
        at = 0
        for found in _INLINE.finditer(text):
            yield nodes.Text(text[at : found.start()])
            at = found.end()
            if found[1]:
                yield nodes.literal(found[1], found[1])
                continue
            name = found[2]
            reference = pending_xref(
                "",
                refdomain="c",
                reftype="identifier",
                reftarget=name,
                refexplicit=False,
                refwarn=False,
                refdoc=self.env.docname,
            )
            reference += nodes.literal(name, name)
            yield reference
        yield nodes.Text(text[at:])


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("c-header", CHeader)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
