# SPDX-License-Identifier: MIT
"""Executors of all kinds, and what happens when they die: nothing is left out, or counted twice."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from peers import package

pytest.importorskip("duckdb", reason="fleets are an extra: pip install '.[fleet]'")
pytest.importorskip("numpy", reason="fleets are an extra: pip install '.[fleet]'")

import fleet_run
from commands import heed_signals
from fleet_run import AtOnce, dying, named, noting
from fleets import made, rows_in

from pybitmap import BlockGraph, StoreError
from pybitmap.errors import ExecutorError
from pybitmap.tools import fleet
from pybitmap.tools.fleet import Result, State, Target, running
from pybitmap.tools.fleet.reading import keyed, read

SUPPORT = Path(fleet_run.__file__).parent


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes"
    path.mkdir()
    return path


def each_once(folder: Path, targets: list[Target], states: dict[State, int]) -> None:
    """In the tables, all of these and nothing else."""
    rows = rows_in(folder, "SELECT host, disk, state, dirty_bytes FROM disks")
    assert sorted(row[:2] for row in rows) == sorted((each.host, each.path) for each in targets)
    found = {state: [row[2] for row in rows].count(state.value) for state in State}
    assert {state: count for state, count in found.items() if count} == states
    sums = dict(rows_in(folder, "SELECT disk, sum(length)::BIGINT FROM extents GROUP BY disk"))
    assert sums == {disk: nbytes for _, disk, state, nbytes in rows if state == "ready"}
    for target in targets:
        if target.path in sums:
            [row] = made(target).disks
            assert sums[target.path] == row.dirty_bytes


# ---- processes of our own -------------------------------------------------------------------


def test_a_process_that_dies_is_made_anew_and_the_rest_goes_on(tmp_path: Path, notes: Path) -> None:
    targets = named(*["h"] * 5, "once", *["h"] * 10)
    report = fleet.scan(targets, tmp_path / "f", reader=partial(dying, notes), processes=2)
    assert report.states == {State.READY: 16}
    each_once(tmp_path / "f", targets, {State.READY: 16})
    pids = {pid for note in notes.glob("h-*") for pid in note.read_text().split()}
    assert str(os.getpid()) not in pids


def test_who_kills_its_process_each_time_is_a_row_and_the_others_are_read(
    tmp_path: Path, notes: Path
) -> None:
    targets = named("h", "always", *["h"] * 6, "always", "h")
    report = fleet.scan(targets, tmp_path / "f", reader=partial(dying, notes), processes=2)
    assert report.unread == 2
    each_once(tmp_path / "f", targets, {State.READY: 8, State.DIED: 2})
    for note in notes.glob("always-*"):
        assert len(note.read_text().split()) <= 3
    reasons = rows_in(tmp_path / "f", "SELECT DISTINCT reason FROM disks WHERE state = 'died'")
    assert reasons == [("the process that read it died, twice: a crash, or a lack of memory",)]


def test_a_program_that_cannot_be_imported_again_is_told_so(tmp_path: Path) -> None:
    code = (
        "from pybitmap.tools import fleet\n"
        "from pybitmap.errors import ExecutorError\n"
        f"try: fleet.scan([fleet.Target('/x', 'h')], {str(tmp_path / 'f')!r})\n"
        "except ExecutorError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("processes cannot be started: ")
    assert "__main__" in done.stdout


def beginning(tmp_path: Path, code: str) -> tuple[str, str]:
    """What a scan says whose processes do that while they begin: stdout, stderr."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from pybitmap.errors import ExecutorError\n"
        "from pybitmap.tools import fleet\n"
        "from fleets import made, targets\n"
        "if __name__ == '__main__':\n"
        "    try: print(fleet.scan(targets(3), sys.argv[1], reader=made, processes=2).unread)\n"
        "    except ExecutorError as error: print(error)\n"
        f"else: {code}\n"
    )
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "f")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},
    )
    return done.stdout, done.stderr


def test_ctrl_c_does_not_reach_a_process_that_is_only_beginning(tmp_path: Path) -> None:
    """It goes to all processes of a terminal, also to those that import their modules yet."""
    assert beginning(tmp_path, "os.kill(os.getpid(), signal.SIGINT)") == ("0\n", "")


def test_a_process_that_is_killed_while_it_begins_is_made_anew(tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    once = f"os.path.exists({mark!r}) or (Path({mark!r}).touch(), os.kill(os.getpid(), 9))"
    assert beginning(tmp_path, once)[0] == "0\n"
    assert os.path.exists(mark)
    said, _ = beginning(tmp_path, "os.kill(os.getpid(), 9)")
    assert said.startswith("processes cannot be started: 3 were killed while they began; 0 of 3")
    said, _ = beginning(tmp_path, "sys.exit(1)")
    assert "can be imported again" in said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_no_process_and_is_taken_up(
    tmp_path: Path, notes: Path, number: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SUPPORT / "fleet_run.py"), str(tmp_path / "f"), str(notes), "6"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    assert process.stdout is not None
    with process.stdout:
        while process.stdout.readline() != "done 6\n":
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == (130 if number == signal.SIGINT else -number)
    for note in notes.iterdir():
        gone(int(note.name))
    targets = named(*["h"] * 6, "hang", *["h"] * 5)
    with ThreadPoolExecutor(1) as threads:
        report = fleet.scan(targets, tmp_path / "f", reader=made, executor=threads)
    assert 6 <= report.resumed <= 11
    each_once(tmp_path / "f", targets, {State.READY: 12})


def gone(pid: int) -> None:
    """Waits until there is no such process, or only what its parent has not heard of."""
    deadline = time.monotonic() + 60
    while True:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def test_a_progress_that_raises_ends_processes_that_hang(tmp_path: Path, notes: Path) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        if done == 3:
            raise ValueError("enough")

    targets = named("h", "h", "h", "hang", "hang", "h")
    with pytest.raises(ValueError, match="enough"):
        fleet.scan(
            targets, tmp_path / "f", reader=partial(noting, notes), processes=2, progress=stop
        )
    for note in notes.iterdir():
        gone(int(note.name))


@pytest.mark.parametrize("fork", [os.fork, ctypes.PyDLL(None).fork], ids=["python", "c"])
@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("what", ["reading targets", "writing tables", "merging disks"])
def test_a_child_of_a_fork_can_neither_go_on_nor_undo(
    tmp_path: Path, what: str, leaves: bool, fork: Callable[[], int]
) -> None:
    """Whether it comes back from the progress or leaves it, it ends by no crash, and in time."""
    gc.collect()  # databases that other tests have left go here: in a child, DuckDB crashes
    parent = os.getpid()
    reading, writing = os.pipe()

    def progress(doing: str, done: int, total: int | None) -> None:
        if doing != what or done != 2 or os.getpid() != parent or children:
            return
        child = fork()
        if not child:
            signal.alarm(60)  # or it would wait for good, and its parent for it
            if leaves:
                raise ValueError("it leaves")
            return
        children.append(child)
        forked.set()

    def reader(target: Target) -> Result:
        if target not in targets[:2]:
            forked.wait()
        return made(target)

    children: list[int] = []
    targets = named(*["h"] * 6)
    forked = threading.Event()
    if what != "reading targets":
        forked.set()
    threads = ThreadPoolExecutor(2)
    try:
        fleet.scan(targets, tmp_path / "f", reader=reader, executor=threads, progress=progress)
        fleet.union([tmp_path / "f"], tmp_path / "u", progress=progress)
    except BaseException as error:
        if os.getpid() == parent:
            raise
        os.write(writing, str(error).encode())
        del error
        gc.collect()
        os._exit(7)
    if os.getpid() != parent:
        os._exit(8)
    threads.shutdown()
    os.close(writing)
    [child] = children
    with open(reading) as answer:
        said = answer.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert ("it leaves" if leaves else f"is being changed by process {parent}") in said
    each_once(tmp_path / "f", targets, {State.READY: 6})
    assert rows_in(tmp_path / "u", "SELECT state, count(*) FROM disks GROUP BY ALL") == [
        ("ready", 6)
    ]


# ---- a caller's executors -------------------------------------------------------------------


def test_any_executor_will_do(tmp_path: Path) -> None:
    targets = named(*["h"] * 8)
    with ThreadPoolExecutor(2) as threads:
        for executor in (threads, AtOnce()):
            fleet.scan(targets, tmp_path / "f", reader=made, executor=executor)
            each_once(tmp_path / "f", targets, {State.READY: 8})


def test_only_some_tasks_are_under_way_at_a_time() -> None:
    executor = AtOnce()
    answers = running.answers(str, range(1000), str, executor=executor)
    for answered in range(1, 900):
        next(answers)
        assert executor.submitted <= answered + running.AHEAD
    answers.close()


def test_a_callers_pool_that_breaks_ends_the_run_and_the_next_goes_on(
    tmp_path: Path, notes: Path
) -> None:
    targets = named(*["h"] * 40, "once", *["h"] * 10)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        with pytest.raises(ExecutorError, match="run the same again for the others") as error:
            fleet.scan(targets, tmp_path / "f", reader=partial(dying, notes), executor=pool)
        assert isinstance(error.value.__cause__, ExecutorError)
        assert isinstance(error.value.__cause__.__cause__, BrokenProcessPool)
        # And one that is broken from the start.
        with pytest.raises(ExecutorError):
            fleet.scan(targets, tmp_path / "f", reader=partial(dying, notes), executor=pool)
    report = fleet.scan(targets, tmp_path / "f", reader=partial(dying, notes), executor=AtOnce())
    assert report.resumed >= 8  # it had a window of 32 tasks when it broke
    each_once(tmp_path / "f", targets, {State.READY: 51})
    assert f"{report.resumed} of 51 targets are read" in str(error.value)


def test_an_executor_that_is_shut_down_is_one_that_broke(tmp_path: Path) -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(ExecutorError, match="the executor broke: RuntimeError"):
        fleet.scan(named("h"), tmp_path / "f", reader=made, executor=executor)
    assert not (tmp_path / "f" / "current").exists()


@pytest.mark.parametrize("kind", [CancelledError, asyncio.CancelledError, ValueError])
def test_an_executor_that_takes_a_task_back_is_one_that_broke(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    """The second is no Exception; dask has it of a worker that is gone."""

    class Cancelling(AtOnce):
        def submit(self, function: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
            future = super().submit(function, *args, **more)
            if self.submitted == 3:
                future = Future()
                future.set_exception(kind())
            return future

    targets = named(*["h"] * 5)
    with pytest.raises(ExecutorError, match=f"the executor broke: {kind.__name__}"):
        fleet.scan(targets, tmp_path / "f", reader=made, executor=Cancelling())
    fleet.scan(targets, tmp_path / "f", reader=made, executor=AtOnce())
    each_once(tmp_path / "f", targets, {State.READY: 5})


def test_a_worker_needs_no_duckdb(tmp_path: Path) -> None:
    from pybitmap.store import LocalStore

    with BlockGraph() as graph:
        node = graph.add_node("n", 1 << 30, LocalStore(tmp_path / "s"))
        node.add_bitmap("daily", persistent=True)
    [target] = fleet.find([tmp_path / "s"])
    code = (
        "import pickle, sys; sys.modules['duckdb'] = None\n"
        "task, target = pickle.load(sys.stdin.buffer)\n"
        "sys.stdout.buffer.write(pickle.dumps(task(target)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((partial(keyed, read), target)),
        stdout=subprocess.PIPE,
        check=True,
    )
    key, result = pickle.loads(done.stdout)
    assert key == target.key
    assert [row.state for row in result.disks] == [State.READY]


# ---- dask.distributed -----------------------------------------------------------------------


@contextmanager
def cluster() -> Iterator[Any]:
    """Two worker processes, and a client of theirs."""
    distributed = package("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            silence_logs=logging.CRITICAL,
            env={"PYTHONPATH": str(SUPPORT)},
        ) as workers,
        distributed.Client(workers) as client,
    ):
        yield client


def taken_up(targets: list[Target], folder: Path, client: Any, reader: Any) -> fleet.Report:
    """A scan by dask, again where it broke: its executor looks at a future twice, and has an error
    if the worker that holds the answer dies in between."""
    for _ in range(5):
        try:
            return fleet.scan(targets, folder, reader=reader, executor=client.get_executor())
        except ExecutorError as error:
            before = str(error)
    raise AssertionError(before)


@pytest.mark.filterwarnings("default")
def test_two_workers_of_dask_of_which_one_dies_in_the_middle(tmp_path: Path, notes: Path) -> None:
    targets = named(*["h"] * 20, "once", *["h"] * 20)
    with cluster() as client:
        report = taken_up(targets, tmp_path / "f", client, partial(dying, notes))
        assert report.states == {State.READY: 41}
        each_once(tmp_path / "f", targets, {State.READY: 41})
        [once] = notes.glob("once-*")
        assert len(set(once.read_text().split())) >= 2, "by the one that died, and by another"
        # Where a task may kill none, it ends the run, and that is taken up.
        client.cluster.scheduler.allowed_failures = 0
        targets = named(*["h"] * 5, "always", *["h"] * 5)
        with pytest.raises(ExecutorError, match="the executor broke: "):
            fleet.scan(
                targets,
                tmp_path / "g",
                reader=partial(dying, notes),
                executor=client.get_executor(),
            )
    report = fleet.scan(targets, tmp_path / "g", reader=made, executor=AtOnce())
    assert report.states == {State.READY: 11}
    each_once(tmp_path / "g", targets, {State.READY: 11})


def test_what_is_read_is_refused_in_the_child_of_a_fork(tmp_path: Path) -> None:
    from pybitmap.tools.fleet.folder import Folder

    with Folder(tmp_path / "f") as folder:
        child = os.fork()
        if not child:
            try:
                folder.forget()
            except StoreError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
