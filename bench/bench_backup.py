# SPDX-License-Identifier: MIT
"""What does an increment cost beside QEMU's bare job? ``python bench/bench_backup.py [ROUNDS]``.

A sparse disk of 64 GiB, of which 1,000 clusters of 64 KiB are dirty, anywhere; the machine is a
qemu-storage-daemon. In each round the same clusters are copied twice, in turn first: by a bare
``blockdev-backup`` with a bitmap of its own, from the transaction until the target is closed and
synced; and by ``backup``, from the lock until OLD is removed. Hashing is stated apart. Printed are
medians, and the median of the ratio within a round.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pybitmap.tools.backup import Hooks, backup
from pybitmap.tools.monitor import Monitor, action

SIZE, CLUSTER, DIRTY = 64 << 30, 1 << 16, 1000
MOST = 1.5  # times the bare job


def create(path: Path, *more: str) -> None:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *more, str(path), str(SIZE)]
    subprocess.run(command, check=True)


def dirty(socket: Path, rng: random.Random) -> None:
    """A thousand clusters, by one client."""
    places = [each * CLUSTER for each in rng.sample(range(SIZE // CLUSTER), DIRTY)]
    commands = "".join(f"write -q -P {rng.randrange(1, 256)} {each} 64k\n" for each in places)
    subprocess.run(
        ["qemu-io", "-f", "raw", f"nbd+unix:///disk?socket={socket}"],
        input=commands.encode(),
        stdout=subprocess.DEVNULL,
        check=True,
    )


def bare(monitor: Monitor, folder: Path, number: int) -> float:
    """Seconds of the job alone, its bitmaps rotated by hand."""
    target = folder / f"bare-{number}.qcow2"
    create(target)
    begin = time.perf_counter()
    file = {"driver": "file", "filename": str(target)}
    monitor.execute("blockdev-add", driver="qcow2", node_name="target", file=file)
    how: dict[str, Any] = {"sync": "full"}
    if number:
        how = {"sync": "bitmap", "bitmap": f"bare-{number - 1}", "bitmap-mode": "never"}
    job = {**how, "job-id": "bare", "device": "disk", "target": "target", "auto-dismiss": False}
    added = action("block-dirty-bitmap-add", node="disk", name=f"bare-{number}", persistent=True)
    monitor.transaction([added, action("blockdev-backup", job)])
    monitor.wait(lambda event: event["data"].get("id") == "bare" and _is_end(event), 600)
    monitor.execute("job-dismiss", id="bare")
    monitor.execute("blockdev-del", node_name="target")
    file_number = os.open(target, os.O_RDONLY)
    os.fdatasync(file_number)
    os.close(file_number)
    seconds = time.perf_counter() - begin
    if number:
        monitor.execute("block-dirty-bitmap-remove", node="disk", name=f"bare-{number - 1}")
    target.unlink()
    return seconds


def _is_end(event: dict[str, Any]) -> bool:
    return bool(event["data"].get("status") == "concluded")


def ours(monitor: Monitor, folder: Path) -> tuple[float, float, dict[str, float]]:
    """Seconds of all but hashing, of that, and of each step."""
    steps: dict[str, float] = {}
    last = begin = time.perf_counter()

    def step(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        steps[name], last = now - last, now

    backup(["disk"], folder / "to", qmp=monitor, hooks=Hooks(step=step))
    seconds = time.perf_counter() - begin
    return seconds - steps["hashed"], steps["hashed"], steps


def main(rounds: int) -> int:
    rng = random.Random(1)
    with TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        disk, qmp, nbd = folder / "disk.qcow2", folder / "qmp", folder / "nbd"
        create(disk)
        command = ["qemu-storage-daemon", "--chardev", f"socket,id=c,path={qmp},server=on,wait=on"]
        command += ["--monitor", "chardev=c", "--nbd-server", f"addr.type=unix,addr.path={nbd}"]
        command += ["--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={disk}"]
        command += ["--export", "nbd,id=x,node-name=disk,name=disk,writable=on"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            while not qmp.exists():
                time.sleep(0.01)
            with Monitor(qmp) as monitor:
                results = measured(monitor, folder, nbd, rng, rounds)
        finally:
            process.kill()
            process.wait()
    job = statistics.median(each[0] for each in results)
    whole = statistics.median(each[1] for each in results)
    hashing = statistics.median(each[2] for each in results)
    ratio = statistics.median(each[1] / each[0] for each in results)
    print(f"{DIRTY} dirty clusters of {SIZE >> 30} GiB, {rounds} rounds")
    print(f"  bare job          {job * 1e3:7.0f} ms")
    print(f"  backup            {whole * 1e3:7.0f} ms, {ratio:.2f} x the job (at most {MOST})")
    print(f"  hashing           {hashing * 1e3:7.0f} ms")
    for step in results[0][3]:
        print(f"    {step:15} {statistics.median(each[3][step] for each in results) * 1e3:7.1f} ms")
    return 0 if ratio <= MOST else 1


def measured(
    monitor: Monitor, folder: Path, nbd: Path, rng: random.Random, rounds: int
) -> list[tuple[float, float, float, dict[str, float]]]:
    bare(monitor, folder, 0)
    ours(monitor, folder)
    results = []
    for number in range(1, rounds + 1):
        dirty(nbd, rng)
        os.sync()
        if number % 2:
            job = bare(monitor, folder, number)
            os.sync()
            whole, hashing, steps = ours(monitor, folder)
        else:
            whole, hashing, steps = ours(monitor, folder)
            os.sync()
            job = bare(monitor, folder, number)
        results.append((job, whole, hashing, steps))
    return results


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 9))
