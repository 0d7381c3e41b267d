# SPDX-License-Identifier: MIT
"""The client of QEMU's monitor: answers, refusals, silence, and the five visitors."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from daemon import Daemon, Disk
from fake_monitor import GREETING, fake
from lines import Interruption, at_every_line, interrupted
from peers import package
from support import collect, run_python

from pybitmap import BlockGraph
from pybitmap.errors import ClosedError, InvalidError, StateError, UnsupportedError
from pybitmap.qmp import Server
from pybitmap.tools.monitor import (
    CommandError,
    DisconnectedError,
    Monitor,
    MonitorError,
    UnansweredError,
    action,
)


@pytest.fixture(autouse=True)
def _client() -> None:
    package("qemu.qmp")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon({"q": Disk(1 << 20, cluster_size=512)}) as daemon:
        yield daemon


@pytest.fixture
def monitor(daemon: Daemon) -> Iterator[Monitor]:
    with Monitor(daemon.monitor) as monitor:
        yield monitor


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


# ---- answers ------------------------------------------------------------------------------------


def test_an_empty_path_is_told() -> None:
    with pytest.raises(InvalidError, match="no path of a socket: it is empty"), Monitor(""):
        pass


def test_a_command_returns_what_qemu_says(monitor: Monitor, daemon: Daemon) -> None:
    nodes = monitor.execute("query-named-block-nodes", flat=True)
    assert "q" in [node["node-name"] for node in nodes]
    assert monitor.version[:2] == daemon.version


def test_names_of_arguments_are_python_s_or_qmp_s(monitor: Monitor) -> None:
    one = {"node-name": "one"}
    monitor.execute("blockdev-add", one, driver="null-co", read_only=True, cache=None)
    monitor.execute("blockdev-del", node_name="one")


def test_a_refusal_has_qemu_s_class_and_words(monitor: Monitor) -> None:
    with pytest.raises(CommandError, match=r"^block-dirty-bitmap-clear: Dirty bitmap") as caught:
        monitor.execute("block-dirty-bitmap-clear", node="q", name="none")
    assert caught.value.command == "block-dirty-bitmap-clear"
    assert caught.value.error_class == "GenericError"
    assert caught.value.text == "Dirty bitmap 'none' not found"
    with pytest.raises(CommandError) as caught:
        monitor.execute("no-such")
    assert caught.value.error_class == "CommandNotFound"
    assert not monitor.has_command("no-such")
    assert monitor.has_command("transaction")


@pytest.mark.parametrize("kind", [MonitorError, CommandError, DisconnectedError, UnansweredError])
def test_errors_can_be_sent_to_other_processes(kind: type[MonitorError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", "command", "Class", "words")))
    assert (str(error), error.command, error.error_class, error.text) == (
        "what",
        "command",
        "Class",
        "words",
    )


def test_a_transaction_is_all_or_nothing(monitor: Monitor) -> None:
    def names() -> list[str]:
        [node] = [
            node
            for node in monitor.execute("query-named-block-nodes", flat=True)
            if node["node-name"] == "q"
        ]
        return [bitmap["name"] for bitmap in node.get("dirty-bitmaps", [])]

    add = action("block-dirty-bitmap-add", node="q", name="b")
    with pytest.raises(CommandError, match=r"^transaction: "):
        monitor.transaction([add, add])
    assert names() == []
    monitor.transaction([add])
    assert names() == ["b"]
    monitor.execute("block-dirty-bitmap-remove", node="q", name="b")


@pytest.mark.parametrize("bad", ["\udc80", float("nan")])
def test_what_json_cannot_say_is_refused_before_it_is_sent(monitor: Monitor, bad: Any) -> None:
    with pytest.raises(InvalidError, match="JSON cannot say"):
        monitor.execute("block-dirty-bitmap-clear", node="q", name=bad)
    with pytest.raises(TypeError):
        monitor.execute("block-dirty-bitmap-clear", node="q", name=object())
    monitor.execute("query-version")


# ---- events -------------------------------------------------------------------------------------


def export(monitor: Monitor, name: str) -> None:
    monitor.execute("block-export-add", type="nbd", id=name, node_name="q", name=name)
    monitor.execute("block-export-del", id=name)


def test_an_event_is_waited_for_and_others_are_kept(monitor: Monitor) -> None:
    export(monitor, "first")
    export(monitor, "second")
    found = monitor.wait(lambda event: event["data"]["id"] == "second")
    assert found["event"] == "BLOCK_EXPORT_DELETED"
    with pytest.raises(UnansweredError, match=r"no such event within 0\.1 s"):
        monitor.wait(lambda event: event["data"]["id"] == "second", 0.1)
    assert monitor.events("OTHER") == []
    assert [event["data"]["id"] for event in monitor.events()] == ["first"]
    assert monitor.events() == []


def test_events_that_come_while_one_waits_are_found(monitor: Monitor, daemon: Daemon) -> None:
    daemon.must("block-export-add", type="nbd", id="later", node_name="q", name="later")
    timer = threading.Timer(
        0.1, lambda: daemon.must("block-export-del", id="later")
    )  # by another client
    timer.start()
    try:
        monitor.wait(lambda event: event["data"]["id"] == "later")
    finally:
        timer.join()


def test_the_predicate_may_ask_the_monitor(monitor: Monitor) -> None:
    export(monitor, "asked")
    monitor.wait(lambda event: monitor.execute("query-version"))


def test_of_events_that_nobody_takes_the_last_are_kept(tmp_path: Path) -> None:
    flood = b"".join(b'{"event": "E", "data": {"n": %d}}\n' % number for number in range(20000))
    with (
        fake(tmp_path / "s", GREETING, {"return": {}}, flood) as path,
        Monitor(path, timeout=1) as monitor,
    ):
        with pytest.raises(UnansweredError):
            monitor.execute("anything")
        found = monitor.wait(lambda event: event["data"]["n"] >= 100)
        assert found["data"]["n"] >= 20000 - 16384


# ---- silence ------------------------------------------------------------------------------------


def test_a_second_client_is_told_that_there_is_one(monitor: Monitor) -> None:
    held = []
    try:
        for _ in range(3):  # the third finds no room in the queue, either
            with pytest.raises(UnansweredError, match="another client is on this monitor"):
                Monitor(monitor.path, patience=0.2)
            other = socket.socket(socket.AF_UNIX)
            held.append(other)
            other.setblocking(False)
            with suppress(BlockingIOError):
                other.connect(monitor.path)
        monitor.execute("query-version")
    finally:
        for other in held:
            other.close()


def test_a_command_that_is_not_answered(tmp_path: Path) -> None:
    with (
        fake(tmp_path / "s", GREETING, {"return": {}}) as path,
        Monitor(path, timeout=0.1) as monitor,
        pytest.raises(UnansweredError, match=r"stop was not answered within 0\.1 s") as caught,
    ):
        monitor.execute("stop")
    assert caught.value.command == "stop"
    assert isinstance(caught.value, TimeoutError)


def test_a_late_answer_is_not_taken_for_that_of_the_next_command(tmp_path: Path) -> None:
    with BlockGraph() as graph, Server(graph, str(tmp_path / "s")):
        graph.add_node("disk", size=1 << 20)
        with Monitor(tmp_path / "s") as monitor:
            monitor.timeout = 1e-9
            for _ in range(20):
                with suppress(UnansweredError):
                    monitor.execute("query-version")
            monitor.timeout = 10
            assert monitor.execute("query-name") == {}


@pytest.mark.parametrize("timeouts", [{"timeout": 0}, {"patience": -1}, {"timeout": float("nan")}])
def test_time_outs_are_positive(daemon: Daemon, timeouts: dict[str, float]) -> None:
    with pytest.raises(InvalidError, match="neither may be 0"):
        Monitor(daemon.monitor, **timeouts)


# ---- what is no monitor, or none any more -------------------------------------------------------


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DisconnectedError, match="no monitor listens there: No such file"):
        Monitor(tmp_path / "none")
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(tmp_path / "gone"))
    with pytest.raises(DisconnectedError, match="no monitor listens there: Connection refused"):
        Monitor(tmp_path / "gone")
    with pytest.raises(InvalidError, match="path too long"):
        Monitor("x" * 200)


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (b"SSH-2.0-x\r\n", MonitorError, "no monitor that speaks QMP"),
        (b"[]\n", MonitorError, "no monitor that speaks QMP"),
        (b'{"QMP": {}}\n', MonitorError, "no monitor that speaks QMP"),
        (b'{"QMP": {"version": {"qemu": 3}, "capabilities": []}}\n', MonitorError, "no version"),
        (b"", DisconnectedError, "was closed at once"),
        (b'{"QMP": {"ver', MonitorError, "no monitor that speaks QMP"),
    ],
)
def test_what_greets_otherwise(
    tmp_path: Path, said: bytes, error: type[MonitorError], words: str
) -> None:
    before = descriptors()
    known = b"qemu" in said
    replies = [said, {"return": {}}] if known else [said]
    then = "silence" if known else "end"
    with fake(tmp_path / "s", *replies, then=then) as path, pytest.raises(error, match=words):
        Monitor(path)
    assert descriptors() == before


def test_what_ends_when_it_has_greeted(tmp_path: Path) -> None:
    replies = [GREETING, {"return": {}}]
    with fake(tmp_path / "s", *replies, then="end") as path, pytest.raises(DisconnectedError):
        Monitor(path).execute("stop")


@pytest.mark.parametrize(
    "said",
    [b"nonsense\n", b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n', b"", {}],
)
def test_an_answer_that_is_none_is_an_error(tmp_path: Path, said: Any) -> None:
    with (
        fake(tmp_path / "s", GREETING, {"return": {}}, said, then="end") as path,
        Monitor(path) as monitor,
    ):
        with pytest.raises(MonitorError) as caught:
            monitor.execute("stop")
        assert caught.value.command == "stop"
        with pytest.raises(DisconnectedError):
            monitor.execute("stop")


LONG = b"x" * (1 << 20)


@pytest.mark.parametrize(
    "replies",
    [
        [LONG + b"\n"],
        [b'{"QMP": {"version": "' + LONG + b'", "capabilities": []}}\n'],
        [GREETING, {"return": {}}, LONG + b"\n"],
    ],
)
def test_an_error_is_a_line_however_much_was_said(tmp_path: Path, replies: list[Any]) -> None:
    with (
        fake(tmp_path / "s", *replies, then="end") as path,
        pytest.raises(MonitorError) as caught,
        Monitor(path) as monitor,
    ):
        monitor.execute("stop")
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_qemu_gone_amid_a_command(tmp_path: Path) -> None:
    with Daemon({"a": Disk(1 << 20)}) as daemon, Monitor(daemon.monitor) as monitor:
        export_pid = daemon.pid
        os.kill(export_pid, signal.SIGSTOP)
        timer = threading.Timer(0.2, os.kill, (export_pid, signal.SIGKILL))
        timer.start()
        with pytest.raises(DisconnectedError, match="whether query-named-block-nodes was done"):
            monitor.execute("query-named-block-nodes")
        timer.join()
        with pytest.raises(DisconnectedError, match="is gone"):
            monitor.wait(lambda event: True)
        daemon.kill()
        daemon.start()
        with pytest.raises(DisconnectedError, match="is gone"):  # that is another QEMU
            monitor.execute("query-version")


def test_qemu_gone_while_an_event_is_waited_for() -> None:
    with Daemon({"a": Disk(1 << 20)}) as daemon, Monitor(daemon.monitor) as monitor:
        timer = threading.Timer(0.1, os.kill, (daemon.pid, signal.SIGKILL))
        timer.start()
        with pytest.raises(DisconnectedError, match="is gone"):
            monitor.wait(lambda event: False)
        timer.join()


def test_without_the_package_it_says_what_to_install() -> None:
    said = run_python(
        "import sys; sys.modules['qemu'] = None\n"
        "from pybitmap.tools.monitor import Monitor\n"
        "try: Monitor('/none')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    assert said.startswith("UnsupportedError")
    assert "pip install qemu.qmp" in said
    assert issubclass(UnsupportedError, OSError)


#: An interruption may come in the finalizer of what is closed already.
in_finalizers = pytest.mark.filterwarnings(
    "ignore:.*<function Monitor.__del__:pytest.PytestWarning"
)

# ---- the five visitors --------------------------------------------------------------------------


@in_finalizers
def test_interrupted_at_any_line_it_leaves_no_socket_and_no_thread(daemon: Daemon) -> None:
    threads = threading.active_count()
    with Monitor(daemon.monitor):
        pass
    before = descriptors()

    def attempt() -> None:
        with Monitor(daemon.monitor) as monitor:
            monitor.execute("query-version")
            monitor.events()

    for where in at_every_line(attempt, within="tools/monitor"):
        assert descriptors() == before, where
        assert threading.active_count() == threads


@in_finalizers
def test_interrupted_at_any_line_of_a_call_it_goes_on(monitor: Monitor) -> None:
    def attempt() -> None:
        assert monitor.execute("query-version")["qemu"]["major"] == monitor.version[0]
        with pytest.raises(CommandError):
            monitor.execute("none")
        export(monitor, "x")
        monitor.wait(lambda event: event["data"]["id"] == "x")

    for where in at_every_line(attempt, within="tools/monitor"):
        assert monitor.execute("query-version"), where
        monitor.events()
        for each in monitor.execute("query-block-exports"):
            if each["id"] == "x":
                monitor.execute("block-export-del", id="x")


@in_finalizers
def test_an_interruption_of_close_closes(daemon: Daemon) -> None:
    before = descriptors()
    number = 1
    while True:
        monitor = Monitor(daemon.monitor)
        with interrupted(number, within="tools/monitor") as lines, suppress(Interruption):
            monitor.close()
        if not lines.came:
            break
        if not monitor.closed:  # interrupted before it was begun
            monitor.close()
        assert descriptors() == before, lines.where
        number += 1
    assert number > 3


def test_ctrl_c_ends_a_wait_and_the_monitor_goes_on(monitor: Monitor) -> None:
    before = descriptors()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            monitor.wait(lambda event: False)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, old)
    assert monitor.execute("query-version")
    assert descriptors() == before


def test_what_another_program_listens_at_is_not_the_same_monitor(tmp_path: Path) -> None:
    if not hasattr(socket, "SO_PEERCRED"):
        pytest.skip("this system does not tell who listens")
    path = tmp_path / "s"
    with BlockGraph() as graph:
        server = Server(graph, str(path))
        with server, Monitor(path) as monitor:
            with interrupted(60, within="tools/monitor"), suppress(Interruption):
                monitor.execute("query-version")
                monitor.execute("query-version")
            server.stop()
            server.__exit__(None, None, None)
            code = (
                "import sys, time\n"
                "from pybitmap import BlockGraph\nfrom pybitmap.qmp import Server\n"
                "with BlockGraph() as graph, Server(graph, sys.argv[1]):\n"
                "  print('there', flush=True); time.sleep(60)"
            )
            child = subprocess.Popen(
                [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
            )
            try:
                assert child.stdout is not None
                assert child.stdout.readline() == "there\n"
                with pytest.raises(DisconnectedError):
                    monitor.execute("query-version")
            finally:
                child.kill()
                child.communicate()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_the_child_of_a_fork_is_refused_and_holds_nothing(daemon: Daemon) -> None:
    monitor = Monitor(daemon.monitor)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        said = "nothing was raised"
        try:
            try:
                monitor.execute("query-version")
            except StateError as error:
                said = str(error)
            monitor.close()
            del monitor
            collect()
            os.write(write, said.encode())
            time.sleep(20)  # its parent ends first
        finally:
            os._exit(0)
    try:
        assert b"in the child of a fork, make a Monitor anew" in os.read(read, 1 << 12)
        assert monitor.execute("query-version")
        monitor.close()
        with Monitor(daemon.monitor) as again:  # the child does not hold the connection
            again.execute("query-version")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_dropped_it_is_closed_and_said_so(daemon: Daemon) -> None:
    before = descriptors()
    monitor = Monitor(daemon.monitor)
    with pytest.warns(ResourceWarning, match="was dropped without close"):  # noqa: PT031
        del monitor
        collect()
    assert descriptors() == before


def test_an_error_does_not_keep_its_monitor(daemon: Daemon) -> None:
    before = descriptors()
    gc.disable()
    try:
        monitor = Monitor(daemon.monitor)
        with suppress(CommandError):
            monitor.execute("none")
        if sys.implementation.name == "cpython":
            with pytest.warns(ResourceWarning, match="was dropped without close"):
                del monitor
            assert descriptors() == before
    finally:
        gc.enable()


def test_closed_it_refuses(daemon: Daemon) -> None:
    with Monitor(daemon.monitor) as monitor:
        pass
    monitor.close()
    assert monitor.closed
    for ask in (monitor.events, lambda: monitor.wait(bool), lambda: monitor.execute("stop")):
        with pytest.raises(ClosedError, match="is closed"):
            ask()


def test_threads_have_their_turns(tmp_path: Path) -> None:
    with BlockGraph() as graph, Server(graph, str(tmp_path / "s")):
        graph.add_node("disk", size=1 << 20)
        with Monitor(tmp_path / "s") as monitor:
            failed = []

            def ask(name: str) -> None:
                for _ in range(30):
                    try:
                        with pytest.raises(CommandError, match=name):
                            monitor.execute(name)
                    except BaseException as error:
                        failed.append(error)

            threads = [threading.Thread(target=ask, args=(f"none-{i}",)) for i in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not failed


def test_amid_a_call_of_its_own_it_is_refused(monitor: Monitor) -> None:
    said: list[str] = []

    def again(*_: object) -> None:
        for ask in (monitor.close, lambda: monitor.execute("query-version")):
            try:
                ask()
            except StateError as error:
                said.append(str(error))

    old = signal.signal(signal.SIGALRM, again)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(UnansweredError):
            monitor.wait(lambda event: False, 0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert len(said) == 2
    assert "amid a call of the same monitor" in said[0]


def test_a_coroutine_is_told_to_use_a_thread(monitor: Monitor) -> None:
    async def ask() -> Any:
        with pytest.raises(StateError, match=r"asyncio\.to_thread"):
            monitor.execute("query-version")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, monitor.execute, "query-version")

    assert asyncio.run(ask())


def test_nothing_is_said_beside_the_exceptions(daemon: Daemon) -> None:
    code = (
        "import os, signal, sys\n"
        "from pybitmap.tools.monitor import Monitor, MonitorError\n"
        "for path in sys.argv[1:]:\n"
        "    try: Monitor(path, patience=0.1)\n"
        "    except MonitorError: pass\n"
    )
    with Monitor(daemon.monitor):
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-c", code, str(daemon.monitor), "/none"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
