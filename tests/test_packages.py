# SPDX-License-Identifier: MIT
"""What looks at packages before they are published sees what it looks for (`make wheel`); and what
they are built from is in them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import minimal
import pytest
from c_programs import compiler
from check_packages import complaints_of, rpaths

PROJECT = Path(__file__).parents[1]
SUPPORT = PROJECT / "tests" / "support"
TRACKED = ["pybitmap/__init__.py", "csrc/mark.c", "csrc/mark.h", "pybitmap/_fast.c"]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="of wheels for Linux")


def wheel(
    folder: Path, changes: Mapping[str, bytes | None], tag: str = "manylinux_2_34_x86_64"
) -> Path:
    """One without fault, but for files that are others; None: missing."""
    files: dict[str, bytes | None] = {
        "pybitmap/__init__.py": b"",
        "pybitmap/csrc/mark.c": b"",
        "pybitmap/csrc/mark.h": b"",
        "pybitmap/_cffi.abi3.so": b"",
        "x-1.dist-info/RECORD": b"",
    }
    path = folder / f"x-1-cp39-abi3-{tag}.whl"
    with zipfile.ZipFile(path, "w") as made:
        for name, data in {**files, **changes}.items():
            if data is not None:
                made.writestr(name, data)
    return path


def test_a_good_wheel_is_not_complained_of(tmp_path: Path) -> None:
    assert list(complaints_of(wheel(tmp_path, {}), TRACKED)) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"pybitmap/__init__.py": None}, "pybitmap/__init__.py is missing"),
        ({"pybitmap/csrc/mark.h": None}, "csrc/mark.h is missing"),
        ({"pybitmap/_cffi.abi3.so": None}, "no compiled module"),
        (
            {"x-1.dist-info/direct_url.json": f"file://{PROJECT}/x".encode()},
            f"x-1.dist-info/direct_url.json names {PROJECT}/",
        ),
    ],
)
def test_what_is_wrong_with_a_wheel_is_named(
    tmp_path: Path, changes: Mapping[str, bytes | None], complaint: str
) -> None:
    assert complaint in list(complaints_of(wheel(tmp_path, changes), TRACKED))


@LINUX
def test_a_wheel_for_this_machine_only_is_named(tmp_path: Path) -> None:
    (complaint,) = complaints_of(wheel(tmp_path, {}, "linux_x86_64"), TRACKED)
    assert "linux_x86_64, does not say" in complaint


@LINUX
@pytest.mark.parametrize("option", ["--enable-new-dtags", "--disable-new-dtags"])
def test_a_place_to_look_for_libraries_is_named(tmp_path: Path, option: str) -> None:
    source, binary = tmp_path / "x.c", tmp_path / "x.so"
    source.write_text("int x(void) { return 1; }\n")
    build = [*compiler(), "-shared", "-fPIC", f"-Wl,{option}", "-o", str(binary), str(source)]
    subprocess.run(build, check=True)
    assert list(rpaths(binary.read_bytes())) == []
    subprocess.run([*build, "-Wl,-rpath,/builder/lib"], check=True)
    assert list(rpaths(binary.read_bytes())) == ["/builder/lib"]
    changes = {"pybitmap/_cffi.abi3.so": binary.read_bytes()}
    complaint = "pybitmap/_cffi.abi3.so looks for libraries in '/builder/lib'"
    assert complaint in list(complaints_of(wheel(tmp_path, changes), TRACKED))


@LINUX
def test_a_folder_of_the_builder_s_in_a_binary_is_named(tmp_path: Path) -> None:
    source, binary = tmp_path / "x.c", tmp_path / "x.so"
    source.write_text("int x(void) { return 1; }\n")
    build = [*compiler(), "-shared", "-fPIC", "-o", str(binary), str(source)]
    for option, named in (("-g0", False), ("-g", True)):
        subprocess.run([*build, option, f"-fdebug-prefix-map={tmp_path}={PROJECT}"], check=True)
        complaints = complaints_of(
            wheel(tmp_path, {"pybitmap/_cffi.abi3.so": binary.read_bytes()}), TRACKED
        )
        assert any(f"names {PROJECT}/" in each for each in complaints) == named


def test_every_package_is_installed() -> None:
    """setuptools is told them by name."""
    listed = re.search(r"^packages = \[(.*)\]$", (PROJECT / "pyproject.toml").read_text(), re.M)
    assert listed is not None
    there = {
        ".".join(path.parent.relative_to(PROJECT).parts)
        for path in PROJECT.glob("pybitmap/**/__init__.py")
    }
    assert set(re.findall(r'"(.*?)"', listed[1])) == {*there, "pybitmap.csrc"}


def test_every_c_file_is_compiled() -> None:
    """cffi is told them by name; a program that takes get_sources() has them all."""
    told = re.findall(r'"(\w+\.c)"', (PROJECT / "csrc" / "ffi_build.py").read_text())
    assert sorted(told) == sorted(path.name for path in PROJECT.glob("csrc/*.c"))


def test_the_oldest_of_all_that_is_needed_is_what_the_bounds_say() -> None:
    text = (PROJECT / "pyproject.toml").read_text()
    oldest = list(minimal.lowest(text))
    assert {each.split("==")[0] for each in oldest} == {
        *("setuptools", "cffi", "click", "rich", "qemu.qmp"),
        *("pytest", "pytest-xdist", "hypothesis"),
    }
    assert len({each for each in oldest if each.startswith("cffi==")}) == 1  # to build, and to run
    with pytest.raises(ValueError, match="click>7 has no lower bound"):
        list(minimal.lowest(re.sub(r'"click>=[\d.]+"', '"click>7"', text)))


def test_packages_are_built_from_a_copy_of_the_sources_alone(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    script = [str(SUPPORT / "copy_tree.sh"), str(copy)]
    subprocess.run(script, check=True, umask=0o077)
    copied = {path.relative_to(copy) for path in copy.rglob("*") if path.is_file()}
    assert {Path("pyproject.toml"), Path("csrc/mark.c"), Path("tests/test_packages.py")} <= copied
    assert not [path for path in copied if path.suffix in (".so", ".pyc", ".whl")]
    assert {path.parts[0] for path in copied}.isdisjoint({".venv", ".git", "build", "dist"})
    assert {path.stat().st_mode & 0o777 for path in copy.rglob("*")} == {0o644, 0o755}
    again = subprocess.run(script, check=False, capture_output=True, text=True)
    assert again.returncode != 0  # never into what is there
    assert str(copy) in again.stderr


@LINUX
@pytest.mark.parametrize(
    ("system", "said"),
    [("../sid", "is no name of a Debian"), ("sid", "debootstrap is missing")],
)
def test_another_system_that_cannot_be_made_is_refused(
    tmp_path: Path, system: str, said: str
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "id", "uname"):  # none of which makes a system
        (tools / name).symlink_to(shutil.which(name) or "missing")
    if system == "sid" and os.geteuid() != 0:
        said = "needs root"
    done = subprocess.run(
        [shutil.which("bash") or "bash", str(SUPPORT / "system.sh"), system],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": str(tools)},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("system.sh: ")
    assert said in done.stderr
