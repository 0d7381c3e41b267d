# SPDX-License-Identifier: MIT
"""Writes, zeroes and discards at random, eight requests at a time, until its server ends.

Or until SIGTERM, which waits for these eight: nbdkit 1.32 may abort when a client goes amid some.

Run by the system's Python, for libnbd: nbd_writer.py URI SEED END. Prints "writing" when the first
eight are done. What it writes is of no value twice, so every write is a change.
"""

from __future__ import annotations

import random
import signal
import sys

import nbd

uri, seed, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
handle = nbd.NBD()
handle.connect_uri(uri)


def begin() -> None:
    """One request."""
    offset = rng.randrange(end - 1)
    nbytes = min(rng.choice([1, 512, 4096, 5000, 32768]), end - offset)
    kind = rng.randrange(20)
    flags = nbd.CMD_FLAG_FUA if rng.randrange(16) == 0 else 0
    if kind == 0:
        handle.aio_trim(nbytes, offset, flags=flags)
    elif kind < 3:
        hole = rng.choice([0, nbd.CMD_FLAG_NO_HOLE])
        handle.aio_zero(nbytes, offset, flags=flags | hole)
    else:
        data = bytearray(rng.getrandbits(8 * nbytes).to_bytes(nbytes, "little"))
        handle.aio_pwrite(nbd.Buffer.from_bytearray(data), offset, flags=flags)


signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
said = False
while signal.SIGTERM not in signal.sigpending():
    try:
        for _ in range(8):
            begin()
        while handle.aio_in_flight():
            handle.poll(-1)
        if rng.randrange(8) == 0:
            handle.flush()
    except nbd.Error:
        sys.exit(0 if said else 1)
    if not said:
        said = True
        print("writing", flush=True)
handle.shutdown()
