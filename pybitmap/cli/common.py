# SPDX-License-Identifier: MIT
"""What all commands share: sizes as arguments, progress, warnings, printing, Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from threading import Lock, Timer
from typing import IO, TYPE_CHECKING, Any

import click

from ..sizes import granularity_hint, is_granularity, parse_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from ..store.base import Progress as Report

#: Where a command's context has what -q and -v ask for.
VERBOSITY = "pybitmap.verbosity"
QUIET, VERBOSE = -1, 1

#: Seconds after which a work is worth a progress bar.
PATIENCE = 0.5
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


class FilePath(click.Path):
    """A path. An empty one, as of a shell's variable that is not set, names nothing; to Python it
    would be the folder where the command runs. Whether it can be read, who opens it finds out."""

    def __init__(self, *, allow_dash: bool = False) -> None:
        super().__init__(readable=False, allow_dash=allow_dash)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if not value:
            self.fail("it is empty, where a path is wanted", param, ctx)
        return super().convert(value, param, ctx)


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON value, nothing else."
)


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


def _verbosity() -> int:
    """QUIET, VERBOSE or neither: 0."""
    context = click.get_current_context(silent=True)
    return context.meta.get(VERBOSITY, 0) if context else 0


@contextlib.contextmanager
def progress_bars() -> Iterator[Report]:
    """What is to be told how far a work is: it shows bars on stderr that go away when done.

    They are there for what takes longer than PATIENCE, in a terminal, and not with -q. With -v each
    part of the work is a line instead, wherever stderr goes.
    """
    verbosity = _verbosity()
    if verbosity == VERBOSE:
        told: set[str] = set()

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in told:
                told.add(what)
                warn(sentence(what))

        yield tell
        return
    bars = _Bars()
    if verbosity == QUIET or not sys.stderr.isatty():
        yield bars.show
        return
    timer = Timer(PATIENCE, bars.start)
    timer.daemon = True
    try:
        # It, and what it starts, inherit the mask. A signal that came to such a thread would not
        # wake up this one from a system call, and Ctrl-C would wait as long as that does.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            timer.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield bars.show
    finally:
        with deferred(signal.SIGINT):  # a second Ctrl-C must not leave the cursor hidden
            timer.cancel()
            timer.join()
            bars.stop()


class _Bars:
    """The last MOST_BARS works, with a bar for each once they are started.

    `start` and `show` may come from two threads.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._works: dict[str, tuple[int, int | None]] = {}
        self._tasks: dict[str, TaskID] = {}
        self._progress: Progress | None = None

    def show(self, what: str, done: int, total: int | None) -> None:
        with self._lock:
            if what not in self._works and len(self._works) == MOST_BARS:
                oldest = next(iter(self._works))
                del self._works[oldest]
                if self._progress is not None:
                    self._progress.remove_task(self._tasks.pop(oldest))
            self._works[what] = done, total
            self._draw(what)

    def start(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        if not console.is_interactive:  # a terminal that cannot move its cursor
            return
        progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        with self._lock:
            self._progress = progress
            for what in self._works:
                self._draw(what)
        with contextlib.suppress(OSError):
            progress.start()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _draw(self, what: str) -> None:
        if self._progress is None:
            return
        done, total = self._works[what]
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(sentence(what), total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)


def sentence(text: str) -> str:
    """From its first letter on, with nothing in it that could steer a terminal."""
    from ..trace import printable

    return printable(text[:1].upper() + text[1:])


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


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Whoever asks to end a program lets blocks be left as Ctrl-C does; once, for SIGTERM and
    SIGHUP. Ignored ones stay so."""

    def end(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.getsignal(each) for each in numbers}
    before = {each: how for each, how in before.items() if how is not signal.SIG_IGN}
    try:
        for each in before:
            signal.signal(each, end)
        yield
    finally:
        for each, how in before.items():
            signal.signal(each, how)


def rendered(show: Callable[[Console, int | None], object]) -> str:
    """What `show` prints, for standard output; its second argument is the terminal's width."""
    from rich.console import Console

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
    from ..trace import printable

    with contextlib.suppress(OSError):
        print(printable(f"pybitmap: {text}"), file=sys.stderr, flush=True)


def note(text: str) -> None:
    """The same, for what is no error: not with -q."""
    if _verbosity() != QUIET:
        warn(text)


def tell(text: str) -> None:
    """The same, for what was done as it was asked for: with -v only."""
    if _verbosity() == VERBOSE:
        warn(text)


def warn_unlocked(path: str, *, read_only: bool = False) -> None:
    """What is risked by using a target without locks."""
    if read_only:
        note(f"{path}: read without a lock: if a program has it open, this may be stale or torn")
    else:
        note(
            f"{path}: opened with --no-lock: where there are no locks, a program that writes to it "
            "at the same time destroys it"
        )


def print_line(console: Console, text: str, style: str = "") -> None:
    from rich.text import Text

    console.print(Text(text, style=style), soft_wrap=True)
