# SPDX-License-Identifier: MIT
"""Where the C core lies, for native code that is compiled with it or against its header."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path


def _csrc() -> Path:
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):  # installed; in the source tree
        if (folder / "hbitmap.h").is_file():
            return folder
    raise FileNotFoundError(f"the C sources are missing beside {package}")


def get_include() -> str:
    """The folder of ``hbitmap.h``, ``tracker.h`` and ``pybitmap_api.h``, for the compiler's ``-I``.

    ``pybitmap.pc`` is there, too.

    >>> import os
    >>> os.path.exists(os.path.join(get_include(), "hbitmap.h"))
    True
    """
    return str(_csrc())


def get_sources() -> list[str]:
    """The C files of the core, for a program that makes its own bitmaps (C11, with ``-pthread``).

    A module that marks bitmaps of Python's needs none of them: see :mod:`pybitmap.native`.

    >>> import os
    >>> [os.path.basename(source) for source in get_sources()][:3]
    ['arrow.c', 'block.c', 'check.c']
    """
    return sorted(str(path) for path in _csrc().glob("*.c"))


_FLAGS: dict[str, Callable[[], list[str]]] = {
    "--cflags": lambda: [f"-I{get_include()}"],
    "--ldflags": lambda: ["-pthread"],
    "--sources": get_sources,
    "--pkgconfigdir": lambda: [get_include()],
}


def flags(options: Sequence[str]) -> str | None:
    """What ``python -m pybitmap`` prints for these options, quoted for a shell.

    None: not all of them are such (or there is none).

    ``--cflags``: for code that includes the headers; ``--ldflags``: for what is linked with the
    sources; ``--sources``: these; ``--pkgconfigdir``: the folder of ``pybitmap.pc``.
    """
    if not options or not all(option in _FLAGS for option in options):
        return None
    return " ".join(shlex.quote(each) for option in options for each in _FLAGS[option]())
