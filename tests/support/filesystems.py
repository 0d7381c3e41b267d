# SPDX-License-Identifier: MIT
"""File systems of several kinds, each in a file of its own, mounted for a test; block devices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from peers import lacking, peer

#: What makes them; XFS takes no less than 300 MB.
MAKERS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
PACKAGES = {"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}
NBYTES = 320 << 20

KINDS = ["plain", "tmpfs", "overlay", *MAKERS]


@contextmanager
def filesystem(kind: str, folder: Path) -> Iterator[Path]:
    """A folder on a file system of that kind; "plain": the one that is there."""
    if kind == "plain":
        yield folder
        return
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root of a Linux machine can mount")
    with ExitStack() as stack:
        if kind == "tmpfs":
            yield stack.enter_context(mounted(folder / "m", "-t", "tmpfs", "tmpfs"))
        elif kind == "overlay":
            # Over a tmpfs: what is below may be an overlay itself.
            base = stack.enter_context(mounted(folder / "base", "-t", "tmpfs", "tmpfs"))
            for name in ("lower", "upper", "work"):
                (base / name).mkdir()
            layers = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
            yield stack.enter_context(
                mounted(folder / "m", "-t", "overlay", "-o", layers, "overlay")
            )
        else:
            image = folder / "image"
            image.touch()
            os.truncate(image, NBYTES)
            make_filesystem(kind, image)
            yield stack.enter_context(mounted(folder / "m", "-o", "loop", str(image)))


def make_filesystem(kind: str, image: Path, *more: str) -> None:
    program, *options = MAKERS[kind]
    subprocess.run([peer(program, PACKAGES[kind]), *options, *more, str(image)], check=True)


@contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    """A block device that a file is."""
    if sys.platform != "linux" or os.geteuid() != 0:
        lacking("block devices: only root of a Linux machine can make one of a file")
    losetup = peer("losetup", "mount")
    done = subprocess.run([losetup, "--find", "--show", path], capture_output=True, text=True)
    if done.returncode:
        lacking(f"block devices: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run([losetup, "-d", device], check=True)


@contextmanager
def mounted(point: Path, *arguments: str) -> Iterator[Path]:
    point.mkdir()
    done = subprocess.run(
        ["mount", *arguments, str(point)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot be mounted here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)
