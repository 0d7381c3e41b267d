# SPDX-License-Identifier: MIT
"""Back up disks of a machine that runs, with what has to be done for them at the instant.

    qemu-system-x86_64 ... -drive file=disk.qcow2,id=vda,if=none -qmp unix:vm.qmp,server=on,wait=off
    python examples/backup.py vm.qmp backups vda [--freeze AGENT]

The first time all of a disk is copied, later what was written since. A database would be flushed in
`before`; a guest with qemu-ga has its file systems frozen by `--freeze`, the socket of its agent.
"""

from __future__ import annotations

import argparse
import sys

from pybitmap.errors import BitmapError
from pybitmap.tools.backup import Hooks, backup, qga_hook, verify


def main() -> int:
    parser = argparse.ArgumentParser(description="Back up disks of a machine that runs.")
    parser.add_argument("qmp", help="the machine's monitor")
    parser.add_argument("directory")
    parser.add_argument("disks", nargs="+")
    parser.add_argument("--freeze", help="the socket of the guest's agent")
    asked = parser.parse_args()
    hooks = Hooks(
        before=lambda: print("all that is written from now on is in the next backup"),
        after=lambda: print("the machine goes on"),
    )
    if asked.freeze:
        hooks = qga_hook(asked.freeze, hooks)
    try:
        done = backup(asked.disks, asked.directory, qmp=asked.qmp, hooks=hooks)
    except BitmapError as error:
        print(f"nothing was backed up: {error}", file=sys.stderr)
        return 1
    for copy in done.point.copies:
        kind = "an increment" if copy.parent else f"all of it, since {copy.reason}"
        print(f"{copy.disk}: {copy.nbytes} bytes, {kind}")
    for disk, why in done.failed.items():
        print(f"{disk} was left out: {why}", file=sys.stderr)
    good = verify(asked.directory).good
    print("every point can be restored" if good else "something is broken: pybitmap verify")
    return 0 if good and not done.failed else 1


if __name__ == "__main__":
    sys.exit(main())
