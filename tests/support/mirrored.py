# SPDX-License-Identifier: MIT
"""What of the C core is mirrored elsewhere: by the litmus tests, and by the models of the protocol.

These say `mirrors: hb_mark, hb_clear`.  tests/litmus/mirrored.txt has a digest of the text of each
such function, without comments and white space, so a test notices when one changes.  Whoever has
looked then whether the mirrors are still true renews the digests:

    python tests/support/mirrored.py
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LITMUS = sorted((ROOT / "tests" / "litmus").glob("*.litmus"))
MIRRORS = [*LITMUS, *(ROOT / "tests" / "core" / f"test_{name}.py" for name in ("protocol", "turn"))]
TABLE = ROOT / "tests" / "litmus" / "mirrored.txt"

COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
FUNCTION = re.compile(r"^[\w*][^;{}=#]*?\b(\w+)\([^;{}]*\)\n\{\n(.*?)^\}", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"\b(hb_\w*fence|atomic_thread_fence)\(")


class Function(NamedTuple):
    file: str
    text: str

    def digest(self) -> str:
        return hashlib.sha256("".join(self.text.split()).encode()).hexdigest()[:16]

    def fences(self) -> list[str]:
        """What each is called, in order."""
        return FENCE.findall(self.text)


def functions() -> dict[str, Function]:
    """All of the core that have a body, without their comments."""
    found = {}
    for path in sorted((ROOT / "csrc").glob("*.[ch]")):
        text = COMMENT.sub(" ", path.read_text())
        for match in FUNCTION.finditer(text):
            found[match[1]] = Function(f"csrc/{path.name}", match[0])
    return found


def mirrored() -> dict[str, list[str]]:
    """The functions, and the files that mirror each."""
    found: dict[str, list[str]] = {}
    for path in MIRRORS:
        for name in names_in(path.read_text()):
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def names_in(text: str) -> Iterator[str]:
    for names in re.findall(r"\bmirrors: ((?:\w+,\s+)*\w+)", text):
        yield from re.findall(r"\w+", names)


def remembered() -> dict[str, str]:
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    return dict(line.split() for line in lines if not line.startswith("#"))


def renew() -> None:
    there = functions()
    lines = ["# A digest of each function that is mirrored; see tests/support/mirrored.py."]
    lines += [f"{name} {there[name].digest()}" for name in sorted(mirrored()) if name in there]
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    renew()
