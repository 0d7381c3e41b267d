# SPDX-License-Identifier: MIT
"""docs/qmp.md names every command that there is, and none that there is not."""

from __future__ import annotations

import re
from pathlib import Path

from pybitmap import BlockGraph
from pybitmap.qmp import execute

PAGE = Path(__file__).parents[2] / "docs" / "qmp.md"


def test_the_page_names_the_commands_that_there_are() -> None:
    page = PAGE.read_text().partition("A backup, then,")[0]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    named: list[str] = []
    for word in re.findall("`([^`]+)`", "".join(row.split("|")[1] for row in rows)):
        if word.startswith("-"):  # of the one before: `block-dirty-bitmap-add`, `-remove`
            word = named[-1].rpartition("-")[0] + word
        named.append(word)
    reply = execute(BlockGraph(), {"execute": "query-commands"})
    commands = [each["name"] for each in reply["return"]]
    assert sorted(named) == sorted(commands)
