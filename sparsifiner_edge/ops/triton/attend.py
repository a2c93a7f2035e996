"""SparseAttention on a GPU, forward only: `attend`.

A tile of queries attends to the keys in its list, to the background tokens and to the prefix tokens.

    listed keys and values, in blocks ─┬► softmax ───────────────────────────────────────────────┐
                                       └► one-hot matrix x keys, values: what the tile selected  ├─► output
                                          of each pool                                           │
    sums of the pools (summarise) ─► minus what the tile selected, mean of the rest; prefix ─────┘
    partial softmaxes of the prefix queries (summarise) ───────────────────────────────────────────► output

The background token of a pool is derived from the sum of the pool minus what the tile selected. Neither masks nor means
pass through memory. Nothing is accumulated with atomics, so two runs give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import load_rows, reciprocal, store_rows

LOWEST = tl.constexpr(-1.0e30)
"""Initial value of a running maximum. It is finite, so the difference of two maxima is never NaN."""
HEADROOM = tl.constexpr(8.0)
"""Distance of the softmax peak above the largest logit (base 2) of the sample.

Weights of 2^-8 have full precision in float16, and others may be 2^24 times as large before they overflow.
"""
SAMPLE = tl.constexpr(16)
"""Number of keys in the sample."""
FOLLOWED = tl.constexpr(32)
"""Maximum number of entries per block if the peak follows the logits; larger blocks need too many registers."""
GREATEST_SUM = tl.constexpr(2.0**60)
"""Bound of a sum of weights without overflow. Below it, the weighted values did not overflow either."""
LEAST = tl.constexpr(8)
"""Minimum number of columns of a tensor-core product."""
HALF = tl.constexpr(16)
"""Number of pools whose sums are computed together, which is also the minimum number of rows of a product.

Key lists ascend, so all blocks but one contain keys of only the first or only the second half of the pools.
"""


class _Sizes(NamedTuple):
    """Constants shared by the functions.

    Attributes:
        channels: Channels of all heads.
        stride: Elements from the qkv of one token to the next.
        width: Channels per head.
        block_d: Padded number of channels per head.
        prefix: Number of prefix tokens.
        columns: Number of patches.
        keys: Number of listed keys per tile.
        key_pool: Number of patches per pool.
        entries: Number of pools, including one for each prefix token at the end.
        factor: Scale of the logits in base 2.
        unit: Divisor with which the sums of the pools are stored.
    """

    channels: tl.constexpr
    stride: tl.constexpr
    width: tl.constexpr
    block_d: tl.constexpr
    prefix: tl.constexpr
    columns: tl.constexpr
    keys: tl.constexpr
    key_pool: tl.constexpr
    entries: tl.constexpr
    factor: tl.constexpr
    unit: tl.constexpr


@triton.jit
def _softmax_block(q, k, v, offset, state, factor: tl.constexpr, raised: tl.constexpr, follow: tl.constexpr):
    """Add a block of keys and values to the softmax state.

    The base-2 logits are factor q k, plus `offset` if `raised`. The state consists of the peak, the sum of weights and
    the weighted sum of values. Sums that are None start with this block.

    With `follow`, the peak is the running maximum of the logits. Without it the peak is fixed. This saves the rescaling
    of the sums, but later weights may overflow. The sum of weights is computed as a product with ones, because the
    tensor cores have time to spare and additions do not.
    """
    peak, total, out = state
    logits = tl.dot(q, tl.trans(k))
    if raised:
        logits = logits * factor + offset[None, :]
    if follow:
        higher = tl.maximum(peak, tl.max(logits, 1) * (1.0 if raised else factor))
        if total is not None:
            decay = tl.exp2(peak - higher)[:, None]
            total, out = total * decay, out * decay
        peak = higher
    weights = tl.exp2((logits if raised else logits * factor) - peak[:, None]).to(v.dtype)
    total = tl.dot(weights, tl.full([k.shape[0], LEAST], 1.0, v.dtype), total)
    return peak, total, tl.dot(weights, v, out)


@triton.jit
def _no_softmax(block_m: tl.constexpr, block_d: tl.constexpr):
    """Return the softmax state before the first block of a key list."""
    return (
        tl.full([block_m], LOWEST, tl.float32),
        tl.zeros([block_m, LEAST], tl.float32),
        tl.zeros([block_m, block_d], tl.float32),
    )


@triton.jit
def _no_sums(block_d: tl.constexpr):
    """Return empty sums of keys, values and sizes for one half of the pools."""
    zeros = tl.zeros([HALF, block_d], tl.float32)
    return zeros, zeros, tl.zeros([HALF, LEAST], tl.float32)


@triton.jit
def _add_selected(within, numbers, real, size, k, v, sums, masked: tl.constexpr, sized: tl.constexpr):
    """Add the keys, values and sizes of a block to the sums of their pools if `within`, as one-hot matrix products.

    `numbers` are the rows of the sums. In the region of the `if`, the compiler distributes the products over the warps
    by their own shape, not by that of the softmax.
    """
    keys, values, counts = sums
    if within:
        same = numbers[None, :] == tl.arange(0, HALF)[:, None]
        if masked:
            same = same & real[None, :]
        weights = same.to(tl.float32)  # the interpreter cannot convert booleans to bfloat16
        if sized:
            weights = weights * size[None, :]
        hot = weights.to(k.dtype)
        ones = tl.full([k.shape[0], LEAST], 1.0, k.dtype)
        counts = tl.dot(hot, ones, counts)
        if sized and k.dtype == tl.bfloat16:  # rounding error of sizes above 256 (float16: only above 2048)
            low = (weights - hot.to(tl.float32)).to(k.dtype)
            counts = tl.dot(low, ones, counts)
            keys, values = tl.dot(low, k, keys), tl.dot(low, v, values)
        keys, values = tl.dot(hot, k, keys), tl.dot(hot, v, values)
    return keys, values, counts


@triton.jit
def _add_listed(
    q, base, sizes, lists, start, split, state, s, block_n: tl.constexpr, masked: tl.constexpr, follow: tl.constexpr
):
    """Add a block of a tile's key list to the softmax and to the sums of the pools.

    Only entries before split[0] may belong to the first half of the pools, and only entries from split[1] on to the
    second half. Without `masked`, the block must not extend beyond the list. Invalid indices in the list are clamped,
    so nothing outside the tensors is read.
    """
    entries = start + tl.arange(0, block_n)
    real = entries < s.keys
    if masked:  # Entries after the last one repeat it with weight 0.
        entries = tl.minimum(entries, s.keys - 1)
    # As unsigned integers, negative indices are large, so the minimum clamps them too.
    listed = tl.minimum(tl.load(lists + entries).to(tl.uint32), s.columns - 1)
    token = s.prefix + listed.to(tl.int32)
    every = tl.full([block_n], True, tl.int1)
    k = load_rows(base + s.channels, token, s.stride, every, s.width, s.block_d)
    v = load_rows(base + 2 * s.channels, token, s.stride, every, s.width, s.block_d)
    sized: tl.constexpr = sizes is not None
    size = tl.load(sizes + token) if sized else 1.0
    offset = tl.log2(size) if sized else tl.zeros([block_n], tl.float32)
    if masked:
        offset = tl.where(real, offset, float("-inf"))
    softmax, low, high = state
    softmax = _softmax_block(q, k, v, offset, softmax, s.factor, masked or sized, follow)
    number = (listed // s.key_pool).to(tl.int32)
    low = _add_selected(start < split[0], number, real, size, k, v, low, masked, sized)
    high = _add_selected(start + block_n > split[1], number - HALF, real, size, k, v, high, masked, sized)
    return softmax, low, high


@triton.jit
def _sample(q, base, sizes, lists, s):
    """Derive the softmax peak of each row and the split of the list from a sample of a tile's key list.

    The peak is `HEADROOM` above the largest logit of the sample. Keys of the first half of the pools occur only before
    entry split[0], those of the second half only from entry split[1] on.
    """
    number, apart = tl.arange(0, SAMPLE), max(s.keys // SAMPLE, 1)
    real = number < s.keys
    listed = tl.load(lists + number * apart, mask=real, other=-1).to(tl.uint32)
    token = s.prefix + tl.minimum(listed, s.columns - 1).to(tl.int32)
    k = load_rows(base + s.channels, token, s.stride, real, s.width, s.block_d)
    logits = tl.dot(q, tl.trans(k))
    if sizes is not None:
        unscaled: tl.constexpr = 1.0 / s.factor if s.factor != 0 else 1.0
        logits += (tl.log2(tl.load(sizes + token, mask=real, other=1.0)) * unscaled)[None, :]
    if s.keys < SAMPLE:
        logits = tl.where(real[None, :], logits, float("-inf"))
    low = tl.sum((listed < HALF * s.key_pool).to(tl.int32), 0)
    split = tl.where(low == SAMPLE, s.keys, low * apart), tl.maximum(low - 1, 0) * apart
    return tl.maximum(tl.max(logits, 1) * s.factor, LOWEST) + HEADROOM, split


@triton.jit
def _add_rest(q, pool_sums, pool_sizes, sums, state, before: tl.constexpr, s, follow: tl.constexpr):
    """Add the background tokens of one half of the pools to the softmax.

    A background token is the mean of the unselected keys and values of a pool, weighted by their total size. Each
    prefix token is a pool of which nothing is selected.
    """
    keys, values, counts = sums
    number = before + tl.arange(0, HALF)
    inside = number < s.entries
    rest = tl.load(pool_sizes + number, mask=inside, other=0.0) - tl.max(counts, 1)  # all columns are equal
    rest = tl.where(rest > 0.5, rest, 0.0)
    share = tl.where(rest > 0.5, reciprocal(tl.maximum(rest, 0.5)), 0.0)[:, None]
    k = load_rows(pool_sums, number, 2 * s.width, inside, s.width, s.block_d).to(tl.float32) * s.unit
    v = load_rows(pool_sums + s.width, number, 2 * s.width, inside, s.width, s.block_d).to(tl.float32) * s.unit
    k, v = ((k - keys) * share).to(q.dtype), ((v - values) * share).to(q.dtype)
    peak, total, out = state
    logits = tl.dot(q, tl.trans(k))
    higher = peak
    if follow:
        most = tl.max(tl.where((rest > 0.5)[None, :], logits, float("-inf")), 1) * s.factor
        higher = tl.maximum(peak, most + HEADROOM)  # the rest may count as many patches
        decay = tl.exp2(peak - higher)[:, None]
        total, out = total * decay, out * decay
    weights = tl.exp2(logits * s.factor - higher[:, None]) * rest[None, :]
    if follow:  # without it, an empty rest adds 0, or NaN, after which the tile is computed again
        weights = tl.where((rest > 0.5)[None, :], weights, 0.0)
    weights = weights.to(q.dtype)
    total = tl.dot(weights, tl.full([HALF, LEAST], 1.0, q.dtype), total)
    return higher, total, tl.dot(weights, v, out)


@triton.jit
def _store_attended(output, q, pool_sums, pool_sizes, state, rows, real_rows, s, follow: tl.constexpr):
    """Add the background tokens to a tile's softmax and store its output, unless sums overflowed.

    Returns:
        True if the output was stored.
    """
    softmax, low, high = state
    softmax = _add_rest(q, pool_sums, pool_sizes, low, softmax, 0, s, follow)
    if s.entries > HALF:
        softmax = _add_rest(q, pool_sums, pool_sizes, high, softmax, HALF, s, follow)
    total = tl.max(softmax[1], 1)  # all columns are equal
    fits = follow or tl.min((total < GREATEST_SUM).to(tl.int32)) > 0  # false for NaN
    if fits:
        out = softmax[2] * reciprocal(total)[:, None]
        store_rows(output, rows, s.channels, real_rows, s.width, s.block_d, out)
    return fits


@triton.jit
def _tile_again(
    base, sizes, lists, pool_sums, pool_sizes, output, rows, real_rows, block_m: tl.constexpr, block_n: tl.constexpr, s
):
    """Recompute a tile whose sums overflowed, with a peak that follows the logits.

    This happens if logits are far above those of the sample. Intermediate results are recomputed, because keeping them
    would take registers.
    """
    q = load_rows(base, rows, s.stride, real_rows, s.width, s.block_d)
    _, split = _sample(q, base, sizes, lists, s)
    none = _no_sums(s.block_d)
    state = _no_softmax(block_m, s.block_d), none, none
    for start in tl.range(0, s.keys, block_n, num_stages=1):
        state = _add_listed(q, base, sizes, lists, start, split, state, s, block_n, True, True)
    _store_attended(output, q, pool_sums, pool_sizes, state, rows, real_rows, s, True)


@triton.jit
def _prefix_row(base, partial_out, partial_stats, row, s, background_tokens: tl.constexpr, block_f: tl.constexpr):
    """Return the output [d] of a prefix query: its softmax over the prefix, merged with those over the pools."""
    columns, number = tl.arange(0, s.block_d), tl.arange(0, block_f)
    inside = number < s.prefix
    q = tl.load(base + row * s.stride + columns, mask=columns < s.width, other=0.0).to(tl.float32)
    k = load_rows(base + s.channels, number, s.stride, inside, s.width, s.block_d).to(tl.float32)
    v = load_rows(base + 2 * s.channels, number, s.stride, inside, s.width, s.block_d).to(tl.float32)
    logits = tl.where(inside, tl.sum(q[None, :] * k, 1) * s.factor, float("-inf"))
    block = tl.arange(0, 2 * HALF)
    place, there = block * s.prefix + row, block < background_tokens
    peaks = tl.load(partial_stats + 2 * place, mask=there, other=float("-inf"))
    parts = load_rows(partial_out, place, s.width, there, s.width, s.block_d)
    peak = tl.maximum(tl.max(logits, 0), tl.max(peaks, 0))
    weights, shares = tl.exp2(logits - peak), tl.exp2(peaks - peak)
    total = tl.sum(weights, 0) + tl.sum(shares * tl.load(partial_stats + 2 * place + 1, mask=there, other=0.0), 0)
    return (tl.sum(weights[:, None] * v, 0) + tl.sum(shares[:, None] * parts, 0)) / total


@triton.jit
def attend_kernel(
    qkv,
    sizes,
    indices,
    pool_sums,
    pool_sizes,
    partial_out,
    partial_stats,
    output,
    tokens: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
    prefix: tl.constexpr,
    tile: tl.constexpr,
    tiles: tl.constexpr,
    keys: tl.constexpr,
    key_pool: tl.constexpr,
    background_tokens: tl.constexpr,
    factor: tl.constexpr,
    unit: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_t: tl.constexpr,
    block_f: tl.constexpr,
    block_d: tl.constexpr,
):
    """Compute the attention output [B,N,C].

    Grid: (prefix + T, H, B). `sizes` is None if all are 1. `partial_out` and `partial_stats` are None without prefix.
    """
    s: tl.constexpr = _Sizes(
        heads * width,
        3 * heads * width,
        width,
        block_d,
        prefix,
        tokens - prefix,
        keys,
        key_pool,
        background_tokens + prefix,
        factor,
        unit,
    )
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = image * heads + head
    base = qkv + image * tokens * s.stride + head * width
    output += image * tokens * s.channels + head * width
    if prefix > 0 and tl.program_id(0) < prefix:  # the first condition is evaluated at compile time
        row = tl.program_id(0)
        parts = lane * background_tokens * prefix
        values = _prefix_row(
            base, partial_out + parts * width, partial_stats + parts * 2, row, s, background_tokens, block_f
        )
        place = output + row * s.channels + tl.arange(0, block_d)
        tl.store(place, values.to(output.dtype.element_ty), mask=tl.arange(0, block_d) < width)
    else:
        number = tl.program_id(0) - prefix
        rows = prefix + number * tile + tl.arange(0, block_m)
        real_rows = rows < tl.minimum(prefix + (number + 1) * tile, tokens)
        lists = indices + (lane * tiles + number) * keys
        weights = None if sizes is None else sizes + image * tokens
        pool_sums += lane * s.entries * 2 * width
        pool_sizes += lane * s.entries
        every = tl.full([block_m], True, tl.int1)
        q = load_rows(base, tl.minimum(rows, tokens - 1), s.stride, every, width, block_d)
        full: tl.constexpr = keys // block_n * block_n
        none = _no_sums(block_d)
        peak, split = _sample(q, base, weights, lists, s)
        # The incomplete block comes first, so the sums start with it.
        if full < keys:
            state = (peak, None, None), none, none
            state = _add_listed(q, base, weights, lists, full, split, state, s, block_t, True, False)
        else:
            _, total, out = _no_softmax(block_m, block_d)
            state = (peak, total, out), none, none
        for start in range(full + block_t, keys, block_t):
            state = _add_listed(q, base, weights, lists, start, split, state, s, block_t, True, False)
        for start in range(0, full, block_n):
            state = _add_listed(q, base, weights, lists, start, split, state, s, block_n, False, False)
        if not _store_attended(output, q, pool_sums, pool_sizes, state, rows, real_rows, s, False):
            _tile_again(
                base,
                weights,
                lists,
                pool_sums,
                pool_sizes,
                output,
                rows,
                real_rows,
                block_m,
                block_n if block_n <= FOLLOWED else block_t,
                s,
            )
