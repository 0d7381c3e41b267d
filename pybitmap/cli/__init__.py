# SPDX-License-Identifier: MIT
"""The `pybitmap` command.

A command here reads its arguments, has the work done by a module that knows
nothing of terminals (replay.py, offline.py), and prints.  What names mean that
people give is in targets.py.  Errors are exceptions everywhere; `main` alone
turns them into words on stderr and an exit code:

    0    done; with --expect, equal; with check, all good
    1    done, and different from what was expected, or broken; what a machine, a rescue or a
         backup refuses
    2    wrong usage, or input that cannot be used; of the other commands, what could not be done
    129, 143  SIGHUP, SIGTERM, where something of a machine's was put back
    130  Ctrl-C (see __main__.py); of a backup, SIGTERM and SIGHUP
    141  standard output was closed by its reader, as by `head`
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO

import click

from .. import __version__
from ..errors import BitmapError
from .common import warn, words
from .group import COMPLETE_VAR, Group

EXIT_ERROR = 2
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """QEMU-class dirty bitmaps.

    TARGET is a qcow2 image, or the directory of a local store; with --qmp a
    node or a device of a machine that runs.

    For compilers, instead of a command: --cflags, --ldflags,
    --sources (the C files of the core), --pkgconfigdir.

    \b
    Examples:
      pybitmap add disk.qcow2 daily
      pybitmap info disk.qcow2 --count
      pybitmap dump --help
      source <(pybitmap completion bash)
    """


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.  KeyboardInterrupt passes through."""
    _open_streams()
    try:
        if COMPLETE_VAR in os.environ:
            from .completion import complete

            return complete(cli, os.environ[COMPLETE_VAR])
        return _run(args)
    finally:
        _settle(sys.stderr)


class _Closed(io.TextIOBase):
    """Standard output that whoever started us has closed: what should be printed is an error."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed", "standard output")


def _open_streams() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be anything


def _run(args: Sequence[str] | None) -> int:
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
        _settle(sys.stdout)
        return EXIT_PIPE_CLOSED
    except OSError as error:
        _settle(sys.stdout)
        warn(words(error))
    except BitmapError as error:
        warn(words(error))
    except MemoryError as error:
        warn(str(error) or "out of memory")
    return EXIT_ERROR


def _settle(stream: TextIO) -> None:
    """Drops what could not be written: it would fail once more when Python ends."""
    try:
        stream.flush()
    except OSError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
