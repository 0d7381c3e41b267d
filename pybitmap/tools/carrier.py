# SPDX-License-Identifier: MIT
"""An empty qcow2 image, into which QEMU stores a bitmap for us to read.

A bitmap of any disk can be merged into one of such an image of the same size, and the image then
be closed: what is dirty is in a file, whose format the store for images knows. It needs neither a
server nor a job, and of the disk only its size.

The format is that of QEMU's ``docs/interop/qcow2.txt``: a header, a table of refcounts with one
block, and a table of which all is unallocated, each in clusters of their own.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from ..errors import InvalidError

_MAGIC = 0x514649FB
_LARGEST_L1 = 32 << 20  # bytes that QEMU takes


def write_carrier(path: str | os.PathLike[str], size: int) -> None:
    """A new image, of a disk that has nothing.

    :param size: of the disk in bytes, a multiple of 512
    :raises InvalidError: for a size that no image has
    :raises OSError: if it cannot be written, or is there already
    """
    if size < 0 or size % 512:
        raise InvalidError(f"an image cannot have a size of {size} bytes")
    for cluster_bits in (16, 21):
        l1_size = -(-size >> 2 * cluster_bits - 3) if size else 0
        if 8 * l1_size <= _LARGEST_L1:
            break
    else:
        raise InvalidError(f"an image cannot have a size of {size} bytes")
    cluster = 1 << cluster_bits
    clusters = 3 + (8 * l1_size + cluster - 1) // cluster
    header = struct.pack(
        ">IIQIIQIIQQIIQQQQII",
        _MAGIC,
        3,  # version
        0,  # no backing file
        0,
        cluster_bits,
        size,
        0,  # not encrypted
        l1_size,
        3 * cluster,  # the first table of data
        cluster,  # the table of refcounts
        1,
        0,  # no snapshots
        0,
        0,  # no features
        0,
        0,
        4,  # refcounts have 2**4 bits
        104,  # bytes of this
    )
    with Path(path).open("xb") as file:
        file.write(header)
        file.seek(cluster)
        file.write(struct.pack(">Q", 2 * cluster))
        file.seek(2 * cluster)
        file.write(struct.pack(">H", 1) * clusters)
        file.truncate(clusters * cluster)
