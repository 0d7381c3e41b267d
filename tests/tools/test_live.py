# SPDX-License-Identifier: MIT
"""Bitmaps of machines that run: QEMU's and our own server's, read, changed, taken, left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol

import pytest
from daemon import Daemon, Disk
from fake_monitor import GREETING, fake
from filesystems import mounted
from lines import Interruption, interrupted
from peers import package, peer
from support import collect, silent

from pybitmap import BlockGraph
from pybitmap.errors import InvalidError, NotFoundError, StateError
from pybitmap.offline import areas
from pybitmap.qmp import Server
from pybitmap.store import Qcow2Store
from pybitmap.tools import live
from pybitmap.tools.leftovers import new_name
from pybitmap.tools.live import Extents, Taken
from pybitmap.tools.monitor import CommandError, DisconnectedError, Monitor, MonitorError

SIZE = 1 << 20
DAILY = ("disk", "daily")
WRITES = [(0, 1), (70000, 1), (SIZE - 512, 512), (300000, 100000)]


class Machine(Protocol):
    """Something with a monitor, and a node "disk" that is written to."""

    socket: Path

    def write(self, writes: list[tuple[int, int]]) -> None: ...


class Qemu:
    """A qemu-storage-daemon with an image."""

    def __init__(self) -> None:
        self.daemon = Daemon({"disk": Disk(SIZE, cluster_size=4096), "raw": Disk(SIZE)})
        self.socket = self.daemon.monitor

    def write(self, writes: list[tuple[int, int]]) -> None:
        self.daemon.write("disk", writes)

    def close(self) -> None:
        self.daemon.close()


class Ours:
    """Our own server, in this process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.socket = Path(self._folder.name, "qmp")
        self.graph = BlockGraph()
        self.graph.add_node("disk", size=SIZE)
        self.graph.add_node("raw", size=SIZE)
        self._server = Server(self.graph, str(self.socket))
        self._server.__enter__()

    def write(self, writes: list[tuple[int, int]]) -> None:
        for offset, nbytes in writes:
            self.graph.nodes["disk"].mark_dirty(offset, nbytes)

    def close(self) -> None:
        self._server.__exit__(None, None, None)
        self.graph.close()
        self._folder.cleanup()


@pytest.fixture(autouse=True)
def _package() -> None:
    package("qemu.qmp")


@pytest.fixture(scope="module")
def qemu() -> Iterator[Qemu]:
    machine = Qemu()
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def ours() -> Iterator[Ours]:
    machine = Ours()
    yield machine
    machine.close()


@pytest.fixture(params=["qemu", "ours"])
def machine(request: pytest.FixtureRequest) -> Machine:
    found: Machine = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def monitor(machine: Machine) -> Iterator[Monitor]:
    """With one bitmap, of the only node."""
    with Monitor(machine.socket) as monitor:
        for node in live.nodes(monitor):
            live.remove(monitor, [(node.name, each.name) for each in node.bitmaps])
        live.add(monitor, DAILY, granularity=4096, persistent=isinstance(machine, Qemu))
        yield monitor


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def bitmaps(monitor: Monitor, node: str = "disk") -> dict[str, int | None]:
    """Counts."""
    return {each.name: each.count for each in live.find_node(monitor, node).bitmaps}


def extents(monitor: Monitor, name: str = "daily", **options: Any) -> list[tuple[int, int]]:
    with Extents(monitor, ("disk", name), **options) as found:
        return list(found)


def expected(writes: list[tuple[int, int]], granularity: int = 4096) -> list[tuple[int, int]]:
    groups = sorted(
        {
            group
            for offset, nbytes in writes
            for group in range(offset // granularity, (offset + nbytes - 1) // granularity + 1)
        }
    )
    found: list[tuple[int, int]] = []
    for group in groups:
        start = group * granularity
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + granularity)
        else:
            found.append((start, granularity))
    return found


def nothing_is_left(monitor: Monitor, folder: Path) -> bool:
    infos = monitor.execute("query-named-block-nodes", flat=True)
    return not (
        [each for each in infos if each["node-name"].startswith("pybitmap-")]
        or [name for name in bitmaps(monitor) if name.startswith("pybitmap-")]
        or [each for each in os.listdir(folder) if each.startswith("pybitmap-")]
    )


# ---- reading ------------------------------------------------------------------------------------


def test_extents_are_those_of_the_writes(machine: Machine, monitor: Monitor, folder: Path) -> None:
    assert extents(monitor) == []
    machine.write(WRITES)
    assert extents(monitor) == expected(WRITES)
    assert extents(monitor, granularity=65536) == expected(WRITES, 65536)
    assert bitmaps(monitor) == {"daily": sum(nbytes for _, nbytes in expected(WRITES))}
    assert nothing_is_left(monitor, folder)


def test_our_server_tells_more_than_a_page(ours: Ours) -> None:
    with Monitor(ours.socket) as monitor:
        live.add(monitor, ("raw", "many"), granularity=512, persistent=False)
        node = ours.graph.nodes["raw"]
        for at in range(0, SIZE, 1024):
            node.mark_dirty(at, 1)
        page, live._PAGE = live._PAGE, 100
        try:
            with Extents(monitor, ("raw", "many")) as found:
                assert list(found) == [(at, 512) for at in range(0, SIZE, 1024)]
        finally:
            live._PAGE = page
        live.remove(monitor, [("raw", "many")])


def test_what_is_written_meanwhile_is_not_there_and_stays_dirty(
    machine: Machine, monitor: Monitor
) -> None:
    machine.write(WRITES)
    with Extents(monitor, DAILY) as found:
        machine.write([(500000, 1)])
        assert list(found) == expected(WRITES)
    assert extents(monitor) == expected([*WRITES, (500000, 1)])


@pytest.mark.parametrize("size", [512, 4096, 5 << 20, (5 << 30) + 512, 1 << 45])
def test_extents_are_what_qemu_tells_after_its_end(size: int, tmp_path: Path) -> None:
    """By qemu-nbd and nbdinfo, of the image that the machine has closed."""
    nbdinfo, qemu_nbd = peer("nbdinfo", "libnbd-bin"), peer("qemu-nbd", "qemu-utils")
    rng = random.Random(size)
    granularity = 65536 if size > 1 << 40 else 512
    writes = [(0, 512), (size - 512, 512)]
    writes += [(rng.randrange(size), 1) for _ in range(20)]
    with Daemon({"q": Disk(size, cluster_size=65536)}) as daemon:
        with Monitor(daemon.monitor) as monitor:
            live.add(monitor, ("q", "b"), granularity=granularity)
            daemon.write("q", writes)
            with Extents(monitor, ("q", "b")) as extents:
                found = list(extents)
        daemon.close_node("q")
        socket = tmp_path / "nbd"
        options = ["-r", "-t", "-f", "qcow2", "-B", "b", "-k", str(socket)]
        with subprocess.Popen([qemu_nbd, *options, str(daemon.images["q"])]) as server:
            try:
                while not socket.exists():
                    assert server.poll() is None
                    time.sleep(0.01)
                said = subprocess.run(
                    [
                        nbdinfo,
                        "--json",
                        "--map=qemu:dirty-bitmap:b",
                        f"nbd+unix:///?socket={socket}",
                    ],
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=60,
                ).stdout
            finally:
                server.terminate()
        told: list[list[int]] = []
        for each in json.loads(said):
            if each["type"]:
                if told and sum(told[-1]) == each["offset"]:
                    told[-1][1] += each["length"]
                else:
                    told.append([each["offset"], each["length"]])
        assert [list(each) for each in found] == told
        with areas(Qcow2Store(daemon.images["q"]), (None, "b"), silent) as stored:
            assert list(stored) == found


def test_of_a_disk_without_bytes_there_is_nothing() -> None:
    with Daemon({"q": Disk(0, cluster_size=65536)}) as daemon, Monitor(daemon.monitor) as monitor:
        live.add(monitor, ("q", "b"))
        for kind in (Extents, Taken):
            with kind(monitor, ("q", "b")) as found:
                assert list(found) == []
        assert bitmaps(monitor, "q") == {"b": 0}


def test_what_is_there_is_told(machine: Machine, monitor: Monitor) -> None:
    live.add(monitor, ("raw", "t"), granularity=512, disabled=True, persistent=False)
    [raw] = [node for node in live.nodes(monitor) if node.name == "raw"]
    assert raw.size == SIZE
    [bitmap] = raw.bitmaps
    assert (bitmap.name, bitmap.granularity, bitmap.enabled) == ("t", 512, False)
    assert (bitmap.count, bitmap.persistent, bitmap.in_use) == (0, False, False)
    assert bitmap.reason is None


def test_inconsistent_ones_are_told_and_can_be_removed() -> None:
    with Daemon({"q": Disk(SIZE, cluster_size=4096)}) as daemon:
        daemon.must("block-dirty-bitmap-add", node="q", name="b", persistent=True)
        daemon.restart()  # b is stored, and in use from now on
        daemon.kill()
        daemon.start()
        with Monitor(daemon.monitor) as monitor:
            [bitmap] = live.find_node(monitor, "q").bitmaps
            assert bitmap.reason == live.INCONSISTENT
            assert bitmap.count is None
            with pytest.raises(CommandError, match="is inconsistent and cannot be used"):
                Extents(monitor, ("q", "b")).__enter__()
            live.remove(monitor, [("q", "b")])


def test_names_of_nodes_and_devices(tmp_path: Path) -> None:
    program = peer("qemu-system-x86_64", "qemu-system-x86")
    for name in ("one", "two"):
        Disk(SIZE, cluster_size=4096).create(tmp_path / name)
    socket = tmp_path / "qmp"
    with subprocess.Popen(
        [
            *(program, "-nodefaults", "-display", "none", "-S", "-M", "q35,accel=tcg"),
            *("-drive", f"if=none,id=drive0,format=qcow2,file={tmp_path}/one"),
            *("-device", "virtio-blk-pci,drive=drive0,id=disk0"),
            *("-blockdev", f"file,filename={tmp_path}/two,node-name=below"),
            *("-blockdev", "qcow2,file=below,node-name=above"),
            *("-device", "virtio-blk-pci,drive=above,id=disk1"),
            *("-qmp", f"unix:{socket},server=on,wait=off"),
        ]
    ) as process:
        try:
            while True:
                with suppress(DisconnectedError), Monitor(socket) as monitor:
                    found = {
                        name: live.find_node(monitor, name).name
                        for name in ("drive0", "disk0", "above", "below", "disk1")
                    }
                    auto = str(found["drive0"])
                    live.add(monitor, (auto, "b"))
                    with Extents(monitor, (auto, "b")) as extents:
                        assert list(extents) == []
                    with pytest.raises(NotFoundError, match=r"Node 'none' not found.* drive0"):
                        live.find_node(monitor, "none")
                    assert "drive0" in live.device_names(monitor)
                    break
                assert process.poll() is None
                time.sleep(0.01)
        finally:
            process.kill()
    assert auto.startswith("#block")
    assert found == {
        "drive0": auto,
        "disk0": auto,
        "above": "above",
        "disk1": "above",
        "below": "below",
    }


# ---- changing -----------------------------------------------------------------------------------


def test_changes(machine: Machine, monitor: Monitor) -> None:
    machine.write([(0, 1)])
    live.add(monitor, ("disk", "weekly"), granularity=4096, persistent=False)
    live.merge(monitor, ("disk", "weekly"), [DAILY])
    live.clear(monitor, [DAILY])
    assert bitmaps(monitor) == {"daily": 0, "weekly": 4096}
    live.enable(monitor, [DAILY, ("disk", "weekly")], False)
    machine.write([(8192, 1)])
    assert bitmaps(monitor) == {"daily": 0, "weekly": 4096}
    live.enable(monitor, [DAILY], True)
    live.add(monitor, ("raw", "other"), granularity=512, persistent=False)
    live.merge(monitor, ("raw", "other"), [("disk", "weekly")])
    assert bitmaps(monitor, "raw") == {"other": 4096}
    live.remove(monitor, [("raw", "other"), ("disk", "weekly")])
    assert bitmaps(monitor) == {"daily": 0}


def test_all_or_none(machine: Machine, monitor: Monitor) -> None:
    machine.write([(0, 1)])
    names = [DAILY, ("disk", "none")]
    for change in (
        live.clear,
        live.remove,
        partial(live.enable, enabled=False),
        partial(live.enable, enabled=True),
    ):
        with pytest.raises(CommandError, match="Dirty bitmap 'none' not found"):
            change(monitor, names)
        assert bitmaps(monitor) == {"daily": 4096}
        assert live.find_node(monitor, "disk").bitmaps[0].enabled


def test_to_merge_nothing_changes_nothing(machine: Machine, monitor: Monitor) -> None:
    machine.write([(0, 1)])
    live.merge(monitor, DAILY, [])
    assert bitmaps(monitor) == {"daily": 4096}
    with pytest.raises(NotFoundError, match="Dirty bitmap 'none' not found"):
        live.merge(monitor, ("disk", "none"), [])


@pytest.mark.parametrize("enabled", [True, False])
def test_enable_of_a_node_that_is_not_there_is_refused(
    machine: Machine, monitor: Monitor, enabled: bool
) -> None:
    with pytest.raises(CommandError, match="'none'"):
        live.enable(monitor, [DAILY, ("none", "daily")], enabled)
    assert bitmaps(monitor) == {"daily": 0}


@pytest.mark.parametrize("enabled", [True, False])
def test_take_and_put_back(machine: Machine, monitor: Monitor, enabled: bool) -> None:
    machine.write([(0, 1)])
    live.enable(monitor, [DAILY], enabled)
    live.take(monitor, DAILY, "copying")
    machine.write([(8192, 1)])
    new = 4096 if enabled else 0
    assert bitmaps(monitor) == {"daily": new, "copying": 4096}
    [daily, copying] = live.find_node(monitor, "disk").bitmaps
    assert (copying.enabled, copying.persistent) == (False, daily.persistent)
    assert (copying.granularity, daily.enabled) == (4096, enabled)
    with pytest.raises(CommandError, match="already exists"):
        live.take(monitor, DAILY, "copying")
    with pytest.raises(NotFoundError, match="'none' not found"):
        live.take(monitor, ("disk", "none"), "x")
    for into in (("disk", "copying"), ("raw", "daily")):
        with pytest.raises(InvalidError, match="they are to be two"):
            live.put_back(monitor, ("disk", "copying"), into)
    live.put_back(monitor, ("disk", "copying"), DAILY)
    assert bitmaps(monitor) == {"daily": 4096 + new}


@pytest.mark.parametrize("whole", [True, False])
def test_a_rotation_loses_nothing_that_is_written_between_two_of_its_actions(
    machine: Machine, monitor: Monitor, whole: bool
) -> None:
    """Run one by one, as if the disk were not still; without what records meanwhile it does."""
    [bitmap] = live.find_node(monitor, "disk").bitmaps
    actions = live._rotation(DAILY, "copying", bitmap)
    if not whole:
        actions = actions[1:4]
    writes = []
    for number, action in enumerate(actions):
        writes.append((number * 8192, 1))
        machine.write(writes[-1:])
        monitor.transaction([action])
    found = {*extents(monitor), *extents(monitor, "copying")}
    every = {each for write in writes for each in expected([write])}
    assert (every <= found) == whole
    assert set(bitmaps(monitor)) == {"daily", "copying"}


# ---- taking -------------------------------------------------------------------------------------


def test_what_was_taken_is_clean_once_it_is_done(
    machine: Machine, monitor: Monitor, folder: Path
) -> None:
    machine.write(WRITES)
    with Taken(monitor, DAILY) as taken:
        machine.write([(500000, 1)])
        assert list(taken) == expected(WRITES)
        taken.done()
    assert extents(monitor) == expected([(500000, 1)])
    assert nothing_is_left(monitor, folder)
    with pytest.raises(StateError, match="is put back"):
        taken.done()


def test_what_is_not_done_is_put_back(machine: Machine, monitor: Monitor, folder: Path) -> None:
    def use(error: BaseException | None) -> None:
        with Taken(monitor, DAILY) as taken:
            machine.write([(500000, 1)])
            for _ in taken:
                if error:
                    raise error
                return

    machine.write(WRITES)
    use(None)
    assert extents(monitor) == expected([*WRITES, (500000, 1)])
    for error in (OSError("no space left"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            use(error)
        assert extents(monitor) == expected([*WRITES, (500000, 1)])
    assert nothing_is_left(monitor, folder)


def test_beside_a_writer_each_write_is_taken_once_at_least(
    machine: Machine, monitor: Monitor
) -> None:
    stop = Event()
    written: list[tuple[int, int]] = []

    def write() -> None:
        rng = random.Random(1)
        while not stop.is_set():
            write = (rng.randrange(SIZE // 4096) * 4096, 1)
            machine.write([write])
            written.append(write)

    thread = Thread(target=write)
    thread.start()
    taken_before: set[tuple[int, int]] = set()
    try:
        for _ in range(10):
            with Taken(monitor, DAILY, granularity=4096) as taken:
                for offset, nbytes in taken:
                    taken_before.update((at, 4096) for at in range(offset, offset + nbytes, 4096))
                taken.done()
    finally:
        stop.set()
        thread.join()
    for offset, nbytes in extents(monitor):
        taken_before.update((at, 4096) for at in range(offset, offset + nbytes, 4096))
    assert taken_before == {(offset, 4096) for offset, _ in written}


# ---- what fails ---------------------------------------------------------------------------------


def test_refusals_leave_all_as_it_was(machine: Machine, monitor: Monitor, folder: Path) -> None:
    machine.write(WRITES)
    for kind in (Extents, Taken):
        with pytest.raises(NotFoundError, match="Dirty bitmap 'none' not found"):
            kind(monitor, ("disk", "none")).__enter__()
    assert nothing_is_left(monitor, folder)
    assert extents(monitor) == expected(WRITES)


NODE = {"node-name": "n", "image": {"virtual-size": 512}}


@pytest.mark.parametrize(
    "said",
    [
        None,
        3,
        [3],
        [{}],
        [{**NODE, "image": {"virtual-size": "x"}}],
        [{**NODE, "dirty-bitmaps": 3}],
        [{**NODE, "dirty-bitmaps": [{"name": "b"}]}],
    ],
)
def test_what_no_qemu_would_say_is_an_error(tmp_path: Path, said: Any) -> None:
    replies = [GREETING, {"return": {}}, {"return": said}, {"return": said}]
    with fake(tmp_path / "s", *replies) as path, Monitor(path, timeout=5) as monitor:
        with pytest.raises(MonitorError, match="query-named-block-nodes was not answered as by"):
            live.nodes(monitor)
        with suppress(MonitorError):  # or it is an answer, of machines without devices
            assert live.device_names(monitor) == []


def test_a_busy_bitmap_cannot_be_taken(qemu: Qemu, folder: Path) -> None:
    with Monitor(qemu.socket) as monitor:
        for node in live.nodes(monitor):
            live.remove(monitor, [(node.name, each.name) for each in node.bitmaps])
        live.add(monitor, DAILY, granularity=4096, disabled=True)
        qemu.daemon.hold("disk", "daily")
        try:
            [bitmap] = live.find_node(monitor, "disk").bitmaps
            assert bitmap.in_use
            with pytest.raises(CommandError, match="is currently in use"):
                Taken(monitor, DAILY).__enter__()
        finally:
            qemu.daemon.release("disk")
        assert nothing_is_left(monitor, folder)


def test_a_busy_bitmap_that_is_to_be_enabled_stays_so(qemu: Qemu, folder: Path) -> None:
    with Monitor(qemu.socket) as monitor:
        for node in live.nodes(monitor):
            live.remove(monitor, [(node.name, each.name) for each in node.bitmaps])
        live.add(monitor, DAILY)
        qemu.daemon.hold("disk", "daily")
        try:
            with pytest.raises(CommandError, match="is currently in use"):
                live.enable(monitor, [DAILY], True)
            [bitmap] = live.find_node(monitor, "disk").bitmaps
            assert bitmap.in_use
            assert bitmap.enabled
        finally:
            qemu.daemon.release("disk")
        assert nothing_is_left(monitor, folder)


def test_qemu_cannot_open_the_carrier(
    qemu: Qemu, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def nothing(path: Path, size: int) -> None:
        path.write_bytes(b"no image")

    monkeypatch.setattr(live, "write_carrier", nothing)
    with Monitor(qemu.socket) as monitor:
        with suppress(CommandError):
            live.remove(monitor, [DAILY])
        live.add(monitor, DAILY)
        for kind in (Extents, Taken):
            with pytest.raises(CommandError, match="not in qcow2 format"):
                kind(monitor, DAILY).__enter__()
            assert nothing_is_left(monitor, folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts")
@pytest.mark.parametrize("kind", [Extents, Taken])
def test_a_full_disk_for_the_carrier_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Extents]
) -> None:
    """QEMU may then store a bitmap that is clean."""
    size = 64 << 30
    writes = [(at << 31, 1) for at in range(32)]
    with (
        Daemon({"disk": Disk(size, cluster_size=65536)}) as daemon,
        mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=192k", "tmpfs") as small,
        Monitor(daemon.monitor) as monitor,
    ):
        monkeypatch.setattr(tempfile, "tempdir", str(small))
        live.add(monitor, DAILY, granularity=4096)
        daemon.write("disk", writes)
        told: list[str] = []
        whole = 0
        for kib in range(192, 4096, 64):
            subprocess.run(["mount", "-o", f"remount,size={kib}k", small], check=True)
            try:
                with kind(monitor, DAILY) as found:
                    assert list(found) == expected(writes), kib
                whole += 1
            except OSError as error:
                told.append(str(error))
            assert nothing_is_left(monitor, small)
            assert bitmaps(monitor) == {"daily": 32 * 4096}
            if whole == 2:
                break
        assert len(told) > 3
        assert all("did not store all" in each or "No space left" in each for each in told), told


def test_without_a_place_for_temporary_files(
    qemu: Qemu, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "none"))
    with Monitor(qemu.socket) as monitor:
        with suppress(CommandError):
            live.remove(monitor, [DAILY])
        live.add(monitor, DAILY, granularity=4096)
        qemu.write(WRITES)
        with pytest.raises(FileNotFoundError):
            Taken(monitor, DAILY).__enter__()
        assert bitmaps(monitor) == {"daily": sum(nbytes for _, nbytes in expected(WRITES))}


@pytest.mark.parametrize("kind", [Extents, Taken])
def test_qemu_ends_meanwhile(kind: Callable[..., Any], folder: Path) -> None:
    with Daemon({"disk": Disk(SIZE, cluster_size=4096)}) as daemon:
        with Monitor(daemon.monitor) as monitor:
            live.add(monitor, DAILY, granularity=4096)
            daemon.write("disk", WRITES)
            daemon.reopen("disk")
            with suppress(DisconnectedError), kind(monitor, DAILY) as found:
                daemon.stop()
                assert list(found) == expected(WRITES)
        assert os.listdir(folder) == []
        daemon.start()
        with Monitor(daemon.monitor) as monitor:
            for name, count in bitmaps(monitor).items():
                assert count == sum(nbytes for _, nbytes in expected(WRITES)) or name == "daily"
            # The process that has taken goes on, so it is not known to be done with.
            assert live.tidy(monitor) == []


# ---- interruptions, kills, forks, twins ---------------------------------------------------------


def at_every_third_line(attempt: Callable[[], object]) -> Iterator[str]:
    """As at_every_line. What is asked again and again is gone through in different lines."""
    number = 1
    while True:
        with interrupted(number, within="tools/live") as lines, suppress(Interruption):
            attempt()
        if not lines.came:
            assert number > 60, "little was interrupted"
            return
        yield lines.where
        number += 3


@pytest.mark.filterwarnings("ignore:.*<function Monitor.__del__:pytest.PytestWarning")
def test_interrupted_nothing_is_left_and_nothing_lost(
    machine: Machine, monitor: Monitor, folder: Path
) -> None:
    done = isinstance(machine, Qemu)
    machine.write(WRITES)
    whole = bitmaps(monitor)

    def take() -> None:
        with Taken(monitor, DAILY) as taken:
            list(taken)
            if done:
                taken.done()

    for where in at_every_third_line(take):
        assert nothing_is_left(monitor, folder), where
        if bitmaps(monitor) != whole:
            assert done
            assert bitmaps(monitor) == {"daily": 0}, where
            machine.write(WRITES)
    assert bitmaps(monitor) == ({"daily": 0} if done else whole)


#: What a run does to QEMU, and to its folder.
STEPS = {"execute", "make", "write_carrier", "remove", "close"}


def killed_after(number: int, work: Callable[[], object]) -> bool:
    """In the child of a fork, when so many steps are done; False: it came to its end."""
    child = os.fork()
    if not child:
        code = 1
        try:
            done = 0

            def profile(frame: Any, event: str, arg: Any) -> None:
                nonlocal done
                code = frame.f_code
                if event == "return" and code.co_name in STEPS and "/tools/" in code.co_filename:
                    done += 1
                    if done == number:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(profile)
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_killed_after_any_step_the_next_run_puts_all_back(
    machine: Machine, monitor: Monitor, folder: Path
) -> None:
    machine.write(WRITES)
    whole = bitmaps(monitor)
    monitor.close()  # QEMU has one client at a time

    def work() -> None:
        with Monitor(machine.socket) as mine:
            with Extents(mine, DAILY) as found:
                list(found)
            with Taken(mine, DAILY) as taken:
                list(taken)

    number, left = 1, 0
    while killed_after(number, work):
        with Monitor(machine.socket) as mine:
            left += not nothing_is_left(mine, folder)
            with Extents(mine, DAILY) as found:
                assert list(found) == expected(WRITES), number
            assert bitmaps(mine) == whole
            assert live.tidy(mine) == []
            assert nothing_is_left(mine, folder), number
        number += 1
    assert number > 15
    assert left > 3, "no kill has left anything"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_what_a_run_beside_works_with_is_left_alone(folder: Path) -> None:
    machine = Qemu()
    try:
        with Monitor(machine.socket) as monitor:
            live.add(monitor, DAILY, granularity=4096)
        machine.write(WRITES)
        there, tell = os.pipe()
        child = os.fork()
        if not child:
            try:
                with Monitor(machine.socket) as monitor:
                    taken = Taken(monitor, DAILY)
                    taken.__enter__()
                os.write(tell, b"x")
                time.sleep(60)
            finally:
                os._exit(0)
        try:
            assert os.read(there, 1) == b"x"
            with Monitor(machine.socket) as monitor:
                before = bitmaps(monitor)
                assert len(before) == 2
                assert before["daily"] == 0
                assert extents(monitor) == []
                assert bitmaps(monitor) == before
                assert len(os.listdir(folder)) == 1
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                [said] = live.tidy(monitor)
                assert "put back into bitmap 'daily' of node 'disk'" in said
                assert extents(monitor) == expected(WRITES)
                assert nothing_is_left(monitor, folder)
        finally:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            os.close(there)
            os.close(tell)
    finally:
        machine.close()


def test_what_is_another_user_s_or_has_no_source_any_more_stays(
    machine: Machine, monitor: Monitor
) -> None:
    words = new_name().split("-")
    dead = "-".join([*words[:4], "4194304", *words[5:]])
    other_user = "-".join([words[0], "0" * 8, *words[2:4], "4194304", *words[5:]])
    kept = [other_user, f"{other_user}:daily", f"{dead}:none", "pybitmap-mine", f"x{dead}"]
    for name in [*kept, dead, f"{dead}:daily"]:
        live.add(monitor, ("disk", name), persistent=False)
    assert len(live.tidy(monitor)) == 2
    assert set(bitmaps(monitor)) == {"daily", *kept}
    live.remove(monitor, [("disk", name) for name in kept])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_the_child_of_a_fork_leaves_all_to_its_parent(
    machine: Machine, monitor: Monitor, folder: Path
) -> None:
    machine.write(WRITES)
    with Taken(monitor, DAILY) as taken:
        child = os.fork()
        if not child:
            code = 1
            try:
                taken.__exit__(None, None, None)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert list(taken) == expected(WRITES)
        taken.done()
    assert bitmaps(monitor) == {"daily": 0}
    assert nothing_is_left(monitor, folder)


def test_dropped_it_has_no_node_and_the_marks_are_put_back_by_the_next_process(
    qemu: Qemu, folder: Path
) -> None:
    with Monitor(qemu.socket) as monitor:
        with suppress(CommandError):
            live.remove(monitor, [DAILY])
        live.add(monitor, DAILY, granularity=4096)
        Extents(monitor, DAILY).__enter__()
        collect()
        assert len(live.nodes(monitor)) == len(monitor.execute("query-named-block-nodes"))


@contextmanager
def twin(path: Path, work: Callable[[Monitor], object]) -> Iterator[None]:
    """Another thread that does it again and again, with a monitor of its own."""
    stop, failed = Event(), []

    def run() -> None:
        try:
            with Monitor(path) as monitor:
                while not stop.is_set():
                    work(monitor)
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failed


def test_two_at_a_time_do_not_disturb_each_other(ours: Ours, folder: Path) -> None:
    with Monitor(ours.socket) as monitor:
        for node in live.nodes(monitor):
            live.remove(monitor, [(node.name, each.name) for each in node.bitmaps])
        live.add(monitor, DAILY, granularity=4096, persistent=False)
        ours.write(WRITES)
        with twin(ours.socket, lambda other: extents(other)):
            for _ in range(20):
                assert extents(monitor) == expected(WRITES)
        assert nothing_is_left(monitor, folder)


@pytest.mark.parametrize(
    ("example", "args"),
    [
        ("live_writes.py", []),
        ("live_writes.py", ["missing", "disk"]),
        ("plot.py", ["one"]),
        ("plot.py", ["missing", "x.svg"]),
    ],
)
def test_an_example_says_in_words_what_is_wrong(
    tmp_path: Path, example: str, args: list[str]
) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / example
    done = subprocess.run(
        [sys.executable, str(script), *args], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_the_example_shows_where_a_machine_writes(qemu: Qemu) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "live_writes.py"
    with subprocess.Popen(
        [sys.executable, str(example), str(qemu.socket), "raw", "2"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        qemu.daemon.write("raw", [(0, 1), (SIZE - 1, 1)])
        second = process.stdout.readline()
        assert process.wait(60) == 0
    assert first.split() == ["0", "." * 64]
    nbytes, picture = second.split()
    assert (nbytes, picture[0], picture[-1], len(picture)) == ("131072", "#", "#", 64)
    with Monitor(qemu.socket) as monitor:
        assert bitmaps(monitor, "raw") == {}
