# SPDX-License-Identifier: MIT
"""The plugin for QEMU (examples/qemu_plugin): what guests store to, by their own account.

A program says which pages of a buffer it has changed; a boot sector stores where this file says.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from peers import peer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "qemu_plugin"
SOURCES = Path(__file__).parent
PAGE = 4096
MIB = 1 << 20

sys.path.insert(0, str(EXAMPLE))
from areas import HEADER, Recording, load  # noqa: E402


def succeed(*command: str | Path) -> str:
    done = subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin, as its page says to build it, and the program."""
    peer("cc", "gcc")
    peer("make", "make")
    folder = tmp_path_factory.mktemp("plugin")
    succeed("make", "-C", EXAMPLE, f"PYTHON={sys.executable}", f"OUT={folder}", "CFLAGS=-Werror")
    succeed("cc", "-O1", "-static", "-pthread", "-o", folder / "guest", SOURCES / "qemu_guest.c")
    return folder


def plugin(built: Path, out: Path, *options: str) -> str:
    return ",".join([str(built / "libdirty.so"), f"out={out}", *options])


def user(built: Path, out: Path, what: str, *options: str) -> subprocess.CompletedProcess[str]:
    qemu = peer("qemu-x86_64", "qemu-user")
    command = [qemu, "-plugin", plugin(built, out, *options), str(built / "guest"), what]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def told(output: str) -> tuple[int, set[int]]:
    """Where the buffer of the program is, and the pages of it that have changed."""
    address, pages = output.split()[:2]
    return int(address, 16), {i for i, changed in enumerate(pages) if changed == "1"}


def recorded(found: Recording, address: int, nbytes: int, unit: int = PAGE) -> set[int]:
    """The units of that range that are dirty, counted from its start."""
    start = address - found.base
    return {i for i in range(nbytes // unit) if found.bitmap.get(start + i * unit)}


BUFFER = 4096 * PAGE


@pytest.mark.parametrize("what", ["stores", "threads"])
def test_the_pages_that_a_program_changes_are_dirty_and_no_others(
    built: Path, tmp_path: Path, what: str
) -> None:
    done = user(built, tmp_path / "out", what)
    assert done.returncode == 0, done.stderr
    found = load(tmp_path / "out")
    address, changed = told(done.stdout)
    assert len(changed) > 15
    assert recorded(found, address, BUFFER) == changed
    assert (found.addresses, found.target, found.base) == ("virtual", "x86_64", 0)
    assert (found.ended, found.outside) == (True, 0)


def cross(tmp_path: Path, machine: str) -> Path:
    compiler = peer(f"{machine}-linux-gnu-gcc", f"gcc-{machine}-linux-gnu")
    program = tmp_path / "guest"
    succeed(compiler, "-O1", "-static", "-pthread", "-o", program, SOURCES / "qemu_guest.c")
    return program


def test_another_machine(built: Path, tmp_path: Path) -> None:
    qemu, program = peer("qemu-aarch64", "qemu-user"), cross(tmp_path, "aarch64")
    for what in ("stores", "threads"):
        out = tmp_path / what
        address, changed = told(succeed(qemu, "-plugin", plugin(built, out), program, what))
        assert recorded(load(out), address, BUFFER) == changed


def test_what_a_plugin_is_not_told_is_counted(built: Path, tmp_path: Path) -> None:
    """DC ZVA, by which an aarch64's memset empties pages."""
    qemu, program = peer("qemu-aarch64", "qemu-user"), cross(tmp_path, "aarch64")
    found = []
    for what in ("zeros", "sve"):
        out = tmp_path / what
        succeed(qemu, "-plugin", plugin(built, out), program, what)
        found.append(load(out).outside)
    succeed(qemu, "-plugin", plugin(built, tmp_path / "out"), program, "stores")
    others = load(tmp_path / "out").outside
    assert found[0] >= others + 4 * PAGE // 64
    assert found[1] > others


def test_a_machine_of_which_a_plugin_is_not_told_enough_is_refused(
    built: Path, tmp_path: Path
) -> None:
    qemu, program = peer("qemu-s390x", "qemu-user"), cross(tmp_path, "s390x")
    command = [qemu, "-plugin", plugin(built, tmp_path / "out"), str(program), "stores"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "libdirty: QEMU does not tell a plugin all that s390x writes" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_finer_granularity(built: Path, tmp_path: Path) -> None:
    options = "granularity=64", "base=256G", "size=64M"
    done = user(built, tmp_path / "out", "stores", *options)
    found = load(tmp_path / "out")
    address, _ = told(done.stdout)
    dirty = recorded(found, address, 16 * PAGE, 64)
    page = PAGE // 64
    assert {i for i in dirty if i < 12 * page} == {
        *(0, 3 * page - 1, 6 * page - 1, 6 * page, 9 * page - 1, 9 * page, 12 * page - 1)
    }
    assert {i for i in dirty if i >= 15 * page} == set(range(15 * page, 16 * page))


def test_stores_outside_of_the_range_are_counted(built: Path, tmp_path: Path) -> None:
    done = user(built, tmp_path / "out", "stores", "base=128G", "size=1G")
    assert done.returncode == 0
    found = load(tmp_path / "out")
    assert found.bitmap.empty()
    assert found.outside > 100
    shown = subprocess.run(
        [sys.executable, str(EXAMPLE / "areas.py"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 1
    assert f"{found.outside} stores are not in it" in shown.stderr


def test_the_child_of_a_fork_is_not_recorded(built: Path, tmp_path: Path) -> None:
    done = user(built, tmp_path / "out", "fork")
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()[:2], done.stdout.splitlines()[2:]
    address, changed = told("\n".join(after))
    assert recorded(load(tmp_path / "out"), address, BUFFER) == changed
    assert changed - told("\n".join(before))[1] == {BUFFER // PAGE - 1}


def test_a_program_that_a_signal_ends(built: Path, tmp_path: Path) -> None:
    done = user(built, tmp_path / "out", "signal")
    assert done.returncode == -signal.SIGSEGV
    found = load(tmp_path / "out")
    address, changed = told(done.stdout)
    assert recorded(found, address, BUFFER) == changed
    assert not found.ended


def test_a_killed_qemu_leaves_every_mark(built: Path, tmp_path: Path) -> None:
    qemu = peer("qemu-x86_64", "qemu-user")
    out = tmp_path / "out"
    command = [qemu, "-plugin", plugin(built, out), str(built / "guest"), "forever"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        address, changed = told(running.stdout.readline() + running.stdout.readline())
        beside = recorded(load(out), address, BUFFER)  # it still runs
        running.kill()
    found = load(out)
    assert beside == recorded(found, address, BUFFER) == changed
    assert not found.ended


#: The pages that qemu_boot.S stores to, of those where nothing else does.
STORED = {0x2000, 0x2005, 0x2006, 0x2200, 0x2300, 0x2400, 0x2500, 0x2501}


@pytest.mark.skipif(sys.platform != "linux", reason="ld makes the boot sector as on Linux")
def test_the_ram_that_a_guest_stores_to(built: Path, tmp_path: Path) -> None:
    qemu = peer("qemu-system-x86_64", "qemu-system-x86")
    if os.uname().machine != "x86_64":
        pytest.skip("assembles x86 by the machine's own tools")
    thing, disk, out = tmp_path / "boot.o", tmp_path / "boot", tmp_path / "out"
    succeed(peer("cc", "gcc"), "-m32", "-c", "-o", thing, SOURCES / "qemu_boot.S")
    flags = ["-m", "elf_i386", "--oformat", "binary", "-e", "0", "-Ttext", "0x7c00"]
    succeed(peer("ld", "binutils"), *flags, "-o", disk, thing)
    command = [
        *(
            qemu,
            "-M",
            "pc",
            "-accel",
            "tcg,thread=multi",
            "-smp",
            "2",
            "-m",
            "128",
            "-display",
            "none",
            "-nodefaults",
        ),
        *("-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
        *("-drive", f"file={disk},format=raw,if=ide", "-plugin", plugin(built, out, "size=128M")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr  # isa-debug-exit: twice the value, and one
    found = load(out)
    dirty = {i + 16 * MIB // PAGE for i in recorded(found, 16 * MIB, 80 * MIB)}
    assert dirty == STORED
    assert found.bitmap.get(0x10000)
    assert (found.addresses, found.target, found.ended) == ("physical", "x86_64", True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("granularity=3000", "granularity=3000 is no power of two"),
        ("granularity=0", "granularity=0 is no power of two"),
        ("granularity=-4096", "'granularity=-4096' is no number of bytes"),
        ("size=1G1", "'size=1G1' is no number of bytes"),
        ("size=", "'size=' is no number of bytes"),
        ("size=99999999999999999999", "'size=99999999999999999999' is no number of bytes"),
        ("size=16777216T", "'size=16777216T' is no number of bytes"),
        ("size=6000", "must be multiples of the granularity"),
        ("size=0", "must be multiples of the granularity"),
        ("base=1", "must be multiples of the granularity"),
        ("base=0xfffffffffffff000", "must be multiples of the granularity"),
        ("size=4194304T,granularity=1", "are too many for a granularity of 1"),
        ("ot=file", "'ot=file' is no option"),
        ("out=", "say where the bitmap goes"),
        ("out=/nowhere/at/all", "/nowhere/at/all: No such file or directory"),
    ],
)
def test_wrong_options_are_told_and_nothing_runs(
    built: Path, tmp_path: Path, options: str, reason: str
) -> None:
    done = user(built, tmp_path / "out", "stores", options)
    assert done.returncode == 1
    assert done.stdout == ""
    assert reason in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_gets_no_room_is_told_before_the_first_mark(
    built: Path, tmp_path: Path
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    command = [peer("qemu-x86_64", "qemu-user"), "-plugin", plugin(built, tmp_path / "out")]
    done = subprocess.run(
        [*command, str(built / "guest"), "stores"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
        restore_signals=False,  # SIGXFSZ stays ignored, as Python has it
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert f"libdirty: {tmp_path / 'out'}: File too large" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_there_is_left_alone(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    done = user(built, out, "stores")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"libdirty: {out} is there already: remove it, or name another file" in done.stderr
    assert out.read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 5000, b"[1]", b'{"pybitmap": 1}'])
def test_another_file_is_no_recording(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"file is no file of libdirty\.so"):
        load(tmp_path / "file")
    assert HEADER == PAGE


def test_the_reader_prints_the_areas(built: Path, tmp_path: Path) -> None:
    done = user(built, tmp_path / "out", "stores")
    address, _ = told(done.stdout)
    shown = succeed(sys.executable, EXAMPLE / "areas.py", tmp_path / "out")
    assert f"{address:#x} 0x1000\n" in shown
    assert f"{address + 5 * PAGE:#x} 0x2000\n" in shown
    assert f"{address + 3 * PAGE:#x} " not in shown
    assert f"{address + 15 * PAGE:#x} 0x3000\n" in shown
