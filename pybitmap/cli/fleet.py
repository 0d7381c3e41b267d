# SPDX-License-Identifier: MIT
"""The commands for the bitmaps of many disks: `pybitmap fleet scan`, `union`, `plan`."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from ..sizes import is_size, parse_size, rough_size
from .common import (
    FilePath,
    Refused,
    json_option,
    note,
    progress_bars,
    rendered,
    tell,
    unwinding,
    write,
)
from .group import Group, command

if TYPE_CHECKING:
    from rich.console import Console

    from ..tools.fleet import Answer, Query, Report

COMMANDS = {
    "scan": ("fleet", "Read the bitmaps of many TARGETs into tables."),
    "union": ("fleet", "Merge the bitmaps of each disk, of several scans."),
    "plan": ("fleet", "Ask the tables of a scan."),
}

EXIT_UNREAD = 1

_to = click.option(
    "--to",
    "into",
    metavar="DIR",
    required=True,
    type=FilePath(),
    help="The folder for the tables, which replace those there; made if it is not there.",
)


@click.group("fleet", cls=Group, known=COMMANDS)
def fleet_command() -> None:
    """Ask what many disks have to copy.

    `scan` reads the bitmaps of images and stores into tables, a row for each dirty extent. `plan`
    asks them in SQL: what has to be copied over which link, in which order, which disks need a full
    copy and why. Needs the extra: pip install '.[fleet]'.

    \b
    Examples:
      pybitmap fleet scan /srv/images --to tonight
      pybitmap fleet plan tonight
      pybitmap fleet plan tonight order --window 6h
    """


# ---- scan -----------------------------------------------------------------------------------


@command("scan")
@click.argument("names", metavar="[TARGET]...", nargs=-1, type=FilePath())
@_to
@click.option(
    "--list",
    "lists",
    metavar="FILE",
    multiple=True,
    type=FilePath(),
    help="TARGETs and their hosts: CSV whose first line is host,path. May be given several times.",
)
@click.option(
    "--host",
    metavar="NAME",
    help="The host of the TARGETs that are named here.  [default: this one]",
)
@click.option(
    "--bitmap",
    "bitmaps",
    metavar="NAME",
    multiple=True,
    help="Only bitmaps of this name. May be given several times.",
)
@click.option(
    "-j",
    "--jobs",
    metavar="N",
    type=click.IntRange(1),
    help="Processes that read.  [default: one for each processor]",
)
@click.option(
    "-U",
    "--force-share",
    is_flag=True,
    help="Read TARGETs without a lock, also while a program has them open. What is told may be old;"
    " bitmaps that a running machine has the bits of are in state 'in use'.",
)
@click.option(
    "--fresh", is_flag=True, help="Read all, also what a scan that was interrupted has read."
)
@json_option
def scan_command(
    names: tuple[str, ...],
    into: str,
    lists: tuple[str, ...],
    host: str | None,
    bitmaps: tuple[str, ...],
    jobs: int | None,
    force_share: bool,
    fresh: bool,
    as_json: bool,
) -> int:
    """Read the bitmaps of many TARGETs into tables.

    TARGET is a qcow2 image, a local store, a backup directory, a folder in which all of these are
    meant, however deep, or a glob in quotes. Links to other folders are not followed.

    What is locked, broken or not there is a row with the reason. A scan that is interrupted is
    taken up by the next one to the same DIR, for twelve hours; the tables appear at its end, at
    once, and the old ones are there until then.

    \b
    Examples:
      pybitmap fleet scan /srv/images --to tonight
      pybitmap fleet scan '/srv/*/vm-*.qcow2' --to tonight
      pybitmap fleet scan --list disks.csv --to tonight -j 8

    Exit code: 0 all were read; 1 some could not be, see `pybitmap fleet plan DIR full`.
    """
    from ..tools import fleet

    if not names and not lists:
        raise click.UsageError("Give a TARGET, or a --list of them.")
    targets = [
        target
        for each in lists
        for target in fleet.listed(each, bitmaps=bitmaps, force_share=force_share)
    ]
    with unwinding(), progress_bars() as progress:
        targets += fleet.find(names, host=host, bitmaps=bitmaps, force_share=force_share)
        targets = fleet.once(targets)
        tell(f"{len(targets)} targets")
        report = fleet.scan(targets, into, processes=jobs, fresh=fresh, progress=progress)
    if as_json:
        write(json.dumps(_as_json(report), indent=1) + "\n")
    else:
        write(rendered(lambda console, _: _print_report(report, console)))
    if not report.unread:
        return 0
    note(f"{report.unread} could not be read; why, says: pybitmap fleet plan {into} full")
    return EXIT_UNREAD


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "targets": report.targets,
        "resumed": report.resumed,
        "unread": report.unread,
        "dirty_bytes": report.dirty_bytes,
        "extents": report.extents,
        "states": {state.value: count for state, count in report.states.items()},
    }


def _print_report(report: Report, console: Console) -> None:
    from .common import print_line

    resumed = f", {report.resumed} of them by the run before" if report.resumed else ""
    print_line(console, f"{report.targets} targets{resumed}")
    dirty = _shown("bytes", report.dirty_bytes)
    print_line(console, f"{report.extents} dirty extents, {dirty}")
    for state, count in sorted(report.states.items(), key=lambda each: -each[1]):
        print_line(console, f"{count:>7} {state.value}")


# ---- union ----------------------------------------------------------------------------------


@command("union")
@click.argument("sources", metavar="DIR...", nargs=-1, required=True, type=FilePath())
@_to
@click.option(
    "--epoch",
    "epochs",
    metavar="ID",
    multiple=True,
    help="Only bitmaps that this backup point began. May be given several times.",
)
@click.option(
    "--bitmap",
    "bitmaps",
    metavar="NAME",
    multiple=True,
    help="Only bitmaps of this name. May be given several times.",
)
@json_option
def union_command(
    sources: tuple[str, ...],
    into: str,
    epochs: tuple[str, ...],
    bitmaps: tuple[str, ...],
    as_json: bool,
) -> None:
    """Merge the bitmaps of each disk, of several scans.

    Each disk then has one bitmap, "union": what is dirty in any of them. If one of them cannot be
    used, or is not there by the name of --bitmap, neither can the union, and its row says why. A
    disk that a scan did not name is not missed there.

    \b
    Examples:
      pybitmap fleet union mon tue wed --to week
      pybitmap fleet plan week order
    """
    from ..tools import fleet

    with unwinding(), progress_bars() as progress:
        count = fleet.union(sources, into, epochs=epochs, bitmaps=bitmaps, progress=progress)
    write(json.dumps({"disks": count}) + "\n" if as_json else f"{count} disks\n")


# ---- plan -----------------------------------------------------------------------------------


_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", value, re.ASCII)
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < seconds < math.inf:
        raise click.BadParameter(f"{value!r} is no time such as 8h, 90m or 3600")
    return seconds


def _speed(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        speed = parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if not speed:
        raise click.BadParameter("over a link of 0 bytes a second nothing is sent")
    return speed


def _settings(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, str | int | float]:
    found: dict[str, str | int | float] = {}
    for each in values:
        name, equals, text = each.partition("=")
        if not equals or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
            raise click.BadParameter(f"{each!r} is not NAME=VALUE")
        found[name] = _value(text)
    return found


def _value(text: str) -> str | int | float:
    if re.fullmatch("-?[0-9]+", text, re.ASCII):
        return int(text)
    if re.fullmatch(r"-?[0-9]+\.[0-9]+", text, re.ASCII):
        return float(text)
    if is_size(text):
        try:
            return parse_size(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return text


@command("plan")
@click.argument("folder", metavar="DIR", type=FilePath())
@click.argument("query", required=False)
@click.option(
    "--queries",
    metavar="QDIR",
    type=FilePath(),
    help="A folder with queries, NAME.sql, instead of ours.",
)
@click.option("--show", is_flag=True, help="Print the SQL of QUERY, to be copied and changed.")
@click.option(
    "--links",
    metavar="FILE",
    type=FilePath(),
    help="Over which link a host sends: CSV whose first line is host,link,bandwidth.",
)
@click.option(
    "--bandwidth",
    metavar="SIZE",
    callback=_speed,
    help="Bytes a second of a link that is in no such list.  [default: 125MB]",
)
@click.option(
    "--window",
    metavar="TIME",
    callback=_seconds,
    help="How long the night is: 90m, 8h, or seconds.  [default: 8h]",
)
@click.option("--bitmap", metavar="NAME", help="The bitmap by which disks are copied.")
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_settings,
    help="A variable of QUERY: a number, a SIZE, or text.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, nothing else.")
@json_option
def plan_command(
    folder: str,
    query: str | None,
    queries: str | None,
    show: bool,
    links: str | None,
    bandwidth: int | None,
    window: float | None,
    bitmap: str | None,
    settings: dict[str, str | int | float],
    as_csv: bool,
    as_json: bool,
) -> None:
    """Ask the tables of a scan.

    Without QUERY, the questions are listed. A QUERY is SQL in a file; to ask in another way, print
    it with --show, with its common.sql, into a folder of yours.

    A host that --links does not name has a link of its own. Bytes that a full copy takes are those
    of the whole disk.

    \b
    Examples:
      pybitmap fleet plan tonight
      pybitmap fleet plan tonight links --links links.csv
      pybitmap fleet plan tonight order --window 6h --csv
      pybitmap fleet plan tonight hottest --set rows=5
      pybitmap fleet plan tonight order --show > q/order.sql
    """
    from ..tools import fleet

    if as_csv and as_json:
        raise click.UsageError("Give either --csv or --json.")
    known = fleet.queries(queries)
    if query is None:
        if show:
            raise click.UsageError("Give the QUERY to show.")
        from ..tools.fleet.folder import reading  # which needs the extra, as queries() has told

        with reading(folder):  # or it is said that there is nothing to be asked
            _list(list(known.values()), as_json, as_csv)
        return
    if show:
        if query not in known:
            raise Refused(f"there is no query '{query}'; queries there: {', '.join(known)}")
        write(known[query].text)
        return
    values: dict[str, Any] = {"bandwidth": bandwidth, "window": window, "bitmap": bitmap}
    values = {name: value for name, value in values.items() if value is not None} | settings
    answer = fleet.plan(folder, query, queries=queries, links=links, **values)
    _write_answer(answer, as_json, as_csv)


def _list(known: list[Query], as_json: bool, as_csv: bool) -> None:
    from ..tools.fleet import Answer

    rows = [(each.name, each.about) for each in known]
    _write_answer(Answer(["query", "what it asks"], rows), as_json, as_csv)


def _write_answer(answer: Answer, as_json: bool, as_csv: bool) -> None:
    if as_json:
        write("[" + ",".join(f"\n {each}" for each in _json_rows(answer)) + "\n]\n")
    elif as_csv:
        for text in _csv_rows(answer):
            write(text)
    else:
        write(rendered(lambda console, _: _print_answer(answer, console)))


def _json_rows(answer: Answer) -> Iterator[str]:
    for row in answer:
        yield json.dumps({name: _plain(value) for name, value in row.items()})


def _csv_rows(answer: Answer) -> Iterator[str]:
    for row in (answer.columns, *answer.rows):
        page = io.StringIO()
        csv.writer(page, lineterminator="\n").writerow(map(_plain, row))
        yield page.getvalue()


def _plain(value: Any) -> Any:
    """For JSON."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value)


def _print_answer(answer: Answer, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from ..trace import printable
    from .common import print_line

    if not answer.rows:
        print_line(console, "None.")
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    numeric = [_numeric(row[n] for row in answer.rows) for n in range(len(answer.columns))]
    for name, right in zip(answer.columns, numeric):
        justify = "right" if right else "left"
        table.add_column(printable(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in answer.rows:
        cells = (printable(_shown(n, v)) for n, v in zip(answer.columns, row))
        table.add_row(*map(Text, cells))
    console.print(table)


def _numeric(values: Iterable[Any]) -> bool:
    return all(value is None or isinstance(value, (int, float, Decimal)) for value in values)


#: Columns whose numbers are bytes.
_BYTES = re.compile(r"(.*_)?n?bytes|size|granularity|offset|length|dirty", re.ASCII)


def _shown(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 1024 and _BYTES.fullmatch(column):
        return rough_size(value)
    return str(value)
