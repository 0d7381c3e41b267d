# SPDX-License-Identifier: MIT
"""What all commands share: sizes as arguments, progress on stderr, printing, Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..replay import Progress as Report
from ..sizes import parse_size


def size_of(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def one_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of an option that takes a size."""
    return None if value is None else size_of(value)


@contextlib.contextmanager
def progress_bars() -> Iterator[Report]:
    """Bars on stderr that go away when done; nothing if it is no terminal."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int | None) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done, total=total)

    try:
        progress.start()
        yield show
    finally:
        with _interrupt_deferred():  # a second Ctrl-C must not leave the cursor hidden
            progress.stop()


@contextlib.contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Ctrl-C meanwhile counts afterwards."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def rendered(show: Callable[[Console, int | None], object]) -> str:
    """What `show` prints, for standard output; its second argument is the terminal's width."""
    terminal = sys.stdout.isatty()
    # Not printed to standard output itself: Rich has its own idea of what to do when that fails.
    page = io.TextIOWrapper(io.BytesIO(), sys.stdout.encoding, errors="backslashreplace")
    console = Console(
        file=page,
        force_terminal=terminal,
        width=None if terminal else 200,
        highlight=False,
        markup=False,
        emoji=False,
    )
    show(console, console.width if terminal else None)
    page.seek(0)
    text = page.read()
    # Rich fills lines with blanks, which nobody wants in a file.
    return text if terminal else re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def write(text: str) -> None:
    """To standard output, at once, so that an error can say that it was there."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        error.filename = "standard output"
        raise


def print_line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)
