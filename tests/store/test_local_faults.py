# SPDX-License-Identifier: MIT
"""Every call below a LocalStore fails once: an error with the cause, the old state, a retry.

Or the process is killed there: the old state or the new one, for readers and for writers.
"""

from __future__ import annotations

from pathlib import Path

import preload
import pytest
from local_faults import MODES


@pytest.mark.parametrize("mode", [*MODES, "kill"])
def test_a_fault_below_the_store_leaves_the_old_state(tmp_path: Path, mode: str) -> None:
    library = preload.build(tmp_path)
    with preload.memory_folder(tmp_path) as folder:
        print(preload.run(library, "local_faults.py", folder, mode))
