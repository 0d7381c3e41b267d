# SPDX-License-Identifier: MIT
"""The example of docs/howto/backup.md, beside a machine that is written to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from backing_up import new_image
from machines import Machine
from peers import package

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "backup.py"


def test_the_example_makes_a_full_copy_and_increments(memory_path: Path) -> None:
    package("qemu.qmp")
    with Machine({"vda": new_image(memory_path, "vda")}) as machine:
        told = []
        for number in range(2):
            machine.write("vda", f"write -P {number + 1} 0 64k")
            words = map(str, (EXAMPLE, machine.qmp, memory_path / "to", "vda"))
            told.append(subprocess.check_output([sys.executable, *words], text=True))
    assert "all of it, since there is no copy of it yet" in told[0]
    assert "an increment" in told[1]
    assert told[1].endswith("every point can be restored\n")
