"""Schedules of MatchTokens and MergeTokens, separately or together; see `schedule.py`."""

from __future__ import annotations

import dataclasses
import math

from sparsifiner_edge.ops.operator import Attributes, Shapes
from sparsifiner_edge.ops.triton.schedule import Buffer, Launch, Schedule, power_of_two

OFFSETS = 16
"""Maximum number of window offsets per block in `partners` and `suitors`."""
PRODUCTS = 8192
"""Number of products that a program of `partners` holds at a time: 64 per thread."""
BLOCK_P = 16
"""Number of patches per program of `metric`."""
BLOCK_J = 32
"""Number of odd patches per program of `suitors`."""
BLOCK_M = 8
"""Number of pairs per program of `merge`."""
CHANNELS = 256
"""Maximum number of channels per program of `merge`."""
SEEKERS_OF_WARP = 256
"""Number of even patches per warp of `pairs`: eight per thread, or sixteen where `MOST_WARPS` limits the warps."""
MOST_WARPS = 16
"""Maximum number of warps of `pairs`, so that each thread has 128 registers."""
_CARRIED = ("after", "places", "sizes_out", "places_out")
"""Optional parameters of `merge`, used where it also updates sizes and positions."""


def schedule_merging(shapes: Shapes, attributes: Attributes, dtype: str) -> Schedule:
    """Return the schedule of MatchTokens, MergeTokens and the update of sizes and positions, in five launches.

    Inputs are qkv, sizes, x and places. Outputs are output, sizes_out and places_out.

    Args:
        shapes: Shapes of qkv, sizes and x. If tokens were merged before, also that of places [B,P], the token index of
            each original patch.
        attributes: Attributes of MatchTokens.
        dtype: Element type of qkv and x.
    """
    (batch, tokens, _), whole = shapes[2], shapes[3][1] if shapes[3:] else 0
    patches, rows = tokens - int(attributes["num_prefix"]), tokens - int(attributes["merged"])
    match = schedule_match(shapes[:2], attributes, dtype)
    merge = schedule_merge((shapes[2], shapes[1], (batch, rows, 2)), {}, dtype)
    pairs, last = match.launches[-1], merge.launches[0]
    names = ("after", "places" if whole else None, "sizes_out", "places_out")
    each = power_of_two(math.ceil((whole or patches) / last.grid[0]), least=1)
    launches = (
        *match.launches[:-1],
        dataclasses.replace(pairs, arguments=pairs.arguments | {"after": "after"}),
        dataclasses.replace(
            last,
            arguments=last.arguments | dict(zip(_CARRIED, names, strict=True)),
            constants={**last.constants, "patches": patches, "whole": whole or patches, "block_w": each},
        ),
    )
    buffers = (
        Buffer("after", "int32", (batch, patches), "scratch"),
        Buffer("sizes_out", "float32", (batch, rows), "output"),
        Buffer("places_out", "int32", (batch, whole or patches), "output"),
        *(Buffer("places", "int32", (batch, size), "input") for size in (whole,) if size),
    )
    # `pairs` is in both: the output of MatchTokens takes precedence over the input of MergeTokens.
    return Schedule(merge.buffers | match.buffers | {buffer.name: buffer for buffer in buffers}, launches)


def schedule_match(shapes: Shapes, attributes: Attributes, dtype: str) -> Schedule:
    """Return the schedule of MatchTokens, from qkv and sizes to pairs, in four launches."""
    batch, tokens, packed = shapes[0]
    heads, prefix, merged = (int(attributes[name]) for name in ("num_heads", "num_prefix", "merged"))
    patches, width = tokens - prefix, packed // (3 * heads)
    seekers, sought = math.ceil(patches / 2), patches // 2
    half, block_d = min(int(attributes["window"]) // 2, seekers), power_of_two(width)
    window = {"half": half, "block_o": power_of_two(2 * half, least=2, most=OFFSETS)}
    block_e, block = PRODUCTS // (OFFSETS * block_d), power_of_two(seekers)
    sizes = {"tokens": tokens, "width": width, "prefix": prefix, "block_d": block_d}

    def launch(kernel: str, programs: int, names: str, constants: dict[str, int], warps: int = 4) -> Launch:
        arguments = {name: None if name == "after" else name for name in names.split()}
        return Launch(kernel, (programs, 1, batch), arguments, constants, warps)

    launches = (
        launch("metric", math.ceil(patches / BLOCK_P), "qkv metric", {**sizes, "heads": heads, "block_p": BLOCK_P}),
        launch(
            "partners",
            math.ceil(seekers / block_e),
            "metric sizes best partner",
            {**sizes, **window, "block_e": block_e},
        ),
        launch(
            "suitors",
            math.ceil(sought / BLOCK_J),
            "best partner score suitor",
            {**window, "patches": patches, "block_j": BLOCK_J},
        ),
        launch(
            "pairs",
            1,
            "partner score suitor chosen free pairs after",
            {"tokens": tokens, "prefix": prefix, "merged": merged, "block": block},
            power_of_two(block // SEEKERS_OF_WARP, least=4, most=MOST_WARPS),
        ),
    )
    buffers = (
        Buffer("qkv", dtype, (batch, tokens, packed), "input"),
        Buffer("sizes", "float32", (batch, tokens), "input"),
        Buffer("pairs", "int32", (batch, tokens - merged, 2), "output"),
        Buffer("metric", "float32", (batch, patches, width), "scratch"),
        Buffer("best", "float32", (batch, seekers), "scratch"),
        *(Buffer(name, "int32", (batch, seekers), "scratch") for name in ("partner", "free")),
        *(Buffer(name, "int32", (batch, sought), "scratch") for name in ("score", "suitor", "chosen")),
    )
    return Schedule({buffer.name: buffer for buffer in buffers}, launches)


def schedule_merge(shapes: Shapes, _attributes: Attributes, dtype: str) -> Schedule:
    """Return the schedule of MergeTokens, from x, sizes and pairs to output, in one launch."""
    batch, tokens, channels = shapes[0]
    rows = shapes[2][1]
    buffers = (
        Buffer("x", dtype, (batch, tokens, channels), "input"),
        Buffer("sizes", "float32", (batch, tokens), "input"),
        Buffer("pairs", "int32", (batch, rows, 2), "input"),
        Buffer("output", dtype, (batch, rows, channels), "output"),
    )
    block_c = power_of_two(channels, most=CHANNELS)
    programs = math.ceil(rows / BLOCK_M) * math.ceil(channels / block_c)
    constants = {"tokens": tokens, "channels": channels, "rows": rows, "block_m": BLOCK_M, "block_c": block_c}
    names = {"x": "x", "sizes": "sizes", "pairs": "pairs", **dict.fromkeys(_CARRIED[:2]), "output": "output"}
    arguments, nothing = names | dict.fromkeys(_CARRIED[2:]), dict.fromkeys(("patches", "whole", "block_w"), 1)
    launch = Launch("merge", (programs, 1, batch), arguments, {**constants, **nothing})
    return Schedule({buffer.name: buffer for buffer in buffers}, (launch,))
