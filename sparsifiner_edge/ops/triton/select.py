"""KeySelect on a GPU, after `summarise`: `select`, in which each program handles several tiles.

    projected [P,c] ───────┬► two passes over the keys: log-sum-exp of each pooled query, scores of each tile
    pooled_queries [G,c] ──┤                            ─► scores [T,P] (stay in cache)
    deviation [P] ─────────┘                            ─► threshold of each tile ─► indices [T,K]

Logits are computed by tensor cores. Keys are the rows of the product, so the pooled queries of a tile are columns of
the same thread. `best.py` computes thresholds and key lists.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.best import AT_A_TIME, NOTHING, list_best, put_scores
from sparsifiner_edge.ops.triton.common import load_rows

GREATEST = tl.constexpr(3.0e38)
"""Maximum magnitude of a score."""
MOST_ABOVE = tl.constexpr(100.0)
"""Maximum of a logit (base 2) above the largest one of the first block of keys.

The sum of 16384 weights of 2^100 is still within the range of float32.
"""


class _Sizes(NamedTuple):
    """Constants shared by the functions.

    Attributes:
        patches: Number of patches.
        share: Number of tiles per program.
        beside: Number of adjacent columns of a product that belong to the same tile.
        blocks: Number of blocks of scores per thread.
        lanes: Number of threads per tile.
        depth: Elements from one projected row to the next.
        block_g: Number of pooled queries per program.
        block_n: Number of keys per block.
        block_c: Padded number of predictor channels.
    """

    patches: tl.constexpr
    share: tl.constexpr
    beside: tl.constexpr
    blocks: tl.constexpr
    lanes: tl.constexpr
    depth: tl.constexpr
    block_g: tl.constexpr
    block_n: tl.constexpr
    block_c: tl.constexpr


@triton.jit
def _load_keys(projected, sizes, start, s, masked: tl.constexpr):
    """Load a block of projected keys, log2 of their sizes, and the mask of existing keys."""
    rows = start + tl.arange(0, s.block_n)
    real = rows < s.patches
    columns = tl.arange(0, s.block_c)
    place = projected + rows[:, None] * s.depth + columns[None, :]
    if masked:
        keys = tl.load(place, mask=real[:, None] & (columns < s.depth)[None, :], other=0.0)
    elif s.depth < s.block_c:
        keys = tl.load(place, mask=(columns < s.depth)[None, :], other=0.0)
    else:
        keys = tl.load(place)
    logs = tl.zeros([s.block_n], tl.float32) if sizes is None else tl.log2(tl.load(sizes + rows, mask=real, other=1.0))
    return keys, logs, real


@triton.jit
def _logits(queries, projected, sizes, start, less, s, masked: tl.constexpr):
    """Return the base-2 logits of a block of keys for each pooled query, minus `less`; -inf for missing keys.

    The accumulator of the product starts with the subtrahend `less` (one per pooled query). The tensor cores have time
    to spare, separate subtractions do not.
    """
    keys, logs, real = _load_keys(projected, sizes, start, s, masked)
    logits = tl.dot(keys, tl.trans(queries), tl.broadcast_to(-less[None, :], [s.block_n, s.block_g]))
    if sizes is not None:
        logits += logs[:, None]
    return tl.where(real[:, None], logits, float("-inf")) if masked else logits


@triton.jit
def _log_sums(queries, projected, sizes, s):
    """Return log2 of the sum of exp2(logit) for each pooled query (first pass).

    Weights are relative to the largest logit of the first block. Later logits may be up to `MOST_ABOVE` above it.
    Logits far below it add nothing.
    """
    full: tl.constexpr = s.patches // s.block_n * s.block_n
    none = tl.zeros([s.block_g], tl.float32)
    tops = tl.max(_logits(queries, projected, sizes, 0, none, s, full == 0), 0)
    tops = tl.maximum(tops, -GREATEST)  # finite if all are NaN
    totals = tl.zeros([s.block_n, s.block_g], tl.float32)
    for start in range(0, full, s.block_n):
        totals += tl.exp2(tl.minimum(_logits(queries, projected, sizes, start, tops, s, False), MOST_ABOVE))
    if full < s.patches:
        totals += tl.exp2(tl.minimum(_logits(queries, projected, sizes, full, tops, s, True), MOST_ABOVE))
    return tops + tl.log2(tl.sum(totals, 0))


@triton.jit
def _store_scores(queries, projected, sizes, deviation, rows, start, lse, real_tiles, s, masked: tl.constexpr):
    """Store each tile's scores of a block of keys (second pass): the maximum over the columns of the tile."""
    keys, logs, real = _load_keys(projected, sizes, start, s, masked)
    logits = tl.dot(keys, tl.trans(queries), tl.broadcast_to(-lse[None, :], [s.block_n, s.block_g]))
    apart: tl.constexpr = s.block_g // s.share // s.beside
    best = tl.max(tl.max(tl.reshape(logits, [s.block_n, apart, s.share, s.beside]), 3), 1)
    if sizes is not None:
        best += logs[:, None]
    best += tl.load(deviation + start + tl.arange(0, s.block_n), mask=real, other=0.0)[:, None]
    best = tl.minimum(tl.maximum(best, NOTHING), GREATEST)  # for NaN, both return the other operand
    if masked:
        best = tl.where(real[:, None], best, NOTHING)
    put_scores(rows, start, best, real_tiles, s.blocks, s.lanes)


@triton.jit
def select_kernel(
    sizes,
    pooled_queries,
    projected,
    deviation,
    scores,
    indices,
    tokens: tl.constexpr,
    heads: tl.constexpr,
    prefix: tl.constexpr,
    query_pool: tl.constexpr,
    per_tile: tl.constexpr,
    tiles: tl.constexpr,
    keys: tl.constexpr,
    depth: tl.constexpr,
    normal: tl.constexpr,
    rarity: tl.constexpr,
    share: tl.constexpr,
    beside: tl.constexpr,
    pitch: tl.constexpr,
    group: tl.constexpr,
    lanes: tl.constexpr,
    block_g: tl.constexpr,
    block_n: tl.constexpr,
    block_c: tl.constexpr,
):
    """Store the ascending indices of the K highest scores of each tile; ties go to the lower index.

    Grid: (T / share, H, B). A program handles `share` tiles with block_g pooled queries in total. Scores of consecutive
    tiles are `pitch` apart, a multiple of the blocks, so they are read without masks and 16 bytes at a time. The scores
    of `group` tiles fit into registers.
    """
    patches: tl.constexpr = tokens - prefix
    asking: tl.constexpr = (patches + query_pool - 1) // query_pool
    blocks: tl.constexpr = pitch // (AT_A_TIME * lanes)
    s: tl.constexpr = _Sizes(patches, share, beside, blocks, lanes, depth, block_g, block_n, block_c)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = image * heads + head
    weights = None if sizes is None else sizes + image * tokens + prefix
    before = tl.program_id(0) * share
    projected += lane * patches * depth
    deviation += lane * patches
    column = tl.arange(0, block_g)
    tile, number = before + column // beside % share, column // (beside * share) * beside + column % beside
    asks = tile * per_tile + number
    there = (number < per_tile) & (asks < asking) & (tile < tiles)
    queries = load_rows(pooled_queries + lane * asking * depth, asks, depth, there, depth, block_c)
    lse = tl.where(there, _log_sums(queries, projected, weights, s), float("inf"))
    each = before + tl.arange(0, share)
    rows = scores + lane * tiles * pitch + tl.minimum(each, tiles - 1) * pitch
    full: tl.constexpr = patches // block_n * block_n
    for start in range(0, full, block_n):
        _store_scores(queries, projected, weights, deviation, rows, start, lse, each < tiles, s, False)
    if full < patches:
        _store_scores(queries, projected, weights, deviation, rows, full, lse, each < tiles, s, True)
    for start in tl.static_range((patches + block_n - 1) // block_n * block_n, pitch, block_n):
        put_scores(rows, start, tl.full([block_n, share], NOTHING, tl.float32), each < tiles, blocks, lanes)
    tl.debug_barrier()  # values written by all threads are read below
    for number in range(0, share, group):
        # Missing tiles repeat the last one and write the same values.
        chosen = tl.minimum(before + number + tl.arange(0, group), tiles - 1)
        list_best(
            scores + lane * tiles * pitch + chosen * pitch,
            indices + lane * tiles * keys + chosen * keys,
            keys,
            normal,
            rarity,
            blocks,
            group,
            lanes,
        )
