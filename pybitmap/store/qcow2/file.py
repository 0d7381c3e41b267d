# SPDX-License-Identifier: MIT
"""The file of an image: reads, writes and syncs that do all that was asked for, or say why not.

Everything that reaches the disk goes through the four methods at the end, which are system calls
and nothing else. Tests replace them: to record what is written, and to let it fail.
"""

from __future__ import annotations

import errno
import gc
import os
import stat
from collections.abc import Sequence
from hashlib import blake2b

from ..._fork import Process
from ...errors import CorruptError, LockedError, StoreError
from ..opened import is_open_here, opened
from ..unlocked import NoLocksError, changed
from . import locks

#: Buffers that one call takes (IOV_MAX), and bytes, so that an interrupt is soon seen.
_MAX_PIECES = 1024
_MAX_BYTES = 1 << 24


class File:
    """An open and locked image.

    :param read_only: with the locks of a reader
    :param lock: see :class:`~pybitmap.store.qcow2.store.Qcow2Store`
    :raises LockedError: if another program has it open
    :raises StoreError: if it cannot be opened; offsets and sizes are in bytes everywhere
    """

    def __init__(self, path: str, *, read_only: bool, lock: bool = True) -> None:
        self.path = path
        self._process = Process()
        #: Reads without a lock: where, how many bytes, and a digest; see :meth:`check_unchanged`.
        self._seen: list[tuple[int, int, bytes]] | None = None
        flags = os.O_RDONLY if read_only else os.O_RDWR
        try:
            # A FIFO would wait for somebody to write.
            self._file = opened(path, flags | os.O_NONBLOCK)
        except IsADirectoryError:
            raise StoreError(f"{path}: neither a file nor a block device", errno.EINVAL) from None
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}", error.errno) from error
        try:
            self._fd = self._file.fileno()
            status = os.fstat(self._fd)
            mode = status.st_mode
            #: Names that it had; a block device loses its when it is pulled out.
            self._had_names = status.st_nlink if stat.S_ISREG(mode) else 0
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise StoreError(f"{path}: neither a file nor a block device", errno.EINVAL)
            if read_only and not lock:
                self._seen = []
            else:
                self._lock(read_only, lock)
        except BaseException:
            self.close()
            raise

    def _lock(self, read_only: bool, needed: bool) -> None:
        try:
            self._lock_once(read_only, needed)
            return
        except LockedError:
            locks.unlock(self._fd)
            if not is_open_here(self._file):
                raise
        gc.collect()  # of a graph that nobody has any more
        try:
            self._lock_once(read_only, needed)
        except LockedError as error:
            if not is_open_here(self._file):
                raise
            raise LockedError(f"{self.path} is open in this process already", error.errno) from None

    def _lock_once(self, read_only: bool, needed: bool) -> None:
        try:
            locks.lock(self._fd, self.path, read_only=read_only)
        except NoLocksError as error:
            if needed:
                raise
            if is_open_here(self._file):  # which needs no locks to be known
                raise LockedError(f"{self.path} is open already", error.errno) from None

    @property
    def locked(self) -> bool:
        """Was it opened so that nobody changes it meanwhile, or nobody should?"""
        return self._seen is None

    def is_written(self) -> bool:
        """Has another program it open for writing, as far as locks tell?"""
        return locks.is_written(self._fd)

    def close(self) -> None:
        """And unlock it; may be called twice."""
        if self._process.is_this() and not self._file.closed:
            locks.unlock(self._fd)  # else a child of a fork would keep them
        self._file.close()
        self._fd = -1

    def check_not_deleted(self) -> None:
        """What is written to a file that has no name any more is nowhere when it is closed.

        One that was renamed only is the same image, wherever it lies now; so QEMU has it, too.

        :raises StoreError: if it was deleted, or another was put in its place
        """
        if self._had_names and not os.fstat(self._fd).st_nlink:
            raise StoreError(
                f"{self.path} was deleted, or replaced by another file, while it was open, so "
                "nothing can be stored: bitmaps in what is there now do not have what was marked; "
                "give up (close with discard=True)",
                errno.ESTALE,
            )

    def corrupt(self, what: str) -> CorruptError:
        """The error for damage: ``what`` is a sentence about it."""
        return CorruptError(f"{self.path}: {what}")

    def size(self) -> int:
        try:
            return self._size()
        except OSError as error:
            raise self._failed("read", error) from error

    def read(self, offset: int, nbytes: int) -> bytes:
        """As many bytes as there are in the file.

        :raises StoreError: also in the child of a fork, where the file reads as empty
        """
        if not self._process.is_this():
            raise StoreError(
                f"{self.path} was opened by process {self._process.pid}: "
                f"an image cannot be used on both sides of a fork"
            )
        start, pieces = offset, []
        try:
            while nbytes > 0:
                piece = self._pread(min(nbytes, _MAX_BYTES), offset)
                if not piece:
                    break
                pieces.append(piece)
                offset += len(piece)
                nbytes -= len(piece)
        except OSError as error:
            raise self._failed("read", error) from error
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if self._seen is not None:
            self._seen.append((start, len(data), _digest(data)))
        return data

    def check_unchanged(self) -> None:
        """What was read without a lock is there still: then it was so at one moment.

        (A program that writes something else and then again the same goes unseen.)

        :raises StoreError: if not
        """
        seen, self._seen = self._seen, None
        try:
            for offset, nbytes, digest in seen or ():
                if _digest(self.read(offset, nbytes)) != digest:
                    raise changed(self.path)
        finally:
            self._seen = seen

    def read_padded(self, offset: int, nbytes: int) -> bytes:
        """That many bytes: what is beyond the end of the file is zero."""
        data = self.read(offset, nbytes)
        return data if len(data) == nbytes else data.ljust(nbytes, b"\0")

    def write(self, offset: int, *pieces: bytes | bytearray | memoryview) -> None:
        """One piece behind the other."""
        rest: list[memoryview] = [memoryview(piece) for piece in pieces if len(piece)]
        try:
            while rest:
                done = self._pwritev(_first(rest), offset)
                if not done:
                    raise OSError(errno.EIO, "nothing was written")
                offset += done
                while done:
                    if done < len(rest[0]):
                        rest[0] = rest[0][done:]
                        break
                    done -= len(rest.pop(0))
        except OSError as error:
            raise self._failed("written", error) from error

    def sync(self) -> None:
        """All that was written survives a crash of the system."""
        try:
            self._fdatasync()
        except OSError as error:
            raise self._failed("written", error) from error

    def _failed(self, what: str, error: OSError) -> StoreError:
        why = error.strerror or error
        return StoreError(f"{self.path} cannot be {what}: {why}", error.errno)

    # ---- system calls -----------------------------------------------------------------------

    def _size(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)

    def _pread(self, nbytes: int, offset: int) -> bytes:
        return os.pread(self._fd, nbytes, offset)

    def _pwritev(self, pieces: Sequence[memoryview], offset: int) -> int:
        if hasattr(os, "pwritev"):
            return os.pwritev(self._fd, pieces, offset)
        return os.pwrite(self._fd, b"".join(pieces), offset)  # PyPy 3.9

    def _fdatasync(self) -> None:
        # The size of the file is data in this sense.
        os.fdatasync(self._fd)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _first(pieces: list[memoryview]) -> list[memoryview]:
    """As much as one call is to write: at least one piece, or a part of it."""
    taken: list[memoryview] = []
    room = _MAX_BYTES
    for piece in pieces[:_MAX_PIECES]:
        taken.append(piece[:room])
        room -= len(taken[-1])
        if not room:
            break
    return taken
