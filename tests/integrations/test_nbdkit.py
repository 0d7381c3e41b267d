# SPDX-License-Identifier: MIT
"""nbdkit with our plugin, and real clients: what they write is there and marked, whatever comes."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filesystems import loop_device, mounted
from images import create, qemu_io
from nbd_server import (
    ROOT,
    STARTER,
    SYSTEM_PYTHON,
    Qmp,
    copy_areas,
    differing,
    need_libnbd,
    need_nbdkit,
    serving,
    start,
    writing,
)
from peers import lacking, peer

from pybitmap import BlockGraph
from pybitmap.integrations.nbdkit import main
from pybitmap.integrations.served import Parameters, ServedDisk
from pybitmap.store import LocalStore, Qcow2Store

MIB = 1 << 20
SIZE = 8 * MIB
BLOCK = 4096
DAILY = ("--bitmap", f"daily,granularity={BLOCK}")

#: More for a long run.
ROUNDS = int(os.environ.get("PYBITMAP_NBD_ROUNDS", "2"))


@pytest.fixture(autouse=True)
def _nbdkit() -> None:
    need_nbdkit()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Of random bytes, and of such a size that its last block is not whole."""
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(SIZE - 1000))
    return path


def opened(folder: Path, name: str = "daily") -> tuple[list[tuple[int, int]], str | None]:
    """What the store has: areas, and why it is inconsistent, if it is."""
    with BlockGraph() as graph:
        bitmap = graph.add_node("disk", store=LocalStore(folder / "store")).bitmaps[name]
        return ([] if bitmap.inconsistent else list(bitmap.areas())), bitmap.reason


def dirty(areas: list[tuple[int, int]]) -> set[int]:
    """The offsets of their blocks."""
    return {at for offset, nbytes in areas for at in range(offset, offset + nbytes, BLOCK)}


def prepared(folder: Path) -> None:
    """A store as a server leaves it."""
    parameters = Parameters(
        disk=str(folder / "disk.raw"), store=str(folder / "store"), bitmaps={"daily": BLOCK}
    )
    ServedDisk(parameters, report=print).close()


def copied(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes())
    return target


# ---- kills, and writers beside ------------------------------------------------------------------


def test_a_write_that_a_kill_cuts_short_is_dirty(tmp_path: Path) -> None:
    nbytes = 32 * MIB  # takes long enough to be met in its midst, as a rule at once
    disk = tmp_path / "disk.raw"
    for _ in range(ROUNDS):
        disk.write_bytes(b"")
        os.truncate(disk, nbytes)
        with serving(tmp_path, *DAILY) as server, open(disk, "rb", buffering=0) as file:
            command = [peer("qemu-io", "qemu-utils"), "-f", "raw", "-c", f"write 0 {nbytes}"]
            with subprocess.Popen([*command, server.uri], stdout=subprocess.DEVNULL) as client:
                while client.poll() is None and os.pread(file.fileno(), 1, 0) == b"\0":
                    pass
                server.kill()
            cut_short = os.pread(file.fileno(), 1, nbytes - 1) == b"\0"
        assert opened(tmp_path) == ([(0, nbytes)], None)
        if cut_short:
            return
        with BlockGraph() as graph:
            graph.add_node("disk", store=LocalStore(tmp_path / "store")).bitmaps["daily"].clear()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_is_ended_under_writers_has_missed_nothing(
    tmp_path: Path, disk: Path, number: signal.Signals
) -> None:
    need_libnbd()
    copy = copied(disk, tmp_path / "copy.raw")
    half = SIZE // 2
    for round in range(ROUNDS):  # the same command goes on, on the sockets that were left
        with serving(tmp_path, *DAILY) as server, writing(server.uri, end=half):
            time.sleep(0.05 * (round % 4))
            assert server.end(number) == (-number if number == signal.SIGKILL else 0)
        areas, reason = opened(tmp_path)
        assert reason is None
        different = differing(disk, copy, BLOCK)
        assert different
        assert set(different) <= dirty(areas)
        assert max(dirty(areas)) < half  # nor is just everything dirty
        copy_areas(disk, copy, areas)
        assert not differing(disk, copy, BLOCK)
        with BlockGraph() as graph:
            graph.add_node("disk", store=LocalStore(tmp_path / "store")).bitmaps["daily"].clear()


def test_incremental_copies_and_rotations_beside_writers_miss_nothing(
    tmp_path: Path, disk: Path
) -> None:
    need_libnbd()
    copy = copied(disk, tmp_path / "copy.raw")
    more = ("--bitmap", f"ever,granularity={BLOCK}", "--bitmap", f"turns,granularity={BLOCK}")
    with serving(tmp_path, *DAILY, *more) as server:
        qmp = Qmp(server)
        week = {"granularity": BLOCK, "disabled": True, "persistent": True}
        qmp("block-dirty-bitmap-add", node="disk", name="week", **week)
        daily = {"bitmaps": [{"node": "disk", "name": "daily"}]}

        def backup() -> None:
            qmp("__org.pybitmap_freeze", **daily)
            copy_areas(disk, copy, qmp.areas("disk", "daily"))
            qmp("__org.pybitmap_done", **daily)

        merge = {"node": "disk", "target": "week", "bitmaps": ["turns"]}
        clear = {"node": "disk", "name": "turns"}
        with writing(server.uri, end=SIZE // 2):
            for _ in range(5 * ROUNDS):
                backup()
                actions = [
                    {"type": "block-dirty-bitmap-merge", "data": merge},
                    {"type": "block-dirty-bitmap-clear", "data": clear},
                ]
                qmp("transaction", actions=actions)
                different = differing(disk, copy, BLOCK)  # before it is asked what is dirty
                assert set(different) <= dirty(qmp.areas("disk", "daily"))
        qmp.close()
        assert server.end() == 0, server.errors
    found = {name: dirty(opened(tmp_path, name)[0]) for name in ("ever", "week", "turns")}
    assert found["week"] | found["turns"] == found["ever"]
    copy_areas(disk, copy, opened(tmp_path)[0])
    assert not differing(disk, copy, BLOCK)


def test_the_example_backs_up_a_disk_that_is_written_to(tmp_path: Path, disk: Path) -> None:
    need_libnbd()
    copy = copied(disk, tmp_path / "copy.raw")
    with serving(tmp_path, *DAILY) as server:

        def backup(name: str = "daily") -> subprocess.CompletedProcess[str]:
            words = [ROOT / "examples" / "nbdkit_backup.py", server.uri, server.qmp, name, copy]
            command = [SYSTEM_PYTHON, *map(str, words)]
            return subprocess.run(command, capture_output=True, text=True, timeout=60)

        with writing(server.uri, end=SIZE // 2):
            for _ in range(2):
                done = backup()
                assert done.returncode == 0, done.stderr
                different = differing(disk, copy, BLOCK)  # before it is asked what is dirty
                qmp = Qmp(server)
                assert set(different) <= dirty(qmp.areas("disk", "daily"))
                qmp.close()
        wrong = backup("other")
        assert (wrong.returncode, "'other' not found" in wrong.stderr) == (1, True), wrong.stderr


def test_fio_finds_what_it_wrote(tmp_path: Path, disk: Path) -> None:
    fio = peer("fio", "fio")
    copy = copied(disk, tmp_path / "copy.raw")
    with serving(tmp_path, *DAILY) as server:
        command = [fio, "--name=job", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randrw"]
        command += ["--bsrange=512-64k", "--size=4M", "--iodepth=8", "--verify=crc32c"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        if "not loadable" in done.stderr or "engine nbd" in done.stderr:
            lacking("fio without its NBD engine")
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.end() == 0, server.errors
    areas, _ = opened(tmp_path)
    assert set(differing(disk, copy, BLOCK)) <= dirty(areas)
    assert areas


# ---- requests -----------------------------------------------------------------------------------


def test_what_is_dirty_is_what_is_dirty_in_qemu(tmp_path: Path) -> None:
    """A discard and zeroes are writes; odd ranges go outwards to whole groups."""
    path = tmp_path / "disk.raw"
    path.touch()
    os.truncate(path, SIZE)
    image = create(tmp_path / "theirs.qcow2", SIZE)
    with BlockGraph() as graph:
        node = graph.add_node("disk", store=Qcow2Store(image))
        node.add_bitmap("daily", BLOCK, persistent=True)
    commands = [
        "write -P 1 5 3",
        "write -P 2 1M 100k",
        "write -z 2M 64k",
        "write -z -u 3M 5000",
        "discard 4M 128k",
        "write -f -P 3 8388607 1",
        "flush",
    ]
    qemu_io(image, *commands)
    with serving(tmp_path, *DAILY) as server:
        qemu_io(server.uri, *commands, options=["-f", "raw"])
        assert server.end() == 0, server.errors
    with BlockGraph() as graph:
        theirs = graph.add_node("disk", store=Qcow2Store(image)).bitmaps["daily"]
        assert opened(tmp_path)[0] == list(theirs.areas())
    done = subprocess.run(
        [peer("qemu-img", "qemu-utils"), "compare", "-f", "raw", "-F", "qcow2", path, image],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_a_disk_of_an_odd_size_goes_in_and_out_as_a_whole(tmp_path: Path, disk: Path) -> None:
    nbdcopy = peer("nbdcopy", "libnbd-bin")
    data = copied(disk, tmp_path / "data")
    os.truncate(disk, 0)
    os.truncate(disk, SIZE - 1000)
    with serving(tmp_path, *DAILY) as server:
        subprocess.run([nbdcopy, data, server.uri], check=True, timeout=60)
        subprocess.run([nbdcopy, server.uri, tmp_path / "out"], check=True, timeout=60)
        assert server.end() == 0, server.errors
    assert data.read_bytes() == disk.read_bytes() == (tmp_path / "out").read_bytes()
    assert opened(tmp_path)[0] == [(0, SIZE - 1000)]


def test_holes_are_told_as_qemu_tells_them(tmp_path: Path, disk: Path) -> None:
    qemu_img = peer("qemu-img", "qemu-utils")
    os.truncate(disk, 0)
    os.truncate(disk, SIZE)
    with open(disk, "r+b") as file:
        for at in (0, MIB, 3 * MIB, SIZE - BLOCK):
            os.pwrite(file.fileno(), b"x" * BLOCK, at)

    def holes(*arguments: str | Path) -> list[str]:
        command = [qemu_img, "map", "-f", "raw", "--output=json", *arguments]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.findall(r'"start": (\d+), "length": (\d+).*?"zero": (\w+)', found)

    expected = holes(disk)
    with serving(tmp_path, *DAILY) as server:
        assert holes(server.uri) == expected
    assert len(expected) > 3


def test_a_full_file_system_is_an_error_and_what_was_half_written_is_dirty(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        lacking("a full file system: only root can mount a small one")
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1M", "tmpfs") as folder:
        (tmp_path / "disk.raw").symlink_to(folder / "disk")
        (folder / "disk").touch()
        os.truncate(folder / "disk", 4 * MIB)
        with serving(tmp_path, *DAILY) as server:
            command = [peer("qemu-io", "qemu-utils"), "-f", "raw", "-c", "write -P 7 0 2M"]
            done = subprocess.run([*command, server.uri], capture_output=True, text=True)
            assert "No space left on device" in done.stdout + done.stderr
            assert server.end() == 0, server.errors
            assert "Traceback" not in server.errors
        assert (folder / "disk").read_bytes()[0] == 7
        assert opened(tmp_path)[0] == [(0, 2 * MIB)]


def test_a_disk_that_is_cut_short_is_an_error_to_who_reads(tmp_path: Path, disk: Path) -> None:
    with serving(tmp_path, *DAILY) as server:
        os.truncate(disk, MIB)
        command = [peer("qemu-io", "qemu-utils"), "-f", "raw", "-c", "read 2M 4k"]
        done = subprocess.run([*command, server.uri], capture_output=True, text=True)
        assert "Input/output error" in done.stdout + done.stderr
        assert server.end() == 1, server.errors
        assert f"{disk}" in server.errors
        assert "cut short" in server.errors


def test_parameters_of_filters_come_behind_the_plugin(tmp_path: Path, disk: Path) -> None:
    options = ("-U", "-", "--filter=offset", "offset=1M", "range=1M", "--run", 'nbdinfo "$uri"')
    peer("nbdinfo", "libnbd-bin")
    done = start(disk, "--store", tmp_path / "store", *DAILY, options=options)
    assert "export-size: 1048576" in done.stdout, done.stderr


def test_a_block_device_is_served_like_a_file(tmp_path: Path, disk: Path) -> None:
    os.truncate(disk, SIZE)
    link = tmp_path / "device" / "disk.raw"
    with loop_device(disk) as device:
        link.parent.mkdir()
        link.symlink_to(device)
        with serving(link.parent, *DAILY) as server:
            qemu_io(
                server.uri,
                "write -P 5 100 1000",
                "write -z -u 1M 1M",
                "write -z 3M 700",  # no whole sectors
                "discard 4M 64k",
                "read -P 5 100 1000",
                "read -P 0 1M 1M",
                "read -P 0 3M 700",
                options=["-f", "raw"],
            )
            assert server.end() == 0, server.errors
        areas, _ = opened(link.parent)
        assert areas == [(0, BLOCK), (MIB, MIB), (3 * MIB, BLOCK), (4 * MIB, 65536)]


def shown(*words: str | Path) -> str:
    """What the starter would run, as a line for a shell."""
    command = [*STARTER, *map(str, words), "--show"]
    if "--" in command:
        command.insert(command.index("--"), command.pop())
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout


def test_readers_do_not_wait_for_a_writer(tmp_path: Path, disk: Path) -> None:
    """The thread model: requests of one connection and of several are done at the same time."""
    line = shown(disk, "--store", tmp_path / "store", *DAILY).replace(" -f ", " --dump-plugin ")
    found = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert "\nthread_model=parallel" in found.stdout


# ---- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_by_a_signal_it_stores_the_bitmaps(
    tmp_path: Path, disk: Path, number: signal.Signals
) -> None:
    with serving(tmp_path, *DAILY) as server:
        qemu_io(server.uri, "write 0 4k", options=["-f", "raw"])
        qmp = Qmp(server)
        qmp("__org.pybitmap_freeze", bitmaps=[{"node": "disk", "name": "daily"}])
        qemu_io(server.uri, "write 8k 4k", options=["-f", "raw"])
        assert server.end(number) == 0
        told = [line for line in server.errors.splitlines() if "pybitmap" in line]
        assert [line for line in told if "'daily' is new" not in line] == []
        qmp.close()
    assert not server.qmp.exists()
    # What was frozen is put back.
    assert opened(tmp_path) == ([(0, BLOCK), (2 * BLOCK, BLOCK)], None)


def test_quit_over_qmp_ends_it(tmp_path: Path, disk: Path) -> None:
    with serving(tmp_path, *DAILY) as server:
        qmp = Qmp(server)
        qmp("__org.pybitmap_mark", node="disk", offset=0, length=1)
        qmp("quit")
        qmp.close()
        assert server.wait() == 0, server.errors
    assert opened(tmp_path)[0] == [(0, BLOCK)]


def test_bitmaps_that_cannot_be_stored_are_an_error_and_nothing_is_lost(
    tmp_path: Path, disk: Path
) -> None:
    store, away = tmp_path / "store", tmp_path / "away"
    with serving(tmp_path, *DAILY) as server:
        qemu_io(server.uri, "write 0 4k", options=["-f", "raw"])
        store.rename(away)
        assert server.end() == 1
        assert str(store) in server.errors
        assert "Traceback" not in server.errors
    away.rename(store)
    assert opened(tmp_path) == ([(0, BLOCK)], None)


def result(*words: str | Path) -> int:
    """The exit code of the starter, in this process; for what ends before nbdkit begins."""
    try:
        return main([str(each) for each in words])
    except SystemExit as error:
        return int(error.code or 0)


# ---- twins, and what is refused -----------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a server that runs."""
    need_nbdkit()
    folder = tmp_path_factory.mktemp("served")
    (folder / "disk.raw").write_bytes(os.urandom(SIZE))
    with serving(folder, *DAILY):
        yield folder


def test_a_second_server_of_the_disk_is_refused_whatever_its_store(
    tmp_path: Path, served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, socket = served / "disk.raw", tmp_path / "s"
    assert result(disk, "--store", tmp_path / "other", *DAILY, "--socket", socket) == 1
    assert f"{disk} is open in another program" in capsys.readouterr().err
    assert not socket.exists()


def test_a_second_server_of_the_store_is_refused_whatever_its_disk(
    tmp_path: Path, disk: Path, served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert result(disk, "--store", served / "store", *DAILY, "--socket", tmp_path / "s") == 1
    assert f"'{served / 'store'}' is in use by another process" in capsys.readouterr().err


def test_qemu_does_not_write_to_a_disk_that_is_served(served: Path) -> None:
    command = [peer("qemu-io", "qemu-utils"), "-f", "raw", "-c", "write 0 512"]
    done = subprocess.run([*command, served / "disk.raw"], capture_output=True, text=True)
    assert 'Failed to get "write" lock' in done.stderr


def test_by_hand_in_the_background_errors_are_told_before_it_forks(
    tmp_path: Path, disk: Path, served: Path
) -> None:
    line = shown(disk, "--store", served / "store", *DAILY)
    command = line.replace(" -f ", f" -U {tmp_path / 's'} ")
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "is in use by another process" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_show_prints_is_what_runs(tmp_path: Path, disk: Path) -> None:
    peer("qemu-io", "qemu-utils")
    run = ["--", "-U", "-", "--run", 'qemu-io -f raw -c "write 0 4k" "$uri"']
    line = shown(disk, "--store", tmp_path / "store", *DAILY, *run)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for _ in range(600):  # nbdkit with --run ends before its server does
        done = subprocess.run([sys.executable, "-m", "pybitmap", "dump", tmp_path / "store",
            "daily", "--format", "csv"], capture_output=True, text=True)  # fmt: skip
        if done.returncode == 0:
            break
        time.sleep(0.05)
    assert done.stdout == "offset,length\n0,4096\n"


def test_read_only_writes_nothing_not_even_to_the_store(tmp_path: Path, disk: Path) -> None:
    prepared(tmp_path)

    def state() -> list[tuple[str, int, str]]:
        files = [disk, *sorted((tmp_path / "store").iterdir())]
        return [
            (each.name, each.stat().st_mtime_ns, hashlib.sha256(each.read_bytes()).hexdigest())
            for each in files
            if each.is_file()
        ]

    before = state()
    with serving(tmp_path, *DAILY, "--read-only") as server:
        qemu_io(server.uri, "read 0 4k", options=["-r", "-f", "raw"])
        command = [peer("qemu-io", "qemu-utils"), "-f", "raw", "-c", "write 0 1", server.uri]
        assert subprocess.run(command, capture_output=True).returncode == 1
        peer("nbdinfo", "libnbd-bin")
        options = ("-U", "-", "--run", 'nbdinfo --can write "$uri"')
        done = start(disk, "--store", tmp_path / "store", "--read-only", options=options)
        assert (done.returncode, done.stderr) == (2, "")  # a second one: served, and no
        assert server.end() == 0, server.errors
    assert state() == before


def advised(command: str, told: str) -> None:
    """Does what an error says is to be done."""
    found = re.search(rf"pybitmap ({command} .*)", told)
    assert found, told
    words = [sys.executable, "-m", "pybitmap", *shlex.split(found[1])]
    subprocess.run(words, check=True, capture_output=True)


def test_a_disk_of_another_size_is_refused_and_how_to_go_on_works(
    tmp_path: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(tmp_path)
    os.truncate(disk, 2 * SIZE)
    assert result(disk, "--store", tmp_path / "store", *DAILY, "--socket", tmp_path / "s") == 1
    advised("resize", capsys.readouterr().err)
    with serving(tmp_path, *DAILY) as server:
        assert server.end() == 0, server.errors


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["missing", "--store", "s"], 1, "missing: No such file or directory"),
        ([".", "--store", "s"], 1, "is a folder, not a disk"),
        (["/dev/full", "--store", "s"], 1, "is neither a regular file nor a block device"),
        (["fifo", "--store", "s"], 1, "is neither a regular file nor a block device"),
        (["disk.raw"], 2, "required: --store"),
        (["disk.raw", "--store", ""], 1, "store=: give a path"),
        (["disk.raw", "--store", "s", "--node", ""], 1, "node= is missing or empty"),
        (["disk.raw", "--store", "s\udcff"], 1, "is no UTF-8"),
        (["disk.raw", "--store", "s", "--bitmap", ",granularity=4K"], 1, "a name, once"),
        (["disk.raw", "--store", "s", "--bitmap", "x" * 1024], 1, "Bitmap name too long"),
        (["disk.raw", "--store", "none/s", "--bitmap", "b"], 1, "no folder for the store"),
        (["\x1b[31m", "--store", "s"], 1, "\\x1b[31m: No such file"),
        (["disk.raw", "--store", "disk.raw"], 1, "Not a directory"),
        (["disk.raw", "--store", "s"], 1, "has no bitmap, so no write would be recorded"),
        (["disk.raw", "--store", "s", "--bitmap", "b,granularity=3K"], 1, "a power of 2"),
        (["disk.raw", "--store", "s", "--bitmap", "b", "--bitmap", "b"], 1, "a name, once"),
        (["disk.raw", "--store", "s", "--bitmap", "b", "--read-only"], 1, "No such file"),
        (["disk.raw", "--store", "s", "--bitmap", "b", "--qmp", "disk.raw"], 1, "is no socket"),
        (["disk.raw", "--store", "s", "--bitmap", "b", "--socket", "s/s/s"], 1, "No such file"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    tmp_path: Path,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    socket = [] if "--socket" in words else ["--socket", "nbd.sock"]
    assert result(*words, *socket) == code
    told = capsys.readouterr().err
    assert says in told
    assert "Traceback" not in told


def test_without_a_place_to_listen_it_says_so(
    tmp_path: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert result(disk, "--store", tmp_path / "s", *DAILY) == 2
    assert "say where to listen" in capsys.readouterr().err


def test_a_bitmap_that_does_not_know_what_was_written_is_refused_and_how_to_go_on_works(
    tmp_path: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(tmp_path)
    [words] = (tmp_path / "store").glob("*.words")
    os.truncate(words, 0)
    assert result(disk, "--store", tmp_path / "store", *DAILY, "--socket", tmp_path / "s") == 1
    told = capsys.readouterr().err
    assert "bitmap 'daily' does not know what was written" in told
    advised("repair", told)
    with serving(tmp_path, *DAILY) as server:
        assert server.end() == 0, server.errors
    assert opened(tmp_path)[0] == [(0, SIZE - 1000)]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (None, "nbdkit is not installed"),
        ("exit 1", "nbdkit has no plugin for Python"),
        ("echo python_version=3.5.2", "nbdkit is too old"),
        ("echo python_version=3.5.2; echo has_cleanup=1", "nbdkit's plugin has CPython 3.5, and"),
    ],
)
def test_a_nbdkit_that_cannot_load_it_is_named(
    tmp_path: Path,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str | None,
    says: str,
) -> None:
    if script is not None:
        (tmp_path / "nbdkit").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nbdkit").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert result(disk, "--store", tmp_path / "s", *DAILY, "--socket", tmp_path / "n") == 1
    assert says in capsys.readouterr().err
