# SPDX-License-Identifier: MIT
"""Opened files whose end nothing can come between: an interruption leaves no descriptor behind.

``os.open`` answers a number, which is lost if a signal handler raises before it is kept, and
``os.close`` of a number is right once. A FileIO closes itself when nobody has it any more, and may
be closed twice; and its opener is no Python, in which a handler could run behind ``os.open``.

The child of a fork has them, too, and with them the locks of its parent, for as long as it lives,
also when the parent was killed. So they are /dev/null there: closed, as far as the parent's files
are concerned, and nobody else can get their numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from io import FileIO
from weakref import WeakSet

from .._entry import bound
from .._fork import in_child

_open: WeakSet[FileIO] = WeakSet()


def opened(path: str | os.PathLike[str], flags: int) -> FileIO:
    """For its descriptor: ``fileno()``, ``close()``, ``with``. Not inherited by other programs.

    :param flags: of open(2)
    :raises OSError: as open(2)
    """
    file = FileIO(path, "r", opener=bound(os.open, path, flags | os.O_CLOEXEC, 0o600))
    _open.add(file)
    return file


def is_open_here(file: FileIO) -> bool:
    """Has this process the same file open a second time, by :func:`opened`?"""
    status = os.fstat(file.fileno())
    for each in list(_open):
        with suppress(OSError, ValueError):  # another thread closes it just now
            if each is not file and os.path.samestat(os.fstat(each.fileno()), status):
                return True
    return False


@in_child
def _after_fork() -> None:
    _become_null(file.fileno() for file in list(_open) if not file.closed)


def become_null(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Let whatever descriptors this process has of these files be /dev/null."""
    files = set()
    for path in paths:
        with suppress(OSError):
            status = os.stat(path)
            files.add((status.st_dev, status.st_ino))
    found = []
    for fd in _descriptors():
        with suppress(OSError):  # that of listdir, for one
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) in files:
                found.append(fd)
    _become_null(found)


def _descriptors() -> Iterable[int]:
    """Those that this process may have."""
    try:
        return map(int, os.listdir("/dev/fd"))
    except OSError:  # there is none left to look with
        return range(os.sysconf("SC_OPEN_MAX"))


def _become_null(descriptors: Iterable[int]) -> None:
    found = list(descriptors)
    if found:
        try:
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # there is none left: one of these is
            os.close(found[0])
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in found:
            if fd != null:
                with suppress(OSError):
                    os.dup2(null, fd, inheritable=False)
        if null not in found:
            os.close(null)
