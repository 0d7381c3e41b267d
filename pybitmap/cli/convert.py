# SPDX-License-Identifier: MIT
"""`pybitmap convert`: extents from one format, or a bitmap, to another."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import click

from ..errors import BitmapError, InvalidError
from ..extent import Extent
from ..interchange.base import LSB, MSB, Format, Options, Source
from ..interchange.conversion import Gathered, gather, replacing, write_as
from ..interchange.formats import FORMATS, detect, find_format, format_of_name
from ..offline import Name, areas, mark
from ..replay import DEFAULT_MEMORY_LIMIT
from ..sizes import exact_size
from ..store import probe
from ..store.base import Progress
from ..trace import printable
from .bitmaps import _hinting, _to_change, _to_read, _until_stored
from .common import (
    FilePath,
    Refused,
    note,
    one_granularity,
    one_size,
    progress_bars,
    tell,
    words,
)
from .completion import names_in
from .group import command
from .targets import Target

_STDIO = "-"


class _Formats(click.ParamType):  # type: ignore[type-arg]
    """The name of a format."""

    name = "format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return value if isinstance(value, Format) else find_format(value)
        except InvalidError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in FORMATS if name.startswith(incomplete)]


@command("convert")
@click.argument("source", metavar="SRC", type=FilePath(allow_dash=True))
@click.argument("dest", metavar="[DST]", required=False, type=FilePath(allow_dash=True))
@click.option(
    "--from",
    "source_format",
    type=_Formats(),
    metavar="FORMAT",
    help="That of SRC.  [default: as it is recognised]",
)
@click.option(
    "--to",
    "dest_format",
    type=_Formats(),
    metavar="FORMAT",
    help="That of DST.  [default: by its extension, else json]",
)
@click.option(
    "--bitmap",
    metavar="NAME",
    shell_complete=names_in("source"),
    help="SRC is an image or a local store, and this the bitmap.",
)
@click.option(
    "--into",
    metavar="NAME",
    shell_complete=names_in("dest"),
    help="DST is an image or a local store; what SRC has is marked in this bitmap of it, beside"
    " what is dirty there.",
)
@click.option(
    "-g",
    "--granularity",
    metavar="SIZE",
    callback=one_granularity,
    help="Round outwards to multiples of this, a power of 2.  [default: that of the bitmap; else"
    " 512, or more for a large disk]",
)
@click.option(
    "--size",
    metavar="SIZE",
    callback=one_size,
    help="Size of the disk.  [default: as SRC has it, else the end of the last extent]",
)
@click.option(
    "--start",
    metavar="SIZE",
    default="0",
    callback=one_size,
    help="Leave out what is before this, to go on after what one has already.",
)
@click.option(
    "--block-size",
    metavar="SIZE",
    callback=one_size,
    help="What a block, a bit or a number stands for, where SRC does not say, and in DST. In csi,"
    " the length of all extents (FIXED_LENGTH).",
)
@click.option(
    "--bit-order",
    type=click.Choice([LSB, MSB]),
    help="Of bits: which is the first of a byte, the lowest (KVM, vhost, DRBD) or the highest"
    " (XenServer).",
)
@click.option(
    "--since", metavar="ERA", type=click.IntRange(0), help="Of era-dump: the first that counts."
)
@click.option(
    "--any-order", is_flag=True, help="Extents of SRC may come in any order, and overlap."
)
@click.option(
    "--memory-limit",
    metavar="SIZE",
    default=exact_size(DEFAULT_MEMORY_LIMIT),
    show_default=True,
    callback=one_size,
    help="What the bitmap may take in memory, if all is dirty; half of that where the size is"
    " not known before.",
)
@click.option(
    "-U",
    "--force-share",
    "share",
    is_flag=True,
    help="With --bitmap: read SRC without a lock, also while a program has it open, as `pybitmap"
    " dump -U` does.",
)
@click.option(
    "--no-lock",
    is_flag=True,
    help="With --into, and --bitmap: go on where the file system has no locks (as NFS, FUSE)."
    " Nothing then keeps another program, a running machine above all, from writing to DST at the"
    " same time, which destroys it.",
)
def convert_command(
    source: str,
    dest: str | None,
    source_format: Format | None,
    dest_format: Format | None,
    bitmap: str | None,
    into: str | None,
    granularity: int | None,
    size: int | None,
    start: int,
    block_size: int | None,
    bit_order: str | None,
    since: int | None,
    any_order: bool,
    memory_limit: int,
    share: bool,
    no_lock: bool,
) -> None:
    """Convert lists of dirty extents, and bitmaps.

    SRC is a file, or - for standard input, or with --bitmap an image or a local store. DST is a
    file, or - for standard output, the default; or with --into an image or a local store. A file
    is replaced when the new one is whole.

    Extents are rounded outwards to --granularity, and to blocks where the format counts those;
    on standard error it is told how much that has added.

    \b
    Formats:
      json, csv        as pybitmap dump --format
      qemu-map         qemu-img map --output=json
      qemu-map-bitmap  the same with x-dirty-bitmap
      nbdinfo          nbdinfo --map
      nbdinfo-json     nbdinfo --map --json
      rbd, rbd-json    rbd diff, and its --format json
      imageio          oVirt imageio's extents
      csi              CSI's SnapshotMetadata, as JSON
      vmware           QueryChangedDiskAreas, as JSON
      thin-delta       thin_delta's XML
      era, era-dump    XML of era_invalidate, era_dump
      bits             a bit for each block
      roaring          numbers of blocks, 32 bits
      roaring64        numbers of blocks, 64 bits
      arrow, parquet   columns offset, length

    \b
    Examples:
      qemu-img map --output=json vm.qcow2 |
        pybitmap convert - --to csv
      pybitmap convert vm.qcow2 --bitmap daily day.parquet
      pybitmap convert diff.json vm.bitmaps --into vm0/daily
      pybitmap convert log.bin --from bits --bit-order lsb
        --block-size 4K log.json
      pybitmap convert day.json --to csi --start 1G

    Exit code: 0 done; 1 not done, and why; DST is as before; 2 wrong usage.
    """
    if block_size == 0:
        raise click.BadParameter("a block has at least a byte", param_hint="--block-size")
    options = Options(
        size=size,
        block_size=block_size,
        bit_order=bit_order,
        since=since,
        any_order=any_order,
        guessed=source_format is None,
        memory_limit=memory_limit,
    )
    _check_usage(
        source,
        dest,
        source_format,
        dest_format,
        bitmap,
        into,
        granularity,
        size,
        share,
        no_lock,
    )
    try:
        if into is None and dest not in (None, _STDIO):
            _check_no_store(str(dest), "--into")
        fmt = None if into is not None else _format(dest, dest_format)
        target = name = None
        if into is not None:
            assert dest is not None
            target = _to_change(dest, no_lock)
            [name] = target.find([into])
            size, granularity = _shape(target, name)
        lockless = share or no_lock
        found = _read(source, source_format, bitmap, fmt, granularity, size, options, lockless)
        if target is not None and name is not None:
            with _until_stored() as progress:
                mark(target.store, name, found.bitmap.areas(start), progress)
            _tell_rounding(found, found.dirty, start, [found.bitmap.group_size])
            return
        assert fmt is not None
        with _output(dest) as out:
            written = write_as(fmt, found.bitmap, out, options, start=start)
        groups = [found.bitmap.group_size]
        if block_size is not None and (fmt.blocks or fmt.fixed):
            groups.append(block_size)
        _tell_rounding(found, written, start, groups)
    except (BitmapError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise Refused(words(error) if str(error) else "out of memory") from error


def _check_usage(
    source: str,
    dest: str | None,
    source_format: Format | None,
    dest_format: Format | None,
    bitmap: str | None,
    into: str | None,
    granularity: int | None,
    size: int | None,
    share: bool,
    no_lock: bool,
) -> None:
    """
    :raises click.UsageError: if arguments forbid each other
    """
    if bitmap is not None and (source_format is not None or source == _STDIO):
        raise click.UsageError("With --bitmap, SRC is an image or a local store: no --from, no -.")
    if into is not None and (dest_format is not None or dest in (None, _STDIO)):
        raise click.UsageError("With --into, DST is an image or a local store: no --to, no -.")
    if into is not None and (granularity is not None or size is not None):
        raise click.UsageError("With --into, size and granularity are those of the bitmap there.")
    if share and bitmap is None:
        raise click.UsageError("-U is for reading a bitmap of SRC, by --bitmap.")
    if no_lock and bitmap is None and into is None:
        raise click.UsageError("--no-lock is for images and local stores: --bitmap, --into.")
    if bitmap is not None and size is not None:
        raise click.UsageError("With --bitmap, the size is that of the disk there.")


def _format(dest: str | None, given: Format | None) -> Format:
    """That of DST."""
    fmt = given
    if fmt is None and dest not in (None, _STDIO):
        fmt = format_of_name(str(dest))
        if fmt is None:
            raise InvalidError(
                f"{dest}: its name does not tell a format; say which, by --to: {', '.join(FORMATS)}"
            )
    fmt = fmt or FORMATS["json"]
    if fmt.write is None:
        raise InvalidError(f"{fmt.name} is only read; choose another format, by --to")
    if fmt.binary and dest in (None, _STDIO) and sys.stdout.isatty():
        raise InvalidError(f"{fmt.name} is nothing for a terminal: say where to write it, by DST")
    return fmt


def _shape(target: Target, name: Name) -> tuple[int, int]:
    """Size of the disk, and granularity of the bitmap."""
    for node in target.nodes():
        for each in node.bitmaps:
            if (node.name, each.name) == name:
                return node.size, each.granularity
    raise InvalidError(f"{target.path}: bitmap '{name[1]}' has gone meanwhile; try again")


def _check_no_store(path: str, option: str) -> None:
    """
    :raises InvalidError: if an image or a local store is there, which is no list of extents
    """
    with contextlib.suppress(FileNotFoundError):
        found = probe(path)
        if found is not None or os.path.isdir(path):
            what = "an image or a local store" if found is not None else "a directory"
            raise InvalidError(
                f"{path} is {what}: its bitmaps are named by {option} NAME; see pybitmap info"
            )


def _read(
    source: str,
    fmt: Format | None,
    bitmap: str | None,
    dest: Format | None,
    granularity: int | None,
    size: int | None,
    options: Options,
    no_lock: bool,
) -> Gathered:
    limit = options.memory_limit
    if bitmap is not None:
        _check_heeded(None, dest, options)
        target = _to_read(source, no_lock)
        with _hinting():
            [name] = target.find([bitmap])
            disk, group = _shape(target, name)
            if size not in (None, disk):
                raise InvalidError(
                    f"{source}: its disk has {disk} bytes, that of the bitmap to mark {size}"
                )
            with progress_bars() as progress, areas(target.store, name, progress) as dirty:
                return gather(
                    (Extent(*area) for area in dirty),
                    size=disk,
                    granularity=granularity or group,
                    memory_limit=limit,
                )
    if source != _STDIO and fmt is None:
        _check_no_store(source, "--bitmap")
    options = replace(options, size=size)
    with _input(source) as stream, progress_bars() as progress:
        watched = _Watched(stream, source, progress)
        text = Source(watched, _shown(source))
        if fmt is None:
            fmt = detect(text)
            tell(f"{text.name}: {fmt.name}")
        _check_heeded(fmt, dest, options)
        extents = fmt.read(text, options)
        found = gather(extents, size=size, granularity=granularity, memory_limit=limit)
    if not watched.done:
        note(f"{text.name}: it is empty, as after a program that failed; nothing is dirty")
    return found


#: Formats that do not say themselves how long a block is, when they are read.
_BLOCKS_UNTOLD = ("bits", "roaring", "roaring64", "era")


def _check_heeded(source: Format | None, dest: Format | None, options: Options) -> None:
    """
    :param source, dest: None: a bitmap
    :raises click.UsageError: if an option means nothing to either: who gave it expects that it does
    """
    read = None if source is None else source.name
    written = None if dest is None else dest.name
    blocks = read in _BLOCKS_UNTOLD or (dest is not None and (dest.blocks or dest.fixed))
    counting = [each.name for each in FORMATS.values() if each.blocks or each.fixed]
    for option, given, heeded, formats in (
        ("--since", options.since, read == "era-dump", "era-dump"),
        ("--bit-order", options.bit_order, "bits" in (read, written), "bits"),
        ("--block-size", options.block_size, blocks, ", ".join(counting)),
    ):
        if given is not None and not heeded:
            pair = f"from {read or 'a bitmap'} to {written or 'a bitmap'}"
            instead = "; to round extents outwards: -g" if option == "--block-size" else ""
            raise click.UsageError(f"{option} means nothing {pair}, but to {formats}{instead}.")


def _shown(source: str) -> str:
    return "<stdin>" if source == _STDIO else printable(source)


@contextlib.contextmanager
def _input(source: str) -> Iterator[BinaryIO]:
    if source != _STDIO:
        with open(source, "rb") as file:
            yield file
        return
    if sys.stdin is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "<stdin>")
    yield sys.stdin.buffer


class _Watched:
    """A stream that tells how far it was read.

    :ivar done: bytes
    """

    def __init__(self, stream: BinaryIO, source: str, progress: Progress) -> None:
        self._stream, self._progress = stream, progress
        self._what = f"reading {_shown(source)}"
        self.done = 0
        self._total = None if source == _STDIO else os.fstat(stream.fileno()).st_size or None

    def read(self, nbytes: int) -> bytes:
        data = self._stream.read(nbytes)
        self.done += len(data)
        self._progress(self._what, self.done, self._total)
        return data


@contextlib.contextmanager
def _output(dest: str | None) -> Iterator[Any]:
    if dest not in (None, _STDIO):
        with replacing(str(dest)) as file:
            yield file
        return
    try:
        out = getattr(sys.stdout, "buffer", None)
        if out is None:
            raise OSError(errno.EBADF, "it is closed")
        yield out
        out.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None:
            error.filename = "standard output"
        raise


def _tell_rounding(found: Gathered, written: int, start: int, groups: list[int]) -> None:
    """How much more is dirty than was given."""
    to = " and ".join(f"{exact_size(each)}" for each in dict.fromkeys(groups))
    if found.overlapping or start:  # how much it was before is not known
        if found.rounded:
            note(f"rounded outwards to multiples of {to}; {written} bytes are dirty")
        return
    more = written - found.given
    if more > 0:
        note(
            f"rounded outwards to multiples of {to}: {more} bytes more are dirty, {written} instead"
            f" of {found.given}"
        )
