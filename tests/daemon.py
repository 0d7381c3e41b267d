# SPDX-License-Identifier: MIT
"""A real qemu-storage-daemon to compare with: raw nodes, QMP over a socket, guest writes by NBD.

::

    with Daemon({"a": 1 << 20, "b": 3 << 20}) as daemon:
        daemon.execute({"execute": "block-dirty-bitmap-add",
                        "arguments": {"node": "a", "name": "b0"}})      # {"return": {}}
        daemon.write("a", [(0, 512), (70000, 1)])

Everything is in one temporary folder. Writes are given to one running `qemu-io` per node, so one
costs no start of a program. Programs that end with the block, by an exception too, or with Python.
Not for several threads.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from peers import peer

Json = dict[str, Any]

START_SECONDS = 20.0
REPLY_SECONDS = 30.0
PROMPT = b"qemu-io> "


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
    # It dies with Python whatever happens, even by SIGKILL.
    setpriv = shutil.which("setpriv")
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
    """See the head of this file; `nodes` has the sizes in bytes, multiples of 512.

    Skips the test if QEMU's programs are not there.
    """

    def __init__(self, nodes: Mapping[str, int]) -> None:
        assert not any(size % 512 for size in nodes.values()), "QEMU would round them up"
        self.nodes = dict(nodes)
        self._program = peer("qemu-storage-daemon", "qemu-system-common")
        self._qemu_io = peer("qemu-io", "qemu-utils")
        # Not pytest's folder: the path of a socket has at most 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="qsd-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._writers: dict[str, subprocess.Popen[bytes]] = {}
        self._client: QmpClient | None = None
        self._log = (self._folder / "log").open("w+b")
        try:
            for node, size in self.nodes.items():
                with (self._folder / f"{node}.raw").open("wb") as image:
                    image.truncate(size)
            self.start()
        except BaseException:
            self.close()
            raise

    # ---- life -------------------------------------------------------------------------------

    def start(self) -> None:
        folder = self._folder
        arguments = [
            self._program,
            *("--chardev", f"socket,id=qmp,path={folder}/qmp,server=on,wait=off"),
            *("--monitor", "chardev=qmp"),
            *("--nbd-server", f"addr.type=unix,addr.path={folder}/nbd"),
        ]
        for node in self.nodes:
            path = folder / f"{node}.raw"
            arguments += ["--blockdev", f"driver=file,node-name={node},filename={path}"]
            arguments += ["--export", f"type=nbd,id=guest-{node},node-name={node},writable=on"]
        for name in ("qmp", "nbd"):
            with contextlib.suppress(FileNotFoundError):
                (folder / name).unlink()
        self._process = _start(arguments, self._log)
        try:
            self._client = QmpClient(folder / "qmp", self._process)
        except OSError as error:
            raise AssertionError(f"qemu-storage-daemon does not start: {self.log()}") from error

    def stop(self) -> int | None:
        """By force if need be; may be called twice. Its return code, negative for a signal."""
        for writer in self._writers.values():
            _end(writer)
        self._writers.clear()
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._process is None:
            return None
        process, self._process = self._process, None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.terminate()
            process.wait(REPLY_SECONDS)
        _end(process)
        return process.returncode

    def restart(self) -> None:
        """The same nodes, without bitmaps."""
        self.stop()
        self.start()

    def close(self) -> None:
        self.stop()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self) -> str:
        """What the programs have complained of."""
        return (self._folder / "log").read_text(errors="replace")

    def wait_for_crash(self) -> int:
        """The return code of a daemon that is about to die."""
        assert self._process is not None
        return self._process.wait(REPLY_SECONDS)

    # ---- commands ---------------------------------------------------------------------------

    @property
    def version(self) -> tuple[int, int]:
        assert self._client is not None
        version = self._client.greeting["QMP"]["version"]["qemu"]
        return version["major"], version["minor"]

    def execute(self, command: Json) -> Json:
        """One QMP command; see `QmpClient.execute`."""
        assert self._client is not None
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
            writable=True,
            bitmaps=[{"node": node, "name": bitmap}],
        )

    def release(self, node: str) -> None:
        """Take a `hold` back."""
        self.must("block-export-del", id=f"hold-{node}", mode="hard")
        gone = f"hold-{node}"
        self._wait(lambda: gone not in [each["id"] for each in self.must("query-block-exports")])

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

    def remove_all_bitmaps(self) -> None:
        for job in self.must("query-jobs"):
            self.thaw(job["id"][len("freeze-") :], success=False)
        for export in self.must("query-block-exports"):
            if export["id"].startswith("hold-"):
                self.release(export["node-name"])
        for node in self.must("query-named-block-nodes"):
            for bitmap in node.get("dirty-bitmaps", []):
                self.must("block-dirty-bitmap-remove", node=node["node-name"], name=bitmap["name"])

    # ---- guest writes -----------------------------------------------------------------------

    def write(self, node: str, writes: Iterable[tuple[int, int]]) -> None:
        """Write at these (offset, nbytes), one after the other; returns when all are done."""
        writer = self._writers.get(node)
        if writer is None:
            url = f"nbd+unix:///{node}?socket={self._folder}/nbd"
            arguments = [self._qemu_io, "-f", "raw", "--cache", "writeback", url]
            writer = self._writers[node] = _start(arguments, self._log, pipes=True)
            self._until_prompt(writer)
        assert writer.stdin is not None
        for offset, nbytes in writes:
            writer.stdin.write(f"write -q {offset} {nbytes}\n".encode())
            writer.stdin.flush()
            said = self._until_prompt(writer)
            assert not said, (node, offset, nbytes, said)

    def _until_prompt(self, writer: subprocess.Popen[bytes]) -> bytes:
        assert writer.stdout is not None
        said = b""
        while not said.endswith(PROMPT):
            byte = writer.stdout.read(1)
            assert byte, f"qemu-io has ended: {said!r} {self.log()}"
            said += byte
        return said[: -len(PROMPT)]
