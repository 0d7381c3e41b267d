# SPDX-License-Identifier: MIT
"""The commands for backup directories: `pybitmap verify`, `restore`, `list`, `prune`."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..errors import BitmapError
from ..sizes import rough_size
from ..store.base import Progress
from ..tools.backup import Copy, Point, Repository, Verification, prune, restore, verify
from ..tools.backup.restore import FORMATS
from ..trace import printable
from .common import (
    FilePath,
    Refused,
    deferred,
    json_option,
    note,
    print_line,
    progress_bars,
    rendered,
    tell,
    words,
    write,
)
from .completion import fits
from .group import command

EXIT_BROKEN = 1


def _disks(ctx: click.Context, param: click.Parameter, begin: str) -> list[str]:
    """What completes the name of a disk."""
    with Repository.open(ctx.params["path"]) as repository:
        return [each for each in repository.manifest.disks if fits(each, begin)]


def _points(ctx: click.Context, param: click.Parameter, begin: str) -> list[str]:
    """What completes the id of a point."""
    with Repository.open(ctx.params["path"]) as repository:
        return [each.id for each in repository.manifest.points if fits(each.id, begin)]


_directory = click.argument("path", metavar="DIR", type=FilePath())
_at = click.option(
    "--at",
    metavar="POINT",
    shell_complete=_points,
    help="As it was then: an id, or its first digits, as list shows them.",
)


@contextlib.contextmanager
def _told() -> Iterator[Progress]:
    """For what cleans up when it is left: whoever asks it to end, by whatever signal, has it do so.

    What cannot be done is an error of exit code 1.
    """
    with deferred(signal.SIGTERM, signal.SIGHUP) as came, progress_bars() as show:

        def report(what: str, done: int, total: int | None) -> None:
            if came:
                raise KeyboardInterrupt
            show(what, done, total)

        try:
            yield report
        except (BitmapError, OSError) as error:
            raise Refused(words(error)) from error


# ---- verify ---------------------------------------------------------------------------------


@command("verify")
@_directory
@click.option("--full", is_flag=True, help="Read all that each disk held at each point.")
@click.option(
    "--disk",
    metavar="DISK",
    shell_complete=_disks,
    help="Only this disk, and what its copies lie over.",
)
@_at
@click.option(
    "--against",
    metavar="SOURCE",
    type=FilePath(),
    help="Compare a copy, the newest or that of --at, with a disk that nobody writes to.",
)
@click.option(
    "-f",
    "--format",
    "format",
    type=click.Choice(FORMATS),
    help="The format of SOURCE.  [default: qcow2 if it begins so, else raw]",
)
@json_option
def verify_command(
    path: str,
    full: bool,
    disk: str | None,
    at: str | None,
    against: str | None,
    format: str | None,
    as_json: bool,
) -> int:
    """Check that each point of a backup can be restored.

    Each file is hashed and compared with the manifest, as are its header and the hashes of what the
    disk held; `qemu-img check` looks at it. With --full all that a restore would read is read and
    hashed, too, and the SHA-256 of each disk is told. Nothing is written, and backups may go on
    beside it. A copy is broken, too, if one is that it lies over.

    \b
    Examples:
      pybitmap verify backups
      pybitmap verify backups --full --json
      pybitmap verify backups --disk vda \\
        --against vda.raw

    Exit code: 0 all is good, 1 something is broken or differs, 2 it could not be checked.
    """
    with progress_bars() as progress:
        found = verify(
            path,
            full=full,
            disk=disk,
            at=at,
            against=against,
            against_format=format,
            progress=progress,
        )
    if as_json:
        write(json.dumps(_verified_json(path, found), indent=1) + "\n")
    else:
        write("".join(printable(line) + "\n" for line in _verified_lines(path, found)))
    return 0 if found.good else EXIT_BROKEN


def _verified_json(path: str, found: Verification) -> dict[str, Any]:
    return {
        "directory": path,
        "good": found.good,
        "difference": found.difference,
        "leftovers": [each.name for each in found.leftovers],
        "copies": [
            {
                "point": each.point.id,
                "disk": each.copy.disk,
                "file": each.copy.file,
                "problems": list(each.problems),
                "sha256": each.sha256,
            }
            for each in found.copies
        ],
    }


def _verified_lines(path: str, found: Verification) -> Iterator[str]:
    if not found.copies:
        yield f"{path}: no points"
    for each in found.copies:
        label = f"{each.point.id} {each.copy.disk}"
        for problem in each.problems:
            yield f"{label}: broken: {problem}"
        if not each.problems:
            yield f"{label}: good" + (f", SHA-256 {each.sha256}" if each.sha256 else "")
    if found.difference is not None:
        yield f"different: {found.difference}"
    for leftover in found.leftovers:
        yield f"{leftover.name}: no point names it; the next backup or prune deletes it"


# ---- restore --------------------------------------------------------------------------------


@command("restore")
@_directory
@click.option(
    "--disk",
    metavar="DISK",
    shell_complete=_disks,
    help="Which one.  [default: the only one that there is]",
)
@_at
@click.option(
    "--to",
    metavar="FILE",
    type=FilePath(),
    required=True,
    help="A new file; or with --force one that is replaced, or a block device.",
)
@click.option(
    "--format", type=click.Choice(FORMATS), default="raw", show_default=True, help="Of FILE."
)
@click.option("--force", is_flag=True, help="FILE may be there: what it holds is lost.")
@json_option
def restore_command(
    path: str,
    disk: str | None,
    at: str | None,
    to: str,
    format: str,
    force: bool,
    as_json: bool,
) -> None:
    """Write a disk as it was at a point of a backup.

    Without --at, as it was at the newest. `qemu-img convert` writes it, sparse; then it is read
    back, and compared by its hash with what was backed up. Only if all is right the file is there,
    at once: until then, and if anything fails, what was at FILE is untouched. A block device is
    written in place, at its beginning.

    A kill may leave a folder .pybitmap-* beside FILE, which can be deleted. The restored disk has
    no bitmaps, so the next backup of it is a full one.

    \b
    Examples:
      pybitmap restore backups --to vda.raw
      pybitmap restore backups --disk vda --at 3f2a \\
        --to vda.qcow2 --format qcow2

    Exit code: 0 it is restored, 1 it is not.
    """
    with _told() as progress:
        done = restore(path, disk, to=to, at=at, format=format, force=force, progress=progress)
    if as_json:
        report = {
            "point": done.point.id,
            "disk": done.copy.disk,
            "size": done.copy.size,
            "file": to,
            "format": done.format,
        }
        write(json.dumps(report, indent=1) + "\n")
    else:
        tell(f"{to}: {done.copy.disk} as it was at {_time(done.point)}, point {done.point.id}")


# ---- list -----------------------------------------------------------------------------------


@command("list")
@_directory
@json_option
def list_command(path: str, as_json: bool) -> None:
    """List the points of a backup.

    A row for each disk at each point: how large the disk was, how long the file is, and over which
    point's copy it lies; a full copy lies over none, and says why it is full. In JSON, sizes are in
    bytes. Only the manifest is read.

    \b
    Examples:
      pybitmap list backups
      pybitmap list backups --json | jq '.points[-1].id'
    """
    with Repository.open(path) as repository:
        points = repository.manifest.points
        leftovers = repository.leftovers()
    if as_json:
        report = {
            "directory": path,
            "points": [_as_json(each) for each in points],
            "leftovers": [each.name for each in leftovers],
        }
        write(json.dumps(report, indent=1) + "\n")
    else:
        write(rendered(lambda console, _: _print_points(path, points, console)))
        if leftovers:
            note(f"{path}: {len(leftovers)} files that no point names; the next prune deletes them")


def _as_json(point: Point) -> dict[str, Any]:
    return {
        "id": point.id,
        "begun": point.begun.isoformat(),
        "ended": point.ended.isoformat(),
        "copies": [_copy_as_json(each) for each in point.copies],
    }


def _copy_as_json(copy: Copy) -> dict[str, Any]:
    fields = asdict(copy)
    del fields["new"]  # of no use for others: it is about to be gone
    return fields


def _print_points(path: str, points: Sequence[Point], console: Console) -> None:
    if not points:
        print_line(console, printable(f"{path}: no points"))
        return
    shown = _short(points)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("point", "at", "disk"):
        table.add_column(name, overflow="fold")
    for name in ("size", "file"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("kind", overflow="fold")
    for point in points:
        for copy in point.copies:
            kind = f"over {shown[copy.parent]}" if copy.parent else "full"
            if copy.reason and not copy.parent:
                kind += f": {copy.reason}"
            sizes = map(_rough, (copy.size, copy.nbytes))
            table.add_row(
                shown[point.id], _time(point), printable(copy.disk), *sizes, printable(kind)
            )
    console.print(table)


def _short(points: Sequence[Point]) -> dict[str, str]:
    """As few digits of each id as tell all of them apart, 8 at least."""
    digits = 8
    while len({each.id[:digits] for each in points}) < len(points):
        digits += 1
    return {each.id: each.id[:digits] for each in points}


def _rough(nbytes: int) -> str:
    return rough_size(nbytes) if nbytes >= 1024 else str(nbytes)


def _time(point: Point) -> str:
    """When its instant was, about."""
    return point.begun.astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


# ---- prune ----------------------------------------------------------------------------------


@command("prune")
@_directory
@click.option(
    "--keep",
    metavar="N",
    type=click.IntRange(min=1),
    help="So many of the newest stay, and those that have the newest copy of a disk; others go.",
)
@click.option(
    "--point",
    "points",
    metavar="POINT",
    multiple=True,
    shell_complete=_points,
    help="This one goes; may be given several times, but not the newest.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
@json_option
def prune_command(
    path: str, keep: int | None, points: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Take points out of a backup, and delete their files.

    All that are meant or, if one cannot go, none. A copy that lies over one that goes is made anew
    over the one below, or as a full copy, which takes its space until the old ones are deleted; it
    is compared by its hash before. Killed at any moment, all points that are listed can be
    restored, and the next backup or prune goes on. Files that somebody reads are left to it, too.

    \b
    Examples:
      pybitmap prune backups --keep 7
      pybitmap prune backups --point 3f2a --dry-run

    Exit code: 0 it is done, 1 nothing has changed.
    """
    if (keep is None) == (not points):
        raise click.UsageError("Give either --keep or --point.")
    with _told() as progress:
        done = prune(path, keep=keep, points=points, dry_run=dry_run, progress=progress)
    if as_json:
        report = {
            "points": [each.id for each in done.points],
            "rebased": [each.file for each in done.rebased],
            "deleted": [each.name for each in done.deleted],
        }
        write(json.dumps(report, indent=1) + "\n")
        return
    for point in done.points:
        note(f"{path}: point {point.id} of {_time(point)} {'would go' if dry_run else 'is gone'}")
    for copy in done.rebased:
        tell(f"{copy.file}: {'would be' if dry_run else 'is'} made anew over another")
    for file in done.deleted:
        tell(f"{file.name}: deleted")
    if not done.points:
        note(f"{path}: there is nothing to take out")
