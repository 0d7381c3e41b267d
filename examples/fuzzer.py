# SPDX-License-Identifier: MIT
"""A fuzzer that puts a machine of Unicorn's back after each input, by copying what was written.

The target keeps a counter, which is wrong if anything of one input is left for the next; it
fills memory with a byte of the input, and crashes on one input of four thousand millions. The
fuzzer keeps inputs that reach new code and changes them a little. Run it: it needs
``pip install '.[unicorn]'``, and prints the input that crashes.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import time

try:
    from unicorn import UC_ARCH_X86, UC_HOOK_BLOCK, UC_MODE_64, UC_PROT_ALL, Uc, UcError
    from unicorn.x86_const import UC_X86_REG_R8, UC_X86_REG_RDI, UC_X86_REG_RSI
except ImportError:
    raise SystemExit("Unicorn is not installed: pip install '.[unicorn]'") from None

from pybitmap.trackers import Snapshot, UnicornTracker

CODE, RAM, INPUT = 0x10000, 0x10000000, 0x10100000
RAM_BYTES = 16 << 20

# rdi: the input, rsi: its length, r8: the target's memory
TARGET = bytes.fromhex(
    "41ff00"  # inc dword [r8]          counts its calls
    "41833801 753c"  # cmp dword [r8], 1; jne leaked
    "4889f1 4989f9"  # mov rcx, rsi; mov r9, rdi
    "498db800100000"  # lea rdi, [r8 + 0x1000]
    "418a01 f3aa"  # mov al, [r9]; rep stosb
    "4883fe04 7225"  # cmp rsi, 4; jb done
    "41803946 751f"  # cmp byte [r9], 'F'; jne done
    "4180790155 7518"  # cmp byte [r9 + 1], 'U'; jne done
    "418079025a 7511"  # cmp byte [r9 + 2], 'Z'; jne done
    "418079035a 750a"  # cmp byte [r9 + 3], 'Z'; jne done
    "a20000000000000000"  # mov [0], al             the bug
    "f4"  # leaked: hlt
    "90"  # done: nop
)
LEAKED, DONE = CODE + len(TARGET) - 2, CODE + len(TARGET) - 1


class Machine:
    """The target, as it is before each input."""

    def __init__(self) -> None:
        uc = self.uc = Uc(UC_ARCH_X86, UC_MODE_64)
        uc.mem_map(CODE, 0x1000)
        uc.mem_write(CODE, TARGET)
        self.ram = mmap.mmap(-1, RAM_BYTES)
        at = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        uc.mem_map_ptr(RAM, RAM_BYTES, UC_PROT_ALL, at)
        uc.reg_write(UC_X86_REG_R8, RAM)

        # Before all hooks of memory, if there are any.
        self.tracker = UnicornTracker(uc, RAM, RAM + RAM_BYTES)

        self.blocks: set[int] = set()
        uc.hook_add(UC_HOOK_BLOCK, lambda uc, address, nbytes, data: self.blocks.add(address))
        self.snapshot = Snapshot(self.ram)
        self.context = uc.context_save()

    def reset(self) -> None:
        """What was written is copied back, page by page, and the registers."""
        with self.tracker.taking() as written:
            self.snapshot.restore(written)
            written.done()
        self.uc.context_restore(self.context)
        self.blocks.clear()

    def run(self, data: bytes) -> bool:
        """Does it crash?"""
        self.uc.mem_write(INPUT, data)
        self.uc.reg_write(UC_X86_REG_RDI, INPUT)
        self.uc.reg_write(UC_X86_REG_RSI, len(data))
        try:
            self.uc.emu_start(CODE, DONE)
        except UcError:
            return True
        assert LEAKED not in self.blocks, "something of the last input was left"
        return False


def changed(data: bytes, rng: random.Random) -> bytes:
    """Another byte somewhere, or one more."""
    if rng.random() < 0.1 and len(data) < 64:
        return data + bytes([rng.randrange(256)])
    at = rng.randrange(len(data))
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def fuzz(machine: Machine, seed: bytes, most: int, rng: random.Random) -> tuple[bytes | None, int]:
    """The input that crashes, if it was found, and how many were tried."""
    corpus, seen = [seed], set[int]()
    for tries in range(1, most + 1):
        data = changed(rng.choice(corpus[-4:]), rng)
        crashed = machine.run(data)
        if crashed:
            return data, tries
        if not machine.blocks <= seen:
            seen |= machine.blocks
            corpus.append(data)
        machine.reset()
    return None, most


def main() -> None:
    machine = Machine()
    with machine.tracker, machine.snapshot:
        begin = time.perf_counter()
        found, tries = fuzz(machine, b"hello", 200_000, random.Random(1))
        spent = time.perf_counter() - begin
    print(f"{tries} inputs, {tries / spent:.0f} a second")
    print("no crash" if found is None else f"crashes: {found[:4].decode()}")


if __name__ == "__main__":
    main()
