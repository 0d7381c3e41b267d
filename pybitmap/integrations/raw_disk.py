# SPDX-License-Identifier: MIT
"""RawDisk: a raw file or a block device, as a server of block requests needs it.

Each request is done as a whole or raises; what of a failed one is on the disk, nobody knows.
Several threads may call it: no request moves an offset that another one uses. In the child of a
fork it is an empty file (see store/opened.py), and a closed one raises ValueError.
Dirty bitmaps are its user's affair.

Offsets and lengths are in bytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Callable

from ..errors import InvalidError, LockedError, UnsupportedError
from ..store.opened import opened
from ..store.qcow2.locks import lock
from ..store.unlocked import NoLocksError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

# linux/falloc.h
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16

#: What a file, a file system or a device says that cannot do it, or not of such a range.
_CANNOT = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})


def _find_fallocate() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function


_fallocate = _find_fallocate()


class RawDisk:
    """
    :param path: of a regular file or a block device; its size is that which it has now
    :param report: told in words what is left out where the file system has no locks
    :raises InvalidError: if it is something else, such as a folder
    :raises LockedError: if another program has it open, by QEMU's locks
    :raises OSError: if it cannot be opened

    >>> from pathlib import Path
    >>> nbytes = Path("disk.raw").write_bytes(bytes(1 << 20))
    >>> disk = RawDisk("disk.raw", read_only=False, report=print)
    >>> disk.write(b"new", 5000)
    >>> buffer = bytearray(3)
    >>> disk.read(buffer, 5000)
    >>> bytes(buffer), disk.size
    (b'new', 1048576)
    >>> disk.close()
    """

    def __init__(self, path: str, *, read_only: bool, report: Callable[[str], object]) -> None:
        self.path = path
        if stat.S_ISDIR(os.stat(path).st_mode):  # for writing it does not even open
            raise InvalidError(f"{path} is a folder, not a disk: give a file or a block device")
        # A FIFO would wait for somebody else to open it.
        mode = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NONBLOCK
        self._file = opened(path, mode)
        try:
            status = os.fstat(self._file.fileno())
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
                raise InvalidError(f"{path} is neither a regular file nor a block device")
            #: As many bytes are served, whatever becomes of the file meanwhile.
            self.size = os.lseek(self._file.fileno(), 0, os.SEEK_END)
            #: Bytes that are best written at once: a power of 2, from 512 on.
            self.block = min(max(512, status.st_blksize & -status.st_blksize), 1 << 21)
            self._lock(read_only, report)
        except BaseException:
            self._file.close()
            raise

    def _lock(self, read_only: bool, report: Callable[[str], object]) -> None:
        try:
            lock(self._file.fileno(), self.path, read_only=read_only)
        except LockedError as error:
            raise LockedError(
                f"{self.path} is open in another program (QEMU, or another server): what that one "
                "writes would be in none of the bitmaps here. End it first",
                error.errno,
            ) from None
        except NoLocksError:
            report(
                f"{self.path}: its file system has no locks, so nothing keeps another program from "
                "writing to it at the same time, which is in none of the bitmaps here"
            )

    def read(self, buffer: WriteableBuffer, offset: int) -> None:
        """
        :raises OSError: if it cannot be read as a whole; EIO where the file has become shorter

        >>> from pathlib import Path
        >>> nbytes = Path("disk.raw").write_bytes(b"data" * 256)
        >>> disk, buffer = RawDisk("disk.raw", read_only=True, report=print), bytearray(4)
        >>> disk.read(buffer, 512)
        >>> bytes(buffer)
        b'data'
        >>> disk.close()
        """
        left = memoryview(buffer).cast("B")
        while left:
            done = os.preadv(self._file.fileno(), [left], offset)
            if not done:
                message = f"ends at {offset}: it was cut short while it was served"
                raise OSError(errno.EIO, message, self.path)
            left, offset = left[done:], offset + done

    def write(self, data: ReadableBuffer, offset: int) -> None:
        """
        :raises OSError: of the first part that cannot be written; those before it are

        >>> from pathlib import Path
        >>> nbytes = Path("disk.raw").write_bytes(bytes(1024))
        >>> disk = RawDisk("disk.raw", read_only=False, report=print)
        >>> disk.write(b"new", 512)
        >>> disk.close()
        >>> Path("disk.raw").read_bytes()[512:515]
        b'new'
        """
        left = memoryview(data).cast("B")
        while left:
            done = os.pwrite(self._file.fileno(), left, offset)
            left, offset = left[done:], offset + done

    def zero(self, offset: int, nbytes: int, *, may_trim: bool) -> None:
        """Zeroes, without writing them.

        :param may_trim: it may take the space of the range away
        :raises UnsupportedError: if only writing them makes them; nothing has changed
        :raises OSError: if it fails otherwise

        >>> from pathlib import Path
        >>> nbytes = Path("disk.raw").write_bytes(b"data" * 2048)
        >>> disk = RawDisk("disk.raw", read_only=False, report=print)
        >>> try:
        ...     disk.zero(0, 4096, may_trim=True)
        ... except UnsupportedError:                # write them, then
        ...     disk.write(bytes(4096), 0)
        >>> disk.close()
        >>> Path("disk.raw").read_bytes()[4092:4100]
        b'\\x00\\x00\\x00\\x00data'
        """
        self._check_whole(offset + nbytes)
        if may_trim and self._change(_PUNCH_HOLE | _KEEP_SIZE, offset, nbytes):
            return
        if not self._change(_ZERO_RANGE | _KEEP_SIZE, offset, nbytes):
            raise UnsupportedError(f"{self.path}: zeroes have to be written there")

    def trim(self, offset: int, nbytes: int) -> None:
        """Take the space of a range away, where that can be done; what is read there may change.

        :raises OSError: if it fails, other than by not being possible

        >>> from pathlib import Path
        >>> nbytes = Path("disk.raw").write_bytes(b"data" * 2048)
        >>> disk = RawDisk("disk.raw", read_only=False, report=print)
        >>> disk.trim(0, 4096)                      # what is there now, nobody says
        >>> disk.close()
        >>> Path("disk.raw").read_bytes()[4096:4100]
        b'data'
        """
        self._check_whole(offset + nbytes)
        self._change(_PUNCH_HOLE | _KEEP_SIZE, offset, nbytes)

    def _check_whole(self, end: int) -> None:
        """
        :raises OSError: EIO, if the file has become shorter than ``end``
        """
        now = os.lseek(self._file.fileno(), 0, os.SEEK_END)
        if now < end:
            message = f"ends at {now}: it was cut short while it was served"
            raise OSError(errno.EIO, message, self.path)

    def _check_place(self) -> None:
        """
        :raises OSError: ESTALE, if it is not at its path any more
        """
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            message = "was deleted, renamed or replaced while it was served"
            raise OSError(errno.ESTALE, message, self.path)

    def _change(self, mode: int, offset: int, nbytes: int) -> bool:
        """fallocate(2); False if that cannot be done."""
        while _fallocate is not None and nbytes:
            if not _fallocate(self._file.fileno(), mode, offset, nbytes):
                return True
            code = ctypes.get_errno()
            if code in _CANNOT:
                break
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code), self.path)
        return not nbytes

    def extents(self, offset: int, nbytes: int) -> Iterator[tuple[int, int, bool]]:
        """What is in a range, in order and without gaps: ``(offset, length, is a hole)``.

        :raises OSError: if it cannot be told; EIO where the file has become shorter

        >>> from pathlib import Path
        >>> nbytes = Path("disk.raw").write_bytes(b"data" * 2048)
        >>> disk = RawDisk("disk.raw", read_only=True, report=print)
        >>> sum(length for offset, length, hole in disk.extents(0, 8192))
        8192
        >>> disk.close()
        """
        end = offset + nbytes
        self._check_whole(end)
        while offset < end:
            data = self._seek(offset, os.SEEK_DATA, end)
            if data > offset:
                yield offset, data - offset, True
            hole = self._seek(data, os.SEEK_HOLE, end) if data < end else end
            if hole > data:
                yield data, hole - data, False
            offset = hole

    def _seek(self, offset: int, what: int, end: int) -> int:
        """Where data, or a hole, begin; where nobody knows, all is data."""
        try:
            return min(os.lseek(self._file.fileno(), offset, what), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # there is no more data
                return end
            if error.errno in _CANNOT:
                return offset if what == os.SEEK_DATA else end
            raise

    def sync(self) -> None:
        """What was written, on the disk, and that at its path.

        :raises OSError: if that is not so; some of it may be lost, whatever a later call says

        >>> from pathlib import Path
        >>> nbytes = Path("disk.raw").write_bytes(bytes(1024))
        >>> disk = RawDisk("disk.raw", read_only=False, report=print)
        >>> disk.write(b"new", 512)
        >>> disk.sync()
        >>> disk.close()
        """
        self._check_place()
        self._check_whole(self.size)
        getattr(os, "fdatasync", os.fsync)(self._file.fileno())

    def close(self) -> None:
        """May be called twice. The locks go with it.

        >>> from pathlib import Path
        >>> nbytes = Path("disk.raw").write_bytes(bytes(1024))
        >>> disk = RawDisk("disk.raw", read_only=True, report=print)
        >>> disk.close(); disk.close()
        """
        self._file.close()
