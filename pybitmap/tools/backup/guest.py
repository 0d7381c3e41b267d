# SPDX-License-Identifier: MIT
"""A guest whose file systems are frozen at the instant of a backup, by its agent, qemu-ga.

The agent listens at a unix socket of the host (a virtio-serial port of the machine), and speaks
JSON as a monitor does, but without a greeting, and with what an earlier client did not read still
in the pipe: `guest-sync-delimited` finds the begin. While file systems are frozen the guest's
writes wait, so they are thawed again at once, whatever has happened.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import replace
from time import monotonic
from typing import Any

from ...errors import StoreError
from .run import Hooks

TIMEOUT = 30.0  # seconds for an answer; flushing a guest's caches takes a while

_MOST = 1 << 20  # bytes of an answer


class GuestError(StoreError):
    """The guest's agent does not answer, or has refused.

    >>> qga_hook("nobody.agent").before()
    Traceback (most recent call last):
    pybitmap.tools.backup.guest.GuestError: nobody.agent: No such file or directory
    """


def qga_hook(
    path: str | os.PathLike[str], hooks: Hooks | None = None, timeout: float = TIMEOUT
) -> Hooks:
    """Hooks that freeze a guest's file systems before the instant, and thaw them after it.

    Other hooks go on inside: their `before` when all is frozen, their `after` before the thaw.

    Kill: between freeze and thaw the guest stays frozen until the agent's own time-out, or
    `guest-fsfreeze-thaw`. Twin: the agent serves one client at a time; a second one is not
    answered, and is told so.

    :param path: of the agent's socket
    :param timeout: seconds for each answer

    >>> hooks = qga_hook("vda.agent", Hooks(before=lambda: print("frozen")))
    >>> backup(["vda"], "backups", qmp="vm0.qmp", hooks=hooks)  # doctest: +SKIP
    """
    hooks = Hooks() if hooks is None else hooks
    agent = _Agent(os.fspath(path), timeout)
    inner = hooks
    begun: list[bool] = []

    def before() -> None:
        begun[:] = [True]
        agent.ask("guest-fsfreeze-freeze")
        inner.before()

    def after() -> None:
        try:
            inner.after()
        finally:
            if begun:
                begun.clear()
                agent.ask("guest-fsfreeze-thaw")

    return replace(hooks, before=before, after=after)


class _Agent:
    """A connection for each question, since the one before may have been interrupted."""

    def __init__(self, path: str, timeout: float) -> None:
        self._path, self._timeout = path, timeout

    def ask(self, command: str) -> Any:
        """
        :raises GuestError: if it is not done, or not known to be
        """
        with socket.socket(socket.AF_UNIX) as link:
            end = monotonic() + self._timeout
            try:
                link.settimeout(self._timeout)
                link.connect(self._path)
                mark = secrets.randbelow(1 << 31)
                self._send(link, "guest-sync-delimited", {"id": mark}, begin=b"\xff")
                while self._answer(link, end, behind=b"\xff").get("return") != mark:
                    pass  # what an earlier client has not read
                self._send(link, command)
                found = self._answer(link, end)
            except (TimeoutError, socket.timeout):
                raise GuestError(
                    f"{self._path}: the guest's agent does not answer {command}: does qemu-ga "
                    "run in the guest, and has nobody else this socket?"
                ) from None
            except OSError as error:
                if isinstance(error, StoreError):
                    raise
                raise GuestError(f"{self._path}: {error.strerror or error}", error.errno) from error
        if "error" in found:
            said = found["error"].get("desc", "no reason was given")
            raise GuestError(f"{self._path}: the guest's agent refuses {command}: {said}")
        return found.get("return")

    @staticmethod
    def _send(
        link: socket.socket, command: str, arguments: Any = None, *, begin: bytes = b""
    ) -> None:
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        link.sendall(begin + json.dumps(message).encode() + b"\n")

    def _answer(self, link: socket.socket, end: float, behind: bytes = b"") -> dict[str, Any]:
        data = bytearray()
        while True:
            left = end - monotonic()
            if left <= 0:
                raise TimeoutError
            link.settimeout(left)
            byte = link.recv(1)  # nothing of what comes behind the line is to be lost
            if not byte:
                raise GuestError(f"{self._path}: the guest's agent has closed the connection")
            if byte == behind:
                data.clear()
            elif byte != b"\n":
                data += byte
            elif data.strip():
                break
            if len(data) > _MOST:
                raise GuestError(f"{self._path}: no agent: it does not end its answer")
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            if behind:
                return {}
            raise GuestError(f"{self._path}: no agent: it does not answer in JSON") from None
        if not isinstance(found, dict):
            raise GuestError(f"{self._path}: no agent: it answers {found!r:.100}")
        return found
