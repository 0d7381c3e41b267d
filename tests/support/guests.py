# SPDX-License-Identifier: MIT
"""Machines of Unicorn's for tests, and stores in machine code.

Unicorn's names are texts here: it is imported when a machine is made, for it may be missing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

from peers import package

CODE, DATA, SIZE = 0x10000, 0x40000, 0x4000

#: What registers that are stored have.
VALUE = 0x1122334455667788


@dataclass
class Guest:
    name: str
    arch: str
    mode: str
    #: The prefix of its registers, and the module that has them.
    prefix: str
    #: Registers before a program; one of them has the address DATA + 0x1000.
    registers: dict[str, int]
    #: Stores, by name.
    programs: dict[str, bytes] = field(default_factory=dict)
    model: str | None = None
    thumb: bool = False

    def constant(self, name: str) -> int:
        module = package(f"unicorn.{self.prefix.lower()}_const")
        return int(getattr(module, f"UC_{self.prefix}_{name}"))

    def model_number(self) -> int:
        module = package(f"unicorn.{self.prefix.lower()}_const")
        return int(getattr(module, f"UC_CPU_{self.model}"))

    def register(self, name: str) -> int:
        return self.constant(f"REG_{name}")

    def machine(self, code: bytes = b"") -> Any:
        """With code and data mapped, and registers set."""
        unicorn = package("unicorn")
        arch = getattr(unicorn, f"UC_ARCH_{self.arch}")
        mode = sum(getattr(unicorn, f"UC_MODE_{each}") for each in self.mode.split())
        uc = unicorn.Uc(arch, mode)
        if self.model:
            uc.ctl_set_cpu_model(self.model_number())
        uc.mem_map(CODE, 0x4000)
        uc.mem_map(DATA, SIZE)
        uc.mem_write(CODE, code)
        uc.mem_write(DATA, bytes((7 * i + 3) % 256 for i in range(SIZE)))
        for name, value in self.registers.items():
            uc.reg_write(self.register(name), value)
        return uc

    def run(self, uc: Any, code: bytes, **named: int) -> None:
        uc.emu_start(CODE | self.thumb, CODE + len(code), **named)


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def hexes(**programs: str) -> dict[str, bytes]:
    return {name: bytes.fromhex(code) for name, code in programs.items()}


AT = DATA + 0x1000
LOW = VALUE & 0xFFFFFFFF

X86_64 = Guest(
    "x86-64",
    "X86",
    "64",
    "X86",
    {
        "RDI": AT,
        "RSI": DATA + 0x123,
        "RSP": DATA + 0x2000,
        "RBP": DATA + 0x3000,
        "RCX": 100,
        "RAX": VALUE,
        "RBX": 5,
        "XMM0": 0x112233445566778899AABBCCDDEEFF80,
    },
    hexes(
        mov="488907",
        mov_over_a_page="488987fd0f0000",
        movups_over_a_page="0f1187f90f0000",
        rep_movsb="f3a4",
        rep_movsq="f348a5",
        rep_stosq="f348ab",
        rep_insb="f36c",
        push="50",
        push_fs="0fa0",
        pushfq="9c",
        enter="c8400003",
        call="e800000000",
        movntdq="660fe707",
        movq="660fd607",
        maskmovdqu="660ff7c0",
        pextrq="66480f3a160701",
        fxsave="0fae07",
        fnsave="dd37",
        fstp="db3f",
        fbstp="df37",
        fnstenv="d937",
        stmxcsr="0fae1f",
        lock_cmpxchg16b="488b07488b5708f0480fc70f",
        cmpxchg="488b07480fb11f",
        lock_xadd="f0480fc107",
        xchg="488707",
        lock_inc="f048ff07",
        lock_btc="f0480fba7f0803",
        btc="480fbb0f",
        setc="0f9207",
        sgdt="0f0107",
        movbe="480f38f107",
        movnti="480fc307",
        mov_from_ds="668c1f",
    ),
)
X86_32 = Guest(
    "x86-32",
    "X86",
    "32",
    "X86",
    {"EDI": AT, "ESP": DATA + 0x2000, "ESI": DATA + 0x123, "ECX": 100, "EAX": LOW, "EBX": 5},
    hexes(mov="8907", over_a_page="8987fe0f0000", pushad="60", rep_movsd="f3a5", xchg="8707"),
)
X86_16 = Guest(
    "x86-16",
    "X86",
    "16",
    "X86",
    {
        "DS": DATA >> 4,
        "ES": DATA >> 4,
        "SS": DATA >> 4,
        "SI": 0x123,
        "DI": 0x1000,
        "SP": 0x2000,
        "CX": 100,
    }
    | {"AX": LOW & 0xFFFF, "CS": 0x1000},
    hexes(mov="8905", over_a_page="8985ff0f", pusha="60", rep_stosw="f3ab", rep_movsb="f3a4"),
)
ARM_REGISTERS = {f"R{i}": 0x11223344 * (i + 1) & 0xFFFFFFFF for i in range(1, 8)}
ARM_REGISTERS |= {"R0": AT, "SP": DATA + 0x2000}
ARM = Guest(
    "arm",
    "ARM",
    "ARM",
    "ARM",
    ARM_REGISTERS
    | {"C1_C0_2": 0xF00000, "FPEXC": 0x40000000, "D0": VALUE, "D1": VALUE * 3 % 2**64},
    hexes(
        str="001080e5",
        stm="fe0080e8",
        stmdb="fe0020e9",
        push="fe002de9",
        strd="f020c0e1",
        strh_unaligned="b110c0e1",
        str_over_a_page="fd1f80e5",
        strex="9f3f90e1914f80e1",
        strexd="9f4fb0e1926fa0e1",
        swp="913000e1",
        vst1="0f0a00f4",
        vstm="040b80ec",
        vst4_lane="2f0380f4",
    ),
)
THUMB = Guest(
    "thumb",
    "ARM",
    "THUMB",
    "ARM",
    ARM_REGISTERS,
    hexes(push="feb4", stm="fec0", str="4160"),
    thumb=True,
)
CORTEX_M = Guest(
    "cortex-m4",
    "ARM",
    "THUMB",
    "ARM",
    ARM_REGISTERS,
    hexes(push="feb4", stm="fec0", str_over_a_page="c0f8fe1f"),
    model="ARM_CORTEX_M4",
    thumb=True,
)
ARM64_REGISTERS = {"X0": AT, "X1": VALUE, "X2": 0x99AABBCCDDEEFF00, "X3": 7, "SP": DATA + 0x2000}
ARM64_REGISTERS |= {"CPACR_EL1": 0x330000}
ARM64_REGISTERS |= {f"Q{i}": 0x1234567890ABCDEF1234567890ABCDEF + i for i in range(4)}
ARM64 = Guest(
    "arm64",
    "ARM64",
    "ARM",
    "ARM64",
    ARM64_REGISTERS,
    hexes(
        str="010000f9",
        stp="0108bfa9",
        str_q="0000803d",
        stp_q="000400ad",
        st1="0020004c",
        st4="0000004c",
        st1_lane="000c000d",
        dc_zva="20740bd5",
        stxr="037c5fc8017c04c8",
        stlxp="03947fc8018824c8",
        stlr="01fc9fc8",
        stlrb="01fc9f08",
        str_unaligned="011000f8",
        stur_over_a_page="01c01ff8",
        strb="01000039",
        stnp="010800a8",
    ),
)
ARM64_MAX = Guest(
    "arm64-max",
    "ARM64",
    "ARM",
    "ARM64",
    ARM64_REGISTERS,
    {
        "ldadd": words(0xF8210002),
        "swp": words(0xF8218002),
        "ldset": words(0xF8213002),
        "cas": words(0xF9400002, 0xC8A27C01),
        "casal": words(0xF9400002, 0xC8E2FC01),
        "casp": words(0xA9400C02, 0x48227C00),
    },
    model="ARM64_MAX",
)
MIPS = Guest(
    "mips",
    "MIPS",
    "MIPS32",
    "MIPS",
    {"8": AT, "9": LOW, "10": 0x55667788},
    hexes(
        sw="000009ad",
        swl="010009a9",
        swl_2="020009a9",
        swr="010009b9",
        swr_2="020009b9",
        swl_swr="030009a9060009b9",
        sh="020009a5",
        sb="010009a1",
        sc="00000bc1000009e1",
    ),
)
MIPS_BE = Guest(
    "mips-be",
    "MIPS",
    "MIPS32 BIG_ENDIAN",
    "MIPS",
    MIPS.registers,
    hexes(
        sw="ad090000",
        swl="a9090001",
        swl_2="a9090002",
        swr="b9090001",
        swr_2="b9090002",
        swl_swr="a9090003b9090006",
        sc="c10b0000e1090000",
    ),
)
MIPS64 = Guest(
    "mips64",
    "MIPS",
    "MIPS64",
    "MIPS",
    MIPS.registers,
    {
        "sd": words(0xFD090000),
        "sdl": words(0xB1090003),
        "sdr": words(0xB5090003),
        "scd": words(0xD10B0000, 0xF1090000),
    },
)


def riscv_store(log: int, offset: int) -> int:
    """sb, sh, sw or sd of x11 to x10 + offset."""
    return 0x23 | (offset & 31) << 7 | log << 12 | 10 << 15 | 11 << 20 | (offset >> 5 & 127) << 25


def riscv_atomic(function: int, log: int, second: int = 11) -> int:
    """x12 = at x10, which gets what the function makes of it and x11."""
    return 0x2F | 12 << 7 | log << 12 | 10 << 15 | second << 20 | function << 27


RISCV64 = Guest(
    "riscv64",
    "RISCV",
    "RISCV64",
    "RISCV",
    {"X10": AT, "X11": VALUE, "MSTATUS": 0x6000},
    {
        "sd": words(riscv_store(3, 0)),
        "sd_unaligned": words(riscv_store(3, 3)),
        "sd_over_a_page": words(riscv_store(3, -3)),
        "sw": words(riscv_store(2, 0)),
        "sh": words(riscv_store(1, 0)),
        "sb": words(riscv_store(0, 0)),
        "fsd": words(0x27 | 3 << 12 | 10 << 15),
        "sc_d": words(riscv_atomic(2, 3, 0), riscv_atomic(3, 3)),
        "amoadd_d": words(riscv_atomic(0, 3)),
        "amoswap_w": words(riscv_atomic(1, 2)),
        "amoxor_w": words(riscv_atomic(4, 2)),
        "amominu_d": words(riscv_atomic(0x18, 3)),
        "c_sd": bytes.fromhex("0ce10100"),
    },
)
RISCV32 = Guest(
    "riscv32",
    "RISCV",
    "RISCV32",
    "RISCV",
    {"X10": AT, "X11": LOW},
    {"sw": words(riscv_store(2, 0)), "amoswap_w": words(riscv_atomic(1, 2))},
)
SPARC = Guest(
    "sparc",
    "SPARC",
    "SPARC32 BIG_ENDIAN",
    "SPARC",
    {"G1": AT, "G2": LOW, "G3": 0x55667788},
    hexes(st="c4204000", std="c4384000", swap="c4784000", ldstub="c4684000", sth="c4306002"),
)
M68K = Guest(
    "m68k",
    "M68K",
    "BIG_ENDIAN",
    "M68K",
    {"A0": AT, "D0": LOW, "A7": DATA + 0x2000},
    hexes(move="2080", move_unaligned="21400001", over_a_page="21400ffe", tas="4ad0"),
)
TRICORE = Guest(
    "tricore", "TRICORE", "LITTLE_ENDIAN", "TRICORE", {"A2": AT, "D3": LOW}, hexes(st_w="7423")
)

GUESTS = [
    X86_64,
    X86_32,
    X86_16,
    ARM,
    THUMB,
    CORTEX_M,
    ARM64,
    ARM64_MAX,
    MIPS,
    MIPS_BE,
    MIPS64,
    RISCV64,
]
GUESTS += [RISCV32, SPARC, M68K, TRICORE]
