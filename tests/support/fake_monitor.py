# SPDX-License-Identifier: MIT
"""A monitor that says what a test has it say: silence, nonsense, the end."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

GREETING = {"QMP": {"version": {"qemu": {"major": 9, "minor": 1, "micro": 0}}, "capabilities": []}}


@contextmanager
def fake(path: Path, *replies: Any, then: str = "silence") -> Iterator[Path]:
    """Whoever connects gets these, one for each request, and then silence or the end.

    :param replies: bytes are sent as they are
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        stop = threading.Event()

        def serve() -> None:
            with listener.accept()[0] as client:
                client.settimeout(20)
                for number, reply in enumerate(replies):
                    request: Any = {}
                    if number:
                        request = json.loads(client.recv(1 << 16))
                    if not isinstance(reply, bytes):
                        reply = dict(reply)
                        if number and "id" in request:
                            reply["id"] = request["id"]
                        reply = json.dumps(reply).encode() + b"\n"
                    with suppress(OSError):
                        client.sendall(reply)
                if then == "silence":
                    stop.wait(20)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path
        finally:
            stop.set()
            thread.join()
