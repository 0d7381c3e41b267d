# SPDX-License-Identifier: MIT
"""Replaying a trace of block writes: the job behind `pybitmap replay`, without a terminal.

The requests of a trace go through one bitmap per granularity; what these say then is, if wanted,
compared with a truth, a file of what QEMU's own bitmaps said.

Trace and truth may come from anybody. What is held in memory is a piece of the trace, the truth,
which is refused if it is long, and the bitmaps, which are refused if all of them dirty throughout
would take more than the caller allows, whatever part of that the requests mark: what is accepted is
told by sizes and granularities alone. (docs/memory.md)
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any, Callable, NoReturn, cast

from ._core import MAX_GROUPS
from .errors import InvalidError
from .hbitmap import HBitmap
from .sizes import MAX_SIZE, exact_size, exact_sizes, granularity_bits, is_granularity
from .store.base import Progress
from .trace import Requests, Trace, printable, read_trace

DEFAULT_GRANULARITY = 65536

#: What all bitmaps of a replay may take, in bytes.
DEFAULT_MEMORY_LIMIT = 512 << 20

#: Of that, the text of a truth, which has a few KiB. JSON takes some 32 times its length when it is
#: read: then it is an eighth.
_TRUTH_SHARE = 256

#: What is marked in one call, or a single request: a call cannot be interrupted.
_MOST_GROUPS = 1 << 28


# ---- marking ----------------------------------------------------------------


@dataclass(frozen=True)
class Marked:
    """What a bitmap of one granularity says after all requests of a trace."""

    granularity: int  #: bytes
    bitmap: HBitmap
    seconds: float  #: spent marking, nothing else
    count: int  #: dirty bytes as QEMU counts them: a partial last chunk counts whole
    areas: int  #: QEMU's `extents`
    areas_bytes: int  #: sum of their lengths, which end with the disk
    areas_sha256: str  #: of them as text, `OFFSET LENGTH\\n` each
    sha256: str  #: of the bits

    @property
    def share(self) -> float:
        """Of the disk, what is dirty: 0..1."""
        return self.areas_bytes / self.bitmap.size if self.bitmap.size else 0.0


class Marking:
    """A bitmap of one granularity in the making: fed with requests, and told the size at last.

    :param size: in bytes, for the time being; no request may end beyond it
    """

    def __init__(self, size: int, granularity: int) -> None:
        where = f"a disk of {size} bytes at granularity {granularity}"
        try:
            self._bitmap = HBitmap(size, granularity_bits(granularity))
        except InvalidError as error:
            raise InvalidError(f"{where}: {error}") from None
        except MemoryError:
            raise MemoryError(f"{where}: not enough memory for the bitmap") from None
        self._granularity = granularity
        self._seconds = 0.0
        self._step = 1

    def mark(self, requests: Requests, progress: Callable[[int], object]) -> None:
        """progress: is told now and then how many requests were marked since."""
        offsets, lengths = memoryview(requests.offsets), memoryview(requests.lengths)
        done, step = 0, self._step
        while done < len(requests):
            while step > 1 and sum(lengths[done : done + step]) // self._granularity > _MOST_GROUPS:
                step //= 2
            starts, counts = offsets[done : done + step], lengths[done : done + step]
            began = time.perf_counter()
            self._bitmap.set_many(starts, counts)
            elapsed = time.perf_counter() - began
            self._seconds += elapsed
            done += len(starts)
            progress(len(starts))
            # As much at once as still lets Ctrl-C through without a wait.
            step = step * 2 if elapsed < 0.05 else max(1, step // 2)
        self._step = min(step, _MOST_GROUPS)

    def done(self, size: int) -> Marked:
        """What the bitmap says of a disk of that size, which no request exceeds."""
        bitmap = self._bitmap
        if size != bitmap.size:
            bitmap.truncate(size)
        areas = 0
        digest = hashlib.sha256()
        each = iter(bitmap.areas())
        while batch := list(islice(each, 4096)):
            areas += len(batch)
            digest.update("".join(f"{start} {count}\n" for start, count in batch).encode())
        return Marked(
            granularity=self._granularity,
            bitmap=bitmap,
            seconds=self._seconds,
            count=bitmap.count(),
            areas=areas,
            areas_bytes=bitmap.count(0, size),
            areas_sha256=digest.hexdigest(),
            sha256=bitmap.sha256(),
        )


def bitmaps_nbytes(size: int, granularities: Iterable[int]) -> int:
    """What bitmaps of these granularities take together, in bytes, if all of the disk is dirty."""
    coarsest, bits = _bits(granularities)
    return -(-(-(-size // coarsest) * bits * 64) // (63 * 8))


def largest_size(granularities: Iterable[int], nbytes: int) -> int:
    """Of a disk, in bytes, for which :func:`bitmaps_nbytes` are no more than `nbytes`."""
    coarsest, bits = _bits(granularities)
    return min(nbytes * 63 * 8 // (64 * bits) * coarsest, MAX_SIZE)


def _bits(granularities: Iterable[int]) -> tuple[int, int]:
    """The coarsest of them, and how many bits all of them have for a group of that.

    Summaries take 1/63 of what the bits take.
    """
    each = list(granularities)
    return max(each), sum(max(each) // granularity for granularity in each)


class _Replaying:
    """The bitmaps of a replay: one for each granularity.

    Where the size is not known before all has been read, they have the largest that may be, and are
    copied when it is known: what is never marked takes no memory, so that is twice what the size
    needs, and they may have half of the memory each time.

    :param memory_limit: in bytes, for the bitmaps
    """

    def __init__(
        self, size: int | None, granularities: Sequence[int], memory_limit: int, progress: Progress
    ) -> None:
        self._size = size
        self._granularities = granularities
        self._limit = memory_limit
        self._progress = progress
        self._marks = 0
        if size is None:
            size = min(
                largest_size(granularities, memory_limit // 2), min(granularities) * MAX_GROUPS
            )
        elif bitmaps_nbytes(size, granularities) > memory_limit:
            raise self._too_large("", size)
        self._most = size
        self._markings = [Marking(self._most, each) for each in granularities]

    def mark(self, requests: Requests) -> None:
        """All of them or, if one is refused, some.

        :raises InvalidError: for one beyond the size, by its line
        """
        beyond = requests.beyond(self._most)
        if beyond:
            self._refuse(*beyond)
        for marking in self._markings:
            marking.mark(requests, self._marked)

    def done(self, end: int) -> tuple[int, list[Marked]]:
        """The size of the disk, and what the bitmaps say.

        end: of the furthest request
        """
        size = end if self._size is None else self._size
        return size, [marking.done(size) for marking in self._markings]

    def _marked(self, nrequests: int) -> None:
        self._marks += nrequests
        self._progress("Marking", self._marks, None)

    def _refuse(self, where: str, offset: int, length: int) -> NoReturn:
        what = f"{where}: offset {offset} + length {length}"
        if self._size is not None:
            raise InvalidError(f"{what} is beyond the size of the disk, {self._size}")
        raise self._too_large(f"{what}: ", offset + length)

    def _too_large(self, where: str, size: int) -> InvalidError:
        finest = min(self._granularities)
        if size > finest * MAX_GROUPS:
            return InvalidError(
                f"{where}a disk of {size} bytes at granularity {exact_size(finest)}: a bitmap goes"
                f" to {finest * MAX_GROUPS} at most, so choose a coarser granularity"
            )
        copies = 2 if self._size is None else 1
        nbytes = copies * bitmaps_nbytes(size, self._granularities)
        return InvalidError(
            f"{where}a disk of {size} bytes at granularity {exact_sizes(self._granularities)} may"
            f" need {nbytes} bytes of memory, and {exact_size(self._limit)} are allowed: choose a"
            f" coarser granularity, or allow more (memory_limit={nbytes}, on the command line"
            f" --memory-limit {nbytes})"
        )


# ---- QEMU's truth -----------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What QEMU says of one of its bitmaps; the names are those of the file."""

    granularity: int
    count: int
    extents: int
    extents_bytes: int
    extents_sha256: str
    extents_list: list[tuple[int, int]] | None
    sha256: str


@dataclass(frozen=True)
class Truth:
    """A file of the format `qemu-write-trace-1` (examples/traces/README.md), as far as used."""

    path: str
    size: int
    bitmaps: dict[int, Expected]  #: by granularity
    qemu: str  #: name and version, for people
    requests: int | None
    text_sha256: str | None


@dataclass(frozen=True)
class Difference:
    granularity: int
    field: str
    ours: Any  #: a value of JSON
    qemu: Any


def read_truth(path: str, memory_limit: int = DEFAULT_MEMORY_LIMIT) -> Truth:
    """InvalidError, naming what is wrong, if it is not a truth; OSError.

    memory_limit: what it may take while it is read, in bytes, whatever is in it.
    """
    longest = memory_limit // _TRUTH_SHARE
    with open(path, "rb") as file:
        text = file.read(longest + 1)
    if len(text) > longest:
        raise InvalidError(
            f"{path}: a truth of more than {longest} bytes, which is 1/{_TRUTH_SHARE} of the memory"
            " that is allowed: allow more (memory_limit=SIZE, on the command line"
            " --memory-limit SIZE)"
        )
    try:
        return _truth(path, json.loads(text.decode()))
    except RecursionError:
        raise InvalidError(f"{path}: not a truth: nested too deep") from None
    except UnicodeDecodeError:
        raise InvalidError(f"{path}: not a truth: not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InvalidError(f"{path}: not JSON: {error}") from None
    except ValueError as error:
        raise InvalidError(f"{path}: not a truth: {error}") from None


def _truth(path: str, data: Any) -> Truth:
    top = _Fields("", data)
    bitmaps: dict[int, Expected] = {}
    for index, each in enumerate(top.items("bitmaps")):
        fields = _Fields(f"bitmaps[{index}].", each)
        granularity = fields.number("granularity")
        if not is_granularity(granularity):
            raise ValueError(f"{fields.name}granularity: {granularity} is no power of 2")
        if granularity in bitmaps:
            raise ValueError(f"{fields.name}granularity: {granularity} is there already")
        bitmaps[granularity] = Expected(
            granularity=granularity,
            count=fields.number("count"),
            extents=fields.number("extents"),
            extents_bytes=fields.number("extents_bytes"),
            extents_sha256=fields.sha256("extents_sha256"),
            extents_list=fields.extents("extents_list") if "extents_list" in each else None,
            sha256=fields.sha256("sha256"),
        )
    if not bitmaps:
        raise ValueError("bitmaps: there is none")
    trace = _Fields("trace.", top.data.get("trace", {}))
    qemu = _Fields("qemu.", top.data.get("qemu", {}))
    return Truth(
        path=path,
        size=top.number("disk_size"),
        bitmaps=bitmaps,
        qemu=f"QEMU {printable(qemu.text('version')[:60])}" if "version" in qemu.data else "QEMU",
        requests=trace.number("requests") if "requests" in trace.data else None,
        text_sha256=trace.sha256("text_sha256") if "text_sha256" in trace.data else None,
    )


class _Fields:
    """A JSON object whose fields are checked as they are taken; ValueError names them."""

    def __init__(self, name: str, data: Any) -> None:
        self.name = name  # what stands before the name of a field
        if not isinstance(data, dict):
            raise ValueError(f"{name.rstrip('.') or 'the file'}: expected an object")
        self.data: dict[str, Any] = data

    def text(self, field: str) -> str:
        value = self.data.get(field)
        if not isinstance(value, str):
            self._refuse(field, "text")
        return value

    def number(self, field: str) -> int:
        value = self.data.get(field)
        if not _is_number(value):
            self._refuse(field, "a number from 0 to 2^63 - 1")
        return cast(int, value)

    def sha256(self, field: str) -> str:
        value = self.data.get(field)
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            self._refuse(field, "64 digits of lowercase hexadecimal")
        return value

    def items(self, field: str) -> list[Any]:
        value = self.data.get(field)
        if not isinstance(value, list):
            self._refuse(field, "a list")
        return value

    def extents(self, field: str) -> list[tuple[int, int]]:
        extents = self.items(field)
        for each in extents:
            if not (isinstance(each, list) and len(each) == 2 and all(map(_is_number, each))):
                self._refuse(field, "[offset, length] each")
        return [(offset, length) for offset, length in extents]

    def _refuse(self, field: str, expected: str) -> NoReturn:
        found = json.dumps(self.data[field])[:60] if field in self.data else "nothing"
        raise ValueError(f"{self.name}{field}: expected {expected}, found {found}")


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def compare(marked: Marked, expected: Expected) -> list[Difference]:
    """In what our bitmap differs from QEMU's."""
    pairs: list[tuple[str, Any, Any]] = [
        ("count", marked.count, expected.count),
        ("extents", marked.areas, expected.extents),
        ("extents_bytes", marked.areas_bytes, expected.extents_bytes),
        ("extents_sha256", marked.areas_sha256, expected.extents_sha256),
        ("sha256", marked.sha256, expected.sha256),
    ]
    if expected.extents_list is not None:
        both = zip_longest(marked.bitmap.areas(), expected.extents_list)
        differing = ((index, pair) for index, pair in enumerate(both) if pair[0] != pair[1])
        for index, (ours, theirs) in islice(differing, 3):
            pairs.append((f"extents_list[{index}]", ours and list(ours), theirs and list(theirs)))
    return [
        Difference(marked.granularity, field, ours, theirs)
        for field, ours, theirs in pairs
        if ours != theirs
    ]


# ---- the job ----------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """A trace replayed, and compared if there was something to compare with."""

    trace: Trace
    size: int  #: bytes
    bitmaps: list[Marked]
    truth: Truth | None
    differences: list[Difference]
    hints: list[str]  #: why they differ: the truth is not of this trace

    @property
    def marks(self) -> int:
        """Requests times granularities."""
        return len(self.trace) * len(self.bitmaps)

    @property
    def seconds(self) -> float:
        """Spent marking, nothing else."""
        return sum(marked.seconds for marked in self.bitmaps)


def replay(
    trace_path: str,
    *,
    size: int | None = None,
    granularities: Sequence[int] = (),
    expect: str | None = None,
    file: str | None = None,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    progress: Progress,
) -> Replay:
    """The job of `pybitmap replay`; the arguments are its options.

    memory_limit: what the bitmaps may take together, in bytes; 1/256 of that, the text of a truth.

    Writer: a trace that grows meanwhile is read as far as it goes when that is met; a line that is
    not whole by then is refused, or taken for what is there of it. Nothing is written, so a kill,
    Ctrl-C or an exception leave nothing behind, and two replays have nothing in common.

    Raises TraceError and InvalidError for what cannot be used, naming file and line or field;
    OSError for what cannot be read; MemoryError if even what is allowed is not there.
    """
    truth = None if expect is None else read_truth(expect, memory_limit)
    if truth is not None:
        size = truth.size if size is None else size
        granularities = granularities or list(truth.bitmaps)
        missing = [each for each in granularities if each not in truth.bitmaps]
        if missing:
            raise InvalidError(
                f"{truth.path}: has no bitmap of granularity {exact_sizes(missing)};"
                f" it has {exact_sizes(truth.bitmaps)}"
            )

    granularities = granularities or [DEFAULT_GRANULARITY]
    replaying = _Replaying(size, granularities, memory_limit, progress)
    progress("Reading", 0, None)
    trace = read_trace(
        trace_path,
        replaying.mark,
        file=file,
        progress=lambda done, total: progress("Reading", done, total),
    )
    size, bitmaps = replaying.done(trace.end)

    differences: list[Difference] = []
    hints = []
    if truth is not None:
        for marked in bitmaps:
            differences += compare(marked, truth.bitmaps[marked.granularity])
        if differences and size != truth.size:
            hints.append(f"the truth is of a disk of {truth.size} bytes, not {size}")
        if differences and truth.requests not in (None, len(trace)):
            hints.append(f"the truth is of {truth.requests} requests, not {len(trace)}")
        if differences and truth.text_sha256 not in (None, trace.text_sha256):
            hints.append("the truth is of another trace: their texts' SHA-256 differ")
    return Replay(trace, size, bitmaps, truth, differences, hints)


# ---- numbers ----------------------------------------------------------------


def report(result: Replay) -> dict[str, Any]:
    """The same as numbers: the object that --json prints."""
    trace = result.trace
    numbers: dict[str, Any] = {
        "trace": trace.path,
        "size": result.size,
        "requests": len(trace),
        "writes": trace.writes,
        "zeroes": trace.zeroes,
        "discards": trace.discards,
        "text_sha256": trace.text_sha256,
        "bitmaps": [
            {
                "granularity": marked.granularity,
                "count": marked.count,
                "share": marked.share,
                "areas": marked.areas,
                "extents_bytes": marked.areas_bytes,
                "extents_sha256": marked.areas_sha256,
                "sha256": marked.sha256,
                "seconds": marked.seconds,
                "marks_per_second": rate(len(trace), marked.seconds),
            }
            for marked in result.bitmaps
        ],
        "marks": result.marks,
        "seconds": result.seconds,
        "marks_per_second": rate(result.marks, result.seconds),
    }
    if result.truth is not None:
        numbers["expect"] = {
            "truth": result.truth.path,
            "equal": not result.differences,
            "differences": [vars(each) for each in result.differences],
            "hints": result.hints,
        }
    return numbers


def rate(marks: int, seconds: float) -> float | None:
    return marks / seconds if seconds else None
