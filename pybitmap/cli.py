# SPDX-License-Identifier: MIT
"""The `pybitmap` command.

A command here reads its arguments, has the work done by a module that knows
nothing of terminals (replay.py), and prints.  Errors are exceptions everywhere;
`main` alone turns them into words on stderr and an exit code:

    0    done; with --expect, equal
    1    done, and different from what was expected
    2    wrong usage, or input that cannot be used
    130  Ctrl-C (see __main__.py)
    141  standard output was closed by its reader, as by `head`
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .errors import BitmapError
from .node import BlockGraph
from .replay import DEFAULT_GRANULARITY, Marked, Replay, Truth, rate, replay, report
from .replay import Progress as Report
from .sizes import SIZE, exact_size, exact_sizes, is_granularity, parse_size, rough_size
from .trace import printable

EXIT_DIFFERENT = 1
EXIT_ERROR = 2
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE


# ---- replay -----------------------------------------------------------------


def print_replay(result: Replay, console: Console, width: int | None) -> None:
    """Summary, table, picture and verdict.  width: of the terminal, None if it is none."""
    trace = result.trace
    rough = f" ({rough_size(result.size)})" if result.size >= 1024 else ""
    _line(
        console,
        f"{trace.path}\n"
        f"{len(trace)} requests ({trace.writes} writes, {trace.zeroes} zeroes,"
        f" {trace.discards} discards)\n"
        f"on a disk of {result.size} bytes{rough}\n",
    )
    headings = ("granularity", "dirty bytes", "of the disk", "areas", "marks/s")
    rows = [
        (
            exact_size(marked.granularity),
            str(marked.count),
            _percent(marked.share),
            str(marked.areas),
            _millions(rate(len(trace), marked.seconds)),
        )
        for marked in result.bitmaps
    ]
    hashes = [marked.sha256 for marked in result.bitmaps]
    whole = _table((*headings, "SHA-256"), [(*row, sha256) for row, sha256 in zip(rows, hashes)])
    unbounded = console.options.update(max_width=1000)
    if width is None or Measurement.get(console, unbounded, whole).maximum <= width:
        tables = [whole]
    else:  # the hashes by themselves: cut short they would be of no use
        pairs = [(row[0], sha256) for row, sha256 in zip(rows, hashes)]
        tables = [_table(headings, rows), _table(("granularity", "SHA-256"), pairs)]
    for table in tables:
        console.print(table)
        console.print()
    marks_per_second = rate(result.marks, result.seconds)
    if marks_per_second is not None:
        _line(
            console,
            f"{result.marks} marks in {1000 * result.seconds:.2f} ms,"
            f" {_millions(marks_per_second)} in a second\n",
        )
    finest = min(result.bitmaps, key=lambda marked: marked.granularity)
    ascii_only = console.options.ascii_only
    for text in picture(finest, result.size, width or 80, ascii_only):
        _line(console, text)
    if result.truth is not None:
        _print_verdict(result, result.truth, console)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in headings:
        table.add_column(
            heading, justify="left" if heading == "SHA-256" else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    return table


def _print_verdict(result: Replay, truth: Truth, console: Console) -> None:
    granularities = [marked.granularity for marked in result.bitmaps]
    if not result.differences:
        _line(
            console,
            f"Equal to {truth.qemu} in count, extents and SHA-256 at {exact_sizes(granularities)}.",
            style="green",
        )
        return
    differing = dict.fromkeys(each.granularity for each in result.differences)
    _line(console, f"Different from {truth.qemu} at {exact_sizes(differing)}.", style="bold red")
    for each in result.differences:
        _line(
            console,
            f"{exact_size(each.granularity)} {each.field}\n"
            f"    ours  {_value(each.ours)}\n    QEMU  {_value(each.qemu)}",
        )
    for hint in result.hints:
        _line(console, f"Hint: {hint}.")


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


def _value(value: object) -> str:
    return "none" if value is None else json.dumps(value) if isinstance(value, list) else str(value)


def _percent(share: float) -> str:
    if 0 < share < 0.0001:
        return "< 0.01 %"
    if 0.9999 < share < 1:
        return "> 99.99 %"
    return f"{share:.2%}".replace("%", " %")


def _millions(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e6:.1f} M"


PICTURE_ROWS = 16


def picture(marked: Marked, size: int, width: int, ascii_only: bool = False) -> Iterator[str]:
    """Lines that show where the disk is dirty: a cell is a power of 2 of bytes, dark if dirty.

    Only clean cells are blank and only cells that are dirty throughout are full.
    """
    if size == 0:
        return
    shades, border = (" .:+#", "|") if ascii_only else (" ░▒▓█", "│")
    columns = max(16, (width - 10) // 16 * 16)
    cell = marked.granularity
    while cell * columns * PICTURE_ROWS < size:
        cell *= 2
    row = cell * columns
    labels = [exact_size(start) for start in range(0, size, row)]
    indent = max(map(len, labels))
    yield f"Where the disk is dirty, at granularity {exact_size(marked.granularity)}:"
    yield ""
    for label, start in zip(labels, range(0, size, row)):
        cells = ""
        for offset in range(start, min(start + row, size), cell):
            nbytes = min(cell, size - offset)
            dirty = marked.bitmap.count(offset, nbytes)
            cells += shades[4 if dirty == nbytes else -(-3 * dirty // nbytes)]
        yield f" {label:>{indent}} {border}{cells}{border}"
    yield ""
    yield (
        f"One cell is {exact_size(cell)}: '{shades[0]}' clean  {shades[1]} up to 1/3"
        f"  {shades[2]} up to 2/3  {shades[3]} more  {shades[4]} all"
    )
    yield ""


# ---- the command line -------------------------------------------------------


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _one_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of an option that takes a size."""
    return None if value is None else _size(value)


def _granularities(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[int]:
    """Callback of an option that takes several sizes: repeated, between commas, or both."""
    sizes = dict.fromkeys(_size(each) for value in values for each in value.split(","))
    for size in sizes:
        if not is_granularity(size):
            raise click.BadParameter(f"{size} is not a power of 2")
    return list(sizes)


class ManyGranularities(click.Command):
    """Lets `--granularity 512 4K 64K` be, which click reads as one value and two arguments."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._repeated("--granularity", args)))

    @staticmethod
    def _repeated(option: str, args: list[str]) -> Iterator[str]:
        words = iter(args)
        more = False  # may the next word be a further value?
        for word in words:
            if word == "--":
                yield word
                break
            if more and all(map(SIZE.fullmatch, word.split(","))):
                yield option
            else:
                more = word.split("=")[0] == option
            yield word
            if word == option:
                yield from islice(words, 1)
        yield from words


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pybitmap", message="%(prog)s %(version)s")
def cli() -> None:
    """QEMU-class dirty bitmaps."""


@cli.command("replay", cls=ManyGranularities)
@click.argument("trace", type=click.Path(allow_dash=True))
@click.option(
    "--size",
    metavar="SIZE",
    callback=_one_size,
    help="Size of the disk.  [default: the end of the furthest request]",
)
@click.option(
    "--granularity",
    "granularities",
    metavar="SIZE...",
    multiple=True,
    callback=_granularities,
    help="Bytes that a bit stands for, a power of 2; several make a bitmap each."
    f"  [default: {exact_size(DEFAULT_GRANULARITY)}]",
)
@click.option(
    "--expect",
    type=click.Path(),
    metavar="TRUTH.json",
    help="Compare with what QEMU said of the same trace, and take size and granularities from there"
    " unless they are given.",
)
@click.option(
    "--file", metavar="NAME", help="The file to look at, if a fio iolog writes to several."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
def replay_command(
    trace: str,
    size: int | None,
    granularities: list[int],
    expect: str | None,
    file: str | None,
    as_json: bool,
) -> int:
    """Replay a trace of block writes and show what is dirty.

    TRACE is a text file, gzipped or plain, or - for standard input: lines of `write|zero|discard
    OFFSET LENGTH` in bytes, or an iolog of fio (versions 2 and 3).  Every request marks the range
    that it covers, in one bitmap for each granularity.

    Sizes are in bytes; K, M, G and T stand for powers of 1024.

    \b
    Examples:
      pybitmap replay guest.trace.gz --expect guest.json
      pybitmap replay guest.trace.gz --granularity 512 4K 64K
      zcat guest.trace.gz | pybitmap replay - --size 8G --json
      fio --name=j --size=1G --rw=randwrite --write_iolog=j.log
      pybitmap replay j.log

    Exit code: 0 done (and equal), 1 different from TRUTH.json, 2 for an error.
    """
    with _progress() as progress:
        result = replay(
            trace,
            size=size,
            granularities=granularities,
            expect=expect,
            file=file,
            progress=progress,
        )
    if as_json:
        _write(json.dumps(report(result), indent=1) + "\n")
    else:
        _write(_rendered(lambda console, width: print_replay(result, console, width)))
    return EXIT_DIFFERENT if result.differences else 0


def _nodes(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, int]]:
    """Callback of an option that takes NAME,size=SIZE, repeatedly."""
    nodes = []
    for value in values:
        name, separator, size = value.rpartition(",size=")
        if not separator:
            raise click.BadParameter(f"{value!r} is not NAME,size=SIZE")
        nodes.append((name, _size(size)))
    return nodes


@cli.command("serve")
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
    from .qmp import serve  # the other commands start sooner without it

    with BlockGraph() as graph:
        for name, size in nodes:
            graph.add_node(name, size)
        serve(graph, path)


# ---- shared by all commands -------------------------------------------------


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
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


def _rendered(show: Callable[[Console, int | None], object]) -> str:
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


def _write(text: str) -> None:
    """To standard output, at once, so that an error can say that it was there."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        error.filename = "standard output"
        raise


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.  KeyboardInterrupt passes through."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be anything
    try:
        try:
            with cli.make_context("pybitmap", list(sys.argv[1:] if args is None else args)) as ctx:
                code = cli.invoke(ctx)
        except click.exceptions.Exit as error:  # --help, --version
            code = error.exit_code
        sys.stdout.flush()
        return int(code or 0)
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        return error.exit_code
    except BrokenPipeError:
        _settle_stdout()
        return EXIT_PIPE_CLOSED
    except OSError as error:
        _settle_stdout()
        name = f"{error.filename}: " if error.filename else ""
        return _complain(f"{name}{error.strerror or error}")
    except BitmapError as error:
        return _complain(str(error))
    except MemoryError as error:
        return _complain(str(error) or "out of memory")


def _complain(message: str) -> int:
    """One line on stderr, with nothing in it that could steer a terminal."""
    with contextlib.suppress(OSError):
        print(f"pybitmap: {printable(message)}", file=sys.stderr)
    return EXIT_ERROR


def _settle_stdout() -> None:
    """Drops what could not be written: it would fail once more when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
