# SPDX-License-Identifier: MIT
"""A real machine, or a storage daemon, to be backed up while it is written to.

::

    with Machine(folder, {"a": folder / "a.qcow2", "b": folder / "b.raw"}) as machine:
        machine.write("a", "write -P 7 0 64k")          # as its guest would
        backup(["a", "b"], to, qmp=machine.qmp)
        machine.kill()

A machine is stopped from the begin (``-S``): its writers are clients of writable NBD exports. It
has two monitors, one for whoever makes backups, and one for the test.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from daemon import Json, QmpClient, qemu_img
from peers import peer

_numbers = itertools.count()


class Machine:
    """See the head of this file; ``with`` ends it. Skips the test if QEMU's programs are not there.

    :param disks: by the name of their node
    :param system: a qemu-system-x86_64; else a qemu-storage-daemon, which starts faster
    :param nbd: has exports to be written to; sizes cannot change while they are there
    :param incoming: waits to be migrated to, which :meth:`migrate` does
    """

    def __init__(
        self,
        disks: Mapping[str, Path],
        *,
        system: bool = False,
        nbd: bool = True,
        drive: str = "",
        incoming: bool = False,
    ) -> None:
        self.disks = dict(disks)
        self._system, self._nbd, self._drive, self._incoming = system, nbd, drive, incoming
        self.folder = Path(tempfile.mkdtemp(prefix="machine-"))
        self._client: QmpClient | None = None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    # ---- life -------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        number = next(_numbers)
        self.qmp = self.folder / f"qmp-{number}"
        own = self.folder / f"own-{number}"
        self.nbd = self.folder / f"nbd-{number}"
        if self._system:
            command = [peer("qemu-system-x86_64", "qemu-system-x86"), "-S", "-display", "none"]
            command += [
                "-nodefaults",
                "-accel",
                "kvm",
                "-accel",
                "tcg",
                "-m",
                "16",
            ]  # the first that works
            dash = "-"
            more = ["-mon", "chardev=qmp,mode=control"]
            monitor = ["-mon", "chardev=own,mode=control"]
        else:
            command = [peer("qemu-storage-daemon", "qemu-system-common")]
            dash, monitor, more = "--", ["--monitor", "chardev=own"], ["--monitor", "chardev=qmp"]
        command += [f"{dash}chardev", f"socket,id=qmp,path={self.qmp},server=on,wait=off", *more]
        command += [f"{dash}chardev", f"socket,id=own,path={own},server=on,wait=on", *monitor]
        if self._drive:
            command += ["-drive", self._drive]
        if self._incoming:
            command += ["-incoming", f"unix:{self.folder}/incoming"]
        setpriv = shutil.which("setpriv")
        if setpriv:
            command = [setpriv, "--pdeathsig", "KILL", "--", *command]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._client = QmpClient(own, self._process)
        if self._nbd:
            address = {"type": "unix", "data": {"path": str(self.nbd)}}
            self.must("nbd-server-start", addr=address)
        for node in self.disks:
            self.open(node)

    def open(self, node: str) -> None:
        """Give it a disk."""
        path = self.disks[node]
        driver = "raw" if path.suffix == ".raw" else "qcow2"
        file = {"driver": "file", "filename": str(path)}
        self.must("blockdev-add", driver=driver, node_name=node, file=file)
        if self._nbd:
            self._export(node)

    def _export(self, node: str) -> None:
        self.must(
            "block-export-add", type="nbd", id=f"x-{node}", node_name=node, name=node, writable=True
        )

    def must(self, name: str, /, **arguments: Any) -> Any:
        """What a command that has to succeed returns; `_` in a name stands for `-`."""
        renamed = {key.replace("_", "-"): value for key, value in arguments.items()}
        reply: Json = self.execute(name, renamed)
        assert "return" in reply, (name, arguments, reply)
        return reply["return"]

    def execute(self, name: str, arguments: Json) -> Json:
        assert self._client is not None
        return self._client.execute({"execute": name, "arguments": arguments})

    def has_aborted(self) -> bool:
        """Did it end by itself, by a fault of its own?"""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(10) == -signal.SIGABRT
        return False

    def migrate(self, other: Machine) -> None:
        """Its disks are the other's then."""
        self.must("migrate", uri=f"unix:{other.folder}/incoming")
        while self.must("query-migrate").get("status") != "completed":
            pass
        while other.must("query-status")["status"] == "inmigrate":
            pass

    def stop(self) -> None:
        """Orderly: bitmaps are stored."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
        self.kill()

    def kill(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what a guest does ------------------------------------------------------------------

    def write(self, node: str, *commands: str) -> None:
        """qemu-io's: ``write -P 7 0 64k``, ``write -z 0 64k``, ``discard 0 64k``."""
        write(f"nbd+unix:///{node}?socket={self.nbd}", *commands)

    def resize(self, node: str, *sizes: int) -> None:
        if self._nbd:
            self.must("block-export-del", id=f"x-{node}", mode="hard")
            while [each for each in self.must("query-block-exports") if each["id"] == f"x-{node}"]:
                pass
        for size in sizes:
            self.must("block_resize", node_name=node, size=size)
        if self._nbd:
            self._export(node)

    # ---- what is there ----------------------------------------------------------------------

    def bitmaps(self, node: str) -> dict[str, Json]:
        for each in self.must("query-named-block-nodes", flat=True):
            if each["node-name"] == node:
                return {
                    one["name"]: one for one in each.get("dirty-bitmaps", []) if one.get("name")
                }
        raise AssertionError(f"no node {node}")

    def nodes(self) -> list[str]:
        return [each["node-name"] for each in self.must("query-named-block-nodes", flat=True)]

    def jobs(self) -> list[Json]:
        found: list[Json] = self.must("query-jobs")
        return found


def write(image: str | Path, *commands: str, format: str = "raw") -> None:
    """By qemu-io, on an image that nobody has open, or over NBD."""
    program = peer("qemu-io", "qemu-utils")
    asked = [word for each in commands for word in ("-c", each)]
    done = subprocess.run(
        [program, "-f", format, *asked, str(image)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (image, commands, done.stdout, done.stderr)
    assert "failed" not in done.stdout, (image, commands, done.stdout)


def content(image: Path, *, shared: bool = False, format: str = "qcow2") -> bytes:
    """What a disk holds, as `qemu-img convert` alone says."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "raw")
        share = ["-U"] if shared else []
        qemu_img("convert", *share, "-f", format, "-O", "raw", str(image), str(target))
        return target.read_bytes()
