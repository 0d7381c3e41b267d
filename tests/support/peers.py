# SPDX-License-Identifier: MIT
"""Programs that tests compare with: used where they are, skipped by name where they are not."""

from __future__ import annotations

import os
import shutil

import pytest


def peer(name: str, package: str) -> str:
    """The path of a program.  Missing, it skips the test; or fails it, if PYBITMAP_REQUIRE_PEERS=1.

    package: the Debian package that has it.
    """
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is not installed (Debian package {package})"
        if os.environ.get("PYBITMAP_REQUIRE_PEERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path
