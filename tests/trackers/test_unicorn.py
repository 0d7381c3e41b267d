# SPDX-License-Identifier: MIT
"""What a machine of Unicorn's writes is marked, byte for byte; and what is not is known."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from guests import (
    ARM,
    ARM64,
    AT,
    CODE,
    DATA,
    GUESTS,
    LOW,
    M68K,
    RISCV32,
    RISCV64,
    SIZE,
    VALUE,
    X86_16,
    X86_32,
    X86_64,
    Guest,
    riscv_store,
    words,
)
from hypothesis import given
from hypothesis import strategies as st
from lines import at_every_line
from peers import package
from support import collect, run_python

from pybitmap import (
    BlockGraph,
    BlockNode,
    ClosedError,
    HBitmap,
    InvalidError,
    RangeError,
    ReadonlyError,
    StateError,
    UnsupportedError,
)
from pybitmap.trackers import UnicornTracker

HOOK_CODE, HOOK_WRITE, HOOK_INTR = 1 << 2, 1 << 11, 1 << 0

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fuzzer.py"

#: mov [rdi], rax
STORE = bytes.fromhex("488907")


@pytest.fixture(autouse=True)
def unicorn() -> Any:
    return package("unicorn")


def tracked(uc: Any, granularity: int | None = 0, **more: Any) -> UnicornTracker:
    return UnicornTracker(uc, DATA, DATA + SIZE, granularity=granularity, **more)


def pages(hb: HBitmap) -> list[int]:
    return sorted({start >> 12 for start in hb})


# ---- instructions ---------------------------------------------------------------------------


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)
def test_each_byte_that_an_instruction_changes_is_marked_and_no_other(guest: Guest) -> None:
    for name, code in guest.programs.items():
        uc = guest.machine(code)
        before = uc.mem_read(DATA, SIZE)
        with tracked(uc) as tracker:
            told: set[int] = set()

            def hook(
                uc: Any, access: int, address: int, nbytes: int, value: int, told: set[int]
            ) -> None:
                told.update(range(address - DATA, address - DATA + nbytes))

            uc.hook_add(HOOK_WRITE, hook, told)
            guest.run(uc, code)
            marked = set(tracker.collect())
            after = uc.mem_read(DATA, SIZE)
            changed = {i for i in range(SIZE) if before[i] != after[i]}
            assert changed, name
            assert changed <= marked, name
            assert marked == told, name


def x86_stores(stores: list[tuple[int, int]]) -> bytes:
    """mov [rdi + offset], al, ax, eax, rax; movups [rdi + offset], xmm0."""
    codes = [b"\x88\x87", b"\x66\x89\x87", b"\x89\x87", b"\x48\x89\x87", b"\x0f\x11\x87"]
    base = X86_64.registers["RDI"] - DATA
    return b"".join(codes[log] + struct.pack("<i", at - base) for at, log in stores)


def arm64_stores(stores: list[tuple[int, int]]) -> bytes:
    """x0 = address; strb, strh, str w, str x, str q."""
    codes = [0x39000001, 0x79000001, 0xB9000001, 0xF9000001, 0x3D800000]
    parts = []
    for at, log in stores:
        low, high = (DATA + at) & 0xFFFF, (DATA + at) >> 16
        parts.append(words(0xD2800000 | low << 5, 0xF2A00000 | high << 5, codes[log]))
    return b"".join(parts)


def riscv_stores(stores: list[tuple[int, int]]) -> bytes:
    """x10 = address; sb, sh, sw, sd."""
    parts = []
    for at, log in stores:
        upper = (DATA + at + 0x800) >> 12
        low = (DATA + at - (upper << 12)) & 0xFFF
        parts.append(words(0x537 | upper << 12, 0x50513 | low << 20, riscv_store(min(log, 3), 0)))
    return b"".join(parts)


STORES = st.lists(st.tuples(st.integers(64, SIZE - 80), st.integers(0, 4)), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("guest", "assemble"),
    [(X86_64, x86_stores), (ARM64, arm64_stores), (RISCV64, riscv_stores)],
    ids=["x86-64", "arm64", "riscv64"],
)
@given(
    stores=STORES,
    begin=st.integers(0, SIZE // 2),
    size=st.integers(1, SIZE // 2),
    granularity=st.integers(0, 13),
    at=st.integers(0, 5000),
    collect_at=st.integers(0, 12),
)
def test_any_stores_mark_what_they_touch_of_what_is_tracked(
    guest: Guest,
    assemble: Callable[[list[tuple[int, int]]], bytes],
    stores: list[tuple[int, int]],
    begin: int,
    size: int,
    granularity: int,
    at: int,
    collect_at: int,
) -> None:
    largest = 3 if guest is RISCV64 else 4
    code = assemble(stores)
    uc = guest.machine(code)
    own, hb = HBitmap(size, granularity), HBitmap(at + size + 5, granularity)
    expected, part = HBitmap(size, granularity), HBitmap(at + size + 5, granularity)
    for offset, log in stores:
        first = max(offset, begin) - begin
        last = min(offset + (1 << min(log, largest)), begin + size) - begin
        if first < last:
            expected.set(first, last - first)
            part.set(at + first, last - first)
    with (
        UnicornTracker(uc, DATA + begin, DATA + begin + size, granularity=granularity) as tracker,
        UnicornTracker(uc, DATA + begin, DATA + begin + size, hb, at=at),
    ):
        if len(stores) > collect_at:
            per_store = len(code) // len(stores) if guest is not X86_64 else None
            stop = sum(len(assemble([each])) for each in stores[:collect_at])
            assert per_store is None or stop == per_store * collect_at
            if collect_at:
                uc.emu_start(CODE, CODE + stop)
            tracker.collect(own)
            uc.emu_start(CODE + stop, CODE + len(code))
        else:
            guest.run(uc, code)
        assert tracker.collect(own) == expected
        assert not tracker.collect()
    assert hb == part


@pytest.mark.parametrize("guest", [X86_64, ARM64], ids=lambda guest: guest.name)
def test_code_that_ran_before_is_tracked_too(guest: Guest) -> None:
    name = "mov" if guest is X86_64 else "dc_zva"
    code = guest.programs[name]
    uc = guest.machine(code)
    for _ in range(3):
        guest.run(uc, code)
    with tracked(uc, 12) as tracker:
        guest.run(uc, code)
        assert pages(tracker.collect()) == [1]


def test_zeroing_a_block_is_told_in_a_page_of_which_only_a_part_is_tracked() -> None:
    """A store to the other part must not make plain memory of the page."""
    code = words(0xF9000001) + ARM64.programs["dc_zva"]  # str x1, [x0]; dc zva, x0
    uc = ARM64.machine(code)
    with UnicornTracker(uc, AT + 0x800, AT + 0x1000, granularity=0) as tracker:
        ARM64.run(uc, code)
        uc.reg_write(ARM64.register("X0"), AT + 0x840)
        uc.emu_start(CODE + 4, CODE + 8)
        assert list(tracker.collect().areas()) == [(0x40, 64)]


def test_a_store_over_the_end_of_the_addresses_goes_on_at_0() -> None:
    code = bytes.fromhex("8907")  # mov [edi], eax
    uc = X86_32.machine(code)
    uc.mem_map(0xFFFFF000, 0x1000)
    uc.mem_map(0, 0x1000)
    uc.reg_write(X86_32.register("EDI"), 0xFFFFFFFE)
    with (
        UnicornTracker(uc, 0, 0x1000, granularity=0) as low,
        UnicornTracker(uc, 0xFFFFF000, 1 << 32, granularity=0) as high,
    ):
        X86_32.run(uc, code)
        assert uc.mem_read(0, 2) == struct.pack("<I", LOW)[2:]
        assert list(low.collect().areas()) == [(0, 2)]
        assert list(high.collect().areas()) == [(0xFFE, 2)]


def test_the_highest_addresses_are_tracked() -> None:
    code = STORE
    uc = X86_64.machine(code)
    uc.mem_map(2**52 - 0x1000, 0x1000)  # there are no higher ones of x86
    uc.reg_write(X86_64.register("RDI"), 2**52 - 8)
    with UnicornTracker(uc, 2**52 - 0x1000, 2**64 - 2**63, granularity=22) as tracker:
        X86_64.run(uc, code)
        assert list(tracker.collect().areas()) == [(0, 1 << 22)]
    with UnicornTracker(uc, 2**52 - 0x1000, 2**52, granularity=0) as tracker:
        X86_64.run(uc, code)
        assert list(tracker.collect().areas()) == [(0xFF8, 8)]
        uc.mem_write(2**52 - 4, b"four")
        assert list(tracker.collect().areas()) == [(0xFFC, 4)]


# ---- addresses that are translated ------------------------------------------------------------

#: Of the guest below: the page directory, the page table.
DIRECTORY, TABLE = DATA + 0x2000, DATA + 0x3000


def paging(code: bytes) -> Any:
    """An x86 guest in which two pages of data have changed places."""
    uc = X86_32.machine(code)
    table = [page << 12 | 3 for page in range(1024)]
    first = DATA >> 12
    table[first], table[first + 1] = table[first + 1], table[first]
    uc.mem_write(DIRECTORY, struct.pack("<I", TABLE | 3))
    uc.mem_write(TABLE, struct.pack("<1024I", *table))
    uc.reg_write(X86_32.register("CR3"), DIRECTORY)
    uc.reg_write(X86_32.register("CR0"), 0x80000011)
    return uc


def test_addresses_are_physical() -> None:
    uc = paging(code := X86_32.programs["mov"])
    with tracked(uc, 12) as tracker:
        X86_32.run(uc, code)
        assert uc.mem_read(DATA, 4) == struct.pack("<I", LOW)
        assert pages(tracker.collect()) == [0]


def test_a_store_over_two_pages_that_are_translated_marks_all() -> None:
    code = bytes.fromhex("8987feffffff")  # mov [edi - 2], eax
    uc = paging(code)
    with tracked(uc, 12) as tracker:
        X86_32.run(uc, code)
        assert uc.mem_read(DATA, 2) == struct.pack("<I", LOW)[2:]  # the second half
        assert pages(tracker.collect()) == [0, 1, 2, 3]


def test_the_bits_that_the_processor_sets_in_page_tables_are_not_told() -> None:
    """As the docstring says; should this fail, Unicorn tells more than it did."""
    uc = paging(code := X86_32.programs["mov"])
    before = uc.mem_read(TABLE, 0x1000)
    with tracked(uc, 12) as tracker:
        X86_32.run(uc, code)
        assert uc.mem_read(TABLE, 0x1000) != before
        assert TABLE - DATA not in tracker.collect()


def test_arm_guests_that_translate_are_seen_to() -> None:
    """Sections of 1 MiB, of which two have changed places."""
    code = ARM.programs["str_over_a_page"]  # str r1, [r0, #0xffd]
    uc = ARM.machine(code)
    uc.mem_map(0x100000, 0x300000)
    table = [section << 20 | 0xC02 for section in range(4096)]
    table[1], table[2] = table[2], table[1]
    uc.mem_write(0x300000, struct.pack("<4096I", *table))
    uc.reg_write(ARM.register("R0"), 0x1FF001)
    uc.cpr_write(15, 0, 2, 0, 0, 0, False, 0x300000)  # TTBR0
    uc.cpr_write(15, 0, 3, 0, 0, 0, False, 0xFFFFFFFF)  # DACR
    with UnicornTracker(uc, 0x100000, 0x400000, granularity=20) as tracker:
        ARM.run(uc, code)
        assert list(tracker.collect().areas()) == [(0, 0x200000)]
        uc.cpr_write(15, 0, 1, 0, 0, 0, False, 1)  # SCTLR.M
        ARM.run(uc, code)
        assert list(tracker.collect().areas()) == [(0, 0x300000)]


@pytest.mark.parametrize(
    ("guest", "turn_on"),
    [
        (X86_64, lambda uc: uc.reg_write(X86_64.register("CR0"), 0x80000011)),
        (ARM, lambda uc: uc.cpr_write(15, 0, 1, 0, 0, 0, False, 1)),
        (ARM64, lambda uc: uc.cpr_write(3, 0, 1, 0, 0, 1)),
        (RISCV64, lambda uc: uc.reg_write(RISCV64.register("SATP"), 8 << 60 | 5)),
        (RISCV32, lambda uc: uc.reg_write(RISCV32.register("SATP"), 1 << 31 | 5)),
        (M68K, lambda uc: uc.reg_write(M68K.register("CR_TC"), 0x8000)),
    ],
    ids=lambda each: each.name if isinstance(each, Guest) else "",
)
def test_the_register_that_is_asked_says_whether_a_guest_translates(
    guest: Guest, turn_on: Callable[[Any], None]
) -> None:
    """As C asks it, which is otherwise seen only of guests with page tables."""
    import ctypes

    from pybitmap.trackers.unicorn import _guest

    uc = guest.machine()
    asked = _guest(uc)
    library = package("unicorn.unicorn_py3.unicorn").uclib

    def translates() -> bool:
        query = ctypes.create_string_buffer(bytes(asked.query), 64)
        assert library.uc_reg_read(uc._uch, asked.reg, query) == 0
        value = ctypes.c_uint64.from_buffer(query, asked.value_at).value
        return bool(value & asked.mask)

    assert not translates()
    turn_on(uc)
    assert translates()


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_that_fill_the_tlb_are_seen(when: str) -> None:
    unicorn = package("unicorn")
    code = X86_64.programs["mov_over_a_page"]
    uc = X86_64.machine(code)

    def fill(uc: Any, address: int, access: int, entry: Any, data: Any) -> bool:
        swapped = {1: 2, 2: 1}
        page = address >> 12
        first = DATA >> 12
        entry.paddr = (first + swapped.get(page - first, page - first)) << 12
        entry.perms = unicorn.UC_PROT_ALL
        return True

    def hook() -> None:
        uc.hook_add(unicorn.unicorn_const.UC_HOOK_TLB_FILL, fill)
        uc.ctl_set_tlb_mode(unicorn.unicorn_const.UC_TLB_VIRTUAL)

    if when == "before":
        hook()
    with tracked(uc, 12) as tracker:
        if when == "after":
            hook()
        X86_64.run(uc, code)
        assert uc.mem_read(AT, 5) == struct.pack("<Q", VALUE)[3:]
        assert pages(tracker.collect()) == [0, 1, 2, 3]


# ---- where the hook becomes deaf ----------------------------------------------------------------

#: mov [rdi], rax; nops; then four pages, from rsi on, are stored to: mov [rsi], ebx; add rsi, 4096
STORES_AFTER = bytes.fromhex("488907" + "90" * 48 + 4 * "891e4881c600100000")


PAGES = range(0, SIZE, 0x1000)


def changes_itself(at: int) -> tuple[Any, bytes]:
    """A guest that stores nops to its code at `at`, and to four pages after that."""
    uc = X86_64.machine(STORES_AFTER)
    for name, value in {
        "RDI": CODE + at,
        "RAX": 0x9090909090909090,
        "RSI": DATA,
    }.items():
        uc.reg_write(X86_64.register(name), value)
    return uc, STORES_AFTER


def over_the_edge() -> tuple[Any, bytes]:
    """The same with the code at the begin of a page, and half of the store before it."""
    uc, code = changes_itself(0)
    uc.mem_write(CODE + 0x1000, code)
    uc.reg_write(X86_64.register("RDI"), CODE + 0x1000 - 4)
    uc.reg_write(X86_64.register("RAX"), int.from_bytes(b"1234" + code[:4], "little"))
    return uc, code


@pytest.mark.parametrize("at", [*range(0x1F, 0x29), 0x33 - 8], ids=hex)
def test_a_store_to_the_block_that_runs_hides_none_after_it(at: int) -> None:
    uc, code = changes_itself(at)
    with tracked(uc, 12) as tracker:
        for again in range(3):
            before = uc.mem_read(DATA, SIZE)
            uc.reg_write(X86_64.register("RSI"), DATA)
            uc.reg_write(X86_64.register("RBX"), again + 1)
            X86_64.run(uc, code)
            assert all(uc.mem_read(DATA + page, 4) != before[page : page + 4] for page in PAGES)
            assert pages(tracker.collect()) == [0, 1, 2, 3]
        uc.reg_write(X86_64.register("RSI"), DATA)
        uc.emu_start(CODE + len(code) - 9, CODE + len(code))
        assert pages(tracker.collect()) == [0]  # the next run hears


def test_a_store_to_the_block_that_runs_over_the_edge_of_a_page_hides_none_after_it() -> None:
    uc, code = over_the_edge()
    with tracked(uc, 12) as tracker:
        uc.emu_start(CODE + 0x1000, CODE + 0x1000 + len(code))
        assert all(uc.mem_read(DATA + page, 1) == b"\x05" for page in PAGES)
        assert pages(tracker.collect()) == [0, 1, 2, 3]


@pytest.mark.parametrize("guest", [X86_32, X86_16], ids=lambda guest: guest.name)
def test_the_same_in_guests_with_segments(guest: Guest) -> None:
    # mov [edi], eax; nops; mov [esi], ebx
    code = bytes.fromhex("8907" if guest is X86_32 else "668905") + b"\x90" * 40
    code += bytes.fromhex("891e" if guest is X86_32 else "66891c")
    uc = guest.machine(code)
    for name, value in (
        {"EDI": CODE + 0x11, "EAX": 0x90909090, "ESI": DATA, "EBX": LOW}
        if guest is X86_32
        else {"DS": CODE >> 4, "DI": 0x11, "EAX": 0x90909090, "SI": 0x2000, "EBX": LOW}
    ).items():
        uc.reg_write(guest.register(name), value)
    at = DATA if guest is X86_32 else CODE + 0x2000
    with UnicornTracker(uc, at, at + 0x1000) as tracker:
        guest.run(uc, code)
        assert uc.mem_read(at, 4) == struct.pack("<I", LOW)
        assert pages(tracker.collect()) == [0]


def test_the_same_by_another_address_of_the_code() -> None:
    # mov [edi], eax; nops; mov [esi], ebx
    code = bytes.fromhex("8907") + b"\x90" * 40 + bytes.fromhex("891e")
    uc = paging(code)
    uc.mem_write(TABLE + 4 * 0x80, struct.pack("<I", CODE | 3))
    for name, value in {"EDI": 0x80011, "EAX": 0x90909090, "ESI": DATA, "EBX": LOW}.items():
        uc.reg_write(X86_32.register(name), value)
    with tracked(uc, 12) as tracker:
        X86_32.run(uc, code)
        assert uc.mem_read(CODE + 0x11, 4) == struct.pack("<I", 0x90909090)
        assert uc.mem_read(AT, 4) == struct.pack("<I", LOW)
        assert 1 in pages(tracker.collect())


@pytest.mark.parametrize("target", ["bitmap", "node"])
def test_a_target_of_yours_has_what_was_not_heard_when_the_run_ends(target: str) -> None:
    uc, code = changes_itself(0x21)
    node = BlockGraph().add_node("ram", size=SIZE)
    daily, hb = node.add_bitmap("daily", granularity=4096), HBitmap(SIZE, 12)
    with tracked(uc, None, target=hb if target == "bitmap" else node):
        X86_64.run(uc, code)
        marked = hb if target == "bitmap" else daily
        assert list(marked.areas()) == [(0, SIZE)]


def test_a_collect_amid_a_deaf_run_has_what_was_stored_before_it() -> None:
    uc, code = changes_itself(0x21)
    amid: list[list[int]] = []
    with tracked(uc, 12) as tracker:

        def hook(*_: Any) -> None:
            amid.append(pages(tracker.collect()))

        uc.hook_add(HOOK_CODE, hook, begin=CODE + 51 + 9, end=CODE + 51 + 9)
        X86_64.run(uc, code)
        assert uc.mem_read(DATA, 1) == b"\x05"
        assert amid
        assert all(0 in each for each in amid)
        assert set(pages(tracker.collect())) >= {1, 2, 3}


def test_a_drain_amid_a_deaf_run_has_the_rest_when_it_ends() -> None:
    """As the docstring says."""
    uc, code = changes_itself(0x21)
    hb = HBitmap(SIZE, 12)
    amid: list[list[int]] = []
    with tracked(uc, None, target=hb):

        def hook(*_: Any) -> None:
            amid.append(pages(hb.drain()))

        uc.hook_add(HOOK_CODE, hook, begin=CODE + 51 + 9, end=CODE + 51 + 9)
        X86_64.run(uc, code)
        assert amid == [[]]
        assert pages(hb) == [0, 1, 2, 3]


def test_an_inner_run_that_becomes_deaf_makes_the_outer_one_so() -> None:
    uc, _ = changes_itself(0x21)
    outer = bytes.fromhex("90891e")
    uc.mem_write(CODE + 0x2000, outer)
    inner = False

    def hook(*_: Any) -> None:
        nonlocal inner
        if not inner:
            inner = True
            saved = uc.context_save()
            uc.emu_start(CODE, CODE + 51)
            uc.context_restore(saved)
            tracker.collect()

    with tracked(uc, 12) as tracker:
        uc.hook_add(HOOK_CODE, hook, begin=CODE + 0x2000, end=CODE + 0x2000)
        uc.emu_start(CODE + 0x2000, CODE + 0x2003)
        assert inner
        assert uc.mem_read(DATA, 1) == b"\x05"
        assert 0 in pages(tracker.collect())
        assert not tracker.collect()


def test_a_run_that_is_not_seen_and_becomes_deaf_is_collected() -> None:
    uc, code = changes_itself(0x21)
    run = uc.emu_start
    with tracked(uc, 12) as tracker:
        run(CODE, CODE + len(code))
        assert pages(tracker.collect()) == [0, 1, 2, 3]
        assert not tracker.collect()


def test_unaligned_stores_elsewhere_mark_what_they_touch_only() -> None:
    uc = X86_64.machine(STORES_AFTER[:3])
    uc.mem_write(CODE, STORES_AFTER[:3])
    uc.reg_write(X86_64.register("RDI"), DATA + 0x1001)
    with tracked(uc, 12) as tracker:
        X86_64.run(uc, STORES_AFTER[:3])
        assert pages(tracker.collect()) == [1]


@pytest.mark.parametrize("operation", ["load", "store"])
@pytest.mark.parametrize("when", ["before", "after", "amid the run"])
def test_a_fault_in_the_second_page_of_an_access_hides_no_store_after_it(
    operation: str, when: str
) -> None:
    """A hook of interrupts pages in what is missing, and the guest goes on."""
    # nop; mov eax, [edi] or the other way round; mov [esi], ebx
    code = b"\x90" + bytes.fromhex("8b07" if operation == "load" else "8907") + b"\x89\x1e"
    uc = paging(code)
    uc.mem_map(0x80000, 0x2000)
    entry = TABLE + 4 * 0x81
    uc.mem_write(entry, bytes(4))
    for name, value in {"EDI": 0x80FFE, "ESI": 0x80000}.items():
        uc.reg_write(X86_32.register(name), value)
    faults: list[int] = []

    def page_in(uc: Any, number: int, data: Any) -> None:
        faults.append(number)
        uc.mem_write(entry, struct.pack("<I", 0x81003))

    def hook(*_: Any) -> None:
        uc.hook_add(HOOK_INTR, page_in)

    if when == "before":
        hook()
    with UnicornTracker(uc, 0x80000, 0x81000) as tracker:
        if when == "after":
            hook()
        elif when == "amid the run":
            uc.hook_add(HOOK_CODE, hook, begin=CODE, end=CODE)
        X86_32.run(uc, code)
        assert faults == [14]
        assert uc.mem_read(0x80000, 4) == struct.pack("<I", 5)
        assert pages(tracker.collect()) == [0]


def test_the_same_of_an_arm_guest() -> None:
    code = words(0xE5902000, 0xE5831000)  # ldr r2, [r0]; str r1, [r3]
    uc = ARM.machine(code)
    uc.mem_map(0x100000, 0x300000)
    table = [section << 20 | 0xC02 for section in range(4096)]
    table[2] = 0
    uc.mem_write(0x300000, struct.pack("<4096I", *table))
    uc.reg_write(ARM.register("R0"), 0x1FFFFE)
    uc.reg_write(ARM.register("R3"), 0x100000)
    uc.cpr_write(15, 0, 2, 0, 0, 0, False, 0x300000)  # TTBR0
    uc.cpr_write(15, 0, 3, 0, 0, 0, False, 0xFFFFFFFF)  # DACR
    uc.cpr_write(15, 0, 1, 0, 0, 0, False, 1)  # SCTLR.M
    faults: list[int] = []

    def page_in(uc: Any, number: int, data: Any) -> None:
        faults.append(number)
        uc.mem_write(0x300008, struct.pack("<I", 2 << 20 | 0xC02))

    uc.hook_add(HOOK_INTR, page_in)
    with UnicornTracker(uc, 0x100000, 0x200000) as tracker:
        ARM.run(uc, code)
        assert faults
        assert uc.mem_read(0x100000, 4) != bytes(4)
        assert 0 in pages(tracker.collect())


def test_calls_of_the_system_mark_nothing() -> None:
    code = bytes.fromhex("cd80890f")  # int 0x80; mov [edi], ecx
    uc = X86_32.machine(code)
    with tracked(uc, 12) as tracker:
        uc.hook_add(HOOK_INTR, lambda *_: None)
        X86_32.run(uc, code)
        assert pages(tracker.collect()) == [1]


def test_an_exception_that_no_hook_takes_any_more_ends_the_run() -> None:
    """Ours goes with the last of the others."""
    code = bytes.fromhex("cd80890f")
    uc = X86_32.machine(code)
    error = package("unicorn").UcError
    first = uc.hook_add(HOOK_INTR, lambda *_: None)
    with tracked(uc, 12) as tracker:
        second = uc.hook_add(HOOK_INTR, lambda *_: None)
        uc.hook_del(first)
        X86_32.run(uc, code)
        assert pages(tracker.collect()) == [1]
        uc.hook_del(second)
        with pytest.raises(error):
            X86_32.run(uc, code)
        uc.hook_add(HOOK_INTR, lambda uc, *_: uc.emu_stop())
        X86_32.run(uc, code)
    assert "hook_add" not in uc.__dict__
    X86_32.run(uc, code)


def test_a_hook_that_maps_the_second_page_hides_nothing() -> None:
    const = package("unicorn").unicorn_const
    code = X86_64.programs["mov_over_a_page"] + X86_64.programs["push"]
    uc = X86_64.machine(code)
    uc.mem_unmap(AT + 0x1000, 0x1000)
    uc.reg_write(X86_64.register("RSP"), DATA + 0x1000)

    def page_in(uc: Any, access: int, address: int, *_: Any) -> bool:
        uc.mem_map(address & ~0xFFF, 0x1000)
        return True

    uc.hook_add(const.UC_HOOK_MEM_WRITE_UNMAPPED, page_in)
    with tracked(uc, 12) as tracker:
        X86_64.run(uc, code)
        assert pages(tracker.collect()) == [0, 1, 2]


# ---- what is written in other ways ------------------------------------------------------------


def test_what_the_methods_of_the_machine_write_is_marked() -> None:
    uc = X86_64.machine()
    methods = dict(uc.__dict__)
    with tracked(uc) as tracker:
        uc.mem_write(DATA + 5, b"12345")
        uc.mem_write(address=DATA + SIZE - 1, data=b"1")
        uc.mem_write(DATA - 0x4000 + SIZE, b"")
        assert list(tracker.collect().areas()) == [(5, 5), (SIZE - 1, 1)]
        with pytest.raises(package("unicorn").UcError):
            uc.mem_write(DATA + SIZE - 1, b"beyond the end")
        with pytest.raises(TypeError):
            uc.mem_write(DATA)
        tracker.collect()
        uc.mem_unmap(DATA + 0x1000, 0x1000)
        uc.mem_map(DATA + 0x1000, 0x1000)
        assert list(tracker.collect().areas()) == [(0x1000, 0x1000)]
    assert uc.__dict__ == methods
    uc.mem_write(DATA, b"1")


class Indexed:
    """A number for those who ask for its index."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __index__(self) -> int:
        return self._number


@pytest.mark.parametrize("kind", ["int", "Indexed", "numpy", "ctypes", "numpy signed"])
def test_numbers_of_any_kind_are_understood(kind: str) -> None:
    import ctypes

    number: Any = {"int": int, "Indexed": Indexed, "ctypes": ctypes.c_uint64}.get(kind)
    if number is None:
        numpy = package("numpy")
        number = numpy.uint64 if kind == "numpy" else numpy.int64
    uc = X86_64.machine()
    with tracked(uc) as tracker:
        uc.mem_write(number(DATA + 5), b"12345")
        assert uc.mem_read(DATA + 5, 5) == b"12345"
        assert list(tracker.collect().areas()) == [(5, 5)]
        uc.mem_unmap(DATA + 0x1000, 0x1000)
        uc.mem_map(number(DATA + 0x1000), number(0x1000))
        assert list(tracker.collect().areas()) == [(0x1000, 0x1000)]


def test_of_a_number_that_is_not_understood_all_is_marked() -> None:
    from ctypes import c_uint64

    class Other:
        """One that ctypes takes, and nobody else."""

        _as_parameter_ = c_uint64(DATA + 5)

    uc = X86_64.machine()
    with tracked(uc) as tracker:
        uc.mem_write(Other(), b"12345")
        assert uc.mem_read(DATA + 5, 5) == b"12345"
        assert list(tracker.collect().areas()) == [(0, SIZE)]


def test_where_a_device_is_mapped_is_marked() -> None:
    uc = X86_64.machine()
    uc.mem_unmap(AT, 0x1000)
    with tracked(uc, 12) as tracker:
        uc.mmio_map(AT, 0x1000, None, None, None, None)
        assert pages(tracker.collect()) == [1]


def test_methods_by_way_of_the_class_or_from_before_are_not_seen() -> None:
    """As the docstring says."""
    uc = X86_64.machine()
    write = uc.mem_write
    with tracked(uc) as tracker:
        write(DATA, b"1")
        type(uc).mem_write(uc, DATA, b"1")
        assert not tracker.collect()


def test_a_run_by_a_reference_from_before_is_tracked() -> None:
    uc = X86_64.machine(STORE)
    run = uc.emu_start
    with tracked(uc, 12) as tracker:
        for _ in range(2):
            run(CODE, CODE + len(STORE))
            assert pages(tracker.collect()) == [1]
            assert not tracker.collect()


def test_a_memory_snapshot_that_is_restored_is_not_seen() -> None:
    """As the docstring says."""
    const = package("unicorn").unicorn_const
    uc = X86_64.machine(STORE)
    uc.ctl(
        const.UC_CTL_CONTEXT_MODE,
        const.UC_CTL_IO_WRITE,
        const.UC_CTL_CONTEXT_CPU | const.UC_CTL_CONTEXT_MEMORY,
    )
    with tracked(uc, 12) as tracker:
        context = uc.context_save()
        before = uc.mem_read(DATA, SIZE)
        for _ in range(2):
            X86_64.run(uc, STORE)
            assert uc.mem_read(DATA, SIZE) != before
            assert pages(tracker.collect()) == [1]
            uc.context_restore(context)
            assert uc.mem_read(DATA, SIZE) == before
            assert not tracker.collect()


# ---- several trackers, other hooks ------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_trackers_of_one_machine_go_in_any_order(order: tuple[int, ...]) -> None:
    uc = X86_64.machine(STORE)
    methods = dict(uc.__dict__)
    trackers = [
        tracked(uc, 12),
        UnicornTracker(uc, AT, AT + 0x1000),
        UnicornTracker(uc, AT + 4, AT + 5, granularity=0),
    ]
    for gone in order:
        X86_64.run(uc, STORE)
        uc.mem_write(AT, b"12345678")
        for tracker in trackers:
            if not tracker.closed:
                assert tracker.collect().count() in (1, 0x1000)
        trackers[gone].close()
    assert uc.__dict__ == methods


def test_hooks_of_others_stay_and_go_beside_it() -> None:
    uc = X86_64.machine(STORE)
    calls: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    before = uc.hook_add(HOOK_CODE, hook("before"))
    with tracked(uc, 12) as tracker:
        after = uc.hook_add(HOOK_WRITE, hook("after"))
        X86_64.run(uc, STORE)
        assert calls == ["before", "after"]
        uc.hook_del(before)
        uc.hook_del(after)
        X86_64.run(uc, STORE)
        assert calls == ["before", "after"]
        assert pages(tracker.collect()) == [1]
        uc.hook_add(HOOK_WRITE, hook("again"))
    X86_64.run(uc, STORE)
    assert calls == ["before", "after", "again"]


def test_whoever_wrapped_a_method_before_or_since_keeps_it() -> None:
    uc = X86_64.machine()
    calls: list[str] = []

    def wrap(name: str) -> Callable[..., None]:
        inner = uc.mem_write

        def write(address: int, data: bytes) -> None:
            calls.append(name)
            inner(address, data)

        uc.mem_write = write
        return write

    first = wrap("first")
    tracker = tracked(uc)
    uc.mem_write(DATA, b"1")
    tracker.close()
    assert uc.mem_write is first
    tracker = tracked(uc)
    wrap("second")
    uc.mem_write(DATA, b"1")
    assert list(tracker.collect()) == [0]
    tracker.close()
    uc.mem_write(DATA, b"1")  # ours is still below
    with tracked(uc) as tracker:
        uc.mem_write(DATA + 7, b"1")
        assert list(tracker.collect()) == [7]
    assert calls == ["first"] + 3 * ["second", "first"]


def test_a_hook_behind_it_that_stops_the_machine_hides_nothing() -> None:
    uc = X86_64.machine(STORE)
    with tracked(uc, 12) as one, UnicornTracker(uc, DATA, DATA + SIZE) as two:
        uc.hook_add(HOOK_WRITE, lambda uc, *_: uc.emu_stop())
        X86_64.run(uc, STORE)
        assert pages(one.collect()) == pages(two.collect()) == [1]


def test_memory_hooks_from_before_are_refused_since_they_may_hide_writes() -> None:
    uc = X86_64.machine(STORE)
    told: list[int] = []
    stopping = uc.hook_add(HOOK_WRITE, lambda uc, *_: uc.emu_stop())
    behind = uc.hook_add(HOOK_WRITE, lambda *_: told.append(1))
    before = uc.mem_read(AT, 8)
    X86_64.run(uc, STORE)
    assert uc.mem_read(AT, 8) != before
    assert not told  # which is why
    with pytest.raises(StateError, match=r"memory hooks already.*make the tracker"):
        tracked(uc)
    uc.hook_del(stopping)
    uc.hook_del(behind)
    tracked(uc).close()


# ---- collects beside the guest ----------------------------------------------------------------


def test_a_write_that_was_not_done_when_it_was_collected_is_in_the_next_collect() -> None:
    code = STORE + bytes.fromhex("48898700100000")  # and mov [rdi + 0x1000], rax
    uc = X86_64.machine(code)
    copy = bytearray(uc.mem_read(DATA, SIZE))

    def backup() -> None:
        with tracker.taking() as written:
            written.copy_areas(copy, uc.mem_read(DATA, SIZE))
            written.done()

    with tracked(uc, 12) as tracker:
        uc.hook_add(HOOK_WRITE, lambda *_: backup())
        X86_64.run(uc, code)
        backup()
        assert copy == uc.mem_read(DATA, SIZE)
        assert not tracker.collect()
        uc.emu_start(CODE, CODE + len(STORE))
        backup()
        assert copy == uc.mem_read(DATA, SIZE)


@pytest.mark.parametrize("nested", ["mem_write", "emu_start", "collect only"])
def test_the_same_amid_a_run_in_a_hook(nested: str) -> None:
    """The machine runs again, in a hook of a write that is not done yet."""
    uc = X86_64.machine(STORE + X86_64.programs["push"])
    inner = False

    def hook(*_: Any) -> None:
        nonlocal inner
        if not inner:
            inner = True
            saved = uc.context_save()
            if nested == "emu_start":
                uc.emu_start(CODE + 3, CODE + 4)
            elif nested == "mem_write":
                uc.mem_write(DATA + 0x3000, b"1")
            uc.context_restore(saved)
            tracker.collect()

    with tracked(uc, 12) as tracker:
        uc.hook_add(HOOK_WRITE, hook)
        X86_64.run(uc, STORE)
        assert inner
        assert pages(tracker.collect()) == [1]


def test_a_backup_beside_a_running_guest_misses_nothing() -> None:
    # inc rax; mov [rdi + rcx], rax; rcx = (261 * rcx + 17) % 8192; jmp
    code = bytes.fromhex("48ffc04889040f4869c9050100004883c1114881e1ff1f0000")
    code += b"\xeb" + struct.pack("b", -(len(code) + 2))
    uc = X86_64.machine(code)
    uc.reg_write(X86_64.register("RDI"), DATA)
    copy = bytearray(uc.mem_read(DATA, SIZE))

    def backup() -> int:
        with tracker.taking() as written:
            copied = written.copy_areas(copy, uc.mem_read(DATA, SIZE))
            written.done()
            return copied

    with tracked(uc, 6) as tracker:
        running = threading.Thread(target=X86_64.run, args=(uc, code))
        running.start()
        rounds = 0
        while rounds < 50:
            rounds += backup() > 0
        uc.emu_stop()
        running.join()
        backup()
        assert copy == uc.mem_read(DATA, SIZE)


def test_a_timeout_or_a_stop_by_another_thread_hides_nothing() -> None:
    # the loop: inc rax; mov [rdi], rax; jmp
    code = bytes.fromhex("48ffc0488907ebf8")
    uc = X86_64.machine(code)
    with tracked(uc, 12) as one, UnicornTracker(uc, AT, AT + 8, granularity=0) as two:
        changes = 0
        for _ in range(20):
            before = uc.mem_read(AT, 8)
            X86_64.run(uc, code, timeout=2000)  # microseconds; it may be over at once
            changed = uc.mem_read(AT, 8) != before
            assert pages(one.collect()) == ([1] if changed else [])
            assert len(two.collect()) == (8 if changed else 0)
            changes += changed
        assert changes


# ---- targets ----------------------------------------------------------------------------------


def test_several_regions_mark_one_bitmap_of_yours() -> None:
    uc = X86_64.machine(STORE)
    hb = HBitmap(0x10000, 9)
    with UnicornTracker(uc, CODE, CODE + 0x4000, hb), tracked(uc, None, target=hb, at=0x8000) as t:
        X86_64.run(uc, STORE)
        uc.mem_write(CODE + 0x200, b"code")
        assert list(hb.areas()) == [(0x200, 0x200), (0x9000, 0x200)]
        with pytest.raises(StateError, match="marked in a target of yours: drain the target"):
            t.collect()
        with pytest.raises(BufferError):
            hb.truncate(0)
    hb.truncate(0)


def test_a_target_as_large_as_what_is_tracked_is_collected() -> None:
    uc = X86_64.machine(STORE)
    hb = HBitmap(SIZE, 9)
    with tracked(uc, None, target=hb) as tracker:
        assert tracker.granularity == 9
        X86_64.run(uc, STORE)
        assert list(tracker.collect().areas()) == [(0x1000, 0x200)]
        assert not hb


def test_a_node_is_marked_in_what_records() -> None:
    uc = X86_64.machine(STORE)
    node = BlockGraph().add_node("ram", size=SIZE)
    daily = node.add_bitmap("daily", granularity=512)
    with tracked(uc, None, target=node) as tracker:
        X86_64.run(uc, STORE)
        assert list(daily.areas()) == [(0x1000, 0x200)]
        with daily.freeze() as frozen:
            uc.mem_write(DATA, b"1")
            frozen.done()
        assert list(daily.areas()) == [(0, 0x200)]
        for call in (tracker.collect, tracker.taking):
            with pytest.raises(StateError, match="freeze the bitmaps of the node instead"):
                call()


def test_a_freeze_amid_a_write_leaves_it_to_the_next() -> None:
    uc = X86_64.machine(STORE)
    node = BlockGraph().add_node("ram", size=SIZE)
    daily = node.add_bitmap("daily", granularity=512)

    def freeze(*_: Any) -> None:
        with daily.freeze() as frozen:
            frozen.done()

    with tracked(uc, None, target=node):
        uc.hook_add(HOOK_WRITE, freeze)
        X86_64.run(uc, STORE)
        assert list(daily.areas()) == [(0x1000, 0x200)]


def smaller(node: BlockNode) -> None:
    node.truncate(512)


@pytest.mark.parametrize(
    ("change", "error"), [(smaller, RangeError), (BlockNode.close, ClosedError)]
)
@pytest.mark.parametrize("way", ["emu_start", "check", "mem_write", "close"])
def test_what_cannot_be_marked_is_told_once(
    change: Callable[[BlockNode], None], error: type[Exception], way: str
) -> None:
    uc = X86_64.machine(STORE)
    run = uc.emu_start
    node = BlockGraph().add_node("ram", size=SIZE)
    node.add_bitmap("daily", granularity=512)
    tracker = tracked(uc, None, target=node)
    change(node)
    told = f"writes to guest memory .*, the first of one at {AT:#x}; take all of it for dirty: "
    if way == "emu_start":
        with pytest.raises(error, match=told):
            X86_64.run(uc, STORE)
    elif way == "mem_write":
        with pytest.raises(error, match=told):
            uc.mem_write(AT, b"1")
        assert uc.mem_read(AT, 1) == b"1"
    else:
        run(CODE, CODE + len(STORE))
        with pytest.raises(error, match=told):
            getattr(tracker, way)()
    tracker.check()
    tracker.close()
    tracker.close()


def test_a_guest_that_fails_is_told_with_what_could_not_be_marked() -> None:
    code = STORE + bytes.fromhex("0f0b")  # ud2
    uc = X86_64.machine(code)
    node = BlockGraph().add_node("ram", size=SIZE)
    with tracked(uc, None, target=node):
        node.close()
        with pytest.raises(ClosedError) as raised:
            X86_64.run(uc, code)
        assert isinstance(raised.value.__context__, package("unicorn").UcError)


def test_what_could_not_be_marked_hides_no_interruption() -> None:
    uc = X86_64.machine(STORE + b"\x90")
    node = BlockGraph().add_node("ram", size=SIZE)
    with tracked(uc, None, target=node) as tracker:
        node.close()

        def hook(*_: Any) -> None:
            raise KeyboardInterrupt

        uc.hook_add(HOOK_CODE, hook, begin=CODE + 3, end=CODE + 3)
        with pytest.raises(KeyboardInterrupt):
            X86_64.run(uc, STORE + b"\x90")
        with pytest.raises(ClosedError):
            tracker.check()


def test_a_node_that_is_read_only_is_told(tmp_path: Any) -> None:
    from pybitmap.store import LocalStore

    uc = X86_64.machine(STORE)
    with BlockGraph() as graph:
        node = graph.add_node("ram", size=SIZE, store=LocalStore(tmp_path / "store"))
        node.add_bitmap("daily", persistent=True)
    with BlockGraph() as graph:
        node = graph.add_node("ram", store=LocalStore(tmp_path / "store"), read_only=True)
        with tracked(uc, None, target=node), pytest.raises(ReadonlyError, match="readonly"):
            X86_64.run(uc, STORE)


def test_a_write_waits_while_its_node_is_truncated() -> None:
    code = bytes.fromhex("48ffc84889043f4839c375f4")
    code = bytes.fromhex("48ffc84889074839d875f5")  # dec rax; mov [rdi], rax; cmp; jne
    uc = X86_64.machine(code)
    uc.reg_write(X86_64.register("RAX"), 300_000)
    node = BlockGraph().add_node("ram", size=SIZE)
    daily = node.add_bitmap("daily", granularity=512)
    with tracked(uc, None, target=node):
        running = threading.Thread(target=X86_64.run, args=(uc, code))
        running.start()
        n = 0
        while running.is_alive():
            n += 1
            node.truncate(SIZE + 512 * (n % 2))
        running.join()
        assert daily.status(0x1000)[0]


def test_a_run_amid_a_truncation_of_this_very_thread_is_refused() -> None:
    from pybitmap import _core

    uc = X86_64.machine(STORE)
    node = BlockGraph().add_node("ram", size=SIZE)
    node.add_bitmap("daily", granularity=512)
    with tracked(uc, None, target=node), node._coordinator.held():
        code = _core.hbtracker_publish(node._tracker, _core.NULL)  # as truncate does
        assert code == 0
        try:
            for call in (lambda: X86_64.run(uc, STORE), lambda: uc.mem_write(AT, b"1")):
                with pytest.raises(StateError, match="by this very thread"):
                    call()
        finally:
            device = node._device
            device.listed = None
            node._coordinator._publish_exactly([device])
    assert uc.mem_read(AT, 1) != b"1"


# ---- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begin", "end"), [(5, 5), (6, 5), (-1, 5), (0, 2**64 + 1), (0, 2**63), (0, 2**64)]
)
def test_ranges_that_cannot_be_are_refused(begin: int, end: int) -> None:
    with pytest.raises(InvalidError, match="guest memory"):
        UnicornTracker(X86_64.machine(), begin, end)


def test_wrong_arguments_are_refused_and_leave_nothing() -> None:
    uc = X86_64.machine()
    hb = HBitmap(SIZE)
    node = BlockGraph().add_node("ram", size=SIZE)
    for error, arguments in [
        (TypeError, {"target": set()}),
        (InvalidError, {"at": 1}),
        (InvalidError, {"granularity": 64}),
        (InvalidError, {"target": hb, "granularity": 3}),
        (RangeError, {"target": hb, "at": 1}),
        (RangeError, {"target": hb, "at": -1}),
        (RangeError, {"target": node, "at": 1}),
    ]:
        with pytest.raises(error):
            UnicornTracker(uc, DATA, DATA + SIZE, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"uc must be a unicorn\.Uc, not int"):
        UnicornTracker(5, 0, 1)
    with pytest.raises(TypeError):
        UnicornTracker(uc, "0", 1)  # type: ignore[arg-type]
    node.close()
    with pytest.raises((ClosedError, RangeError)):
        UnicornTracker(uc, DATA, DATA + SIZE, node)
    hb.truncate(5)
    assert "emu_start" not in uc.__dict__


@pytest.mark.parametrize(
    ("arch", "mode", "name"), [("S390X", "BIG_ENDIAN", "s390x"), ("PPC", "PPC32", "PowerPC")]
)
def test_architectures_of_which_unicorn_does_not_tell_all_are_refused(
    arch: str, mode: str, name: str
) -> None:
    unicorn = package("unicorn")
    mode_number = getattr(unicorn, f"UC_MODE_{mode}") | unicorn.UC_MODE_BIG_ENDIAN
    uc = unicorn.Uc(getattr(unicorn, f"UC_ARCH_{arch}"), mode_number)
    with pytest.raises(UnsupportedError, match=f"what {name} guests write by .*MemoryTracker"):
        UnicornTracker(uc, 0, 0x1000)
    assert "emu_start" not in uc.__dict__


def test_which_writes_of_those_are_not_told() -> None:
    """Why they are refused."""
    unicorn = package("unicorn")
    s390x, ppc = package("unicorn.s390x_const"), package("unicorn.ppc_const")
    big = unicorn.UC_MODE_BIG_ENDIAN
    for arch, mode, register, code in [
        (unicorn.UC_ARCH_S390X, big, s390x.UC_S390X_REG_R1, "d20f10011000"),  # mvc
        (unicorn.UC_ARCH_PPC, big | unicorn.UC_MODE_PPC32, ppc.UC_PPC_REG_3, "bf830000"),  # stmw
        (unicorn.UC_ARCH_PPC, big | unicorn.UC_MODE_PPC32, ppc.UC_PPC_REG_3, "7c001fec"),  # dcbz
    ]:
        uc = unicorn.Uc(arch, mode)
        uc.mem_map(CODE, 0x1000)
        uc.mem_map(DATA, 0x1000)
        uc.mem_write(CODE, bytes.fromhex(code))
        uc.mem_write(DATA, b"x" + bytes(range(1, 255)))
        uc.reg_write(register, DATA)
        told: list[int] = []
        uc.hook_add(HOOK_WRITE, lambda *_, told=told: told.append(1))
        before = uc.mem_read(DATA, 256)
        uc.emu_start(CODE, CODE + len(code) // 2)
        assert uc.mem_read(DATA, 256) != before
        assert not told


def test_versions_that_were_not_tested_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unicorn = package("unicorn")
    uc = X86_64.machine()
    with monkeypatch.context() as patch:
        patch.setattr(unicorn, "uc_version", lambda: (2, 2, 0))
        with pytest.raises(UnsupportedError, match=r"tested with 2\.1"):
            tracked(uc)
    with monkeypatch.context() as patch:
        patch.delattr(unicorn.unicorn_py3.unicorn, "HOOK_TLB_FILL_CFUNC")
        with pytest.raises(UnsupportedError, match=r"another binding than the 2\.1"):
            tracked(uc)
    tracked(uc).close()


def test_without_unicorn_the_module_is_there_and_the_tracker_says_what_to_do() -> None:
    code = """
import sys
sys.modules["unicorn"] = None
from pybitmap import UnsupportedError
from pybitmap.trackers import UnicornTracker
try:
    UnicornTracker(object(), 0, 1)
except UnsupportedError as error:
    print(error)
"""
    assert "pip install 'unicorn>=2.1,<2.2'" in run_python(code)


# ---- hooks that come back -----------------------------------------------------------------------


def test_a_hook_may_close_trackers_and_make_others() -> None:
    code = STORE * 3
    uc = X86_64.machine(code)
    first = tracked(uc, 12)
    made: list[UnicornTracker] = []

    def hook(*_: Any) -> None:
        if not made:
            made.append(tracked(uc, 12))
            first.close()

    uc.hook_add(HOOK_CODE, hook)
    X86_64.run(uc, code)
    assert pages(made[0].collect()) == [1]
    made[0].close()
    assert "emu_start" not in uc.__dict__


def test_the_last_tracker_may_be_closed_by_a_hook_and_the_next_made_after_the_run() -> None:
    uc = X86_64.machine(STORE * 2)
    tracker = tracked(uc, 12)
    refused: list[str] = []

    def hook(*_: Any) -> None:
        tracker.close()
        try:
            tracked(uc)
        except StateError as error:
            refused.append(str(error))

    handle = uc.hook_add(HOOK_WRITE, hook)
    X86_64.run(uc, STORE * 2)
    assert len(refused) == 2
    assert "the machine is running" in refused[0]
    assert "emu_start" not in uc.__dict__
    uc.hook_del(handle)
    with tracked(uc, 12) as following:
        X86_64.run(uc, STORE * 2)
        assert pages(following.collect()) == [1]


def test_the_first_tracker_is_not_made_while_the_machine_runs() -> None:
    uc = X86_64.machine(STORE)

    def hook(*_: Any) -> None:
        tracked(uc)

    uc.hook_add(HOOK_CODE, hook)
    with pytest.raises(StateError, match="the machine is running"):
        X86_64.run(uc, STORE)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.filterwarnings("ignore:a tracker of guest memory:ResourceWarning")
def test_a_tracker_goes_in_another_thread_while_the_machine_runs(dropped: bool) -> None:
    code = STORE + b"\x90" * 4 + b"\xeb\xf7"  # a loop
    uc = X86_64.machine(code)
    methods = dict(uc.__dict__)
    node = BlockGraph().add_node("ram", size=SIZE)
    hb = HBitmap(SIZE)
    for _ in range(3 if dropped else 20):
        trackers = [tracked(uc, None, target=hb), tracked(uc, None, target=node), tracked(uc)]
        running = threading.Thread(target=X86_64.run, args=(uc, code))
        running.start()
        while not hb:
            pass
        if dropped:
            del trackers
            collect()
        else:
            for tracker in trackers:
                tracker.close()
        hb.truncate(SIZE + 1)  # no pin
        hb.truncate(SIZE)
        hb.clear()
        assert not hb  # nothing is marked any more
        assert "emu_start" in uc.__dict__  # the hook is not touched while it may be called
        uc.emu_stop()
        running.join()
        assert uc.__dict__ == methods  # with the end of the run
    with tracked(uc, 12) as tracker:
        uc.emu_start(CODE, CODE + 3)
        assert pages(tracker.collect()) == [1]


# ---- interruptions, drops, forks ----------------------------------------------------------------


def unhooked(uc: Any, hb: HBitmap) -> bool:
    """No hook, no wrapped method, no pin."""
    if "emu_start" in uc.__dict__ or "mem_write" in uc.__dict__:
        return False
    hb.truncate(SIZE)  # else BufferError
    hb.clear()
    X86_64.run(uc, STORE)
    return not hb


def dropped(test: Callable[..., None]) -> Callable[..., None]:
    for what in (
        "a tracker of guest memory",
        "a pin of",
        ":pytest.PytestUnraisableExceptionWarning",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{what}")(test)
    return test


@dropped
def test_an_interruption_at_any_line_leaves_neither_hook_nor_pin() -> None:
    uc, hb = X86_64.machine(STORE), HBitmap(SIZE, 12)

    def attempt() -> None:
        tracked(uc, None, target=hb).close()

    for where in at_every_line(attempt):
        if "emu_start" in uc.__dict__:
            collect()  # frames that were interrupted amid their own frames are in cycles
        assert unhooked(uc, hb), where
    with tracked(uc, None, target=hb):
        X86_64.run(uc, STORE)
        assert pages(hb) == [1]


def test_an_interruption_at_any_line_of_a_write_or_a_run_loses_nothing() -> None:
    uc = X86_64.machine(STORE)
    number = 0

    def write() -> None:
        uc.mem_write(AT, struct.pack("<Q", number))

    def run() -> None:
        uc.reg_write(X86_64.register("RAX"), number)
        X86_64.run(uc, STORE)

    with tracked(uc, 12) as tracker:
        for attempt in (write, run):
            before = uc.mem_read(AT, 8)
            for where in at_every_line(attempt):
                if uc.mem_read(AT, 8) != before:
                    assert pages(tracker.collect()) == [1], where
                tracker.collect()
                assert not tracker.collect(), where
                before = uc.mem_read(AT, 8)
                number += 1


def test_one_that_is_dropped_is_closed_with_a_warning() -> None:
    uc, hb = X86_64.machine(STORE), HBitmap(SIZE, 12)
    tracker = tracked(uc, None, target=hb)
    with pytest.warns(ResourceWarning, match="tracker of guest memory"):  # noqa: PT031
        del tracker
        collect()
    assert unhooked(uc, hb)


def test_a_tracker_keeps_its_machine() -> None:
    uc = X86_64.machine(STORE)
    tracker = tracked(uc, 12)
    uc.emu_start(CODE, CODE + 3)
    del uc
    collect()
    assert pages(tracker.collect()) == [1]
    tracker.close()


def test_machine_and_tracker_go_in_any_order() -> None:
    code = """
import gc, warnings
warnings.simplefilter("ignore")
from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
from unicorn.x86_const import UC_X86_REG_RDI
from pybitmap import HBitmap
from pybitmap.trackers import UnicornTracker

def machine():
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.mem_map(0x1000, 0x2000)
    uc.mem_write(0x1000, bytes.fromhex("488907"))
    uc.reg_write(UC_X86_REG_RDI, 0x2000)
    return uc, UnicornTracker(uc, 0x1000, 0x3000)

for _ in range(10):
    uc, tracker = machine()         # the machine first
    del uc
    gc.collect()
    tracker.collect()
    del tracker
    uc, tracker = machine()         # the tracker first
    del tracker
    gc.collect()
    uc.emu_start(0x1000, 0x1003)
    del uc
    uc, tracker = machine()         # both in one round of the collector
    uc.tracker, tracker.uc = tracker, uc
    uc.emu_start(0x1000, 0x1003)
    del uc, tracker
    gc.collect()
    uc, tracker = machine()         # the tracker in a cycle of its own
    tracker.me = tracker
    del tracker
    gc.collect()
    uc.emu_start(0x1000, 0x1003)
    del uc
    gc.collect()
uc, tracker = machine()             # and at the end of the program
uc.tracker, tracker.uc = tracker, uc
uc2, tracker2 = machine()
print("well")
"""
    assert run_python(code, MALLOC_PERTURB_="165") == "well\n"  # what is freed is garbage


def test_a_hook_that_outlives_its_trackers_finds_what_it_needs() -> None:
    """Closed in another thread, amid a run that the trackers do not see."""
    code = """
import gc, threading
from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
from unicorn.x86_const import UC_X86_REG_RDI
from pybitmap import HBitmap
from pybitmap.trackers import UnicornTracker

uc = Uc(UC_ARCH_X86, UC_MODE_64)
uc.mem_map(0x1000, 0x2000)
uc.mem_write(0x1000, bytes.fromhex("488907ebfb"))       # a loop that stores
uc.reg_write(UC_X86_REG_RDI, 0x2000)
run = uc.emu_start
for _ in range(10):
    hb = HBitmap(0x2000)
    tracker = UnicornTracker(uc, 0x1000, 0x3000, hb)
    running = threading.Thread(target=run, args=(0x1000, 0x2000))
    running.start()
    while not hb:
        pass
    tracker.close()
    del tracker
    gc.collect()
    hb.clear()
    for _ in range(1000):
        HBitmap(100)                                    # takes the memory, if it was freed
    assert not hb
    uc.emu_stop()
    running.join()
del uc, run
gc.collect()
print("well")
"""
    assert run_python(code, MALLOC_PERTURB_="165") == "well\n"


def test_a_fork_in_a_hook_goes_on_in_both() -> None:
    code = STORE + X86_64.programs["push"]
    uc = X86_64.machine(code)
    pid = -1

    def hook(uc: Any, address: int, nbytes: int, data: Any) -> None:
        nonlocal pid
        if address == CODE + 3:
            pid = os.fork()

    with tracked(uc, 12) as tracker:
        uc.hook_add(HOOK_CODE, hook)
        status = 1
        try:
            X86_64.run(uc, code)
            status = 0 if pages(tracker.collect()) == [1] else 2
            if not pid:
                tracker.close()
                status += 4 * ("emu_start" in uc.__dict__)
        finally:
            if not pid:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert status == 0


def test_a_fork_beside_a_thread_that_is_in_the_hook_hangs_nobody() -> None:
    code = STORE + b"\xeb\xfb"
    uc = X86_64.machine(code)
    with tracked(uc, 12) as tracker:
        running = threading.Thread(target=X86_64.run, args=(uc, code))
        running.start()
        children = []
        for _ in range(20):
            pid = os.fork()
            if not pid:
                with suppress(BaseException):
                    tracker.collect()
                    tracker.close()
                    os._exit(0)
                os._exit(1)
            children.append(pid)
        uc.emu_stop()
        running.join()
        assert [os.waitpid(pid, 0)[1] for pid in children] == 20 * [0]


def test_the_example_finds_the_crash() -> None:
    found = subprocess.run(
        [sys.executable, EXAMPLE], capture_output=True, text=True, timeout=120, check=False
    )
    assert re.fullmatch(r"\d+ inputs, \d+ a second\ncrashes: FUZZ\n", found.stdout), found.stderr


def test_the_child_is_refused_a_node_with_a_store(tmp_path: Any) -> None:
    from pybitmap.store import LocalStore

    uc = X86_64.machine(STORE)
    with BlockGraph() as graph:
        node = graph.add_node("ram", size=SIZE, store=LocalStore(tmp_path / "store"))
        node.add_bitmap("daily", persistent=True)
        with tracked(uc, None, target=node):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    X86_64.run(uc, STORE)
                except StateError as error:
                    code = 0 if "the parent" in str(error) else 2
                finally:
                    os._exit(code)
            assert os.waitpid(pid, 0)[1] == 0
            X86_64.run(uc, STORE)
