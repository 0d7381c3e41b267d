# SPDX-License-Identifier: MIT
"""What all commands share: sizes as arguments, progress, warnings, printing, Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

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

from ..sizes import granularity_hint, is_granularity, parse_size
from ..store.base import Progress as Report
from ..trace import printable

MOST_BARS = 4  # of progress, at a time


class Refused(click.ClickException):
    """A command that has not done what it says: exit code 1, and why."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        warn(self.message)


def words(error: Exception) -> str:
    """What an error says, and of which file."""
    if not isinstance(error, OSError):
        return str(error)
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or error}"


def size_of(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def one_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of an option that takes a size."""
    return None if value is None else size_of(value)


def granularity_of(text: str) -> int:
    size = size_of(text)
    if not is_granularity(size):
        raise click.BadParameter(f"{size} is not a power of 2{granularity_hint(text)}")
    return size


def one_granularity(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of an option that takes a granularity."""
    return None if value is None else granularity_of(value)


@contextlib.contextmanager
def progress_bars() -> Iterator[Report]:
    """Bars on stderr that go away when done; nothing if it is no terminal."""
    progress = Progress(
        TextColumn("{task.description}", markup=False),
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
            if len(tasks) == MOST_BARS:
                progress.remove_task(tasks.pop(next(iter(tasks))))
            words = printable(what[:1].upper() + what[1:])
            tasks[what] = progress.add_task(words, total=total)
        progress.update(tasks[what], completed=done, total=total)

    try:
        progress.start()
        yield show
    finally:
        with deferred(signal.SIGINT):  # a second Ctrl-C must not leave the cursor hidden
            progress.stop()


@contextlib.contextmanager
def deferred(*numbers: int) -> Iterator[list[int]]:
    """These signals count afterwards; gives those that have come. Ignored ones stay so."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


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


def warn(text: str) -> None:
    """A line on stderr, if that takes it, with nothing in it that could steer a terminal."""
    with contextlib.suppress(OSError):
        print(printable(f"pybitmap: {text}"), file=sys.stderr, flush=True)


def warn_unlocked(path: str, *, read_only: bool = False) -> None:
    """What is risked by using a target without locks."""
    if read_only:
        warn(f"{path}: read without a lock: if a program has it open, this may be stale or torn")
    else:
        warn(
            f"{path}: opened with --no-lock: where there are no locks, a program that writes to it "
            "at the same time destroys it"
        )


def print_line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)
