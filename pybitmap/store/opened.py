# SPDX-License-Identifier: MIT
"""Opened files whose end nothing can come between: an interruption leaves no descriptor behind.

``os.open`` answers a number, which is lost if a signal handler raises before it is kept, and
``os.close`` of a number is right once. A FileIO closes itself when nobody has it any more, and may
be closed twice.
"""

from __future__ import annotations

import os
from io import FileIO


def opened(path: str | os.PathLike[str], flags: int) -> FileIO:
    """For its descriptor: ``fileno()``, ``close()``, ``with``. Not inherited by other programs.

    :param flags: of open(2)
    :raises OSError: as open(2)
    """
    return FileIO(path, "r", opener=lambda path, _: os.open(path, flags | os.O_CLOEXEC, 0o600))
