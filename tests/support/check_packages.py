# SPDX-License-Identifier: MIT
"""Are these packages fit to be published? ``check_packages.py dist [AGAIN]``, not by pytest.

Looks at what `packages.sh` has built: metadata (twine), what a wheel must not hold
(check-wheel-contents), that a wheel and the source archive have every file of the package that git
has, that binaries and metadata name no folder of the machine that built them, and on Linux that a
wheel's tag says which systems it runs on and that it looks for libraries where they are there. With
AGAIN, a folder where the same was built another time: each file is the same, byte for byte. Says
what it found, exits 1 if something is wrong.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

#: DT_RPATH and DT_RUNPATH, in a dynamic section of 64 bits.
RPATHS = (15, 29)


def files_of(package: Path) -> dict[str, bytes]:
    """What is in a wheel, or in a source archive, there without its top folder."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    found = {}
    with tarfile.open(package) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                found[member.name.partition("/")[2]] = file.read()
    return found


def folders() -> Iterator[bytes]:
    """Of this machine, which nobody else has."""
    for folder in (PROJECT, Path.home(), tempfile.gettempdir(), sys.prefix, sys.base_prefix):
        if str(folder) not in ("/", "/usr", "/usr/local"):
            yield os.fsencode(folder) + b"/"


def rpaths(binary: bytes) -> Iterator[str]:
    """Where an ELF file of 64 bits says that its libraries be looked for.

    Source: System V ABI, "Dynamic Section".
    """

    def number(at: int, nbytes: int) -> int:
        data = binary[at : at + nbytes]
        return int.from_bytes(data, "little") if binary[5] == 1 else int.from_bytes(data, "big")

    sections, size, count = number(40, 8), number(58, 2), number(60, 2)
    for section in range(sections, sections + size * count, size):
        if number(section + 4, 4) != 6:  # SHT_DYNAMIC
            continue
        start, nbytes, strings = (number(section + at, 8 if at < 40 else 4) for at in (24, 32, 40))
        table = number(sections + strings * size + 24, 8)
        for entry in range(start, start + nbytes, 16):
            if number(entry, 8) in RPATHS:
                text = binary[table + number(entry + 8, 8) :]
                yield text[: text.index(b"\0")].decode()


def complaints_of(package: Path, tracked: Sequence[str]) -> Iterator[str]:
    """What is wrong with one package."""
    files = files_of(package)
    wheel = package.suffix == ".whl"
    for name in tracked:
        if wheel:
            inside = name if name.startswith("pybitmap/") else f"pybitmap/{name}"
            wanted = name.endswith((".py", ".pyi", ".pxd", ".typed")) or name.startswith("csrc/")
        else:
            inside, wanted = name, True
        if wanted and inside not in files:
            yield f"{name} is missing"
    for name, data in files.items():
        binary = data[:5] == b"\x7fELF\x02"
        if binary or ".dist-info/" in name or ".egg-info/" in name or name == "PKG-INFO":
            for folder in folders():
                if folder in data:
                    yield f"{name} names {folder.decode()}"
        if binary:
            for path in rpaths(data):
                yield f"{name} looks for libraries in {path!r}"
    if wheel:
        tag = package.stem.split("-")[-1]
        if sys.platform == "linux" and not re.fullmatch(r"((many|musl)linux_\d+_\d+_\w+\.?)+", tag):
            yield f"its tag, {tag}, does not say which systems it runs on"
        if not any(name.startswith("pybitmap/_cffi.") and name.endswith(".so") for name in files):
            yield "no compiled module"


def tracked_files() -> list[str]:
    """Those of the package that git has, and its sources in C."""
    listed = subprocess.run(
        ["git", "-C", PROJECT, "ls-files", "--", "pybitmap", "csrc"],
        capture_output=True,
        text=True,
        check=True,
    )
    return listed.stdout.splitlines()


def main(arguments: Sequence[str]) -> int:
    """Exit code."""
    packages = sorted(Path(arguments[0]).iterdir())
    wrong = []
    if not any(package.suffix == ".whl" for package in packages):
        wrong.append(f"{arguments[0]}: no wheel")
    if not any(package.name.endswith(".tar.gz") for package in packages):
        wrong.append(f"{arguments[0]}: no source archive")
    tracked = tracked_files()
    for package in packages:
        wrong += [f"{package.name}: {each}" for each in complaints_of(package, tracked)]
    wheels = [package for package in packages if package.suffix == ".whl"]
    for program, options, checked in (
        ("twine", ["check", "--strict"], packages),
        ("check-wheel-contents", [], wheels),
    ):
        done = subprocess.run([BIN / program, *options, *checked], capture_output=True, text=True)
        if done.returncode:
            wrong.append(f"{program}: {done.stdout}{done.stderr}")
    for again in arguments[1:]:
        names = {package.name for package in packages}
        others = {package.name for package in Path(again).iterdir()}
        wrong += [f"{name} was built once only" for name in sorted(names ^ others)]
        for name in sorted(names & others):
            one, other = Path(arguments[0], name), Path(again, name)
            if one.read_bytes() != other.read_bytes():
                first, second = files_of(one), files_of(other)
                differing = [
                    each for each in sorted(first | second) if first.get(each) != second.get(each)
                ]
                wrong.append(f"{name} differs: {', '.join(differing) or 'in its frame'}")
    for each in wrong:
        print(each, file=sys.stderr)
    if not wrong:
        compared = ", the same twice" if len(arguments) > 1 else ""
        print(f"fit to be published{compared}: {', '.join(package.name for package in packages)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
