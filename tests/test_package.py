# SPDX-License-Identifier: MIT
"""The package as a whole: what it ships, what it imports, what C code makes of its sources."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import run_python

import pybitmap
import pybitmap.hbitmap

PROJECT = Path(__file__).parent.parent
#: pybitmap on the package index is somebody else's.
DISTRIBUTION = "dirtybitmap"

CALLER = r"""
#include <inttypes.h>
#include <stdio.h>

#include <hbitmap.h>

int main(void)
{
    HBitmap *hb = hbitmap_alloc(1000, 3);
    HBitmapIter hbi;            /* on the caller's stack */
    int64_t item;

    hbitmap_set(hb, 5, 10);     /* callers that expect void compile, too */
    hbitmap_set(hb, 999, 1);
    hbitmap_reset(hb, 8, 8);
    hbitmap_iter_init(&hbi, hb, 0);
    while ((item = hbitmap_iter_next(&hbi)) >= 0) {
        printf("%" PRId64 "\n", item);
    }
    printf("%" PRIu64 "\n", hbitmap_count(hb));
    hbitmap_free(hb);
    return 0;
}
"""

CC = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def run(*command: str) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(CC is None, reason="no C compiler")
def test_a_c_caller_compiles_with_the_shipped_sources(tmp_path: Path) -> None:
    assert CC is not None
    caller, program = tmp_path / "caller.c", tmp_path / "caller"
    caller.write_text(CALLER)
    run(
        CC,
        *["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", "-pthread"],
        *["-I", pybitmap.get_include(), str(caller), *pybitmap.get_sources()],
        *["-o", str(program)],
    )
    assert run(str(program)).split() == ["0", "992", "16"]


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_the_header_is_one_for_cplusplus_as_well(tmp_path: Path) -> None:
    assert CXX is not None
    caller = tmp_path / "caller.cpp"
    caller.write_text("#include <hbitmap.h>\nint main() { HBitmapIter i; (void)i; return 0; }\n")
    run(CXX, "-Wall", "-Werror", "-fsyntax-only", "-I", pybitmap.get_include(), str(caller))


def test_the_include_folder_holds_the_public_header() -> None:
    assert (Path(pybitmap.get_include()) / "hbitmap.h").is_file()


def test_the_sources_are_c_files_that_exist() -> None:
    sources = [Path(source) for source in pybitmap.get_sources()]
    assert "mark.c" in {source.name for source in sources}
    assert all(source.suffix == ".c" and source.is_file() for source in sources)


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(pybitmap.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("module", ["numpy", "click", "rich"])
def test_what_is_optional_is_not_imported(module: str) -> None:
    code = (
        "import sys, pybitmap, pickle, copy;"
        "hb = pybitmap.HBitmap(1000); hb[5] = True; hb.words; hb.areas_array();"
        "pickle.loads(pickle.dumps(hb, 5)); copy.copy(hb) | [7];"
        f"print({module!r} in sys.modules)"
    )
    assert run_python(code).strip() == "False"


def test_the_core_needs_nothing_but_cffi() -> None:
    requirements = importlib.metadata.requires(DISTRIBUTION) or []
    plain = [entry for entry in requirements if "extra ==" not in entry]
    assert [re.split(r"[^\w]", entry)[0] for entry in plain] == ["cffi"]


def found(name: str, pattern: str) -> str:
    """The first group of what matches first in a file of the project."""
    match = re.search(pattern, (PROJECT / name).read_text(), re.MULTILINE)
    assert match is not None, name
    return match[1]


def test_there_is_one_version() -> None:
    version = found("pyproject.toml", r'^version = "(.*)"$')
    assert version == importlib.metadata.version(DISTRIBUTION) == pybitmap.__version__
    assert version == found("csrc/pybitmap.pc", r"^Version: (.*)$")
    assert version == found("CHANGELOG.md", r"^## (\d[\d.]*) \(\d{4}-\d\d-\d\d\)$")


def test_nobody_is_told_to_install_what_is_somebody_else_s() -> None:
    assert found("pyproject.toml", r'^name = "(.*)"$') == DISTRIBUTION
    pages = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md"), *PROJECT.glob("examples/**/*")]
    sources = [*PROJECT.glob("pybitmap/**/*.py"), PROJECT / "pyproject.toml"]
    told = re.compile(r"""pip install (-\S+ )*['"]?pybitmap\b|['"]pybitmap\[""")
    assert told.search("pip install -q --upgrade pybitmap")
    assert told.search("test = ['pybitmap[cli]']")
    for page in [*pages, *sources]:
        if page.is_file() and page.suffix in (".md", ".py", ".toml"):
            assert not told.search(page.read_text()), page


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(pybitmap.__all__) == pybitmap.__all__
    for name in pybitmap.__all__:
        assert getattr(pybitmap, name).__doc__, name


def test_stores_are_there_when_they_are_asked_for() -> None:
    code = (
        "import sys, pybitmap;"
        "print('sqlite3' in sys.modules, 'LocalStore' in dir(pybitmap));"
        "from pybitmap import LocalStore, Qcow2Store;"
        "print(LocalStore is pybitmap.store.LocalStore, hasattr(pybitmap, 'nothing'))"
    )
    assert run_python(code).split() == ["False", "True", "True", "False"]


def test_every_public_method_is_documented() -> None:
    for name, member in vars(pybitmap.HBitmap).items():
        if not name.startswith("_"):
            assert member.__doc__, name


def test_every_error_has_the_one_base() -> None:
    errors = [
        member
        for member in vars(pybitmap).values()
        if isinstance(member, type) and issubclass(member, Exception)
    ]
    assert pybitmap.RangeError in errors
    assert all(issubclass(error, pybitmap.BitmapError) for error in errors)


def test_sources_without_a_compiled_module_say_so(tmp_path: Path) -> None:
    """As where somebody has installed the package and starts Python in the clone."""
    package = Path(pybitmap.__file__).parent
    shutil.copytree(package, tmp_path / "pybitmap", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            "import pybitmap; pybitmap.HBitmap",
        ],  # not by what installs in place
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith(
        f"ImportError: the folder {tmp_path / 'pybitmap'} has pybitmap's sources"
    )
    assert said.endswith("compile the module here: pip install -e .")
