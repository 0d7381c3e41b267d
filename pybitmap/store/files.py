# SPDX-License-Identifier: MIT
"""What there is to know and to do about files, whatever they hold: synced, locked, in errors."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import _core
from ..errors import BitmapError, StoreError


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Errors of system calls become StoreErrors; ours, of which some are OSErrors, stay.

    :param what: could not be done
    """
    try:
        yield
    except BitmapError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StoreError(f"{what}: {reason}", error.errno) from error


def sync_file(fd: int) -> None:
    """What was written to it survives a crash of the system.

    :raises OSError: if not
    """
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, where fsync leaves it in the drive's cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)


def sync_directory(path: Path) -> None:
    """The names in it survive one.

    :raises OSError: if not
    """
    code = _core.hbfile_sync_directory(os.fsencode(path))
    if code:
        raise OSError(-code, os.strerror(-code), str(path))


def lock_holders(inode: int) -> set[int]:
    """The processes that hold a lock on the file, where the system tells."""
    holders = set()
    with suppress(OSError, ValueError), open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            # 1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF
            words = line.split()
            if words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
                holders.add(int(words[4]))
    return holders - {0, -1}
