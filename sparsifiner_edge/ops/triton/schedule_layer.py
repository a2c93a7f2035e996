"""Schedule of a layer: KeySelect and the SparseAttention that reads its key lists, in three launches.

See `schedule.py` for the terms.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from sparsifiner_edge.ops.operator import Attributes, Shapes
from sparsifiner_edge.ops.schema import DEVIATION_FLOOR
from sparsifiner_edge.ops.triton.schedule import Buffer, Constant, Launch, Schedule, power_of_two

LOG2_E = math.log2(math.e)
"""Factor from natural to base-2 logits: the kernels use exp2."""
ENTRIES = 64
"""Number of keys per block. With more, accumulators and operands would not fit into registers."""
MOST_COLUMNS = 64
"""Maximum number of pooled queries per program of `select`; used only if that leaves at least `MANY_PROGRAMS`."""
LEAST_COLUMNS = 8
"""Minimum number of pooled queries per program of `select`."""
FEW_PROGRAMS = 32
"""Minimum number of programs that `select` should have; fewer leave multiprocessors idle.

Between this and `MANY_PROGRAMS`, the target is four programs per head and image. If there would be fewer programs, each
one gets fewer pooled queries.
"""
MANY_PROGRAMS = 192
"""Maximum of that target. Where a layer has many heads and images, the GPU is assumed to be large."""
THREADS = 128
"""Number of threads per program of `select`."""
MOST_GROUP = 4
"""Maximum number of tiles whose keys a program of `select` selects together."""
MOST_SCORES = 12288
"""Maximum number of scores that a program of `select` holds in registers, unless a single tile has more."""
BLOCK_T = 16
"""Number of entries per masked block, which completes a key list. Larger blocks would not fit into registers."""
POOLED_QUERIES_EACH = 32
"""Maximum number of pooled queries per program of `summarise`. Each program loads both projections."""


def schedule_layer(shapes: Shapes, attributes: Attributes, dtype: str) -> Schedule:
    """Return the schedule of KeySelect and a SparseAttention with which it can `make_a_layer`.

    Args:
        shapes: Shapes of the inputs of KeySelect; that of the sizes only if tokens were merged.
        attributes: Attributes of KeySelect.
        dtype: Element type of qkv, "float16" or "bfloat16".
    """
    s = _Sizes(shapes, attributes, dtype)
    return Schedule(_buffers(s, shapes), (_summarise(s), _select(s), _attend(s)))


def make_a_layer(selection: Attributes, attention: Attributes) -> bool:
    """Return True if SparseAttention can be launched together with the KeySelect whose key lists it reads."""
    same = ("num_heads", "num_prefix", "tile", "key_pool", "scale")
    return attention["prefix_keys"] == 1 and all(selection[name] == attention[name] for name in same)


class _Sizes:
    """Sizes shared by the launches, named like the constants of the kernels; symbols are those of `schema.py`.

    Attributes:
        batch: Number of images.
        tokens: Number of tokens.
        heads: Number of heads.
        prefix: Number of prefix tokens.
        tile: Number of queries per tile.
        keys: Number of selected keys per tile.
        key_pool: Number of patches per background token.
        query_pool: Number of queries per pooled query.
        scale: Scale of the logits.
        value_power: Weight of the value deviation.
        width: Channels per head.
        channels: Number of predictor channels.
        dtype: Element type of qkv.
        merged: True if sizes are read, because some are not 1.
        patches: Number of patches.
        tiles: Number of tiles.
        background_tokens: Number of background tokens, which is also the number of programs of `summarise` for patches.
        asking: Number of pooled queries.
        per_tile: Number of pooled queries per tile.
        depth: Elements from one projected row to the next: the predictor channels, rounded up to 16 bytes.
        summed: Type of the sums of the key pools. Without sizes, a float16 mean of a pool is as exact as its keys and
            values.
        unit: Divisor of these sums. In float16 it keeps them within the range of the summed values.
    """

    def __init__(self, shapes: Shapes, attributes: Attributes, dtype: str) -> None:
        self.batch, self.tokens, packed = shapes[0]
        names = ("num_heads", "num_prefix", "tile", "keys", "key_pool", "query_pool")
        self.heads, self.prefix, self.tile, self.keys, self.key_pool, self.query_pool = (
            int(attributes[x]) for x in names
        )
        self.scale, self.value_power = float(attributes["scale"]), float(attributes["value_power"])
        self.width, self.channels, self.dtype = packed // (3 * self.heads), shapes[-1][2], dtype
        self.merged, self.patches = len(shapes) == 4, self.tokens - self.prefix
        self.tiles, self.background_tokens, self.asking = (
            math.ceil(self.patches / x) for x in (self.tile, self.key_pool, self.query_pool)
        )
        self.per_tile, self.depth = self.tile // self.query_pool, math.ceil(self.channels / 8) * 8
        self.summed = dtype if dtype == "float16" and not self.merged else "float32"
        self.unit = float(power_of_two(self.key_pool, least=1)) if self.summed == "float16" else 1.0

    def constants(self, *names: str) -> dict[str, Constant]:
        """Return the constants of a kernel by name, including tokens, heads and prefix."""
        return {name: getattr(self, name) for name in ("tokens", "heads", "prefix", *names)}


def _buffers(s: _Sizes, shapes: Shapes) -> dict[str, Buffer]:
    """Return all buffers of the layer by name."""
    lead, summed, parts = (s.batch, s.heads), s.background_tokens + s.prefix, (s.background_tokens, s.prefix)
    buffers: list[tuple[str, str, tuple[int, ...], str, bool]] = [
        ("qkv", s.dtype, (s.batch, s.tokens, 3 * s.heads * s.width), "input", True),
        ("sizes", "float32", (s.batch, s.tokens), "input", s.merged),
        ("proj_q", "float32", tuple(shapes[-2]), "input", True),
        ("proj_k", "float32", tuple(shapes[-1]), "input", True),
        ("indices", "int32", (*lead, s.tiles, s.keys), "output", True),
        ("pooled_queries", "float16", (*lead, s.asking, s.depth), "scratch", True),
        ("projected", "float16", (*lead, s.patches, s.depth), "scratch", True),
        ("scores", "float32", (*lead, s.tiles, _score_blocks(s)[-1]), "scratch", True),
        ("deviation", "float32", (*lead, s.patches), "scratch", True),
        ("output", s.dtype, (s.batch, s.tokens, s.heads * s.width), "output", True),
        ("partial_out", "float32", (*lead, *parts, s.width), "scratch", s.prefix > 0),
        ("partial_stats", "float32", (*lead, *parts, 2), "scratch", s.prefix > 0),
        ("pool_sums", s.summed, (*lead, summed, 2, s.width), "scratch", True),
        ("pool_sizes", "float32", (*lead, summed), "scratch", True),
    ]
    return {name: Buffer(name, dtype, shape, role) for name, dtype, shape, role, there in buffers if there}


def _arguments(s: _Sizes, names: str) -> dict[str, str | None]:
    """Return arguments that map each name to the buffer of that name, or to None if there is no such buffer."""
    there = {"sizes": s.merged, "partial_out": s.prefix > 0, "partial_stats": s.prefix > 0}
    return {name: name if there.get(name, True) else None for name in names.split()}


def _summarise(s: _Sizes) -> Launch:
    """Return the launch that projects keys and queries and summarizes the key pools."""
    block_g = power_of_two(s.asking, most=POOLED_QUERIES_EACH)
    return Launch(
        "summarise",
        (s.background_tokens + math.ceil(s.asking / block_g), s.heads, s.batch),
        _arguments(
            s,
            "qkv sizes proj_q proj_k pooled_queries projected deviation pool_sums pool_sizes partial_out partial_stats",
        ),
        s.constants("width", "channels", "query_pool", "key_pool", "background_tokens", "value_power", "unit", "depth")
        | {"floor": DEVIATION_FLOOR, "factor": s.scale * LOG2_E, "block_p": power_of_two(s.key_pool, most=ENTRIES)}
        | {"block_g": block_g, "block_f": power_of_two(s.prefix, least=8), "block_d": power_of_two(s.width)}
        | {"block_c": power_of_two(s.channels)},
        # Few warps, because each reads the full projection, which has two parts for bfloat16.
        warps=2 if s.dtype == "float16" and s.channels <= 32 else 4,
        stages=1,
    )


def _pooled_queries_at_once(s: _Sizes) -> int:
    """Return the number of pooled queries per program of `select`, including unused columns of its tiles."""
    lanes, least = s.batch * s.heads, power_of_two(s.per_tile, least=LEAST_COLUMNS)
    if lanes * s.asking / MOST_COLUMNS >= MANY_PROGRAMS:
        return max(MOST_COLUMNS, least)
    wanted, columns = min(max(FEW_PROGRAMS, 4 * lanes), MANY_PROGRAMS), max(MOST_COLUMNS // 2, least)
    while columns > least and lanes * s.asking / columns < wanted:
        columns //= 2
    return columns


def _tiles_at_once(s: _Sizes) -> int:
    """Return the number of tiles per program of `select`."""
    return _pooled_queries_at_once(s) // power_of_two(s.per_tile, least=1)


def _score_blocks(s: _Sizes) -> tuple[int, int, int]:
    """Return the layout of the scores in `select`.

    Returns:
        Number of tiles processed together, threads per tile, and scores from one tile to the next.
    """
    group = min(_tiles_at_once(s), MOST_GROUP)
    while group > 1 and group * s.patches > MOST_SCORES:
        group //= 2
    lanes = THREADS // group
    whole = max(8 * lanes, 2 * ENTRIES)  # a multiple of one L2 sector per thread, and of the blocks of keys
    return group, lanes, math.ceil(s.patches / whole) * whole


def _select(s: _Sizes) -> Launch:
    """Return the launch that selects the keys of each tile."""
    (group, lanes, pitch), share, block_g = _score_blocks(s), _tiles_at_once(s), _pooled_queries_at_once(s)
    normal, quantile = NormalDist(), 1 - (s.keys - 0.5) / s.patches
    rarity = 1 / (s.patches * normal.pdf(normal.inv_cdf(quantile)))
    return Launch(
        "select",
        (math.ceil(s.tiles / share), s.heads, s.batch),
        _arguments(s, "sizes pooled_queries projected deviation scores indices"),
        s.constants("query_pool", "per_tile", "tiles", "keys", "depth")
        | {"normal": normal.inv_cdf(quantile), "rarity": rarity, "share": share}
        # The columns of a thread, two of every eight, belong to one tile if it has as many.
        | {"beside": max(1, min(8 // share, block_g // share)), "pitch": pitch, "group": group, "lanes": lanes}
        | {"block_g": block_g, "block_n": 2 * ENTRIES, "block_c": power_of_two(s.channels)},
    )


def _attend(s: _Sizes) -> Launch:
    """Return the launch that computes the attention output."""
    rows = power_of_two(s.tile)
    # With long lists, four warps of 32 rows each: a load of keys serves twice as many rows, but blocks must be half as
    # long to fit into registers.
    tall = rows > 64 and s.keys >= 128
    block_n = ENTRIES // 2 if tall else ENTRIES
    return Launch(
        "attend",
        (s.prefix + s.tiles, s.heads, s.batch),
        _arguments(s, "qkv sizes indices pool_sums pool_sizes partial_out partial_stats output"),
        s.constants("width", "tile", "tiles", "keys", "key_pool", "background_tokens", "unit")
        | {"factor": s.scale * LOG2_E, "block_m": rows, "block_n": block_n}
        | {"block_t": power_of_two(s.keys % block_n, most=BLOCK_T)}
        | {"block_f": power_of_two(s.prefix, least=1), "block_d": power_of_two(s.width)},
        warps=8 if rows > 64 and not tall else 4,
        # Three stages: the list entries of a block are loaded one block ahead of its keys and values.
        stages=3,
    )
