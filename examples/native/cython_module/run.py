# SPDX-License-Identifier: MIT
"""A guest that writes natively, and a snapshot beside it."""

from emulator import Emulator

from pybitmap import HBitmap

memory = HBitmap(1 << 30, granularity=12)
guest = Emulator(memory)
guest.run(1_000)
first = memory.drain()
guest.run(10)
guest.close()
print(len(first), "dirty pages, then", len(memory))
