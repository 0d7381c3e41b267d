# SPDX-License-Identifier: MIT
"""How Sphinx makes pages of the repository's Markdown files, docstrings and headers: `make docs`.

The root of the repository is the source folder, so a link in a Markdown file leads to the same
place here as where the file is read as it is. `include_patterns` says which files are pages.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
# Methods that stand in C otherwise; in Python they have types.
os.environ["PYBITMAP_PURE_CFFI"] = "1"

import click  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

import pybitmap  # noqa: E402
from pybitmap.cli import cli  # noqa: E402
from pybitmap.sizes import SYNTAX  # noqa: E402

project = "pybitmap"
author = "The pybitmap authors"
copyright = author
version = release = pybitmap.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_click",
    "c_header",
    "qmp_commands",
    "references",
]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "bench/RESULTS.md",
    "docs/**",
    "examples/qemu_plugin/README.md",
    "examples/traces/README.md",
    "tests/litmus/README.md",
]
exclude_patterns = ["docs/_ext"]
nitpicky = True
# Of classes those that annotations name: Python's own, and such as only this package has.
nitpick_ignore_regex = [("py:class", ".*"), ("py:exc", r"nbd\..*"), ("c:identifier", r"\w+")]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

smartquotes_action = "D"  # dashes; quotation marks may be those of code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
autoclass_content = "both"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
c_maximum_signature_line_length = 88

highlight_language = "none"  # of blocks that name none: drawings, dialogues

html_theme = "furo"
html_title = f"pybitmap {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sphinx = False
# What is opened first: the pages lie as their sources do.
templates_path = ["_templates"]
html_additional_pages = {"index": "first.html"}
html_copy_source = False


man_pages = [
    ("docs/reference/command-line", "pybitmap", "QEMU-class dirty bitmaps", [author], 1),
]
man_show_urls = True


def sizes_too(app: Sphinx, ctx: click.Context, lines: list[str]) -> None:
    """What a SIZE is stands behind the help of each command that takes one: once on the page."""
    if ctx.command is cli:
        lines += ["", SYNTAX]


def options_as_code(app: Sphinx, ctx: click.Context, lines: list[str]) -> None:
    """And examples, which are lines of a block: or two dashes become one."""
    for number, line in enumerate(lines):
        example = re.fullmatch(r"(\|  +)([^`]*\S)\s*", line)
        if example:
            lines[number] = f"{example[1]}``{example[2]}``"
        elif not line.lstrip().startswith(".."):
            option = r"(?<![\w`-])(--[a-z][\w-]*)(?=[\s,.;:)\]/]|$)"
            lines[number] = re.sub(option, r"``\1``", line)


def setup(app: Sphinx) -> None:
    app.connect("sphinx-click-process-epilog", sizes_too)
    for part in ("description", "options", "arguments"):
        app.connect(f"sphinx-click-process-{part}", options_as_code)
