# SPDX-License-Identifier: MIT
"""Reads what libdirty.so has written, while QEMU runs or afterwards, and prints the dirty areas.

python areas.py FILE: a line for each, its start and its length in bytes. What was not recorded (see
README.md) is said on standard error, and the exit status is 1.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass

from pybitmap import HBitmap

HEADER, OUTSIDE, ENDED = 4096, 4080, 4088


@dataclass
class Recording:
    #: Of the addresses from `base` on.
    bitmap: HBitmap
    base: int
    #: "virtual" or "physical".
    addresses: str
    #: QEMU's name of the guest's processor.
    target: str
    #: Stores outside of the bitmap, or of which QEMU does not say where they go.
    outside: int
    #: Has QEMU come to its end by itself? False: it runs, or it was killed, perhaps by the guest.
    ended: bool


def load(path: str | os.PathLike[str]) -> Recording:
    """What has been recorded so far; a copy, which QEMU goes on without.

    :raises ValueError: if it is no such file, or not of this machine's kind
    """
    with open(path, "rb") as file:
        content = bytearray(file.read())
    try:
        told = json.loads(content[:OUTSIDE])
        known = told["pybitmap"], told["version"], told["leaf"]
        if known != ("leaf", 1, HEADER):
            raise ValueError
        order, leaf = told["byteorder"], content[HEADER:]
        bitmap = HBitmap.over(leaf, told["size"], group_size=told["granularity"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{os.fspath(path)} is no file of libdirty.so") from None
    if order != sys.byteorder:
        raise ValueError(f"{os.fspath(path)} has words in {order}-endian order")
    return Recording(
        bitmap,
        told["base"],
        told["addresses"],
        told["target"],
        int.from_bytes(content[OUTSIDE:ENDED], sys.byteorder),
        content[ENDED] == 1,
    )


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        found = load(sys.argv[1])
    except (OSError, ValueError) as error:
        print(f"areas.py: {error}", file=sys.stderr)
        return 1
    for start, nbytes in found.bitmap.areas():
        print(f"{found.base + start:#x} {nbytes:#x}")
    if found.outside:
        print(
            f"areas.py: {found.outside} stores are not in it: outside of base and size, or of "
            "which QEMU does not say where they go",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # as by `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
