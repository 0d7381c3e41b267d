# SPDX-License-Identifier: MIT
"""QEMU's locks on image files, so that QEMU and we keep off each other.

A program says with a lock on byte 100 + p that it uses permission p, and with one on byte 200 + p
that nobody else may use it. All are shared locks; whether somebody else's is there is found out by
asking whether an exclusive one could be had. They are locks of the open file description
(``F_OFD_SETLK``), so two stores of one process keep off each other as well.

Programs that ask for nothing, like cp, are not kept off.
"""

from __future__ import annotations

import errno
import fcntl
import struct
import sys
from contextlib import suppress

from ...errors import LockedError, StoreError
from ..unlocked import NoLocksError, lacking, no_locks

# Python's fcntl does not have these names before 3.9, nor without the C library's.
_F_OFD_GETLK = getattr(fcntl, "F_OFD_GETLK", 36)
_F_OFD_SETLK = getattr(fcntl, "F_OFD_SETLK", 37)

#: ``struct flock``: type, whence, start, length, process.
_FLOCK = struct.Struct("@hhqqi4x")

_USED, _FORBIDDEN = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3

#: What a reader and a writer use. Both forbid others to write and to resize.
_READER = (_READ,)
_WRITER = (_READ, _WRITE, _RESIZE)
_NOT_FOR_OTHERS = (_WRITE, _RESIZE)


def lock(fd: int, path: str, *, read_only: bool) -> None:
    """Lock an open image; closing it unlocks it, if no child of a fork has it.

    :raises LockedError: if somebody else has it open, and one of the two is a writer
    :raises NoLocksError: if the system, or the file system, has no such locks
    :raises StoreError: if it cannot be locked for another reason
    """
    if sys.platform != "linux":
        raise NoLocksError(
            f"{path}: qcow2 images can be locked on Linux only; --no-lock (in Python lock=False) "
            "goes on without, and nothing keeps other programs from changing it meanwhile"
        )
    uses = _READER if read_only else _WRITER
    mine = [_USED + each for each in uses] + [_FORBIDDEN + each for each in _NOT_FOR_OTHERS]
    theirs = [_FORBIDDEN + each for each in uses] + [_USED + each for each in _NOT_FOR_OTHERS]
    try:
        for byte in mine:
            fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
        for byte in theirs:
            answer = fcntl.fcntl(fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                raise _locked(path, read_only)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _locked(path, read_only) from error
        if lacking(error):
            raise no_locks(path, error) from error
        raise StoreError(f"{path} cannot be locked: {error.strerror}", error.errno) from error


def is_written(fd: int) -> bool:
    """Has another program the image open for writing, as far as locks tell? Takes none itself."""
    if sys.platform != "linux":
        return False
    with suppress(OSError):
        asked = _FLOCK.pack(fcntl.F_WRLCK, 0, _USED + _WRITE, 1, 0)
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, asked)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    return False


def unlock(fd: int) -> None:
    """Let go of all of them, also if a child of a fork has the file open still."""
    if sys.platform != "linux":
        return
    with suppress(OSError):
        fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, _USED, 200, 0))


def _locked(path: str, read_only: bool) -> LockedError:
    what = "is written by" if read_only else "is open in"
    return LockedError(
        f"{path} {what} another program (QEMU, or another store); bitmaps of a running machine "
        "are changed over its monitor",
        errno.EAGAIN,
    )
