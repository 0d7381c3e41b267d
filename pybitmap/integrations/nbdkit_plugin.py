# SPDX-License-Identifier: MIT
"""What nbdkit loads: its callbacks, for one disk that all connections share.

``nbdkit -f python .../nbdkit_plugin.py disk=FILE store=FOLDER [node=NAME]
[bitmap=NAME[,granularity=SIZE] ...] [qmp=SOCKET] [read-only=true]``; ``python -m
pybitmap.integrations.nbdkit`` puts that together. nbdkit-python-plugin(3) says what each callback
is given; what is done stands in served.py.

nbdkit becomes a daemon between ``get_ready`` and ``after_fork``, and the child of a fork is refused
what its parent has open. So the first finds errors, which the user hears of, and the second opens;
what goes wrong only there is in the system's log, unless nbdkit has ``-f``. An error of ``cleanup``
has no way to nbdkit's exit code, so that is seen to here.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import syslog
from contextlib import suppress
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Callable, TypeVar, cast

try:
    nbdkit: Any = import_module("nbdkit")
except ModuleNotFoundError:
    sys.exit(f"{__file__} is for nbdkit: start it by python -m pybitmap.integrations.nbdkit")

# Started by hand, it is to be found as well. Not first: it brings its neighbours, too.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from pybitmap.errors import BitmapError, UnsupportedError
from pybitmap.integrations.served import Parameters, ServedDisk, checked
from pybitmap.trace import printable

API_VERSION = 2

#: Of one answer; whoever asked comes again for the rest.
_MAX_EXTENTS = 1024

_Call = TypeVar("_Call", bound=Callable[..., Any])

_started = os.getpid()
_parameters = Parameters()
_served: ServedDisk | None = None


def _told(callback: _Call) -> _Call:
    """An error goes to the client with its errno, and to the log in words; with a traceback only
    if nobody thought of it.
    """

    @functools.wraps(callback)
    def call(*args: Any) -> Any:
        try:
            return callback(*args)
        except Exception as error:
            thought_of = isinstance(error, (BitmapError, OSError))
            sys.tracebacklimit = 0 if thought_of else 1000
            nbdkit.set_error(getattr(error, "errno", None) or errno.EIO)
            if thought_of:
                raise error from None
            raise

    return cast(_Call, call)


def _report(text: str) -> None:
    """To the user, and once nbdkit has forked, when perhaps nobody sees that, to the log."""
    line = printable(f"nbdkit: pybitmap: {text}")
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    if os.getpid() != _started:
        syslog.syslog(syslog.LOG_ERR, line)


# ---- beginning and end --------------------------------------------------------------------------


@_told
def config(key: str, value: str) -> None:
    _parameters.set(key, value)


@_told
def config_complete() -> None:
    _parameters.check()


def thread_model() -> int:
    return cast(int, nbdkit.THREAD_MODEL_PARALLEL)


@_told
def get_ready() -> None:
    checked(_parameters)


@_told
def after_fork() -> None:
    global _served
    _served = ServedDisk(_parameters, _report, nbdkit.shutdown)


def cleanup() -> None:
    if _served is None:
        return
    try:
        _served.close()
    except Exception as error:
        _report(f"not all is as it should be at the end: {error}")
        os._exit(1)


# ---- a connection -------------------------------------------------------------------------------


def open(readonly: bool) -> ServedDisk:
    assert _served is not None
    return _served


def get_size(served: ServedDisk) -> int:
    return served.disk.size


def block_size(served: ServedDisk) -> tuple[int, int, int]:
    return 1, served.disk.block, 0xFFFFFFFF


def can_write(served: ServedDisk) -> bool:
    return not served.read_only


def can_multi_conn(served: ServedDisk) -> bool:
    return True  # one descriptor for all, so what one flushes is what all have written


def can_flush(served: ServedDisk) -> bool:
    return True


def can_fua(served: ServedDisk) -> int:
    return cast(int, nbdkit.FUA_NATIVE)


def can_trim(served: ServedDisk) -> bool:
    return True


def can_zero(served: ServedDisk) -> bool:
    return True


def can_fast_zero(served: ServedDisk) -> bool:
    return True


def can_extents(served: ServedDisk) -> bool:
    return True


# ---- requests -----------------------------------------------------------------------------------


@_told
def pread(served: ServedDisk, buf: memoryview, offset: int, flags: int) -> None:
    served.read(buf, offset)


@_told
def pwrite(served: ServedDisk, buf: memoryview, offset: int, flags: int) -> None:
    served.write(buf, offset)
    _sync_if(served, flags)


@_told
def zero(served: ServedDisk, count: int, offset: int, flags: int) -> None:
    try:
        served.zero(offset, count, may_trim=bool(flags & nbdkit.FLAG_MAY_TRIM))
    except UnsupportedError as error:  # then nbdkit writes them, unless that is not to be
        raise OSError(errno.EOPNOTSUPP, str(error)) from None
    _sync_if(served, flags)


@_told
def trim(served: ServedDisk, count: int, offset: int, flags: int) -> None:
    served.trim(offset, count)
    _sync_if(served, flags)


@_told
def flush(served: ServedDisk, flags: int) -> None:
    served.sync()


@_told
def extents(served: ServedDisk, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    most = 1 if flags & nbdkit.FLAG_REQ_ONE else _MAX_EXTENTS
    found = islice(served.extents(offset, count), most)
    return [(start, nbytes, hole if empty else 0) for start, nbytes, empty in found]


def _sync_if(served: ServedDisk, flags: int) -> None:
    if flags & nbdkit.FLAG_FUA:
        served.sync()
