# SPDX-License-Identifier: MIT
"""Files of a local store that nobody else can have put there, or can change.

A store is what its user, or root, has made. Whoever can put a file in its folder, or a link in the
place of one, decides what bitmaps say, and what a program of another user writes to. So these are
refused, with what to do:

- a folder, or a file, that others may write to: anybody, or a group with other people in it. A
  group is one's own if it has one's name and no other members, as where the umask is 002, or if it
  has no name, as in containers. Files of a store are readable and writable by their owner only, so
  nothing is shared by way of a group. A folder with the sticky bit may be written to: nobody takes
  away there what is another's, and what others put there is refused by its owner.
- a file of somebody else: neither of this user, nor of root, nor of the owner of the folder, who
  is one of these where it is written to. (Root may read the stores of others, but leaves no files
  in them that they could not use.)
- whatever is no regular file: a symbolic link leads out of the store, a FIFO never opens. (The path
  of the store itself may lead through links.)
- for writing, a file with several names, as in a backup by hard links, which would be written to as
  well.

Nothing here waits.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from io import FileIO
from pathlib import Path

from ..errors import StoreError
from .opened import opened


def check_folder(path: Path, *, writing: bool) -> None:
    """
    :raises StoreError: if it is not to be trusted
    :raises OSError: if it cannot be looked at, or is no folder
    """
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    others = None if status.st_mode & stat.S_ISVTX else _writers(status)
    if others:
        raise _refused(
            f"{others} may write to '{path}', and put other files in the place of the store's: "
            f"see whether they are right, and {_take_away(path)}"
        )
    if writing and status.st_uid not in (os.geteuid(), 0):
        raise _refused(
            f"'{path}' belongs to {_user(status.st_uid)}: only its owner can write to the store"
        )


def why_foreign(path: Path, status: os.stat_result, *, writing: bool) -> str | None:
    """Why a file is not to be trusted, as what follows its name; None if it is.

    :param status: as lstat or fstat gives it
    """
    if stat.S_ISLNK(status.st_mode):
        return "is no regular file, but a symbolic link: put the file itself there"
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file"
    if status.st_uid not in (os.geteuid(), 0, os.stat(path.parent).st_uid):
        return f"belongs to {_user(status.st_uid)}, and not to the owner of the store"
    others = _writers(status)
    if others:
        return f"may be written to by {others}: see whether it is right, and {_take_away(path)}"
    if writing and status.st_nlink > 1:
        return (
            f"has {status.st_nlink} names (hard links), which all would be written to: put a copy "
            "in its place (cp, and then mv)"
        )
    return None


def opened_private(path: Path, flags: int) -> FileIO:
    """As :func:`opened`.

    :raises StoreError: if it is not to be trusted
    :raises OSError: as open(2)
    """
    writing = bool(flags & (os.O_WRONLY | os.O_RDWR))
    try:
        file = opened(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        check_file(path, writing=writing)  # knows more than its errno
        raise
    why = why_foreign(path, os.fstat(file.fileno()), writing=writing)
    if why:
        file.close()
        raise _refused(f"'{path}' {why}")
    return file


def check_file(path: Path, *, writing: bool) -> None:
    """
    :raises StoreError: if there is one that is not to be trusted
    """
    try:
        status = os.lstat(path)
    except OSError:
        return
    why = why_foreign(path, status, writing=writing)
    if why:
        raise _refused(f"'{path}' {why}")


def place(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """What tells the file at a path from all others that are open; None if there is none."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def place_of(fd: int) -> tuple[int, int]:
    """The same, of an open one."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _take_away(path: Path) -> str:
    return f"take that away (chmod go-w '{path}', or where there are no modes, mount it otherwise)"


def _refused(message: str) -> StoreError:
    return StoreError(message, errno.EPERM)


def _writers(status: os.stat_result) -> str | None:
    """Who else may write to it, without being root."""
    if status.st_mode & stat.S_IWOTH:
        return "anybody"
    if status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_uid, status.st_gid):
        return f"group {grp.getgrgid(status.st_gid).gr_name}"
    return None


def _is_own_group(uid: int, gid: int) -> bool:
    try:
        group = grp.getgrgid(gid)
    except KeyError:
        return True
    name = _name(uid)
    return group.gr_name == name and not set(group.gr_mem) - {name}


def _name(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def _user(uid: int) -> str:
    name = _name(uid)
    return f"user {uid}" if name is None else f"user {name}"
