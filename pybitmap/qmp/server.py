# SPDX-License-Identifier: MIT
"""A QMP server over a unix socket.

One thread serves all clients, so commands run one at a time, and in the order in which each client
sends them. What a client may cost is bounded: the bytes, the depth and the number of values of a
request, the bytes of a reply, and the replies that it has not read, beyond which it is not listened
to. A request that is no JSON is answered by an error and the next one is looked for; one that
exceeds a bound is answered by an error and the connection is closed. The other clients go on.

So is what all of them cost, and none keeps the others from being served. Who holds what others need
gives way once it has been silent for :data:`PATIENCE`, and no sooner: its connection is closed, as
if it had left.

- A connection, of which there are :data:`MAX_CLIENTS`: when one more wants to come, the one that
  has been silent longest, of those that have nothing frozen. If all have, it waits until one ends.
- Memory: when requests that are not whole come to :data:`ALL_ASKED`, those longer than a packet
  wait; when replies that are not read come to :data:`ALL_UNREAD`, all commands wait. It is the
  client that has owed longest (the rest of its request, or the reading of its replies) that goes,
  whatever it has frozen: that is put back.

A request is a JSON object, however it is cut into packets and lines. A control character within a
string, which JSON forbids, and the byte 0xFF end whatever they are in: after half a request, a line
feed is enough to begin anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import selectors
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread, current_thread, main_thread
from time import monotonic, sleep
from types import FrameType, TracebackType
from typing import Any

from ..block.graph import BlockGraph
from ..errors import BitmapError
from .commands import (
    CommandNotFound,
    Reply,
    Session,
    answer,
    check,
    error_reply,
    query_version,
)
from .schema import CAPABILITIES, SchemaError

MAX_REQUEST = 16 << 20
MAX_DEPTH = 256
MAX_VALUES = 1 << 19
MAX_DIGITS = 400  # of a number

#: Bytes of a reply, and of the "id" in it.
MAX_REPLY = 4 << 20
MAX_ID = 1 << 16

MAX_CLIENTS = 64
#: Bytes of requests, and of replies, of all clients together, but for what exceeds it: a packet of
#: each client, and one reply.
ALL_ASKED, ALL_UNREAD = 32 << 20, 16 << 20
#: Seconds for which a connection is kept although others need what it holds.
PATIENCE = 5.0

_CHUNK = 1 << 16
_MAX_UNREAD = 1 << 16  # bytes of replies, from which on no more commands of a client are run
_COMMANDS_AT_ONCE = 32  # of one client, before the others have their turn
_FAREWELL = 1.0  # seconds for clients to take their last replies
_TURN = 1.0  # seconds to wait for others that start at the same path


# ---- requests ---------------------------------------------------------------------------------


class TooMuchError(Exception):
    """A request exceeds a bound, in QEMU's words."""


class JsonStream:
    """Cuts a stream of bytes into JSON values: ``feed`` some, then take ``next`` until None."""

    _BLANK = re.compile(rb"[ \t\r\n]*")
    _STRUCTURE = re.compile(rb'["{}\[\]\xff]')
    _STRING = re.compile(rb'["\\\x00-\x1f\xff]')
    _SCALAR = re.compile(rb'[ \t\r\n{}\[\],:"\xff]')

    def __init__(self, max_request: int = MAX_REQUEST) -> None:
        self._max = max_request
        self._data = bytearray()
        self._begin = 0  # of the value that is being read
        self._at = 0  # seen up to here
        self._depth = 0
        self._in_string = False

    @property
    def held(self) -> int:
        """Bytes that were fed and not taken, but for blanks."""
        return len(self._data) - self._begin

    def feed(self, data: bytes) -> None:
        del self._data[: self._begin]
        self._at -= self._begin
        self._begin = 0
        self._data += data

    def next(self) -> bytes | None:
        """The next value, right or wrong; None if what is there does not end one.

        :raises TooMuchError: if it exceeds a bound; the stream cannot be used any more
        """
        data = self._data
        if self._at == self._begin:
            self._begin = self._at = self._end_of(self._BLANK, self._begin)
        while self._at < len(data):
            if self._in_string:
                found = self._STRING.search(data, self._at)
                if found is None:
                    self._at = len(data)
                    break
                byte = data[found.start()]
                if byte == 0x5C:  # a backslash, and what it escapes
                    if found.end() == len(data):
                        self._at = found.start()
                        break
                    # What ends everything cannot be escaped.
                    escaped = data[found.end()]
                    self._at = found.end() + (0x20 <= escaped < 0xFF)
                    continue
                self._at = found.end()
                if byte != 0x22:
                    return self._take()
                self._in_string = False
                if not self._depth:
                    return self._take()
            elif data[self._begin] in b'"{[':
                found = self._STRUCTURE.search(data, self._at)
                if found is None:
                    self._at = len(data)
                    break
                self._at = found.end()
                byte = data[found.start()]
                if byte == 0x22:
                    self._in_string = True
                elif byte == 0xFF:
                    return self._take()
                elif byte in b"{[":
                    self._depth += 1
                    if self._depth > MAX_DEPTH:
                        raise TooMuchError("JSON nesting depth limit exceeded")
                else:
                    self._depth -= 1
                    if not self._depth:
                        return self._take()
            else:  # a number, a word, or something that no value begins with
                found = self._SCALAR.search(data, self._at)
                if found is None:
                    self._at = len(data)
                    break
                self._at = max(found.start(), self._begin + 1)
                return self._take()
        if self._at - self._begin > self._max:
            raise TooMuchError("JSON token size limit exceeded")
        return None

    def _end_of(self, pattern: re.Pattern[bytes], start: int) -> int:
        found = pattern.match(self._data, start)
        return start if found is None else found.end()

    def _take(self) -> bytes:
        if self._at - self._begin > self._max:
            raise TooMuchError("JSON token size limit exceeded")
        value = bytes(self._data[self._begin : self._at])
        if sum(map(value.count, (b",", b"{", b"["))) > MAX_VALUES:
            raise TooMuchError("JSON token count limit exceeded")
        self._begin = self._at
        self._depth, self._in_string = 0, False
        return value


def parse(text: bytes) -> Any:
    """One JSON value.

    :raises SchemaError: if it is none
    """
    try:
        value = json.loads(
            text.decode(),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
        if b"\\u" in text:  # half a surrogate pair is no character
            json.dumps(value, ensure_ascii=False).encode()
    except SchemaError:
        raise
    except UnicodeError:
        raise SchemaError("JSON parse error, invalid Unicode character") from None
    except json.JSONDecodeError as error:
        raise SchemaError(f"JSON parse error, {error.msg[:1].lower()}{error.msg[1:]}") from None
    except (ValueError, RecursionError):
        raise SchemaError("JSON parse error") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise SchemaError("JSON parse error, duplicate key")
    return members


def _integer(digits: str) -> int | float:
    """As QEMU has them: beyond 64 bits it is a floating point number."""
    if len(digits) <= 20:
        value = int(digits)
        if -(1 << 63) <= value < 1 << 64:
            return value
    return _number(digits)


def _number(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_DIGITS else math.inf
    if math.isinf(value):
        raise SchemaError("JSON parse error, number out of range")
    return value


def _constant(word: str) -> Any:
    raise SchemaError(f"JSON parse error, invalid keyword '{word}'")


# ---- clients ----------------------------------------------------------------------------------


class _Client:
    """A connection: its request that is being received, and its replies that are being sent."""

    def __init__(self, graph: BlockGraph, sock: socket.socket, max_request: int) -> None:
        self.sock = sock
        self.stream = JsonStream(max_request)
        self.unsent = bytearray()
        self.ended = False  # it sends no more
        self.closing = False  # once everything is sent
        self.waiting = False  # may there be a command that was received, but not run?
        self.quit = False
        #: When it last sent, or read, something.
        self.moved = monotonic()
        self._asking_since = self._unread_since = self.moved
        self._session = Session(graph)
        self._negotiated = False
        self._send({"QMP": {"version": query_version(), "capabilities": []}})

    def receive(self) -> None:
        """
        :raises OSError: if the connection is of no use any more
        """
        data = self.sock.recv(_CHUNK)
        if not data:
            self.ended = True
        self.moved = monotonic()
        if not self.stream.held:
            self._asking_since = self.moved
        self.stream.feed(data)
        self.waiting = True

    def asking_since(self) -> float:
        """When half a request was begun; without end if there is none."""
        return self._asking_since if self.stream.held and not self.waiting else math.inf

    def unread_since(self) -> float:
        """Since when there were replies at any time; without end if there are none."""
        return self._unread_since if self.unsent else math.inf

    @property
    def has_frozen(self) -> bool:
        return self._session.has_frozen

    def run(self, room: Callable[[], bool]) -> None:
        """Some of the commands that were received, while there is room for replies."""
        for _ in range(_COMMANDS_AT_ONCE):
            if self.closing or len(self.unsent) >= _MAX_UNREAD or not room():
                return
            try:
                text = self.stream.next()
            except TooMuchError as error:
                self._send(error_reply(str(error)))
                self.closing = True
                return
            if text is None:
                self.waiting = False
                self.closing = self.ended  # half a request is forgotten
                return
            self._asking_since = self.moved
            self._run(text)

    def _run(self, text: bytes) -> None:
        try:
            command = parse(text)
        except SchemaError as error:
            self._send(error_reply(str(error)))
            return
        if len(text) > MAX_ID and isinstance(command, dict):
            nbytes = len(_encoded(command.get("id")))
            if nbytes > MAX_ID:  # before anything is done of which the reply would be too long
                desc = f"QMP input member 'id' has {nbytes} bytes, and can have {MAX_ID}"
                self._send(error_reply(desc))
                return
        if not self._negotiated:
            self._send(answer(command, self._negotiate))
            return
        reply = self._session.execute(command)
        self._send(reply)
        if "return" in reply and command["execute"] == "quit":
            self.quit = self.closing = True

    def _negotiate(self, name: str, arguments: dict[str, Any]) -> Reply:
        if name != "qmp_capabilities":
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        check(arguments, CAPABILITIES)
        for capability in arguments.get("enable", ()):
            raise SchemaError(f"Capability {capability} not available")
        self._negotiated = True
        return {}

    def _send(self, reply: Reply) -> None:
        data = _encoded(reply)
        if len(data) > MAX_REPLY:  # of a query, or an error: nothing was changed
            desc = f"The reply has {len(data)} bytes, and at most {MAX_REPLY} are sent"
            error = error_reply(desc)
            if "id" in reply:
                error["id"] = reply["id"]
            data = _encoded(error)
        if not self.unsent:
            self._unread_since = monotonic()
        self.unsent += data

    def flush(self) -> None:
        """As much as can be sent now.

        :raises OSError: if the connection is of no use any more
        """
        while self.unsent:
            try:
                sent = self.sock.send(self.unsent[:_CHUNK])
            except BlockingIOError:
                return
            self.moved = monotonic()
            del self.unsent[:sent]

    def close(self) -> None:
        """What it has frozen is put back."""
        self.sock.close()
        try:
            self._session.close()
        except BitmapError:
            logging.getLogger(__name__).exception("of a client that has left")

    def events(self, room: bool) -> int:
        """What to wait for, if there is room for requests of any length, or not."""
        reading = not (self.closing or self.waiting or self.ended)
        reading &= room or not self.stream.held
        return (selectors.EVENT_READ if reading else 0) | (
            selectors.EVENT_WRITE if self.unsent else 0
        )


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\r\n"


class Server:
    """Serves a graph on a unix socket, until ``stop``, or a client's ``quit``.

    ``with Server(graph, path):`` does so in a thread of its own; ``run`` in the caller's.

    >>> import json, socket
    >>> from pybitmap import BlockGraph
    >>> with Server(BlockGraph(), "qmp.sock"), socket.socket(socket.AF_UNIX) as client:
    ...     client.connect("qmp.sock")
    ...     list(json.loads(client.recv(4096))["QMP"])
    ['version', 'capabilities']
    """

    def __init__(self, graph: BlockGraph, path: str, *, max_request: int = MAX_REQUEST) -> None:
        self._graph = graph
        self._path = os.fspath(path)
        self._file = os.path.abspath(self._path) if self._path else ""
        self._max_request = max_request
        self._thread: Thread | None = None
        self._clients: dict[int, _Client] = {}
        self._listener: socket.socket | None = None
        self._identity = (0, 0)
        self._stopped = False
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)

    # ---- from outside -----------------------------------------------------------------------

    def listen(self) -> None:
        """Create the socket; from now on clients can connect.

        :raises OSError: if that cannot be, as when another program listens there

        >>> import os
        >>> from pybitmap import BlockGraph
        >>> server = Server(BlockGraph(), "qmp.sock")
        >>> server.listen()
        >>> os.path.exists("qmp.sock")
        True
        >>> server.close()
        >>> os.path.exists("qmp.sock")
        False
        """
        if self._listener is None:
            self._listener, self._identity = listen_at(self._path)

    def start(self) -> Server:
        """Listen, and serve in a thread.

        :raises OSError: see :meth:`listen`

        >>> from pybitmap import BlockGraph
        >>> server = Server(BlockGraph(), "qmp.sock").start()
        >>> server.close()
        """
        try:
            self.listen()
        except BaseException:
            self._close()
            raise
        self._thread = Thread(target=self.run, name="pybitmap-qmp", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ask to end; may be called from any thread, from a signal handler, and twice.

        >>> from pybitmap import BlockGraph
        >>> server = Server(BlockGraph(), "qmp.sock").start()
        >>> server.stop()
        >>> server.join()
        """
        self._stopped = True
        with suppress(OSError):  # full: it wakes up anyway; closed: it has ended
            self._waker.send(b"x")

    def join(self) -> None:
        """Wait for the end of the thread that :meth:`start` began.

        >>> from pybitmap import BlockGraph
        >>> server = Server(BlockGraph(), "qmp.sock").start()
        >>> server.stop()
        >>> server.join()                           # by now, its socket is gone
        """
        if self._thread is not None and self._thread is not current_thread():
            self._thread.join()

    def close(self) -> None:
        """Stop, wait, and remove the socket's file; may be called twice.

        >>> from pybitmap import BlockGraph
        >>> server = Server(BlockGraph(), "qmp.sock").start()
        >>> server.close(); server.close()
        """
        self.stop()
        self.join()
        self._close()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _waking(self) -> Iterator[socket.socket]:
        """What wakes the loop if it is written to; here also when the server is closed."""
        with self._wake.dup(), self._waker.dup() as waker:
            yield waker

    # ---- the loop ---------------------------------------------------------------------------

    def run(self, ready: Callable[[], object] = lambda: None) -> None:
        """Serve until the end; then all connections are closed and the socket's file is gone.

        :param ready: called when clients can connect
        :raises OSError: see :meth:`listen`

        >>> from pybitmap import BlockGraph
        >>> server = Server(BlockGraph(), "qmp.sock")
        >>> server.run(ready=server.stop)           # in a program, a signal handler stops it
        """
        try:
            self.listen()
            ready()
            while not self._stopped:
                self._turn(None)
            self._bid_farewell()
        finally:
            self._close()

    def _turn(self, timeout: float | None) -> None:
        """Wait for something to happen, and see to it."""
        timeouts = [math.inf if timeout is None else timeout]
        timeouts.append(self._make_room(self._may_answer, _Client.unread_since))
        timeouts.append(self._make_room(self._may_ask, _Client.asking_since))
        may_ask, may_run = self._may_ask(), self._may_answer() and not self._stopped
        listener = self._listener if not self._stopped else None
        if listener and len(self._clients) >= MAX_CLIENTS:
            silent = self._longest_silent()
            rest = math.inf if silent is None else silent.moved + PATIENCE - monotonic()
            if rest > 0:
                listener = None
                timeouts.append(rest)
        with selectors.PollSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            if listener:
                selector.register(listener, selectors.EVENT_READ)
            for client in self._clients.values():
                if may_run and client.waiting and len(client.unsent) < _MAX_UNREAD:
                    timeouts.append(0)
                events = client.events(may_ask)
                if events:
                    selector.register(client.sock, events, client)
            first = max(0, min(timeouts))
            ready = selector.select(None if math.isinf(first) else first)
        readable, incoming = set(), False
        for key, events in ready:
            if key.data is not None and events & selectors.EVENT_READ:
                readable.add(key.data)
            elif key.fileobj is self._wake:
                self._wake.recv(_CHUNK)
            elif key.fileobj is listener:
                incoming = True
        for client in list(self._clients.values()):
            try:
                if client in readable:
                    client.receive()
                if client.waiting and not self._stopped:
                    client.run(self._may_answer)
                client.flush()
            except (OSError, MemoryError):
                self._drop(client)
                continue
            if client.quit:
                self._stopped = True
            if client.closing and not client.unsent:
                self._drop(client)
        if incoming:  # last: now it is known who was silent
            self._accept()

    def _may_ask(self) -> bool:
        """Is there room for requests that are longer than a packet?"""
        return sum(client.stream.held for client in self._clients.values()) < ALL_ASKED

    def _may_answer(self) -> bool:
        """Is there room for replies?"""
        return sum(len(client.unsent) for client in self._clients.values()) < ALL_UNREAD

    def _make_room(self, enough: Callable[[], bool], since: Callable[[_Client], float]) -> float:
        """Drop who has owed longest; and how long to bear with the next one, in seconds."""
        while not enough():
            debtor = min(self._clients.values(), key=since)
            left = since(debtor) + PATIENCE - monotonic()
            if left > 0:
                return left
            self._drop(debtor)
        return math.inf

    def _longest_silent(self) -> _Client | None:
        """Of those that may give way."""
        idle = [client for client in self._clients.values() if not client.has_frozen]
        return min(idle, key=lambda client: client.moved, default=None)

    def _accept(self) -> None:
        assert self._listener is not None
        if len(self._clients) >= MAX_CLIENTS:
            silent = self._longest_silent()
            if silent is None or monotonic() < silent.moved + PATIENCE:
                return
            self._drop(silent)
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # it stays there: do not spin
                sleep(0.05)
            return
        sock.setblocking(False)
        self._clients[sock.fileno()] = _Client(self._graph, sock, self._max_request)

    def _drop(self, client: _Client) -> None:
        del self._clients[client.sock.fileno()]
        client.close()

    def _bid_farewell(self) -> None:
        for client in self._clients.values():
            client.closing = True
        until = monotonic() + _FAREWELL
        while any(each.unsent for each in self._clients.values()):
            left = until - monotonic()
            if left <= 0:
                return
            self._turn(left)

    def _close(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        if self._listener is not None:
            _unlink(self._file, self._identity)
            self._listener.close()
            self._listener = None
        self._wake.close()
        self._waker.close()


def serve(graph: BlockGraph, path: str, ready: Callable[[], object] = lambda: None) -> None:
    """Serve a graph on a unix socket, until ``quit``, and in the main thread SIGINT, SIGTERM or,
    unless it is ignored, SIGHUP.

    :param ready: called when clients can connect
    :raises OSError: if the socket cannot be created, as when another program listens there

    >>> import socket, threading
    >>> from pybitmap import BlockGraph
    >>> def client():
    ...     with socket.socket(socket.AF_UNIX) as connection:
    ...         connection.connect("qmp.sock")
    ...         connection.sendall(b'{"execute": "qmp_capabilities"} {"execute": "quit"}')
    ...         while connection.recv(4096):
    ...             pass
    >>> serve(BlockGraph(), "qmp.sock", ready=threading.Thread(target=client).start)
    """
    server = Server(graph, path)
    with _signals(server):
        server.run(ready)


@contextmanager
def _signals(server: Server) -> Iterator[None]:
    if current_thread() is not main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        server.stop()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {each: signal.signal(each, stop) for each in numbers}
    # One that comes right before the wait, or to another thread, interrupts nothing: it writes.
    with server._waking() as waker:
        descriptor = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for each, handler in before.items():
                signal.signal(each, handler)


# ---- the socket -------------------------------------------------------------------------------


def listen_at(path: str) -> tuple[socket.socket, tuple[int, int]]:
    """A socket that only its owner can connect to, and what tells its file from others.

    One that a killed process has left is replaced.

    :raises OSError: if that cannot be, as when another program listens there
    """
    if not path or "\0" in path:  # names outside the file system, which have no mode
        raise OSError(errno.EINVAL, "not the path of a socket", path or "''")
    if len(os.fsencode(path)) >= 104:
        raise OSError(errno.ENAMETOOLONG, "too long for the path of a socket", path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _turn_of(os.path.dirname(path) or "."):
            _bind(sock, path)
            sock.listen(MAX_CLIENTS)
            found = os.lstat(path)
    except OSError as error:
        sock.close()
        error.filename = path
        raise
    sock.setblocking(False)
    return sock, (found.st_dev, found.st_ino)


def _bind(sock: socket.socket, path: str) -> None:
    """
    :raises OSError: if something is there that is not a socket which nobody listens on
    """
    try:
        _bind_private(sock, path)
        return
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    with suppress(FileNotFoundError):  # gone by now
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "exists, and is no socket")
        _check_stale(path)
        os.unlink(path)
    _bind_private(sock, path)


def _check_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # its queue may be full
        result = probe.connect_ex(path)
    if result == errno.ENOENT:
        raise FileNotFoundError(result, os.strerror(result))
    if result == errno.EACCES:
        raise PermissionError(result, "a socket of somebody else is there")
    if result != errno.ECONNREFUSED:
        raise OSError(errno.EADDRINUSE, "another program listens there")


@contextmanager
def _turn_of(directory: str) -> Iterator[None]:
    """One after the other, so that of two who find a stale socket, the second does not remove the
    first one's new, on which it may not listen yet.

    By a lock that anybody may have: who starts has it for an instant, and whoever keeps it longer
    keeps nobody from starting. Where it is not to be had, there is just that race.
    """
    fd = -1
    try:
        with suppress(OSError):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK)
            until = monotonic() + _TURN
            while not _locked(fd) and monotonic() < until:
                sleep(0.01)
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _locked(fd: int) -> bool:
    """
    :raises OSError: if there are no locks
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _bind_private(sock: socket.socket, path: str) -> None:
    """Bind with mode 0600, at no time with another."""
    if sys.platform == "linux":
        # The file takes the mode of the socket.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(path)
        return
    before = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def _unlink(path: str, identity: tuple[int, int]) -> None:
    """Remove the file, unless somebody has put another one there.

    While its socket listens still, nobody takes it for stale, so no lock is needed.
    """
    with suppress(OSError):
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) == identity:
            os.unlink(path)
