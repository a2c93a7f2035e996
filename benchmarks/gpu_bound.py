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
from sparsifiner_edge.ops.triton.plan import Launch, Plan
from sparsifiner_edge.ops.triton.plan_forward import plan_layer

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


def _summarise(c: dict[str, Any]) -> tuple[int, int]:
    patches = c["tokens"] - c["prefix"]
    blocks = -(-patches // c["run"])
    keys = 2 * patches * c["block_d"] * c["block_c"]  # high and low parts of the projection
    probes = blocks * c["block_g"] * c["block_d"] * (2 * c["block_p"] + 3 * c["block_c"])
    return keys + probes + 2 * c["block_f"] * patches * c["block_d"], c["prefix"] * patches


def _select(c: dict[str, Any]) -> tuple[int, int]:
    pairs = c["tiles"] * c["sub"] * c["numbers"] * (c["tokens"] - c["prefix"])
    return 3 * pairs * c["block_c"], pairs


def _attend(c: dict[str, Any]) -> tuple[int, int]:
    full = c["keys"] // c["block_n"] * c["block_n"]
    listed = full - (full - c["keys"]) // c["block_t"] * c["block_t"]
    pairs = c["tiles"] * c["block_m"] * (listed + c["block_r"])
    return 2 * (pairs + c["tiles"] * c["block_r"] * listed) * c["block_d"], pairs


_WORK = {"summarise": _summarise, "select": _select, "attend": _attend}
"""Multiply-accumulates and exponentials of a kernel for one head of one image."""


def bound(tokens: int, keep: float, tile: int = 64) -> dict[str, Any]:
    """Bounds in milliseconds at batch x heads 48, selection included, and how often dense attention's bound fits."""
    patches, probe = tokens - 1, min(16, tile)
    sparsity = SparsityConfig(keep=keep, tile=tile, probe=probe, cells=25, channels=CHANNELS)
    layout, scale = sparsity.layout(patches), WIDTH**-0.5
    qkv = (BATCH, tokens, 3 * HEADS * WIDTH)
    selection = {
        "num_heads": HEADS, "num_prefix": 1, "tile": tile, "cell": layout.cell, "scale": scale, "probe": probe,
        "keys": layout.keys, "value_power": sparsity.value_power,
    }  # fmt: skip
    plan = plan_layer([qkv, *[(HEADS, WIDTH, CHANNELS)] * 2], selection, "float16")
    written = {step.kernel: launch_seconds(plan, step) for step in plan.launches}
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
