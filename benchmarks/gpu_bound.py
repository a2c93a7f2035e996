"""Lower bounds of the time that attention takes on an H100, from counts alone: for `kernels_static.py`.

Three resources, each at its peak: products on the matrix units, exponentials, bytes of HBM. "method" is what the method
needs at least (`costs.py`), with perfect overlap of everything. "written" is what our kernels do: padded and split
products, scratch written and read once, each launch bounded by its slowest resource, launches one after the other.
L2 and launch overhead are left out of both, so a bound is never a forecast: real kernels, dense ones too, are slower.
"""

from __future__ import annotations

import math
from typing import Any

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape, layer_costs
from sparsifiner_edge.ops.triton.plan import Launch, Plan, plan_select
from sparsifiner_edge.ops.triton.plan_attention import plan_attend

H100 = {"fp16_flops": 989.4e12, "exponentials": 132 * 16 * 1.83e9, "bytes": 3.35e12}
"""Per second. H100 SXM data sheet (dense fp16, HBM3); 132 multiprocessors x 16 exponentials a cycle at the 1.83 GHz of
the data sheet's peak (CUDA C++ Programming Guide, arithmetic throughput, compute capability 9.0)."""
BATCH, HEADS, WIDTH, CHANNELS = 8, 6, 64, 24
_SIZES = {"float32": 4, "float16": 2, "int32": 4, "int8": 1}


def seconds(macs: float, exponentials: float, moved: float) -> float:
    """Time of the slowest of the three resources."""
    return max(2 * macs / H100["fp16_flops"], exponentials / H100["exponentials"], moved / H100["bytes"])


def launch_seconds(plan: Plan, launch: Launch) -> float:
    """Bound of one launch as it is written."""
    c = launch.constants
    lanes = launch.grid[1] * launch.grid[2]
    macs, exponentials = _WORK[launch.kernel](c) if launch.kernel in _WORK else (0, 0)
    names = {name for name in launch.arguments.values() if name is not None}
    moved = sum(math.prod(plan.buffers[n].shape) * _SIZES[plan.buffers[n].dtype] for n in names)
    return seconds(lanes * macs, lanes * exponentials, moved)


def _pairs(c: dict[str, Any]) -> tuple[int, int]:
    return math.ceil(c["patches"] / c["probe"]), c["patches"]


def _prepare(c: dict[str, Any]) -> tuple[int, int]:
    patches = c["tokens"] - c["prefix"]
    # Three TF32 products, each at half the rate of float16.
    return 3 * 2 * (patches + math.ceil(patches / c["probe"])) * c["block_d"] * c["block_c"], 0


def _lse(c: dict[str, Any]) -> tuple[int, int]:
    probes, patches = _pairs(c)
    return 3 * probes * patches * c["block_c"], probes * patches


def _scores(c: dict[str, Any]) -> tuple[int, int]:
    probes, patches = _pairs(c)
    return 3 * probes * patches * c["block_c"], 0


def _rest(c: dict[str, Any]) -> tuple[int, int]:
    return 2 * c["tiles"] * (c["tokens"] - c["prefix"]) * c["block_d"], 0


def _attend(c: dict[str, Any]) -> tuple[int, int]:
    listed = -(-(c["first"] + c["keys"]) // c["block_n"]) * c["block_n"]
    rest = -(-c["cells"] // c["block_r"]) * c["block_r"]
    pairs = c["tiles"] * c["block_m"] * (listed + rest) + c["block_m"] * c["tokens"]
    return 2 * pairs * c["block_d"], pairs


_WORK = {"prepare": _prepare, "lse": _lse, "scores": _scores, "rest": _rest, "attend": _attend}
"""Multiply-accumulates and exponentials of a kernel for one head of one image."""


def bound(tokens: int, keep: float, tile: int = 64) -> dict[str, Any]:
    """Bounds in milliseconds at batch x heads 48, selection included, and how often dense attention's bound fits."""
    patches, probe = tokens - 1, min(16, tile)
    sparsity = SparsityConfig(keep=keep, tile=tile, probe=probe, cells=25, channels=CHANNELS)
    layout, scale = sparsity.layout(patches), WIDTH**-0.5
    qkv = (BATCH, tokens, 3 * HEADS * WIDTH)
    shared = {"num_heads": HEADS, "num_prefix": 1, "tile": tile, "cell": layout.cell, "scale": scale}
    select = {**shared, "probe": probe, "keys": layout.keys, "value_power": sparsity.value_power}
    plans = (
        plan_select([qkv, *[(HEADS, WIDTH, CHANNELS)] * 2], select, "float16", 90),
        plan_attend(
            [qkv, (BATCH, HEADS, layout.tiles, layout.keys)], {**shared, "prefix_keys": 1}, "float16", 90
        ),
    )  # fmt: skip
    written = {step.kernel: launch_seconds(plan, step) for plan in plans for step in plan.launches}
    dense, method = _method(patches, SparsityConfig(keep=1.0)), _method(patches, sparsity)
    total = sum(written.values())
    return {
        "tokens": tokens, "keep": keep, "tile": tile, "probe": probe, "cells": layout.cells,
        "dense_bound_ms": 1e3 * dense, "method_bound_ms": 1e3 * method, "written_bound_ms": 1e3 * total,
        "written_by_kernel_ms": {name: 1e3 * value for name, value in written.items()},
        "dense_over_method": dense / method, "dense_over_written": dense / total,
    }  # fmt: skip


def _method(patches: int, sparsity: SparsityConfig) -> float:
    """Bound of what the method itself needs, reading qkv and writing the output once."""
    shape = ModelShape(depth=1, heads=HEADS, width=HEADS * WIDTH, hidden=1, prefix=1, patches=patches, patch=14)
    costs = layer_costs(shape, sparsity)[0]
    tokens = patches + 1
    pairs = tokens * tokens
    if sparsity.keep < 1:
        layout = sparsity.layout(patches)
        pairs = patches * (layout.keys + 1 + layout.cells) + tokens + math.ceil(patches / sparsity.probe) * patches
    moved = BATCH * 2 * 4 * tokens * HEADS * WIDTH
    return seconds(BATCH * (costs.predictor + costs.attention + costs.cells), BATCH * HEADS * pairs, moved)
