# SPDX-License-Identifier: MIT
"""Areas and Items: many numbers at once, for NumPy, pandas, Polars, pyarrow and buffers.

Workload: all that is dirty goes into a table of somebody else's, millions of rows in one step. So
they are uint64 in one piece of memory (:attr:`Numbers.data`), which NumPy takes without a copy; a
table has its columns copied in C. None of these packages is needed, nor imported before it asks.

They are constant: what is marked later is not in them. And they are no ``collections.abc.Sequence``
by name: pandas and Polars would go through one of these row by row.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from operator import index
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from . import _core

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Areas", "Items", "Numbers"]

_Row = TypeVar("_Row")


class Numbers(_core.Lent, Generic[_Row]):
    """Rows of one number or of two: what :class:`Areas` and :class:`Items` have in common.

    They have a length, indices, slices and an iterator, of rows; and

    - ``numpy.asarray(numbers)`` is an array of uint64, without a copy
    - ``polars.DataFrame(numbers)``, ``pyarrow.table(numbers)`` and, from pandas 3 on,
      ``pandas.DataFrame.from_arrow(numbers)`` have the columns by name, copied
      (``__arrow_c_stream__``, Arrow's PyCapsule interface; not on PyPy);
      ``pandas.DataFrame(numbers, columns=numbers.names)`` serves any pandas
    - :attr:`data` is a memoryview, and so is ``memoryview(numbers)`` from Python 3.12 on

    Writer, twin: it is a copy of what was dirty, and its own. Kill: it goes with its process. Fork:
    the child has a copy; tables made before, too. Drop: the memory goes with the last array or view
    on it; that of a table when its user says so, in whatever thread, also if nobody takes what
    ``__arrow_c_stream__`` gave. Interrupted: making one leaves nothing.

    >>> from pybitmap import HBitmap
    >>> numbers = HBitmap.from_extents([(4096, 8192), (1 << 20, 512)], 1 << 30).areas_array()
    >>> numbers.names, numbers.shape, numbers.nbytes, numbers.data.format
    (['offset', 'length'], (2, 2), 32, 'Q')
    >>> len(numbers), numbers[-1], list(numbers[:1])
    (2, (1048576, 512), [(4096, 8192)])
    """

    __slots__ = ("__weakref__", "_flat", "_length")

    #: Of the columns of a table.
    names: list[str]

    def __init__(self, flat: memoryview, length: int) -> None:
        # Format 'Q', one row at least, whatever the length: views without items cannot be cast.
        self._flat = flat
        self._length = length

    @property
    def data(self) -> memoryview:
        """The numbers as a writable memoryview of format 'Q' (uint64, in the machine's byte order),
        of the shape that the array has."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """As NumPy has it."""
        columns = len(self.names)
        return (self._length,) if columns == 1 else (self._length, columns)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take."""
        return 8 * self._length * len(self.names)

    def tolist(self) -> list[Any]:
        """As of an array of NumPy's: ints, or lists of them.

        >>> from pybitmap import HBitmap
        >>> HBitmap.from_extents([(4096, 8192)], 1 << 20).areas_array().tolist()
        [[4096, 8192]]
        """
        return self.data.tolist()

    def tobytes(self) -> bytes:
        """In the machine's byte order.

        >>> from pybitmap import HBitmap
        >>> numbers = HBitmap.from_extents([(4096, 8192)], 1 << 20).areas_array()
        >>> len(numbers.tobytes()), numbers.tobytes() == bytes(numbers)
        (16, True)
        """
        return self._flat[: self._length * len(self.names)].tobytes()

    __bytes__ = tobytes

    def _column(self, number: int) -> memoryview:
        step = len(self.names)
        return self._flat[number : self._length * step : step]

    def _some(self, rows: range) -> Self:
        """Those rows, as a copy if they do not follow each other."""
        step = len(self.names)
        if rows.step == 1 and rows:
            return type(self)(self._flat[rows.start * step : rows.stop * step], len(rows))
        made = _core.new_words(step * max(1, len(rows)))
        for to, row in enumerate(rows):
            made[to * step : (to + 1) * step] = self._flat[row * step : (row + 1) * step].tolist()
        view = memoryview(_core.buffer(made, 8 * step * max(1, len(rows)))).cast("Q")
        return type(self)(view, len(rows))

    def _row(self, number: int) -> _Row:
        raise NotImplementedError

    @overload
    def __getitem__(self, key: int) -> _Row: ...

    @overload
    def __getitem__(self, key: slice) -> Self: ...

    def __getitem__(self, key: int | slice) -> _Row | Self:
        if isinstance(key, slice):
            return self._some(range(self._length)[key])
        number = index(key)
        if not -self._length <= number < self._length:
            raise IndexError(f"there is no row {number} of {self._length}")
        return self._row(number % self._length)

    def __iter__(self) -> Iterator[_Row]:
        raise NotImplementedError

    def __len__(self) -> int:
        return self._length

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.tobytes() == other.tobytes()

    __hash__ = None  # type: ignore[assignment]  # its numbers can be changed, by way of data

    def __repr__(self) -> str:
        some = ", ".join(map(str, self[:3].tolist()))
        more = ", ..." if self._length > 3 else ""
        return f"<{type(self).__name__} [{some}{more}] of {self._length}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (type(self), self._length, sys.byteorder, self.tobytes())

    if sys.version_info >= (3, 12):

        def __buffer__(self, flags: int) -> memoryview:
            return self.data

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """For ``numpy.asarray``."""
        import numpy

        numbers = numpy.asarray(self.data)
        if dtype is not None and numbers.dtype != dtype:
            if copy is False:
                raise ValueError(f"uint64 as {numpy.dtype(dtype)} is a copy")
            return numbers.astype(dtype)
        return numbers.copy() if copy else numbers

    # Element by element, operators are NumPy's: numpy.asarray(areas) * 2.
    __array_ufunc__ = None

    if sys.implementation.name == "cpython":

        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            """A capsule with the columns as one batch of uint64, for who reads Arrow's C data.

            :param requested_schema: is not heeded, which the interface allows
            :raises MemoryError: if there is none for the copy
            """
            return _core.arrow_stream(self._flat, self._length, len(self.names))


class Areas(Numbers["tuple[int, int]"]):
    """Dirty areas, rows ``(offset, length)``; of what is counted in bytes: in bytes.

    >>> from pybitmap import HBitmap
    >>> hb = HBitmap(1 << 20, group_size=4096)
    >>> hb.set(5000, 4096)
    >>> areas = hb.areas_array()
    >>> areas[0], areas.shape, areas.offset.tolist(), areas.length.tolist()
    ((4096, 8192), (1, 2), [4096], [8192])
    """

    __slots__ = ()

    names = ["offset", "length"]  # noqa: RUF012

    @property
    def data(self) -> memoryview:
        # A cast cannot make a shape with a 0 in it, a slice can. (PyPy's slices of views with two
        # dimensions are wrong about their size, so not otherwise.)
        rows = max(1, self._length)
        view = self._flat.cast("B").cast("Q", [rows, 2])
        return view if self._length else view[:0]

    @property
    def offset(self) -> memoryview:
        """The first column."""
        return self._column(0)

    @property
    def length(self) -> memoryview:
        """The second one."""
        return self._column(1)

    def _row(self, number: int) -> tuple[int, int]:
        return self._flat[2 * number], self._flat[2 * number + 1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.offset, self.length)


class Items(Numbers[int]):
    """The starts of dirty groups.

    >>> from pybitmap import HBitmap
    >>> hb = HBitmap(1 << 20, group_size=4096)
    >>> hb.set(5000, 4096)
    >>> hb.items_array()
    <Items [4096, 8192] of 2>
    """

    __slots__ = ()

    names = ["offset"]  # noqa: RUF012

    @property
    def data(self) -> memoryview:
        return self._flat[: self._length]

    def _row(self, number: int) -> int:
        return int(self._flat[number])

    def __iter__(self) -> Iterator[int]:
        return iter(self.data)


def _unpickle(kind: type[Numbers[Any]], length: int, order: str, data: bytes) -> Numbers[Any]:
    numbers = array("Q", data or bytes(16))
    if order != sys.byteorder:
        numbers.byteswap()
    return kind(memoryview(numbers), length)
