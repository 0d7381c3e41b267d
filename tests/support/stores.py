# SPDX-License-Identifier: MIT
"""Every store there is, for tests that hold for all of them.

A :class:`Place` is where bitmaps can be stored: several media, each with room for one node (or for
more, see `shared`), and a way to open a store over one as a program that starts anew would.
"""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path

from memory_store import Medium, MemoryStore
from peers import peer

from pybitmap.store import LocalStore, Qcow2Store, Store

#: Of every node, in bytes: the last group is cut at any granularity.
SIZE = (1 << 20) + 512


class Place(ABC):
    #: May a store have several nodes?
    shared: bool
    #: May a node have another size?
    resizes = True
    #: After a kill, is what was marked there, or is the bitmap inconsistent?
    exact_after_kill: bool
    #: Are bitmaps as old as before when they are loaded again? (QEMU writes the newest first.)
    keeps_order = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Of every node, in bytes.
        self.size = SIZE

    @abstractmethod
    def store(self, medium: int = 0) -> Store:
        """A new one over a medium, which may have been used before."""


class MemoryPlace(Place):
    shared = True
    exact_after_kill = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.media: dict[int, Medium] = {}

    def store(self, medium: int = 0) -> MemoryStore:
        return MemoryStore(self.media.setdefault(medium, Medium()))


class LocalPlace(Place):
    shared = True
    exact_after_kill = True

    def store(self, medium: int = 0) -> LocalStore:
        return LocalStore(self.folder / f"store{medium}")


class Qcow2Place(Place):
    shared = False
    resizes = False
    exact_after_kill = False
    keeps_order = False

    def store(self, medium: int = 0) -> Qcow2Store:
        image = self.folder / f"image{medium}.qcow2"
        if not image.exists():
            program = peer("qemu-img", "qemu-utils")
            command = [program, "create", "-q", "-f", "qcow2", str(image), str(self.size)]
            # What is loaded before Python, a sanitizer, is not for QEMU, which hangs with it.
            env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            subprocess.run(command, check=True, env=env)
        return Qcow2Store(image)


PLACES: list[type[Place]] = [MemoryPlace, LocalPlace, Qcow2Place]
