# SPDX-License-Identifier: MIT
"""The commands for bitmaps, `pybitmap info`, `add`, `merge`, ...: of images and local stores that
no program has open, and with --qmp of a machine that runs."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..errors import BitmapError, InvalidError, LockedError
from ..offline import (
    Name,
    add,
    areas,
    clear,
    counted,
    enable,
    merge,
    problems,
    put_back,
    remove,
    repair,
    resize,
    take,
)
from ..sizes import exact_size, rough_size
from ..store import Store, StoredBitmap, StoredNode
from ..store.base import LIVE, Progress
from ..trace import printable
from .common import (
    FilePath,
    Refused,
    deferred,
    json_option,
    one_granularity,
    one_size,
    print_line,
    progress_bars,
    rendered,
    tell,
    unwinding,
    warn_unlocked,
    words,
    write,
)
from .completion import names_in, nodes_in, targets_in
from .extents import FORMATS, write_extents
from .group import command
from .targets import Image, Target, find_target

if TYPE_CHECKING:
    from ..store.qcow2.rescue import Report
    from .live import Live

EXIT_BROKEN = 1

#: What asks a program to end.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Function = TypeVar("Function", bound=Callable[..., Any])

_target = click.argument("path", metavar="TARGET", type=FilePath(), shell_complete=targets_in)
_new_name = click.argument("name")
_name = click.argument("name", shell_complete=names_in())
_names = click.argument(
    "names", metavar="NAME...", nargs=-1, required=True, shell_complete=names_in()
)
_some_names = click.argument("names", metavar="[NAME...]", nargs=-1, shell_complete=names_in())
_node = click.option(
    "--node",
    metavar="NODE",
    shell_complete=nodes_in,
    help="The node of a local store, for names that could mean several bitmaps.",
)

_qmp = click.option(
    "--qmp",
    metavar="SOCKET",
    type=FilePath(),
    help="The monitor (QMP) of a QEMU, a qemu-storage-daemon or a pybitmap serve that runs: a unix"
    " socket. TARGET is then a node of it, or a device.",
)
_format_option = click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="A list of objects, or lines below a heading.  [default: json]",
)
_granularity_option = click.option(
    "-g",
    "--granularity",
    metavar="SIZE",
    default="1",
    show_default=False,
    callback=one_granularity,
    help="Bytes that a bit stands for: extents as a bitmap with such bits has them, if that is"
    " coarser.",
)


_no_lock = click.option(
    "--no-lock",
    is_flag=True,
    help="Go on where the file system has no locks (as NFS, FUSE). Nothing then keeps another"
    " program, a running machine above all, from writing to TARGET at the same time, which destroys"
    " it. Locks that can be had are taken and heeded as ever.",
)
_shared = click.option(
    "-U",
    "--force-share",
    "--no-lock",
    "no_lock",
    is_flag=True,
    help="Read TARGET without a lock, also while a program has it open. What is told may be old;"
    " if it changes while it is read, that is an error, and the command is to be tried again."
    " Bitmaps that a running machine has the bits of are shown as in use.",
)


def _to_read(path: str, no_lock: bool) -> Target:
    target = find_target(path, lock=not no_lock)
    if no_lock:
        warn_unlocked(path, read_only=True)
    tell(f"{path}: {target.kind}, to be read")
    return target


def _to_change(path: str, no_lock: bool, *, new: bool = False) -> Target:
    target = find_target(path, new=new, lock=not no_lock)
    if no_lock:
        warn_unlocked(path)
    tell(f"{path}: {target.kind}, to be changed")
    return target


@contextlib.contextmanager
def _hinting() -> Iterator[None]:
    """A target that is locked can be read all the same, says the refusal."""
    try:
        yield
    except LockedError as error:
        raise LockedError(
            f"{error}; -U reads it all the same, as it is on disk", error.errno
        ) from error


def _machine(
    qmp: str, path: str | None, refused: Mapping[str, object], *, changing: bool = True
) -> contextlib.AbstractContextManager[Live]:
    """See :func:`.live.machine`, whose module images and stores do not wait for."""
    from .live import machine

    return machine(qmp, path, refused, changing=changing)


@contextlib.contextmanager
def _changing(qmp: str, path: str, refused: Mapping[str, object]) -> Iterator[Live]:
    """A machine that runs: Ctrl-C counts once it has answered, or has not in time."""
    with _machine(qmp, path, refused) as target, deferred(*ENDING):
        yield target
    tell("done")


@contextlib.contextmanager
def _until_stored() -> Iterator[Progress]:
    """For a change: whoever asks it to end is to know whether it was done.

    So Ctrl-C, and what else asks a program to end, counts while a target is read, and then again
    when all is stored. The progress that it gives raises if something has come.
    """
    with deferred(*ENDING) as came, progress_bars() as show:

        def report(what: str, done: int, total: int | None) -> None:
            if came:
                raise KeyboardInterrupt
            show(what, done, total)

        yield report
    tell("done")


# ---- info -------------------------------------------------------------------


@command("info")
@click.argument(
    "path", metavar="TARGET", type=FilePath(), required=False, shell_complete=targets_in
)
@json_option
@click.option(
    "--count/--no-count",
    default=None,
    help="Say how much is dirty, which reads all the bits; without, only the directory is read,"
    " however large the disk.  [default: with --json only]",
)
@_qmp
@_shared
def info_command(
    path: str | None, as_json: bool, count: bool | None, qmp: str | None, no_lock: bool
) -> None:
    """List the bitmaps of TARGET.

    TARGET is a qcow2 image, or the directory of a local store. A bitmap is enabled if it records
    when a program opens it. It is in use if a program has it open (see -U), or did not close it; of
    what that has lost, a local store knows more than an image does. An inconsistent one cannot be
    used, only removed or repaired; the reason is told.

    With --qmp, TARGET is a node or a device of a machine that runs; without one, all its nodes are
    listed. A bitmap is in use there while an operation of QEMU's works with it.

    In JSON, sizes and counts are in bytes; a count is null if the bitmap is inconsistent, if
    another program has its bits, or with --no-count.

    \b
    Examples:
      pybitmap info disk.qcow2
      pybitmap info disks.bitmaps --count
      pybitmap info disk.qcow2 --json | jq '.bitmaps[].count'
      pybitmap info disk.qcow2 -U     # of a machine that runs
      pybitmap info --qmp vm0.qmp
    """
    counting = as_json if count is None else count
    if qmp is not None:
        with _machine(qmp, path, {"--force-share": no_lock}, changing=False) as found:
            nodes = found.nodes()
            if not counting:
                nodes = [_uncounted(node) for node in nodes]
            _write_info(found, nodes, as_json, counting)
        return
    if path is None:
        raise click.UsageError("Missing argument 'TARGET'.")
    target = _to_read(path, no_lock)
    with _hinting():
        if counting:
            with progress_bars() as progress:
                nodes = counted(target.store, progress)
        else:
            nodes = target.nodes()
    _write_info(target, nodes, as_json, counting)


def _uncounted(node: StoredNode) -> StoredNode:
    return replace(node, bitmaps=[replace(each, count=None) for each in node.bitmaps])


def _write_info(target: Target, nodes: Sequence[StoredNode], as_json: bool, counting: bool) -> None:
    if as_json:
        write(json.dumps(_as_json(target, nodes), indent=1) + "\n")
    else:
        write(rendered(lambda console, _: _print_info(target, nodes, console, counting)))


def _as_json(target: Target, nodes: Sequence[StoredNode]) -> dict[str, Any]:
    """For programs; names and meanings are QMP's where it has them."""
    return {
        "target": target.path,
        "format": target.format,
        "nodes": [{"name": node.name, "size": node.size} for node in nodes],
        "bitmaps": [
            {
                "node": node.name,
                "name": bitmap.name,
                "size": node.size,
                "granularity": bitmap.granularity,
                "count": bitmap.count,
                "enabled": bitmap.enabled,
                "persistent": target.keeps(bitmap),
                "in_use": bitmap.in_use,
                "inconsistent": bitmap.inconsistent,
                "reason": bitmap.reason,
            }
            for node in nodes
            for bitmap in node.bitmaps
        ],
    }


def _print_info(target: Target, nodes: Sequence[StoredNode], console: Console, count: bool) -> None:
    bitmaps = [
        (target.label((node.name, bitmap.name), nodes), bitmap)
        for node in nodes
        for bitmap in node.bitmaps
    ]
    print_line(console, printable(f"{target.path}: {target.kind}"))
    for node in nodes:
        what = "disk" if node.name is None else f"node {node.name}"
        print_line(console, printable(f"{what}: {_bytes(node.size)}"))
    print_line(console, "")
    if not bitmaps:
        print_line(console, "No bitmaps.")
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("bitmap", overflow="fold")
    table.add_column("granularity", justify="right")
    if count:
        table.add_column("dirty", justify="right", overflow="fold")
    table.add_column("flags", overflow="fold")
    for label, bitmap in bitmaps:
        row = [printable(label), exact_size(bitmap.granularity)]
        if count:
            row.append("-" if bitmap.count is None else _bytes(bitmap.count))
        table.add_row(*row, ", ".join(_flags(target, bitmap)))
    console.print(table)
    broken = [(label, bitmap.reason) for label, bitmap in bitmaps if bitmap.inconsistent]
    live = [label for label, bitmap in bitmaps if bitmap.live]
    if broken or live:
        print_line(console, "")
    for label in live:
        print_line(console, printable(f"Bitmap '{label}' is in use: {LIVE}."))
    for label, reason in broken:
        print_line(console, printable(f"Bitmap '{label}' is inconsistent: {reason}."))
    if broken and target.repairable:
        print_line(
            console,
            "Mark everything dirty in it, so that nothing is missed:"
            f" {_command('repair', target.path, broken[0][0])}",
        )


def _flags(target: Target, bitmap: StoredBitmap) -> Iterator[str]:
    if bitmap.inconsistent:
        yield "inconsistent"
    yield "enabled" if bitmap.enabled else "disabled"
    if not target.keeps(bitmap):
        yield "transient"
    if bitmap.in_use:
        yield "in use"


def _bytes(nbytes: int) -> str:
    return f"{nbytes} ({rough_size(nbytes)})" if nbytes >= 1024 else str(nbytes)


def _command(*words: str) -> str:
    return printable(f"pybitmap {' '.join(map(shlex.quote, words))}")


# ---- changes ----------------------------------------------------------------


@command("add")
@_target
@_new_name
@click.option(
    "-g",
    "--granularity",
    metavar="SIZE",
    callback=one_granularity,
    help="Bytes that a bit stands for: a power of 2, at least 512."
    "  [default: the image's cluster size, from 4K to 64K; in a local store 64K]",
)
@click.option("--disabled", is_flag=True, help="It does not record until it is enabled.")
@click.option(
    "--node",
    metavar="NODE",
    shell_complete=nodes_in,
    help="The node, instead of NODE/ before the name.",
)
@click.option(
    "--size",
    metavar="SIZE",
    callback=one_size,
    help="Size of the disk, for a node of a local store that is new or has no bitmaps; the store is"
    " made if it is not there.",
)
@click.option(
    "--transient",
    is_flag=True,
    help="With --qmp: it ends with the machine. Only disks in qcow2 images can have others.",
)
@_qmp
@_no_lock
def add_command(
    path: str,
    name: str,
    granularity: int | None,
    disabled: bool,
    node: str | None,
    size: int | None,
    transient: bool,
    qmp: str | None,
    no_lock: bool,
) -> None:
    """Add a bitmap, clean, to TARGET.

    TARGET is a qcow2 image or a local store: a directory with the bitmaps of nodes, disks of
    whatever format, by the names that programs give them. There NAME is NODE/BITMAP; if the store
    has one node only, a BITMAP without a slash will do. With --qmp, TARGET is a node or a device of
    a machine that runs, and writes are recorded from now on.

    If it fails, is interrupted or killed, nothing is left of a store that it would have made: it
    is made aside (what a kill leaves there, the next add removes). Only where an empty directory
    is there already, or without locks, a kill may leave an empty store, which the next add takes.

    \b
    Examples:
      pybitmap add disk.qcow2 daily
      pybitmap add disk.qcow2 weekly -g 1M --disabled
      pybitmap add disks.bitmaps disk0/daily --size 20G
      pybitmap add disk0 daily --qmp vm0.qmp
    """
    if qmp is not None:
        refused = {"--node": node, "--size": size, "--no-lock": no_lock}
        with _changing(qmp, path, refused) as there:
            there.add(
                name,
                granularity=granularity,
                disabled=disabled,
                persistent=not transient,
            )
        return
    if transient:
        raise click.UsageError("--transient is for --qmp: what is stored stays.")
    target = _to_change(path, no_lock, new=True)
    with _until_stored() as progress:
        add(
            target.store,
            target.place(name, node, size),
            progress,
            granularity=granularity,
            disabled=disabled,
            size=size,
        )


@command("remove")
@_target
@_some_names
@click.option("--stale", is_flag=True, help="All that are inconsistent, and no others.")
@_node
@json_option
@_qmp
@_no_lock
def remove_command(
    path: str,
    names: tuple[str, ...],
    stale: bool,
    node: str | None,
    as_json: bool,
    qmp: str | None,
    no_lock: bool,
) -> None:
    """Remove bitmaps from TARGET.

    All that are named or, if one of them cannot be removed, none. With --stale, their names are
    printed; with --json those of all that were removed.

    \b
    Examples:
      pybitmap remove disk.qcow2 daily weekly
      pybitmap remove disk.qcow2 --stale
      pybitmap remove disks.bitmaps --stale --json
      pybitmap remove disk0 daily --qmp vm0.qmp
    """
    removed = "removed" if as_json else None
    if qmp is None:
        _change_some(path, no_lock, names, node, stale, "--stale", remove, removed)
        return
    _one_of(names, stale, "--stale")
    with _changing(qmp, path, {"--node": node, "--no-lock": no_lock}) as there:
        nodes = there.nodes()
        found = there.find(names) if names else _broken(nodes, None)
        if found:
            there.remove(found)
    _write_changed(there, path, nodes, found, stale, removed)


@command("clear")
@_target
@_names
@_node
@_qmp
@_no_lock
def clear_command(
    path: str, names: tuple[str, ...], node: str | None, qmp: str | None, no_lock: bool
) -> None:
    """Make everything clean in bitmaps.

    In all that are named or, if one of them cannot be cleared, in none. With --qmp, of a machine
    that runs: what it has written since one has looked goes, too. To copy what is dirty and lose
    nothing, see "pybitmap take".

    \b
    Examples:
      pybitmap clear disk.qcow2 daily
      pybitmap clear disks.bitmaps disk0/daily disk1/daily
    """
    if qmp is not None:
        with _changing(qmp, path, {"--node": node, "--no-lock": no_lock}) as there:
            there.clear(there.find(names))
        return
    target = _to_change(path, no_lock)
    with _until_stored() as progress:
        clear(target.store, target.find(names, node), progress)


def _enable(
    path: str,
    names: tuple[str, ...],
    node: str | None,
    qmp: str | None,
    no_lock: bool,
    enabled: bool,
) -> None:
    if qmp is not None:
        with _changing(qmp, path, {"--node": node, "--no-lock": no_lock}) as there:
            there.enable(there.find(names), enabled)
        return
    target = _to_change(path, no_lock)
    with _until_stored() as progress:
        enable(target.store, target.find(names, node), enabled, progress)


@command("enable")
@_target
@_names
@_node
@_qmp
@_no_lock
def enable_command(
    path: str, names: tuple[str, ...], node: str | None, qmp: str | None, no_lock: bool
) -> None:
    """Let bitmaps record writes, when a program opens them.

    With --qmp, those of a machine that runs record from now on.

    \b
    Examples:
      pybitmap enable disk.qcow2 weekly
      pybitmap enable disks.bitmaps disk0/weekly
    """
    _enable(path, names, node, qmp, no_lock, True)


@command("disable")
@_target
@_names
@_node
@_qmp
@_no_lock
def disable_command(
    path: str, names: tuple[str, ...], node: str | None, qmp: str | None, no_lock: bool
) -> None:
    """Let bitmaps record no writes; they keep what is dirty.

    With --qmp, those of a machine that runs record no more from now on.

    \b
    Examples:
      pybitmap disable disk.qcow2 weekly
      pybitmap disable disks.bitmaps disk0/weekly
    """
    _enable(path, names, node, qmp, no_lock, False)


@command("merge")
@_target
@_name
@click.argument(
    "sources",
    metavar="SOURCE...",
    nargs=-1,
    required=True,
    shell_complete=names_in("source_path"),
)
@click.option(
    "-b",
    "source_path",
    metavar="FILE",
    type=FilePath(),
    help="The image or local store that has the sources; with --qmp, the node or the device."
    "  [default: TARGET]",
)
@_node
@_qmp
@_no_lock
def merge_command(
    path: str,
    name: str,
    sources: tuple[str, ...],
    source_path: str | None,
    node: str | None,
    qmp: str | None,
    no_lock: bool,
) -> None:
    """Mark in bitmap NAME what is dirty in the SOURCE bitmaps.

    The disks must be of the same size; granularities may differ. --node is that of NAME, and of the
    sources if they are in TARGET as well. With --no-lock FILE is read as `info -U` reads it.

    \b
    Examples:
      pybitmap merge disk.qcow2 weekly monday tuesday
      pybitmap merge disk.qcow2 weekly vm0/daily -b vm.bitmaps
    """
    if qmp is not None:
        with _changing(qmp, path, {"--node": node, "--no-lock": no_lock}) as there:
            beside = there if source_path is None else there.beside(source_path)
            [bitmap] = there.find([name])
            there.merge(bitmap, beside.find(sources))
        return
    target = _to_change(path, no_lock)
    [bitmap] = target.find([name], node)
    source_store = None
    if source_path is None or os.path.samefile(path, source_path):
        found = target.find(sources, node)
    else:
        source_target = _to_read(source_path, no_lock)
        source_store, found = source_target.store, source_target.find(sources)
    with _until_stored() as progress:
        merge(target.store, bitmap, found, progress, source_store)


@command("take")
@_target
@_name
@click.option("--as", "other", metavar="OTHER", help="What is taken is called so.")
@_format_option
@json_option
@_granularity_option
@_node
@_qmp
@_no_lock
def take_command(
    path: str,
    name: str,
    other: str | None,
    form: str | None,
    as_json: bool,
    granularity: int,
    node: str | None,
    qmp: str | None,
    no_lock: bool,
) -> None:
    """Move what is dirty to a new bitmap, to be copied.

    What is dirty in bitmap NAME goes to OTHER, and NAME is clean then. The begin of a backup of a
    machine that is off, in one step: copy what is dirty in OTHER, which does not record, and remove
    it once the copy is safe. NAME has what is written from now on. If the copy fails, "pybitmap
    put-back" undoes it.

    With --qmp, of a machine that runs: each write is in NAME or in OTHER, or in both. Without --as
    the extents are then printed as "pybitmap dump" prints them, and are dirty no more. Where they
    could not be printed, all are dirty again, and after a kill with the next command that changes
    or dumps bitmaps of this machine. Whoever reads them is not asked: to be safe until a copy is
    made, use --as.

    \b
    Examples:
      pybitmap take disk.qcow2 daily --as copying
      pybitmap take disks.bitmaps disk0/daily --as copying
      pybitmap take disk0 daily --as copying --qmp vm0.qmp
      pybitmap take disk0 daily --qmp vm0.qmp > extents.json
    """
    printing = _form(form, as_json)
    if other is not None and (form is not None or as_json or granularity != 1):
        raise click.UsageError("With --as nothing is printed; see pybitmap dump.")
    if qmp is not None:
        refused = {"--node": node, "--no-lock": no_lock}
        if other is None:
            with unwinding(), _machine(qmp, path, refused) as there, ExitStack() as stack:
                [bitmap] = there.find([name])
                with progress_bars() as progress:
                    taken = stack.enter_context(there.taken(bitmap, progress, granularity))
                write_extents(iter(taken), printing)
                taken.done()
            return
        with _changing(qmp, path, refused) as there:
            [bitmap] = there.find([name])
            there.take(bitmap, other)
        return
    if other is None:
        raise click.UsageError("Missing option '--as'.")
    target = _to_change(path, no_lock)
    [bitmap] = target.find([name], node)
    if node is None:
        other = other.removeprefix(f"{bitmap[0]}/")
    with _until_stored() as progress:
        take(target.store, bitmap, other, progress)


@command("put-back")
@_target
@_name
@click.option(
    "--into",
    metavar="OTHER",
    required=True,
    shell_complete=names_in(),
    help="The bitmap that it was taken from.",
)
@_node
@_qmp
@_no_lock
def put_back_command(
    path: str, name: str, into: str, node: str | None, qmp: str | None, no_lock: bool
) -> None:
    """Undo a take: what is dirty is marked where it was.

    Marks in bitmap OTHER what is dirty in NAME, and removes NAME. For what was taken and is not
    copied, also while the machine has run in between.

    \b
    Examples:
      pybitmap put-back disk.qcow2 copying --into daily
      pybitmap put-back vm.bitmaps vm0/copy --into vm0/daily
      pybitmap put-back disk0 copy --into daily --qmp vm0.qmp
    """
    if qmp is not None:
        with _changing(qmp, path, {"--node": node, "--no-lock": no_lock}) as there:
            there.put_back(*(there.find([each])[0] for each in (name, into)))
        return
    target = _to_change(path, no_lock)
    [bitmap], [other] = target.find([name], node), target.find([into], node)
    with _until_stored() as progress:
        put_back(target.store, bitmap, other, progress)


@command("resize")
@_target
@click.argument("size", metavar="SIZE", callback=one_size)
@click.option(
    "--node",
    metavar="NODE",
    shell_complete=nodes_in,
    help="The node, if the store has several.",
)
@click.option("--shrink", is_flag=True, help="Smaller, too; what lies behind is forgotten.")
@_no_lock
def resize_command(path: str, size: int, node: str | None, shrink: bool, no_lock: bool) -> None:
    """Let bitmaps of a local store follow a disk's size.

    What was cut off and comes back is dirty in what records: it has lost what the last backup may
    have of it. What is new is clean. For the disk of an image see "qemu-img resize".

    \b
    Examples:
      pybitmap resize disks.bitmaps 40G --node disk0
    """
    target = _to_change(path, no_lock)
    with _until_stored() as progress:
        resize(target.store, target.node(node), size, progress, shrink=shrink)


@command("repair")
@_target
@_some_names
@click.option("--all", "everything", is_flag=True, help="All that are inconsistent.")
@_node
@json_option
@_no_lock
def repair_command(
    path: str,
    names: tuple[str, ...],
    everything: bool,
    node: str | None,
    as_json: bool,
    no_lock: bool,
) -> None:
    """Make inconsistent bitmaps usable: all dirty.

    The next incremental backup copies the whole disk, so nothing that was written is missed. What
    records when a program opens it is as before. With --all, the names are printed; with --json
    those of all that were repaired.

    \b
    Examples:
      pybitmap repair disk.qcow2 daily
      pybitmap repair disks.bitmaps --all
      pybitmap repair disks.bitmaps --all --json
    """
    repaired = "repaired" if as_json else None
    _change_some(path, no_lock, names, node, everything, "--all", repair, repaired)


def _change_some(
    path: str,
    no_lock: bool,
    names: tuple[str, ...],
    node: str | None,
    broken: bool,
    option: str,
    change: Callable[[Store, Sequence[Name], Progress], None],
    done: str | None,
) -> None:
    """Either those that are named or those that are inconsistent.

    :param done: in JSON: what they have been, the name of their list
    """
    _one_of(names, broken, option)
    target = _to_change(path, no_lock)
    nodes = target.nodes()
    found = target.find(names, node) if names else _broken(nodes, node)
    if found:
        with _until_stored() as progress:
            change(target.store, found, progress)
    _write_changed(target, path, nodes, found, broken, done)


def _one_of(names: tuple[str, ...], broken: bool, option: str) -> None:
    if broken == bool(names):
        raise click.UsageError(f"Give either the names of bitmaps or {option}.")


def _broken(nodes: Sequence[StoredNode], node: str | None) -> list[Name]:
    return [
        (each.name, bitmap.name)
        for each in nodes
        for bitmap in each.bitmaps
        if bitmap.inconsistent and node in (None, each.name)
    ]


def _write_changed(
    target: Target,
    path: str,
    nodes: Sequence[StoredNode],
    found: Sequence[Name],
    broken: bool,
    done: str | None,
) -> None:
    if done is not None:
        changed = [{"node": each[0], "name": each[1]} for each in found]
        report = {"target": path, "format": target.format, done: changed}
        write(json.dumps(report, indent=1) + "\n")
    elif broken:
        write("".join(f"{printable(target.label(each, nodes))}\n" for each in found))


# ---- dump, check ------------------------------------------------------------


@command("dump")
@_target
@_name
@_format_option
@json_option
@_granularity_option
@_node
@_qmp
@_shared
def dump_command(
    path: str,
    name: str,
    form: str | None,
    as_json: bool,
    granularity: int,
    node: str | None,
    qmp: str | None,
    no_lock: bool,
) -> None:
    """Print the dirty extents of a bitmap.

    Offset and length of each, in bytes. Extents are in order and do not touch; the last one ends
    with the disk at the latest. All is read once before the first is printed, so what cannot be
    read is told before.

    With --qmp, of a machine that runs: all of it as it was at one instant. QEMU writes it into an
    image in the folder for temporary files (TMPDIR), which it has to be able to open.

    \b
    Examples:
      pybitmap dump disk.qcow2 daily
      pybitmap dump disk.qcow2 daily -g 1M
      pybitmap dump vm.bitmaps vm0/daily --format csv |
        tail -n +2 | while IFS=, read -r offset length
        do echo "copy $length at $offset"; done
      pybitmap dump disk0 daily --qmp vm0.qmp
    """
    printing = _form(form, as_json)
    if qmp is not None:
        refused = {"--node": node, "--force-share": no_lock}
        with unwinding(), _machine(qmp, path, refused) as there, ExitStack() as stack:
            [bitmap] = there.find([name])
            with progress_bars() as progress:
                found = stack.enter_context(there.extents(bitmap, progress, granularity))
            write_extents(found, printing)
        return
    target = _to_read(path, no_lock)
    with ExitStack() as stack:
        with _hinting(), progress_bars() as progress:
            [bitmap] = target.find([name], node)
            found = stack.enter_context(areas(target.store, bitmap, progress, granularity))
        write_extents(found, printing)


def _form(form: str | None, as_json: bool) -> str:
    """One of FORMATS."""
    if as_json and form not in (None, "json"):
        raise click.UsageError(f"Give either --json or --format {form}.")
    return form or "json"


@command("check")
@_target
@json_option
@_shared
def check_command(path: str, as_json: bool, no_lock: bool) -> int:
    """Check the bitmaps of TARGET.

    Reads the directory, the tables and the bits of every bitmap, and changes nothing. What an
    image's clusters are used for apart from bitmaps is for `qemu-img check` to judge. With -U
    refcounts are not looked at, which a running machine writes late, nor bits that it has itself.

    \b
    Examples:
      pybitmap check disk.qcow2
      pybitmap check vm.bitmaps --json
      pybitmap check vm.bitmaps ||
        pybitmap repair vm.bitmaps --all

    Exit code: 0 all can be used, 1 something is broken, 2 it could not be checked.
    """
    target = _to_read(path, no_lock)
    with _hinting(), progress_bars() as progress:
        found = list(dict.fromkeys(problems(target.store, progress)))
    nodes = {name[0] for name, _ in found if name is not None}
    code = EXIT_BROKEN if any(problem not in (None, LIVE) for _, problem in found) else 0
    if as_json:
        report = {
            "target": path,
            "format": target.format,
            "good": code == 0,
            "problems": [problem for name, problem in found if name is None],
            "bitmaps": [
                {"node": name[0], "name": name[1], "reason": problem}
                for name, problem in found
                if name is not None
            ],
        }
        write(json.dumps(report, indent=1) + "\n")
        return code
    lines = []
    for name, problem in found:
        if name is None:
            lines.append(str(problem))
        else:
            problem = f"in use: {LIVE}" if problem == LIVE else problem
            lines.append(f"{target.label(name, nodes)}: {problem or 'good'}")
    if not found:
        lines.append(f"{path}: no bitmaps")
    write("".join(printable(line) + "\n" for line in lines))
    return code


# ---- rescue -----------------------------------------------------------------


@command("rescue")
@click.argument("path", metavar="IMAGE", type=FilePath())
@click.option("--dry-run", is_flag=True, help="Say what would be done, and write nothing.")
@click.option(
    "--backup",
    metavar="FILE",
    type=FilePath(),
    help="A new file, to which what is replaced is copied first.  [default: IMAGE.before-rescue,"
    " with a number if that is there]",
)
@json_option
@_no_lock
def rescue_command(
    path: str, dry_run: bool, backup: str | None, as_json: bool, no_lock: bool
) -> None:
    """Open an image that is refused for its bitmaps.

    Where the bitmaps extension or the bitmap directory of IMAGE is damaged, QEMU does not open it
    at all. This keeps the bitmaps that are whole. Others become inconsistent, and are then for
    `pybitmap repair` or `remove`; what has no name is lost. The disk's data stays as it is, and so
    does an image that needs nothing.

    The backup has the header as it was, and the bitmap directory behind it; how the header is put
    back is printed. Killed at any moment, the image is as it was or rescued; while another program
    has it open, it is refused. What belongs to nothing any more is freed by
    `qemu-img check -r leaks`.

    \b
    Examples:
      pybitmap rescue disk.qcow2 --dry-run
      pybitmap rescue disk.qcow2
      pybitmap rescue disk.qcow2 --json | jq -r .put_back
      pybitmap rescue /dev/vg/disk --backup /var/tmp/header

    Exit code: 0 done, or nothing to do; 1 not done, and why.
    """
    from ..store.qcow2.rescue import rescue  # for which local stores do not wait

    with _until_stored() as progress:
        try:
            if not isinstance(_to_change(path, no_lock), Image):
                raise InvalidError(f"{path}: not a qcow2 image; there is nothing to rescue")
            report = rescue(
                path, dry_run=dry_run, backup=backup, progress=progress, lock=not no_lock
            )
        except (BitmapError, OSError) as error:
            raise Refused(words(error)) from error
        if as_json:
            write(json.dumps(_rescue_as_json(report, dry_run), indent=1) + "\n")
        else:
            write("".join(printable(line) + "\n" for line in _rescued(report, dry_run)))


def _rescue_as_json(report: Report, dry_run: bool) -> dict[str, Any]:
    """For programs: the fields of :class:`Report`."""
    return {
        "target": report.path,
        "format": Image.format,
        "damaged": report.damaged,
        "dry_run": dry_run,
        "faults": report.faults,
        "bitmaps": [
            {"name": each.name, "outcome": each.outcome.value, "reason": each.reason}
            for each in report.bitmaps
        ],
        "refcounts": report.refcounts,
        "backup": report.backup,
        "put_back": report.put_back,
    }


def _rescued(report: Report, dry_run: bool) -> Iterator[str]:
    """What it found and did, in lines."""
    if not report.damaged:
        yield f"{report.path} needs no rescue: its bitmaps can be opened. Nothing was written."
        return
    for fault in report.faults:
        yield f"{report.path}: {fault}."
    will, now = ("would be", "would have") if dry_run else ("is", "has")
    for bitmap in report.bitmaps:
        why = f": {bitmap.reason}" if bitmap.reason is not None else ""
        yield f"Bitmap '{bitmap.name}' {will} {bitmap.outcome.value}{why}."
    if not report.left:
        yield f"The image {now} no bitmaps."
    if dry_run:
        yield "Nothing was written."
        return
    yield f"What was there before is in {report.backup}."
    yield f"To put it back, before anything else writes to the image: {report.put_back}"
    if report.inconsistent:
        repair_all = _command("repair", report.path, "--all")
        yield f"Mark everything dirty in what is inconsistent: {repair_all}"
    check = "all" if report.refcounts is not None else "leaks"
    yield f"Free what belongs to nothing: qemu-img check -r {check} {shlex.quote(report.path)}"
