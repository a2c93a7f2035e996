"""Which kernels run operators, in which order, on which buffers: for torch and for compilation ahead of time.

A schedule (`schedule_layer`, `schedule_merge`) follows from attributes, shapes and element type alone; it needs neither
torch nor Triton, and launches are the same for every compute capability, but for `fit`. Every size is a constant of the
kernel: a kernel takes pointers and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from sparsifiner_edge.ops.kernels import TRITON, TRITON_TYPES
from sparsifiner_edge.ops.operator import Attributes
from sparsifiner_edge.ops.schema import OPERATORS

SHORT_BLOCKS = {("select", 10), ("attend", 12)}
"""Kernels, and major compute capabilities, whose whole blocks take more registers than there are."""
LEAST_BLOCK = 16
"""Entries that a block has at least: a product of the matrix units has."""
LEAST_CAPABILITY = 80
"""Compute capability times ten: below, Triton multiplies without tensor cores."""
MOST_CELLS = 32
"""Cells and prefix tokens together: `attend` has no registers for more sums."""
MOST_WIDTH = {"KeySelect": 64, "MatchTokens": 128}
"""Greatest head dimension."""
MOST = {"patches": 16384, "tile": 128, "probe": 64, "channels": 64}
"""Greatest number of patches (more were never tried), tile, probe (a program's patches hold whole ones), and predictor
channels."""
_GRID_LIMIT = 65535
"""CUDA's limit of a grid's second and third dimension."""
_OFFSET_LIMIT = 2**31
"""Offsets within one image's tensors are 32 bits wide."""


Constant: TypeAlias = int | float
"""Of a kernel, at compile time."""


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A tensor of a schedule, contiguous. role: "input", "output" or "scratch" (written before it is read)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: name of the function without `_kernel`; see `compile.kernel`.
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
class Schedule:
    """Buffers by name, and launches in order."""

    buffers: dict[str, Buffer]
    launches: tuple[Launch, ...]


def fit(launch: Launch, capability: int) -> Launch:
    """A launch as it is for a compute capability (times ten): in blocks half as long where `SHORT_BLOCKS` says so."""
    return shorten(launch) if (launch.kernel, capability // 10) in SHORT_BLOCKS else launch


def shorten(launch: Launch) -> Launch:
    """A launch in blocks half as long, where they can be."""
    block = int(launch.constants.get("block_n", 0))
    if block <= LEAST_BLOCK:
        return launch
    return dataclasses.replace(launch, constants={**launch.constants, "block_n": block // 2})


def refusals(
    name: str, attributes: Attributes, shapes: Sequence[Sequence[int]], dtype: str, capability: int
) -> list[str]:
    """Reasons why the Triton kernels cannot run an operator; empty when they can.

    Args:
        name: the operator; KeySelect stands for its layer, with the SparseAttention that reads its lists.
        attributes, shapes: as in its schema, shapes in the order of its inputs.
        dtype: element type of the first input, such as "float16".
        capability: compute capability of the GPU times ten, such as 87.
    """
    if name == "SparseAttention":
        return ["it runs together with the KeySelect whose lists it reads"]
    if name not in TRITON:
        return [f"there is no Triton kernel for {name}"]
    reasons = OPERATORS[name].refusals(attributes, shapes)
    if dtype not in TRITON_TYPES:
        reasons.append(f"{OPERATORS[name].inputs[0].name} must be {' or '.join(TRITON_TYPES)}, got {dtype}")
    if capability < LEAST_CAPABILITY:
        reasons.append(f"compute capability {capability / 10} is below {LEAST_CAPABILITY / 10}")
    return reasons or _size_refusals(name, attributes, shapes)


def _size_refusals(name: str, attributes: Attributes, shapes: Sequence[Sequence[int]]) -> list[str]:
    batch, tokens, packed = shapes[0]
    reasons = []
    if tokens * packed >= _OFFSET_LIMIT:
        reasons.append(f"the first input has {tokens * packed} elements an image, above 2^31")
    if batch > _GRID_LIMIT:
        reasons.append(f"batch {batch} exceeds {_GRID_LIMIT}")
    if name == "MergeTokens":
        return reasons
    a = {key: int(value) for key, value in attributes.items()}
    width, patches = packed // (3 * a["num_heads"]), tokens - a["num_prefix"]
    if width > MOST_WIDTH[name]:
        reasons.append(f"head dimension {width} exceeds {MOST_WIDTH[name]}")
    sizes = {"patches": patches} | {key: a[key] for key in ("tile", "probe") if key in a}
    if name == "KeySelect":
        sizes["channels"] = shapes[2][2]
        if not a["cell"]:
            reasons.append("lists without cells have no kernels")
        elif -(-patches // a["cell"]) + a["num_prefix"] > MOST_CELLS:
            reasons.append(
                f"{-(-patches // a['cell'])} cells and {a['num_prefix']} prefix tokens exceed {MOST_CELLS} together"
            )
    return reasons + [f"{key} {value} exceeds {MOST[key]}" for key, value in sizes.items() if value > MOST[key]]


def power_of_two(size: int, least: int = 16, most: int = 1 << 30) -> int:
    """The smallest power of two that is at least `size`, between `least` and `most`."""
    return min(max(least, 1 << max(size - 1, 0).bit_length()), most)
