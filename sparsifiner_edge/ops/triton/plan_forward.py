"""Plans of KeySelect, of SparseAttention, and of a layer of both in three launches; see `plan.py`."""

from __future__ import annotations

import math
from statistics import NormalDist

from sparsifiner_edge.ops.operator import Attributes, Shapes
from sparsifiner_edge.ops.schema import DEVIATION_FLOOR
from sparsifiner_edge.ops.triton.plan import Buffer, Launch, Plan, power_of_two
from sparsifiner_edge.ops.triton.plan_sizes import (
    LOG2_E,
    LaunchSizes,
    buffers_of,
    sizes_of_attention,
    sizes_of_selection,
)

MOST_COLUMNS, LEAST_COLUMNS = 64, 8
"""Probes that a program of `select` asks by in one product; the most only where that leaves many programs."""
MOST_NUMBERS = 4
"""Products that it asks by for each tile, where it can: their running sums are held in registers."""
FEW_PROGRAMS, MANY_PROGRAMS = 32, 192
"""Fewer would leave multiprocessors idle: then a program asks by fewer probes. Four for each head of each image, but
between these: where there are many, the GPU is taken to be large.
"""
THREADS = 128
"""Of a program of `select`."""
PARTIALS = 16
"""Partial softmaxes that a prefix query reads at once."""
MOST_GROUP, MOST_SCORES = 4, 12288
"""Tiles that a program of `select` looks at together; scores that it holds in registers, unless one tile has more."""
BLOCK_T = 16
"""Entries of a block at the end of a list, where they are masked: more would not fit into registers."""
HELD = 48
"""Patches whose values a warp of `summarise` holds in registers until their mean is known: as many registers."""
PROBES_EACH = 32
"""Of a program of `summarise`: each reads both projections."""
AT_ONCE = 8
"""Queries of a probe whose loads are under way together."""


def plan_select(shapes: Shapes, attributes: Attributes, dtype: str) -> Plan:
    """KeySelect: qkv, sizes where merged, proj_q, proj_k (float32) -> indices. Two launches."""
    s = sizes_of_selection(shapes, attributes, dtype)
    launches = _summarise(s, selecting=True, attending=False), _select(s)
    return Plan(_qkv(s) | _selection_buffers(s, shapes), launches)


def plan_attend(shapes: Shapes, attributes: Attributes, dtype: str) -> Plan:
    """SparseAttention: qkv, sizes where merged, indices -> output."""
    s = sizes_of_attention(shapes, attributes, dtype)
    indices = buffers_of(Buffer("indices", "int32", (s.batch, s.heads, s.tiles, s.keys), "input"))
    first = [_summarise(s, selecting=False, attending=True)] if s.prefix or s.marks else []
    return Plan(_qkv(s) | indices | _attention_buffers(s), (*first, *_attending(s)))


def make_a_layer(selection: Attributes, attention: Attributes) -> bool:
    """Whether an attention that reads a selection's lists can be launched with it."""
    same = ("num_heads", "num_prefix", "tile", "cell", "scale")
    return attention["prefix_keys"] == 1 and all(selection[name] == attention[name] for name in same)


def plan_layer(shapes: Shapes, attributes: Attributes, dtype: str) -> Plan:
    """KeySelect and the SparseAttention that reads its lists, where they `make_a_layer`.

    Three launches where `attend` has room for the cells (`LaunchSizes.marks`), else five.

    Args:
        shapes, attributes: of KeySelect; shapes of sizes where merged.
    """
    s = sizes_of_selection(shapes, attributes, dtype)
    return Plan(
        _qkv(s) | _selection_buffers(s, shapes) | _attention_buffers(s),
        (_summarise(s, selecting=True, attending=True), _select(s), *_attending(s)),
    )


def _attending(s: LaunchSizes) -> list[Launch]:
    """What follows lists and summaries: one launch, or three with more cells than `attend` has room for."""
    return [*([membership(s), rest(s)] if s.cells and not s.marks else []), _attend(s)]


def _qkv(s: LaunchSizes) -> dict[str, Buffer]:
    made = buffers_of(Buffer("qkv", s.dtype, (s.batch, s.tokens, 3 * s.heads * s.width), "input"))
    return made | buffers_of(Buffer("sizes", "float32", (s.batch, s.tokens), "input")) if s.merged else made


def _selection_buffers(s: LaunchSizes, shapes: Shapes) -> dict[str, Buffer]:
    lead, depth, dtype = (s.batch, s.heads), s.depth, "float16" if s.half else "float32"
    buffers = [
        Buffer("proj_q", "float32", tuple(shapes[-2]), "input"),
        Buffer("proj_k", "float32", tuple(shapes[-1]), "input"),
        Buffer("indices", "int32", (*lead, s.tiles, s.keys), "output"),
        Buffer("probes", dtype, (*lead, s.asking, depth), "scratch"),
        Buffer("projected", dtype, (*lead, s.patches, depth), "scratch"),
        Buffer("scores", "float32", (*lead, s.tiles, _score_blocks(s)[-1]), "scratch"),
    ]
    if s.value_power:
        buffers.append(Buffer("deviation", "float32", (*lead, s.patches), "scratch"))
    return buffers_of(*buffers)


def _attention_buffers(s: LaunchSizes) -> dict[str, Buffer]:
    lead = (s.batch, s.heads)
    buffers = [Buffer("output", s.dtype, (s.batch, s.tokens, s.heads * s.width), "output")]
    if s.prefix:
        parts = (*lead, s.blocks, s.prefix)
        buffers.append(Buffer("partial_out", "float32", (*parts, s.width), "scratch"))
        buffers.append(Buffer("partial_stats", "float32", (*parts, 2), "scratch"))
    if s.marks:
        summed = (*lead, s.cells + s.prefix)
        buffers.append(Buffer("cell_sums", s.summed, (*summed, 2, s.width), "scratch"))
        buffers.append(Buffer("cell_sizes", "float32", summed, "scratch"))
    means = rest_buffers(s) | membership_buffers(s) if s.cells and not s.marks else {}
    return buffers_of(*buffers) | means


def rest_buffers(s: LaunchSizes) -> dict[str, Buffer]:
    """What each tile left of each cell."""
    shape = (s.batch, s.heads, s.tiles, s.cells)
    return buffers_of(
        Buffer("rest_keys", s.dtype, (*shape, s.width), "scratch"),
        Buffer("rest_values", s.dtype, (*shape, s.width), "scratch"),
        Buffer("rest_sizes", "float32", shape, "scratch"),
    )


def membership_buffers(s: LaunchSizes) -> dict[str, Buffer]:
    """Which patches each tile selected."""
    return buffers_of(Buffer("member", "int8", (s.batch, s.heads, s.tiles, s.pitch), "scratch"))


def given(made: bool, *names: str) -> dict[str, str | None]:
    """Arguments that are buffers of the same name, where they are made."""
    return {name: name if made else None for name in names}


def rest_arguments(s: LaunchSizes) -> dict[str, str | None]:
    """The buffers of `rest_buffers`, where there are cells."""
    return given(s.cells > 0, "rest_keys", "rest_values", "rest_sizes")


def _summarise(s: LaunchSizes, selecting: bool, attending: bool) -> Launch:
    deviating, marking = selecting and s.value_power > 0, attending and s.marks > 0
    block_g = power_of_two(
        s.asking if s.probe else 1, most=PROBES_EACH if s.half and s.width <= 64 else PROBES_EACH // 2
    )
    rounds, last, warps = _blocks_of_a_cell(s)
    return Launch(
        "summarise",
        (s.blocks + (math.ceil(s.asking / block_g) if selecting else 0), s.heads, s.batch),
        given(True, "qkv") | given(s.merged, "sizes") | given(selecting, "proj_q", "proj_k", "probes", "projected")
        | given(deviating, "deviation") | given(marking, "cell_sums", "cell_sizes")
        | given(attending and s.prefix > 0, "partial_out", "partial_stats"),
        s.constants("tokens", "prefix", "channels", "run", "blocks", "cells", "value_power", "block_p")
        | {"probe": s.probe or 1, "at_once": min(s.probe or 1, AT_ONCE), "floor": DEVIATION_FLOOR}
        | {"factor": s.scale * LOG2_E, "rounds": rounds, "last": last, "block_g": block_g, "unit": s.unit}
        | {"block_f": power_of_two(s.prefix, least=8), "block_c": power_of_two(s.channels), "depth": s.depth},
        warps=warps,
        stages=1,
    )  # fmt: skip


def _blocks_of_a_cell(s: LaunchSizes) -> tuple[int, int, int]:
    """Whole blocks of a program of `summarise`, patches of the block behind them, and warps: as few as hold a cell's
    values, since each reads the whole projection. 0, 0 where they are read again: other types and widths need the
    registers for their products.
    """
    if not s.half or s.width > 64:
        return 0, 0, 8
    rounds = (s.run - 1) // s.block_p
    last = power_of_two(s.run - rounds * s.block_p)
    held, plain = rounds * s.block_p + last, s.dtype == "float16" and s.channels <= 32
    warps = 2 if plain and held <= (64 if s.merged else 2 * HELD) else 4
    return (rounds, last, warps) if held <= warps * (HELD if plain else HELD // 2) else (0, 0, warps)


def _probes_at_once(s: LaunchSizes) -> int:
    """Of a program of `select`."""
    lanes = s.batch * s.heads
    if lanes * s.asking / MOST_COLUMNS >= MANY_PROGRAMS:
        return MOST_COLUMNS
    wanted = min(max(FEW_PROGRAMS, 4 * lanes), MANY_PROGRAMS)
    columns = MOST_COLUMNS // 2
    while columns > max(LEAST_COLUMNS, s.tile // s.probe / MOST_NUMBERS) and lanes * s.asking / columns < wanted:
        columns //= 2
    return columns


def _tiles_at_once(s: LaunchSizes) -> tuple[int, int]:
    """Of a program of `select`, and products that it asks by for each."""
    per_tile, columns = s.tile // s.probe, _probes_at_once(s)
    numbers = math.ceil(per_tile / columns)
    return columns // power_of_two(math.ceil(per_tile / numbers), least=1), numbers


def _score_blocks(s: LaunchSizes) -> tuple[int, int, int]:
    """Tiles whose scores are looked at together, threads for each, and scores from one tile to the next."""
    group = min(_tiles_at_once(s)[0], MOST_GROUP)
    while group > 1 and group * s.patches > MOST_SCORES:
        group //= 2
    lanes = THREADS // group
    whole = max(8 * lanes, 2 * s.entries)  # a sector of L2 for each thread, and blocks of keys
    return group, lanes, math.ceil(s.patches / whole) * whole


def _select(s: LaunchSizes) -> Launch:
    group, lanes, pitch = _score_blocks(s)
    share, numbers = _tiles_at_once(s)
    constants = s.constants("tokens", "prefix", "probe", "tiles", "keys")
    del constants["width"], constants["block_d"]
    normal, quantile = NormalDist(), 1 - (s.keys - 0.5) / s.patches
    rarity = 1 / (s.patches * normal.pdf(normal.inv_cdf(quantile)))
    return Launch(
        "select",
        (math.ceil(s.tiles / share), s.heads, s.batch),
        given(s.merged, "sizes") | given(True, "probes", "projected") | given(s.value_power > 0, "deviation")
        | given(True, "scores", "indices"),
        constants
        | {"per_tile": s.tile // s.probe, "numbers": numbers, "share": share, "pitch": pitch, "group": group}
        | {"normal": normal.inv_cdf(quantile), "rarity": rarity, "lanes": lanes}
        # So that columns of a thread, two of each eight, are of one tile as far as there are such.
        | {"beside": max(1, min(8 // share, _probes_at_once(s) // share)), "block_g": _probes_at_once(s)}
        | {"block_n": 2 * s.entries, "block_c": power_of_two(s.channels), "depth": s.depth},
    )  # fmt: skip


def membership(s: LaunchSizes) -> Launch:
    """Which patches each tile selected."""
    constants = {name: getattr(s, name) for name in ("heads", "tiles", "keys", "columns", "pitch")}
    return Launch(
        "membership",
        (s.tiles, s.heads, s.batch),
        {"indices": "indices", "member": "member"},
        {**constants, "block_n": power_of_two(s.pitch, most=1024)},
    )


def rest(s: LaunchSizes) -> Launch:
    """What each tile left of each cell."""
    block_m = power_of_two(s.tiles, most=64 if s.half and s.width <= 64 else 32)
    return Launch(
        "rest",
        (s.cells * math.ceil(s.tiles / block_m), s.heads, s.batch),
        given(True, "qkv") | given(s.merged, "sizes") | given(True, "member") | rest_arguments(s),
        s.constants("tokens", "prefix", "tiles", "cell", "cells", "pitch")
        | {"block_m": block_m, "block_n": power_of_two(s.cell, most=s.entries)},
    )


def _attend(s: LaunchSizes) -> Launch:
    marking = s.marks > 0
    # Four warps of 32 rows each, if lists are long: they read keys for twice the rows, but their products must fit.
    tall = s.rows > 64 and s.width <= 64 and s.keys >= 128
    block_n = s.entries // 2 if tall else s.entries
    means = given(s.cells > 0 and not marking, "rest_keys", "rest_values", "rest_sizes")
    return Launch(
        "attend",
        (s.prefix + s.tiles * s.chunks, s.heads, s.batch),
        given(True, "qkv") | given(s.merged, "sizes") | given(True, "indices")
        | given(marking, "cell_sums", "cell_sizes") | means
        | given(s.prefix > 0, "partial_out", "partial_stats") | given(True, "output"),
        s.constants("tokens", "prefix", "first", "tile", "tiles", "keys", "cells", "chunks", "blocks")
        | {"cell": s.cell if marking else 0, "factor": s.scale * LOG2_E, "unit": s.unit}
        | {"block_m": s.rows, "block_n": block_n}
        | {"block_t": power_of_two(s.keys % block_n, most=BLOCK_T), "block_b": PARTIALS}
        | {"block_f": power_of_two(s.prefix, least=1)}
        | {"block_r": power_of_two(s.cells, most=s.entries)},
        warps=8 if s.width > 64 or (s.rows > 64 and not tall) else 4,
        # Three stages: a block's list is fetched one block ahead of its keys and values.
        stages=3 if s.half else 2 if s.wide else 1,
    )  # fmt: skip
