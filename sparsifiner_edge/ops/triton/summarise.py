"""Preparation for `select` and `attend` in one launch, `summarise`: projections, pool sums and value deviations.

    a pool:          k ─┬─ proj_k ─► projected [P,c]                                             ─► select
                        ├─ sum ─► sum of the keys of the pool                                    ─► attend
                        └─ prefix queries ─► softmax ─┐
                     v ─┬─ weighted by it ────────────┴─► partial softmax of the pool            ─► attend
                        ├─ sum ─┬─► sum of the values; each prefix token is a pool of its own    ─► attend
                        └───────┴─ distance to the mean ─► deviation [P]                         ─► select
    pooled queries:  q ─ mean of each ─ proj_q ─► pooled_queries [G,c]                           ─► select

Keys are read once. The values of a pool are read again for their distances, while they are in cache. `projected` and
`pooled_queries` are float16. Projections are divided by powers of two to fit; these powers and the scale of the logits
are multiplied into `pooled_queries`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import in_parts, load_rows, store_rows

LARGEST_HALF = tl.constexpr(60000.0)
"""Limit to which projected values are clamped before they are stored as float16."""
LOWEST_PEAK = tl.constexpr(-1.0e30)
"""Initial value of the largest logit. It is finite, so the difference of two maxima is never NaN."""
COLUMNS = tl.constexpr(8)
"""Minimum number of columns of a tensor-core product."""


class _Sizes(NamedTuple):
    """Constants shared by the functions.

    Attributes:
        channels: Channels of all heads.
        stride: Elements from the qkv of one token to the next.
        width: Channels per head.
        prefix: Number of prefix tokens.
        patches: Number of patches.
        narrow: Number of predictor channels.
        depth: Elements from one projected row to the next.
        factor: Scale of the logits in base 2.
        unit: Divisor with which the sums of the pools are stored.
        power: Weight of the value deviation (`value_power`).
        floor: Lower bound of the value deviation.
        block_p: Number of patches per block.
        block_f: Padded number of prefix tokens.
        block_d: Padded number of channels per head.
        block_c: Padded number of predictor channels.
    """

    channels: tl.constexpr
    stride: tl.constexpr
    width: tl.constexpr
    prefix: tl.constexpr
    patches: tl.constexpr
    narrow: tl.constexpr
    depth: tl.constexpr
    factor: tl.constexpr
    unit: tl.constexpr
    power: tl.constexpr
    floor: tl.constexpr
    block_p: tl.constexpr
    block_f: tl.constexpr
    block_d: tl.constexpr
    block_c: tl.constexpr


@triton.jit
def _weights_of(projection, head, s):
    """Load the projection of a head [block_d, block_c], and return it with the power of two below its largest entry."""
    rows = tl.arange(0, s.block_d)
    values = load_rows(projection + head * s.width * s.narrow, rows, s.narrow, rows < s.width, s.narrow, s.block_c)
    largest = tl.max(tl.abs(values))
    # The exponent bits alone are the power of two below. 2^-100 avoids a division by zero for a projection of zeros.
    power = (tl.maximum(largest, 7.9e-31).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return values, power


@triton.jit
def _store_projected(place, values, real, s):
    """Store float32 rows as float16, clamped to its range; NaN is kept."""
    values = values.to(tl.float16)
    most = tl.full(values.shape, LARGEST_HALF, tl.float16)
    values = tl.minimum(values, most, propagate_nan=tl.PropagateNan.ALL)
    values = tl.maximum(values, -most, propagate_nan=tl.PropagateNan.ALL)
    store_rows(place, tl.arange(0, values.shape[0]), s.depth, real, s.depth, s.block_c, values)


@triton.jit
def _mean_queries(q, sizes, first, s, query_pool: tl.constexpr, block_g: tl.constexpr):
    """Return the weighted means [block_g, block_d] of the query pools from number `first` on."""
    start = (first + tl.arange(0, block_g)) * query_pool
    columns = tl.arange(0, s.block_d)
    place = q + (start * s.stride)[:, None] + columns[None, :]
    total, count = tl.zeros([block_g, s.block_d], tl.float32), tl.zeros([block_g], tl.float32)
    for n in tl.static_range(query_pool):  # unrolled, so that the loads overlap
        real = start + n < s.patches
        mask = real[:, None] if s.block_d == s.width else real[:, None] & (columns < s.width)[None, :]
        values = tl.load(place + n * s.stride, mask=mask, other=0.0).to(tl.float32)
        if sizes is not None:
            size = tl.load(sizes + start + n, mask=real, other=0.0)
            values *= size[:, None]
            count += size
        total += values
    if sizes is None:
        count = tl.minimum(tl.maximum(s.patches - start, 1), query_pool).to(tl.float32)
    return total / tl.maximum(count, 1.0)[:, None]


@triton.jit
def _store_pooled_queries(
    q, sizes, proj_q, proj_k, place, head, first, s, query_pool: tl.constexpr, block_g: tl.constexpr
):
    """Store block_g pooled queries: projected means, scaled by the scale of the logits and both powers of two."""
    means = _mean_queries(q, sizes, first, s, query_pool, block_g)
    values, power = _weights_of(proj_q, head, s)
    power_k = _weights_of(proj_k, head, s)[1]
    high, low = in_parts(values * (1.0 / power), q.dtype.element_ty)
    great, small = in_parts(means, q.dtype.element_ty)
    products = tl.dot(great, high, tl.dot(great, low, tl.dot(small, high)))
    there = first + tl.arange(0, block_g) < (s.patches + query_pool - 1) // query_pool
    _store_projected(place + first * s.depth, products * (power * power_k * s.factor), there, s)


@triton.jit
def _sum_rows(x, size, before, sized: tl.constexpr):
    """Add the sum over the rows of `x` to `before` [block_d, COLUMNS], whose columns are all equal."""
    if not sized:
        return tl.dot(tl.trans(x), tl.full([x.shape[0], COLUMNS], 1.0, x.dtype), before)
    weights = tl.broadcast_to(size[:, None], [x.shape[0], COLUMNS])
    high, low = in_parts(weights, x.dtype)
    if x.dtype == tl.bfloat16:  # rounding error of sizes above 256 (float16: only above 2048)
        before = tl.dot(tl.trans(x), low, before)
    return tl.dot(tl.trans(x), high, before)


@triton.jit
def _first_column(sums):
    """Return the first column of sums whose columns are all equal; exact because COLUMNS is a power of two."""
    return tl.sum(sums, 1) * (1.0 / COLUMNS)


@triton.jit
def _add_softmax(queries, k, v, size, real, state, factor: tl.constexpr, sized: tl.constexpr):
    """Add a block of patches to the softmaxes of the prefix queries.

    The state consists of the peaks [block_f], sums of weights [block_f] and weighted sums of values [d, block_f].
    """
    peaks, totals, out = state
    logits = tl.dot(k, queries) * factor
    if sized:
        logits += tl.log2(tl.maximum(size, 1.0))[:, None]
    logits = tl.where(real[:, None], logits, float("-inf"))
    higher = tl.maximum(peaks, tl.max(logits, 0))
    weights, decay = tl.exp2(logits - higher[None, :]), tl.exp2(peaks - higher)
    out = tl.dot(tl.trans(v), weights.to(v.dtype), out * decay[None, :])
    return higher, totals * decay + tl.sum(weights, 0), out


@triton.jit
def _load_patches(base, before, real, s):
    """Load rows from `before` on. It is added last, so that loads of keys and values differ by a constant offset."""
    columns = tl.arange(0, s.block_d)
    place = base + tl.arange(0, s.block_p)[:, None] * s.stride + columns[None, :]
    mask = real[:, None] if s.block_d == s.width else real[:, None] & (columns < s.width)[None, :]
    return tl.load(place + before * s.stride, mask=mask, other=0.0)


@triton.jit
def _add_patches(k, sizes, before, count, queries, parts, place, state, s):
    """Project a block of patches of a pool, from number `before` on, and add it to the softmaxes and the sums."""
    softmax, key_sum, value_sum, total = state
    rows = before + tl.arange(0, s.block_p)
    real = rows < count
    sized: tl.constexpr = sizes is not None
    size = tl.load(sizes + rows, mask=real, other=0.0) if sized else tl.where(real, 1.0, 0.0)
    keys, values = _load_patches(k, before, real, s), _load_patches(k + s.channels, before, real, s)
    # The result is stored in float16, which has as many bits as the high part of a float16 projection. A bfloat16 high
    # part has fewer, so the low part is added.
    projected = tl.dot(keys, parts[0], tl.dot(keys, parts[1])) if keys.dtype == tl.bfloat16 else tl.dot(keys, parts[0])
    _store_projected(place + before * s.depth, projected, real, s)
    if s.prefix > 0:
        softmax = _add_softmax(queries, keys, values, size, real, softmax, s.factor, sized)
    total += tl.sum(size, 0)
    return softmax, _sum_rows(keys, size, key_sum, sized), _sum_rows(values, size, value_sum, sized), total


@triton.jit
def _store_deviations(deviation, v, mean, count, s):
    """Store s.power x log2 of the distance to the mean for each value of a pool."""
    for before in range(0, count, s.block_p):
        rows = tl.arange(0, s.block_p)
        real = before + rows < count
        apart = _load_patches(v, before, real, s).to(tl.float32) - mean[None, :]
        squares = tl.sum(apart * apart, 1)
        # After the sum, eight threads hold each row; the gather reduces that to one.
        squares = tl.gather(squares, rows, 0)
        # The comparison is false for NaN, so NaN is kept.
        squares = tl.where(squares < s.floor * s.floor, s.floor * s.floor, squares)
        tl.store(deviation + before + rows, 0.5 * s.power * tl.log2(squares), mask=real)


@triton.jit
def _store_pool(key_sum, value_sum, size, sums, counts, place, s):
    """Store the sums of a pool, divided by `unit` so that they fit into their type, and its total size."""
    columns = tl.arange(0, s.block_d)
    tl.store(sums + place * 2 * s.width + columns, key_sum * (1.0 / s.unit), mask=columns < s.width)
    tl.store(sums + (place * 2 + 1) * s.width + columns, value_sum * (1.0 / s.unit), mask=columns < s.width)
    tl.store(counts + place, size)


@triton.jit
def _store_prefix_pools(k, sums, counts, s):
    """Store each prefix token as a pool of its own, after the others."""
    rows = tl.arange(0, s.block_f)
    real = rows < s.prefix
    for part in tl.static_range(2):
        x = load_rows(k + part * s.channels, rows, s.stride, real, s.width, s.block_d).to(tl.float32)
        store_rows(sums + part * s.width, rows, 2 * s.width, real, s.width, s.block_d, x * (1.0 / s.unit))
    tl.store(counts + rows, tl.full([s.block_f], 1.0, tl.float32), mask=real)


@triton.jit
def _store_softmax(state, partial_out, partial_stats, number, s):
    """Store the weighted sums, largest logits and sums of weights of the prefix queries for one pool."""
    row = tl.arange(0, s.block_f)
    place, real = number * s.prefix + row, row < s.prefix
    store_rows(partial_out, place, s.width, real, s.width, s.block_d, tl.trans(state[2]))
    tl.store(partial_stats + 2 * place, state[0], mask=real)
    tl.store(partial_stats + 2 * place + 1, state[1], mask=real)


@triton.jit
def _pool(
    base,
    sizes,
    proj_k,
    head,
    projected,
    deviation,
    sums,
    counts,
    partial_out,
    partial_stats,
    number,
    s,
    key_pool: tl.constexpr,
    background_tokens: tl.constexpr,
):
    """Process one pool; the pointers refer to one head of one image."""
    start = number * key_pool
    count = tl.minimum(key_pool, s.patches - start)
    queries = 0
    if s.prefix > 0:
        row = tl.arange(0, s.block_f)
        queries = tl.trans(load_rows(base, row, s.stride, row < s.prefix, s.width, s.block_d))
    matrix, power = _weights_of(proj_k, head, s)
    parts = in_parts(matrix * (1.0 / power), base.dtype.element_ty)
    k = base + s.channels + (s.prefix + start) * s.stride
    weights = None if sizes is None else sizes + start
    softmax = (
        tl.full([s.block_f], LOWEST_PEAK, tl.float32),
        tl.zeros([s.block_f], tl.float32),
        tl.zeros([s.block_d, s.block_f], tl.float32),
    )
    none = tl.zeros([s.block_d, COLUMNS], tl.float32)
    state = softmax, none, none, tl.zeros([], tl.float32)
    for before in range(0, count, s.block_p):
        state = _add_patches(k, weights, before, count, queries, parts, projected + start * s.depth, state, s)
    softmax, key_sum, value_sum, size = state
    if s.prefix > 0:
        _store_softmax(softmax, partial_out, partial_stats, number, s)
    summed = _first_column(value_sum)
    _store_pool(_first_column(key_sum), summed, size, sums, counts, number, s)
    if s.prefix > 0 and number == 0:
        _store_prefix_pools(base + s.channels, sums + background_tokens * 2 * s.width, counts + background_tokens, s)
    _store_deviations(deviation + start, k + s.channels, summed / size, count, s)


@triton.jit
def summarise_kernel(
    qkv,
    sizes,
    proj_q,
    proj_k,
    pooled_queries,
    projected,
    deviation,
    pool_sums,
    pool_sizes,
    partial_out,
    partial_stats,
    tokens: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
    prefix: tl.constexpr,
    channels: tl.constexpr,
    query_pool: tl.constexpr,
    key_pool: tl.constexpr,
    background_tokens: tl.constexpr,
    value_power: tl.constexpr,
    floor: tl.constexpr,
    factor: tl.constexpr,
    unit: tl.constexpr,
    depth: tl.constexpr,
    block_p: tl.constexpr,
    block_g: tl.constexpr,
    block_f: tl.constexpr,
    block_d: tl.constexpr,
    block_c: tl.constexpr,
):
    """Compute everything that `select` and `attend` need from the queries, keys and values.

    Grid: (background tokens + pooled queries / block_g, H, B). `sizes` is None if all are 1. `partial_out` and
    `partial_stats` are None without prefix.
    """
    s: tl.constexpr = _Sizes(
        heads * width,
        3 * heads * width,
        width,
        prefix,
        tokens - prefix,
        channels,
        depth,
        factor,
        unit,
        value_power,
        floor,
        block_p,
        block_f,
        block_d,
        block_c,
    )
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane, block = image * heads + head, tl.program_id(0)
    base = qkv + image * tokens * s.stride + head * width
    weights = None if sizes is None else sizes + image * tokens + prefix
    if block < background_tokens:
        _pool(
            base,
            weights,
            proj_k,
            head,
            projected + lane * s.patches * depth,
            deviation + lane * s.patches,
            pool_sums + lane * (background_tokens + prefix) * 2 * width,
            pool_sizes + lane * (background_tokens + prefix),
            None if partial_out is None else partial_out + lane * background_tokens * prefix * width,
            None if partial_stats is None else partial_stats + lane * background_tokens * prefix * 2,
            block,
            s,
            key_pool,
            background_tokens,
        )
    else:
        place = pooled_queries + lane * ((s.patches + query_pool - 1) // query_pool) * depth
        first = (block - background_tokens) * block_g
        _store_pooled_queries(
            base + prefix * s.stride, weights, proj_q, proj_k, place, head, first, s, query_pool, block_g
        )
