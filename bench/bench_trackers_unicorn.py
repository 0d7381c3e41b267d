# SPDX-License-Identifier: MIT
"""What it costs to track a guest of Unicorn's, and to put it back: beside Unicorn's own ways."""

from __future__ import annotations

import ctypes
import mmap
from importlib import import_module
from typing import Any, Callable

from measure import Goal, Shape, Work, benchmark, peer

from pybitmap import BlockGraph, HBitmap, UnsupportedError
from pybitmap.trackers import MemoryTracker, Snapshot, UnicornTracker

unicorn: Any = peer("unicorn")

CODE, RAM = 0x10000, 0x10000000
RAM_BYTES = 16 << 20
PAGES = RAM_BYTES >> 12
WRITES = 20_000
HOOK_WRITE = 1 << 11


class Machine:
    """Stores rcx times, each `stride` bytes on, below `mask`."""

    def __init__(self, stride: int, mask: int, buffer: mmap.mmap | None = None) -> None:
        from unicorn import x86_const

        self.const = x86_const
        uc = self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self.code = b"".join(
            [
                bytes.fromhex("48890437"),  # mov [rdi + rsi], rax
                bytes.fromhex("4881c6") + stride.to_bytes(4, "little"),  # add rsi, stride
                bytes.fromhex("4881e6") + mask.to_bytes(4, "little"),  # and rsi, mask
                bytes.fromhex("ffc975ea"),  # dec ecx; jnz
            ]
        )
        uc.mem_map(CODE, 0x1000)
        uc.mem_write(CODE, self.code)
        if buffer is None:
            uc.mem_map(RAM, RAM_BYTES)
        else:
            at = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
            uc.mem_map_ptr(RAM, RAM_BYTES, unicorn.UC_PROT_ALL, at)

    def run(self, writes: int) -> None:
        write = self.uc.reg_write
        write(self.const.UC_X86_REG_RDI, RAM)
        write(self.const.UC_X86_REG_RSI, 0)
        write(self.const.UC_X86_REG_RCX, writes)
        self.uc.emu_start(CODE, CODE + len(self.code))


def native_hook(uc: Any) -> None:
    """A function in C that does next to nothing."""
    binding = import_module("unicorn.unicorn_py3.unicorn")
    nothing = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p)
    code = binding.uclib.uc_hook_add(
        uc._uch,
        ctypes.byref(binding.uc_hook_h()),
        HOOK_WRITE,
        nothing,
        None,
        ctypes.c_uint64(1),
        ctypes.c_uint64(0),
    )
    assert code == 0


def memory_tracker(buffer: mmap.mmap) -> MemoryTracker | None:
    """Where the kernel has what it needs."""
    try:
        return MemoryTracker(buffer)
    except UnsupportedError:
        return None


def writes(stride: int, mask: int) -> Work:
    ways: dict[str, Callable[..., object]] = {}

    def way(name: str, collect: Callable[[], object] | None = None, **more: Any) -> Any:
        machine = Machine(stride, mask, **more)

        def run() -> None:
            machine.run(WRITES)
            if collect is not None:
                collect()

        ways[name] = run
        return machine.uc

    def tracked(uc: Any, target: Any = None) -> UnicornTracker:
        return UnicornTracker(uc, RAM, RAM + RAM_BYTES, target)

    way("no tracking")
    native_hook(way("an empty hook in C"))
    kept: list[object] = [tracked(way("UnicornTracker"))]
    node = BlockGraph().add_node("ram", RAM_BYTES)
    node.add_bitmap("daily", granularity=4096)
    kept.append(tracked(way("UnicornTracker of a node"), node))
    hb = HBitmap(RAM_BYTES, 12)
    way("a hook in Python, hb.set").hook_add(
        HOOK_WRITE,
        lambda uc, access, address, nbytes, value, data: hb.set(address - RAM, nbytes),
    )
    buffer = mmap.mmap(-1, RAM_BYTES)
    by_pages = memory_tracker(buffer)
    if by_pages is not None:
        way("MemoryTracker, with a collect", by_pages.collect, buffer=buffer)
        kept.append(by_pages)
    goals = [Goal("UnicornTracker", "an empty hook in C", 1.25)]
    # What the trackers are referred to by lives as long as the ways do.
    ways["no tracking"].__dict__["kept"] = kept
    return Work("write", WRITES, ways, goals)


RESETS = 20
WRITTEN = 16  # pages


def resets(shape: Shape) -> Work:
    """What does an input cost that writes to 16 pages of 16 MiB, with the reset after it?"""
    const = unicorn.unicorn_const
    stride, mask = RAM_BYTES // WRITTEN, RAM_BYTES - 1

    def again(machine: Machine, reset: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(RESETS):
                machine.run(WRITTEN)
                reset()

        return run

    ram = mmap.mmap(-1, RAM_BYTES)
    restored = Snapshot(ram)
    pages = Machine(stride, mask, ram)
    tracker = UnicornTracker(pages.uc, RAM, RAM + RAM_BYTES)
    context = pages.uc.context_save()

    def by_pages() -> None:
        with tracker.taking() as written:
            restored.restore(written)
            written.done()
        pages.uc.context_restore(context)

    snapshots = Machine(stride, mask)
    snapshots.uc.ctl(
        const.UC_CTL_CONTEXT_MODE,
        const.UC_CTL_IO_WRITE,
        const.UC_CTL_CONTEXT_CPU | const.UC_CTL_CONTEXT_MEMORY,
    )
    snapshot = snapshots.uc.context_save()

    whole_ram = mmap.mmap(-1, RAM_BYTES)
    whole = Machine(stride, mask, whole_ram)
    whole_context = whole.uc.context_save()

    def by_all() -> None:
        whole_ram[:] = restored.data
        whole.uc.context_restore(whole_context)

    kernel_ram = mmap.mmap(-1, RAM_BYTES)
    kernel_tracker = memory_tracker(kernel_ram)
    kernel_snapshot = Snapshot(kernel_ram)
    kernels = Machine(stride, mask, kernel_ram)
    kernel_context = kernels.uc.context_save()

    def by_kernel() -> None:
        assert kernel_tracker is not None
        kernel_snapshot.rewind(kernel_tracker)
        kernels.uc.context_restore(kernel_context)

    ways: dict[str, Callable[..., object]] = {
        "UnicornTracker, dirty pages": again(pages, by_pages),
        "Unicorn's memory snapshot": again(
            snapshots, lambda: snapshots.uc.context_restore(snapshot)
        ),
        "all of it": again(whole, by_all),
    }
    if kernel_tracker is not None:
        ways["MemoryTracker, Snapshot.rewind"] = again(kernels, by_kernel)
    return Work("input", RESETS, ways)


if unicorn is not None:

    @benchmark("guest write to a page", PAGES)
    def writes_to_one_page(shape: Shape) -> Work:
        """What does a store of a guest cost, if all go to one page?"""
        work = writes(64, 0xFC0)
        work.goals.append(Goal("UnicornTracker", "a hook in Python, hb.set", 1 / 8))
        return work

    @benchmark("guest writes to many pages", PAGES)
    def writes_to_many_pages(shape: Shape) -> Work:
        """And if each goes to another one of 256 pages?"""
        return writes(4096 + 64, 0xFFFC0)

    benchmark("guest reset", PAGES)(resets)
