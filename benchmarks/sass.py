"""Machine code of a kernel, read by cuobjdump: instructions by kind, and the loops that they stand in."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence

from sparsifiner_edge.ops.triton.compile import tool

KINDS = {
    "matrix": r"HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA|OMMA|QMMA",
    "special": r"MUFU",
    "local": r"LDL|STL",
    "copy": r"LDGSTS|UBLKCP|UTMA\w*",
    "global": r"LDG|STG|RED|ATOM",
    "shared": r"LDS|LDSM|STS|STSM|MOVM|LDTM|STTM|UTCCP",
    "shuffle": r"SHFL|REDUX",
    "barrier": r"BAR|WARPSYNC|DEPBAR|LDGDEPBAR|WARPGROUP|FENCE|MEMBAR|SYNCS|ERRBAR|CCTL",
    "branch": r"BRA|EXIT|BSSY|BSYNC|CALL|RET|BRX|NOP|YIELD|BREAK",
    "float": r"FADD\d*|FMUL\d*|FFMA\d*|FMNMX\d*|FSEL|FSETP|FSET|FCHK|HADD2|HFMA2|HMUL2|HSETP2|F2F|F2FP|I2F\w*|F2I",
}
"""Kinds of instructions by their first part; all else is whole numbers, addresses and moves."""
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([A-Z0-9_.]*)\s*(.*?);")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Its address, name without modifiers, and operands."""

    address: int
    name: str
    operands: str

    @property
    def kind(self) -> str:
        """Of `KINDS`, or "integer"."""
        return next((kind for kind, names in KINDS.items() if re.fullmatch(names, self.name)), "integer")


def instructions(cubin: bytes) -> list[Instruction]:
    """All of a kernel's, in order."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    return [Instruction(int(m[1], 16), m[2], m[4]) for m in map(_LINE.match, text.splitlines()) if m]


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Bodies of loops, by jumps backward; that to itself at a kernel's end is none."""
    found = []
    for instruction in code:
        target = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.name == "BRA" else None
        if target and int(target[1], 16) < instruction.address:
            start = int(target[1], 16)
            found.append([x for x in code if start <= x.address <= instruction.address])
    return found


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The loop with most matrix instructions; empty where none has any."""
    best = max(loops(code), key=lambda body: counts(body)["matrix"], default=[])
    return best if counts(best)["matrix"] else []


def counts(code: Sequence[Instruction]) -> Counter[str]:
    """Instructions of a warp by kind."""
    return Counter(x.kind for x in code)
