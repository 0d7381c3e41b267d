# SPDX-License-Identifier: MIT
"""Counts on two disks, in turn: number n on the second when it is on the first, and then n + 1.

So at any instant the first has what the second has, or one more. Run by the system's Python, for
libnbd: nbd_counter.py URI URI. Prints "counting" when it has begun; ends with its server.
"""

from __future__ import annotations

import itertools
import sys

import nbd

handles = [nbd.NBD(), nbd.NBD()]
for handle, uri in zip(handles, sys.argv[1:]):
    handle.connect_uri(uri)
for number in itertools.count(1):
    for handle in handles:
        try:
            handle.pwrite(number.to_bytes(8, "little"), 0)
            handle.pwrite(bytes([number % 256]) * 4096, 65536 + number * 65536 % (2 << 20))
        except nbd.Error:
            sys.exit(0)
    if number == 1:
        print("counting", flush=True)
