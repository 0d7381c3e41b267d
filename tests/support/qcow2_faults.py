# SPDX-License-Identifier: MIT
"""Disks of qcow2 images that fail."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from pybitmap.store.qcow2.file import File


class Disk:
    """Opens files whose n-th system call fails, in a way; and all writes behind it, if asked for.

    A short write does a part of it first, as a disk that gets full does. One that drops what it
    could not sync, as Linux does, fails at syncs only, and what was written since the last is gone.
    """

    def __init__(
        self,
        code: int = errno.EIO,
        *,
        short: bool = False,
        lasting: bool = False,
        drops: bool = False,
    ) -> None:
        self.code, self.short, self.lasting, self.drops = code, short, lasting, drops
        #: What was where before the writes since the last sync.
        self.undo: list[tuple[int, bytes]] = []
        self.fail_at = -1
        self.no_syncs = False
        self.calls = 0
        self.failed = False

    def fails(self) -> bool:
        self.calls += 1
        now = self.calls == self.fail_at or (self.lasting and self.failed)
        self.failed |= now
        return now

    def error(self) -> OSError:
        return OSError(self.code, "as the test wants it")

    def __call__(self, path: str, *, read_only: bool, lock: bool) -> File:
        disk = self

        class Failing(File):
            def _pread(self, nbytes: int, offset: int) -> bytes:
                if disk.drops:
                    return super()._pread(nbytes, offset)
                if disk.code == errno.EIO and not disk.short and disk.fails():
                    raise disk.error()
                return super()._pread(nbytes, offset)

            def _pwritev(self, pieces: Sequence[memoryview], offset: int) -> int:
                if disk.drops:
                    # To the last byte, also where the file was shorter.
                    nbytes = sum(map(len, pieces))
                    disk.undo.append((offset, super()._pread(nbytes, offset).ljust(nbytes, b"\0")))
                    return super()._pwritev(pieces, offset)
                if disk.fails():
                    if disk.short and sum(map(len, pieces)) > 100:
                        return super()._pwritev([pieces[0][:100]], offset)
                    raise disk.error()
                if disk.short and disk.calls == disk.fail_at + 1:
                    raise disk.error()
                return super()._pwritev(pieces, offset)

            def _fdatasync(self) -> None:
                if disk.no_syncs:
                    raise disk.error()
                if disk.drops:
                    undo, disk.undo = disk.undo, []
                    if disk.fails():
                        for offset, data in reversed(undo):
                            super()._pwritev([memoryview(data)], offset)
                        raise disk.error()
                    return
                if disk.code == errno.EIO and not disk.short and disk.fails():
                    raise disk.error()

        return Failing(path, read_only=read_only, lock=lock)
