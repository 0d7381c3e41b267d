# SPDX-License-Identifier: MIT
"""What tests of trackers of memory need."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Callable

import peers

import pybitmap
from pybitmap import HBitmap, UnsupportedError
from pybitmap.trackers import MemoryTracker

PAGE = mmap.PAGESIZE
PACKAGE = os.path.dirname(pybitmap.__file__)

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
if sys.platform == "linux":
    libc.mremap.restype = ctypes.c_void_p
PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MAP_FIXED = 0x10


def need_tracker() -> None:
    """Skips the test where memory cannot be tracked."""
    ram = mmap.mmap(-1, PAGE)
    try:
        MemoryTracker(ram).close()
    except UnsupportedError as error:
        peers.lacking(str(error))


def pages(dirty: HBitmap) -> list[int]:
    """The numbers of the pages that are dirty."""
    return [start // PAGE for start in dirty]


def private(npages: int) -> mmap.mmap:
    return mmap.mmap(-1, npages * PAGE, flags=PRIVATE_ANONYMOUS)


def address_of(memory: Any) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def mapped(npages: int, at: int = 0) -> int:
    """The address of pages that libc mapped."""
    flags = PRIVATE_ANONYMOUS | (MAP_FIXED if at else 0)
    address = libc.mmap(
        ctypes.c_void_p(at),
        ctypes.c_size_t(npages * PAGE),
        mmap.PROT_READ | mmap.PROT_WRITE,
        flags,
        -1,
        ctypes.c_long(0),
    )
    assert isinstance(address, int)
    assert address != ctypes.c_void_p(-1).value
    return address


def unmap(address: int, npages: int) -> None:
    assert libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(npages * PAGE)) == 0


def advise(address: int, npages: int, advice: int) -> None:
    done = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(npages * PAGE), advice)
    assert done == 0, os.strerror(ctypes.get_errno())


def poke(address: int, value: int = 1) -> None:
    ctypes.memset(address, value, 1)


class Interruption(BaseException):
    """As KeyboardInterrupt."""


@contextmanager
def interrupted(at: int) -> Iterator[list[str]]:
    """Raises at the at-th line of the package that is run, once; gives where that was."""
    left, where = at, list[str]()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            if left == 0 and not where:
                where.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                raise Interruption
            left -= 1
        return trace

    sys.settrace(trace)
    try:
        yield where
    finally:
        sys.settrace(None)


class CalledAt:
    """Calls a function at the n-th line of the package, as a signal handler would be."""

    def __init__(self, at: int, function: Callable[[], None]) -> None:
        self.left, self.function, self.called = at, function, False

    def __enter__(self) -> None:
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE) or self.called:
            return None
        if event == "line":
            if self.left == 0:
                self.called = True
                sys.settrace(None)
                self.function()
                return None
            self.left -= 1
        return self._trace


def in_child(function: Any) -> None:
    """Runs it in the child of a fork, which must come to its end."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def descriptors() -> list[str]:
    """What this process has open that a tracker would have."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # that of listdir
            continue
        if "userfaultfd" in target or target.endswith("/pagemap"):
            found.append(target)
    return found
