# SPDX-License-Identifier: MIT
"""The `pybitmap` command.

A command here reads its arguments, has the work done by a module that knows
nothing of terminals (replay.py, offline.py), and prints.  What names mean that
people give is in targets.py.  Errors are exceptions everywhere; `main` alone
turns them into words on stderr and an exit code:

    0    done; with --expect, equal; with check, all good
    1    done, and different from what was expected, or broken; a rescue that is refused
    2    wrong usage, or input that cannot be used
    130  Ctrl-C (see __main__.py)
    141  standard output was closed by its reader, as by `head`
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

import click

from ..errors import BitmapError
from .bitmaps import commands
from .common import warn, words
from .replay import replay_command
from .serve import serve_command

EXIT_ERROR = 2
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pybitmap", message="%(prog)s %(version)s")
def cli() -> None:
    """QEMU-class dirty bitmaps.

    TARGET is a qcow2 image, or the directory of a local store.

    For compilers, instead of a command: --cflags, --ldflags, --sources (the C files of the core),
    --pkgconfigdir.
    """


for command in (*commands, replay_command, serve_command):
    cli.add_command(command)


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
        warn(words(error))
    except BitmapError as error:
        warn(words(error))
    except MemoryError as error:
        warn(str(error) or "out of memory")
    return EXIT_ERROR


def _settle_stdout() -> None:
    """Drops what could not be written: it would fail once more when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
