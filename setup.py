# SPDX-License-Identifier: MIT
"""What pyproject.toml cannot say: compiled modules, the tag of the wheel, the same bytes twice."""

from __future__ import annotations

import gzip
import io
import os
import sys
import tarfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.sdist import sdist

cpython = sys.implementation.name == "cpython" and "t" not in getattr(sys, "abiflags", "")

# The limited API has METH_FASTCALL from 3.10 on. So 3.9 builds for itself; the file that the others
# build refuses to be loaded there. The wheel is right for all of them either way: without _fast
# everything goes through cffi.
limited_api = sys.version_info >= (3, 10)

fast = Extension(
    "pybitmap._fast",
    ["pybitmap/_fast.c"],
    depends=["csrc/hbitmap.h", "csrc/tracker.h"],
    include_dirs=["csrc"],
    extra_compile_args=["-std=c11", "-O3", "-fvisibility=hidden"],
    define_macros=[("Py_LIMITED_API", "0x030a0000")] if limited_api else [],
    py_limited_api=limited_api,
    optional=True,
)

#: The time of what is in the source archive; where nobody says another, the first that zip has.
EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH", 315532800))


class Sdist(sdist):
    """A source archive that is the same, byte for byte, whoever makes it, when and where."""

    def make_archive(
        self,
        base_name: str,
        format: str,
        root_dir: str | None = None,
        base_dir: str | None = None,
        owner: str | None = None,
        group: str | None = None,
    ) -> str:
        if format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        assert base_dir is not None
        name = f"{base_name}.tar.gz"
        os.makedirs(os.path.dirname(name), exist_ok=True)
        content = io.BytesIO()
        with tarfile.open(mode="w", fileobj=content, format=tarfile.PAX_FORMAT) as archive:
            for path in sorted(path for path in Path(base_dir).rglob("*") if path.is_file()):
                archive.add(path, filter=anonymous)
        Path(name).write_bytes(gzip.compress(content.getvalue(), mtime=EPOCH))
        return name


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nobody's, of no time of its own; whether it can be run is all that is kept of its mode."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = EPOCH
    member.mode = 0o755 if member.mode & 0o100 else 0o644
    if not member.isfile():  # sdist makes hard links of what it finds, tar may see them as such
        raise ValueError(f"{member.name} is no plain file")
    return member


setup(
    cffi_modules=["csrc/ffi_build.py:ffibuilder"],
    ext_modules=[fast] if cpython else [],
    cmdclass={"sdist": Sdist},
    # One wheel for every CPython from 3.9 on.
    options={"bdist_wheel": {"py_limited_api": "cp39"}} if cpython else {},
)
