# SPDX-License-Identifier: MIT
"""Readers of block-write traces: what was written to a disk, request by request.

A trace is a text file, plain or gzip (told by its first two bytes, whatever
its name).  Three formats are read:

native      one request per line, `write|zero|discard OFFSET LENGTH`, in bytes,
            decimal, ASCII.
fio iolog   versions 2 and 3, as `fio --write_iolog` writes them; told by the
            first line, `fio version N iolog`.  Source: fio(1), TRACE FILE
            FORMAT.  `write` and `trim` are requests, other actions (`read`,
            `sync`, `open`, ...) are passed over.  fio appends: another such
            line begins what another run has written.
blkparse    the text of `blkparse -i TRACE`, of what blktrace recorded of block
            devices; told by the first line, an event.  Source: blkparse(1),
            DEFAULT OUTPUT FORMAT.  Writes and discards are requests whenever
            they are queued (Q), issued (D) or completed (C): one that is under
            way when the trace begins, or ends, has not all three, so each
            counts.  Sectors have 512 bytes, and a device is the file that an
            iolog has, by its number: `8,0`.  Other events, and the summary at
            the end, are passed over.

Blank lines are skipped.  A trace without a single request is a trace: nothing
was written.  Anything else that is not a request is an error that names the
line; nothing is guessed or left out.

Workload: millions of lines, read once, marked from arrays at C speed.  A trace
may come from anybody, and a small gzip file may hold any amount of text: so it
is read in pieces, and what is kept of it does not grow with the text, whatever
that is.  No line may be longer than MAX_LINE.
"""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import itertools
import operator
import os
import re
import stat
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Optional

from .errors import TraceError
from .sizes import MAX_SIZE

__all__ = ["Progress", "Requests", "Trace", "printable", "read_trace"]

MAX_LINE = 1 << 16  # bytes; a file name of an iolog has at most 4 KiB on Linux
_CHUNK = 1 << 18  # bytes read at once: with _feed_plain, some 20 times as much memory
_PIECE = 1 << 18  # requests, and what a chunk has, given at once: marked from warm caches
_NAMES = 8  # files of an iolog that an error names; no more are remembered, but one

# Called now and then while reading: bytes read so far, and of how many (None
# where that is not known: a pipe).
Progress = Callable[[int, Optional[int]], object]


@dataclass(frozen=True)
class Requests:
    """Some write requests of a trace, in the order in which they were made.

    Request i covers `offsets[i]` .. `offsets[i] + lengths[i]`, in bytes, and stands in line
    `lines[i]` of the file (from 1).  `array('Q')` each, so they pass to `HBitmap.set_many` as
    they are.
    """

    path: str  #: where they were read from, for people
    offsets: array[int]  #: bytes
    lengths: array[int]  #: bytes, 0 included
    lines: array[int]

    def __len__(self) -> int:
        return len(self.offsets)

    @functools.cached_property
    def end(self) -> int:
        """End of the furthest request, in bytes; 0 without requests."""
        return max(map(operator.add, self.offsets, self.lengths), default=0)

    def beyond(self, size: int) -> tuple[str, int, int] | None:
        """Of the first request that ends beyond `size`: `path:line`, offset and length."""
        if self.end <= size:
            return None
        each = zip(self.lines, self.offsets, self.lengths)
        line, offset, length = next(one for one in each if one[1] + one[2] > size)
        return f"{self.path}:{line}", offset, length


@dataclass(frozen=True)
class Trace:
    """What is known of a trace once it has been read."""

    path: str  #: where it was read from, for people
    writes: int
    zeroes: int
    discards: int
    end: int  #: end of the furthest request, in bytes; 0 without requests
    text_sha256: str  #: of the unzipped text, in hexadecimal

    def __len__(self) -> int:
        """The number of requests."""
        return self.writes + self.zeroes + self.discards


def read_trace(
    path: str | os.PathLike[str],
    take: Callable[[Requests], object],
    *,
    file: str | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Reads the trace at `path`; `-` is standard input.

    take: is called with the requests, piece by piece, in order.  Left by an exception, of `take` or
        of reading, the pieces so far were taken, and the file is closed.
    file: of an iolog that writes to several files, the one wanted.
    progress: see `Progress`.

    Raises TraceError, naming file and line, for whatever is not a trace, and OSError, its
    `filename` set, where the file cannot be read.
    """
    name = os.fspath(path)
    source = "<stdin>" if name == "-" else printable(name)
    try:
        if name == "-":
            if sys.stdin is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            return _parse(source, _Text(sys.stdin.buffer, progress), take, file)
        with open(name, "rb") as stream:
            return _parse(source, _Text(stream, progress), take, file)
    except EOFError:
        raise TraceError(f"{source}: the gzip file is cut short") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{source}: the gzip file is damaged: {error}") from None
    except OSError as error:
        if error.filename is None:
            error.filename = source
        raise


class _Malformed(Exception):
    """What is wrong with a line; which line it is, `_parse` knows."""


def _parse(source: str, text: _Text, take: Callable[[Requests], object], file: str | None) -> Trace:
    parser = _Parser(source, None if file is None else os.fsencode(file))
    files = parser.files
    for batch in text.batches():
        try:
            parser.feed(batch)
        except _Malformed as error:
            raise TraceError(f"{source}:{parser.number}: {error}") from None
        if file is None and len(files) > _NAMES:
            break
        if len(parser.requests) >= _PIECE:
            take(parser.taken())
    if file is not None and b"" in files:
        raise TraceError(
            f"{source}: neither a fio iolog nor of blkparse, so there is no file {file!r} to choose"
        )
    if file is not None and not parser.found:
        raise TraceError(f"{source}: has no write to {file!r}; it writes to {_names(files)}")
    if file is None and len(files) > 1:
        number = len(files) if len(files) <= _NAMES else f"more than {_NAMES}"
        raise TraceError(
            f"{source}: writes to {number} files, {_names(files)};"
            " choose one (file=NAME, on the command line --file NAME)"
        )
    take(parser.taken())
    return parser.trace(text.sha256())


class _Parser:
    """Fed with whole lines, collects the requests that are wanted, until they are taken."""

    def __init__(self, source: str, wanted: bytes | None) -> None:
        self.wanted = wanted  # the file; None until the first request names one
        self.found = False  # a request of the file that is wanted
        # The first files that are written to, _NAMES and one more; b"" in the native format.
        self.files: dict[bytes, None] = {}
        self.number = 0  # of the last line read
        self.requests = Requests(source, array("Q"), array("Q"), array("Q"))
        self._source = source
        self._parse_line: _LineParser = _native_request
        self._counts = [0, 0, 0]  # writes, zeroes, discards
        self._end = 0

    def trace(self, text_sha256: str) -> Trace:
        writes, zeroes, discards = self._counts
        return Trace(self._source, writes, zeroes, discards, self._end, text_sha256)

    def taken(self) -> Requests:
        """Those since the last time."""
        requests = self.requests
        self.requests = Requests(self._source, array("Q"), array("Q"), array("Q"))
        self._end = max(self._end, requests.end)
        return requests

    def feed(self, batch: bytes) -> None:
        lines = batch.split(b"\n")
        if not lines[-1]:
            lines.pop()
        if self.number == 0 and lines[0].startswith(b"fio version "):
            self.number = 1
            if len(lines[0]) > MAX_LINE:
                raise _Malformed(f"a line of more than {MAX_LINE} bytes")
            self._parse_line = _iolog_parser(lines.pop(0))
        elif self.number == 0 and _BLKPARSE_FIRST.match(lines[0]):
            self._parse_line = _blkparse_request
        if self._parse_line is _native_request and self._feed_plain(batch, len(lines)):
            return
        for line in lines:
            self.number += 1
            if len(line) > MAX_LINE:
                raise _Malformed(f"a line of more than {MAX_LINE} bytes")
            if line.startswith(b"fio ") and self._begins_run(line):
                self._parse_line = _iolog_parser(line)
            elif line and not line.isspace():
                request = self._parse_line(line)
                if request is not None:
                    self._add(*request)

    def _begins_run(self, line: bytes) -> bool:
        others = (_native_request, _blkparse_request)
        return self._parse_line not in others and bool(_IOLOG_HEADER.match(line))

    def _add(self, kind: int, name: bytes, offset: int, length: int) -> None:
        if len(self.files) <= _NAMES:
            self.files[name] = None
        if self.wanted is None:
            self.wanted = name
        if name == self.wanted:
            self.found = True
            self._counts[kind] += 1
            self.requests.offsets.append(offset)
            self.requests.lengths.append(length)
            self.requests.lines.append(self.number)

    def _feed_plain(self, batch: bytes, nlines: int) -> bool:
        """The same at once for a batch that has native requests in its plainest form only."""
        found = _PLAIN_REQUEST.findall(batch)  # at most one in a line
        if self.wanted or len(found) != nlines:
            return False
        verbs, starts, counts = zip(*found)
        offsets, lengths = array("Q", map(int, starts)), array("Q", map(int, counts))
        if max(map(operator.add, offsets, lengths)) > MAX_SIZE:
            return False
        for verb, kind in _NATIVE_KINDS.items():
            self._counts[kind] += verbs.count(verb)
        self.requests.offsets.extend(offsets)
        self.requests.lengths.extend(lengths)
        self.requests.lines.extend(range(self.number + 1, self.number + 1 + nlines))
        self.number += nlines
        return True


class _Text:
    """The text of a stream, unzipped if need be."""

    def __init__(self, stream: BinaryIO, progress: Progress | None) -> None:
        self._stream = stream
        self._progress = progress
        self._digest = hashlib.sha256()

    def sha256(self) -> str:
        """Of all text read so far."""
        return self._digest.hexdigest()

    def batches(self) -> Iterator[bytes]:
        """Whole lines, many at a time; the last one may lack its line end.

        A line that is longer than MAX_LINE may be cut, but not to MAX_LINE or less.
        """
        rest = b""
        for chunk in self._chunks():
            lines, newline, tail = chunk.rpartition(b"\n")
            if newline:
                yield rest + lines + newline
                rest = b""
            rest += tail
            if len(rest) > MAX_LINE:
                break
        if rest:
            yield rest

    def _chunks(self) -> Iterator[bytes]:
        stream = self._stream
        status = os.fstat(stream.fileno())
        total = status.st_size if stat.S_ISREG(status.st_mode) else None
        text: Any = stream
        if stream.peek(2)[:2] == b"\x1f\x8b":  # type: ignore[attr-defined]
            text = gzip.GzipFile(fileobj=stream)
        done = 0
        while True:
            chunk: bytes = text.read(_CHUNK)
            if not chunk:
                return
            self._digest.update(chunk)
            done = done + len(chunk) if total is None else stream.tell()
            if self._progress is not None:
                self._progress(done, total)
            yield chunk


# ---- formats ----------------------------------------------------------------

# A line that is a request: the index of its kind (see `_Requests`), the file it
# went to, offset and length.
_Request = tuple[int, bytes, int, int]
_LineParser = Callable[[bytes], Optional[_Request]]

_PLAIN_REQUEST = re.compile(rb"^(write|zero|discard) ([0-9]{1,19}) ([0-9]{1,19})$", re.MULTILINE)
_NATIVE_KINDS = {b"write": 0, b"zero": 1, b"discard": 2}


def _native_request(line: bytes) -> _Request:
    fields = line.split()
    if len(fields) != 3:
        raise _Malformed(f"expected `write|zero|discard OFFSET LENGTH`, found {_quoted(line)}")
    verb, offset, length = fields
    kind = _NATIVE_KINDS.get(verb)
    if kind is None:
        raise _Malformed(f"expected `write`, `zero` or `discard`, found {_quoted(verb)}")
    return kind, b"", *_range(offset, length)


# What fio logs of an I/O action: its kind, or None if it changes no data.
_IOLOG_KINDS = {
    b"write": 0,
    b"trim": 2,
    b"read": None,
    b"sync": None,
    b"datasync": None,
    b"sync_file_range": None,
    b"wait": None,
}
_IOLOG_FILE_ACTIONS = (b"add", b"open", b"close")


# The first line of a run, whole: torn, it is an error as any other line.
_IOLOG_HEADER = re.compile(rb"fio version \S+ iolog\s*$")


def _iolog_parser(header: bytes) -> _LineParser:
    """The parser for the version that the first line names."""
    version = header.split()[2:]
    if version == [b"2", b"iolog"]:
        return functools.partial(_iolog_request, timed=False)
    if version == [b"3", b"iolog"]:
        return functools.partial(_iolog_request, timed=True)
    raise _Malformed(f"only versions 2 and 3 of fio's iolog are known, found {_quoted(header)}")


def _iolog_request(line: bytes, timed: bool) -> _Request | None:
    # `[TIMESTAMP] FILENAME ACTION [OFFSET LENGTH]`, the timestamp in version 3.  Taken apart from
    # the right: fio writes file names as they are, spaces included.
    rest = line
    if timed:
        timestamp, *others = line.split(None, 1)
        rest = others[0] if others else b""
        if not timestamp.isdigit():
            raise _Malformed(f"expected a timestamp, found {_quoted(timestamp)}")
    fields = rest.rsplit(None, 3)
    if len(fields) == 4 and fields[1] in _IOLOG_KINDS:
        name, action, offset, length = fields
        kind = _IOLOG_KINDS[action]
        return None if kind is None else (kind, name, *_range(offset, length))
    if len(fields) >= 2 and fields[-1] in _IOLOG_FILE_ACTIONS:
        return None
    raise _Malformed(
        f"expected `{'TIMESTAMP ' if timed else ''}FILENAME ACTION [OFFSET LENGTH]`,"
        f" found {_quoted(line)}"
    )


# MAJOR,MINOR CPU SEQUENCE SECONDS PID ACTION RWBS, and what the action has.
_BLKPARSE_EVENT = re.compile(
    rb"\s*([0-9]+,[0-9]+)\s+[0-9]+\s+[0-9]+\s+[0-9]+\.[0-9]+\s+[0-9]+\s+([A-Za-z]{1,2})\s+([A-Z]+)"
    rb"(?:\s+(.*))?\s*$"
)
_BLKPARSE_SUMMARY = re.compile(
    rb"(?:CPU[0-9]+|Total) \(|Throughput \(|Events \(|Skips: |Input file "
    rb"| (?:PC )?(?:Reads?|Writes?|IO) "
)
_BLKPARSE_FIRST = re.compile(rb"Input file |" + _BLKPARSE_EVENT.pattern)
_BLKPARSE_PLACE = re.compile(rb"([0-9]+) \+ ([0-9]+)(?: |$)")
_BLKPARSE_ACTIONS = (b"Q", b"D", b"C")
_SECTOR = 512


def _blkparse_request(line: bytes) -> _Request | None:
    match = _BLKPARSE_EVENT.match(line)
    if match is None:
        if _BLKPARSE_SUMMARY.match(line):
            return None
        raise _Malformed(
            f"expected `MAJOR,MINOR CPU SEQUENCE TIME PID ACTION RWBS ...` as blkparse prints it,"
            f" found {_quoted(line)}"
        )
    device, action, flags, rest = match.groups()
    if action not in _BLKPARSE_ACTIONS or not (b"W" in flags or b"D" in flags):
        return None
    place = _BLKPARSE_PLACE.match(rest or b"")
    if place is None:
        if flags.startswith(b"F"):  # a flush, which has no data
            return None
        raise _Malformed(
            f"a write that does not say where, {_quoted(line.strip())}; packet commands do not, and"
            " `blkparse -a fs` leaves them out"
        )
    offset, length = _range(place[1], place[2], unit=_SECTOR)
    return 2 if b"D" in flags else 0, device, offset, length


def _range(offset: bytes, length: bytes, unit: int = 1) -> tuple[int, int]:
    """Both in bytes, of which a unit has so many, and their sum at most MAX_SIZE."""
    # bytes.isdigit() is true of the ten ASCII digits only, where int() would
    # take signs, underscores and blanks as well.
    if not (offset.isdigit() and length.isdigit()):
        wrong = length if offset.isdigit() else offset
        raise _Malformed(f"expected a number of bytes in decimal, found {_quoted(wrong)}")
    # 2^63 has 19 digits; int() is slow with thousands of them, or refuses.
    if len(offset) > 19 or len(length) > 19 or (int(offset) + int(length)) * unit > MAX_SIZE:
        raise _Malformed(f"offset {_quoted(offset)} + length {_quoted(length)} exceeds 2^63 - 1")
    return int(offset) * unit, int(length) * unit


# ---- words for people --------------------------------------------------------


def _quoted(field: bytes) -> str:
    """Bytes from a file, safe for a terminal and not too long."""
    shown = ascii(field[:60])[1:]
    return shown if len(field) <= 60 else shown + "..."


def _names(files: Iterable[bytes]) -> str:
    shown = [_name(name) for name in itertools.islice(files, _NAMES + 1)]
    if len(shown) > _NAMES:
        shown[_NAMES] = "..."
    return ", ".join(shown) or "none"


def _name(name: bytes) -> str:
    shown = repr(os.fsdecode(name[:255]))
    return shown if len(name) <= 255 else shown + "..."


def printable(text: str) -> str:
    """Text from outside with nothing in it that could steer a terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
