# SPDX-License-Identifier: MIT
"""What docstrings and Markdown files refer to, as people write it, found where Sphinx has it.

- ``:meth:`HBitmap.areas``` in whatever module means the one that is documented by that name.
- A link to a folder of the repository leads to its README.
- Classes that only other calls make (``graph.add_node``) are shown without the arguments of theirs.
"""

from __future__ import annotations

import os
import posixpath
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

_MADE = {"BlockNode", "DirtyBitmap", "Frozen", "Transaction", "Taken", "Volume", "Writing"}


def by_end(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Element | None:
    """Something of Python's whose full name ends so; the shortest, if there are several."""
    if node.get("refdomain") != "py":
        return None
    end = "." + node["reftarget"].lstrip(".")
    objects = env.domains["py"].objects
    found = sorted((name for name in objects if name.endswith(end)), key=len)
    if not found:
        return None
    entry = objects[found[0]]
    return make_refnode(
        app.builder, node["refdoc"], entry.docname, entry.node_id, content, found[0]
    )


def to_folders(app: Sphinx, doctree: nodes.document) -> None:
    """They lead to the README of the folder, if it is a page; else there is its name alone."""
    env = app.env
    for node in list(doctree.findall(pending_xref)):
        here = posixpath.dirname(env.docname)
        path = posixpath.normpath(posixpath.join(here, node["reftarget"]))
        if node["reftype"] != "myst" or not os.path.isdir(os.path.join(app.srcdir, path)):
            continue
        page = posixpath.join(path, "README")
        if page not in env.found_docs:
            node.replace_self(node.children)
            continue
        node["refdomain"], node["reftype"], node["reftarget"] = "std", "doc", f"/{page}"
        node["refexplicit"] = True


def without_arguments(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    if what == "class" and name.rpartition(".")[2] in _MADE:
        return "", ""
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", by_end)
    app.connect("doctree-read", to_folders)
    app.connect("autodoc-process-signature", without_arguments)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
