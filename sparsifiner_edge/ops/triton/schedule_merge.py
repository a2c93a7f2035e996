"""Schedules of MatchTokens and MergeTokens; see `schedule.py`."""

from __future__ import annotations

import math

from sparsifiner_edge.ops.operator import Attributes, Shapes
from sparsifiner_edge.ops.triton.schedule import Buffer, Launch, Schedule, power_of_two

OFFSETS = 16
"""Of a window, that are looked at together."""
PRODUCTS = 8192
"""That a program of `partners` holds at a time: 64 of a thread."""
BLOCK_P, BLOCK_J, BLOCK_M = 16, 32, 8
"""Patches of a program of `metric`, sought of `suitors`, pairs of `merge`."""
CHANNELS = 256
"""Of a row that a program of `merge` has, at most."""
SEEKERS_OF_WARP, MOST_WARPS = 256, 16
"""Of `pairs`: eight or sixteen of a thread, which has 128 registers at most."""


def schedule_match(shapes: Shapes, attributes: Attributes, dtype: str) -> Schedule:
    """MatchTokens: qkv, sizes -> pairs. Four launches."""
    batch, tokens, packed = shapes[0]
    heads, prefix, merged = (int(attributes[name]) for name in ("num_heads", "num_prefix", "merged"))
    patches, width = tokens - prefix, packed // (3 * heads)
    seekers, sought = math.ceil(patches / 2), patches // 2
    half, block_d = min(int(attributes["window"]) // 2, seekers), power_of_two(width)
    window = {"half": half, "block_o": power_of_two(2 * half, least=2, most=OFFSETS)}
    block_e, block = PRODUCTS // (OFFSETS * block_d), power_of_two(seekers)
    sizes = {"tokens": tokens, "width": width, "prefix": prefix, "block_d": block_d}

    def launch(kernel: str, programs: int, names: str, constants: dict[str, int], warps: int = 4) -> Launch:
        return Launch(kernel, (programs, 1, batch), {name: name for name in names.split()}, constants, warps)

    launches = (
        launch("metric", math.ceil(patches / BLOCK_P), "qkv metric", {**sizes, "heads": heads, "block_p": BLOCK_P}),
        launch(
            "partners", math.ceil(seekers / block_e), "metric sizes best partner",
            {**sizes, **window, "block_e": block_e},
        ),
        launch(
            "suitors", math.ceil(sought / BLOCK_J), "best partner score suitor",
            {**window, "patches": patches, "block_j": BLOCK_J},
        ),
        launch(
            "pairs", 1, "partner score suitor chosen free pairs",
            {"tokens": tokens, "prefix": prefix, "merged": merged, "block": block},
            power_of_two(block // SEEKERS_OF_WARP, least=4, most=MOST_WARPS),
        ),
    )  # fmt: skip
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
    """MergeTokens: x, sizes, pairs -> output. One launch."""
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
    launch = Launch("merge", (programs, 1, batch), {buffer.name: buffer.name for buffer in buffers}, constants)
    return Schedule({buffer.name: buffer for buffer in buffers}, (launch,))
