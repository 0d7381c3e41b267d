# SPDX-License-Identifier: MIT
"""What several tests of the Python side need besides the model."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path


def collect() -> None:
    """Everything unreachable is gone afterwards, on PyPy too: what one finalizer lets go goes
    with the next collection."""
    for _ in range(3):
        gc.collect()


def run_python(code: str) -> str:
    """What the code prints in an interpreter of its own, which may crash."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,  # where no pybitmap is but the installed one
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    return done.stdout
