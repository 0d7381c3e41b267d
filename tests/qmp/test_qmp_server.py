# SPDX-License-Identifier: MIT
"""The QMP server: negotiation, framing, bad clients, the socket, and the client of QEMU's own."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from commands import heed_signals, serving
from hypothesis import given
from hypothesis import strategies as st

from pybitmap import BlockGraph, __version__
from pybitmap.qmp import Server
from pybitmap.qmp import server as module
from pybitmap.qmp.schema import SchemaError
from pybitmap.qmp.server import MAX_DEPTH, MAX_ID, MAX_REQUEST, JsonStream, TooMuchError, parse
from pybitmap.store import LocalStore

Json = dict[str, Any]
QUERY = b'{"execute":"query-block","id":%d}'
CAPABILITIES = b'{"execute":"qmp_capabilities"}'


def command(kind: str, **arguments: Any) -> bytes:
    return json.dumps({"execute": f"__org.pybitmap_{kind}", "arguments": arguments}).encode()


THIS = {"node": "n", "name": "b"}
#: What a client asks for whose bitmaps are then in its hands.
FREEZE = [command("freeze", bitmaps=[THIS]), command("areas", **THIS)]


class Client:
    """A raw connection."""

    def __init__(self, path: Path, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")
        self.greeting = self.receive()
        if negotiate:
            assert self.ask(CAPABILITIES) == {"return": {}}

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> Any:
        """None at the end."""
        try:
            line = self.file.readline()
        except ConnectionResetError:
            return None
        return json.loads(line) if line else None

    def ask(self, data: bytes) -> Any:
        self.send(data)
        return self.receive()

    def works(self) -> bool:
        return bool(self.ask(QUERY % 99) == {"return": [], "id": 99})

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp.sock"


@pytest.fixture
def server(path: Path) -> Iterator[Server]:
    with BlockGraph() as graph:
        graph.add_node("n", 1 << 20)
        with Server(graph, str(path)) as server:
            yield server
    assert not path.exists()


@pytest.fixture
def client(server: Server, path: Path) -> Iterator[Client]:
    with Client(path) as client:
        yield client


def error(desc: str, kind: str = "GenericError") -> Json:
    return {"error": {"class": kind, "desc": desc}}


# ---- negotiation ------------------------------------------------------------------------------


def test_greeting(server: Server, path: Path) -> None:
    with Client(path, negotiate=False) as client:
        assert set(client.greeting["QMP"]["version"]) == {"qemu", "package"}
        assert client.greeting["QMP"]["capabilities"] == []


@pytest.mark.parametrize("name", [b"query-block", b"quit", b"foo"])
def test_no_command_before_negotiation(server: Server, path: Path, name: bytes) -> None:
    with Client(path, negotiate=False) as client:
        assert client.ask(b'{"execute":"%s"}' % name) == error(
            "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
        )
        assert client.ask(CAPABILITIES) == {"return": {}}
        assert client.works()


def test_negotiation_is_done_once(client: Client) -> None:
    assert client.ask(CAPABILITIES) == error(
        "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
    )


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({"enable": ["x"]}, "Parameter 'null' does not accept value 'x'"),
        ({"enable": [1]}, "Invalid parameter type for 'enable[0]', expected: string"),
        ({"enable": "oob"}, "Invalid parameter type for 'enable', expected: array"),
        ({"foo": 1}, "Parameter 'foo' is unexpected"),
        ({"enable": ["oob"]}, "Capability oob not available"),
    ],
)
def test_bad_negotiation(server: Server, path: Path, arguments: Json, desc: str) -> None:
    with Client(path, negotiate=False) as client:
        text = json.dumps({"execute": "qmp_capabilities", "arguments": arguments})
        assert client.ask(text.encode()) == error(desc)
        assert client.ask(CAPABILITIES) == {"return": {}}


# ---- framing ----------------------------------------------------------------------------------


def test_several_requests_in_one_packet(client: Client) -> None:
    client.send(QUERY % 1 + QUERY % 2 + b"\n\n" + QUERY % 3)
    assert [client.receive()["id"] for _ in range(3)] == [1, 2, 3]


def test_one_request_over_packets_and_lines(client: Client) -> None:
    for byte in b'{ "execute":\r\n "query-block",\n\t"id": "}{\\"[\\\\" }':
        client.send(bytes([byte]))
    assert client.receive() == {"return": [], "id": '}{"[\\'}


def test_requests_sent_before_the_end_are_answered(client: Client) -> None:
    client.send((QUERY % 1) * 100)
    client.socket.shutdown(socket.SHUT_WR)
    assert [client.receive()["id"] for _ in range(100)] == [1] * 100
    assert client.receive() is None


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage\n",
        b"\xff",
        b"}",
        b"]",
        b",",
        b":",
        b'{"execute":}',
        b'{"execute":"query-block",}',
        b'{"execute" "query-block"}',
        b"{1:2}",
        b'{"a":1]',
        b'{"execute":"query-block","id":1,"id":2}',
        b'{"execute":"query-block","id":"\\ud800"}',
        b'{"execute":"query-block","id":"\\x"}',
        b'{"execute":"query-block","id":NaN}',
        b'{"execute":"query-block","id":Infinity}',
        b'{"execute":"query-block","id":1e999}',
        b'{"execute":"query-block","id":' + b"9" * 100_000 + b"}",
        b'{"execute":"query-block","id":\xe9}',
        b'{"execute":"query-block","id":"half a string\n',
        b'{"execute":"query-block","id":"escaped\\\n',
        b'{"execute":"query-block"\xff',
        b'{"execute":"query-block","id":"\\\xff',
        b"[1,2]",
        b'"x"',
        b"12 ",
        b"null\n",
    ],
)
def test_garbage_is_an_error_and_the_client_goes_on(client: Client, garbage: bytes) -> None:
    reply = client.ask(garbage)
    assert reply["error"]["class"] == "GenericError"
    assert client.works()


def test_garbage_that_no_bracket_ends_does_not_take_what_follows(client: Client) -> None:
    client.send(b"tru")
    time.sleep(0.05)
    client.send(QUERY % 1)
    assert "error" in client.receive()
    assert client.receive() == {"return": [], "id": 1}


@given(
    st.lists(st.recursive(st.none() | st.integers(0, 99) | st.text(), st.lists), max_size=6),
    st.data(),
)
def test_the_stream_cuts_what_was_joined(values: list[Any], data: st.DataObject) -> None:
    whole = b"\n".join(json.dumps(value).encode() for value in values) + b"\n"
    stream, found, at = JsonStream(), [], 0
    while at < len(whole):
        step = data.draw(st.integers(1, 8))
        stream.feed(whole[at : at + step])
        at += step
        while (text := stream.next()) is not None:
            found.append(parse(text))
    assert found == values


@given(st.lists(st.binary(max_size=20) | st.sampled_from([b"{", b'"', b"[", b"]", b"}", b"\\"])))
def test_the_stream_survives_anything(chunks: list[bytes]) -> None:
    stream = JsonStream()
    for chunk in [*chunks, b"\xff\n"]:
        stream.feed(chunk)
        while (text := stream.next()) is not None:
            assert text
            with suppress(SchemaError):
                parse(text)
    stream.feed(b'{"a":1}')
    last = None
    while (text := stream.next()) is not None:
        last = text
    assert last == b'{"a":1}'


# ---- bounds -----------------------------------------------------------------------------------


def fill(client: Client, chunk: bytes, times: int) -> Any:
    """Send until the server does not want any more; its reply."""
    with suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(times):
            client.send(chunk)
    return client.receive()


@pytest.mark.parametrize("begin", [b'{"a":"', b'{"a":[', b"["])
def test_a_hundred_megabytes_are_refused(client: Client, path: Path, begin: bytes) -> None:
    client.send(begin)
    with Client(path) as other:
        assert fill(client, b"1" * (1 << 20), 100) == error("JSON token size limit exceeded")
        assert client.receive() is None
        assert other.works()


def test_a_request_of_nearly_the_bound_is_taken(client: Client) -> None:
    text = b'{"execute":"query-block","arguments":{"x":"%s"}}' % (b"x" * (MAX_REQUEST - 100))
    assert client.ask(text) == error("Parameter 'x' is unexpected")


def test_deep_nesting_is_refused(client: Client, path: Path) -> None:
    assert client.ask(b"[" * (MAX_DEPTH + 1)) == error("JSON nesting depth limit exceeded")
    assert client.receive() is None


def test_the_deepest_nesting_is_taken(client: Client) -> None:
    depth = MAX_DEPTH - 1
    reply = client.ask(b'{"execute":"foo","id":' + b"[" * depth + b"]" * depth + b"}")
    assert reply["error"]["class"] == "CommandNotFound"


def test_many_values_are_refused() -> None:
    stream = JsonStream()
    stream.feed(b"[" + b"[]," * (1 << 20) + b"[]]")
    with pytest.raises(TooMuchError, match="token count"):
        stream.next()


def test_blanks_cost_nothing(client: Client) -> None:
    for _ in range(40):
        client.send(b" " * (1 << 20))
    assert client.works()


def ask_for_more_than_is_read(client: Client) -> None:
    """Until the server does not listen any more."""
    client.socket.settimeout(0.2)
    with suppress(socket.timeout):
        for _ in range(10_000):
            client.send(b'{"execute":"query-commands"}' * 1000)
        pytest.fail("the server has taken it all")


def unread(server: Server) -> list[int]:
    """Bytes of replies, by client."""
    return [len(each.unsent) for each in list(server._clients.values())]


def test_a_client_that_does_not_read_is_not_listened_to(
    server: Server, client: Client, path: Path
) -> None:
    ask_for_more_than_is_read(client)
    assert max(unread(server)) < 1 << 17
    with Client(path) as other:
        assert other.works()


def test_a_client_that_does_not_read_is_kept_while_others_have_room(
    server: Server, client: Client, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0)
    ask_for_more_than_is_read(client)
    with Client(path) as other:
        assert other.works()
    assert len(client.receive()["return"]) > 10


def test_clients_that_do_not_read_give_way_together(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are as many as there can be, and each may have one long reply beyond its bound."""
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    monkeypatch.setattr(module, "ALL_UNREAD", 1 << 18)
    silent = [Client(path) for _ in range(12)]
    most = 0
    for each in silent:
        with suppress(ConnectionError):
            ask_for_more_than_is_read(each)
        most = max(most, sum(unread(server)))
    assert most < (1 << 18) + (1 << 16)
    with Client(path) as other:
        assert other.works()
        assert sum(unread(server)) < 1 << 18
    for each in silent:
        each.close()


@pytest.mark.parametrize("begin", [b'{"execute":"', b'{"execute":["', b"["])
def test_clients_with_half_a_request_give_way_together(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    monkeypatch.setattr(module, "ALL_ASKED", 1 << 20)
    halves = [Client(path) for _ in range(4)]
    for each in halves:
        each.socket.settimeout(0.2)
        with suppress(socket.timeout, ConnectionError):
            each.send(begin + b"1" * (1 << 19))
    assert sum(each.stream.held for each in list(server._clients.values())) < 3 << 19
    with Client(path) as other:
        text = b'{"execute":"query-block","arguments":{"x":"%s"}}' % (b"x" * (1 << 19))
        assert other.ask(text) == error("Parameter 'x' is unexpected")
    for each in halves:
        each.close()


def test_a_reply_that_is_too_long_is_an_error(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_REPLY", 300)
    reply = client.ask(b'{"execute":"query-commands","id":3}')
    assert reply["id"] == 3
    assert "at most 300 are sent" in reply["error"]["desc"]
    assert client.works()


@pytest.mark.parametrize("negotiate", [True, False])
def test_a_command_with_a_long_id_is_refused_before_it_runs(
    server: Server, path: Path, negotiate: bool
) -> None:
    with Client(path, negotiate=negotiate) as client:
        arguments = b'"arguments":{"node":"n","name":"b"}'
        add = b'{"execute":"block-dirty-bitmap-add",%s,"id":"%s"}' % (arguments, b"x" * MAX_ID)
        reply = client.ask(add)
        assert reply == error(
            f"QMP input member 'id' has {MAX_ID + 4} bytes, and can have {MAX_ID}"
        )
    assert not server._graph.nodes["n"].bitmaps


# ---- one more client than there can be ------------------------------------------------------


def test_idle_clients_do_not_keep_another_out(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    idle = [Client(path, negotiate=bool(i % 2)) for i in range(module.MAX_CLIENTS)]
    with Client(path) as client:
        assert client.works()
    assert idle[0].receive() is None
    assert idle[1].works()
    for each in idle:
        each.close()


def test_the_one_that_gives_way_is_silent_longest_and_has_frozen_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    monkeypatch.setattr(module, "MAX_CLIENTS", 3)
    with BlockGraph() as graph:
        bitmap = graph.add_node("n", 1 << 20).add_bitmap("b", 512)
        with Server(graph, str(path)):
            froze, spoke, silent = (Client(path) for _ in range(3))
            assert froze.ask(FREEZE[0]) == {"return": {}}
            assert silent.works()
            assert spoke.works()
            with Client(path) as client:
                assert client.works()
                assert silent.receive() is None
                assert bitmap.busy
                assert froze.ask(command("done", bitmaps=[THIS])) == {"return": {}}
                assert spoke.works()
            for each in (froze, spoke, silent):
                each.close()


@pytest.mark.parametrize("keeps", ["frozen", "speaking"])
def test_where_none_can_give_way_one_more_waits(
    path: Path, monkeypatch: pytest.MonkeyPatch, keeps: str
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0 if keeps == "frozen" else 1000)
    monkeypatch.setattr(module, "MAX_CLIENTS", 1)
    with BlockGraph() as graph:
        graph.add_node("n", 1 << 20).add_bitmap("b", 512)
        with Server(graph, str(path)), Client(path) as first, ThreadPoolExecutor() as threads:
            if keeps == "frozen":
                assert first.ask(FREEZE[0]) == {"return": {}}
            second = threads.submit(Client, path)
            for number in range(20):
                assert first.ask(b'{"execute":"query-block","id":%d}' % number)["id"] == number
            assert not second.done()
            first.close()
            with second.result(20) as client:
                assert "return" in client.ask(FREEZE[0])


def test_half_a_request_then_gone(client: Client, path: Path) -> None:
    client.send(b'{"execute":"query-bl')
    client.close()
    with Client(path) as other:
        assert other.works()


def test_clients_share_the_graph(client: Client, path: Path) -> None:
    add = b'{"execute":"block-dirty-bitmap-add","arguments":{"node":"n","name":"b"}}'
    with Client(path) as other:
        assert client.ask(add) == {"return": {}}
        assert other.ask(add) == error("Bitmap already exists: b")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("reads", range(3))
def test_a_client_that_leaves_has_taken_nothing(path: Path, reads: int) -> None:
    """Before it read a reply, or behind it, by an end that comes at once."""
    with BlockGraph() as graph:
        node = graph.add_node("n", 1 << 20)
        bitmap = node.add_bitmap("b", 512)
        node.mark_dirty(0, 1 << 20)
        with Server(graph, str(path)):
            with Client(path) as client:
                client.send(b"".join(FREEZE))
                for _ in range(reads):
                    assert "return" in client.receive()
                until(lambda: bitmap.busy)
            node.mark_dirty(0, 1)
            until(lambda: not bitmap.busy)
            assert bitmap.count() == 1 << 20
            with Client(path) as client:
                for request in [*FREEZE, command("done", bitmaps=[THIS])]:
                    assert "return" in client.ask(request)
            assert bitmap.count() == 0


def test_a_server_that_is_killed_has_taken_nothing(path: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with BlockGraph() as graph:
        graph.add_node("n", 1 << 20, LocalStore(store)).add_bitmap("b", 512, persistent=True)
    code = f"""
import os, signal
from pybitmap import BlockGraph
from pybitmap.qmp import Server
from pybitmap.store import LocalStore
graph = BlockGraph(); node = graph.add_node("n", None, LocalStore({str(store)!r}))
node.mark_dirty(0, 65536)
with Server(graph, {str(path)!r}):
    print("ready", flush=True)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as served:
        assert served.stdout is not None
        served.stdout.readline()
        with Client(path) as client:
            assert client.ask(FREEZE[0]) == {"return": {}}
            client.send(FREEZE[1])
            served.kill()
    with BlockGraph() as graph:
        bitmap = graph.add_node("n", None, LocalStore(store)).bitmaps["b"]
        assert bitmap.count() == 65536


# ---- the socket -------------------------------------------------------------------------------


def test_mode(server: Server, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with Server(BlockGraph(), str(path)), Client(path) as client:
        assert client.works()


def test_a_socket_in_use_stays(client: Client, path: Path) -> None:
    with pytest.raises(OSError, match="another program listens there"):
        Server(BlockGraph(), str(path)).start()
    assert client.works()
    with Client(path) as other:
        assert other.works()


def test_a_file_that_is_no_socket_stays(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        Server(BlockGraph(), str(path)).start()
    assert path.read_text() == "precious"


def _folder(path: Path) -> None:
    path.mkdir()


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _elsewhere(path: Path) -> None:
    """A link to a socket on which nobody listens."""
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{path}.stale")
    path.symlink_to(f"{path}.stale")


@pytest.mark.parametrize("make", [os.mkfifo, _folder, _dangling, _elsewhere])
def test_whatever_is_no_socket_stays(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    before = {each: each.lstat() for each in path.parent.iterdir()}
    with pytest.raises(FileExistsError, match="exists, and is no socket"):
        Server(BlockGraph(), str(path)).start()
    assert {each: each.lstat() for each in path.parent.iterdir()} == before


def test_a_socket_of_another_kind_in_use_stays(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(OSError, match="another program listens there"):
            Server(BlockGraph(), str(path)).start()
        assert path.is_socket()


def test_a_socket_whose_queue_is_full_is_in_use(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, ExitStack() as stack:
        busy.bind(str(path))
        busy.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect(str(path))
        with pytest.raises(OSError, match="another program listens there"):
            Server(BlockGraph(), str(path)).start()


def test_of_many_that_find_a_stale_socket_one_listens(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = module._check_stale

    def slow_check(path: str) -> None:
        check(path)
        time.sleep(0.05)  # all would find it stale

    monkeypatch.setattr(module, "_check_stale", slow_check)

    def start(_: int) -> Server | None:
        with suppress(OSError):
            return Server(BlockGraph(), str(path)).start()
        return None

    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(path))
            [server] = filter(None, threads.map(start, range(8)))
            with closing(server), Client(path) as client:
                assert client.works()
            assert not path.exists()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """By somebody else."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@pytest.mark.parametrize("when", ["before it starts", "when it ends"])
def test_a_foreign_lock_on_the_folder_keeps_nothing(path: Path, tmp_path: Path, when: str) -> None:
    store = tmp_path / "store"
    with BlockGraph() as graph:
        graph.add_node("n", 1 << 20, LocalStore(store)).add_bitmap("b", 512, persistent=True)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with ExitStack() as stack:
        if when == "before it starts":
            stack.enter_context(locked(path.parent))
        with served(path, "--node", f"n,store={store}") as process:
            wait_for(path)
            if when == "when it ends":
                stack.enter_context(locked(path.parent))
            with Client(path) as client:
                assert client.ask(command("mark", node="n", offset=0, length=512))
                process.send_signal(signal.SIGTERM)
                assert client.receive() is None
            process.communicate(timeout=20)
            assert process.returncode == 0
            assert not path.exists()
    [node] = LocalStore(store).entries()
    assert not node.bitmaps[0].in_use


def test_the_command_says_what_it_could_not_store(path: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with BlockGraph() as graph:
        graph.add_node("n", 1 << 20, LocalStore(store)).add_bitmap("b", 512, persistent=True)
    with served(path, "--node", f"n,store={store}") as process:
        wait_for(path)
        (store / "catalog.sqlite").unlink()
        process.send_signal(signal.SIGTERM)
        message = process.communicate(timeout=20)[1]
        assert f"'{store}/catalog.sqlite' was deleted or renamed while store" in message
        assert process.returncode == 2
        assert not path.exists()


@pytest.mark.parametrize("name", ["lock", "catalog.sqlite", "catalog.sqlite-journal"])
def test_the_command_does_not_wait_for_a_fifo(path: Path, tmp_path: Path, name: str) -> None:
    store = tmp_path / "store"
    with BlockGraph() as graph:
        graph.add_node("n", 1 << 20, LocalStore(store)).add_bitmap("b", 512, persistent=True)
    (store / name).unlink()
    os.mkfifo(store / name)
    with served(path, "--node", f"n,store={store},read-only") as process:
        assert f"{name}' is no regular file" in process.communicate(timeout=20)[1]
        assert process.returncode == 2


@pytest.mark.parametrize(
    "name", ["", "\0abstract", "x" * 200, "missing/folder/s", "/proc/s", os.devnull + "/s"]
)
def test_impossible_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError):  # noqa: PT011
        Server(BlockGraph(), name).start()
    assert os.listdir(tmp_path) == []


def test_another_file_at_the_path_stays_at_the_end(path: Path) -> None:
    server = Server(BlockGraph(), str(path)).start()
    path.unlink()
    path.write_text("precious")
    server.close()
    assert path.read_text() == "precious"


def test_quit(client: Client, server: Server, path: Path) -> None:
    with Client(path) as other:
        assert client.ask(b'{"execute":"quit","id":7}') == {"return": {}, "id": 7}
        assert client.receive() is None
        assert other.receive() is None
    server.join()
    assert not path.exists()


def test_close_twice(path: Path) -> None:
    server = Server(BlockGraph(), str(path)).start()
    server.close()
    server.close()
    server.stop()


def wait_for(path: Path) -> None:
    """Until somebody listens there."""
    for _ in range(500):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return
        time.sleep(0.04)
    pytest.fail("nobody listens")


SERVE = """
import sys
from pybitmap import BlockGraph
from pybitmap.qmp import serve
with BlockGraph() as graph:
    graph.add_node("n", 1 << 20)
    serve(graph, sys.argv[1])
print("done")
"""


def test_a_signal_that_interrupts_no_wait_ends_it(path: Path) -> None:
    """As one that comes right before the wait does not, or that another thread has got."""
    code = f"""
import os, signal, threading
from pybitmap import BlockGraph
from pybitmap.qmp import serve
graph = BlockGraph()
threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])   # so the thread gets it
before = signal.set_wakeup_fd(-1)
serve(graph, {str(path)!r}, lambda: print("listening", flush=True))
assert signal.set_wakeup_fd(-1) == before
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            time.sleep(0.2)  # it waits
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it(path: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    try:
        wait_for(path)
        with Client(path) as client:
            assert client.works()
            process.send_signal(number)
            assert client.receive() is None
        assert process.communicate(timeout=20)[0] == "done\n"
        assert process.returncode == 0
        assert not path.exists()
    finally:
        process.kill()
        process.communicate()


# ---- the command line -------------------------------------------------------------------------


@contextmanager
def served(path: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
    pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")
    with serving(path, *words) as process:
        yield process


@pytest.mark.parametrize("end", ["quit", "SIGINT", "SIGTERM"])
def test_the_command(path: Path, end: str) -> None:
    with served(path, "--node", "a,,b,size=1M", "--node", "c,size=512") as process:
        wait_for(path)
        with Client(path) as client:
            nodes = client.ask(b'{"execute":"query-named-block-nodes"}')["return"]
            assert [(each["node-name"], each["image"]["virtual-size"]) for each in nodes] == [
                ("c", 512),
                ("a,b", 1 << 20),
            ]
            if end == "quit":
                assert client.ask(b'{"execute":"quit"}') == {"return": {}}
            else:
                process.send_signal(getattr(signal, end))
        listening = f"pybitmap: listening on {path}: a,b, c\n"
        assert process.communicate(timeout=20) == ("", listening)
        assert process.returncode == 0
        assert not path.exists()


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((), "Missing option"),
        (("n",), "is not NAME,size=SIZE"),
        (("n,size=x",), "is not a size"),
        ((",size=1M",), "cannot be empty"),
        (("n,size=1M", "n,size=2M"), "Duplicate nodes"),
    ],
)
def test_bad_nodes_of_the_command(path: Path, nodes: tuple[str, ...], message: str) -> None:
    with served(path, *(word for node in nodes for word in ("--node", node))) as process:
        assert message in process.communicate(timeout=20)[1]
        assert process.returncode == 2
        assert not path.exists()


def test_the_command_where_another_listens(server: Server, path: Path) -> None:
    with served(path, "--node", "n,size=1M") as process:
        message = f"pybitmap: {path}: another program listens there\n"
        assert process.communicate(timeout=20)[1] == message
        assert process.returncode == 2


# ---- the client of QEMU's own -----------------------------------------------------------------


def test_the_client_of_qemu(server: Server, path: Path) -> None:
    qmp = pytest.importorskip("qemu.qmp", reason="QEMU's client: pip install qemu.qmp")

    async def drive() -> None:
        client = qmp.QMPClient("test")
        await client.connect(str(path))
        names = [each["name"] for each in await client.execute("query-commands")]
        assert "transaction" in names
        assert (await client.execute("query-status"))["running"] is True
        assert await client.execute("query-name") == {}
        schema = await client.execute("query-qmp-schema")
        assert set(names) <= {each["name"] for each in schema}
        assert client.greeting is not None
        assert client.greeting.QMP.version == await client.execute("query-version")
        arguments = {"node": "n", "name": "b"}
        await client.execute("block-dirty-bitmap-add", arguments)
        with pytest.raises(qmp.ExecuteError, match="Bitmap already exists: b"):
            await client.execute("block-dirty-bitmap-add", arguments)
        actions = [
            {"type": "block-dirty-bitmap-disable", "data": arguments},
            {"type": "abort", "data": {}},
        ]
        with pytest.raises(qmp.ExecuteError, match="Transaction aborted using Abort action"):
            await client.execute("transaction", {"actions": actions})
        nodes = await client.execute("query-named-block-nodes")
        assert nodes[0]["dirty-bitmaps"][0]["recording"] is True
        await asyncio.gather(*(client.execute("query-block") for _ in range(20)))
        await client.disconnect()

    asyncio.run(drive())


def test_the_shell_of_qemu(server: Server, path: Path) -> None:
    pytest.importorskip("qemu.qmp", reason="QEMU's client: pip install qemu.qmp")
    pytest.importorskip("qemu.qmp.qmp_shell", reason="this qemu.qmp has no qmp-shell")
    lines = (
        "query-status\n"
        "block-dirty-bitmap-add node=n name=b granularity=4096\n"
        "query-named-block-nodes\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "from qemu.qmp.qmp_shell import main; main()", str(path)],
        input=lines,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HOME": str(path.parent)},
    )
    assert f"Connected to QEMU {__version__}" in done.stdout, done.stderr
    assert '{"return": {"running": true, "status": "running"}}' in done.stdout
    assert '{"return": {}}' in done.stdout
    assert '"granularity": 4096' in done.stdout
