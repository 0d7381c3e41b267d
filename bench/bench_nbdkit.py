# SPDX-License-Identifier: MIT
"""What does it cost to mark what is written over NBD? ``python bench/bench_nbdkit.py [ROUNDS]``.

fio writes and reads through nbdkit with three plugins in turn, round by round, so what slows the
machine down slows all of them: nbdkit's own ``file`` plugin (in C), a bare one in Python, and ours.
Printed are medians of what fio got in a second, of the processor's time that the server took for a
request (which other programs change little), and of its ratio within a round. The file is in the
page cache, so no disk is waited for.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pybitmap.integrations.nbdkit import python_paths

PLUGIN = Path(__file__).parent.parent / "pybitmap" / "integrations" / "nbdkit_plugin.py"
SIZE = 256 << 20

BARE = """
import os
API_VERSION = 2
def config(key, value):
    global fd
    fd = os.open(value, os.O_RDWR)
def thread_model():
    import nbdkit
    return nbdkit.THREAD_MODEL_PARALLEL
def open(readonly):
    return fd
def get_size(fd):
    return os.fstat(fd).st_size
def pread(fd, buf, offset, flags):
    os.preadv(fd, [buf], offset)
def pwrite(fd, buf, offset, flags):
    os.pwrite(fd, buf, offset)
"""

#: What fio is asked for: kind, block, requests at once, requests.
JOBS = {
    "random writes of 4 KiB, 16 at once": ("randwrite", "4k", 16, 20_000),
    "random writes of 4 KiB, one at a time": ("randwrite", "4k", 1, 10_000),
    "writes of 1 MiB, 4 at once": ("write", "1m", 4, 1000),
    "random reads of 4 KiB, 16 at once": ("randread", "4k", 16, 20_000),
}


class Result(NamedTuple):
    rate: float
    microseconds: float


def measured(server: list[str], folder: Path, job: tuple[str, str, int, int]) -> Result:
    kind, block, depth, requests = job
    sock = folder / "nbd.sock"
    sock.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(python_paths())}
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(sock), *server], env=environment)
    try:
        uri = f"nbd+unix:///?socket={sock}"
        while not sock.exists():
            time.sleep(0.01)
        subprocess.run(["nbdinfo", "--size", uri], stdout=subprocess.DEVNULL, check=True)
        before = _seconds(process.pid)
        command = ["fio", "--name=j", "--ioengine=nbd", f"--uri={uri}", f"--size={SIZE}"]
        command += [f"--rw={kind}", f"--bs={block}", f"--iodepth={depth}", "--norandommap"]
        command += [f"--number_ios={requests}", "--io_size=100g", "--output-format=json"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        after = _seconds(process.pid)
        found = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        side = found["read" if "read" in kind else "write"]
        assert side["total_ios"] == requests, side["total_ios"]
        return Result(side["iops"], (after - before) / requests * 1e6)
    finally:
        process.terminate()
        process.wait()


def _seconds(pid: int) -> float:
    """Of the processor, for a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(rounds: int) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "disk.raw").write_bytes(os.urandom(1 << 20) * (SIZE >> 20))
        (folder / "bare.py").write_text(BARE)
        disk = str(folder / "disk.raw")
        store = ["store=" + str(folder / "store"), "bitmap=daily"]
        servers = {
            "file": ["file", disk],
            "bare": ["python", str(folder / "bare.py"), "disk=" + disk],
            "ours": ["python", str(PLUGIN), "disk=" + disk, *store],
        }
        for title, job in JOBS.items():
            results = [
                {name: measured(server, folder, job) for name, server in servers.items()}
                for _ in range(rounds)
            ]
            print(title)
            for name in servers:
                rate = statistics.median(each[name].rate for each in results)
                time_of = [each[name].microseconds for each in results]
                ratio = statistics.median(
                    each[name].microseconds / each["bare"].microseconds for each in results
                )
                print(
                    f"  {name:5} {rate:7.0f} a second, {statistics.median(time_of):6.1f} us of the "
                    f"processor each, {ratio:5.2f} x bare"
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
