# SPDX-License-Identifier: MIT
"""Many tasks on any executor: a window of them at a time, each answered once, whatever dies.

Executors of a caller (threads, ``dask.distributed``, ...) are used as they are: what breaks them
ends the run. Processes of our own are made anew when one dies. Which of the tasks that were under
way killed it is not known, so these go again one at a time, and one that kills its process then,
alone, is answered without::

    under way          a b c d        one process dies
    one at a time      a              answered
                       b              dies: b is the one, and gets the answer of `died`
                       c, d           answered, by new processes
    the rest           e f g ...

Visitors. Kill: our processes end when this one does (each waits for that in a thread). Fork: a
child of this process has no part in it. Drop, Ctrl-C: what is under way is cancelled, and processes
of ours are ended, also those that hang. Twin: runs know nothing of each other.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from concurrent.futures.process import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing.connection import wait as wait_for
from typing import Any, Callable, Generic, TypeVar

from ..._fork import Process
from ...errors import ExecutorError

_Task = TypeVar("_Task")
_Answer = TypeVar("_Answer")

#: Tasks under way at a time: of a caller's executor, whose workers nobody counts; and for each
#: process of ours. So many answers are in memory at most.
AHEAD, AHEAD_OF_EACH = 32, 2

#: Times that processes of ours are started, if they are killed before they have begun.
STARTS = 3


def answers(
    function: Callable[[_Task], _Answer],
    tasks: Iterable[_Task],
    died: Callable[[_Task], _Answer],
    *,
    executor: Executor | None = None,
    processes: int | None = None,
) -> Generator[_Answer, None, None]:
    """What a function makes of each task, as it comes; the function raises for no task.

    :param function: one that can be pickled, as tasks and answers
    :param died: the answer for a task whose process died, and again when it was alone
    :param executor: that runs them; None: processes of our own
    :param processes: how many of these; None: as many as there are processors for us
    :raises ExecutorError: if the caller's executor broke, or processes cannot be started
    """
    if executor is not None:
        yield from _on(executor, function, deque(tasks))
        return
    count = processes or _processors()
    waiting = deque(tasks)
    suspects: deque[_Task] = deque()
    while waiting or suspects:
        with _Pool(count) as pool:
            running = None
            while (waiting or suspects) and (running is None or running.error is None):
                alone = bool(suspects)
                running = _Running(pool.executor, function, suspects if alone else waiting)
                yield from running.answers(1 if alone else AHEAD_OF_EACH * count)
                if alone:
                    yield from map(died, running.lost)
                else:
                    suspects.extend(running.lost)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _on(
    executor: Executor, function: Callable[[_Task], _Answer], tasks: deque[_Task]
) -> Iterator[_Answer]:
    running = _Running(executor, function, tasks)
    try:
        yield from running.answers(AHEAD)
    except (Exception, asyncio.CancelledError) as error:  # whatever it has for that
        raise _broke(error) from error
    if running.error is not None:
        raise _broke(running.error) from running.error


def _broke(error: BaseException) -> ExecutorError:
    return ExecutorError(f"the executor broke: {_words(error)}")


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class _Running(Generic[_Task, _Answer]):
    """Tasks that an executor works on.

    :param tasks: taken from the left
    """

    def __init__(
        self, executor: Executor, function: Callable[[_Task], _Answer], tasks: deque[_Task]
    ) -> None:
        self._executor, self._function, self._tasks = executor, function, tasks
        self._process = Process()
        #: Why the executor broke; None: it did not.
        self.error: BaseException | None = None
        #: Tasks that were under way then, and have no answer.
        self.lost: list[_Task] = []

    def answers(self, ahead: int) -> Iterator[_Answer]:
        """Until all are answered, or the executor broke; see :attr:`error`."""
        under_way: dict[Future[_Answer], _Task] = {}
        try:
            while self.error is None and (self._tasks or under_way):
                self._submit(under_way, ahead)
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from self._answer(future, under_way.pop(future))
            # Broken, if there are any left: what had come to its end before is answered.
            while under_way:
                future, task = under_way.popitem()
                yield from self._answer(future, task)
        finally:
            # In the child of a fork a thread that is not there may have one locked.
            if self._process.is_this():
                for future in under_way:
                    future.cancel()

    def _submit(self, under_way: dict[Future[_Answer], _Task], ahead: int) -> None:
        try:
            while self._tasks and len(under_way) < ahead:
                future = self._executor.submit(self._function, self._tasks[0])
                under_way[future] = self._tasks.popleft()
        except BrokenExecutor as error:
            self.error = error

    def _answer(self, future: Future[_Answer], task: _Task) -> Iterator[_Answer]:
        try:
            answer = future.result()
        except BrokenExecutor as error:
            self.error = error
            self.lost.append(task)
        else:
            yield answer


class _Processes(ProcessPoolExecutor):
    """Processes that Ctrl-C does not reach before they are told to ignore it."""

    def submit(self, *args: Any, **options: Any) -> Future[Any]:
        # It starts them, and they inherit the mask.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return super().submit(*args, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Pool:
    """Processes of our own, which end with this block, or with this process.

    :raises ExecutorError: if they cannot be started
    """

    def __init__(self, count: int) -> None:
        # Not forked: this process may have threads, with locks that nobody opens in a child.
        context = multiprocessing.get_context("spawn")
        self._process = Process()
        for left in reversed(range(STARTS)):
            self.executor = _Processes(count, context, _begin)
            workers: list[Any] = []
            try:
                begun = self.executor.submit(os.getpid)
                workers += self._workers()
                begun.result()
                return
            except BrokenExecutor as error:
                self._end()
                if any((each.exitcode or 0) > 0 for each in workers):
                    raise ExecutorError(
                        "processes cannot be started: the program that asks for them must be a "
                        "file or a module that can be imported again (its work below `if __name__ "
                        "== '__main__':`), or hand over an executor of its own"
                    ) from error
                if not left:
                    raise ExecutorError(
                        f"processes cannot be started: {STARTS} were killed while they began"
                    ) from error
            except BaseException:
                self._end()
                raise

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def _workers(self) -> list[Any]:
        return list((getattr(self.executor, "_processes", None) or {}).values())

    def _end(self) -> None:
        if not self._process.is_this():  # a child of a fork, unwinding
            return
        # One may hang in a read of a disk that does not answer.
        for process in self._workers():
            with suppress(OSError, ValueError):
                process.kill()
        self.executor.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """In each process: Ctrl-C is for who started it, and it ends when that one does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)
