# SPDX-License-Identifier: MIT
"""A guest that writes natively, and backups beside it."""

import emulator

from pybitmap import BlockGraph

with BlockGraph() as graph:
    disk = graph.add_node("disk", size=1 << 30)
    daily = disk.add_bitmap("daily", granularity=65536)
    pin = disk.pin()  # for as long as the emulator has the address
    emulator.install(pin.address)
    emulator.run(10_000)
    with daily.freeze() as frozen:
        copied = daily.count()
        emulator.run(1)
        frozen.done()
    print(copied, "bytes to copy, and", daily.count(), "next time")
    disk.truncate(1 << 20)
    try:
        emulator.run(1_000)
    except OSError as error:
        print("the guest is told:", error.strerror)
    emulator.install(0)
    pin.close()
