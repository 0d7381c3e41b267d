# SPDX-License-Identifier: MIT
"""Markdown pages as a reader follows them: what is typed, and what is printed then.

In a page,

- blocks of ``python`` with ``>>>`` are one session, in order;
- a block of ``python`` behind "into a file, `NAME`" is put into that file;
- in a block of ``console`` a line after ``$`` is typed into a shell, and what follows up to the
  next one is what it prints; where nothing follows, it only has to succeed. After a comment
  ``<!-- numbers differ -->`` the lines shown are among those that it prints, whatever numbers are
  in them.

All else is not run. Nothing here needs pytest: ``tests/first_hour.py`` uses it as well.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Callable, NamedTuple

_BLOCK = re.compile(r"^```(?P<kind>[^\n`]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_DIFFER = "<!-- numbers differ -->"


class Block(NamedTuple):
    kind: str
    text: str
    #: The paragraph before it.
    before: str
    line: int


class Typed(NamedTuple):
    command: str
    #: None: nothing is said of that.
    printed: str | None
    differs: bool
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    end = 0
    for found in _BLOCK.finditer(text):
        before = text[end : found.start()].strip().rsplit("\n\n", 1)[-1]
        yield Block(found["kind"], found["text"], before, text.count("\n", 0, found.start()) + 2)
        end = found.end()


def typed(block: Block) -> list[Typed]:
    """What is typed in a block of ``console``."""
    commands: list[tuple[str, list[str], int]] = []
    for number, line in enumerate(block.text.splitlines(), block.line):
        if line.startswith("$ "):
            commands.append((line[2:], [], number))
        elif commands:
            commands[-1][1].append(line)
    differs = _DIFFER in block.before
    return [
        Typed(command, "\n".join(lines).rstrip() if any(lines) else None, differs, number)
        for command, lines, number in commands
    ]


def same(shown: str, printed: str, *, differs: bool) -> bool:
    """Is that what is shown? Blanks at the ends of lines do not count."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().splitlines()]

    if not differs:
        return lines(shown) == lines(printed)

    def shapes(text: str) -> set[str]:
        return {" ".join(re.sub(r"\d[\d.]*", "N", line).split()) for line in lines(text)}

    return shapes(shown) <= shapes(printed)


def session(page: Path, python: str, folder: Path, environment: Mapping[str, str]) -> list[str]:
    """Run the session of a page; what went wrong."""
    if not any(">>> " in block.text for block in blocks(page)):
        return []
    done = subprocess.run(
        [python, "-m", "doctest", "-o", "NORMALIZE_WHITESPACE", str(page)],
        cwd=folder,
        env=dict(environment),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    return [] if done.returncode == 0 else [f"{page.name}: {done.stdout}{done.stderr}"]


def shell(
    page: Path,
    folder: Path,
    environment: Mapping[str, str],
    wanted: Callable[[str], bool] = lambda command: True,
) -> list[str]:
    """Make the files of a page, type its commands that are ``wanted``; what went wrong."""
    wrong: list[str] = []
    for block in blocks(page):
        named = re.search(r"into a file, `([\w.]+)`", block.before)
        if block.kind == "python" and named:
            (folder / named[1]).write_text(block.text, encoding="utf-8")
        if block.kind != "console":
            continue
        for each in typed(block):
            if wanted(each.command):
                wrong += _type(each, page, folder, environment)
    return wrong


def _type(each: Typed, page: Path, folder: Path, environment: Mapping[str, str]) -> Sequence[str]:
    done = subprocess.run(
        ["bash", "-c", each.command],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    place = f"{page.name}:{each.line}: $ {each.command}\n"
    if done.returncode != 0:
        return [f"{place}exit status {done.returncode}\n{done.stdout}{done.stderr}"]
    if each.printed is not None and not same(each.printed, done.stdout, differs=each.differs):
        return [f"{place}the page shows\n{each.printed}\nand it prints\n{done.stdout}"]
    return []
