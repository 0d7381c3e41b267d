# SPDX-License-Identifier: MIT
"""Guard: a context manager that an interruption does not tear."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._entry import in_front


class PythonGuard:
    """A context manager that leaves nothing half done, whatever a signal handler raises.

    With ``_lock``, if it is not None, held from before ``_entered(nested)``, of which ``with`` gets
    the answer, until after ``_leaving``; ``nested``: this thread had it before. Where one of the
    two raises, ``_interrupted`` is called as well, before the lock goes: it brings to its end what
    was left. ``_fast`` has the same in C. Here, an interruption before the first line of
    ``__exit__`` keeps the lock.
    """

    _lock: Any

    def _entered(self, nested: bool) -> Any:
        return self

    def _leaving(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def _interrupted(self) -> None:
        pass

    def __enter__(self) -> Any:
        lock = self._lock
        if lock is None:
            return self._begun(False)
        nested = lock._is_owned()
        try:
            lock.acquire()
            return self._begun(nested)
        except BaseException:
            if lock._is_owned() and not nested:
                lock.release()
            raise

    def _begun(self, nested: bool) -> Any:
        try:
            return self._entered(nested)
        except BaseException:
            with suppress(BaseException):
                self._interrupted()
            if nested:
                self._lock.release()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._leaving(kind, error, traceback)
        except BaseException:
            with suppress(BaseException):
                self._interrupted()
            raise
        finally:
            if self._lock is not None:
                self._lock.release()


if TYPE_CHECKING:
    Guard = PythonGuard
else:
    Guard = in_front("Guard", PythonGuard, kept=["_entered", "_leaving", "_interrupted"])
