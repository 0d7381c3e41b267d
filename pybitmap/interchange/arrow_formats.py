# SPDX-License-Identifier: MIT
"""Extents as columns: Arrow's IPC formats, and Parquet. By pyarrow, the extra `arrow`.

Columns ``offset`` and ``length`` of integers, in bytes, and ``dirty`` of booleans, if there is one;
others are left alone. Read and written batch by batch.

Source: https://arrow.apache.org/docs/format/Columnar.html (IPC),
https://parquet.apache.org/docs/file-format/.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

from ..errors import FormatError
from ..extent import Extent
from ..sizes import MAX_SIZE
from ..trace import printable
from .base import Format, Malformed, Options, Order, Output, Source, missing

_ROWS = 1 << 16

#: In the metadata of a schema: the size of the disk, in bytes.
_SIZE = b"pybitmap.size"

ARROW_MAGIC, PARQUET_MAGIC = b"ARROW1", b"PAR1"
STREAM_MAGIC = b"\xff\xff\xff\xff"


def _pyarrow() -> Any:
    """
    :raises UnsupportedError: if it is not there
    """
    try:
        import pyarrow
    except ImportError as error:
        raise missing("pyarrow", error) from None
    return pyarrow


def read_arrow(source: Source, options: Options) -> Iterator[Extent]:
    """Arrow's IPC stream, which is to have its end, or file; the latter is read as Parquet is,
    since what is in it need be no stream (that of Polars is none)."""
    pa = _pyarrow()
    from pyarrow import ipc

    if not source.head().startswith(ARROW_MAGIC):
        ending = _Ending(source.file())
        with _refusing(source, pa):
            stream = ipc.open_stream(ending)
            _check(source, pa, stream.schema)
        yield from _extents(source, options, pa, stream.schema, iter(stream))
        if ending.ended:
            source.refuse("the stream has no end, as of a program that failed: is it cut short?")
        return
    with _copied(source) as file:
        with _refusing(source, pa):
            table = ipc.open_file(file)
            _check(source, pa, table.schema)
        batches = map(table.get_batch, range(table.num_record_batches))
        yield from _extents(source, options, pa, table.schema, batches)


def read_parquet(source: Source, options: Options) -> Iterator[Extent]:
    """A Parquet file."""
    pa = _pyarrow()
    import pyarrow.parquet as pq

    with _copied(source) as file:
        with _refusing(source, pa):
            parquet = pq.ParquetFile(file)
            _check(source, pa, parquet.schema_arrow)
            columns = [name for name in parquet.schema_arrow.names if name in _COLUMNS]
            batches = parquet.iter_batches(_ROWS, columns=columns)
        yield from _extents(source, options, pa, parquet.schema_arrow, batches)


@contextmanager
def _copied(source: Source) -> Iterator[BinaryIO]:
    """As a temporary file: what ends with what says where things are is not read from its
    beginning on.

    :raises OSError: if there is no room for it; its filename is the folder
    """
    with tempfile.TemporaryFile() as file:
        try:
            shutil.copyfileobj(source.file(), file)
            file.seek(0)  # which writes what is still to be written
        except OSError as error:
            if error.filename is None:
                error.filename = tempfile.gettempdir()
            raise
        yield file


_COLUMNS = ("offset", "length", "dirty")


def _check(source: Source, pa: Any, schema: Any) -> None:
    """
    :raises FormatError: if it has other columns
    """
    for name in _COLUMNS:
        fields = schema.get_all_field_indices(name)
        if len(fields) > 1:
            source.refuse(f"several columns {name!r}")
        if not fields:
            if name != "dirty":
                source.refuse(f"no column {name!r}; it has {', '.join(schema.names)[:200]}")
            continue
        kind = schema.field(fields[0]).type
        right = pa.types.is_boolean(kind) if name == "dirty" else pa.types.is_integer(kind)
        if not right:
            source.refuse(f"column {name!r} is of type {kind}")


def _extents(
    source: Source, options: Options, pa: Any, schema: Any, batches: Iterator[Any]
) -> Iterator[Extent]:
    order, row, furthest = Order(options), 0, 0
    while True:
        with _refusing(source, pa):
            batch = next(batches, None)
            if batch is None:
                break
            batch.validate(full=True)
        named = dict(zip(batch.schema.names, batch.columns))
        for first in range(0, batch.num_rows, _ROWS):
            columns = [
                named[name].slice(first, _ROWS).to_pylist() if name in named else None
                for name in _COLUMNS
            ]
            starts, lengths, dirty = columns
            assert starts is not None
            assert lengths is not None
            for start, length, each in zip(starts, lengths, dirty or [True] * len(starts)):
                try:
                    if start is None or length is None or each is None:
                        raise Malformed("a value is missing")
                    extent = order.extent(start, length, each)
                except Malformed as error:
                    source.refuse(f"row {row}: {error}")
                yield extent
                furthest = max(furthest, extent.end)
                row += 1
    size = (schema.metadata or {}).get(_SIZE, b"")
    if options.size is None and size.isdigit() and len(size) < 20:
        end = min(int(size), MAX_SIZE)
        if end > furthest:
            yield Extent(furthest, end - furthest, False)


@contextmanager
def _refusing(source: Source, pa: Any) -> Iterator[None]:
    """What pyarrow finds wrong."""
    try:
        yield
    except FormatError:
        raise
    except (pa.ArrowException, ValueError, LookupError, TypeError, MemoryError) as error:
        source.refuse(_first_line(error))
    except OSError as error:
        if error.errno is not None:
            raise
        source.refuse(_first_line(error))


def _first_line(error: Exception) -> str:
    return printable(str(error).partition("\n")[0][:200]) or type(error).__name__


def _schema(pa: Any, options: Options) -> Any:
    fields = [pa.field(name, pa.uint64(), nullable=False) for name in ("offset", "length")]
    return pa.schema(fields, metadata={_SIZE: str(options.size)})


def _batches(pa: Any, schema: Any, extents: Iterable[Extent]) -> Iterator[Any]:
    each = iter(extents)
    while some := list(islice(each, _ROWS)):
        starts, lengths, _ = zip(*some)
        columns = [pa.array(starts, pa.uint64()), pa.array(lengths, pa.uint64())]
        yield pa.record_batch(columns, schema=schema)


def write_arrow(extents: Iterable[Extent], out: Output, options: Options) -> None:
    """As a file; the size of the disk is in its schema's metadata."""
    pa = _pyarrow()
    from pyarrow import ipc

    schema = _schema(pa, options)
    with ipc.new_file(pa.PythonFile(_File(out), "w"), schema) as writer:
        for batch in _batches(pa, schema, extents):
            writer.write_batch(batch)


def write_parquet(extents: Iterable[Extent], out: Output, options: Options) -> None:
    """The size of the disk is in its schema's metadata."""
    pa = _pyarrow()
    import pyarrow.parquet as pq

    schema = _schema(pa, options)
    with pq.ParquetWriter(pa.PythonFile(_File(out), "w"), schema) as writer:
        for batch in _batches(pa, schema, extents):
            writer.write_batch(batch)


class _Ending:
    """What pyarrow takes for a file that is read from its beginning on.

    :ivar ended: there was less than was asked for; of a stream that says where it ends there is not
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.ended = self.closed = False

    def read(self, nbytes: int) -> bytes:
        data = self._file.read(nbytes)
        self.ended |= len(data) < nbytes
        return data


class _File:
    """What pyarrow takes for a file that is written from its beginning on."""

    def __init__(self, out: Output) -> None:
        self._out, self._at = out, 0
        self.closed = False

    def write(self, data: Any) -> int:
        self._out.write(bytes(data))
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


FORMATS = (
    Format("arrow", "Arrow's IPC file or stream", ".arrow", read_arrow, write_arrow, binary=True),
    Format("parquet", "Parquet", ".parquet", read_parquet, write_parquet, binary=True),
)
