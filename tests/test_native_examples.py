# SPDX-License-Identifier: MIT
"""The examples of native code are built as they say, run, and print what they should.

And what they are built with: flags, headers, pkg-config.
"""

from __future__ import annotations

import ctypes
import doctest
import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peers import package, peer

import pybitmap
from pybitmap import HBitmap, native

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "native"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]


def run(
    *command: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> str:
    done = subprocess.run(
        [str(each) for each in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=cwd,
        timeout=300,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def built(tmp_path: Path, example: str, **environment: str) -> Path:
    """A copy of an example's folder, built by its setup.py."""
    package("setuptools")
    peer("cc", "gcc")
    folder = tmp_path / example
    shutil.copytree(EXAMPLES / example, folder)
    run(
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--inplace",
        cwd=folder,
        environment=environment,
    )
    return folder


def test_ctypes() -> None:
    assert run(sys.executable, EXAMPLES / "ctypes_marks.py") == "[(305418240, 4096)]\n"


def test_numba() -> None:
    package("numba")
    found = run(sys.executable, EXAMPLES / "numba_marks.py")
    assert re.fullmatch(r"\d+ dirty pages\n", found)


def test_a_module_in_c(tmp_path: Path) -> None:
    folder = built(tmp_path, "c_module")
    assert run(sys.executable, "run.py", cwd=folder) == (
        "214106112 bytes to copy, and 65536 next time\n"
        "the guest is told: Numerical result out of range\n"
    )


def test_a_module_that_was_compiled_for_another_version_is_not_imported(tmp_path: Path) -> None:
    folder = built(tmp_path, "c_module", CFLAGS="-DPYBITMAP_API_VERSION=2")
    code = """
try:
    import emulator
except ImportError as error:
    print(error)
"""
    assert run(sys.executable, "-c", code, cwd=folder).startswith(
        "this module was compiled for version 2 of pybitmap's C interface"
    )


def test_a_module_in_cython(tmp_path: Path) -> None:
    package("Cython")
    folder = built(tmp_path, "cython_module")
    assert run(sys.executable, "run.py", cwd=folder) == "1000 dirty pages, then 10\n"


def test_a_program_in_c(tmp_path: Path) -> None:
    """By the very command that its head shows."""
    peer("cc", "gcc")
    shutil.copy(EXAMPLES / "c_program" / "program.c", tmp_path)
    lines = (tmp_path / "program.c").read_text(encoding="utf-8").splitlines()
    shown = [line[3:].strip().rstrip("\\") for line in lines if line.startswith(" *     ")]
    command = " ".join(shown).replace("python -m", f"{shlex.quote(sys.executable)} -m")
    assert command.startswith("cc ")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"$ {' '.join(' '.join(shown).split())}\n" in readme
    run("sh", "-c", command, cwd=tmp_path)
    assert run(tmp_path / "program") == (
        "a write beyond the end is refused\n131072 bytes to copy at 983040\n"
    )


def test_what_the_page_shows_is_so() -> None:
    failed, tried = doctest.testfile(str(ROOT / "docs" / "native.md"), module_relative=False)
    assert tried > 4
    assert failed == 0


# ---- flags ----------------------------------------------------------------------------------


def flags(*options: str) -> list[str]:
    """Without click, which they do not need."""
    code = "import sys; sys.modules['click'] = None; from pybitmap.__main__ import main; main()"
    return shlex.split(run(sys.executable, "-c", code, *options, cwd=ROOT / "tests"))


def test_the_flags() -> None:
    include = pybitmap.get_include()
    assert flags("--cflags") == [f"-I{include}"]
    assert flags("--ldflags") == ["-pthread"]
    assert flags("--sources") == pybitmap.get_sources()
    assert flags("--pkgconfigdir") == [include]
    assert flags("--cflags", "--ldflags") == [f"-I{include}", "-pthread"]


def test_flags_beside_a_command_are_refused() -> None:
    pytest.importorskip("click")
    done = subprocess.run(
        [sys.executable, "-m", "pybitmap", "--cflags", "info"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--cflags" in done.stderr


def test_help_names_them() -> None:
    pytest.importorskip("click")
    shown = run(sys.executable, "-m", "pybitmap", "--help")
    for option in ("--cflags", "--ldflags", "--sources", "--pkgconfigdir"):
        assert option in shown


def test_pkg_config_knows_it() -> None:
    tool = peer("pkg-config", "pkgconf")
    path = {"PKG_CONFIG_PATH": flags("--pkgconfigdir")[0]}
    assert run(tool, "--cflags", "--libs", "pybitmap", environment=path).split() == [
        f"-I{pybitmap.get_include()}",
        "-pthread",
    ]
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert run(tool, "--modversion", "pybitmap", environment=path).strip() == version[1]


def test_flags_that_cannot_be_written_are_an_error() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    for redirection in (">/dev/full", ">&-"):
        command = f"{shlex.quote(sys.executable)} -m pybitmap --cflags {redirection}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("pybitmap: what was asked for cannot be written: ")


# ---- the header -----------------------------------------------------------------------------

ONE = """
#define PYBITMAP_API_SYMBOL library_pybitmap
#include <pybitmap_api.h>
#ifdef __cplusplus
extern "C" {
#endif
int library_use(const void *table);
uint64_t library_marks(HBitmap *hb);
uint64_t library_other(HBitmap *hb);
#ifdef __cplusplus
}
#endif
int library_use(const void *table) { return pybitmap_use(table); }
uint64_t library_marks(HBitmap *hb)
{
    int (*set)(HBitmap *, uint64_t, uint64_t) = hbitmap_set;    /* as a value, too */

    (void)set(hb, 5, 10);
    (void)hbitmap_set(hb, 500, 1);
    return library_other(hb);
}
"""

OTHER = """
#define PYBITMAP_API_SYMBOL library_pybitmap
#define PYBITMAP_NO_IMPORT
#include <pybitmap_api.h>
#ifdef __cplusplus
extern "C"
#endif
uint64_t library_other(HBitmap *hb);
uint64_t library_other(HBitmap *hb) { return hbitmap_count(hb); }
"""


@pytest.mark.parametrize(("compiler", "end"), [("cc -std=c11", "c"), ("c++ -std=c++11", "cpp")])
def test_a_library_of_two_files_without_python_s_header(
    tmp_path: Path, compiler: str, end: str
) -> None:
    program, standard = compiler.split()
    peer(program, "g++")
    files = [tmp_path / f"one.{end}", tmp_path / f"other.{end}"]
    for file, text in zip(files, (ONE, OTHER)):
        file.write_text(text)
    where = f"-I{pybitmap.get_include()}"
    library = tmp_path / "library.so"
    run(program, standard, *STRICT, "-shared", "-fPIC", where, "-o", library, *files)
    loaded = ctypes.CDLL(str(library))
    loaded.library_use.argtypes = [ctypes.c_void_p]
    loaded.library_marks.argtypes = [ctypes.c_void_p]
    loaded.library_marks.restype = ctypes.c_uint64

    for i, change in [(0, 1), (2, 1), (3, -8)]:  # its magic, its version, its size
        head = (ctypes.c_uint32 * 4)(*(ctypes.c_uint32 * 4).from_address(native.table()))
        head[i] += change
        assert loaded.library_use(ctypes.addressof(head)) == -errno.EXDEV
    assert loaded.library_use(None) == -errno.EXDEV
    assert loaded.library_use(native.table()) == 0
    hb = HBitmap(1000)
    with hb.pin() as address:
        assert loaded.library_marks(address) == 11
    assert list(hb.areas()) == [(5, 10), (500, 1)]


def test_the_declarations_for_cython_are_those_of_the_headers() -> None:
    def normal(text: str) -> str:
        text = re.sub(r"\bbint\b", "bool", text.replace("const", ""))
        return re.sub(r"\s", "", text).replace("(void)", "()")

    text = ""
    for header in ("hbitmap.h", "tracker.h"):
        part = (Path(pybitmap.get_include()) / header).read_text(encoding="utf-8")
        part = part.partition("cdef: begin */")[2].partition("/* cdef: end")[0]
        text += re.sub(r"/\*.*?\*/", "", part, flags=re.DOTALL)
    declared = re.findall(r"[\w *]+\bhb\w+\([^)]*\)(?=;)", text)
    pxd = Path(native.__file__).with_suffix(".pxd").read_text(encoding="utf-8")
    assert sorted(map(normal, re.findall(r"[\w *]+\bhb\w+\([^)]*\)", pxd))) == sorted(
        map(normal, declared)
    )
