# SPDX-License-Identifier: MIT
"""The example of a disk that survives kill -9, run as it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "survives_kill.py"


def test_the_next_process_finds_all_that_was_written(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), str(tmp_path)]
    for _ in range(2):  # the second time it goes on with what is there
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "the copy equals the disk" in done.stdout
        assert "killed; 0 bytes" not in done.stdout
