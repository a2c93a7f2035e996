"""Which kernels an operator launches, in which order, on which buffers: for torch and for compilation ahead of time.

A plan (`plan_forward`, `plan_merge`) follows from the operator's attributes, shapes and element type
alone; neither torch nor Triton is imported, and launches are the same for every compute capability, but for `fitted`.
Every size is a constant of the kernel: a kernel takes pointers and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from sparsifiner_edge.ops.kernels import TRITON
from sparsifiner_edge.ops.operator import AttributeValue
from sparsifiner_edge.ops.schema import OPERATORS

OPERATORS_PLANNED = TRITON.operators
SHORT_BLOCKS = {("select", 10), ("attend", 12)}
"""Kernels, and major compute capabilities, whose whole blocks take more registers than there are."""
LEAST_BLOCK = 16
"""Entries that a block has at least: a product of the matrix units has."""
LEAST_CAPABILITY = 80
"""Compute capability times ten: below, Triton multiplies without tensor cores."""
MOST = {"width": 128, "channels": 64, "tile": 128, "probe": 64, "patches": 16384}
"""Greatest head dimension, predictor channels, tile, probe (a program's patches hold whole ones), and patches (more
were never tried)."""
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


def fitted(launch: Launch, capability: int) -> Launch:
    """A launch as it is for a compute capability (times ten): in blocks half as long where `SHORT_BLOCKS` says so."""
    block = int(launch.constants.get("block_n", 0))
    if (launch.kernel, capability // 10) not in SHORT_BLOCKS or block <= LEAST_BLOCK:
        return launch
    return dataclasses.replace(launch, constants={**launch.constants, "block_n": block // 2})


@dataclasses.dataclass(frozen=True)
class Plan:
    """Buffers by name, and launches in order."""

    buffers: dict[str, Buffer]
    launches: tuple[Launch, ...]


KERNEL_MODULES = {
    "summarise": "summarise", "select": "select", "attend": "attend", "membership": "rest", "rest": "rest",
    "metric": "merge", "partners": "merge", "suitors": "merge", "pairs": "merge", "merge": "merge",
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
        dtype: element type of the first input, such as "float16".
        capability: compute capability of the GPU times ten, such as 87.
    """
    if name not in OPERATORS_PLANNED:
        return [f"there is no Triton kernel for {name}"]
    op = OPERATORS[name]
    reasons = op.refusals(attributes, shapes)
    if dtype not in op.inputs[0].dtypes:
        reasons.append(f"{op.inputs[0].name} must be {', '.join(op.inputs[0].dtypes)}, got {dtype}")
    if capability < LEAST_CAPABILITY:
        reasons.append(f"compute capability {capability / 10} is below {LEAST_CAPABILITY / 10}")
    return reasons or _size_refusals(attributes, shapes)


def _size_refusals(attributes: Mapping[str, AttributeValue], shapes: Sequence[Sequence[int]]) -> list[str]:
    batch, tokens, packed = shapes[0]
    heads = int(attributes.get("num_heads", 1))
    sizes = {name: int(attributes[name]) for name in ("tile", "probe") if name in attributes}
    columns = tokens - int(attributes.get("num_prefix", 0))
    largest = {"qkv" if attributes else "x": tokens * packed}  # MergeTokens has none
    if attributes:
        sizes |= {"width": packed // (3 * heads)}
    if "merged" in attributes or "probe" in attributes:
        sizes |= {"patches": columns}
    if "probe" in attributes:
        sizes |= {"channels": shapes[2][2]}
    elif "cell" in attributes:
        tiles, cell = shapes[2][2], int(attributes["cell"])
        largest |= {"membership": tiles * (tokens + 16)}
        chunks = math.ceil(sizes["tile"] / 16)  # of a tile, at most
        largest |= {"cells": tiles * chunks * math.ceil(columns / cell) * sizes["width"]} if cell else {}
    names = {
        "width": "head dimension",
        "channels": "predictor channels",
        "tile": "tile",
        "probe": "probe",
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
