"""Schedule of a layer: KeySelect and the SparseAttention that reads its lists, in three launches: `schedule.py`."""

from __future__ import annotations

import math
from statistics import NormalDist

from sparsifiner_edge.ops.operator import Attributes, Shapes
from sparsifiner_edge.ops.schema import DEVIATION_FLOOR
from sparsifiner_edge.ops.triton.schedule import Buffer, Constant, Launch, Schedule, power_of_two

LOG2_E = math.log2(math.e)
ENTRIES = 64
"""Keys of a block: as many as leave accumulators and operands in registers."""
MOST_COLUMNS, LEAST_COLUMNS = 64, 8
"""Probes that a program of `select` asks by, of whole tiles; the most only where that leaves many programs."""
FEW_PROGRAMS, MANY_PROGRAMS = 32, 192
"""Fewer would leave multiprocessors idle: then a program asks by fewer probes. Four for each head of each image, but
between these: where there are many, the GPU is taken to be large.
"""
THREADS = 128
"""Of a program of `select`."""
MOST_GROUP, MOST_SCORES = 4, 12288
"""Tiles that a program of `select` looks at together; scores that it holds in registers, unless one tile has more."""
BLOCK_T = 16
"""Entries of a block at the end of a list, where they are masked: more would not fit into registers."""
PROBES_EACH = 32
"""Of a program of `summarise`: each reads both projections."""


def schedule_layer(shapes: Shapes, attributes: Attributes, dtype: str) -> Schedule:
    """KeySelect and the SparseAttention that reads its lists, where they `make_a_layer`.

    Args:
        shapes, attributes: of KeySelect, as `refusals` takes them; shapes of sizes only where tokens were merged.
        dtype: "float16" or "bfloat16".
    """
    s = _Sizes(shapes, attributes, dtype)
    return Schedule(_buffers(s, shapes), (_summarise(s), _select(s), _attend(s)))


def make_a_layer(selection: Attributes, attention: Attributes) -> bool:
    """Whether an attention that reads a selection's lists can be launched with it."""
    same = ("num_heads", "num_prefix", "tile", "cell", "scale")
    return attention["prefix_keys"] == 1 and all(selection[name] == attention[name] for name in same)


class _Sizes:
    """Sizes that the launches share, by the names of the kernels' constants; symbols as in `schema.py`.

    Attributes:
        merged: whether sizes are read, as some are not 1. patches: tokens that are no prefix. tiles: that share a list.
        cells: of the background, and programs of `summarise` that have patches. asking: probes; per_tile: of a tile.
        depth: from one row of what is projected to the next: its channels, in pieces of 16 bytes.
        summed: type of the sums of cells. Without sizes a cell's float16 mean is as exact as its keys and values are.
        unit: of these sums: in float16 they are no greater in it than what is summed.
    """

    def __init__(self, shapes: Shapes, attributes: Attributes, dtype: str) -> None:
        self.batch, self.tokens, packed = shapes[0]
        names = ("num_heads", "num_prefix", "tile", "keys", "cell", "probe")
        self.heads, self.prefix, self.tile, self.keys, self.cell, self.probe = (int(attributes[x]) for x in names)
        self.scale, self.value_power = float(attributes["scale"]), float(attributes["value_power"])
        self.width, self.channels, self.dtype = packed // (3 * self.heads), shapes[-1][2], dtype
        self.merged, self.patches = len(shapes) == 4, self.tokens - self.prefix
        self.tiles, self.cells, self.asking = (math.ceil(self.patches / x) for x in (self.tile, self.cell, self.probe))
        self.per_tile, self.depth = self.tile // self.probe, math.ceil(self.channels / 8) * 8
        self.summed = dtype if dtype == "float16" and not self.merged else "float32"
        self.unit = float(power_of_two(self.cell, least=1)) if self.summed == "float16" else 1.0

    def constants(self, *names: str) -> dict[str, Constant]:
        """Constants of a kernel by name."""
        return {name: getattr(self, name) for name in ("tokens", "heads", "prefix", *names)}


def _buffers(s: _Sizes, shapes: Shapes) -> dict[str, Buffer]:
    lead, summed, parts = (s.batch, s.heads), s.cells + s.prefix, (s.cells, s.prefix)
    buffers: list[tuple[str, str, tuple[int, ...], str, bool]] = [
        ("qkv", s.dtype, (s.batch, s.tokens, 3 * s.heads * s.width), "input", True),
        ("sizes", "float32", (s.batch, s.tokens), "input", s.merged),
        ("proj_q", "float32", tuple(shapes[-2]), "input", True),
        ("proj_k", "float32", tuple(shapes[-1]), "input", True),
        ("indices", "int32", (*lead, s.tiles, s.keys), "output", True),
        ("probes", "float16", (*lead, s.asking, s.depth), "scratch", True),
        ("projected", "float16", (*lead, s.patches, s.depth), "scratch", True),
        ("scores", "float32", (*lead, s.tiles, _score_blocks(s)[-1]), "scratch", True),
        ("deviation", "float32", (*lead, s.patches), "scratch", True),
        ("output", s.dtype, (s.batch, s.tokens, s.heads * s.width), "output", True),
        ("partial_out", "float32", (*lead, *parts, s.width), "scratch", s.prefix > 0),
        ("partial_stats", "float32", (*lead, *parts, 2), "scratch", s.prefix > 0),
        ("cell_sums", s.summed, (*lead, summed, 2, s.width), "scratch", True),
        ("cell_sizes", "float32", (*lead, summed), "scratch", True),
    ]
    return {name: Buffer(name, dtype, shape, role) for name, dtype, shape, role, there in buffers if there}


def _arguments(s: _Sizes, names: str) -> dict[str, str | None]:
    """Arguments that are buffers of the same name, or None where there is no such buffer."""
    there = {"sizes": s.merged, "partial_out": s.prefix > 0, "partial_stats": s.prefix > 0}
    return {name: name if there.get(name, True) else None for name in names.split()}


def _summarise(s: _Sizes) -> Launch:
    block_g = power_of_two(s.asking, most=PROBES_EACH)
    return Launch(
        "summarise",
        (s.cells + math.ceil(s.asking / block_g), s.heads, s.batch),
        _arguments(
            s,
            "qkv sizes proj_q proj_k probes projected deviation cell_sums cell_sizes partial_out partial_stats",
        ),
        s.constants("width", "channels", "probe", "cell", "cells", "value_power", "unit", "depth")
        | {"floor": DEVIATION_FLOOR, "factor": s.scale * LOG2_E, "block_p": power_of_two(s.cell, most=ENTRIES)}
        | {"block_g": block_g, "block_f": power_of_two(s.prefix, least=8), "block_d": power_of_two(s.width)}
        | {"block_c": power_of_two(s.channels)},
        # Few warps: each reads the whole projection, of which bfloat16 has two parts.
        warps=2 if s.dtype == "float16" and s.channels <= 32 else 4,
        stages=1,
    )


def _probes_at_once(s: _Sizes) -> int:
    """Of a program of `select`, with places for those that its tiles lack."""
    lanes, least = s.batch * s.heads, power_of_two(s.per_tile, least=LEAST_COLUMNS)
    if lanes * s.asking / MOST_COLUMNS >= MANY_PROGRAMS:
        return max(MOST_COLUMNS, least)
    wanted, columns = min(max(FEW_PROGRAMS, 4 * lanes), MANY_PROGRAMS), max(MOST_COLUMNS // 2, least)
    while columns > least and lanes * s.asking / columns < wanted:
        columns //= 2
    return columns


def _tiles_at_once(s: _Sizes) -> int:
    """Of a program of `select`."""
    return _probes_at_once(s) // power_of_two(s.per_tile, least=1)


def _score_blocks(s: _Sizes) -> tuple[int, int, int]:
    """Tiles whose scores are looked at together, threads for each, and scores from one tile to the next."""
    group = min(_tiles_at_once(s), MOST_GROUP)
    while group > 1 and group * s.patches > MOST_SCORES:
        group //= 2
    lanes = THREADS // group
    whole = max(8 * lanes, 2 * ENTRIES)  # a sector of L2 for each thread, and blocks of keys
    return group, lanes, math.ceil(s.patches / whole) * whole


def _select(s: _Sizes) -> Launch:
    (group, lanes, pitch), share, block_g = _score_blocks(s), _tiles_at_once(s), _probes_at_once(s)
    normal, quantile = NormalDist(), 1 - (s.keys - 0.5) / s.patches
    rarity = 1 / (s.patches * normal.pdf(normal.inv_cdf(quantile)))
    return Launch(
        "select",
        (math.ceil(s.tiles / share), s.heads, s.batch),
        _arguments(s, "sizes probes projected deviation scores indices"),
        s.constants("probe", "per_tile", "tiles", "keys", "depth")
        | {"normal": normal.inv_cdf(quantile), "rarity": rarity, "share": share}
        # So that columns of a thread, two of each eight, are of one tile as far as there are such.
        | {"beside": max(1, min(8 // share, block_g // share)), "pitch": pitch, "group": group, "lanes": lanes}
        | {"block_g": block_g, "block_n": 2 * ENTRIES, "block_c": power_of_two(s.channels)},
    )


def _attend(s: _Sizes) -> Launch:
    rows = power_of_two(s.tile)
    # Four warps of 32 rows each, if lists are long: they read keys for twice the rows, but their products must fit.
    tall = rows > 64 and s.keys >= 128
    block_n = ENTRIES // 2 if tall else ENTRIES
    return Launch(
        "attend",
        (s.prefix + s.tiles, s.heads, s.batch),
        _arguments(s, "qkv sizes indices cell_sums cell_sizes partial_out partial_stats output"),
        s.constants("width", "tile", "tiles", "keys", "cell", "cells", "unit")
        | {"factor": s.scale * LOG2_E, "block_m": rows, "block_n": block_n}
        | {"block_t": power_of_two(s.keys % block_n, most=BLOCK_T)}
        | {"block_f": power_of_two(s.prefix, least=1), "block_d": power_of_two(s.width)},
        warps=8 if rows > 64 and not tall else 4,
        # Three: a block's list is fetched one block ahead of its keys and values.
        stages=3,
    )
