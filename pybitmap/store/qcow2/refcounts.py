# SPDX-License-Identifier: MIT
"""Refcounts: which clusters of an image are free ("Host cluster management").

Clusters are allocated and freed in memory; :meth:`Refcounts.commit` makes that durable before
anything refers to what was allocated, :meth:`Refcounts.release` writes what was freed after nothing
durable refers to it any more. Between them a crash leaks clusters and does nothing worse:

* a refcount block that is new is on disk before the refcount table names it;
* a refcount table that is new is on disk before the header names it.

Both stand behind everything that is in use, with what they were needed for::

    | in use ... | clusters asked for | new refcount blocks | new refcount table |
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator

from ...errors import StoreError
from .image import MAX_REFCOUNT_TABLE, OFFSET_MASK, SECTOR, Claims, Image, pack_table

#: Refcount blocks kept in memory, beside those that are to be written; bytes.
_CACHE = 8 << 20

_NOT_ZERO = re.compile(rb"[^\0]")

#: ``nclusters`` clusters from ``first`` on.
Run = tuple[int, int]


class Refcounts:
    """Of an image that is open for writing; clusters are given by number."""

    def __init__(self, image: Image) -> None:
        self._image, self._file = image, image.file
        self._bits: int = image.refcount_bits
        self._per_block = image.cluster_size * 8 // self._bits
        # Offsets of the blocks; 0: there is none, and all its clusters are free.
        self._table = image.refcount_table()
        self._blocks: dict[int, bytearray] = {}
        # Blocks to be written: the first and the last byte that changed, in whole sectors.
        self._dirty: dict[int, tuple[int, int]] = {}
        # Blocks that the table on disk does not name yet, and a table that the header does not.
        self._new: set[int] = set()
        self._new_table: Run | None = None
        # One that the header may name or not, because writing it failed; and tables that the header
        # does not name any more once a new one is in place.
        self._uncertain_table: Run | None = None
        self._old_tables: list[Run] = []
        # There is no free cluster before this one.
        self._free_from = 0
        # A byte in which some refcount is 0, for those that are not larger than a byte.
        fields = range(0, 8, self._bits)
        mask = (1 << min(self._bits, 8)) - 1
        free = bytes(b for b in range(256) if any(not b >> shift & mask for shift in fields))
        self._has_free = re.compile(b"[" + re.escape(free) + b"]")
        self._check_table()

    def _check_table(self) -> None:
        """
        :raises CorruptError: if the table cannot be right
        """
        image = self._image
        end = image.clusters(image.file_nbytes) << image.cluster_bits
        blocks = [entry for entry in self._table if entry]
        if any(entry & (image.cluster_size - 1) or entry >= end for entry in blocks):
            raise self._file.corrupt("the refcount table names blocks that are not in the file")

    # ---- looking ----------------------------------------------------------------------------

    def get(self, cluster: int) -> int:
        index, i = divmod(cluster, self._per_block)
        if index >= len(self._table) or not self._table[index]:
            return 0
        return self._field(self._block(index), i)

    def check(self, claims: Claims) -> None:
        """Is all that is in use known to be so? What is not, would be given away.

        Goes through the header's tables and the L2 tables of the disk, not through the disk's data:
        that is what qemu-img check does.

        :param claims: has the bitmaps and the header's tables
        :raises CorruptError: if not, or if an L2 table or a refcount block is something else too
        """
        image, bits = self._image, self._image.cluster_bits
        claims.claim("a refcount block", [entry >> bits for entry in self._table if entry])
        for cluster in claims:
            if not self.get(cluster):
                raise self._file.corrupt(
                    f"{claims.whose(cluster)} is in cluster {cluster}, which is said to be free: "
                    "run qemu-img check -r all"
                )
        end = image.clusters(image.file_nbytes)
        for entry in image.l1_table():
            cluster = (entry & OFFSET_MASK) >> bits
            if cluster in claims and "bitmap" in claims.whose(cluster):
                raise self._file.corrupt(
                    f"{claims.whose(cluster)} and an L2 table overlap in cluster {cluster}: run "
                    "pybitmap rescue"
                )
            if cluster and (cluster >= end or cluster in claims or not self.get(cluster)):
                raise self._file.corrupt(
                    f"the L1 table names an L2 table in cluster {cluster}, which cannot be: run "
                    "qemu-img check -r all"
                )

    def _block(self, index: int) -> bytearray:
        block = self._blocks.get(index)
        if block is None:
            image = self._image
            block = bytearray(self._file.read_padded(self._table[index], image.cluster_size))
            kept = max(4, _CACHE >> image.cluster_bits)
            if len(self._blocks) > kept + len(self._dirty) + len(self._new):
                needed = self._dirty.keys() | self._new
                self._blocks = {key: self._blocks[key] for key in needed}
            self._blocks[index] = block
        return block

    def _field(self, block: bytearray, i: int) -> int:
        bits = self._bits
        if bits < 8:
            return block[i * bits >> 3] >> (i * bits & 7) & ((1 << bits) - 1)
        nbytes = bits >> 3
        return int.from_bytes(block[i * nbytes : (i + 1) * nbytes], "big")

    def _first_free(self, block: bytearray, i: int) -> int:
        """The first refcount from ``i`` on that is 0; the number of refcounts if none is."""
        bits = self._bits
        if bits > 8:
            nbytes = bits >> 3
            zero = bytes(nbytes)
            while True:
                found = block.find(zero, i * nbytes)
                if found < 0:
                    return self._per_block
                i = -(-found // nbytes)
                if not found % nbytes or block[i * nbytes : (i + 1) * nbytes] == zero:
                    return i
        while i < self._per_block:
            if not self._field(block, i):
                return i
            i += 1
            if not i * bits & 7:
                match = self._has_free.search(block, i * bits >> 3)
                i = match.start() * 8 // bits if match else self._per_block
        return i

    def _first_used(self, block: bytearray, i: int) -> int:
        """The first refcount from ``i`` on that is not 0; the number of refcounts if all are."""
        bits = self._bits
        while i < self._per_block:
            if self._field(block, i):
                return i
            i += 1
            if not i * bits & 7:
                match = _NOT_ZERO.search(block, i * bits >> 3)
                i = match.start() * 8 // bits if match else self._per_block
        return i

    def _free_runs(self, cluster: int) -> Iterator[Run]:
        """Free clusters of the blocks that there are, from a cluster on, in order."""
        first_index, i = divmod(cluster, self._per_block)
        for index in range(first_index, len(self._table)):
            if self._table[index]:
                block = self._block(index)
                while True:
                    i = self._first_free(block, i)
                    if i == self._per_block:
                        break
                    end = self._first_used(block, i)
                    yield index * self._per_block + i, end - i
                    i = end
            i = 0

    def end(self) -> int:
        """All clusters from this one on are free, as far as refcounts know."""
        for index in range(len(self._table) - 1, -1, -1):
            if self._table[index]:
                nbytes = len(self._block(index).rstrip(b"\0"))
                if nbytes:
                    return index * self._per_block + -(-nbytes * 8 // self._bits)
        return 0

    # ---- changing ---------------------------------------------------------------------------

    def allocate(self, count: int) -> list[Run]:
        """Clusters that were free, in order.

        :raises StoreError: nothing was allocated
        """
        runs: list[Run] = []
        missing = count
        try:
            if missing:
                for first, nclusters in self._free_runs(self._free_from):
                    nclusters = min(nclusters, missing)
                    self._fill(first, nclusters)
                    runs.append((first, nclusters))
                    self._free_from = first + nclusters
                    missing -= nclusters
                    if not missing:
                        break
            if missing:
                runs.append((self._extend(missing), missing))
        except BaseException:
            self.free(runs)
            raise
        return runs

    def allocate_one_run(self, count: int) -> int:
        """The first of ``count`` clusters in a row.

        :raises StoreError: nothing was allocated
        """
        start = end = lowest = -1
        for first, nclusters in self._free_runs(self._free_from):
            if first != end:
                start = first
            if lowest < 0:
                lowest = self._free_from = first
            end = first + nclusters
            if end - start >= count:
                self._fill(start, count)
                if start == lowest:
                    self._free_from = start + count
                return start
        return self._extend(count)

    def free(self, runs: Iterable[Run]) -> None:
        """One reference less to each of these clusters."""
        for first, nclusters in runs:
            for cluster in range(first, first + nclusters):
                refcount = self.get(cluster)
                if refcount:
                    self._put(cluster, refcount - 1)
                    if refcount == 1:
                        self._free_from = min(self._free_from, cluster)

    def _fill(self, first: int, nclusters: int) -> None:
        for cluster in range(first, first + nclusters):
            self._put(cluster, 1)

    def _put(self, cluster: int, refcount: int) -> None:
        index, i = divmod(cluster, self._per_block)
        block, bits = self._block(index), self._bits
        start = i * bits >> 3
        if bits < 8:
            shift = i * bits & 7
            keep = block[start] & ~((1 << bits) - 1 << shift)
            block[start] = keep | refcount << shift
        else:
            block[start : start + (bits >> 3)] = refcount.to_bytes(bits >> 3, "big")
        start = start // SECTOR * SECTOR
        low, high = self._dirty.get(index, (start, start))
        self._dirty[index] = min(low, start), max(high, start + SECTOR)

    def _extend(self, count: int) -> int:
        """``count`` clusters behind all that is in use, with the blocks and the table for them."""
        first = self.end()
        nblocks = ntable = 0
        while True:
            end = first + count + nblocks + ntable
            indices = range(first // self._per_block, (end - 1) // self._per_block + 1)
            missing = [i for i in indices if i >= len(self._table) or not self._table[i]]
            table = self._table_clusters(indices[-1] + 1)
            if len(missing) <= nblocks and table <= ntable:
                break
            nblocks, ntable = max(nblocks, len(missing)), max(ntable, table)
        bits = self._image.cluster_bits
        if ntable:
            self._table.extend([0] * ((ntable << bits) // 8 - len(self._table)))
        for number, index in enumerate(missing):
            self._table[index] = first + count + number << bits
            self._blocks[index] = bytearray(self._image.cluster_size)
            self._new.add(index)
        self._fill(first, count + len(missing))
        if ntable:
            if self._new_table is not None:
                if self._new_table == self._uncertain_table:
                    self._old_tables.append(self._new_table)
                else:
                    self.free([self._new_table])
            self._new_table = (first + count + nblocks, ntable)
            self._fill(*self._new_table)
        return first

    def _table_clusters(self, nentries: int) -> int:
        """Of a new table for so many blocks; 0 if the present one has the entries.

        :raises StoreError: if QEMU would not open the image
        """
        if nentries <= len(self._table):
            return 0
        if 8 * nentries > MAX_REFCOUNT_TABLE:
            raise StoreError(f"{self._file.path}: the refcount table is full", errno.EFBIG)
        # Half as much again, so that it does not have to move often.
        return self._image.clusters(min(8 * (nentries + nentries // 2), MAX_REFCOUNT_TABLE))

    # ---- writing ----------------------------------------------------------------------------

    def commit(self) -> None:
        """Everything that was written to the file, and all refcounts, survive a crash.

        :raises StoreError: at worst clusters leak; to be called again
        """
        written = self._write_blocks()
        if self._new_table is not None:
            self._switch_table(*self._new_table)
        elif self._new:
            self._file.sync()
            low, high = min(self._new), max(self._new) + 1
            offset = self._image.refcount_table_offset
            self._file.write(offset + 8 * low, pack_table(self._table[low:high]))
        self._file.sync()
        self._new.clear()
        for index in written:
            self._dirty.pop(index, None)
        if self._new_table is None:
            old, self._old_tables = self._old_tables, []
            self.free(old)

    def _switch_table(self, first: int, nclusters: int) -> None:
        image = self._image
        old = image.refcount_table_offset >> image.cluster_bits, image.refcount_table_clusters
        self._file.write(first << image.cluster_bits, pack_table(self._table))
        self._file.sync()
        self._uncertain_table = self._new_table
        image.switch_refcount_table(first << image.cluster_bits, nclusters)
        self._new_table = self._uncertain_table = None
        self._old_tables.append(old)

    def release(self) -> None:
        """Write what was freed; if that fails, clusters leak until the next time."""
        try:
            written = self._write_blocks(new=False)
        except StoreError:
            return
        for index in written:
            del self._dirty[index]

    def _write_blocks(self, new: bool = True) -> list[int]:
        written = [index for index in sorted(self._dirty) if new or index not in self._new]
        for index in written:
            # All of a block that the file has nothing of.
            low, high = self._dirty[index]
            if index in self._new:
                low, high = 0, self._image.cluster_size
            with memoryview(self._blocks[index]) as block:
                self._file.write(self._table[index] + low, block[low:high])
        return written
