# SPDX-License-Identifier: MIT
"""The `pybitmap` command, also `python -m pybitmap`.

Its packages are an extra of the library, so this says how to get them where they are missing. What
compilers ask for (`--cflags` and the like), and the version, are answered without them, and without
the core.
"""

from __future__ import annotations

import os
import sys

from . import __version__

INTERRUPTED = 130  # exit code: 128 + SIGINT


def main() -> int:
    """Runs the command with the arguments of the process and returns its exit code."""
    if sys.argv[1:] == ["--version"] and _told_version():
        return 0
    if sys.argv[1:] and sys.argv[1].startswith("--"):
        from ._sources import flags

        found = flags(sys.argv[1:])
        if found is not None:
            try:
                with open(1, "w", closefd=False) as out:
                    out.write(found + "\n")
            except OSError as error:
                print(f"pybitmap: what was asked for cannot be written: {error}", file=sys.stderr)
                return 1
            return 0
    try:
        return _run()
    except KeyboardInterrupt:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one finds us leaving
        stderr = sys.__stderr__  # a progress bar that was cut short may have replaced the other
        if stderr is not None:
            show_cursor = "\x1b[?25h" if stderr.isatty() else ""
            print(f"{show_cursor}pybitmap: interrupted", file=stderr)
        return INTERRUPTED


def _run() -> int:
    try:
        from .cli import main as run

        return run()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("click", "rich"):
            raise
        print(
            f"pybitmap: the command line needs {missing}, which is not installed.\n"
            "In a clone of this project: pip install '.[cli]'; elsewhere: pip install click rich\n"
            "(pybitmap on the package index is an unrelated project.)",
            file=sys.stderr,
        )
        return 2


def _told_version() -> bool:
    """At once; if that fails, the command says why."""
    try:
        os.write(1, f"pybitmap {__version__}\n".encode())
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
