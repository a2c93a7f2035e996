"""What a plan's launches do on a GPU, counted in their machine code: for `gpu_roofline.py`.

Every instruction counts as often as its loops go round; loops are told apart by the functions of the source that they
come from, and how many blocks one round holds by what it loads, stores or multiplies (the compiler unrolls).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gpu_roofline import LaunchWork, Work
from occupancy import occupancy
from sass import Code, Instruction, counts, read

from sparsifiner_edge.ops.triton import attend
from sparsifiner_edge.ops.triton.compile import Compiled, resources
from sparsifiner_edge.ops.triton.plan import Plan

ROUNDS = {1: 5.4, 2: 6.5, 4: 7.7}
"""Of `select`'s search for thresholds, by how many tiles go together: no fewer than `gpu_rounds.py` gives."""
AGAIN = {1370: 0.0065, 2305: 0.0101}
"""Share of tiles whose logits `attend` takes again, by tokens: no less than `gpu_rounds.py` gives."""
_UNUSUAL = {"_list_with_ties"}
"""Functions of `select` that ties need."""
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}

Times = Sequence[tuple[float, Sequence[Instruction]]]
"""Instructions, each sequence with how often it runs."""


def work_of(made: Compiled, plan: Plan, twin: Compiled | None = None) -> LaunchWork:
    """Of one compiled launch; twin: the same for an older GPU, where its code does not say what it multiplies."""
    launch = made.launch
    constants: dict[str, Any] = {**launch.constants, "warps": launch.warps}
    l2 = _KERNELS[launch.kernel][1]
    lanes = launch.grid[1] * launch.grid[2]
    resident = occupancy(made.capability, launch.warps, resources(made)[0], made.shared).blocks
    works = _works(launch.kernel, made.cubin, tuple(sorted(constants.items())), launch.grid[0], lanes)
    if twin is not None:
        works = [
            dataclasses.replace(own, products=max(0.0, other.products + other.warp_products - own.warp_products))
            for own, other in zip(works, work_of(twin, plan).kinds, strict=True)
        ]
    unique = sum(
        math.prod(x.shape) * _SIZES[x.dtype]
        for name, x in plan.buffers.items()
        if name in {a.name for a in made.arguments} and x.role != "scratch"
    )
    return LaunchWork(tuple(works), resident, lanes * l2(constants), unique)


@functools.lru_cache(maxsize=64)
def _read(cubin: bytes) -> Code:
    return read(cubin)


@functools.cache
def _works(kernel: str, cubin: bytes, constants: tuple[tuple[str, Any], ...], grid: int, lanes: int) -> list[Work]:
    c = dict(constants)
    kinds = _KERNELS[kernel][0](_read(cubin), c, grid)
    return [_work(programs * lanes, c["warps"], times) for programs, times in kinds if programs]


def _work(programs: int, warps: int, times: Times) -> Work:
    def total(value: Any) -> float:
        return sum(often * sum(map(value, part)) for often, part in times)

    return Work(
        programs, warps, total(lambda _: 1), total(lambda x: x.kind == "special"), total(lambda x: x.shared_bytes),
        total(lambda x: x.products * (x.name == "HGMMA")), total(lambda x: x.products * (x.name != "HGMMA")),
    )  # fmt: skip


def _from(part: Sequence[Instruction], function: str) -> bool:
    return any(function in x.functions for x in part)


def _split(code: Code, function: str) -> tuple[list[Instruction], list[Instruction]]:
    """Straight code that does not come from a function, and that which does."""
    return [x for x in code.straight if function not in x.functions], [
        x for x in code.straight if function in x.functions
    ]


def _products(part: Sequence[Instruction]) -> int:
    return sum(x.products for x in part)


def _elements(part: Sequence[Instruction], name: str) -> int:
    """32-bit elements that a thread loads (LDG) or stores (STG)."""
    width = {".64": 2, ".128": 4}
    return sum(next((n for w, n in width.items() if w in x.modifiers), 1) for x in part if x.name == name)


def _summarise(code: Code, c: Mapping[str, Any], grid: int) -> list[tuple[int, Times]]:
    """Programs of a cell, of which the first has the prefix tokens too, and of probes."""
    main, probes = _split(code, "_store_probes")
    prefix = [x for x in main if "_store_prefix_cells" in x.functions]
    cell: list[tuple[float, Sequence[Instruction]]] = [
        (1, [x for x in main if "_store_prefix_cells" not in x.functions]), (1 / c["cells"], prefix)
    ]  # fmt: skip
    asked: list[tuple[float, Sequence[Instruction]]] = [(1, probes)]
    for loop in code.loops:
        cell.append((math.ceil(c["cell"] / c["block_p"]), loop.own))
    return [(c["cells"], cell), (grid - c["cells"], asked)]


def _select(code: Code, c: Mapping[str, Any], grid: int) -> list[tuple[int, Times]]:
    patches, groups = c["tokens"] - c["prefix"], c["share"] // c["group"]
    block = c["block_g"] * c["block_n"] * c["block_c"] // 4
    passes = [loop for loop in code.loops if _products(loop.own)]
    times: list[tuple[float, Sequence[Instruction]]] = [
        (1, [x for x in code.straight if not _UNUSUAL & set(x.functions)])
    ]
    for loop in code.loops:
        if loop in passes:
            often = patches // c["block_n"] * block / _products(loop.own)
        elif stored := _elements([x for x in loop.own if not _UNUSUAL & set(x.functions)], "STG"):
            often = groups * c["pitch"] // c["lanes"] / stored
        elif any(len(x.whole) < len(loop.whole) and x.own[0] in loop.whole for x in code.loops):
            often = groups
        else:
            often = groups * ROUNDS[c["group"]]
        times.append((often, [x for x in loop.own if not _UNUSUAL & set(x.functions)]))
    return [(grid, times)]


def _again(c: Mapping[str, Any]) -> float:
    """At more tokens than were looked at as at the most."""
    return next((share for tokens, share in AGAIN.items() if c["tokens"] <= tokens), max(AGAIN.values()))


def _attend(code: Code, c: Mapping[str, Any], _: int) -> list[tuple[int, Times]]:
    straight, prefix = _split(code, "_prefix_row")
    full = c["keys"] // c["block_n"]
    blocks = math.ceil((c["keys"] - full * c["block_n"]) / c["block_t"])
    rest = max(0, blocks - 1)  # the first stands before the loop
    again = _again(c)
    tile: list[tuple[float, Sequence[Instruction]]] = [
        (1, [x for x in straight if "_tile_again" not in x.functions]),
        (again, [x for x in straight if "_tile_again" in x.functions]),
    ]
    row: list[tuple[float, Sequence[Instruction]]] = [(1, prefix)]
    weights = c["block_m"] * c["block_n"] / 32 / c["warps"]  # exponentials of a warp for a block of the main loop
    for loop in code.loops:
        if counts(loop.own)["matrix"]:
            share, often = 1.0, full if counts(loop.own)["special"] >= 0.75 * weights else rest
            if _from(loop.own, "_tile_again"):
                block = c["block_n"] if c["block_n"] <= attend.FOLLOWED.value else c["block_t"]
                share, often = again, math.ceil(c["keys"] / block)
            # The sums of cells stand there twice, for either half of the cells: one block has entries of both.
            summing = [x for x in loop.own if "_add_selected" in x.functions]
            tile.append((share * often, [x for x in loop.own if "_add_selected" not in x.functions]))
            tile.append((share * (often + 1) / 2, summing))
        elif _from(loop.own, "_prefix_row"):
            row.append((1, loop.own))
    return [(c["tiles"], tile), (c["prefix"], row)]


def _summed(c: Mapping[str, Any]) -> int:
    """Bytes of a cell's sum."""
    return 2 if c["unit"] > 1 else 4


def _summarise_l2(c: Mapping[str, Any]) -> float:
    """Queries and keys once, values twice; what is projected, deviations, and projections."""
    patches, element = c["tokens"] - c["prefix"], 2 * c["width"]
    reads = patches * element * 4
    projections = (c["cells"] + 2 * math.ceil(patches / c["probe"] / c["block_g"])) * c["width"] * c["channels"] * 4
    sums = (c["cells"] + c["prefix"]) * c["width"] * _summed(c) * 2 + c["cells"] * c["prefix"] * c["width"] * 4
    return reads + projections + sums + patches * (2 * c["depth"] * (1 + 1 / c["probe"]) + 4)


def _select_l2(c: Mapping[str, Any]) -> float:
    """Projected keys in two passes of a program, and deviations; scores written and read, and read again from L1."""
    patches, share = c["tokens"] - c["prefix"], c["share"]
    programs = math.ceil(c["tiles"] / share)
    each = patches * (2 * 2 * c["depth"] + 4) + 2 * 4 * share * c["pitch"]
    return programs * each + c["tiles"] * c["keys"] * 4


def _attend_l2(c: Mapping[str, Any]) -> float:
    """Listed keys and values of each tile, a sample of them before, sums of cells, lists, queries and output."""
    cells = (c["cells"] + c["prefix"]) * 2 * _summed(c) * c["width"]
    listed = (1 + _again(c)) * c["keys"] * (4 * c["width"] + 4) + min(attend.SAMPLE.value, c["keys"]) * 2 * c["width"]
    return c["tiles"] * (listed + cells) + c["tokens"] * 4 * c["width"]


_KERNELS = {
    "summarise": (_summarise, _summarise_l2),
    "select": (_select, _select_l2),
    "attend": (_attend, _attend_l2),
}
"""Kinds of programs of a launch with what each runs, and bytes that pass L2 for one head of one image."""
