# SPDX-License-Identifier: MIT
"""What formats of extents have in common: options, the text they are read from, order and errors.

A format reads a :class:`Source` and gives :class:`~pybitmap.extent.Extent`, in bytes, one by one;
or is given them and writes bytes. What is read may come from anybody: nothing that is kept grows
with it, numbers are bounded before they are believed, and each error names the line, or the byte.
"""

from __future__ import annotations

import io
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import index
from typing import Any, BinaryIO, NoReturn, Protocol

from ..errors import FormatError, InvalidError, UnsupportedError
from ..extent import Extent
from ..replay import DEFAULT_MEMORY_LIMIT
from ..sizes import MAX_SIZE

MAX_LINE = 1 << 16  # bytes of a line, or characters of a JSON value
CHUNK = 1 << 18  # bytes read at once
HEAD = 1 << 16  # bytes that are looked at to tell a format
SECTOR = 512  # bytes

LSB = "lsb"  #: orders of bits in a byte: the lowest is the first, as KVM, vhost and DRBD have it
MSB = "msb"  #: the highest is the first

#: Beginnings of what is taken for text by mistake; what it is; and what makes text of it.
_NO_TEXT = (
    (b"\x1f\x8b", "compressed, by gzip", "zcat FILE | pybitmap convert -"),
    (b"\x28\xb5\x2f\xfd", "compressed, by zstd", "zstdcat FILE | pybitmap convert -"),
    (b"\xfd7zXZ", "compressed, by xz", "xzcat FILE | pybitmap convert -"),
    (BOM_UTF16_LE, "in UTF-16", "iconv -f UTF-16 -t UTF-8"),
    (BOM_UTF16_BE, "in UTF-16", "iconv -f UTF-16 -t UTF-8"),
)


class Malformed(Exception):
    """What is wrong with an extent; where it stands, the reader knows."""


@dataclass(frozen=True)
class Options:
    """What formats are told.

    :ivar size: of the disk, in bytes; None: what the format says, or the end of the last extent.
        Writers are always told
    :ivar block_size: bytes that a block, a bit, or a number stands for, where what is read does not
        say; for writing also the length of extents, where a format may have a fixed one
    :ivar bit_order: of raw bits, LSB or MSB
    :ivar since: for eras: the first that counts
    :ivar any_order: extents may come in any order, and overlap
    :ivar guessed: nobody has said which format it is, so what could be another one is refused
    :ivar memory_limit: bytes that may be taken where a format cannot be read piece by piece

    >>> options = Options(size=1 << 30, block_size=4096, bit_order=MSB)
    >>> options.size, options.block_size, options.bit_order
    (1073741824, 4096, 'msb')
    >>> options.since, options.any_order, options.guessed, options.memory_limit
    (None, False, False, 536870912)
    """

    size: int | None = None
    block_size: int | None = None
    bit_order: str | None = None
    since: int | None = None
    any_order: bool = False
    guessed: bool = False
    memory_limit: int = DEFAULT_MEMORY_LIMIT

    def __post_init__(self) -> None:
        """
        :raises InvalidError: for a number that is out of its range
        :raises FormatError: for another bit order
        :raises TypeError: for what is no whole number
        """
        for name, least in (("size", 0), ("block_size", 1), ("since", 0), ("memory_limit", 0)):
            value = getattr(self, name)
            if value is None:
                continue
            try:
                value = index(value)
            except TypeError:
                raise TypeError(f"{name} is {shown(value)}, and should be a whole number") from None
            if not least <= value <= MAX_SIZE:
                raise InvalidError(f"{name} {value} is not in {least}..{MAX_SIZE}")
            object.__setattr__(self, name, value)
        if self.bit_order not in (None, LSB, MSB):
            raise FormatError(f"bit_order {shown(self.bit_order)} is neither {LSB} nor {MSB}")

    def blocks(self, what: str) -> int:
        """The block size.

        :raises FormatError: if it is not given

        >>> Options(block_size=4096).blocks("raw bits have a bit for each block")
        4096
        """
        if self.block_size is None:
            raise FormatError(f"{what}: say how many bytes that is, by block_size (--block-size)")
        return self.block_size


class Output(Protocol):
    """Where formats are written to."""

    def write(self, data: bytes, /) -> object: ...


Reader = Callable[["Source", Options], Iterator[Extent]]
Writer = Callable[[Iterable[Extent], Output, Options], None]


@dataclass(frozen=True)
class Format:
    """A way to write extents down.

    :ivar name: as it is asked for
    :ivar title: what it is, for people
    :ivar extension: of files, with its dot; "" where there is none of its own
    :ivar whole: it has clean extents, too
    :ivar fixed: extents are as long as the block size, if there is one
    :ivar blocks: it counts blocks, to which extents are rounded outwards
    :ivar binary: nothing for a terminal

    >>> import io
    >>> from pybitmap.interchange import FORMATS, Extent
    >>> csi = FORMATS["csi"]
    >>> csi.name, csi.extension, csi.whole, csi.fixed, csi.blocks, csi.binary
    ('csi', '', False, True, False, False)
    >>> out = io.BytesIO()
    >>> csi.write([Extent(4096, 512)], out, Options(size=1 << 20))
    >>> csi.title, b'"size_bytes": 512' in out.getvalue()
    ("CSI's SnapshotMetadata, as JSON", True)
    >>> next(csi.read(Source(io.BytesIO(out.getvalue()), "day"), Options()))
    Extent(start=4096, length=512, dirty=True)
    """

    name: str
    title: str
    extension: str
    read: Reader
    write: Writer | None = None
    whole: bool = False
    fixed: bool = False
    blocks: bool = False
    binary: bool = False


class Input(Protocol):
    """Where formats are read from."""

    def read(self, nbytes: int, /) -> bytes: ...


class Source:
    """A stream of bytes that is read once; its beginning can be looked at before.

    :param name: for people

    >>> import io
    >>> source = Source(io.BytesIO(b"offset,length\\n0,512\\n"), "day.csv")
    >>> source.name
    'day.csv'
    """

    def __init__(self, stream: Input, name: str) -> None:
        self.name = name
        self._stream = stream
        self._head = b""

    def head(self) -> bytes:
        """The first bytes, at most HEAD, which are read all the same.

        >>> import io
        >>> source = Source(io.BytesIO(b"0,512"), "day.csv")
        >>> source.head(), source.read()
        (b'0,512', b'0,512')
        """
        while len(self._head) < HEAD:
            more = self._more(HEAD - len(self._head))
            if not more:
                break
            self._head += more
        return self._head

    def read(self, nbytes: int = CHUNK) -> bytes:
        """At most so many; none at the end.

        >>> import io
        >>> source = Source(io.BytesIO(b"0,512"), "day.csv")
        >>> source.read(2), source.read(), source.read()
        (b'0,', b'512', b'')
        """
        if self._head:
            part, self._head = self._head[:nbytes], self._head[nbytes:]
            return part
        return self._more(nbytes)

    def _more(self, nbytes: int) -> bytes:
        """
        :raises OSError: with the name
        """
        try:
            return self._stream.read(nbytes)
        except OSError as error:
            if error.filename is None:
                error.filename = self.name
            raise

    def as_text(self) -> None:
        """It is read as text from here: a mark of its encoding (BOM) is none of its characters.

        :raises FormatError: for what is no text, but was text before it was compressed, or in
            UTF-16, as some shells redirect it

        >>> import io
        >>> source = Source(io.BytesIO(b"\\xef\\xbb\\xbf0,512"), "day.csv")
        >>> source.as_text()
        >>> source.read()
        b'0,512'
        """
        head = self.head()
        for begin, what, instead in _NO_TEXT:
            if head.startswith(begin):
                self.refuse(f"it is {what}: give the text in it, by {instead}")
        self._head = head[len(BOM_UTF8) :] if head.startswith(BOM_UTF8) else head

    def file(self) -> BinaryIO:
        """The same as a file, to be read on from here.

        >>> import io
        >>> Source(io.BytesIO(b"0,512"), "day.csv").file().read(3)
        b'0,5'
        """
        return io.BufferedReader(_Raw(self))

    def lines(self) -> Iterator[tuple[int, str]]:
        """Each line with its number, from 1; the text is ASCII.

        :raises FormatError: for a line of more than MAX_LINE bytes, or what is no ASCII

        >>> import io
        >>> list(Source(io.BytesIO(b"offset,length\\n0,512"), "day.csv").lines())
        [(1, 'offset,length'), (2, '0,512')]
        """
        self.as_text()
        number, rest = 0, b""
        while True:
            chunk = self.read()
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop() if chunk else b""
            for line in lines:
                number += 1
                if len(line) > MAX_LINE:
                    break
                try:
                    yield number, line.decode("ascii")
                except UnicodeDecodeError:
                    self.refuse("no text of extents: it has bytes beyond ASCII", line=number)
            else:
                if len(rest) <= MAX_LINE:
                    if not chunk:
                        return
                    continue
                number += 1
            self.refuse(f"a line of more than {MAX_LINE} bytes", line=number)

    def refuse(self, why: str, *, line: int | None = None, byte: int | None = None) -> NoReturn:
        """
        :raises FormatError: always

        >>> import io
        >>> Source(io.BytesIO(b"0;512"), "day.csv").refuse("no comma", line=1)
        Traceback (most recent call last):
        pybitmap.errors.FormatError: day.csv:1: no comma
        """
        where = f":{line}" if line is not None else ""
        at = f", byte {byte}" if byte is not None else ""
        raise FormatError(f"{self.name}{where}{at}: {why}")


class _Raw(io.RawIOBase):
    def __init__(self, source: Source) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Order:
    """Makes extents, and knows what they have to be: inside a disk, in order, apart.

    :param unit: of bytes, in which who tells of the disk counts, so that its last one may go beyond
        the end: that part is cut off
    :ivar end: of the last; to be put back if extents are made once more
    """

    def __init__(self, options: Options, unit: int = 1) -> None:
        self._options = options
        self._size = MAX_SIZE if options.size is None else options.size
        self._furthest = min(-(-self._size // unit) * unit, MAX_SIZE)
        self.end = 0

    def extent(self, start: int, count: int, dirty: bool = True) -> Extent:
        """
        :param start, count: in bytes
        :raises Malformed: if it cannot be, and why
        """
        if start < 0 or count < 0:
            raise Malformed(f"offset {start}, length {count}: a negative number of bytes")
        end = start + count
        if self._size < end == self._furthest:
            start, end = min(start, self._size), self._size
            count = end - start
        if end > self._size:
            if end > MAX_SIZE:
                raise Malformed(f"offset {start} + length {count} is beyond 2^63 - 1")
            raise Malformed(
                f"offset {start} + length {count} is beyond the size of the disk, {self._size}"
            )
        if start < self.end and not self._options.any_order:
            raise Malformed(
                f"offset {start} is before the end of the extent before it, {self.end}; if they may"
                " come in any order and overlap, say any_order (--any-order)"
            )
        self.end = end
        return Extent(start, count, dirty)

    def blocks(self, first: int, count: int, dirty: bool = True) -> Extent:
        """The same in blocks of the block size; the end of the disk may cut the last one."""
        block_size = self._options.blocks("the format counts blocks")
        start, nbytes = first * block_size, count * block_size
        if nbytes > 0 and 0 <= self._size - start < nbytes < self._size - start + block_size:
            nbytes = self._size - start
        return self.extent(start, nbytes, dirty)


def number(text: str, what: str = "a number of bytes") -> int:
    """A decimal number of no more than 20 digits.

    :raises Malformed: if it is none
    """
    if not (text.isascii() and text.isdigit()):
        raise Malformed(f"expected {what} in decimal, found {shown(text)}")
    if len(text) > 20:
        raise Malformed(f"a number of {len(text)} digits, where {what} should be")
    return int(text)


def shown(text: object) -> str:
    """Of what was read, as much as fits into an error, with nothing that steers a terminal."""
    words = ascii(text)
    return words if len(words) <= 60 else words[:60] + "..."


def missing(package: str, error: ImportError) -> UnsupportedError:
    """For a module of an extra that is not there."""
    return UnsupportedError(
        f"this needs the package {package}, which cannot be imported ({error}): "
        f"pip install {package}"
    )


def batched(lines: Iterable[str], out: Output) -> None:
    """Writes texts, many at a time."""
    some: list[str] = []
    for line in lines:
        some.append(line)
        if len(some) == 4096:
            out.write("".join(some).encode())
            some.clear()
    out.write("".join(some).encode())
