# SPDX-License-Identifier: MIT
"""Copy what a dirty bitmap has, over NBD, into an earlier copy of the disk.

python nbd_incremental_copy.py URI BITMAP COPY [GRANULARITY]
    qemu-nbd -r -k nbd.sock -B copying -f qcow2 disk.qcow2
    python nbd_incremental_copy.py 'nbd+unix:///?socket=nbd.sock' copying copy.raw

It may be interrupted and run again: the server's bitmap stays as it is. See
docs/howto/nbd-incremental-copy.md.
"""

from __future__ import annotations

import os
import sys

try:
    import nbd
except ImportError:
    raise SystemExit(
        "libnbd's module is missing (Debian: python3-libnbd, for /usr/bin/python3)"
    ) from None

from pybitmap import BitmapError
from pybitmap.integrations.libnbd import context, dirty_bitmap

MOST = 32 << 20  # bytes of one request


def copy(uri: str, name: str, path: str, granularity: int = 65536) -> int:
    """Returns how many bytes were copied; they are on the disk then."""
    handle = nbd.NBD()
    handle.add_meta_context(context(name))
    handle.connect_uri(uri)
    dirty = dirty_bitmap(handle, name, granularity)
    copied = 0
    with open(path, "r+b", buffering=0) as file:
        os.truncate(file.fileno(), handle.get_size())
        for offset, nbytes in dirty.areas():
            for at in range(offset, offset + nbytes, MOST):
                data = handle.pread(min(MOST, offset + nbytes - at), at)
                while data:
                    written = os.pwrite(file.fileno(), data, at)
                    data, at = data[written:], at + written
                    copied += written
        os.fsync(file.fileno())
    handle.shutdown()
    return copied


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    try:
        uri, name, path, *granularity = sys.argv[1:]
        print(f"{copy(uri, name, path, *map(int, granularity))} bytes copied, and synced")
    except (BitmapError, OSError, nbd.Error, ValueError) as error:
        sys.exit(f"not copied: {error}")
    except KeyboardInterrupt:
        sys.exit("not copied: interrupted; run it again")
