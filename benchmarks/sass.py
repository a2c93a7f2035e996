"""Machine code of a kernel, read by nvdisasm: instructions by kind, where in the source they come from, and the loops
that they stand in.

Loops are natural ones of the control flow: from 10.0 on waits jump to code behind the kernel and back, so that a jump
backward alone is no loop.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import networkx
import triton.backends.nvidia

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
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([A-Z0-9_.x]*)\s*(.*?)\s*;")
_SOURCE = re.compile(r'//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"(\.L_\w+):")
_JUMP = re.compile(r"`\((\.L_\w+)\)")
_ENDS = ("BRA", "EXIT", "RET", "BRX", "CALL")
"""Instructions that a block of straight code may end with."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Its place among a kernel's, whether it runs always, name and modifiers, operands, and the functions that it comes
    from, innermost first.
    """

    number: int
    always: bool
    name: str
    modifiers: str
    operands: str
    functions: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Of `KINDS`, or "integer"."""
        return next((kind for kind, names in KINDS.items() if re.fullmatch(names, self.name)), "integer")

    @property
    def shared_bytes(self) -> int:
        """What a warp moves between shared memory and registers."""
        if self.kind != "shared":
            return 0
        if self.name in ("LDSM", "STSM"):
            return 128 * int(self.modifiers[-1])
        width = re.search(r"\.(U?8|S8|U16|S16|64|128)\b", self.modifiers)
        return 32 * {"64": 8, "128": 16}.get(width[1] if width else "", 4)

    @property
    def products(self) -> int:
        """Multiply-accumulates of a warp on the matrix units; 0 where the code does not say (10.0, 11.0)."""
        found = re.match(r"\.(\d+)x(\d+)x(\d+)", self.modifiers) if self.name == "HGMMA" else None
        if found:  # of four warps together
            return int(found[1]) * int(found[2]) * int(found[3]) // 4
        return 2048 if self.name == "HMMA" and self.modifiers.startswith(".16816") else 0


@dataclasses.dataclass(frozen=True)
class Loop:
    """Its instructions without those of loops within it, and how many loops it stands in."""

    own: tuple[Instruction, ...]
    whole: tuple[Instruction, ...]
    depth: int


@dataclasses.dataclass(frozen=True)
class Code:
    """All of a kernel's instructions in order, and its loops by where they begin."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    @property
    def straight(self) -> list[Instruction]:
        """What stands in no loop."""
        within = {x.number for loop in self.loops for x in loop.whole}
        return [x for x in self.instructions if x.number not in within]


def read(cubin: bytes, symbol: str | None = None) -> Code:
    """A kernel's code; symbol: the function of it, needed where there are several."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        program = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
        command = [str(program), "-gi", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions, labels = _parse(text, symbol)
    return Code(tuple(instructions), tuple(_loops(instructions, labels)))


def _parse(text: str, symbol: str | None) -> tuple[list[Instruction], dict[str, int]]:
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    functions: list[str] = []
    inside = fresh = False
    for line in text.splitlines():
        if line.startswith(".text."):
            inside = symbol is None or line == f".text.{symbol}:"
        elif line.lstrip().startswith(".section"):
            inside = False
        elif not inside:
            continue
        elif source := _SOURCE.search(line):
            functions = [*([] if fresh else functions), _function(source[1], int(source[2]))]
            fresh = False
        elif label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif m := _LINE.match(line):
            found.append(Instruction(len(found), m[2] is None, m[3], m[4], m[5], tuple(functions)))
            fresh = True
    return found, labels


@functools.cache
def _functions(path: str) -> list[tuple[int, int, str]]:
    if not Path(path).exists():
        return []
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return [(x.lineno, x.end_lineno or 0, x.name) for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]


def _function(path: str, line: int) -> str:
    return max(((first, name) for first, last, name in _functions(path) if first <= line <= last), default=(0, ""))[1]


def _flow(code: Sequence[Instruction], labels: dict[str, int]) -> tuple[list[range], networkx.DiGraph]:
    """Blocks of straight code, and which may follow which."""
    ends = {x.number + 1 for x in code if x.name in _ENDS}
    starts = sorted({0, *ends, *labels.values()} & set(range(len(code))))
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    at = {block.start: number for number, block in enumerate(blocks)}
    flow = networkx.DiGraph()
    flow.add_nodes_from(range(len(blocks)))
    for number, block in enumerate(blocks):
        last = code[block.stop - 1]
        target = _JUMP.search(last.operands) if last.name in ("BRA", "CALL") else None
        if target and labels.get(target[1]) in at:
            flow.add_edge(number, at[labels[target[1]]])
        # A jump that warps may take apart (.DIV, .CONV), or by a register, is no jump for all.
        passes = not last.always or last.operands[:1] in ("~", "!", "U", "P")
        if number + 1 < len(blocks) and (passes or last.name not in _ENDS or (last.name == "CALL" and not target)):
            flow.add_edge(number, number + 1)
    return blocks, flow


def _loops(code: Sequence[Instruction], labels: dict[str, int]) -> list[Loop]:
    if not code:
        return []
    blocks, flow = _flow(code, labels)
    flow = flow.subgraph({0} | networkx.descendants(flow, 0))
    above = networkx.immediate_dominators(flow, 0)

    def over(block: int) -> set[int]:
        """Blocks that every way to one passes, itself among them."""
        found = {block}
        while above.get(block) not in (None, block):
            block = above[block]
            found.add(block)
        return found

    bodies: dict[int, set[int]] = defaultdict(set)
    for last, first in flow.edges:
        if first in over(last):
            before = flow.subgraph(set(flow) - {first}).reverse(copy=False)
            bodies[first] |= {first} | ({last} | networkx.descendants(before, last) if last != first else set())
    found = []
    for first, body in sorted(bodies.items()):
        within = [other for start, other in bodies.items() if start != first and start in body and other < body]
        parts = [[code[i] for b in sorted(chosen) for i in blocks[b]] for chosen in (body - set().union(*within), body)]
        depth = sum(1 for start, other in bodies.items() if start != first and first in other)
        found.append(Loop(tuple(parts[0]), tuple(parts[1]), depth))
    return found


def main_loop(code: Code) -> tuple[Instruction, ...]:
    """The loop with most matrix instructions; empty where none has any."""
    best = max((loop.own for loop in code.loops), key=lambda own: counts(own)["matrix"], default=())
    return best if counts(best)["matrix"] else ()


def counts(code: Sequence[Instruction]) -> Counter[str]:
    """Instructions of a warp by kind."""
    return Counter(x.kind for x in code)
