# SPDX-License-Identifier: MIT
"""Which way the calls go that are made by the million.

By way of cffi a call takes any arguments, words every error and releases the GIL; on CPython that
costs several times what a mark takes. Where the extension module ``_fast`` was built, its classes
stand in front: they do the plain case at once and hand everything else to the methods in Python.
``PYBITMAP_PURE_CFFI=1`` leaves it aside, as PyPy does, where cffi calls are cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from . import _core
from ._core import CData

_fast = _core.fast
if _fast is not None:
    _fast.bind(_core.addresses)


def in_front(
    name: str, python: type, handed: Iterable[str] = (), kept: Iterable[str] = ()
) -> type[Any]:
    """The class ``name`` of ``_fast`` in front of ``python``; without ``_fast``, ``python``.

    :param handed: methods of ``python`` to which ``_fast`` hands what it does not do: that of a
        method ``__get__`` or ``_get`` looks for it as ``_cffi_get``
    :param kept: those that the class has as they are
    """
    if _fast is None:
        return python
    methods = {f"_cffi_{method.strip('_')}": python.__dict__[method] for method in handed}
    methods.update({method: python.__dict__[method] for method in kept})
    about = {"__slots__": (), "__doc__": python.__doc__, "__module__": python.__module__}
    return type(name, (getattr(_fast, name),), {**about, **methods})


def filled_bytes(nbytes: int, fill: Callable[[CData], int]) -> tuple[int, bytes]:
    """What ``fill`` returned, and the ``uint8_t[nbytes]`` that it was given."""
    if _fast is None:
        return _core.filled_bytes(nbytes, fill)
    data: bytes = _fast.unset_bytes(nbytes)  # not set to zero first, as bytes(nbytes) is
    with _core.bytes_of(data) as c_data:
        return fill(c_data), data


def bound(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """What calls ``function(*args)``, whatever it is called with itself.

    Where ``_fast`` is, in C: nothing of Python's comes before the function or behind it.
    """
    if _fast is not None:
        return cast("Callable[..., Any]", _fast.bound(function, args))
    return lambda *_: function(*args)


def leave_aside() -> None:
    """From now on, calls of bitmaps go by cffi, all of them."""
    if _fast is not None:
        _fast.leave_aside()
