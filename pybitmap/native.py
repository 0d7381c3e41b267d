# SPDX-License-Identifier: MIT
"""What native code needs to mark bitmaps of Python's: the C functions, and pins.

The functions are those of ``csrc/hbitmap.h`` and ``csrc/tracker.h`` in the one copy of the code
that Python has loaded. For a module in C there is ``pybitmap_api.h``, for Cython ``native.pxd``;
what else can call an address (ctypes, Numba, a JIT) takes it from :func:`address`. See
``docs/native.md``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Callable

from . import _core
from .errors import ClosedError, NotFoundError

__all__ = ["Pin", "address", "addresses", "table"]

#: How ``pybitmap_api.h`` asks for it. The capsule keeps a pointer to this text.
_CAPSULE = b"pybitmap.native._C_API"

_addresses = MappingProxyType(_core.addresses)


def address(function: str) -> int:
    """Where a C function lies: ``address("hbitmap_set")``.

    It stays there as long as the process lives, in the child of a fork too, and may be called from
    any thread, with the GIL or without; what each function promises beside others stands in its
    header.

    :raises NotFoundError: (a KeyError) if no function of the two headers has that name

    >>> address("hbitmap_set") == addresses()["hbitmap_set"]
    True
    """
    try:
        return _addresses[function]
    except KeyError:
        raise NotFoundError(
            f"hbitmap.h and tracker.h have no function '{function}'; "
            f"pybitmap.native.addresses() has all of them"
        ) from None


def addresses() -> Mapping[str, int]:
    """Where each C function of the two headers lies, by name.

    >>> len(addresses()) > 50, "hbitmap_set" in addresses()
    (True, True)
    """
    return _addresses


def table() -> int:
    """Where the table of all these functions lies, a ``const struct pybitmap_api *``.

    For ``pybitmap_use()`` of ``pybitmap_api.h``, in libraries without ``Python.h``. It stays there
    as long as the process lives.

    >>> table() > 0
    True
    """
    return _core.table


def __getattr__(name: str) -> Any:
    """``_C_API``: the table as a capsule, for ``pybitmap_import()`` of ``pybitmap_api.h``.

    Made by ctypes, whose ``pythonapi`` PyPy lacks; there the header asks for :func:`table`.
    """
    if name != "_C_API":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import ctypes

    try:
        new = ctypes.pythonapi.PyCapsule_New
    except AttributeError:
        raise AttributeError("there are no capsules here; see pybitmap.native.table()") from None
    prototype = ctypes.PYFUNCTYPE(
        ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
    )
    capsule = globals()["_C_API"] = prototype(ctypes.cast(new, ctypes.c_void_p).value or 0)(
        table(), _CAPSULE, None
    )
    return capsule


class Pin(_core.NotCopied):
    """An address of Python's for native code, valid until :meth:`close`.

    Made by :meth:`pybitmap.HBitmap.pin` and :meth:`pybitmap.BlockNode.pin`, which say what it
    keeps. As a context manager it gives the address and closes at the end::

        pin = hb.pin()                      # for as long as a hook lives
        hook = library.install(pin.address)
        ...
        library.remove(hook)
        pin.close()

        with hb.pin() as address:           # for a call
            library.work(address)

    Whoever closes a pin has seen to it that no native code uses the address any more. Fork: the
    child has a copy, with a pin of its own, at the same address. Dropped without ``close()``: it is
    closed, with a ResourceWarning. Twin: any number of pins of one thing may be open; each is
    closed once, a second ``close()`` does nothing, also from another thread.

    >>> from pybitmap import HBitmap
    >>> pin = HBitmap(100).pin()
    >>> pin.address > 0, pin.closed
    (True, False)
    >>> pin.close()
    >>> pin.closed
    True
    """

    __slots__ = ("__weakref__", "_address", "_keep", "_release", "_what")

    #: None: closed. (There also before __init__, for __del__.)
    _address: int | None

    def __init__(
        self, what: str, address: int, keep: object, release: Callable[[], object] | None = None
    ) -> None:
        """
        :param what: it is of, in words
        :param keep: what keeps the address valid
        :param release: called by close(); may be called again
        """
        self._what = what
        self._keep = keep
        self._release = release
        self._address = address

    @property
    def address(self) -> int:
        """What native code gets.

        :raises ClosedError: if the pin is closed
        """
        address = self._address
        if address is None:
            raise ClosedError(f"the pin of {self._what} is closed: there is no address any more")
        return address

    @property
    def closed(self) -> bool:
        return self._address is None

    def close(self) -> None:
        """The address is not used any more. May be called twice.

        >>> from pybitmap import HBitmap
        >>> pin = HBitmap(100).pin()
        >>> pin.close(); pin.close()
        >>> pin.address
        Traceback (most recent call last):
        pybitmap.errors.ClosedError: the pin of a bitmap is closed: there is no address any more
        """
        self._address = None
        if self._release is not None:
            self._release()
        self._keep = None

    def __enter__(self) -> int:
        return self.address

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Pin of {self._what}, {'closed' if self.closed else hex(self.address)}>"

    def __del__(self) -> None:
        if getattr(self, "_address", None) is not None:
            self.close()
            warnings.warn(
                f"a pin of {self._what} was dropped without close(); what has its address must "
                f"not use it any more",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
