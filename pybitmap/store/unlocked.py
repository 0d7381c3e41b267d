# SPDX-License-Identifier: MIT
"""What stores say and do where a lock cannot be had: file systems that have none.

Network file systems and FUSE answer a request for a lock with one of a few errors. A store is then
refused, since nothing would keep two programs from writing to it, unless it was made with
``lock=False``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import BitmapError, StoreError, UnsupportedError

#: What is answered where there are no locks; ENOLCK and EINVAL also by servers and old kernels.
_LACKING = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


class NoLocksError(UnsupportedError):
    """There are no locks, and none has been taken."""


def lacking(error: OSError) -> bool:
    """Does the file system lack such locks? (Or is the lock somebody else's, or an I/O error.)"""
    return error.errno in _LACKING


def no_locks(what: str, error: OSError) -> NoLocksError:
    """The refusal.

    :param what: is to be locked
    :param error: of the system call
    """
    return NoLocksError(
        f"{what}: its file system has no locks ({os.strerror(error.errno or 0)}), so nothing would "
        "keep other programs from changing it meanwhile; --no-lock (in Python lock=False) goes on "
        "all the same",
        error.errno,
    )


@contextmanager
def steady(check_unchanged: Callable[[], None]) -> Iterator[None]:
    """What is read in here without a lock, and what is wrong with it, is told only if it belongs
    together.

    :param check_unchanged: raises StoreError, see :func:`changed`, if what was read is no longer
        there
    """
    try:
        yield
    except BitmapError:
        check_unchanged()
        raise
    check_unchanged()


def changed(what: str) -> StoreError:
    """The refusal of what was read without a lock, and does not belong together."""
    return StoreError(f"{what} changed while it was read: try again", errno.EAGAIN)
