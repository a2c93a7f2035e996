"""Schedules: the kernels that run an operator, their order and their buffers.

PyTorch and the ahead-of-time compilation use the same schedules. A schedule (`schedule_layer`, `schedule_merge`)
depends only on attributes, shapes and element type, and needs neither torch nor Triton. Except for `fit`, launches are
the same for every compute capability. All sizes are compile-time constants, so a kernel takes only pointers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from sparsifiner_edge.ops.kernels import TRITON, TRITON_TYPES
from sparsifiner_edge.ops.operator import Attributes
from sparsifiner_edge.ops.schema import OPERATORS

SHORT_BLOCKS = {("select", 10), ("attend", 12)}
"""Pairs of kernel and major compute capability where blocks of full length would exceed the registers."""
LEAST_BLOCK = 16
"""Minimum number of entries per block, required by the products of the tensor cores."""
LEAST_CAPABILITY = 80
"""Minimum compute capability times ten. Below it, Triton does not use tensor cores."""
MOST_BACKGROUND = 32
"""Maximum number of background tokens and prefix tokens together. `attend` has no registers for more sums."""
MOST_WIDTH = {"KeySelect": 64, "MatchTokens": 128}
"""Maximum head dimension, by operator."""
MOST = {"patches": 16384, "tile": 128, "query_pool": 64, "channels": 64}
"""Maximum number of patches, tile, query pool and predictor channels.

Larger numbers of patches are untested. A program processes whole query pools, which limits their length.
"""
_GRID_LIMIT = 65535
"""CUDA limit of the second and third grid dimension."""
_OFFSET_LIMIT = 2**31
"""Limit of elements per image, because offsets within the tensors of one image are 32-bit integers."""

Constant: TypeAlias = int | float
"""Compile-time constant of a kernel."""


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A contiguous tensor of a schedule.

    Attributes:
        name: Name of the buffer.
        dtype: Element type, such as "float16".
        shape: Shape.
        role: "input", "output" or "scratch" (written before it is read).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: Name of the kernel function without the suffix `_kernel`; see `compile.kernel`.
        grid: Number of programs in x, y and z.
        arguments: Pointer parameters of the kernel in order, each with the name of its buffer, or None if this variant
            of the kernel does not use the parameter.
        constants: Compile-time constants of the kernel.
        warps: Number of warps (32 threads each) per program.
        stages: Depth of the software pipeline.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, str | None]
    constants: Mapping[str, Constant]
    warps: int = 4
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Buffers and launches of one or more operators.

    Attributes:
        buffers: Buffers by name.
        launches: Launches in order.
    """

    buffers: dict[str, Buffer]
    launches: tuple[Launch, ...]


def fit(launch: Launch, capability: int) -> Launch:
    """Return the launch for a compute capability (times ten), with shorter blocks if `SHORT_BLOCKS` lists it."""
    return shorten(launch) if (launch.kernel, capability // 10) in SHORT_BLOCKS else launch


def shorten(launch: Launch) -> Launch:
    """Return the launch with blocks of half length, or unchanged if its blocks have the minimum length."""
    block = int(launch.constants.get("block_n", 0))
    if block <= LEAST_BLOCK:
        return launch
    return dataclasses.replace(launch, constants={**launch.constants, "block_n": block // 2})


def refusals(
    name: str, attributes: Attributes, shapes: Sequence[Sequence[int]], dtype: str, capability: int
) -> list[str]:
    """Return the reasons why the Triton kernels cannot run an operator, or an empty list if they can.

    Args:
        name: Name of the operator; KeySelect stands for the layer of KeySelect and the SparseAttention that reads its
            key lists.
        attributes: Attributes of the operator.
        shapes: Shapes of the inputs, in the order of the schema.
        dtype: Element type of the first input, such as "float16".
        capability: Compute capability of the GPU times ten, such as 87.
    """
    if name == "SparseAttention":
        return ["it runs only together with the KeySelect whose key lists it reads"]
    if name not in TRITON:
        return [f"there is no Triton kernel for {name}"]
    reasons = OPERATORS[name].refusals(attributes, shapes)
    if dtype not in TRITON_TYPES:
        reasons.append(f"{OPERATORS[name].inputs[0].name} must be {' or '.join(TRITON_TYPES)}, got {dtype}")
    if capability < LEAST_CAPABILITY:
        reasons.append(f"compute capability {capability / 10} is below {LEAST_CAPABILITY / 10}")
    return reasons or _size_refusals(name, attributes, shapes)


def _size_refusals(name: str, attributes: Attributes, shapes: Sequence[Sequence[int]]) -> list[str]:
    """Return the reasons why the sizes exceed the limits of the kernels."""
    batch, tokens, packed = shapes[0]
    reasons = []
    if tokens * packed >= _OFFSET_LIMIT:
        reasons.append(f"the first input has {tokens * packed} elements per image, the limit is 2^31")
    if batch > _GRID_LIMIT:
        reasons.append(f"batch {batch} exceeds {_GRID_LIMIT}")
    if name == "MergeTokens":
        return reasons
    a = {key: int(value) for key, value in attributes.items()}
    width, patches = packed // (3 * a["num_heads"]), tokens - a["num_prefix"]
    if width > MOST_WIDTH[name]:
        reasons.append(f"head dimension {width} exceeds {MOST_WIDTH[name]}")
    sizes = {"patches": patches} | {key: a[key] for key in ("tile", "query_pool") if key in a}
    if name == "KeySelect":
        sizes["channels"] = shapes[2][2]
        if not a["key_pool"]:
            reasons.append("key_pool 0 (no background tokens) is not supported")
        elif (background := -(-patches // a["key_pool"])) + a["num_prefix"] > MOST_BACKGROUND:
            prefix = a["num_prefix"]
            reasons.append(
                f"{background} background tokens and {prefix} prefix tokens exceed the limit of {MOST_BACKGROUND}"
            )
    return reasons + [f"{key} {value} exceeds {MOST[key]}" for key, value in sizes.items() if value > MOST[key]]


def power_of_two(size: int, least: int = 16, most: int = 1 << 30) -> int:
    """Return the smallest power of two that is at least `size`, clamped to `least` and `most`."""
    return min(max(least, 1 << max(size - 1, 0).bit_length()), most)
