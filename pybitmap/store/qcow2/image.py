# SPDX-License-Identifier: MIT
"""The header of a qcow2 image, and where everything else of it lies.

The specification is QEMU's ``docs/interop/qcow2``; its sections are named below. All offsets and
sizes are in bytes unless they say clusters.

What makes a change of the bitmaps one step is here as well. The bitmaps extension stands first
behind the header, in the first 512 bytes, which a disk writes as a whole: the *head*. One write of
it switches to another bitmap directory. An image without bitmaps has 32 zero bytes at the end of
its header in that place, counted in ``header_length``: the specification reads zeros there as
fields that are absent. ::

    no bitmaps    | header, header_length 144 ...... 32 zeros | other extensions
    bitmaps       | header, header_length 112 | extension, 32 | other extensions

:meth:`Image.make_room` brings any image into that form. It moves the other extensions, which may
take more than one sector: that write is not atomic, and happens once.
"""

from __future__ import annotations

import errno
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ...errors import CorruptError, StoreError, UnsupportedError
from .file import File

#: What disks write as a whole.
SECTOR = 512

_MAGIC = b"QFI\xfb"
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_V2_NBYTES, _V3_NBYTES = 72, 104
_MIN_CLUSTER_BITS, _MAX_CLUSTER_BITS = 9, 21
#: QEMU's limits; bytes.
MAX_REFCOUNT_TABLE = 8 << 20
_MAX_L1_TABLE = 32 << 20
_MAX_SNAPSHOTS = 65536
_MAX_SNAPSHOT_TABLE = 64 << 20
#: Ours, for all bitmaps of an image together: the largest that a bitmap can have is 8 MiB.
_MAX_TABLES = 64 << 20

# Incompatible features.
_DIRTY, _CORRUPT, _DATA_FILE, _EXTENDED_L2 = 1 << 0, 1 << 1, 1 << 2, 1 << 4
_KNOWN_INCOMPATIBLE = 0b11111
# Autoclear features.
_BITMAPS, _RAW_DATA = 1 << 0, 1 << 1

_END, _FEATURE_NAMES, _BITMAPS_EXTENSION = 0, 0x6803F857, 0x23852875
_ENCRYPTION, _BACKING_FORMAT = 0x0537BE77, 0xE2792ACA
#: Also the name of the external data file, and the format of the backing file.
_KNOWN_EXTENSIONS = (_FEATURE_NAMES, _BITMAPS_EXTENSION, 0x44415441, _BACKING_FORMAT, _ENCRYPTION)
_EXTENSION = struct.Struct(">II")
_BITMAPS_DATA = struct.Struct(">IIQQ")
_ENCRYPTION_DATA = struct.Struct(">QQ")
_SLOT_NBYTES = _EXTENSION.size + _BITMAPS_DATA.size

# How the data of the disk is encrypted ("crypt_method"); the last with a header of its own.
_NOT_AT_ALL, _AES, _LUKS = 0, 1, 2

# Where in the header.
_BACKING_OFFSET, _REFCOUNT_TABLE_OFFSET, _AUTOCLEAR_OFFSET, _LENGTH_OFFSET = 8, 48, 88, 100

#: Of an entry in an L1 or a bitmap table ("Cluster mapping", "Bitmap table").
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
#: Of an L2 entry: its cluster is compressed.
_COMPRESSED = 1 << 62


@dataclass(frozen=True)
class Directory:
    """What the bitmaps extension says ("Bitmaps extension")."""

    nbitmaps: int
    nbytes: int
    offset: int


def version_of(head: bytes) -> int | None:
    """Of a qcow2 image that begins like this, eight bytes at least; None: it is none."""
    return int.from_bytes(head[4:8], "big") if head.startswith(_MAGIC) else None


class Claims:
    """What each cluster is for: two things cannot be in one."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._whose: dict[int, str] = {0: "the header"}
        self._nbytes = 0

    def claim(self, what: str, clusters: Sequence[int], nbytes: int = 0) -> None:
        """
        :param nbytes: of memory that it will take
        :raises CorruptError: if one of the clusters is claimed, or all claims take too much
        """
        self._nbytes += nbytes
        if self._nbytes > _MAX_TABLES:
            raise StoreError(
                f"{self._file.path}: the tables of the bitmaps have more than {_MAX_TABLES} bytes",
                errno.EFBIG,
            )
        before = len(self._whose)
        for cluster in clusters:
            other = self._whose.setdefault(cluster, what)
            if other is not what:
                advice = ": run pybitmap rescue" if "bitmap" in what + other else ""
                raise self._file.corrupt(f"{what} and {other} overlap in cluster {cluster}{advice}")
        if len(self._whose) - before != len(clusters):
            advice = ": run pybitmap rescue" if "bitmap" in what else ""
            raise self._file.corrupt(f"{what} has a cluster twice{advice}")

    def __contains__(self, cluster: int) -> bool:
        return cluster in self._whose

    def __iter__(self) -> Iterator[int]:
        return iter(self._whose)

    def whose(self, cluster: int) -> str:
        return self._whose[cluster]


class Image:
    """An open image: its header, checked.

    :param faults: takes what is wrong with the bitmaps extension, sentences; it is an error
        without. Refcounts that may be wrong are none then, either.
    :raises CorruptError: if it is damaged, or no qcow2 image
    :raises UnsupportedError: for an image with what is not known here
    :raises StoreError: for another that we must not touch, and why
    """

    def __init__(self, file: File, *, read_only: bool, faults: list[str] | None = None) -> None:
        self.file = file
        self._faults = faults
        self.file_nbytes = file.size()
        #: The first sector as it is on disk.
        self._head = bytearray(file.read_padded(0, SECTOR))
        head = self._head
        magic, self.version, *fields = _V2.unpack_from(head)
        if magic != _MAGIC:
            raise file.corrupt("not a qcow2 image")
        if self.file_nbytes < (_V3_NBYTES if self.version == 3 else _V2_NBYTES):
            raise file.corrupt("the file ends amid its header")
        if self.version not in (2, 3):
            raise self.unsupported(f"a qcow2 image of version {self.version}")
        backing_offset, backing_nbytes, cluster_bits, self.size, crypt_method = fields[:5]
        l1_size, l1_offset, *rest = fields[5:]
        self.refcount_table_offset, self.refcount_table_clusters, nsnapshots, snapshots = rest
        if not _MIN_CLUSTER_BITS <= cluster_bits <= _MAX_CLUSTER_BITS:
            raise self.unsupported(f"an image with clusters of 2**{cluster_bits} bytes")
        self.cluster_bits: int = cluster_bits
        self.cluster_size: int = 1 << cluster_bits
        if self.size >= 1 << 63:
            raise file.corrupt(f"the disk has {self.size} bytes")
        #: What stands behind the extensions in the first cluster.
        self._backing = (backing_offset, backing_nbytes)
        if backing_offset and backing_nbytes > 1023:
            raise file.corrupt(f"the name of the backing file has {backing_nbytes} bytes")
        self._l1 = (l1_offset, l1_size)
        self._snapshots = (snapshots, nsnapshots)
        self.refcount_bits = 16
        self._incompatible = self._autoclear = 0
        self._length = _V2_NBYTES
        #: The bitmaps extension, None if there is none.
        self.directory: Directory | None = None
        #: The extensions in their order, as they are; None: that of the bitmaps.
        self._extensions: list[bytes | None] = []
        #: Where the header of the encryption lies: offset and bytes.
        self._encryption: tuple[int, int] | None = None
        if self.version == 3:
            self._read_version_3()
        self._crypt_method: int = crypt_method
        self._check_encryption(crypt_method)
        if self._incompatible & _CORRUPT:
            raise file.corrupt("the image is marked as corrupt: run qemu-img check -r all")
        if self.is_dirty and not read_only and faults is None:
            raise StoreError(
                f"{file.path} was not closed in an orderly way, its refcounts may be wrong: run "
                "qemu-img check -r all",
                errno.EUCLEAN,
            )

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self.file.path}: {what} is not supported")

    def _read_version_3(self) -> None:
        fields = _V3.unpack_from(self._head, _V2_NBYTES)
        self._incompatible, _, self._autoclear, refcount_order, self._length = fields
        if refcount_order > 6:
            raise self.file.corrupt(f"refcounts of 2**{refcount_order} bits")
        self.refcount_bits = 1 << refcount_order
        if self._length < _V3_NBYTES or self._length % 8 or self._length > self.cluster_size:
            raise self.file.corrupt(f"the header has {self._length} bytes")
        unknown = self._incompatible & ~_KNOWN_INCOMPATIBLE
        self._read_extensions(unknown)
        if unknown:
            bit = unknown.bit_length() - 1
            raise self.unsupported(f"incompatible feature {self._feature_name(bit)}")
        if self.has_bitmaps and None not in self._extensions:
            self._fault("there are said to be bitmaps, but there is no such extension")
            self._find_misnamed_extension()

    def _check_encryption(self, method: int) -> None:
        """Only what the disk holds is encrypted: the bitmaps are not, nor what they need.

        :raises UnsupportedError: if that cannot be said, as of a method that is not known
        """
        if method not in (_NOT_AT_ALL, _AES, _LUKS):
            raise self.unsupported(f"an image encrypted by method {method}")
        if method == _LUKS and self.version == 3 and self._encryption is None:
            raise self.file.corrupt("it is encrypted by LUKS, but does not say where its header is")

    def _read_extensions(self, unknown: int) -> None:
        """ "Header extensions" """
        end = self._extensions_end
        data = self.file.read_padded(0, end)
        offset = self._length
        while offset + _EXTENSION.size <= end:
            kind, nbytes = _EXTENSION.unpack_from(data, offset)
            start = offset + _EXTENSION.size
            if self._is_overwritten(data, offset):
                self._fault("the bitmaps extension is overwritten")
                self._extensions.append(None)
                offset += _SLOT_NBYTES
                continue
            if kind == _END:
                break
            if kind == _BITMAPS_EXTENSION and nbytes != _BITMAPS_DATA.size:
                self._fault(f"the bitmaps extension has {nbytes} bytes")
                nbytes = _BITMAPS_DATA.size
            offset = start + -(-nbytes // 8) * 8
            if start + nbytes > end:
                raise self.file.corrupt(f"header extension {kind:#x} has {nbytes} bytes")
            if kind != _BITMAPS_EXTENSION:
                self._extensions.append(data[start - _EXTENSION.size : offset])
                if kind == _ENCRYPTION:
                    self._read_encryption(data[start : start + nbytes])
            elif None in self._extensions:
                self._fault("the bitmaps extension is there twice")
                self._extensions.append(None)
            else:
                self._extensions.append(None)
                self._read_bitmaps_extension(data, start)
                self._in_place = start == self._length + _EXTENSION.size and offset <= SECTOR

    def _read_bitmaps_extension(self, data: bytes, start: int) -> None:
        """ "Bitmaps extension" """
        nbitmaps, reserved, directory_nbytes, directory = _BITMAPS_DATA.unpack_from(data, start)
        if reserved and self.has_bitmaps:
            self._fault("the bitmaps extension has reserved bits set")
        self.directory = Directory(nbitmaps, directory_nbytes, directory)

    def _is_overwritten(self, data: bytes, offset: int) -> bool:
        """Is what stands there no extension, where that of the bitmaps is missing?

        Whoever cannot go on like this sees no extension behind it, or no image at all.
        """
        if self._faults is None or not self.has_bitmaps or None in self._extensions:
            return False
        kind, nbytes = _EXTENSION.unpack_from(data, offset)
        if kind == _BITMAPS_EXTENSION or offset + _SLOT_NBYTES > len(data):
            return False
        if kind != _END:
            return bool(offset + _EXTENSION.size + nbytes > len(data))
        if any(data[offset : offset + _SLOT_NBYTES]):
            return False
        # The end, unless others follow.
        offset += _SLOT_NBYTES
        found = False
        while offset + _EXTENSION.size <= len(data):
            kind, nbytes = _EXTENSION.unpack_from(data, offset)
            if kind == _END:
                break
            found = True
            offset += _EXTENSION.size + -(-nbytes // 8) * 8
        return found and offset <= len(data)

    def _find_misnamed_extension(self) -> None:
        """One that is not known and can be that of the bitmaps, and only that, is it."""
        for i, extension in enumerate(self._extensions):
            if extension is None or len(extension) != _SLOT_NBYTES:
                continue
            kind, nbytes = _EXTENSION.unpack_from(extension)
            nbitmaps, reserved, *place = _BITMAPS_DATA.unpack_from(extension, _EXTENSION.size)
            directory = Directory(nbitmaps, *place)
            if (
                kind not in _KNOWN_EXTENSIONS
                and nbytes == _BITMAPS_DATA.size
                and not reserved
                and 0 < nbitmaps <= directory.nbytes
                and self.bad_area(directory.offset, directory.nbytes) is None
            ):
                self._extensions[i], self.directory = None, directory
                return

    def _fault(self, what: str) -> None:
        """Note what is wrong with the bitmaps.

        :raises CorruptError: unless they are to be rescued
        """
        if self._faults is None:
            raise self.bad_bitmaps(what)
        self._faults.append(what)

    def bad_bitmaps(self, what: str) -> CorruptError:
        """The error for damage of the bitmaps as a whole: ``what`` is a sentence about it."""
        # Where they are not said to be consistent, programs drop them: no need.
        return self.file.corrupt(f"{what}: run pybitmap rescue" if self.has_bitmaps else what)

    @property
    def _extensions_end(self) -> int:
        """Where the extensions must have come to their end."""
        backing = self._backing[0]
        return backing if 0 < backing < self.cluster_size else self.cluster_size

    @property
    def header_nbytes(self) -> int:
        """Of the sectors that the header and its extensions can be in."""
        return -(-self._extensions_end // SECTOR) * SECTOR

    @property
    def _others(self) -> list[bytes]:
        """The extensions that are not the bitmaps'."""
        return [each for each in self._extensions if each is not None]

    @property
    def backing_name(self) -> bytes | None:
        """Of the backing file, if there is one ("backing_file_offset")."""
        offset, nbytes = self._backing
        return self.file.read_padded(offset, nbytes) if offset else None

    @property
    def backing_format(self) -> bytes | None:
        """The format of the backing file, if it is said ("Header extensions")."""
        for extension in self._others:
            kind, nbytes = _EXTENSION.unpack_from(extension)
            if kind == _BACKING_FORMAT:
                return extension[_EXTENSION.size : _EXTENSION.size + nbytes]
        return None

    @property
    def has_data_file(self) -> bool:
        """Is the data of the disk in another file? ("incompatible_features")"""
        return bool(self._incompatible & _DATA_FILE)

    @property
    def is_encrypted(self) -> bool:
        """Is the data of the disk? ("crypt_method")"""
        return self._crypt_method != _NOT_AT_ALL

    @property
    def is_dirty(self) -> bool:
        """May refcounts be wrong, since the image was not closed? ("incompatible_features")"""
        return bool(self._incompatible & _DIRTY)

    def _read_encryption(self, data: bytes) -> None:
        """ "Full disk encryption header pointer" """
        if self._encryption is not None or len(data) != _ENCRYPTION_DATA.size:
            raise self.file.corrupt("the pointer to the encryption's header is damaged, or twice")
        self._encryption = _ENCRYPTION_DATA.unpack(data)

    #: Does the extension stand first, in the first sector?
    _in_place = False

    def _feature_name(self, bit: int) -> str:
        """As the image itself calls it ("Feature name table")."""
        for extension in self._others:
            kind, nbytes = _EXTENSION.unpack_from(extension)
            entries = extension[_EXTENSION.size : _EXTENSION.size + nbytes]
            if kind == _FEATURE_NAMES:
                for i in range(0, len(entries) - 47, 48):
                    if entries[i : i + 2] == bytes([0, bit]):
                        name = entries[i + 2 : i + 48].rstrip(b"\0")
                        return repr(name.decode("utf-8", "backslashreplace"))
        return f"bit {bit}"

    @property
    def has_bitmaps(self) -> bool:
        """Is the bitmaps extension said to be consistent? ("autoclear_features")"""
        return bool(self._autoclear & _BITMAPS)

    # ---- clusters ---------------------------------------------------------------------------

    def clusters(self, nbytes: int) -> int:
        """How many clusters that many bytes take."""
        return (nbytes + self.cluster_size - 1) >> self.cluster_bits

    def check_area(self, what: str, offset: int, nbytes: int) -> range:
        """The clusters of something.

        :raises CorruptError: if it does not lie in the file, or not on a cluster boundary
        """
        reason = self.bad_area(offset, nbytes)
        if reason:
            raise self.file.corrupt(f"{what} {reason}")
        first = offset >> self.cluster_bits
        return range(first, first + self.clusters(nbytes))

    def bad_area(self, offset: int, nbytes: int) -> str | None:
        """What is wrong with a place in the file; None if nothing is."""
        if offset & (self.cluster_size - 1):
            return f"is not aligned to a cluster: offset {offset:#x}"
        if not offset:
            return "lies in the header: offset 0"
        # The last cluster of a file may be cut short.
        if offset + nbytes > self.clusters(self.file.size()) << self.cluster_bits:
            return f"lies beyond the end of the file: offset {offset:#x}, {nbytes} bytes"
        return None

    def read_table(self, offset: int, nentries: int) -> array[int]:
        """64-bit entries."""
        return _swapped(array("Q", self.file.read_padded(offset, 8 * nentries)))

    def refcount_table(self) -> array[int]:
        """
        :raises CorruptError: if it does not lie in the file
        """
        nbytes = self.refcount_table_clusters << self.cluster_bits
        if not 0 < nbytes <= MAX_REFCOUNT_TABLE:
            raise self.file.corrupt(f"the refcount table has {nbytes} bytes")
        self.check_area("the refcount table", self.refcount_table_offset, nbytes)
        return self.read_table(self.refcount_table_offset, nbytes // 8)

    def l1_table(self) -> array[int]:
        """Of the disk as it is now.

        :raises CorruptError: if it does not lie in the file
        """
        offset, nentries = self._l1
        if not nentries:
            return array("Q")
        if 8 * nentries > _MAX_L1_TABLE:
            raise self.file.corrupt(f"the L1 table has {nentries} entries")
        self.check_area("the L1 table", offset, 8 * nentries)
        return self.read_table(offset, nentries)

    def claim_tables(self, claims: Claims) -> None:
        """What the header names, but for the bitmaps.

        :raises CorruptError: if one of them does not lie in the file, or two overlap
        """
        what = "the refcount table"
        nbytes = self.refcount_table_clusters << self.cluster_bits
        claims.claim(what, self.check_area(what, self.refcount_table_offset, nbytes))
        what = "the L1 table"
        offset, nentries = self._l1
        if nentries:
            claims.claim(what, self.check_area(what, offset, 8 * nentries))
        if self._encryption is not None:
            what = "the encryption's header"
            claims.claim(what, self.check_area(what, *self._encryption))
        self._claim_snapshots(claims)

    def _claim_snapshots(self, claims: Claims) -> None:
        """The table of the snapshots and their L1 tables ("Snapshots")."""
        offset, nbytes, l1_tables = self._read_snapshots()
        what = "the snapshot table"
        if nbytes:
            claims.claim(what, self.check_area(what, offset, nbytes))
        what = "the L1 table of a snapshot"
        for l1, l1_size in l1_tables.items():
            if l1_size:
                claims.claim(what, self.check_area(what, l1, 8 * l1_size))

    def snapshot_l1_tables(self) -> list[array[int]]:
        """Those that :meth:`claim_tables` has nothing against."""
        _, _, l1_tables = self._read_snapshots()
        return [self.read_table(l1, l1_size) for l1, l1_size in l1_tables.items()]

    def _read_snapshots(self) -> tuple[int, int, dict[int, int]]:
        """Their table, its offset and bytes; of each L1 table the offset and its entries."""
        offset, nsnapshots = self._snapshots
        if not nsnapshots:
            return 0, 0, {}
        if nsnapshots > _MAX_SNAPSHOTS:
            raise self.file.corrupt(f"there are {nsnapshots} snapshots")
        what = "the snapshot table"
        self.check_area(what, offset, 40 * nsnapshots)
        l1_tables: dict[int, int] = {}
        end = offset
        for _ in range(nsnapshots):
            fixed = self.file.read_padded(end, 40)
            l1, l1_size, id_nbytes, name_nbytes = struct.unpack_from(">QIHH", fixed)
            extra_nbytes = int.from_bytes(fixed[36:40], "big")
            end += -(-(40 + extra_nbytes + id_nbytes + name_nbytes) // 8) * 8
            if end - offset > _MAX_SNAPSHOT_TABLE:
                raise self.file.corrupt(f"{what} has more than {_MAX_SNAPSHOT_TABLE} bytes")
            l1_tables[l1] = max(l1_size, l1_tables.get(l1, 0))
        return offset, end - offset, l1_tables

    def l2_clusters(self, offset: int) -> set[int]:
        """The clusters of this file that an L2 table names ("Cluster mapping")."""
        bits = self.cluster_bits
        entries = self.read_table(offset, self.cluster_size // 8)
        if self._incompatible & _EXTENDED_L2:
            entries = entries[::2]
        shift = 62 - (bits - 8)
        found: set[int] = set()
        if not self._incompatible & _DATA_FILE:
            found |= {(each & OFFSET_MASK) >> bits for each in entries if not each & _COMPRESSED}
        for entry in entries:
            if entry & _COMPRESSED:
                start = entry & ((1 << shift) - 1)
                nsectors = (entry >> shift & ((1 << (bits - 8)) - 1)) + 1
                end = start // SECTOR * SECTOR + nsectors * SECTOR
                found.update(range(start >> bits, self.clusters(end)))
        return found - {0}

    # ---- changes ----------------------------------------------------------------------------

    def begin_writing(self) -> None:
        """Clear the autoclear features that we do not know: to be done before anything else is
        written ("autoclear_features"). Durable when it returns."""
        if self._autoclear & ~(_BITMAPS | _RAW_DATA):
            self._write_head(self._with_autoclear(self._autoclear & (_BITMAPS | _RAW_DATA)))

    def make_room(self) -> None:
        """Let the bitmaps extension, or the room for it, stand first. Durable when it returns.

        :raises StoreError: if there is no room in the header's cluster
        """
        base = self._room()
        if base is not None:
            return
        base = self._length
        if base + _SLOT_NBYTES > SECTOR:
            raise self._no_room()
        header = bytearray(self.file.read_padded(0, base))
        others = b"".join(self._others) + bytes(_EXTENSION.size)
        if self.directory is None:
            slot = bytes(_SLOT_NBYTES)
            struct.pack_into(">I", header, _LENGTH_OFFSET, base + _SLOT_NBYTES)
        else:
            slot = _pack(self.directory)
        data = header + slot + others
        offset, nbytes = self._backing
        if 0 < offset < self.cluster_size:
            name = self.file.read_padded(offset, nbytes)
            struct.pack_into(">Q", data, _BACKING_OFFSET, len(data))
            offset = len(data)
            data += name
        if len(data) > self.cluster_size:
            raise self._no_room()
        # Whatever stood there before, nothing reads it.
        data = data.ljust(min(self.cluster_size, -(-len(data) // SECTOR) * SECTOR), b"\0")
        self._write_or_restore(data)
        self._head = data[:SECTOR]
        self._backing = (offset, nbytes)
        if self.directory is None:
            self._length += _SLOT_NBYTES
        else:
            self._in_place = True

    def _write_or_restore(self, data: bytearray, offset: int = 0) -> None:
        """Write to the header, durably; what was there comes back if that fails."""
        before = self.file.read_padded(offset, len(data))
        try:
            self.file.write(offset, data)
            self.file.sync()
        except StoreError:
            # It may have been written in part. After this, either may be on disk.
            with suppress(StoreError):
                self.file.write(offset, before)
            raise

    def _no_room(self) -> StoreError:
        return StoreError(
            f"{self.file.path}: no room for the bitmaps extension in the header's cluster of "
            f"{self.cluster_size} bytes",
            errno.ENOSPC,
        )

    def _room(self) -> int | None:
        """Where the extension stands, or can: None if the header has to be moved first."""
        if self.directory is not None:
            return self._length if self._in_place else None
        base = self._length - _SLOT_NBYTES
        if (
            base >= _V3_NBYTES
            and self._length <= SECTOR
            and not any(self._head[base : self._length])
        ):
            return base
        return None

    def switch(self, directory: Directory | None) -> None:
        """Let the image have these bitmaps (None: none), in one write; durable when it returns.

        :raises StoreError: either may be so then
        """
        base = self._room()
        assert base is not None, "make_room comes first"
        autoclear = self._autoclear & _RAW_DATA
        if directory is not None:
            autoclear |= _BITMAPS
        head = self._with_autoclear(autoclear)
        slot = bytes(_SLOT_NBYTES) if directory is None else _pack(directory)
        length = base + _SLOT_NBYTES if directory is None else base
        head[base : base + _SLOT_NBYTES] = slot
        struct.pack_into(">I", head, _LENGTH_OFFSET, length)
        self._write_head(head)
        self._length, self.directory = length, directory
        self._in_place = directory is not None

    def replacement(self, directory: Directory | None) -> list[tuple[int, bytearray]]:
        """The writes, whole sectors, that let the image have these bitmaps (None: none), whatever
        its extension was.

        The extension stays where it is, so that only what is in it changes: as a rule that lies in
        one sector, which disks write as a whole. If it goes, and lies in another sector than
        ``autoclear_features``, these go first: whoever opens the image in between finds
        bitmaps that are not to be believed.
        """
        nbytes = self.header_nbytes
        before = self.file.read_padded(0, nbytes)
        after = bytearray(before)
        autoclear = self._autoclear & _RAW_DATA
        struct.pack_into(">Q", after, _AUTOCLEAR_OFFSET, autoclear | _BITMAPS * bool(directory))
        extensions = self._extensions
        if directory is not None:
            first = extensions.index(None)
            extensions = [_pack(directory) if i == first else x for i, x in enumerate(extensions)]
        elif extensions[:1] == [None] and self._length + _SLOT_NBYTES <= SECTOR:
            # As switch() leaves it.
            struct.pack_into(">I", after, _LENGTH_OFFSET, self._length + _SLOT_NBYTES)
            extensions = [bytes(_SLOT_NBYTES), *extensions[1:]]
        data = b"".join(each for each in extensions if each is not None)
        end = self._length + len(data)
        after[self._length : end] = data
        if end + _EXTENSION.size <= self._extensions_end:
            after[end : end + _EXTENSION.size] = bytes(_EXTENSION.size)
        writes = []
        if directory is None and before[SECTOR:] != after[SECTOR:]:
            head = self._with_autoclear(autoclear)
            if head != before[:SECTOR]:
                writes.append((0, head))
                before = bytes(head) + before[SECTOR:]
        changed = [i for i in range(0, nbytes, SECTOR) if before[i:][:SECTOR] != after[i:][:SECTOR]]
        if changed:
            writes.append((changed[0], after[changed[0] : changed[-1] + SECTOR]))
        return writes

    def replace(self, directory: Directory | None) -> None:
        """Write that; durable when it returns. The image is to be opened anew then.

        :raises StoreError: either may be so then
        """
        for offset, data in self.replacement(directory):
            self._write_or_restore(data, offset)

    def switch_refcount_table(self, offset: int, nclusters: int) -> None:
        """Let the refcount table be elsewhere, in one write; durable when it returns.

        :raises StoreError: either may be so then
        """
        head = bytearray(self._head)
        struct.pack_into(">QI", head, _REFCOUNT_TABLE_OFFSET, offset, nclusters)
        self._write_head(head)
        self.refcount_table_offset, self.refcount_table_clusters = offset, nclusters

    def _with_autoclear(self, autoclear: int) -> bytearray:
        head = bytearray(self._head)
        struct.pack_into(">Q", head, _AUTOCLEAR_OFFSET, autoclear)
        return head

    def _write_head(self, head: bytearray) -> None:
        self._write_or_restore(head)
        self._head = head
        self._autoclear = int.from_bytes(head[_AUTOCLEAR_OFFSET : _AUTOCLEAR_OFFSET + 8], "big")


def _pack(directory: Directory) -> bytes:
    return _EXTENSION.pack(_BITMAPS_EXTENSION, _BITMAPS_DATA.size) + _BITMAPS_DATA.pack(
        directory.nbitmaps, 0, directory.nbytes, directory.offset
    )


def pack_table(entries: array[int]) -> bytes:
    """64-bit entries as they stand in the file."""
    return _swapped(entries[:]).tobytes()


def _swapped(entries: array[int]) -> array[int]:
    if sys.byteorder == "little":
        entries.byteswap()
    return entries
