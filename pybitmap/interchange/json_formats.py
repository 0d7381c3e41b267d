# SPDX-License-Identifier: MIT
"""Lists of extents in JSON, as programs that work with disks print them.

What each has, and where that is said, stands at its reader. Objects may have more keys than those
that are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Callable

from ..errors import FormatError
from ..extent import Extent
from ..sizes import MAX_SIZE
from .base import (
    SECTOR,
    Format,
    Malformed,
    Options,
    Order,
    Output,
    Source,
    batched,
    number,
    shown,
)
from .json_text import JsonText

_Object = Mapping[str, Any]
_Make = Callable[[_Object, Order], Extent]

_MESSAGE = 256  # extents in a message of CSI's


def _whole(found: _Object, key: str) -> int:
    if key not in found:
        raise Malformed(f"an extent without {key!r}")
    value = found[key]
    if type(value) is not int:
        raise Malformed(f"{key!r} is {shown(value)}, and should be a whole number")
    return value


def _flag(found: _Object, key: str) -> bool:
    if key not in found:
        raise Malformed(f"an extent without {key!r}")
    value = found[key]
    if type(value) is not bool:
        raise Malformed(f"{key!r} is {shown(value)}, and should be true or false")
    return value


def _made(make: _Make, order: Order) -> Callable[[object], Extent]:
    def checked(found: object) -> Extent:
        if not isinstance(found, dict):
            raise Malformed(f"expected an object, found {shown(found)}")
        return make(found, order)

    return checked


def _list(source: Source, options: Options, make: _Make, unit: int = 1) -> Iterator[Extent]:
    """A list of extents, and nothing else."""
    text, order = JsonText(source), Order(options, unit)
    yield from text.elements(_made(make, order), order)
    text.end()


def _write_list(lines: Iterator[str], out: Output, before: str = "[", after: str = "]\n") -> None:
    """With what stands between them."""

    def parts() -> Iterator[str]:
        yield before
        comma = ""
        for line in lines:
            yield comma + line
            comma = ",\n"
        yield after

    batched(parts(), out)


def _word(flag: bool) -> str:
    return "true" if flag else "false"


# ---- ours -----------------------------------------------------------------------------------


def read_json(source: Source, options: Options) -> Iterator[Extent]:
    """As `pybitmap dump` has it: offset and length, in bytes; all are dirty, unless ``dirty`` says
    otherwise."""

    def make(found: _Object, order: Order) -> Extent:
        dirty = _flag(found, "dirty") if "dirty" in found else True
        return order.extent(_whole(found, "offset"), _whole(found, "length"), dirty)

    return _list(source, options, make)


def write_json(extents: Iterable[Extent], out: Output, options: Options) -> None:
    def parts() -> Iterator[str]:
        before = "[\n"
        for start, length, _ in extents:
            yield f'{before}{{"offset": {start}, "length": {length}}}'
            before = ",\n"
        yield "[]\n" if before == "[\n" else "\n]\n"

    batched(parts(), out)


# ---- qemu-img map ---------------------------------------------------------------------------


def read_qemu_map(source: Source, options: Options) -> Iterator[Extent]:
    """``qemu-img map --output=json``: what has data is dirty, and what need not read as zeroes.

    Source: https://www.qemu.org/docs/master/tools/qemu-img.html (map). A map over NBD with
    x-dirty-bitmap looks alike and means the opposite (`qemu-map-bitmap`); it is recognised by what
    is neither data nor reads as zeroes. QEMU's disks have whole sectors, those of others need not.
    """

    def make(found: _Object, order: Order) -> Extent:
        data, zero = _flag(found, "data"), _flag(found, "zero")
        if options.guessed and not data and not zero:
            raise Malformed(
                "neither data nor zeroes: a map with x-dirty-bitmap? Say which it is, by --from"
                " qemu-map-bitmap (only this is dirty) or --from qemu-map (all but zeroes is)"
            )
        return order.extent(_whole(found, "start"), _whole(found, "length"), data or not zero)

    return _list(source, options, make, SECTOR)


def write_qemu_map(extents: Iterable[Extent], out: Output, options: Options) -> None:
    lines = (
        f'{{ "start": {start}, "length": {length}, "depth": 0, "present": {_word(dirty)},'
        f' "zero": {_word(not dirty)}, "data": {_word(dirty)}}}'
        for start, length, dirty in extents
    )
    _write_list(lines, out)


def read_qemu_map_bitmap(source: Source, options: Options) -> Iterator[Extent]:
    """The same of ``driver=nbd,x-dirty-bitmap=qemu:dirty-bitmap:NAME``: what is no data is dirty.

    Source: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html
    (BlockdevOptionsNbd, x-dirty-bitmap).
    """

    def make(found: _Object, order: Order) -> Extent:
        dirty = not _flag(found, "data")
        return order.extent(_whole(found, "start"), _whole(found, "length"), dirty)

    return _list(source, options, make, SECTOR)


def write_qemu_map_bitmap(extents: Iterable[Extent], out: Output, options: Options) -> None:
    lines = (
        f'{{ "start": {start}, "length": {length}, "depth": 0, "present": {_word(not dirty)},'
        f' "zero": false, "data": {_word(not dirty)}' + ("}" if dirty else f', "offset": {start}}}')
        for start, length, dirty in extents
    )
    _write_list(lines, out)


# ---- nbdinfo --map --json -------------------------------------------------------------------

#: What nbdinfo calls extents of the contexts base:allocation, qemu:dirty-bitmap and
#: qemu:allocation-depth, and whether that is dirty. (What need not read as zeroes may have data.)
_NBD_STATES = {
    "data": True,
    "zero": False,
    "hole": True,
    "hole,zero": False,
    "dirty": True,
    "clean": False,
    "local": True,
    "absent": False,
    "unallocated": False,
}


def nbd_dirty(description: str) -> bool:
    """
    :raises Malformed: for the extent of a context that is not known
    """
    if description.startswith("backing depth "):
        return False
    try:
        return _NBD_STATES[description]
    except KeyError:
        raise Malformed(f"an extent that is {shown(description)}, which is not known") from None


def read_nbdinfo_json(source: Source, options: Options) -> Iterator[Extent]:
    """``nbdinfo --map --json``, of base:allocation (what need not read as zeroes is dirty), of a
    dirty bitmap (``--map=qemu:dirty-bitmap:NAME``), or of qemu:allocation-depth (local is dirty).

    Source: https://libguestfs.org/nbdinfo.1.html (MAP OPTION).
    """

    def make(found: _Object, order: Order) -> Extent:
        description = found.get("description")
        if not isinstance(description, str):
            raise Malformed("an extent without 'description'")
        start, length = _whole(found, "offset"), _whole(found, "length")
        return order.extent(start, length, nbd_dirty(description))

    return _list(source, options, make, SECTOR)


def write_nbdinfo_json(extents: Iterable[Extent], out: Output, options: Options) -> None:
    lines = (
        f'{{ "offset": {start}, "length": {length}, "type": {int(dirty)},'
        f' "description": "{"dirty" if dirty else "clean"}"}}'
        for start, length, dirty in extents
    )
    _write_list(lines, out, "[\n", "\n]\n")


# ---- rbd diff --format json -----------------------------------------------------------------


def read_rbd_json(source: Source, options: Options) -> Iterator[Extent]:
    """``rbd diff --format json``: all is dirty, also what does not exist any more.

    Source: https://docs.ceph.com/en/latest/man/8/rbd/ (diff).
    """

    def make(found: _Object, order: Order) -> Extent:
        if found.get("exists") not in ("true", "false"):
            raise Malformed('an extent without \'exists\', "true" or "false"')
        return order.extent(_whole(found, "offset"), _whole(found, "length"))

    return _list(source, options, make)


def write_rbd_json(extents: Iterable[Extent], out: Output, options: Options) -> None:
    def parts() -> Iterator[str]:
        yield "["
        comma = ""
        for start, length, _ in extents:
            yield f'{comma}{{"offset":{start},"length":{length},"exists":"true"}}'
            comma = ","
        yield "]\n"

    batched(parts(), out)


# ---- ovirt-imageio --------------------------------------------------------------------------


def read_imageio(source: Source, options: Options) -> Iterator[Extent]:
    """oVirt imageio's ``/extents``: of ``context=dirty`` what is dirty, of ``context=zero`` what is
    not zero.

    Source: https://ovirt.github.io/ovirt-imageio/images.html (EXTENTS).
    """

    def make(found: _Object, order: Order) -> Extent:
        dirty = _flag(found, "dirty") if "dirty" in found else not _flag(found, "zero")
        return order.extent(_whole(found, "start"), _whole(found, "length"), dirty)

    return _list(source, options, make)


def write_imageio(extents: Iterable[Extent], out: Output, options: Options) -> None:
    """As of ``context=dirty``."""
    lines = (
        f'{{"start": {start}, "length": {length}, "dirty": {_word(dirty)}, "zero": false}}'
        for start, length, dirty in extents
    )
    _write_list(lines, out)


# ---- CSI's SnapshotMetadata -----------------------------------------------------------------

_CSI_TYPES = {1: "FIXED_LENGTH", 2: "VARIABLE_LENGTH"}


def read_csi(source: Source, options: Options) -> Iterator[Extent]:
    """The messages of CSI's SnapshotMetadata service (GetMetadataAllocated, GetMetadataDelta), in a
    list, or one after the other.

    Source: https://github.com/container-storage-interface/spec/blob/master/spec.md (Snapshot
    Metadata Service RPC): ``block_metadata`` has ``byte_offset`` and ``size_bytes``, in order over
    all messages; with FIXED_LENGTH all have the same size; ``volume_capacity_bytes`` is the size of
    the disk. Keys as in the specification, or as protobuf's JSON has them (blockMetadata; numbers
    as strings, zeroes left out: https://protobuf.dev/programming-guides/json/).
    """
    text, order = JsonText(source), Order(options)
    reading = _Csi(text, order)
    if text.peek() == "[":
        for _ in text.items():
            yield from reading.message()
        text.end()
    else:
        while text.peek():
            yield from reading.message()
    yield from reading.end()


class _Csi:
    def __init__(self, text: JsonText, order: Order) -> None:
        self._text, self._order = text, order
        self._capacity: int | None = None
        self._type: str | None = None
        self._length: int | None = None  # of the extents, if it is one
        self._vary = False
        self._furthest = 0

    def message(self) -> Iterator[Extent]:
        text = self._text
        for key in text.members():
            plain = key.replace("_", "").lower()
            if plain == "blockmetadata" and text.peek() == "[":
                for extent in text.elements(_made(self._extent, self._order), self._order):
                    self._furthest = max(self._furthest, extent.end)
                    self._vary |= self._length not in (None, extent.length)
                    self._length = extent.length
                    yield extent
                continue
            value = text.value()
            if plain == "volumecapacitybytes":
                self._capacity = self._same("the capacity", self._capacity, value)
            elif plain == "blockmetadatatype":
                kind: object = _CSI_TYPES.get(value) if type(value) is int else value
                if kind not in _CSI_TYPES.values():
                    text.refuse(f"block_metadata_type is {shown(value)}, which is not known")
                if self._type not in (None, kind):
                    text.refuse("block_metadata_type is another than in the message before")
                self._type = str(kind)
        if self._vary and self._type == "FIXED_LENGTH":
            text.refuse("extents of several lengths, where block_metadata_type is FIXED_LENGTH")

    def _same(self, what: str, before: int | None, value: object) -> int:
        try:
            found = _protobuf(value)
        except Malformed as error:
            self._text.refuse(f"{what}: {error}")
        if found > MAX_SIZE or before not in (None, found):
            self._text.refuse(f"{what} is {found}, and cannot be, or was {before} before")
        return found

    def _extent(self, found: _Object, order: Order) -> Extent:
        values = {key.replace("_", "").lower(): value for key, value in found.items()}
        length = _protobuf(values.get("sizebytes", 0))
        if length == 0:
            raise Malformed("an extent of no bytes, or without size_bytes")
        return order.extent(_protobuf(values.get("byteoffset", 0)), length)

    def end(self) -> Iterator[Extent]:
        """How far the disk goes."""
        if self._capacity is None:
            return
        if self._furthest > self._capacity:
            self._text.refuse(
                f"an extent ends at {self._furthest}, and the capacity is {self._capacity}"
            )
        if self._furthest < self._capacity:
            yield Extent(self._furthest, self._capacity - self._furthest, False)


def _protobuf(value: object) -> int:
    """A number, which protobuf's JSON has as a string if it has 64 bits."""
    if isinstance(value, str):
        return number(value)
    if type(value) is not int:
        raise Malformed(f"{shown(value)} is no number of bytes")
    return value


def write_csi(extents: Iterable[Extent], out: Output, options: Options) -> None:
    """A list of messages with up to 256 extents each; FIXED_LENGTH if there is a block size."""
    size, block_size = options.size or 0, options.block_size
    if block_size is not None and size % block_size:
        raise FormatError(
            f"csi: blocks of {block_size} bytes do not fill a disk of {size}, and all extents of"
            " FIXED_LENGTH have one size: take another block size, or none, for VARIABLE_LENGTH"
        )
    kind = 1 if block_size is not None else 2
    head = f'{{"block_metadata_type": {kind}, "volume_capacity_bytes": {size}, "block_metadata": ['

    def parts() -> Iterator[str]:
        yield "[" + head
        for count, (start, length, _) in enumerate(extents):
            if count:
                yield "," if count % _MESSAGE else f"]}},\n{head}"
            yield f'\n{{"byte_offset": {start}, "size_bytes": {length}}}'
        yield "]}]\n"

    batched(parts(), out)


# ---- VMware's QueryChangedDiskAreas ---------------------------------------------------------


def read_vmware(source: Source, options: Options) -> Iterator[Extent]:
    """A DiskChangeInfo of vSphere's QueryChangedDiskAreas, or a list of those of several calls:
    ``changedArea`` has start and length, ``startOffset`` and ``length`` are what was asked about.

    Source: https://developer.broadcom.com/xapis/vsphere-web-services-api/latest/
    (VirtualMachine.DiskChangeInfo, DiskChangeExtent).
    """
    text, order = JsonText(source), Order(options)
    if text.peek() == "[":
        before = None
        for _ in text.items():
            yield from _disk_change_info(text, order, before)
            before = None if options.any_order else order.end
    else:
        yield from _disk_change_info(text, order)
    text.end()


def _disk_change_info(text: JsonText, order: Order, before: int | None = None) -> Iterator[Extent]:
    """
    :param before: where the call before has ended, if this one is to go on there
    """
    asked: dict[str, int] = {}
    first, last, line = None, 0, text.line

    def make(found: _Object, order: Order) -> Extent:
        return order.extent(_whole(found, "start"), _whole(found, "length"))

    for key in text.members():
        if key == "changedArea" and text.peek() == "[":
            for extent in text.elements(_made(make, order), order):
                first = extent.start if first is None else min(first, extent.start)
                last = max(last, extent.end)
                yield extent
            continue
        value = text.value()
        if key in ("startOffset", "length"):
            if type(value) is not int or not 0 <= value <= MAX_SIZE:
                text.refuse(f"{key!r} is {shown(value)}, and should be a number of bytes")
            asked[key] = value
    if len(asked) < 2:
        text.refuse("a DiskChangeInfo without startOffset and length", line)
    start = asked["startOffset"]
    if before is not None and start > before:
        text.refuse(f"no call is about {before} to {start}, between this one and the last", line)
    end = start + asked["length"]
    if first is not None and (first < start or last > end):
        text.refuse(f"areas from {first} to {last}, where {start} to {end} was asked about", line)
    try:
        yield order.extent(max(last, start), end - max(last, start), False)
    except Malformed as error:
        text.refuse(str(error), line)


def write_vmware(extents: Iterable[Extent], out: Output, options: Options) -> None:
    lines = (f'{{"start": {each.start}, "length": {each.length}}}' for each in extents)
    head = f'{{"startOffset": 0, "length": {options.size}, "changedArea": ['
    _write_list(lines, out, head, "]}\n")


FORMATS = (
    Format("json", "offset and length, as pybitmap dump", ".json", read_json, write_json),
    Format(
        "qemu-map",
        "qemu-img map --output=json; what may have data is dirty",
        "",
        read_qemu_map,
        write_qemu_map,
        whole=True,
    ),
    Format(
        "qemu-map-bitmap",
        "the same over NBD with x-dirty-bitmap",
        "",
        read_qemu_map_bitmap,
        write_qemu_map_bitmap,
        whole=True,
    ),
    Format(
        "nbdinfo-json",
        "nbdinfo --map --json",
        "",
        read_nbdinfo_json,
        write_nbdinfo_json,
        whole=True,
    ),
    Format("rbd-json", "rbd diff --format json", "", read_rbd_json, write_rbd_json),
    Format("imageio", "oVirt imageio's extents", "", read_imageio, write_imageio, whole=True),
    Format("csi", "CSI's SnapshotMetadata, as JSON", "", read_csi, write_csi, fixed=True),
    Format("vmware", "VMware's DiskChangeInfo, as JSON", "", read_vmware, write_vmware),
)
