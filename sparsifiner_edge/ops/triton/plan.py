"""Which kernels an operator launches, in which order, on which buffers: for torch and for compilation ahead of time.

A plan follows from the operator's attributes and shapes, the element type and the GPU's compute capability alone;
neither torch nor Triton is imported. Today's launches are the same for every capability. Every size is a constant
of the kernel: a kernel takes pointers and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from sparsifiner_edge.ops.kernels import TRITON
from sparsifiner_edge.ops.schema import DEVIATION_FLOOR, OPERATORS, AttributeValue

OPERATORS_PLANNED = TRITON.operators
LEAST_CAPABILITY = 80
"""Compute capability times ten: below, Triton multiplies without tensor cores."""
MOST = {"width": 128, "channels": 64, "tile": 128, "patches": 16384}
"""Greatest head dimension, predictor channels, tile, and patches (a row of scores is held in registers)."""
PRECISION = "tf32x3"
"""How float32 matrix products are made: by three TF32 products."""
_LOG2_E = math.log2(math.e)
_GRID_LIMIT = 65535
"""CUDA's limit of a grid's second and third dimension."""
_OFFSET_LIMIT = 2**31
"""Offsets within one image's tensors are 32 bits wide."""


Constant: TypeAlias = int | float | str
"""Of a kernel, at compile time."""


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A tensor of a plan, contiguous. role: "input", "output" or "scratch" (written before it is read)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: name of the function without `_kernel`; `KERNEL_MODULES` says where it lives.
        grid: blocks in x, y, z.
        arguments: the kernel's pointer parameters in order, each with the buffer it gets, or None where a variant of
            the kernel has no such parameter.
        constants: its compile-time constants.
        warps, stages: of 32 threads each; depth of the software pipeline.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, str | None]
    constants: Mapping[str, Constant]
    warps: int = 4
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """Buffers by name, and launches in order."""

    buffers: dict[str, Buffer]
    launches: tuple[Launch, ...]


KERNEL_MODULES = {
    "prepare": "select", "lse": "select", "scores": "select", "select": "select",
    "membership": "attend", "rest": "attend", "attend": "attend",
    "queries": "backward", "cells": "backward", "keys": "backward",
}  # fmt: skip
"""Module of each kernel."""


def refusals(
    name: str,
    attributes: Mapping[str, AttributeValue],
    shapes: Sequence[Sequence[int]],
    dtype: str,
    capability: int,
) -> list[str]:
    """Reasons why the Triton kernels cannot run an operator; empty when they can.

    Args:
        name: the operator. attributes, shapes: as in its schema, shapes in the order of its inputs.
        dtype: element type of qkv, such as "float16".
        capability: compute capability of the GPU times ten, such as 87.
    """
    if name not in OPERATORS_PLANNED:
        return [f"there is no Triton kernel for {name}"]
    op = OPERATORS[name]
    reasons = op.refusals(attributes, shapes)
    if dtype not in op.inputs[0].dtypes:
        reasons.append(f"qkv must be {', '.join(op.inputs[0].dtypes)}, got {dtype}")
    if capability < LEAST_CAPABILITY:
        reasons.append(f"compute capability {capability / 10} is below {LEAST_CAPABILITY / 10}")
    return reasons or _size_refusals(attributes, shapes)


def _size_refusals(attributes: Mapping[str, AttributeValue], shapes: Sequence[Sequence[int]]) -> list[str]:
    batch, tokens, packed = shapes[0]
    heads = int(attributes["num_heads"])
    sizes = {"width": packed // (3 * heads), "tile": int(attributes["tile"])}
    columns = tokens - int(attributes["num_prefix"])
    largest = {"qkv": tokens * packed}
    if "probe" in attributes:
        sizes |= {"channels": shapes[1][2], "patches": columns}
    else:
        tiles, cell = shapes[1][2], int(attributes["cell"])
        largest |= {"membership": tiles * (tokens + 16)}
        chunks = math.ceil(sizes["tile"] / 16)  # of a tile, at most
        largest |= {"cells": tiles * chunks * math.ceil(columns / cell) * sizes["width"]} if cell else {}
    names = {
        "width": "head dimension",
        "channels": "predictor channels",
        "tile": "tile",
        "patches": "number of patches",
    }
    reasons = [f"{names[k]} {v} exceeds {MOST[k]}" for k, v in sizes.items() if v > MOST[k]]
    reasons += [f"{k} has {v} elements an image, above 2^31" for k, v in largest.items() if v >= _OFFSET_LIMIT]
    if max(batch, heads) > _GRID_LIMIT:
        reasons.append(f"batch {batch} or heads {heads} exceed {_GRID_LIMIT}")
    return reasons


def power_of_two(size: int, least: int = 16, most: int = 1 << 30) -> int:
    """The smallest power of two that is at least `size`, between `least` and `most`."""
    return min(max(least, 1 << max(size - 1, 0).bit_length()), most)


def plan_select(
    shapes: Sequence[Sequence[int]],
    attributes: Mapping[str, AttributeValue],
    dtype: str,
    capability: int,  # noqa: ARG001
) -> Plan:
    """KeySelect: qkv, proj_q, proj_k (float32) -> indices."""
    a, (batch, tokens, packed) = attributes, shapes[0]
    heads, prefix, channels = int(a["num_heads"]), int(a["num_prefix"]), shapes[1][2]
    patches, width = tokens - prefix, packed // (3 * heads)
    probes, tiles = math.ceil(patches / a["probe"]), math.ceil(patches / a["tile"])
    block_c, block_d = power_of_two(channels), power_of_two(width)
    block_p = 32 if width <= 64 else 16
    cells = math.ceil(patches / (a["cell"] or block_p)) if a["value_power"] else 0
    both = {"block_c": block_c, "heads": heads}
    asked = {"patches": patches, "probe": int(a["probe"]), "factor": float(a["scale"]) * _LOG2_E, **both}
    weighed = {"value_power": float(a["value_power"])}
    deviation = "deviation" if a["value_power"] else None
    parts = {n: n for n in ("projected_q", "projected_q_powers", "projected_k", "projected_k_powers")}
    block_m, block_n, rows = (power_of_two(size, most=64) for size in (probes, patches, tiles))
    prepare = Launch(
        "prepare",
        (math.ceil(patches / block_p) + math.ceil(probes / block_p) + cells, heads, batch),
        {"qkv": "qkv", "proj_q": "proj_q", "proj_k": "proj_k", **parts, "deviation": deviation},
        {
            "tokens": tokens, "width": width, "prefix": prefix, "channels": channels, "probe": int(a["probe"]),
            "cell": int(a["cell"]), "floor": DEVIATION_FLOOR, "block_m": block_p, "block_d": block_d,
            "precision": PRECISION, **weighed, **both,
        },
    )  # fmt: skip
    lse = Launch(
        "lse",
        (math.ceil(probes / block_m), heads, batch),
        {**parts, "lse": "lse"},
        {**asked, "block_m": block_m, "block_n": block_n},
    )
    scores = Launch(
        "scores",
        (math.ceil(tiles / rows) * math.ceil(patches / block_n), heads, batch),
        {**parts, "lse": "lse", "deviation": deviation, "scores": "scores"},
        {**asked, **weighed, "tile": int(a["tile"]), "block_m": rows, "block_n": block_n},
    )
    row = power_of_two(patches, least=128)
    select = Launch(
        "select",
        (tiles, heads, batch),
        {"scores": "scores", "indices": "indices"},
        {"patches": patches, "heads": heads, "tiles": tiles, "keys": int(a["keys"]), "block_n": row}
        | {"block_s": min(row, 4096)},
        warps=power_of_two(row // 1024, least=4, most=8),
    )
    buffers = _select_buffers(shapes, (tiles, int(a["keys"])), probes, patches, block_c, dtype)
    if deviation is None:
        del buffers["deviation"]
    return _plan(buffers, prepare, lse, scores, select)


def _select_buffers(
    shapes: Sequence[Sequence[int]], lists: tuple[int, int], probes: int, patches: int, block_c: int, dtype: str
) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Every tensor of KeySelect by its name: type, shape and role; `lists` are the tiles and their keys."""
    lead = (shapes[0][0], shapes[1][0])
    return {
        "qkv": (dtype, tuple(shapes[0]), "input"),
        "proj_q": ("float32", tuple(shapes[1]), "input"),
        "proj_k": ("float32", tuple(shapes[2]), "input"),
        "indices": ("int32", (*lead, *lists), "output"),
        "projected_q": ("float16", (*lead, probes, 2, block_c), "scratch"),
        "projected_q_powers": ("float32", (*lead, probes), "scratch"),
        "projected_k": ("float16", (*lead, patches, 2, block_c), "scratch"),
        "projected_k_powers": ("float32", (*lead, patches), "scratch"),
        "lse": ("float32", (*lead, probes), "scratch"),
        "scores": ("float32", (*lead, lists[0], patches), "scratch"),
        "deviation": ("float32", (*lead, patches), "scratch"),
    }


def _plan(shapes_of: Mapping[str, tuple[str, tuple[int, ...], str]], *launches: Launch) -> Plan:
    return Plan({name: Buffer(name, *rest) for name, rest in shapes_of.items()}, launches)
