# SPDX-License-Identifier: MIT
"""nbdkit with our plugin for tests, its clients, and QMP beside them."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from commands import heed_signals
from daemon import QmpClient
from peers import lacking, peer

ROOT = Path(__file__).resolve().parents[2]
STARTER = [sys.executable, "-m", "pybitmap.integrations.nbdkit"]
WRITER = Path(__file__).with_name("nbd_writer.py")

_OWN_ABORT = "raw_send_socket: Assertion `sock >= 0' failed"

#: Debian's, which has libnbd's module; a virtual environment has it not.
SYSTEM_PYTHON = "/usr/bin/python3"


def need_nbdkit() -> None:
    """Skips where it, or its plugin, is missing, or its Python is another than ours."""
    found = _dump_plugin(peer("nbdkit", "nbdkit"))
    if found is None:
        peer("nbdkit-plugin-python", "nbdkit-plugin-python")  # no program: says which package
    ours = "{}.{}.".format(*sys.version_info)
    if sys.implementation.name != "cpython" or not str(found).startswith(ours):
        lacking(f"nbdkit's Python is {found}, not the one that runs the tests")


@lru_cache
def _dump_plugin(nbdkit: str) -> str | None:
    done = subprocess.run([nbdkit, "--dump-plugin", "python"], capture_output=True, text=True)
    found = [line[15:] for line in done.stdout.splitlines() if line.startswith("python_version=")]
    return found[0] if found else None


def need_libnbd() -> None:
    """Skips where the system's Python has no libnbd."""
    done = subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True)
    if done.returncode:
        peer("python3-libnbd", "python3-libnbd")  # no program: says which package


def need_same_python() -> None:
    """Skips where the system's Python cannot load what this one runs."""
    code = "import sys; print(sys.implementation.name, *sys.version_info[:2])"
    theirs = subprocess.run([SYSTEM_PYTHON, "-c", code], capture_output=True, text=True).stdout
    ours = (sys.implementation.name, *map(str, sys.version_info[:2]))
    if tuple(theirs.split()) != ours:
        lacking(f"the system's Python is {theirs.strip()}, not the one that runs the tests")


def start(*words: str | Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the starter to its end."""
    command = [*STARTER, *map(str, words), *(["--", *options] if options else [])]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def greets(process: subprocess.Popen[bytes], path: Path) -> bool:
    """Waits until an NBD server does; False if it ends instead."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(str(path))
            if sock.recv(8) == b"NBDMAGIC":
                return True
        time.sleep(0.01)
    return False


class Server:
    """nbdkit serving ``folder/disk.raw``, with QMP; it accepts connections."""

    def __init__(self, folder: Path, *words: str | Path) -> None:
        self.socket = folder / "nbd.sock"
        self.qmp = folder / "qmp.sock"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        places: list[str | Path] = [folder / "disk.raw", "--store", folder / "store"]
        places += ["--socket", self.socket, "--qmp", self.qmp]
        self.process = subprocess.Popen(
            [*STARTER, *map(str, [*places, *words])],
            stderr=subprocess.PIPE,
            preexec_fn=heed_signals,
        )
        self.errors = ""
        if not greets(self.process, self.socket):
            self.kill()
            raise AssertionError(f"nbdkit does not serve: {self.errors}")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        _, errors = self.process.communicate(timeout=60)
        self.errors += (errors or b"").decode()
        code = self.process.returncode
        # nbdkit 1.32 may abort when a client with several requests under way is killed. For the
        # bitmaps it is a kill, so what tests look at afterwards has to be there all the same.
        return 0 if code == -signal.SIGABRT and _OWN_ABORT in self.errors else code

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            self.wait()


@contextmanager
def serving(folder: Path, *words: str | Path) -> Iterator[Server]:
    """Killed in the end, unless it has ended."""
    server = Server(folder, *words)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def writing(uri: str, *, writers: int = 2, end: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that write, zero and discard below an offset until the server, or the block, ends;
    the block begins when each has changed something.
    """
    processes = []
    try:
        for _ in range(writers):
            seed = str(random.randrange(1 << 30))
            command = [SYSTEM_PYTHON, str(WRITER), uri, seed, str(end)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
        yield processes
    finally:
        for process in processes:
            process.terminate()
            process.communicate(timeout=60)


class Qmp(QmpClient):
    """A client of a server, to be closed."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.qmp, server.process)

    def __call__(self, command: str, **arguments: Any) -> Any:
        reply = self.execute({"execute": command, "arguments": arguments})
        assert "return" in reply, (command, arguments, reply)
        return reply["return"]

    def areas(self, node: str, name: str) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        start: int | None = 0
        while start is not None:
            page = self("__org.pybitmap_areas", node=node, name=name, start=start, limit=100)
            found += [(area["offset"], area["length"]) for area in page["areas"]]
            start = page.get("next")
        return found


def copy_areas(disk: Path, copy: Path, areas: list[tuple[int, int]]) -> None:
    with open(disk, "rb") as source, open(copy, "r+b") as target:
        for offset, nbytes in areas:
            os.pwrite(target.fileno(), os.pread(source.fileno(), nbytes, offset), offset)


def differing(disk: Path, copy: Path, block: int) -> list[int]:
    """The offsets of blocks that are not the same."""
    ours, theirs = disk.read_bytes(), copy.read_bytes()
    assert len(ours) == len(theirs)
    offsets = range(0, len(ours), block)
    return [at for at in offsets if ours[at : at + block] != theirs[at : at + block]]
