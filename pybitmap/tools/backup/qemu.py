# SPDX-License-Identifier: MIT
"""QEMU's programs, run: to their end, or to ours.

A program that is started here gets no signals of the terminal, is killed when the call that started
it is left, and, where ``setpriv`` is there, when this process is killed. Files that it makes are
for our user alone, whatever the umask. What they print is of no interest but for progress; what
they complain about is in the error.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO

from ...errors import StoreError, UnsupportedError
from ...store.base import Progress

_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")


class ProgramError(StoreError):
    """A program of QEMU's has not done what it should; the text is its own."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code  #: exit code

    def __reduce__(self) -> tuple[type[ProgramError], tuple[str, int]]:
        return type(self), (str(self), self.code)


def program(name: str) -> str:
    """Where it is.

    :raises UnsupportedError: if it is not installed
    """
    path = shutil.which(name)
    if path is None:
        raise UnsupportedError(
            f"{name} is not installed (Debian: qemu-utils; Fedora: qemu-img; macOS: brew install "
            "qemu), and reads the images"
        )
    return path


def _dying(arguments: Sequence[str]) -> list[str]:
    """The command that runs a program so that it ends when this process is killed, where it can."""
    command = [program(arguments[0]), *arguments[1:]]
    setpriv = shutil.which("setpriv")
    if setpriv and _knows_deaths(setpriv):
        command = [setpriv, "--pdeathsig", "KILL", "--", *command]
    return command


@cache
def _knows_deaths(setpriv: str) -> bool:
    """Not that of util-linux before 2.33, nor of busybox."""
    done = subprocess.run([setpriv, "--pdeathsig", "KILL", "true"], capture_output=True)
    return done.returncode == 0


@contextmanager
def started(
    arguments: Sequence[str | os.PathLike[str]], *, errors: IO[bytes], folder: Path, stdin: int
) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a folder, killed when the block is left."""
    command = _dying([os.fspath(each) for each in arguments])
    process = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=errors,
        cwd=folder,
        start_new_session=True,
        umask=0o077,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def run(
    *arguments: str | os.PathLike[str],
    folder: Path,
    good: Sequence[int] = (0,),
    progress: Progress | None = None,
    what: str = "",
) -> tuple[int, bytes]:
    """Its exit code, and what it prints.

    :param good: exit codes that are no error
    :param progress: hears what a program says of it that has a ``-p``, in hundredths of percents,
        as ``what``
    :raises ProgramError: with the text of its error
    :raises UnsupportedError: if it is not installed
    """
    with (
        tempfile.TemporaryFile() as errors,
        started(arguments, errors=errors, folder=folder, stdin=subprocess.DEVNULL) as process,
    ):
        assert process.stdout is not None
        pieces = []
        while True:
            piece = os.read(process.stdout.fileno(), 1 << 20)
            if not piece:
                break
            pieces.append(piece)
            percents = _PERCENT.findall(piece)
            if percents and progress is not None:
                progress(what, int(100 * float(percents[-1])), 10000)
        code = process.wait()
        if code not in good:
            raise _failed(arguments, code, errors)
    return code, b"".join(pieces)


def _failed(
    arguments: Sequence[str | os.PathLike[str]], code: int, errors: IO[bytes]
) -> ProgramError:
    errors.seek(0)
    said = errors.read(1 << 16).decode("utf-8", "replace").strip().splitlines()
    words = "; ".join(said[-3:]) or (
        f"it was killed by signal {-code}" if code < 0 else f"exit code {code}"
    )
    name = os.path.basename(os.fspath(arguments[0]))
    return ProgramError(words if words.startswith(f"{name}:") else f"{name}: {words}", code)


def folder_of_socket() -> tempfile.TemporaryDirectory[str]:
    """A folder for a socket, of whose path systems take a hundred bytes, which are too few for some
    users' temporary files."""
    usual = tempfile.gettempdir()
    return tempfile.TemporaryDirectory(dir=usual if len(os.fsencode(usual)) < 80 else "/tmp")


# ---- reading --------------------------------------------------------------------------------

_NBDMAGIC, _IHAVEOPT = 0x4E42444D41474943, 0x49484156454F5054
_OPTION_REPLY = 0x3E889045565A9
#: Requests that are under way at a time, at most; QEMU's server takes 16.
_AHEAD = 8
_REQUEST, _REPLY = 0x25609513, 0x67446698
_OPT_GO, _REP_ACK, _REP_INFO, _INFO_EXPORT = 7, 1, 3, 0


class Content:
    """What a disk holds, as QEMU reads it from an image: by ``qemu-nbd``, over NBD.

    The server is started with a connection that is there already, and ends with it, so nothing is
    left over of it whenever we are killed. `The protocol
    <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>`_: "Newstyle negotiation"
    with NBD_OPT_GO, then simple replies.

    ``with`` closes it.

    :param image: as QEMU's programs are to open it, read only
    :raises StoreError: if it cannot be
    """

    #: Bytes that one request may ask for.
    MOST = 1 << 20

    def __init__(self, image: str, *, folder: Path, options: Sequence[str] = ()) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._arguments = ["qemu-nbd", "--read-only", *options, image]
        self._socket = socket.socket(socket.AF_UNIX)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start(folder)
            self.size = self._negotiate()  #: bytes
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Content:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """May be called twice."""
        self._socket.close()
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        self._errors.close()

    def _start(self, folder: Path) -> None:
        # systemd's way to hand over a socket: descriptor 3, and the process that it is for.
        shell = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 0</dev/null'
        command = _dying(self._arguments)
        with folder_of_socket() as place, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{place}/s")
            listener.listen(1)
            self._socket.connect(f"{place}/s")
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", shell, "sh", *command],
                stdin=listener.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                cwd=folder,
                start_new_session=True,
            )

    def _negotiate(self) -> int:
        magic, have_options, flags = struct.unpack(">QQH", self._take(18))
        if (magic, have_options) != (_NBDMAGIC, _IHAVEOPT) or not flags & 1:
            raise self._odd()
        data = struct.pack(">IH", 0, 0)  # the export without a name, no further information
        self._give(struct.pack(">IQII", 1, _IHAVEOPT, _OPT_GO, len(data)) + data)
        size = -1
        while True:
            magic, option, kind, nbytes = struct.unpack(">QIII", self._take(20))
            if magic != _OPTION_REPLY or option != _OPT_GO or nbytes > 1 << 16:
                raise self._odd()
            reply = self._take(nbytes)
            if kind == _REP_INFO and reply[:2] == bytes([0, _INFO_EXPORT]):
                _, size, _ = struct.unpack(">HQH", reply)
            elif kind == _REP_ACK and size >= 0:
                return size
            elif kind != _REP_INFO:
                raise self._odd()

    def read(self, places: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """What is there, place by place; some are asked for ahead, while others are worked on.

        :param places: offset and bytes, MOST at most
        :raises StoreError: if something cannot be read
        """
        asked: dict[int, tuple[int, int]] = {}  # by the number of the request
        came: dict[int, bytes] = {}  # what has come before its turn
        waiting = enumerate(places)
        while True:
            for number, (offset, nbytes) in islice(waiting, _AHEAD - len(asked)):
                self._give(struct.pack(">IHHQQI", _REQUEST, 0, 0, number, offset, nbytes))
                asked[number] = offset, nbytes
            if not asked:
                return
            first = next(iter(asked))
            while first not in came:
                magic, error, number = struct.unpack(">IIQ", self._take(16))
                if magic != _REPLY or number not in asked or number in came:
                    raise self._odd()
                offset, nbytes = asked[number]
                if error:
                    raise StoreError(
                        f"{self._arguments[0]}: {nbytes} bytes at {offset} cannot be read: "
                        f"{os.strerror(error)}",
                        error,
                    )
                came[number] = self._take(nbytes)
            del asked[first]
            yield came.pop(first)

    def _give(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._ended() from error

    def _take(self, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        left = memoryview(data)
        while left:
            try:
                got = self._socket.recv_into(left)
            except OSError as error:
                raise self._ended() from error
            if not got:
                raise self._ended()
            left = left[got:]
        return bytes(data)

    def _ended(self) -> ProgramError:
        assert self._process is not None
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return _failed(self._arguments, code, self._errors)

    def _odd(self) -> StoreError:
        return StoreError(f"{self._arguments[0]} does not speak NBD as it should")
