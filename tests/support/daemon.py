# SPDX-License-Identifier: MIT
"""A real qemu-storage-daemon to compare with: QMP over a socket, guest writes by NBD.

::

    with Daemon({"a": Disk(1 << 20), "q": Disk(1 << 20, cluster_size=512)}) as daemon:
        daemon.execute({"execute": "block-dirty-bitmap-add",
                        "arguments": {"node": "q", "name": "b0", "persistent": True}})
        daemon.write("q", [(0, 512), (70000, 1)])
        daemon.reopen("q")                # b0 is stored, and loaded again
        daemon.kill()                     # b0 is inconsistent

Everything is in one temporary folder, the images too. Writes are given to one running `qemu-io` per
node, so one costs no start of a program. Programs end with the block, by an exception too, or with
Python. Not for several threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from peers import peer

Json = dict[str, Any]

START_SECONDS = 20.0
REPLY_SECONDS = 30.0
PROMPT = b"qemu-io> "


@dataclass(frozen=True)
class Disk:
    """What a node is: an image of ``size`` bytes, qcow2 if it has a cluster size, else raw."""

    size: int
    cluster_size: int | None = None
    version: int = 3  # of qcow2

    @property
    def format(self) -> str:
        return "raw" if self.cluster_size is None else "qcow2"

    def create(self, path: Path) -> None:
        """A new image, empty; over one that is there."""
        if self.cluster_size is None:
            assert self.size % 512 == 0, "QEMU would round it up"
            with path.open("wb") as image:
                image.truncate(self.size)
        else:
            path.write_bytes(_created(self))


@cache
def _created(disk: Disk) -> bytes:
    """What qemu-img makes, so that not every new image starts a program."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image")
        compat = {2: "0.10", 3: "1.1"}[disk.version]
        options = f"cluster_size={disk.cluster_size},compat={compat}"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, str(path), str(disk.size))
        return path.read_bytes()


def qemu_img(*arguments: str) -> str:
    """Run it; what it prints.

    :raises AssertionError: if it fails
    """
    ran = subprocess.run(
        [peer("qemu-img", "qemu-utils"), *arguments], capture_output=True, text=True
    )
    assert ran.returncode == 0, f"{arguments}: {ran.stdout}{ran.stderr}"
    return ran.stdout


def check_images(paths: Iterable[Path], *, leaks: bool = False) -> None:
    """`qemu-img check` finds neither errors nor, unless allowed, leaks; these are then repaired.

    All at once, since most of the time goes to the starts.
    """
    program = peer("qemu-img", "qemu-utils")
    running = [
        (
            path,
            subprocess.Popen(
                [program, "check", path],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ),
        )
        for path in paths
    ]
    for path, process in running:
        said, _ = process.communicate()
        leaking = process.returncode == 3
        assert process.returncode == 0 or (leaks and leaking), (path, said)
        if leaking:
            qemu_img("check", "-q", "-r", "leaks", str(path))


class Crashed(Exception):
    """The daemon closed the connection instead of answering; `restart` it."""


class QmpClient:
    """One command at a time, events kept in `events`."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.events: list[Json] = []
        self._socket = _connect(path, process)
        self._socket.settimeout(REPLY_SECONDS)
        self._file = self._socket.makefile("rb")
        self.greeting = self._receive()
        self.execute({"execute": "qmp_capabilities"})

    def execute(self, command: Json) -> Json:
        """The reply, errors too, as QEMU has it.

        :raises Crashed: if there is none
        """
        try:
            self._socket.sendall(json.dumps(command).encode() + b"\n")
            while True:
                message = self._receive()
                if "event" not in message:
                    return message
                self.events.append(message)
        except ConnectionError as error:
            raise Crashed(str(command)) from error

    def _receive(self) -> Json:
        line = self._file.readline()
        if not line:
            raise ConnectionResetError("end of the QMP stream")
        message: Json = json.loads(line)
        return message

    @property
    def version(self) -> tuple[int, int]:
        """Of QEMU: the major and the minor one."""
        version = self.greeting["QMP"]["version"]["qemu"]
        return version["major"], version["minor"]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def _connect(path: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    end = time.monotonic() + START_SECONDS
    while True:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.01)
        except BaseException:
            client.close()
            raise
        else:
            return client


def _start(arguments: list[str], log: IO[bytes], *, pipes: bool = False) -> subprocess.Popen[bytes]:
    # It dies with Python whatever happens, even by SIGKILL: by the end of its input, or with the
    # thread that starts it, which is Python's only if that is the main one.
    setpriv = None if pipes else shutil.which("setpriv")
    with_python = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
    return subprocess.Popen(
        [*with_python, *arguments],
        stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
        stdout=subprocess.PIPE if pipes else log,
        stderr=log,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    if process.poll() is None:
        process.kill()
    process.wait()


class Daemon:
    """See the head of this file. Skips the test if QEMU's programs are not there."""

    def __init__(self, nodes: Mapping[str, Disk]) -> None:
        self.nodes = dict(nodes)
        self._program = peer("qemu-storage-daemon", "qemu-system-common")
        self._qemu_io = peer("qemu-io", "qemu-utils")
        # In memory if possible, since each change of an image is synced. Not pytest's folder: the
        # path of a socket has at most 107 bytes.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="qsd-", dir=memory))
        #: By node; may be set to others between `close_node` and `open_node`.
        self.images: dict[str, Path] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._writers: dict[str, subprocess.Popen[bytes]] = {}
        self._client: QmpClient | None = None
        self._read_only: set[str] = set()
        self._log = (self.folder / "log").open("w+b")
        try:
            self._new_images()
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def monitor(self) -> Path:
        """The socket of a monitor beside the one that is used here."""
        return self.folder / "monitor"

    # ---- life -------------------------------------------------------------------------------

    def start(self, read_only: Collection[str] = ()) -> None:
        """Start it, with all nodes open.

        :param read_only: the nodes that are so
        """
        for name in ("qmp", "nbd", "monitor"):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()
        arguments = [
            self._program,
            *("--chardev", f"socket,id=second,path={self.monitor},server=on,wait=off"),
            *("--monitor", "chardev=second"),
            # wait=on: somebody who connects while the monitor is set up may be greeted twice, and
            # each later reply be taken for the next command's (QEMU 7.2).
            *("--chardev", f"socket,id=qmp,path={self.folder}/qmp,server=on,wait=on"),
            *("--monitor", "chardev=qmp"),
            *("--nbd-server", f"addr.type=unix,addr.path={self.folder}/nbd"),
        ]
        self._process = _start(arguments, self._log)
        try:
            self._client = QmpClient(self.folder / "qmp", self._process)
        except OSError as error:
            raise AssertionError(f"qemu-storage-daemon does not start: {self.log()}") from error
        for node in self.nodes:
            self.open_node(node, read_only=node in read_only)

    def stop(self) -> int | None:
        """Orderly, by force if need be; may be called twice.

        :returns: its return code, negative for a signal; None if it does not run
        """
        return self._end(kill=False)

    def _end(self, *, kill: bool) -> int | None:
        for node in list(self._writers):
            self._end_writer(node)
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._process is None:
            return None
        process, self._process = self._process, None
        if not kill:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.terminate()
                process.wait(REPLY_SECONDS)
        _end(process)
        return process.returncode

    def restart(self, read_only: Collection[str] = ()) -> None:
        """The same images, and what bitmaps are stored in them."""
        self.stop()
        self.start(read_only)

    def kill(self) -> None:
        """It ends at once; `start` it again."""
        self._end(kill=True)

    def close(self) -> None:
        self.stop()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self) -> str:
        """What the programs have complained of."""
        return (self.folder / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def wait_for_crash(self) -> int:
        """The return code of a daemon that is about to die."""
        assert self._process is not None
        return self._process.wait(REPLY_SECONDS)

    # ---- nodes ------------------------------------------------------------------------------

    def open_node(self, node: str, *, read_only: bool = False) -> None:
        """With what is stored in its image."""
        image: Json = {"driver": "file", "filename": str(self.images[node])}
        if self.nodes[node].format == "qcow2":
            image = {"driver": "qcow2", "file": image}
        self.must("blockdev-add", **image, node_name=node, read_only=read_only)
        self._read_only.discard(node)
        if read_only:
            self._read_only.add(node)
        self.must(
            "block-export-add",
            type="nbd",
            id=f"guest-{node}",
            node_name=node,
            name=node,
            writable=not read_only,
        )

    def close_node(self, node: str) -> None:
        """Its persistent bitmaps are stored."""
        self._end_writer(node)
        self._end_export(f"guest-{node}")
        self.must("blockdev-del", node_name=node)

    def reopen(self, node: str, *, read_only: bool = False) -> None:
        self.close_node(node)
        self.open_node(node, read_only=read_only)

    def renew(self) -> None:
        """New, empty images instead of all there are, whatever has happened before."""
        try:
            for job in self.must("query-jobs"):
                self.thaw(job["id"][len("freeze-") :], success=False)
            for export in self.must("query-block-exports"):
                if export["id"].startswith("hold-"):
                    self.release(export["node-name"])
            for node in self.nodes:
                self.close_node(node)
            self._new_images()
            for node in self.nodes:
                self.open_node(node)
        except (AssertionError, Crashed):
            self.kill()
            self._new_images()
            self.start()

    def _new_images(self) -> None:
        for node, disk in self.nodes.items():
            self.images[node] = self.folder / f"{node}.{disk.format}"
            disk.create(self.images[node])

    # ---- commands ---------------------------------------------------------------------------

    @property
    def version(self) -> tuple[int, int]:
        assert self._client is not None
        return self._client.version

    def execute(self, command: Json) -> Json:
        """One QMP command; see `QmpClient.execute`."""
        if self._client is None:
            raise Crashed("it does not run")
        return self._client.execute(command)

    def must(self, name: str, /, **arguments: Any) -> Any:
        """What a command that has to succeed returns; `_` in a name stands for `-`."""
        renamed = {key.replace("_", "-"): value for key, value in arguments.items()}
        reply = self.execute({"execute": name, "arguments": renamed})
        assert "return" in reply, (name, arguments, reply)
        return reply["return"]

    def hold(self, node: str, bitmap: str) -> None:
        """Make a bitmap busy, by exporting it."""
        self.must(
            "block-export-add",
            type="nbd",
            id=f"hold-{node}",
            node_name=node,
            name=f"hold-{node}",
            writable=node not in self._read_only,
            bitmaps=[{"node": node, "name": bitmap}],
        )

    def release(self, node: str) -> None:
        """Take a `hold` back."""
        self._end_export(f"hold-{node}")

    def _end_export(self, name: str) -> None:
        self.must("block-export-del", id=name, mode="hard")
        self._wait(lambda: name not in [each["id"] for each in self.must("query-block-exports")])

    def freeze(self, node: str, bitmap: str, target: str) -> None:
        """Let a backup to another node of the size read the bitmap; it waits to be finished."""
        self.must(
            "blockdev-backup",
            job_id=f"freeze-{node}",
            device=node,
            target=target,
            sync="incremental",
            bitmap=bitmap,
            auto_finalize=False,
        )
        self._wait(lambda: [each["status"] for each in self.must("query-jobs")] == ["pending"])

    def thaw(self, node: str, success: bool) -> None:
        """The backup succeeds (abdicate) or fails (reclaim)."""
        self.must("job-finalize" if success else "job-cancel", id=f"freeze-{node}")
        self._wait(lambda: not self.must("query-jobs"))

    def _wait(self, until: Callable[[], bool]) -> None:
        end = time.monotonic() + REPLY_SECONDS
        while not until():
            assert time.monotonic() < end, "the daemon does not do it"
            time.sleep(0.001)

    # ---- guest writes -----------------------------------------------------------------------

    def write(self, node: str, writes: Iterable[tuple[int, int]]) -> None:
        """Write at these (offset, nbytes), one after the other; returns when all are done."""
        writer = self._writers.get(node)
        if writer is None:
            url = f"nbd+unix:///{node}?socket={self.folder}/nbd"
            arguments = [self._qemu_io, "-f", "raw", "--cache", "writeback", url]
            writer = self._writers[node] = _start(arguments, self._log, pipes=True)
            self._until_prompt(writer)
        assert writer.stdin is not None
        for offset, nbytes in writes:
            writer.stdin.write(f"write -q {offset} {nbytes}\n".encode())
            writer.stdin.flush()
            said = self._until_prompt(writer)
            assert not said, (node, offset, nbytes, said)

    def _end_writer(self, node: str) -> None:
        writer = self._writers.pop(node, None)
        if writer is not None:
            _end(writer)

    def _until_prompt(self, writer: subprocess.Popen[bytes]) -> bytes:
        assert writer.stdout is not None
        said = b""
        while not said.endswith(PROMPT):
            byte = writer.stdout.read(1)
            assert byte, f"qemu-io has ended: {said!r} {self.log()}"
            said += byte
        return said[: -len(PROMPT)]
