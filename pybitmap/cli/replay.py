# SPDX-License-Identifier: MIT
"""`pybitmap replay`: a trace of block writes, and what is dirty after it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..picture import Cells, percent
from ..replay import (
    DEFAULT_GRANULARITY,
    DEFAULT_MEMORY_LIMIT,
    Marked,
    Replay,
    Truth,
    rate,
    replay,
    report,
)
from ..sizes import exact_size, exact_sizes, is_size, rough_size
from ..trace import printable
from .common import (
    FilePath,
    granularity_of,
    json_option,
    one_size,
    print_line,
    progress_bars,
    rendered,
    write,
)
from .extents import FORMATS, write_extents
from .group import Command, command

EXIT_DIFFERENT = 1


def print_replay(result: Replay, console: Console, width: int | None) -> None:
    """Summary, table, picture and verdict; of another trace than was expected, that alone.

    width: of the terminal, None if it is none.
    """
    if result.truth is not None and result.hints:
        _print_verdict(result, result.truth, console)
        return
    trace = result.trace
    rough = f" ({rough_size(result.size)})" if result.size >= 1024 else ""
    print_line(
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
            percent(marked.share),
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
        print_line(
            console,
            f"{result.marks} marks in {1000 * result.seconds:.2f} ms,"
            f" {_millions(marks_per_second)} in a second\n",
        )
    finest = min(result.bitmaps, key=lambda marked: marked.granularity)
    ascii_only = console.options.ascii_only
    for text in picture(finest, result.size, width or 80, ascii_only):
        print_line(console, text)
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
        print_line(
            console,
            f"Equal to {truth.qemu} in count, extents and SHA-256 at {exact_sizes(granularities)}.",
            style="green",
        )
        return
    if result.hints:  # what differs says nothing then
        what = f"{result.trace.path} is not what {truth.path} is of:"
        print_line(console, printable(what), style="bold red")
        for hint in result.hints:
            print_line(console, f"  {hint}")
        print_line(console, "Without --expect it is shown what is dirty.")
        return
    differing = dict.fromkeys(each.granularity for each in result.differences)
    print_line(
        console, f"Different from {truth.qemu} at {exact_sizes(differing)}.", style="bold red"
    )
    for each in result.differences:
        print_line(
            console,
            f"{exact_size(each.granularity)} {each.field}\n"
            f"    ours  {_value(each.ours)}\n    QEMU  {_value(each.qemu)}",
        )


def _value(value: object) -> str:
    return "none" if value is None else json.dumps(value) if isinstance(value, list) else str(value)


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
    cells = Cells(marked.bitmap, max(16, (width - 10) // 16 * 16), PICTURE_ROWS)
    rows = [(exact_size(start), levels) for start, levels in cells.rows()]
    indent = max(len(label) for label, _ in rows)
    yield f"Where the disk is dirty, at granularity {exact_size(marked.granularity)}:"
    yield ""
    for label, levels in rows:
        yield f" {label:>{indent}} {border}{''.join(shades[each] for each in levels)}{border}"
    yield ""
    yield (
        f"One cell is {exact_size(cells.cell)}: '{shades[0]}' clean  {shades[1]} up to 1/3"
        f"  {shades[2]} up to 2/3  {shades[3]} more  {shades[4]} all"
    )
    yield ""


# ---- the command ------------------------------------------------------------


def _granularities(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[int]:
    """Callback of an option that takes several sizes: repeated, between commas, or both."""
    return list(
        dict.fromkeys(granularity_of(each) for value in values for each in value.split(","))
    )


class ManyGranularities(Command):
    """Lets `-g 512 4K 64K` be, which click reads as one value and two arguments."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._repeated("--granularity", "-g", args)))

    @staticmethod
    def _repeated(option: str, short: str, args: list[str]) -> Iterator[str]:
        words = iter(args)
        more = False  # may the next word be a further value?
        for word in words:
            if word == "--":
                yield word
                break
            if more and all(map(is_size, word.split(","))):
                yield option
            else:
                more = word.split("=")[0] == option or word.startswith(short)
            yield word
            if word in (option, short):
                yield from islice(words, 1)
        yield from words


def _print_extents(result: Replay, form: str) -> None:
    """Those of the only bitmap to standard output, and to stderr in what they are not QEMU's."""
    [marked] = result.bitmaps
    write_extents(marked.bitmap.areas(), form)
    truth = result.truth
    if truth is not None and result.differences:
        with contextlib.suppress(OSError):
            verdict = rendered(lambda console, _: _print_verdict(result, truth, console))
            click.echo(verdict, err=True, nl=False)


@command("replay", cls=ManyGranularities)
@click.argument("trace", type=FilePath(allow_dash=True))
@click.option(
    "--size",
    metavar="SIZE",
    callback=one_size,
    help="Size of the disk.  [default: the end of the furthest request]",
)
@click.option(
    "-g",
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
    type=FilePath(),
    metavar="TRUTH.json",
    help="Compare with what QEMU said of the same trace, and take size and granularities from there"
    " unless they are given.",
)
@click.option(
    "--file",
    metavar="NAME",
    help="The file to look at, if a fio iolog writes to several; of blkparse, the device, as 8,0.",
)
@json_option
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="Print the dirty extents, nothing else: a list of objects, or lines below a heading, as"
    " `pybitmap dump` does. For one granularity.",
)
@click.option(
    "--memory-limit",
    metavar="SIZE",
    default=exact_size(DEFAULT_MEMORY_LIMIT),
    show_default=True,
    callback=one_size,
    help="What bitmaps may take in memory, if all is dirty; half of that without --size, and 1/256"
    " for the text of TRUTH.json.",
)
def replay_command(
    trace: str,
    size: int | None,
    granularities: list[int],
    expect: str | None,
    file: str | None,
    as_json: bool,
    form: str | None,
    memory_limit: int,
) -> int:
    """Replay a trace of block writes and show what is dirty.

    TRACE is a text file, gzipped or plain, or - for standard input: lines of `write|zero|discard
    OFFSET LENGTH` in bytes, an iolog of fio (versions 2 and 3), or the text of blkparse.  Every
    request marks the range that it covers, in one bitmap for each granularity.

    A trace may be of any length; a line
    of it has at most 64K.

    \b
    Examples:
      pybitmap replay guest.trace.gz --expect guest.json
      pybitmap replay guest.trace.gz -g 512 4K 64K
      zcat guest.trace.gz | pybitmap replay - --size 8G --json
      pybitmap replay guest.trace.gz --format csv > areas.csv
      fio --name=j --size=1G --rw=randwrite --write_iolog=log
      pybitmap replay log
      blktrace -d /dev/sda -w 60 -o - |
        blkparse -i - | pybitmap replay -

    If TRUTH.json is of another trace, or disk, that is all that is said.

    Exit code: 0 done (and equal), 1 different from TRUTH.json, 2 for an error.
    """
    if form is not None and as_json:
        raise click.UsageError("Give either --json or --format: each prints nothing else.")
    if form is not None and (len(granularities) > 1 or (expect and not granularities)):
        raise click.UsageError(
            "With --format, choose one --granularity: extents are those of one bitmap."
        )
    with progress_bars() as progress:
        result = replay(
            trace,
            size=size,
            granularities=granularities,
            expect=expect,
            file=file,
            memory_limit=memory_limit,
            progress=progress,
        )
    if form is not None:
        _print_extents(result, form)
    elif as_json:
        write(json.dumps(report(result), indent=1) + "\n")
    else:
        write(rendered(lambda console, width: print_replay(result, console, width)))
    return EXIT_DIFFERENT if result.differences else 0
