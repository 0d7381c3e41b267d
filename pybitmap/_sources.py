# SPDX-License-Identifier: MIT
"""Where the C core lies, for native code that is compiled with it or against its header."""

from __future__ import annotations

from pathlib import Path


def _csrc() -> Path:
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):  # installed; in the source tree
        if (folder / "hbitmap.h").is_file():
            return folder
    raise FileNotFoundError(f"the C sources are missing beside {package}")


def get_include() -> str:
    """The folder of ``hbitmap.h``, for the compiler's ``-I``."""
    return str(_csrc())


def get_sources() -> list[str]:
    """The C files of the core, to be compiled into another module (C11, with ``-pthread``)."""
    return sorted(str(path) for path in _csrc().glob("*.c"))
