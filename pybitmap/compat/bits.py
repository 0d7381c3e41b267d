# SPDX-License-Identifier: MIT
"""bitarray's interface over HBitmap, as far as it is about flags, and bitarray.util's for them.

A bitarray of n flags is a cover of an :class:`~pybitmap.HBitmap` of n items: flag i is item i. Its
size is fixed, because a mark of another thread would go to the old memory of one that grows; only
an empty one takes the size of the first ``extend`` or ``frombytes``. ``endian`` says, as there,
which bit of a byte is the first in ``tobytes``, ``frombytes`` and numbers; operators want the same.

Five visitors, for every method where it says nothing else. Writer: other threads may mark beside
every call, and no mark of theirs is lost but where the call itself assigns; what is read flag by
flag is read a piece after the other. Fork: the child has a copy. Kill: it goes with its process,
unless ``of`` was given a bitmap over a mapped file. Drop: the memory goes with the last reference.
Twin: two threads may be in any two methods, and two covers may share an HBitmap; while an empty one
gets its size, nobody else may use it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from operator import index
from typing import TYPE_CHECKING, Any, NoReturn, Union, cast, overload

from ..errors import InvalidError
from ..hbitmap import HBitmap

if TYPE_CHECKING:
    from typing_extensions import Self

    Places = Union[slice, "bitarray", Sequence[int]]

__all__ = [
    "any_and",
    "ba2hex",
    "ba2int",
    "bitarray",
    "count_and",
    "count_n",
    "count_or",
    "count_xor",
    "frozenbitarray",
    "hex2ba",
    "int2ba",
    "intervals",
    "ones",
    "parity",
    "subset",
    "zeros",
]

_DEFAULT_ENDIAN = "big"
_PIECE = 4096  # flags that are read at a time
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

#: What changes the size, or the order of all flags.
_ABSENT = (
    *("append", "clear", "decode", "encode", "fill", "fromfile", "insert", "pack", "pop", "remove"),
    *("bytereverse", "reverse", "rotate", "sort"),
)


class bitarray:
    """``n`` flags, as bitarray's: see the head of this module.

    >>> flags = bitarray(8)
    >>> flags[2:6] = 1
    >>> flags, flags.count(), flags.find(1), flags[3:7]
    (bitarray('00111100'), 4, 2, bitarray('1110'))
    >>> flags.hbitmap.drain() == {2, 3, 4, 5}, flags.any()
    (True, False)
    """

    __slots__ = ("__weakref__", "_endian", "_hb")

    _hb: HBitmap
    _endian: str

    def __new__(
        cls,
        initializer: int | str | Iterable[int] | None = None,
        endian: str | None = None,
        buffer: object = None,
    ) -> Self:
        """
        :param initializer: how many flags, all 0; or the flags: a str of 0 and 1, bytes, a
            bitarray, whatever gives numbers 0 and 1
        :param endian: ``big`` or ``little``; None: that of the bitarray it is made of, else ``big``
        :param buffer: refused: ``bitarray.of(HBitmap.over(buffer, size))`` lies over a buffer
        :raises ValueError: for a flag that is neither 0 nor 1, a negative number of them, another
            ``endian``
        """
        if buffer is not None and buffer is not Ellipsis:
            raise TypeError(
                "a buffer is not taken: bitarray.of(HBitmap.over(buffer, size)) lies over one"
            )
        if endian is None and isinstance(initializer, bitarray):
            endian = initializer._endian
        endian = _checked_endian(endian)
        if isinstance(initializer, bitarray):
            return cls._made(initializer._hb.copy(), endian)
        if initializer is None:
            initializer = 0
        if hasattr(initializer, "__index__") and not isinstance(initializer, bool):
            nbits = index(cast(int, initializer))
            if nbits < 0:
                raise InvalidError(f"a bitarray cannot have {nbits} flags")
            return cls._made(HBitmap(nbits), endian)
        made = cls._made(HBitmap(0), endian)
        if isinstance(initializer, (bytes, bytearray)):
            bitarray.frombytes(made, initializer)
        else:
            bitarray.extend(made, cast("Iterable[int]", initializer))
        return made

    @classmethod
    def of(cls, hbitmap: HBitmap, endian: str | None = None) -> Self:
        """A cover of an HBitmap of granularity 0, not of a copy.

        :raises InvalidError: for another granularity

        >>> hb = HBitmap(8)
        >>> bitarray.of(hb)[3] = 1
        >>> list(hb)
        [3]
        """
        if hbitmap.granularity:
            raise InvalidError(
                f"a bitarray has a bit for each flag: the bitmap has granularity "
                f"{hbitmap.granularity}, not 0"
            )
        return cls._made(hbitmap, _checked_endian(endian))

    @classmethod
    def _made(cls, hb: HBitmap, endian: str) -> Self:
        made: Self = object.__new__(cls)
        made._hb, made._endian = hb, endian
        return made

    def _of01(self, flags: str) -> Self:
        """One of the same class and endianness."""
        made = self._made(HBitmap(len(flags)), self._endian)
        made._mark01(0, flags)
        return made

    def _mark01(self, start: int, flags: str) -> None:
        """Mark those that are 1."""
        if flags:
            bits = int(flags[::-1], 2)
            self._hb.merge_bits(bits.to_bytes(-(-len(flags) // 8), "little"), start=start)

    if not TYPE_CHECKING:  # which would take it to have every attribute

        def __getattr__(self, name: str) -> Any:
            why = ""
            if name in _ABSENT:
                why = ": it has a fixed size and order; make a new one of what is to be in it"
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{why}")

    # ---- what it is -------------------------------------------------------------------------

    @property
    def hbitmap(self) -> HBitmap:
        """The bitmap itself, for what bitarray has not: ``drain``, ``areas``, ``pin``.

        >>> flags = bitarray("0110")
        >>> list(flags.hbitmap.drain().areas()), flags
        ([(1, 2)], bitarray('0000'))
        """
        return self._hb

    @property
    def endian(self) -> str:
        """``big`` or ``little``: which bit of a byte is the first.

        >>> bitarray("01").endian, bitarray("01", "little").endian
        ('big', 'little')
        """
        return self._endian

    @property
    def nbytes(self) -> int:
        """How long :meth:`tobytes` is.

        >>> bitarray(12).nbytes
        2
        """
        return -(-len(self) // 8)

    @property
    def padbits(self) -> int:
        """How many bits of the last byte are no flags.

        >>> bitarray(12).padbits
        4
        """
        return -len(self) % 8

    @property
    def readonly(self) -> bool:
        """Never.

        >>> bitarray("01").readonly, frozenbitarray("01").readonly
        (False, True)
        """
        return False

    def __len__(self) -> int:
        return self._hb.size

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}('{self.to01()}')" if len(self) else f"{name}()"

    __hash__ = None  # type: ignore[assignment]

    # ---- flags in and out -------------------------------------------------------------------

    def _bits(self, start: int, stop: int) -> int:
        """The flags of ``[start, stop)``, the first the lowest bit."""
        if start >= stop:
            return 0
        low = start - start % 64
        data = self._hb.serialize(low, min(stop + -stop % 64, len(self)) - low)
        return int.from_bytes(data, "little") >> (start - low) & (1 << (stop - start)) - 1

    def _to01(self, start: int, stop: int) -> str:
        return f"{self._bits(start, stop):0{stop - start}b}"[::-1] if start < stop else ""

    def to01(self, group: int = 0, sep: str = " ") -> str:
        """A digit for each; with ``sep`` after every ``group`` of them, if that is not 0.

        >>> bitarray("01100110").to01(), bitarray("01100110").to01(4)
        ('01100110', '0110 0110')
        """
        return _grouped(self._to01(0, len(self)), group, sep)

    def tolist(self) -> list[int]:
        """A number for each.

        >>> bitarray("011").tolist()
        [0, 1, 1]
        """
        return list(map(int, self.to01()))

    def tobytes(self) -> bytes:
        """Eight in a byte, in the order of :attr:`endian`; 0 where there is none.

        >>> bitarray("01100000").tobytes(), bitarray("01100000", "little").tobytes()
        (b'`', b'\\x06')
        """
        data = self._hb.serialize()[: self.nbytes]
        return data if self._endian == "little" else data.translate(_REVERSED)

    __bytes__ = tobytes

    def frombytes(self, a: bytes | bytearray | memoryview | bitarray) -> None:
        """Become the bits of bytes, if it is empty.

        :raises InvalidError: if it is not: its size is fixed

        >>> flags = bitarray()
        >>> flags.frombytes(b"\\x60")
        >>> flags
        bitarray('01100000')
        """
        data = memoryview(a.tobytes() if isinstance(a, bitarray) else a).cast("B")
        if self._take_size(8 * len(data)):
            self._hb.merge_bits(data, msb_first=self._endian == "big")

    def extend(self, x: str | Iterable[int]) -> None:
        """Become these flags, if it is empty.

        :raises InvalidError: if it is not: its size is fixed

        >>> flags = bitarray()
        >>> flags.extend([0, 1, 1])
        >>> flags
        bitarray('011')
        """
        flags = _as01(x)
        if self._take_size(len(flags)):
            self._mark01(0, flags)

    def _take_size(self, more: int) -> bool:
        """False: there is nothing to do."""
        if more and len(self):
            raise InvalidError(
                f"this bitarray has its {len(self)} flags and cannot grow: make a new one, as by "
                "a + b"
            )
        if more:
            self._hb.truncate(more)
        return more > 0

    def __iter__(self) -> Iterator[int]:
        """0 or 1 for each; of what changes meanwhile what is ahead by a piece of 4096 is seen."""
        for start in range(0, len(self), _PIECE):
            for digit in self._to01(start, min(start + _PIECE, len(self))):
                yield int(digit)

    # ---- by index ---------------------------------------------------------------------------

    def _place(self, i: int) -> int:
        place = index(i)
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(f"there is no flag {i}: the bitarray has {len(self)}")
        return place

    def _places(self, key: Places) -> Sequence[int]:
        """Those that a key names, in its order."""
        if isinstance(key, slice):
            return range(*key.indices(len(self)))
        if isinstance(key, bitarray):
            self._same_length(key, IndexError)
            return key._hb.items_array().tolist()
        if isinstance(key, (tuple, str)) or not hasattr(key, "__getitem__"):
            raise TypeError(
                f"flags are named by a number, a slice, a bitarray or a list, not by "
                f"{type(key).__name__}"
            )
        return [self._place(i) for i in key]

    def _same_length(self, other: bitarray, error: type[Exception] = InvalidError) -> None:
        if len(self) != len(other):
            raise error(f"bitarrays of {len(self)} and {len(other)} flags: they must be as long")

    @overload
    def __getitem__(self, key: int) -> int: ...

    @overload
    def __getitem__(self, key: Places) -> Self: ...

    def __getitem__(self, key: int | Places) -> int | Self:
        """One flag; or those of a slice, those where a bitarray has 1, or those of a list of
        places, as a new bitarray."""
        if hasattr(key, "__index__"):
            return int(self._hb.get(self._place(cast(int, key))))
        places = self._places(key)
        if not places:
            return self._of01("")
        if isinstance(key, bitarray):
            return self._of01("".join(compress(self.to01(), key)))
        low = min(places)
        flags = self._to01(low, max(places) + 1)
        if not isinstance(places, range):
            return self._of01("".join(flags[place - low] for place in places))
        return self._of01(
            flags[:: places.step] if places.step > 0 else flags[::-1][:: -places.step]
        )

    def __setitem__(self, key: int | Places, value: int | bitarray) -> None:
        """One flag, or all that ``key`` names: to one number, or each to its own of a bitarray
        that has as many.

        :raises InvalidError: if it has not as many: the size is fixed

        Writer: what is to be 1 is marked, the rest is cleared; no flag goes that is to stay.
        """
        if hasattr(key, "__index__"):
            self._assign(range(self._place(cast(int, key)), len(self))[:1], _bit(value))
            return
        places = self._places(key)
        if not isinstance(value, bitarray):
            self._assign(places, _bit(value))
            return
        flags = value.to01()
        if len(flags) != len(places):
            raise InvalidError(
                f"{len(flags)} flags for {len(places)} places: they must be as many, since the "
                "size is fixed"
            )
        if isinstance(places, range) and places.step == 1:
            self._mark01(places.start, flags)
            for start, count in (~value)._hb.areas():
                self._hb.reset(places.start + start, count)
            return
        last = dict(zip(places, flags))  # of a place that is named twice, the last counts
        self._assign([place for place, flag in last.items() if flag == "1"], 1)
        self._assign([place for place, flag in last.items() if flag == "0"], 0)

    def _assign(self, places: Sequence[int], flag: int) -> None:
        if flag:
            self._hb.update(places)
        elif isinstance(places, range) and abs(places.step) == 1:
            self._hb.difference_update(places)
        else:
            for place in places:
                self._hb.reset(place)

    def setall(self, value: int) -> None:
        """All to 0, or all to 1: one call of C.

        >>> flags = bitarray(4)
        >>> flags.setall(1)
        >>> flags
        bitarray('1111')
        """
        self._assign(range(len(self)), _bit(value))

    def invert(self, i: int | slice | None = None) -> None:
        """One, those of a slice, or all: 0 becomes 1, 1 becomes 0.

        >>> flags = bitarray("0011")
        >>> flags.invert(); flags.invert(0)
        >>> flags
        bitarray('0100')
        """
        places = range(len(self))
        if isinstance(i, slice):
            places = places[i]
        elif i is not None:
            places = places[self._place(i) :][:1]
        if abs(places.step) == 1 or len(places) == 1:
            if places:
                self._hb.flip(min(places), len(places))
        else:
            self._hb.symmetric_difference_update(places)

    # ---- questions --------------------------------------------------------------------------

    def any(self) -> bool:
        """Is one of them 1?

        >>> bitarray("00").any(), bitarray("01").any()
        (False, True)
        """
        return not self._hb.empty()

    def all(self) -> bool:
        """Are all of them 1?

        >>> bitarray("01").all(), bitarray("11").all()
        (False, True)
        """
        return self._hb.next_zero(0) is None

    def count(
        self,
        value: int | bitarray = 1,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> int:
        """How many of a slice are ``value``; of a bitarray: how often it is there, side by side.

        >>> bitarray("01101").count(), bitarray("01101").count(0), bitarray("01101").count(1, 2)
        (3, 2, 2)
        """
        places = range(*slice(start, stop, step).indices(len(self)))
        if isinstance(value, bitarray):
            if step != 1:
                raise InvalidError("a bitarray is counted with step 1")
            if index(start) > len(self) or places.start > places.stop:
                return 0
            return self._to01(places.start, places.stop).count(value.to01())
        flag = _bit(value)
        if not places:
            return 0
        if abs(places.step) == 1:
            dirty = self._hb.count(min(places), len(places))
        else:
            low = min(places)
            dirty = self._to01(low, max(places) + 1)[:: abs(places.step)].count("1")
        return dirty if flag else len(places) - dirty

    def find(
        self,
        sub_bitarray: int | bitarray,
        start: int = 0,
        stop: int | None = None,
        right: bool = False,
    ) -> int:
        """Where it begins first (``right``: last) in a slice; -1: nowhere.

        A single flag is looked for by way of the summaries, more of them piece by piece.

        >>> flags = bitarray("00110")
        >>> flags.find(1), flags.find(bitarray("10")), flags.find(bitarray("111"))
        (2, 3, -1)
        """
        if index(start) > len(self):
            return -1
        start, stop, _ = slice(start, stop).indices(len(self))
        return self._find(_digits(sub_bitarray), start, stop, bool(index(right)))

    def _find(self, flags: str, start: int, stop: int, right: bool) -> int:
        """In ``[start, stop)``, which are no negative numbers from the end any more."""
        if stop - start < len(flags):
            return -1
        found: int | None
        if flags == "1":
            found = (
                self._hb.prev_dirty(stop - 1, stop - start)
                if right
                else self._hb.next_dirty(start, stop - start)
            )
        elif right:
            found = self._find_last(flags, start, stop)
        elif flags == "0":
            found = self._hb.next_zero(start, stop - start)
        else:
            found = self._find_first(flags, start, stop)
        return -1 if found is None else found

    def _find_first(self, flags: str, start: int, stop: int) -> int:
        piece = max(_PIECE, len(flags))
        while start <= stop - len(flags):
            found = self._to01(start, min(stop, start + piece + len(flags) - 1)).find(flags)
            if found >= 0:
                return start + found
            start += piece
        return -1

    def _find_last(self, flags: str, start: int, stop: int) -> int:
        piece = max(_PIECE, len(flags))
        while start <= stop - len(flags):
            low = max(start, stop - piece - len(flags) + 1)
            found = self._to01(low, stop).rfind(flags)
            if found >= 0:
                return low + found
            stop = low + len(flags) - 1
        return -1

    def index(
        self,
        sub_bitarray: int | bitarray,
        start: int = 0,
        stop: int | None = None,
        right: bool = False,
    ) -> int:
        """As :meth:`find`.

        :raises ValueError: if it is nowhere

        >>> bitarray("00110").index(1), bitarray("00110").index(1, right=True)
        (2, 3)
        """
        found = self.find(sub_bitarray, start, stop, right)
        if found < 0:
            raise InvalidError(f"{sub_bitarray!r} is not in the bitarray")
        return found

    def search(
        self,
        sub_bitarray: int | bitarray,
        start: int = 0,
        stop: int | None = None,
        right: bool = False,
    ) -> Iterator[int]:
        """All places of a slice where it begins, in order (``right``: from the last on).

        >>> list(bitarray("01101").search(1))
        [1, 2, 4]
        """
        start, stop, _ = slice(start, stop).indices(len(self))
        return self._search(_digits(sub_bitarray), start, stop, right)

    def _search(self, flags: str, start: int, stop: int, right: bool) -> Iterator[int]:
        while True:
            found = self._find(flags, start, stop, right)
            if found < 0:
                return
            yield found
            if right:
                stop = found + len(flags) - 1
            else:
                start = found + 1

    def __contains__(self, sub_bitarray: int | bitarray) -> bool:
        return self.find(sub_bitarray) >= 0

    # ---- operators --------------------------------------------------------------------------

    def _other(self, other: bitarray) -> HBitmap:
        self._same_length(other)
        if self._endian != other._endian:
            raise InvalidError("the two bitarrays differ in endian: make one of the other first")
        return other._hb

    def __and__(self, other: bitarray) -> Self:
        if not isinstance(other, bitarray):
            return NotImplemented
        return self._made(self._hb & self._other(other), self._endian)

    def __or__(self, other: bitarray) -> Self:
        if not isinstance(other, bitarray):
            return NotImplemented
        return self._made(self._hb | self._other(other), self._endian)

    def __xor__(self, other: bitarray) -> Self:
        if not isinstance(other, bitarray):
            return NotImplemented
        return self._made(self._hb ^ self._other(other), self._endian)

    def __invert__(self) -> Self:
        made = self._made(self._hb.copy(), self._endian)
        bitarray.invert(made)
        return made

    def __iand__(self, other: bitarray) -> Self:
        if not isinstance(other, bitarray):
            return NotImplemented
        self._hb.intersection_update(self._other(other))
        return self

    def __ior__(self, other: bitarray) -> Self:
        if not isinstance(other, bitarray):
            return NotImplemented
        self._hb.update(self._other(other))
        return self

    def __ixor__(self, other: bitarray) -> Self:
        if not isinstance(other, bitarray):
            return NotImplemented
        self._hb.symmetric_difference_update(self._other(other))
        return self

    def __add__(self, other: str | Iterable[int]) -> Self:
        """A new one, of both."""
        return self._of01(self.to01() + _as01(other))

    def __iadd__(self, other: str | Iterable[int]) -> Self:
        """See :meth:`extend`."""
        self.extend(other)
        return self

    def __mul__(self, n: int) -> Self:
        """A new one, of ``n`` of this."""
        return self._of01(self.to01() * index(n))

    __rmul__ = __mul__

    def __lshift__(self, n: int) -> Self:
        """A new one: the first ``n`` are gone, and as many 0 come last."""
        n = self._shift(n)
        return self._of01(self._to01(n, len(self)) + n * "0")

    def __rshift__(self, n: int) -> Self:
        """A new one: the last ``n`` are gone, and as many 0 come first."""
        n = self._shift(n)
        return self._of01(n * "0" + self._to01(0, len(self) - n))

    def _shift(self, n: int) -> int:
        if index(n) < 0:
            raise InvalidError(f"a shift is by 0 or more, not by {n}")
        return min(index(n), len(self))

    def __ilshift__(self, n: int) -> Self:
        """As ``<<``, in place. Writer: of a mark beside it is what an assignment makes of it."""
        self[:] = self << n
        return self

    def __irshift__(self, n: int) -> Self:
        """As ``>>``, in place: see ``<<=``."""
        self[:] = self >> n
        return self

    def __imul__(self, n: int) -> Self:
        """
        :raises InvalidError: its size is fixed
        """
        if len(self) and index(n) != 1:
            raise InvalidError("this bitarray cannot change its size: a * n makes a new one")
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, bitarray):
            return NotImplemented
        return self._hb == other._hb

    def __lt__(self, other: bitarray) -> bool:
        if not isinstance(other, bitarray):
            return NotImplemented
        return self.to01() < other.to01()

    def __le__(self, other: bitarray) -> bool:
        if not isinstance(other, bitarray):
            return NotImplemented
        return self.to01() <= other.to01()

    def __gt__(self, other: bitarray) -> bool:
        if not isinstance(other, bitarray):
            return NotImplemented
        return self.to01() > other.to01()

    def __ge__(self, other: bitarray) -> bool:
        if not isinstance(other, bitarray):
            return NotImplemented
        return self.to01() >= other.to01()

    # ---- copies -----------------------------------------------------------------------------

    def copy(self) -> Self:
        """One with the same flags, which goes its own way.

        >>> flags = bitarray("01")
        >>> other = flags.copy()
        >>> other[0] = 1
        >>> flags, other
        (bitarray('01'), bitarray('11'))
        """
        made = self._made(self._hb.copy(), self._endian)
        if hasattr(self, "__dict__"):
            vars(made).update(vars(self))
        return made

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = self._made(self._hb.copy(), self._endian)
        if hasattr(self, "__dict__"):
            vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._made, (self._hb, self._endian), getattr(self, "__dict__", None)


# By what it has. (MutableSequence would promise that it can grow.)
Sequence.register(bitarray)


class frozenbitarray(bitarray):
    """The same that cannot be changed but by way of ``hbitmap``, and has a hash of its flags.

    >>> {frozenbitarray("01") | bitarray("10")}
    {frozenbitarray('11')}
    >>> frozenbitarray("01").readonly
    True
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash((len(self), self._hb.areas_array().tobytes()))

    @property
    def readonly(self) -> bool:
        """Always."""
        return True

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        """
        :raises TypeError: always

        >>> frozenbitarray("01").setall(1)
        Traceback (most recent call last):
        TypeError: a frozenbitarray cannot be changed: bitarray(frozen) makes one that can
        """
        raise TypeError("a frozenbitarray cannot be changed: bitarray(frozen) makes one that can")

    __setitem__ = __iand__ = __ior__ = __ixor__ = __iadd__ = __imul__ = _refuse
    __ilshift__ = __irshift__ = _refuse
    extend = frombytes = invert = setall = _refuse


def _checked_endian(endian: str | None) -> str:
    if endian is None:
        return _DEFAULT_ENDIAN
    if not isinstance(endian, str):
        raise TypeError(f"endian is 'big' or 'little', not {endian!r}")
    if endian not in ("big", "little"):
        raise InvalidError(f"bit-endianness must be either 'little' or 'big', not '{endian}'")
    return endian


def _bit(value: object) -> int:
    """
    :raises TypeError: if it is no number
    :raises ValueError: if it is neither 0 nor 1
    """
    flag = index(cast(int, value))
    if flag not in (0, 1):
        raise InvalidError(f"bit must be 0 or 1, got {flag}")
    return 1 if flag else 0  # index(True) is True on PyPy


def _grouped(digits: str, group: int, sep: str) -> str:
    """With ``sep`` after every ``group`` of them, if that is not 0."""
    if not isinstance(sep, str):
        raise TypeError(f"sep is a str, not {type(sep).__name__}")
    if index(group) < 0:
        raise InvalidError(f"group is 0 or more, not {group}")
    if not group or not sep:
        return digits
    return sep.join(digits[i : i + group] for i in range(0, len(digits), group))


def _joined(digits: str) -> str:
    """Without what separates them."""
    return "".join(digits.split()).replace("_", "")


def _digits(sub: int | bitarray) -> str:
    """What is looked for."""
    return sub.to01() if isinstance(sub, bitarray) else str(_bit(sub))


def _as01(flags: str | Iterable[int]) -> str:
    """What ``int`` and ``len`` can take.

    :raises TypeError: if it gives no numbers
    :raises ValueError: if one is neither 0 nor 1
    """
    if isinstance(flags, bitarray):
        return flags.to01()
    if isinstance(flags, (bytes, bytearray)):
        raise TypeError("bytes could be bits or numbers: use frombytes()")
    if not isinstance(flags, str):
        return "".join(str(_bit(flag)) for flag in flags)
    digits = _joined(flags)
    for digit in digits.strip("01"):
        if digit not in "01":
            raise InvalidError(f"expected '0' or '1' (or whitespace, or underscore), got {digit!r}")
    return digits


# ---- as in bitarray.util --------------------------------------------------------------------


def _flags(a: bitarray) -> bitarray:
    """
    :raises TypeError: if it is no bitarray
    """
    if not isinstance(a, bitarray):
        raise TypeError(f"bitarray expected, got {type(a).__name__}")
    return a


def zeros(length: int, endian: str | None = None) -> bitarray:
    """``length`` flags that are 0.

    >>> zeros(4)
    bitarray('0000')
    """
    return bitarray(index(length), endian)


def ones(length: int, endian: str | None = None) -> bitarray:
    """``length`` flags that are 1.

    >>> ones(4)
    bitarray('1111')
    """
    made = zeros(length, endian)
    made.setall(1)
    return made


def count_and(a: bitarray, b: bitarray) -> int:
    """``(a & b).count()``, which is not made.

    >>> count_and(bitarray("0110"), bitarray("0011"))
    1
    """
    return _flags(a)._hb.intersection_count(a._other(_flags(b)))


def count_or(a: bitarray, b: bitarray) -> int:
    """``(a | b).count()``, which is not made.

    >>> count_or(bitarray("0110"), bitarray("0011"))
    3
    """
    return _flags(a)._hb.union_count(a._other(_flags(b)))


def count_xor(a: bitarray, b: bitarray) -> int:
    """``(a ^ b).count()``, which is not made.

    >>> count_xor(bitarray("0110"), bitarray("0011"))
    2
    """
    return _flags(a)._hb.symmetric_difference_count(a._other(_flags(b)))


def any_and(a: bitarray, b: bitarray) -> bool:
    """Is one flag 1 in both?

    >>> any_and(bitarray("0110"), bitarray("0011"))
    True
    """
    return not _flags(a)._hb.isdisjoint(a._other(_flags(b)))


def subset(a: bitarray, b: bitarray) -> bool:
    """Is every flag 1 in ``b`` that is 1 in ``a``?

    >>> subset(bitarray("0010"), bitarray("0110"))
    True
    """
    return _flags(a)._hb <= a._other(_flags(b))


def parity(a: bitarray) -> int:
    """Is the number of those that are 1 odd?

    >>> parity(bitarray("0111"))
    1
    """
    return _flags(a).count() % 2


def count_n(a: bitarray, n: int, value: int = 1) -> int:
    """The least i for which ``a[:i].count(value)`` is ``n``.

    :raises ValueError: if there are not so many, or ``n`` is negative

    >>> count_n(bitarray("01101"), 2)
    3
    """
    a, flag, n = _flags(a), _bit(value), index(n)
    hb = a._hb if flag else (~a)._hb
    if not 0 <= n <= len(hb):
        raise InvalidError(f"there are {len(hb)} flags that are {flag}, not {n}")
    return hb.select(n - 1) + 1 if n else 0


def intervals(a: bitarray) -> Iterator[tuple[int, int, int]]:
    """``(value, start, stop)`` of each stretch of equal flags, in order.

    >>> list(intervals(bitarray("00111")))
    [(0, 0, 2), (1, 2, 5)]
    """
    at = 0
    for start, count in a._hb.areas():
        if start > at:
            yield 0, at, start
        at = start + count
        yield 1, start, at
    if at < len(a):
        yield 0, at, len(a)


def ba2int(a: bitarray, signed: bool = False) -> int:
    """The number whose bits these are; the first is the highest, if it is ``big``.

    :raises ValueError: if there are none

    >>> ba2int(bitarray("0110"))
    6
    """
    if not len(_flags(a)):
        raise InvalidError("non-empty bitarray expected")
    digits = a.to01() if a.endian == "big" else a.to01()[::-1]
    return int(digits, 2) - (1 << len(a) if signed and digits[0] == "1" else 0)


def int2ba(
    i: int, length: int | None = None, endian: str | None = None, signed: bool = False
) -> bitarray:
    """The bits of a number, the highest first if ``big``; ``length`` None: as many as it takes.

    :raises OverflowError: if it does not fit into ``length``, or is negative and not ``signed``

    >>> int2ba(6, 4)
    bitarray('0110')
    """
    if not isinstance(i, int):
        raise TypeError(f"int expected, got {type(i).__name__}")
    if length is None:
        if signed:
            raise TypeError("signed requires length")
        if i < 0:
            raise OverflowError(f"unsigned integer not positive, got {i}")
        length = max(1, i.bit_length())
    if length <= 0:
        raise InvalidError("length must be > 0")
    least, limit = (-(1 << length - 1), 1 << length - 1) if signed else (0, 1 << length)
    if not least <= i < limit:
        raise OverflowError(f"{i} is not in [{least}, {limit})")
    digits = f"{i % (1 << length):0{length}b}"
    made = bitarray(0, endian)
    made.extend(digits if made.endian == "big" else digits[::-1])
    return made


def ba2hex(a: bitarray, group: int = 0, sep: str = " ") -> str:
    """A hexadecimal digit for four flags each, in the order of ``endian``; with ``sep`` after every
    ``group`` of them, if that is not 0.

    :raises ValueError: if their number is no multiple of 4

    >>> ba2hex(bitarray("01101111"))
    '6f'
    """
    if len(_flags(a)) % 4:
        raise InvalidError(f"bitarray length {len(a)} not multiple of 4")
    step = 1 if a.endian == "big" else -1
    flags = a.to01()
    digits = "".join(f"{int(flags[i : i + 4][::step], 2):x}" for i in range(0, len(flags), 4))
    return _grouped(digits, group, sep)


def hex2ba(s: str | bytes, endian: str | None = None) -> bitarray:
    """The reverse of :func:`ba2hex`.

    :raises ValueError: for what is no hexadecimal digit

    >>> hex2ba("6f")
    bitarray('01101111')
    """
    if not isinstance(s, str):
        s = bytes(memoryview(s)).decode("ascii")
    made = bitarray(0, endian)
    step = 1 if made.endian == "big" else -1
    made.extend("".join(f"{int(digit, 16):04b}"[::step] for digit in _joined(s)))
    return made
