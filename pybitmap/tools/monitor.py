# SPDX-License-Identifier: MIT
"""Monitor: a client of QMP, the monitor of a QEMU that runs, for programs that wait for answers.

A thin layer over QEMU's own client, `qemu.qmp <https://pypi.org/project/qemu.qmp/>`_, which is for
asyncio. Here each call runs an event loop of the monitor's own until its answer is there: there is
no thread, and nothing happens between two calls.

QEMU serves one client of a monitor at a time. Whoever comes second is neither refused nor greeted,
so each wait has an end.

Whatever ends a call half way, as Ctrl-C does, may have come in the middle of the client's own code.
So the connection is closed then, and the next call makes a new one, to the same QEMU or to none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import selectors
import socket
import struct
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from itertools import count
from threading import RLock
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from .._fork import Process, in_child
from .._guard import Guard
from ..errors import BitmapError, ClosedError, InvalidError, StateError, UnsupportedError

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

__all__ = [
    "CommandError",
    "DisconnectedError",
    "Monitor",
    "MonitorError",
    "UnansweredError",
    "action",
]

#: As QEMU sends it: "event", "data" where there is any, and "timestamp".
Event = dict[str, Any]
_Numbered = deque[tuple[int, Event]]
#: Of a transaction: its "type" and its "data".
Action = dict[str, Any]

TIMEOUT = 30.0  # seconds for an answer
PATIENCE = 5.0  # seconds for the greeting

_FAREWELL = 1.0  # seconds for what is left of a connection to end
_LONGEST = 64 << 20  # bytes of an answer
_MOST_EVENTS = 1 << 14  # that are kept for whoever asks

_T = TypeVar("_T")


class MonitorError(BitmapError):
    """What was asked of a monitor was not done, or it is not known whether it was.

    >>> try:
    ...     monitor.execute("stop")
    ... except MonitorError as error:
    ...     error.command, error.error_class, error.text
    ('stop', 'CommandNotFound', 'The command stop has not been found')
    """

    def __init__(
        self,
        message: str,
        command: str | None = None,
        error_class: str | None = None,
        text: str | None = None,
    ) -> None:
        super().__init__(message)
        self.command = command  #: that was asked for, if any was
        self.error_class = error_class  #: QEMU's, as "GenericError" or "CommandNotFound"
        self.text = text  #: QEMU's words

    def __reduce__(self) -> tuple[type[MonitorError], tuple[str | None, ...]]:
        return type(self), (str(self), self.command, self.error_class, self.text)

    # OSError would show its errno.
    __str__ = Exception.__str__


class CommandError(MonitorError):
    """QEMU has refused a command, or failed at it; its class and its words are there.

    >>> monitor.execute("block-dirty-bitmap-clear", node="disk0", name="weekly")
    Traceback (most recent call last):
    pybitmap.tools.monitor.CommandError: block-dirty-bitmap-clear: Dirty bitmap 'weekly' not found
    """


class DisconnectedError(MonitorError, ConnectionError):
    """There is no monitor, or it is gone. Whether ``command`` was done is not known.

    >>> try:
    ...     Monitor("vm1.qmp")
    ... except DisconnectedError as error:
    ...     print(error)
    vm1.qmp: no monitor listens there: No such file or directory
    """


class UnansweredError(MonitorError, TimeoutError):
    """Nothing came in time. Whether ``command`` was done, or will be, is not known.

    >>> monitor.wait(lambda event: event["event"] == "SHUTDOWN", timeout=0.01)
    Traceback (most recent call last):
    pybitmap.tools.monitor.UnansweredError: vm0.qmp: no such event within 0.01 s
    """


def renamed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of Python's as QMP has them: ``job_id`` is ``job-id``; what is None is left out."""
    return {name.replace("_", "-"): value for name, value in arguments.items() if value is not None}


def action(kind: str, data: Mapping[str, Any] | None = None, /, **more: Any) -> Action:
    """An action of a transaction; its data as the arguments of :meth:`Monitor.execute`.

    >>> action("block-dirty-bitmap-clear", node="disk0", name="daily")
    {'type': 'block-dirty-bitmap-clear', 'data': {'node': 'disk0', 'name': 'daily'}}
    """
    return {"type": kind, "data": {**(data or {}), **renamed(more)}}


class Monitor(Guard):
    """The monitor of a QEMU, or of a qemu-storage-daemon, at a unix socket.

    Writer: what a guest, or another monitor's client, does between two calls is not kept out; one
    :meth:`transaction` is one instant. Kill: QEMU goes on, with what it was told. Fork: a child has
    no connection, and is refused; it makes a monitor of its own. Drop: ResourceWarning, and the
    connection is closed. Interruption: see the module; events of the time in between are lost, and
    what was asked for may have been done. Twin: QEMU lets a second client wait, here for at most
    ``patience``. One call at a time: another thread waits for its turn, a signal handler or a
    callback amid a call is refused.

    :param path: of the socket
    :param timeout: seconds for an answer, of any command; may be set later, too
    :param patience: seconds until QEMU has to have greeted
    :raises DisconnectedError: if nobody listens there
    :raises UnansweredError: if nobody greets, as when another client has the monitor
    :raises MonitorError: if what is there is no monitor
    :raises UnsupportedError: without the package qemu.qmp
    :raises InvalidError: if a time-out is not positive, or the path empty, or longer than that of a
        socket can be
    :raises OSError: if the socket cannot be reached, as for a lack of rights

    Examples here, of its methods too, have a ``monitor`` of a machine that has a node ``disk0`` of
    1 GiB, with a bitmap ``daily`` in which 64 KiB are dirty.

    >>> monitor = Monitor("vm0.qmp")
    >>> monitor
    <Monitor of vm0.qmp>
    >>> monitor.path, monitor.timeout, monitor.version >= (0, 2, 0), "QEMU" in monitor.package
    ('vm0.qmp', 30.0, True, True)
    >>> monitor.close()
    >>> monitor.closed, monitor.user == os.getuid()
    (True, True)
    """

    _lock = None  # of Guard's: none is held between two calls
    _link: _Link | None = None
    _process: Process | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
    ) -> None:
        if not (timeout > 0 and patience > 0):
            raise InvalidError(f"time-outs of {timeout} and {patience} seconds: neither may be 0")
        self.path = os.fspath(path)
        self.timeout = timeout
        self._patience = patience
        self._turn = RLock()
        self._process = Process()
        self._events: _Numbered = deque(maxlen=_MOST_EVENTS)
        self._commands: frozenset[str] | None = None
        self._greeting: dict[str, Any] = {}
        self._peer: tuple[int, int] | None = None
        self._end: str | None = None  # why no new connection is made
        self._closed = False
        try:
            self._connected()
        except BaseException:
            self._close()
            raise

    # ---- life -------------------------------------------------------------------------------

    def close(self) -> None:
        """QEMU can have another client then. May be called twice.

        :raises StateError: amid a call, as in a signal handler

        >>> monitor.close()
        >>> monitor.execute("query-status")
        Traceback (most recent call last):
        pybitmap.errors.ClosedError: vm0.qmp: the monitor is closed
        """
        if self._process is None or not self._process.is_this():
            return
        self._refuse_within()
        with self._turn:
            self._close()

    def _close(self) -> None:
        try:
            self._closed = True
            self._discard()
        except BaseException:
            self._closed = True
            self._discard()
            raise

    @property
    def closed(self) -> bool:
        """Has :meth:`close` been called?"""
        return self._closed

    def _leaving(self, *_: object) -> None:
        self.close()

    def _interrupted(self) -> None:
        self.close()

    def __del__(self) -> None:
        if self._link is None or self._process is None or not self._process.is_this():
            return
        self.close()
        warnings.warn(
            f"{self!r} was dropped without close", ResourceWarning, stacklevel=1, source=self
        )

    def __repr__(self) -> str:
        return f"<Monitor of {self.path}>"

    # ---- questions --------------------------------------------------------------------------

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's, as it has said in its greeting."""
        qemu = self._greeting["qemu"]
        return qemu["major"], qemu["minor"], qemu["micro"]

    @property
    def package(self) -> str:
        """What it says of itself beside the version; may be empty."""
        return str(self._greeting.get("package", ""))

    @property
    def user(self) -> int | None:
        """Whose process QEMU is; None where the system does not tell."""
        return None if self._peer is None else self._peer[1]

    def has_command(self, name: str) -> bool:
        """Does it know this command? Asked once.

        :raises MonitorError: as :meth:`execute`

        >>> monitor.has_command("transaction"), monitor.has_command("migrate-to-the-moon")
        (True, False)
        """
        if self._commands is None:
            found = self.execute("query-commands")
            try:
                self._commands = frozenset(each["name"] for each in found)
            except (KeyError, TypeError) as error:
                raise MonitorError(
                    f"{self.path}: query-commands was not answered as by QEMU: {error}",
                    "query-commands",
                ) from None
        return name in self._commands

    # ---- commands ---------------------------------------------------------------------------

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, /, **more: Any
    ) -> Any:
        """What a command returns.

        :param arguments: by QMP's names
        :param more: further ones, by names of Python: ``job_id`` for ``job-id``; those that are
            None are left out
        :raises CommandError: if QEMU refuses it
        :raises DisconnectedError: if QEMU is gone; whether it was done is not known
        :raises UnansweredError: after ``timeout`` seconds; it may still be done
        :raises InvalidError: if JSON cannot say the arguments; a TypeError if they are of no type
            of JSON's
        :raises ClosedError: after :meth:`close`
        :raises StateError: in the child of a fork, in a coroutine, or amid another call

        >>> monitor.execute("block-dirty-bitmap-add", node="disk0", name="weekly", persistent=True)
        {}
        >>> monitor.execute("query-status")["running"]
        True
        """
        sent = {**(arguments or {}), **renamed(more)}
        try:
            json.dumps(sent, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:  # as of half a character, which the name of a file may have
            raise InvalidError(f"{command}: JSON cannot say its arguments: {error}") from None
        return self._call(command, lambda link: link.client.execute(command, sent), self.timeout)

    def transaction(
        self, actions: Iterable[Action], properties: Mapping[str, Any] | None = None
    ) -> None:
        """All of these, at one instant, or none; see :func:`action`.

        :param properties: QEMU's TransactionProperties
        :raises MonitorError: as :meth:`execute`

        >>> monitor.transaction(
        ...     [
        ...         action("block-dirty-bitmap-add", node="disk0", name="tuesday"),
        ...         action("block-dirty-bitmap-disable", node="disk0", name="daily"),
        ...     ]
        ... )
        """
        more = {} if properties is None else {"properties": dict(properties)}
        self.execute("transaction", {"actions": list(actions), **more})

    # ---- events -----------------------------------------------------------------------------

    def events(self, *names: str) -> list[Event]:
        """All that QEMU has sent until now and nobody has taken; they are taken then.

        :param names: of no others than these; none: of all
        :raises MonitorError: as :meth:`execute`, if there are none

        >>> monitor.events("BLOCK_JOB_COMPLETED")
        []
        """
        try:
            self.execute("query-version")  # what was sent before comes before the answer
        except (DisconnectedError, UnansweredError):
            if not any(_is_one_of(names, event) for _, event in list(self._events)):
                raise
        return [self._take(each) for each in list(self._events) if _is_one_of(names, each[1])]

    def _take(self, numbered: tuple[int, Event]) -> Event:
        with suppress(ValueError):  # another thread has taken it, or it was one too many
            self._events.remove(numbered)
        return numbered[1]

    def wait(self, predicate: Callable[[Event], object], timeout: float | None = None) -> Event:
        """The first event that the predicate is true of; it is taken, and the others are kept.

        Of events that nobody takes the last 16,384 are kept.

        :param timeout: seconds; None: the monitor's
        :raises DisconnectedError: if QEMU is gone before
        :raises UnansweredError: if none comes in time
        :raises ClosedError: after :meth:`close`
        :raises StateError: as :meth:`execute`

        >>> from contextlib import suppress
        >>> with suppress(UnansweredError):
        ...     monitor.wait(lambda event: event["event"] == "BLOCK_JOB_PENDING", timeout=0.01)
        """
        timeout = self.timeout if timeout is None else timeout
        end = monotonic() + timeout
        seen = -1
        while True:
            for number, event in list(self._events):
                if number > seen and predicate(event):
                    return self._take((number, event))
                seen = max(seen, number)
            left = end - monotonic()
            if left <= 0:
                raise UnansweredError(f"{self.path}: no such event within {timeout:g} s")
            self._call(None, _Link.next_event, left)

    # ---- the connection ---------------------------------------------------------------------

    def _call(
        self,
        command: str | None,
        ask: Callable[[_Link], Coroutine[Any, Any, _T]],
        seconds: float,
    ) -> _T | None:
        """None: an event did not come."""
        self._refuse()
        # Errors are raised outside: where one is on its way out of the block, Python 3.9 lets an
        # interruption come that keeps the lock.
        with self._turn:
            found, error = self._answer(command, ask, seconds)
        if error is not None:
            try:
                raise error from None
            finally:
                del error  # or its traceback and this frame refer to each other
        return found

    def _answer(
        self,
        command: str | None,
        ask: Callable[[_Link], Coroutine[Any, Any, _T]],
        seconds: float,
    ) -> tuple[_T | None, MonitorError | None]:
        """It, or what is to be raised."""
        qmp = _package()
        try:
            link = self._connected()
            return link.run(ask, seconds), None
        except qmp.ExecuteError as error:
            error.__traceback__ = None  # by which it, asyncio's future and this keep each other
            kind, text = error.error_class, str(error)
            return None, CommandError(f"{command}: {text}", command, kind, text)
        except _Late:
            if command is None:
                return None, None
            what = f"{command} was not answered within {seconds:g} s"
            return None, UnansweredError(
                f"{self.path}: {what}; it may have been done, or be done later", command
            )
        except (qmp.ExecInterruptedError, qmp.StateError):
            why = self._link.why() if self._link is not None else "it was closed"
            self._end = f"{self.path}: the connection to QEMU is gone: {why}"
            self._discard()
            what = "" if command is None else f"; whether {command} was done is not known"
            return None, DisconnectedError(self._end + what, command)
        except MonitorError as error:
            return None, error
        except qmp.QMPError as error:
            self._end = f"{self.path}: QEMU does not answer as QMP has it: {_brief(error)}"
            self._discard()
            return None, MonitorError(self._end, command)
        except BaseException:
            self._discard()
            raise

    def _refuse(self) -> None:
        assert self._process is not None
        if not self._process.is_this():
            raise StateError(
                f"{self.path}: the connection is that of process {self._process.pid}; in the child "
                "of a fork, make a Monitor anew"
            )
        if self._closed:
            raise ClosedError(f"{self.path}: the monitor is closed")
        self._refuse_within()
        if _in_coroutine():
            raise StateError(
                f"{self.path}: a Monitor waits for its answers, so a coroutine has to call it in a "
                "thread: asyncio.to_thread"
            )

    def _refuse_within(self) -> None:
        if self._turn._is_owned():  # type: ignore[attr-defined]
            raise StateError(f"{self.path}: called amid a call of the same monitor")

    def _connected(self) -> _Link:
        """What there is, or a new connection.

        :raises MonitorError: if it cannot be
        """
        if self._link is not None:
            if self._link.whole:
                return self._link
            self._discard()
        if self._end is not None:
            raise DisconnectedError(self._end)
        try:
            self._link = _Link(self._events)
            self._link.connect(self.path, self._patience)
            peer = self._link.peer()
            if self._peer not in (None, peer):
                self._end = f"{self.path}: another program listens there than before"
                raise DisconnectedError(self._end)
            self._peer = peer
            self._greeting = self._link.version()
            return self._link
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        """Close the connection, if there is one."""
        link = self._link
        if link is None:
            return
        try:
            link.close()
        except BaseException:
            link.close()
            raise
        finally:
            self._link = None


def _is_one_of(names: tuple[str, ...], event: Event) -> bool:
    return not names or event["event"] in names


def _in_coroutine() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class _Late(Exception):
    """There was no answer in time."""


class _Link:
    """One connection, and the loop that serves it.

    All of it is closed by :meth:`close`, whatever has come in between.
    """

    def __init__(self, events: _Numbered) -> None:
        self._events = events  # and nothing else of the monitor's, which goes when nobody has it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket: socket.socket | None = None
        self._client: QMPClient | None = None
        self._arrived: asyncio.Event | None = None
        self._process = Process()
        #: Has each call of this come to an end of its own?
        self.whole = True
        _links.add(self)

    # ---- life -------------------------------------------------------------------------------

    def connect(self, path: str, patience: float) -> None:
        """
        :raises MonitorError: if it cannot be
        :raises OSError: likewise
        """
        qmp = _package()
        end = monotonic() + patience
        # Of poll where there is one: the child of a fork shares epoll's entries with its parent.
        selector = getattr(selectors, "PollSelector", selectors.SelectSelector)
        self._loop = asyncio.SelectorEventLoop(selector())
        self._loop.set_exception_handler(lambda loop, context: None)
        self._socket = _socket(path, end)
        try:
            self.run(_Link._greeted, max(0.0, end - monotonic()))
        except _Late:
            raise UnansweredError(_silent(path, patience)) from None
        except qmp.ConnectError as error:
            why = error.exc
            if isinstance(why, (EOFError, ConnectionError)):
                raise DisconnectedError(f"{path}: the connection was closed at once") from None
            raise MonitorError(
                f"{path}: this is no monitor that speaks QMP: {_brief(why)}"
            ) from None
        except AssertionError:  # of qemu.qmp's, that what has just been greeted is still there
            raise DisconnectedError(f"{path}: the connection was closed at once") from None

    async def _greeted(self) -> None:
        qmp = _package()
        # Made in a coroutine, since Python 3.9 has what it is made of belong to this loop.
        client = qmp.QMPClient(readbuflen=_LONGEST)
        client.logger = logging.Logger("pybitmap.tools.monitor")
        client.logger.addHandler(logging.NullHandler())  # all that is told is an exception here
        client.events.event_filter = self._event
        self._client = client
        await client.connect(self._socket)

    def close(self) -> None:
        """May be called twice, and again where it was interrupted."""
        sock, loop = self._socket, self._loop
        if sock is not None and self._process.is_this():
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # whatever waits ends
        elif sock is not None:
            sock.close()  # the parent goes on with it
        if loop is not None and not loop.is_closed():
            # In a finalizer, another loop may run in this thread: then the rest is garbage.
            with suppress(RuntimeError):
                loop.run_until_complete(self._ended())
                loop.close()
        if sock is not None:
            sock.close()

    async def _ended(self) -> None:
        """All that the client does in this loop."""
        if self._client is not None:
            with suppress(Exception):  # why it has ended
                await asyncio.wait_for(self._client.disconnect(), _FAREWELL)
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    # ---- calls ------------------------------------------------------------------------------

    @property
    def client(self) -> QMPClient:
        assert self._client is not None
        return self._client

    def run(self, ask: Callable[[_Link], Coroutine[Any, Any, _T]], seconds: float) -> _T:
        """What it answers.

        :raises _Late: if it takes longer
        """
        assert self._loop is not None
        end = monotonic() + seconds
        self.whole = False
        try:
            found = self._loop.run_until_complete(asyncio.wait_for(ask(self), seconds))
        except asyncio.TimeoutError:
            if monotonic() < end:  # that of some signal handler, which may have torn anything
                raise
            self.whole = True
            raise _Late from None
        except _package().ExecuteError:
            self.whole = True
            raise
        self.whole = True
        return found

    def _event(self, event: Mapping[str, Any]) -> bool:
        """Keep it; for the client's own listener, whose filter this is, it is none."""
        self._events.append((next(_numbers), dict(event)))
        if self._arrived is not None:
            self._arrived.set()
        return False

    async def next_event(self) -> None:
        """
        :raises ExecInterruptedError: if QEMU is gone
        """
        qmp = _package()
        self._arrived = asyncio.Event()
        arrived = asyncio.ensure_future(self._arrived.wait())
        changed = asyncio.ensure_future(self.client.runstate_changed())
        try:
            if self.client.runstate == qmp.Runstate.RUNNING:
                await asyncio.wait({arrived, changed}, return_when=asyncio.FIRST_COMPLETED)
            if not self._arrived.is_set() and self.client.runstate != qmp.Runstate.RUNNING:
                raise qmp.ExecInterruptedError("Disconnected")
        finally:
            arrived.cancel()
            changed.cancel()

    # ---- who is there -----------------------------------------------------------------------

    def version(self) -> dict[str, Any]:
        """The "version" of the greeting.

        :raises MonitorError: if it is none
        """
        greeting = self.client.greeting
        assert greeting is not None
        found: dict[str, Any] = dict(greeting.QMP.version)
        with suppress(KeyError, TypeError):
            if all(isinstance(found["qemu"][each], int) for each in ("major", "minor", "micro")):
                return found
        raise MonitorError(f"the greeting has no version of QEMU: {_brief(found)}")

    def peer(self) -> tuple[int, int] | None:
        """The process that has made the socket, and its user, where the system tells."""
        assert self._socket is not None
        if not hasattr(socket, "SO_PEERCRED"):
            return None
        ucred = struct.Struct("iII")
        found = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, ucred.size)
        pid, user, _ = ucred.unpack(found)
        return pid, user

    def why(self) -> str:
        """Why there is no connection any more."""
        try:
            self.run(lambda link: link.client.disconnect(), PATIENCE)
        except (EOFError, ConnectionError, _Late):
            pass
        except Exception as error:
            return _brief(error)
        return "it has ended, or another client was given the monitor"


_numbers = count()
_links: WeakSet[_Link] = WeakSet()


@in_child
def _after_fork() -> None:
    """QEMU is to know when the parent has closed its monitor; the child has closed its own."""
    for link in list(_links):
        with suppress(Exception):
            link.close()


def _brief(said: object) -> str:
    """In one line, since what somebody has sent may be in it, however long."""
    text = " ".join(str(said)[:2000].split())
    return text if len(text) <= 300 else text[:300] + "..."


def _package() -> Any:
    """
    :raises UnsupportedError: if it is not installed
    """
    try:
        from qemu import qmp
    except ImportError:
        raise UnsupportedError(
            "QEMU's monitor is spoken to by the package qemu.qmp, which is not installed: "
            "pip install qemu.qmp"
        ) from None
    return qmp


def _socket(path: str, end: float) -> socket.socket:
    """A connection, once there is room in the queue of those who want one.

    :raises UnansweredError: if there is none until the end
    :raises DisconnectedError: if nobody listens there
    :raises InvalidError: if it can be no path of a socket
    :raises OSError: if it cannot be reached
    """
    if not path:  # of an unset variable of the shell
        raise InvalidError("'': no path of a socket: it is empty")
    begin = monotonic()
    while True:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.setblocking(False)
            made.connect(path)
            return made
        except BlockingIOError:
            made.close()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            made.close()
            raise DisconnectedError(f"{path}: no monitor listens there: {error.strerror}") from None
        except OSError as error:
            made.close()
            if error.errno is None:  # Python has not asked the system
                raise InvalidError(f"{path}: no path of a socket: {error}") from None
            error.filename = path
            raise
        except BaseException:
            made.close()
            raise
        if monotonic() > end:
            raise UnansweredError(_silent(path, end - begin))
        sleep(0.01)


def _silent(path: str, seconds: float) -> str:
    return (
        f"{path}: no greeting within {seconds:g} s: another client is on this monitor, which "
        "serves one at a time, or QEMU hangs. Close that one, or give QEMU one more monitor: "
        "-qmp unix:PATH,server=on,wait=off"
    )
