# SPDX-License-Identifier: MIT
"""Bring a copy of a disk up to date that nbdkit serves, while its clients write on.

python nbdkit_backup.py URI QMP BITMAP COPY
    python -m pybitmap.integrations.nbdkit disk.raw --store disk.bitmaps --bitmap daily \\
        --socket disk.sock --qmp qmp.sock
    /usr/bin/python3 nbdkit_backup.py 'nbd+unix:///?socket=disk.sock' qmp.sock daily copy.raw

COPY is an earlier copy of the disk, or of a time when nothing was dirty. If it fails, or is killed,
what was dirty is dirty again: run it once more. Needs no more than libnbd's module (Debian:
python3-libnbd). See docs/howto/nbdkit.md.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

try:
    import nbd
except ImportError:
    raise SystemExit(
        "libnbd's module is missing (Debian: python3-libnbd, for /usr/bin/python3)"
    ) from None

MOST = 32 << 20  # bytes of one request
NODE = "disk"


class Monitor:
    """QMP, a command at a time. What it has frozen is put back when it ends."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(path)
        self._file = self._socket.makefile("rb")
        self._file.readline()  # the greeting
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode())
        reply = json.loads(self._file.readline() or b"{}")
        if "return" not in reply:
            raise OSError(reply.get("error", {}).get("desc", "the server has ended"))
        return reply["return"]

    def areas(self, name: str) -> Iterator[tuple[int, int]]:
        start: int | None = 0
        while start is not None:
            page = self("__org.pybitmap_areas", node=NODE, name=name, start=start)
            for area in page["areas"]:
                yield area["offset"], area["length"]
            start = page.get("next")


def backup(uri: str, qmp: str, name: str, path: str) -> int:
    """Returns how many bytes were copied; they are on the disk then."""
    handle, monitor, copied = nbd.NBD(), Monitor(qmp), 0
    handle.connect_uri(uri)
    bitmaps = [{"node": NODE, "name": name}]
    with open(path, "r+b", buffering=0) as file:
        monitor("__org.pybitmap_freeze", bitmaps=bitmaps)
        os.truncate(file.fileno(), handle.get_size())
        for offset, nbytes in monitor.areas(name):
            for at in range(offset, offset + nbytes, MOST):
                data = handle.pread(min(MOST, offset + nbytes - at), at)
                while data:
                    written = os.pwrite(file.fileno(), data, at)
                    data, at = data[written:], at + written
                    copied += written
        os.fsync(file.fileno())
    handle.flush()  # nor must the disk lose what was copied from it
    monitor("__org.pybitmap_done", bitmaps=bitmaps)
    handle.shutdown()
    return copied


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        uri, qmp, name, path = sys.argv[1:]
        print(f"{backup(uri, qmp, name, path)} bytes copied, and synced")
    except (OSError, nbd.Error, ValueError) as error:
        sys.exit(f"not copied: {error}")
    except KeyboardInterrupt:
        sys.exit("not copied: interrupted; what was dirty is dirty again")
