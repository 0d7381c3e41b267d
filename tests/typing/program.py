# SPDX-License-Identifier: MIT
"""A user's program, for type checkers: `make types` reads it as several versions of Python do.

It is never run. What is wrong here on purpose has to be seen.
"""

import mmap
from array import array
from collections.abc import Iterator
from typing import Optional

import numpy as np
import numpy.typing as npt

from pybitmap import BlockGraph, BlockNode, DirtyBitmap, HBitmap
from pybitmap.compat import BitMap, BitMap64, FrozenBitMap, bitarray
from pybitmap.livecopy import LiveCopy, Progress, live_copy
from pybitmap.store import LocalStore, Qcow2Store
from pybitmap.trackers import MemoryTracker, Snapshot


class Pages(HBitmap):
    """Of a subclass, what is made of it is of the subclass, too."""

    owner: str = ""


def covers() -> int:
    """pyroaring's and bitarray's interfaces."""
    dirty = BitMap([1, 2], copy_on_write=False)
    dirty |= BitMap(range(5))
    part: BitMap = (dirty & BitMap([1]))[0:1]
    hashed: dict[FrozenBitMap, int] = {FrozenBitMap(part): dirty[0]}
    flags = bitarray(8, "little")
    flags[1:3] = True
    flags[0] = 1
    flags.append(1)  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
    some: bitarray = flags[1:3] ^ ~flags[3:5]
    hb: HBitmap = BitMap64.of(some.hbitmap).hbitmap.drain()
    return hashed[FrozenBitMap(dirty)] + flags[0] + len(hb) + some.find(1)


def bitmaps(starts: "npt.NDArray[np.uint64]", lengths: "npt.NDArray[np.int64]") -> int:
    hb = HBitmap(1 << 20, granularity=9)
    hb.set(0, 512)
    hb.set_many(starts, lengths)
    hb.set_many(starts, 512)
    hb.set_many([1, 2], array("Q", [1, 1]))
    hb.set_many(range(10))
    hb.set_many(["a"], 1)  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    hb.merge_bits(np.zeros(3, np.uint8))
    hb.update(range(5), {7}, hb)
    with mmap.mmap(-1, 1 << 20) as target:
        copied: int = hb.copy_areas(target, bytes(1 << 20))
        hb.copy_areas(np.zeros(1 << 20, np.uint8), b"")
    areas: Iterator[tuple[int, int]] = hb.areas()
    numbers = hb.areas_array()
    start, count = numbers[0]
    hb.set_many(numbers.offset, numbers.length)
    hb.set(hb.items_array()[0], start + count)
    hb.update(hb.items_array(), *[numbers[1:].offset])
    mask: memoryview = HBitmap.from_mask(starts > 5, group_size=512).to_mask()
    pages_of: Pages = Pages.from_mask([True, False], size=2)
    HBitmap.from_mask(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    first: Optional[int] = hb.next_dirty(0)
    taken: HBitmap = hb.drain()
    view: memoryview = hb.words
    both: HBitmap = hb | {1, 2}
    pages: Pages = Pages(10) & Pages(10)
    return (
        copied
        + len(list(areas))
        + (first or 0)
        + len(taken)
        + len(view)
        + len(both | pages | pages_of)
        + len(mask)
    )


def disks(graph: BlockGraph, offsets: "npt.NDArray[np.uint64]") -> None:
    node: BlockNode = graph.add_node("disk", 1 << 30, store=LocalStore("disks"))
    graph.add_node("image", store=Qcow2Store("disk.qcow2"))
    daily: DirtyBitmap = node.add_bitmap("daily", persistent=True)
    node.mark_dirty(0, 512)
    node.mark_dirty_many(offsets, 512)
    with node.writing(0, 512):
        pass
    with daily.freeze() as frozen:
        for offset, nbytes in daily.areas():
            print(offset + nbytes)
        frozen.done()
    with graph.transaction() as tx:
        tx.merge("disk", "weekly", ["daily"])
        tx.clear("disk", "daily")

    def copy(offset: int, nbytes: int) -> None:
        print(offset, nbytes)

    def tell(progress: Progress) -> None:
        print(progress.copied / progress.total)

    copied: LiveCopy = live_copy(daily, copy, progress=tell)
    print(copied.nbytes)


def memory(ram: "npt.NDArray[np.uint8]") -> int:
    with MemoryTracker(ram) as tracker, Snapshot(ram) as snapshot:
        dirty: HBitmap = tracker.collect()
        return snapshot.restore(tracker.collect(dirty)) + snapshot.rewind(tracker)
