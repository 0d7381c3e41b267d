# SPDX-License-Identifier: MIT
"""Types of what may be handed over, for annotations only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, Union

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class Array(Protocol):
    """NumPy's arrays, which declare that they are buffers for Python 3.12 and later only."""

    @property
    def __array_interface__(self) -> Any: ...


#: A buffer to read from, and one that is written to.
Readable = Union["ReadableBuffer", Array]
Writable = Union["WriteableBuffer", Array]

#: Many whole numbers.
Integers = Union["ReadableBuffer", Array, Iterable[SupportsIndex]]

#: Many bools, or bytes that are 0 and 1.
Mask = Union["ReadableBuffer", Array, Iterable[object]]
