# SPDX-License-Identifier: MIT
"""The C core tested from C: the model, what a process does to it, and how the sources compile.

`make asan` builds the same programs under the sanitizers. Here they run plain, with whatever C
compiler there is. How the sources compile is checked with gcc and with clang.
"""

from __future__ import annotations

import platform
import signal
from pathlib import Path

import pytest
from c_programs import CORE, CSRC, PROGRAMS, TESTS, build, compiled, compiler, link, run, succeed
from peers import missing, peer

BENCH = TESTS.parent / "bench" / "c"
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]


def test_an_object_is_kept_until_what_it_follows_from_changes(tmp_path: Path) -> None:
    """What all programs here are built from: the source, what it includes, the flags."""
    source, header = tmp_path / "one.c", tmp_path / "one.h"
    source.write_text('#include "one.h"\nint one(void);\nint one(void) { return ONE; }\n')

    def object_of(one: str, *flags: str) -> Path:
        header.write_text(f"#define ONE {one}\n")
        return compiled(source, flags, tmp_path / "objects")

    first = object_of("1")
    assert object_of("1", "-DNOBODY_ASKS") == first
    assert object_of("1", "-O2") != first
    assert object_of("2") != first


MODEL = ["-DHB_TEST_ALLOC"]
ALL_MAPPED = [*MODEL, "-DHB_MAP_MIN=1", "-DHB_GIVE_BACK_MIN=1"]
ALL_FROM_MALLOC = [*MODEL, "-DHB_MAP_MIN=SIZE_MAX"]


@pytest.mark.parametrize(
    "flags", [MODEL, ALL_MAPPED, ALL_FROM_MALLOC], ids=["default", "mapped", "malloc"]
)
def test_every_function_agrees_with_the_model(tmp_path: Path, flags: list[str]) -> None:
    output = succeed([build(tmp_path, "test_model", *flags), "1", "2"])
    assert "ok random operations" in output


def test_streams_and_masks_are_what_was_given(tmp_path: Path) -> None:
    output = succeed([build(tmp_path, "test_arrays"), "1"])
    assert "ok streams\nok masks" in output


def test_nothing_is_undefined_in_the_eyes_of_clang_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sanitizer knows more than that of gcc, which `make asan` uses."""
    monkeypatch.setenv("CC", peer("clang", "clang"))
    flags = [*ALL_MAPPED, "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    if run([*compiler(), flags[-2], "-o", str(tmp_path / "empty"), str(empty)]).returncode:
        missing("clang has no runtime of its sanitizers (Debian package libclang-rt-dev)")
    succeed([build(tmp_path, "test_model", *flags), "1", "1"])


def test_the_model_program_notices_a_broken_model(tmp_path: Path) -> None:
    done = run([build(tmp_path, "test_model", *MODEL, "-DBREAK_MODEL"), "1", "2"])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_model.c:" in done.stderr
    assert "seed 1" in done.stderr


@pytest.fixture
def process(tmp_path: Path) -> str:
    return build(tmp_path, "test_process", "-Wl,--wrap=posix_memalign", "-ldl")


def test_a_handler_that_interrupts_malloc_marks_without_memory(process: str) -> None:
    assert succeed([process, "handler"]) == "ok\n"
    done = run([process, "unprepared"])
    assert done.returncode == 1
    assert "memory was asked for" in done.stderr


def test_a_fork_amid_the_first_mark_of_all_leaves_no_bit_without_its_summary(process: str) -> None:
    for _ in range(3):
        assert succeed([process, "fork"]) == "ok\n"


@pytest.mark.parametrize("flags", [[], ["-Ddestructor=unused"]], ids=["as it is", "broken"])
def test_threads_outlive_the_library(tmp_path: Path, process: str, flags: list[str]) -> None:
    """Without a destructor, the end of a thread calls one of code that is gone."""
    options = ["-std=c11", "-O1", "-shared", "-fPIC", f"-I{CSRC}", "-pthread", *flags]
    library = str(link(tmp_path / "core.so", CORE, *options))
    done = run([process, "unload", library])
    assert done.returncode == (-signal.SIGSEGV if flags else 0), done.stderr


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_sources_compile_without_a_warning(tmp_path: Path, name: str) -> None:
    compiler = peer(name, name)
    sources = [*CSRC.glob("*.c"), *PROGRAMS.glob("*.c"), *BENCH.glob("*.c")]
    assert len(sources) > 4
    for source in sources:
        options = ["-std=c11", "-O2", *WARNINGS, f"-I{CSRC}", "-c", "-o", str(tmp_path / "o")]
        succeed([compiler, *options, str(source)])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="-m32 is for x86")
def test_a_machine_of_32_bits_is_refused_with_the_reason(tmp_path: Path) -> None:
    """By the compiler. There need be no C library for it: the headers of the one that is there do,
    but for one."""
    compiler = peer("gcc", "gcc")
    (tmp_path / "gnu").mkdir()
    (tmp_path / "gnu" / "stubs-32.h").touch()
    headers = f"-I/usr/include/{succeed([compiler, '-print-multiarch']).strip()}"
    command = [compiler, "-std=c11", f"-I{CSRC}", headers, f"-I{tmp_path}", "-fsyntax-only"]
    source = str(CSRC / "block.c")
    succeed([*command, "-m64", source])
    done = run([*command, "-m32", source])
    assert done.returncode != 0
    assert "HBitmap needs 64-bit addresses" in done.stderr


@pytest.mark.parametrize(
    ("name", "package", "options"),
    [
        ("gcc", "gcc", ["-x", "c", "-std=c11"]),
        ("gcc", "gcc", ["-x", "c", "-std=c99"]),
        ("g++", "g++", ["-x", "c++", "-std=c++11"]),
        ("clang", "clang", ["-x", "c", "-std=c11"]),
        ("clang++", "clang", ["-x", "c++", "-std=c++11"]),
    ],
)
def test_the_header_stands_alone(name: str, package: str, options: list[str]) -> None:
    """Included twice and first of all, in C and in C++, with an iterator on the stack."""
    text = """
        #include "hbitmap.h"
        #include "hbitmap.h"
        int64_t first_dirty(const HBitmap *hb);
        int64_t first_dirty(const HBitmap *hb)
        {
            HBitmapIter hbi;

            hbitmap_iter_init(&hbi, hb, 0);
            return hbitmap_iter_next(&hbi);
        }\n"""
    command = [peer(name, package), *options, *WARNINGS, f"-I{CSRC}", "-fsyntax-only", "-"]
    succeed(command, text)
