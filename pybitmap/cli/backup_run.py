# SPDX-License-Identifier: MIT
"""`pybitmap backup` makes backups; the commands for what it has made are in backup.py."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from ..errors import BitmapError
from ..sizes import rough_size
from ..tools.backup import Backup, Hooks, Source, backup, qga_hook
from .common import (
    FilePath,
    Refused,
    json_option,
    note,
    one_granularity,
    one_size,
    progress_bars,
    tell,
    warn,
    words,
    write,
)
from .group import command

EXIT_INCOMPLETE = 1

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_SOURCE = re.compile(r"(?P<place>.*?)(,store=(?P<store>.*?))?(,node=(?P<node>.*))?", re.DOTALL)


def source_of(text: str) -> Source:
    """Of ``[DISK=]PLACE[,store=DIR[,node=NODE]]``; what is there as a file is a place as it is."""
    if os.path.lexists(text):
        return Source(text)
    disk, equals, rest = text.partition("=")
    if not equals or "/" in disk or "," in disk:
        disk, rest = "", text
    if os.path.lexists(rest):
        return Source(rest, disk)
    found = _SOURCE.fullmatch(rest)
    assert found is not None
    if not found["place"] or found["store"] == "" or found["node"] == "":
        raise click.BadParameter(f"{text!r} is not [DISK=]PLACE[,store=DIR[,node=NODE]]")
    return Source(found["place"], disk, found["store"], found["node"])


def _sources(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[Source]:
    return [source_of(each) for each in values]


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Whatever asks it to end is as Ctrl-C: all is put back. A second one waits for that."""
    came: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            raise KeyboardInterrupt

    before = {
        number: signal.signal(number, end)
        for number in _ENDING
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@command("backup")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, callback=_sources)
@click.option(
    "--to",
    metavar="DIR",
    required=True,
    type=FilePath(),
    help="The backup directory; made if it is not there.",
)
@click.option(
    "--qmp",
    metavar="SOCKET",
    type=FilePath(),
    help="The monitor of a machine that runs; SOURCEs are its disks then.",
)
@click.option(
    "--auto",
    "mode",
    flag_value="auto",
    default=True,
    help="Increments where that can be; else full copies, which say why.  [default]",
)
@click.option("--full", "mode", flag_value="full", help="Full copies.")
@click.option(
    "--incremental",
    "mode",
    flag_value="incremental",
    help="Increments; if a disk cannot have one, nothing is done.",
)
@click.option("--compress", is_flag=True, help="Let QEMU compress what it copies.")
@click.option(
    "--speed",
    metavar="SIZE",
    callback=one_size,
    help="Bytes a second, of each disk, at most.  [default: as fast as it goes]",
)
@click.option(
    "-g",
    "--granularity",
    metavar="SIZE",
    callback=one_granularity,
    help="Bytes that a bit of the new bitmaps stands for.  [default: 64K]",
)
@click.option(
    "--freeze",
    metavar="SOCKET",
    type=FilePath(),
    help="Of the guest's agent (qemu-ga): its file systems are frozen for the instant.",
)
@json_option
def backup_command(
    sources: list[Source],
    to: str,
    qmp: str | None,
    mode: str,
    compress: bool,
    speed: int | None,
    granularity: int | None,
    freeze: str | None,
    as_json: bool,
) -> int:
    """Copy disks into a backup directory, by increments.

    All disks as they are at one instant. With --qmp a SOURCE is a device or a node of a machine
    that runs; without, it is a qcow2 image that no program has open, or a raw disk with the local
    store that has its bitmaps: PATH,store=DIR[,node=NODE]. DISK=SOURCE gives it another name in the
    directory than its device has, or its file.

    QEMU copies, and its bitmaps, or the store's, say what was written since the point before. Each
    point has a bitmap of its own on each disk, pybitmap-..., which the next backup needs. A disk
    without one, or with one that is not to be relied on, is copied in full, that disk alone.

    Interrupted or failed, all is put back. Killed, the next backup of the disk cleans up, and
    nothing that was written is missed. A disk that cannot be read is left out: the exit code is 1,
    and the next backup has what was written to it since its last copy.

    \b
    Examples:
      pybitmap backup vda vdb --qmp vm.qmp --to backups
      pybitmap backup disk.qcow2 --to backups
      pybitmap backup vm1=disk.raw,store=disks.bitmaps \\
        --to backups --speed 100M

    Exit code: 0 it is done, 1 it is not, or a disk was left out.
    """
    hooks = Hooks(step=_tell_step)
    if freeze is not None:
        hooks = qga_hook(freeze, hooks)
    try:
        with _ending(), progress_bars() as progress:
            more = {} if granularity is None else {"granularity": granularity}
            done = backup(
                sources,
                to,
                qmp=qmp,
                mode=mode,
                compress=compress,
                speed=speed or 0,
                hooks=hooks,
                progress=progress,
                **more,
            )
    except (BitmapError, OSError) as error:
        raise Refused(words(error)) from error
    for line in done.notes:
        note(line)
    for disk, why in done.failed.items():
        warn(f"disk '{disk}' was left out: {why}")
    if as_json:
        write(json.dumps(_as_json(done), indent=1) + "\n")
    else:
        for copy in done.point.copies:
            kind = f"full: {copy.reason}" if copy.parent is None else "increment"
            note(f"{copy.disk}: {rough_size(copy.nbytes)}, {kind}")
        tell(f"point {done.point.id}")
    return EXIT_INCOMPLETE if done.failed else 0


def _tell_step(name: str) -> None:
    tell(f"backup: {name}")


def _as_json(done: Backup) -> dict[str, Any]:
    return {
        "point": done.point.id,
        "begun": done.point.begun.isoformat(),
        "ended": done.point.ended.isoformat(),
        "copies": [
            {
                "disk": each.disk,
                "file": each.file,
                "parent": each.parent,
                "reason": each.reason,
                "size": each.size,
                "nbytes": each.nbytes,
                "bitmap": each.bitmap,
            }
            for each in done.point.copies
        ],
        "failed": done.failed,
        "notes": list(done.notes),
    }
