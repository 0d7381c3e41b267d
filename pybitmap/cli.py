# SPDX-License-Identifier: MIT
"""The `pybitmap` command.

Each command has two halves: plain functions that do the work and know nothing
of terminals, and a thin click command that reads the arguments and prints.
Errors are exceptions everywhere; `main` alone turns them into words on stderr
and an exit code:

    0    done; with --expect, equal
    1    done, and different from what was expected
    2    wrong usage, or input that cannot be used
    130  Ctrl-C (see __main__.py)
    141  standard output was closed by its reader, as by `head`
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from typing import Any, NoReturn, cast

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .errors import BitmapError, InvalidError
from .hbitmap import HBitmap
from .trace import Trace, printable, read_trace

EXIT_DIFFERENT = 1
EXIT_ERROR = 2
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE

DEFAULT_GRANULARITY = 65536


# ---- sizes ------------------------------------------------------------------

_SIZE = re.compile(r"([0-9]{1,19})(?:([KMGTPE])(?:iB)?)?", re.ASCII | re.IGNORECASE)
_SUFFIXES = "KMGTPE"
_MAX_SIZE = (1 << 63) - 1


def parse_size(text: str) -> int:
    """Bytes: decimal, with one of K, M, G, T, P, E for powers of 1024.  ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size in bytes, such as 4096, 64K or 1G")
    digits, suffix = match.groups()
    size = int(digits) << (10 * (1 + _SUFFIXES.index(suffix.upper())) if suffix else 0)
    if size > _MAX_SIZE:
        raise ValueError(f"{text!r} is beyond 2^63 - 1 bytes")
    return size


def exact_size(nbytes: int) -> str:
    """The shortest text from which parse_size makes `nbytes` again: 65536 -> 64K."""
    unit = 0
    while nbytes and nbytes % 1024 == 0 and unit < len(_SUFFIXES):
        nbytes //= 1024
        unit += 1
    return f"{nbytes}{_SUFFIXES[unit - 1] if unit else ''}"


def rough_size(nbytes: int) -> str:
    """For people, from 1 KiB up: 1313280 -> 1.3 MiB."""
    unit = (nbytes.bit_length() - 1) // 10
    number = f"{nbytes / (1 << 10 * unit):.1f}"
    return f"{number[:-2] if number.endswith('.0') else number} {_SUFFIXES[unit - 1]}iB"


# ---- replay: marking --------------------------------------------------------


@dataclass(frozen=True)
class Marked:
    """What a bitmap of one granularity says after all requests of a trace."""

    granularity: int  #: bytes
    bitmap: HBitmap
    seconds: float  #: spent marking, nothing else
    count: int  #: dirty bytes as QEMU counts them: a partial last chunk counts whole
    areas: int  #: QEMU's `extents`
    areas_bytes: int  #: sum of their lengths, which end with the disk
    areas_sha256: str  #: of them as text, `OFFSET LENGTH\\n` each
    sha256: str  #: of the bits


def mark(trace: Trace, size: int, granularity: int, advance: Callable[[int], object]) -> Marked:
    """Marks every request in a fresh bitmap; `advance` is told how many were, now and then."""
    where = f"a disk of {size} bytes at granularity {granularity}"
    try:
        bitmap = HBitmap(size, granularity.bit_length() - 1)
    except InvalidError as error:
        raise InvalidError(f"{where}: {error}") from None
    except MemoryError:
        raise MemoryError(f"{where}: not enough memory for the bitmap") from None
    offsets, lengths = memoryview(trace.offsets), memoryview(trace.lengths)
    seconds = 0.0
    done, step = 0, 256
    while done < len(trace):
        starts, counts = offsets[done : done + step], lengths[done : done + step]
        began = time.perf_counter()
        bitmap.set_many(starts, counts)
        elapsed = time.perf_counter() - began
        seconds += elapsed
        done += len(starts)
        advance(len(starts))
        # As much at once as still lets Ctrl-C through without a wait.
        step = step * 2 if elapsed < 0.05 else max(1, step // 2)

    areas = 0
    digest = hashlib.sha256()
    each = iter(bitmap.areas())
    while batch := list(islice(each, 4096)):
        areas += len(batch)
        digest.update("".join(f"{start} {count}\n" for start, count in batch).encode())
    return Marked(
        granularity=granularity,
        bitmap=bitmap,
        seconds=seconds,
        count=bitmap.count(),
        areas=areas,
        areas_bytes=bitmap.count(0, size),
        areas_sha256=digest.hexdigest(),
        sha256=bitmap.sha256(),
    )


def check_size(trace: Trace, size: int) -> None:
    """Refuses a trace of which a request ends beyond `size`, by its line."""
    if trace.end <= size:
        return
    for index, (offset, length) in enumerate(zip(trace.offsets, trace.lengths)):
        if offset + length > size:
            raise InvalidError(
                f"{trace.where(index)}: offset {offset} + length {length}"
                f" is beyond the size of the disk, {size}"
            )


# ---- replay: QEMU's truth ---------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What QEMU says of one of its bitmaps; the names are those of the file."""

    granularity: int
    count: int
    extents: int
    extents_bytes: int
    extents_sha256: str
    extents_list: list[tuple[int, int]] | None
    sha256: str


@dataclass(frozen=True)
class Truth:
    """A file of the format `qemu-write-trace-1` (examples/traces/README.md), as far as used."""

    path: str
    size: int
    bitmaps: dict[int, Expected]  #: by granularity
    qemu: str  #: name and version, for people
    requests: int | None
    text_sha256: str | None


@dataclass(frozen=True)
class Difference:
    granularity: int
    field: str
    ours: Any  #: a value of JSON
    qemu: Any


def read_truth(path: str) -> Truth:
    """InvalidError, naming what is wrong, if it is not a truth; OSError."""
    with open(path, encoding="utf-8") as file:
        try:
            return _truth(path, json.load(file))
        except RecursionError:
            raise InvalidError(f"{path}: not a truth: nested too deep") from None
        except UnicodeDecodeError:
            raise InvalidError(f"{path}: not a truth: not UTF-8") from None
        except json.JSONDecodeError as error:
            raise InvalidError(f"{path}: not JSON: {error}") from None
        except ValueError as error:
            raise InvalidError(f"{path}: not a truth: {error}") from None


def _truth(path: str, data: Any) -> Truth:
    top = _Fields("", data)
    bitmaps: dict[int, Expected] = {}
    for index, each in enumerate(top.items("bitmaps")):
        fields = _Fields(f"bitmaps[{index}].", each)
        granularity = fields.number("granularity")
        if not _is_granularity(granularity):
            raise ValueError(f"{fields.name}granularity: {granularity} is no power of 2")
        if granularity in bitmaps:
            raise ValueError(f"{fields.name}granularity: {granularity} is there already")
        bitmaps[granularity] = Expected(
            granularity=granularity,
            count=fields.number("count"),
            extents=fields.number("extents"),
            extents_bytes=fields.number("extents_bytes"),
            extents_sha256=fields.sha256("extents_sha256"),
            extents_list=fields.extents("extents_list") if "extents_list" in each else None,
            sha256=fields.sha256("sha256"),
        )
    if not bitmaps:
        raise ValueError("bitmaps: there is none")
    trace = _Fields("trace.", top.data.get("trace", {}))
    qemu = _Fields("qemu.", top.data.get("qemu", {}))
    return Truth(
        path=path,
        size=top.number("disk_size"),
        bitmaps=bitmaps,
        qemu=f"QEMU {printable(qemu.text('version'))}" if "version" in qemu.data else "QEMU",
        requests=trace.number("requests") if "requests" in trace.data else None,
        text_sha256=trace.sha256("text_sha256") if "text_sha256" in trace.data else None,
    )


class _Fields:
    """A JSON object whose fields are checked as they are taken; ValueError names them."""

    def __init__(self, name: str, data: Any) -> None:
        self.name = name  # what stands before the name of a field
        if not isinstance(data, dict):
            raise ValueError(f"{name.rstrip('.') or 'the file'}: expected an object")
        self.data: dict[str, Any] = data

    def text(self, field: str) -> str:
        value = self.data.get(field)
        if not isinstance(value, str):
            self._refuse(field, "text")
        return value

    def number(self, field: str) -> int:
        value = self.data.get(field)
        if not _is_number(value):
            self._refuse(field, "a number from 0 to 2^63 - 1")
        return cast(int, value)

    def sha256(self, field: str) -> str:
        value = self.data.get(field)
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            self._refuse(field, "64 digits of lowercase hexadecimal")
        return value

    def items(self, field: str) -> list[Any]:
        value = self.data.get(field)
        if not isinstance(value, list):
            self._refuse(field, "a list")
        return value

    def extents(self, field: str) -> list[tuple[int, int]]:
        extents = self.items(field)
        for each in extents:
            if not (isinstance(each, list) and len(each) == 2 and all(map(_is_number, each))):
                self._refuse(field, "[offset, length] each")
        return [(offset, length) for offset, length in extents]

    def _refuse(self, field: str, expected: str) -> NoReturn:
        found = json.dumps(self.data[field])[:60] if field in self.data else "nothing"
        raise ValueError(f"{self.name}{field}: expected {expected}, found {found}")


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_SIZE


def _is_granularity(nbytes: int) -> bool:
    return nbytes > 0 and nbytes & (nbytes - 1) == 0


def compare(marked: Marked, expected: Expected) -> list[Difference]:
    """In what our bitmap differs from QEMU's."""
    pairs: list[tuple[str, Any, Any]] = [
        ("count", marked.count, expected.count),
        ("extents", marked.areas, expected.extents),
        ("extents_bytes", marked.areas_bytes, expected.extents_bytes),
        ("extents_sha256", marked.areas_sha256, expected.extents_sha256),
        ("sha256", marked.sha256, expected.sha256),
    ]
    if expected.extents_list is not None:
        both = zip_longest(marked.bitmap.areas(), expected.extents_list)
        differing = ((index, pair) for index, pair in enumerate(both) if pair[0] != pair[1])
        for index, (ours, theirs) in islice(differing, 3):
            pairs.append((f"extents_list[{index}]", ours and list(ours), theirs and list(theirs)))
    return [
        Difference(marked.granularity, field, ours, theirs)
        for field, ours, theirs in pairs
        if ours != theirs
    ]


# ---- replay: the job --------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """A trace replayed, and compared if there was something to compare with."""

    trace: Trace
    size: int  #: bytes
    bitmaps: list[Marked]
    truth: Truth | None
    differences: list[Difference]
    hints: list[str]  #: why they may differ

    @property
    def marks(self) -> int:
        """Requests times granularities."""
        return len(self.trace) * len(self.bitmaps)

    @property
    def seconds(self) -> float:
        """Spent marking, nothing else."""
        return sum(marked.seconds for marked in self.bitmaps)


def replay(
    trace_path: str,
    *,
    size: int | None = None,
    granularities: Sequence[int] = (),
    expect: str | None = None,
    file: str | None = None,
    progress: Progress,
) -> Replay:
    """The job of `pybitmap replay`; the arguments are its options."""
    truth = None if expect is None else read_truth(expect)
    if truth is not None:
        size = truth.size if size is None else size
        granularities = granularities or list(truth.bitmaps)
        missing = [each for each in granularities if each not in truth.bitmaps]
        if missing:
            raise InvalidError(
                f"{truth.path}: has no bitmap of granularity {_sizes(missing)};"
                f" it has {_sizes(truth.bitmaps)}"
            )

    reading = progress.add_task("Reading", total=None)
    trace = read_trace(
        trace_path,
        file=file,
        progress=lambda done, total: progress.update(reading, completed=done, total=total),
    )
    progress.remove_task(reading)
    if size is None:
        size = trace.end
    check_size(trace, size)

    bitmaps = []
    for granularity in granularities or [DEFAULT_GRANULARITY]:
        task = progress.add_task(f"Marking {exact_size(granularity)}", total=len(trace))
        bitmaps.append(mark(trace, size, granularity, partial(progress.advance, task)))

    differences: list[Difference] = []
    hints = []
    if truth is not None:
        for marked in bitmaps:
            differences += compare(marked, truth.bitmaps[marked.granularity])
        if differences and size != truth.size:
            hints.append(f"the truth is of a disk of {truth.size} bytes, not {size}")
        if differences and truth.requests not in (None, len(trace)):
            hints.append(f"the truth is of {truth.requests} requests, not {len(trace)}")
        if differences and truth.text_sha256 not in (None, trace.text_sha256):
            hints.append("the truth is of another trace: their texts' SHA-256 differ")
    return Replay(trace, size, bitmaps, truth, differences, hints)


def _sizes(granularities: Iterable[int]) -> str:
    return ", ".join(map(exact_size, granularities))


# ---- replay: what is printed ------------------------------------------------


def replay_json(result: Replay) -> dict[str, Any]:
    """The same as numbers: the object that --json prints."""
    trace = result.trace
    report: dict[str, Any] = {
        "trace": trace.path,
        "size": result.size,
        "requests": len(trace),
        "writes": trace.writes,
        "zeroes": trace.zeroes,
        "discards": trace.discards,
        "text_sha256": trace.text_sha256,
        "bitmaps": [
            {
                "granularity": marked.granularity,
                "count": marked.count,
                "share": _share(marked, result.size),
                "areas": marked.areas,
                "extents_bytes": marked.areas_bytes,
                "extents_sha256": marked.areas_sha256,
                "sha256": marked.sha256,
                "seconds": marked.seconds,
                "marks_per_second": _rate(len(trace), marked.seconds),
            }
            for marked in result.bitmaps
        ],
        "marks": result.marks,
        "seconds": result.seconds,
        "marks_per_second": _rate(result.marks, result.seconds),
    }
    if result.truth is not None:
        report["expect"] = {
            "truth": result.truth.path,
            "equal": not result.differences,
            "differences": [vars(each) for each in result.differences],
            "hints": result.hints,
        }
    return report


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
            _percent(_share(marked, result.size)),
            str(marked.areas),
            _millions(_rate(len(trace), marked.seconds)),
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
    rate = _rate(result.marks, result.seconds)
    if rate is not None:
        _line(
            console,
            f"{result.marks} marks in {1000 * result.seconds:.2f} ms,"
            f" {_millions(rate)} in a second\n",
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
            f"Equal to {truth.qemu} in count, extents and SHA-256 at {_sizes(granularities)}.",
            style="green",
        )
        return
    differing = dict.fromkeys(each.granularity for each in result.differences)
    _line(console, f"Different from {truth.qemu} at {_sizes(differing)}.", style="bold red")
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


def _share(marked: Marked, size: int) -> float:
    return marked.areas_bytes / size if size else 0.0


def _percent(share: float) -> str:
    if 0 < share < 0.0001:
        return "< 0.01 %"
    if 0.9999 < share < 1:
        return "> 99.99 %"
    return f"{share:.2%}".replace("%", " %")


def _rate(marks: int, seconds: float) -> float | None:
    return marks / seconds if seconds else None


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
        if not _is_granularity(size):
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
            if more and all(map(_SIZE.fullmatch, word.split(","))):
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
        _write(json.dumps(replay_json(result), indent=1) + "\n")
    else:
        _write(_rendered(lambda console, width: print_replay(result, console, width)))
    return EXIT_DIFFERENT if result.differences else 0


# ---- shared by all commands -------------------------------------------------


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
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
    try:
        progress.start()
        yield progress
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
