# SPDX-License-Identifier: MIT
"""A guest that is frozen for the instant: with an agent that is played here, as qemu-ga answers."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from pybitmap.tools.backup import GuestError, Hooks, qga_hook


class Agent:
    """Serves one client at a time; what it has understood is in `told`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: list[str] = []
        self.answer: Callable[[str], Any] = lambda command: {"return": 3}
        self.stale = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, client.makefile("rwb") as file:
                file.write(self.stale)
                file.flush()
                for line in file:
                    self._one(file, json.loads(line.replace(b"\xff", b"")))

    def _one(self, file: Any, asked: dict[str, Any]) -> None:
        command = asked["execute"]
        if command == "guest-sync-delimited":
            file.write(b"\xff" + json.dumps({"return": asked["arguments"]["id"]}).encode() + b"\n")
        else:
            self.told.append(command)
            reply = self.answer(command)
            if reply is not None:
                file.write(
                    reply if isinstance(reply, bytes) else json.dumps(reply).encode() + b"\n"
                )
        file.flush()


@pytest.fixture
def agent(memory_path: Path) -> Iterator[Agent]:
    made = Agent(memory_path / "qga")
    yield made
    made.close()


FREEZE, THAW = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"


@pytest.mark.parametrize(
    "stale", [b"", b'{"return": 12}\n', b'alf": 1}\n', b'{"ret\xff{"return": 7}\n', b"\n\n"]
)
def test_it_freezes_and_thaws_whatever_an_earlier_client_left(agent: Agent, stale: bytes) -> None:
    agent.stale = stale
    inner: list[str] = []
    hooks = qga_hook(
        agent.path, Hooks(lambda: inner.append(*agent.told), lambda: inner.append("after"))
    )
    hooks.before()
    assert (agent.told, inner) == ([FREEZE], [FREEZE])
    hooks.after()
    assert (agent.told, inner) == ([FREEZE, THAW], [FREEZE, "after"])


def test_a_guest_that_refuses_to_freeze_is_thawed_all_the_same(agent: Agent) -> None:
    agent.answer = lambda command: (
        {"error": {"class": "GenericError", "desc": "fs busy"}}
        if command == FREEZE
        else {"return": 0}
    )
    hooks = qga_hook(agent.path)
    with pytest.raises(GuestError, match="refuses guest-fsfreeze-freeze: fs busy"):
        hooks.before()
    hooks.after()
    assert agent.told == [FREEZE, THAW]


def test_a_guest_that_does_not_answer_is_not_waited_for_for_ever(agent: Agent) -> None:
    agent.answer = lambda command: None
    hooks = qga_hook(agent.path, timeout=0.2)
    with pytest.raises(GuestError, match="does not answer"):
        hooks.before()


@pytest.mark.parametrize("said", [b"nonsense\n", b"[]\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n"])
def test_what_is_no_agent_is_told(agent: Agent, said: bytes) -> None:
    agent.answer = lambda command: said
    with pytest.raises(GuestError, match="no agent"):
        qga_hook(agent.path, timeout=5).before()


def test_no_agent_is_told(memory_path: Path) -> None:
    with pytest.raises(GuestError, match="none"):
        qga_hook(memory_path / "none").before()


def test_nobody_is_thawed_who_was_not_frozen(agent: Agent) -> None:
    qga_hook(agent.path).after()
    assert agent.told == []


def test_a_hook_inside_that_fails_thaws(agent: Agent) -> None:
    def fail() -> None:
        raise OSError("no")

    hooks = qga_hook(agent.path, Hooks(after=fail))
    hooks.before()
    with pytest.raises(OSError, match="no"):
        hooks.after()
    assert agent.told == [FREEZE, THAW]
