"""SparseAttention on a GPU, forward: `attend`, a tile of queries over its list, the rest of each cell and the prefix.

    listed keys and values, in blocks ─┬► softmax ────────────────────────────────────────┐
                                       └► one-hot by cell x keys, values: what the tile    ├─► output
                                          selected of each cell                            │
    cells' sums (summarise) ─────────────► less what it selected, over what is left; prefix┘
    partial softmaxes of the prefix queries (summarise) ──────────────────────────────────► output

A cell's rest is its sum less what the tile selected of it, so neither masks nor means pass through memory. Nothing is
accumulated by atomics: two runs give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import load_rows, reciprocal, store_rows

LOWEST = tl.constexpr(-1.0e30)
"""Where a running maximum starts: finite, so that the difference of two is no NaN."""
HEADROOM = tl.constexpr(8.0)
"""How far above the greatest logit (base 2) of a sample sums stand. Weights of 2^-8 lose nothing in float16, and others
may be 2^24 times as great before they overflow."""
SAMPLE = tl.constexpr(16)
"""Keys of it."""
FOLLOWED = tl.constexpr(32)
"""Entries of a block, at most, where a peak follows: more take registers."""
GREATEST_SUM = tl.constexpr(2.0**60)
"""Of a sum of weights that did not overflow: what is weighted did not either."""
LEAST = tl.constexpr(8)
"""Columns that a product of the matrix units has at least."""
HALF = tl.constexpr(16)
"""Cells whose sums are made together, rows that a product has at least. As a list ascends, all blocks but one read of
the first half of the cells or of the second.
"""


class _Sizes(NamedTuple):
    """Constants that functions share.

    Attributes:
        channels: of all heads. stride: elements from one token's qkv to the next.
        columns: patches. entries: cells, and prefix tokens behind them.
        factor: of logits, in base 2. unit: that sums of cells are stored in.
    """

    channels: tl.constexpr
    stride: tl.constexpr
    width: tl.constexpr
    block_d: tl.constexpr
    prefix: tl.constexpr
    columns: tl.constexpr
    keys: tl.constexpr
    cell: tl.constexpr
    entries: tl.constexpr
    factor: tl.constexpr
    unit: tl.constexpr


@triton.jit
def _softmax_block(q, k, v, offset, state, factor: tl.constexpr, raised: tl.constexpr, follow: tl.constexpr):
    """Logits factor q k (base 2), plus `offset` if `raised`, enter the sums of weights and of what they weigh, or
    begin them where they are None.

    follow: the peak goes with the greatest logit. Else it stays: sums need not be brought to a new one, but what comes
    may overflow. The sum of weights is a product with ones: the matrix units have time for it, additions have not.
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
    """State before the first block of a list."""
    return (
        tl.full([block_m], LOWEST, tl.float32),
        tl.zeros([block_m, LEAST], tl.float32),
        tl.zeros([block_m, block_d], tl.float32),
    )


@triton.jit
def _no_sums(block_d: tl.constexpr):
    """Keys, values and sizes of half the cells."""
    zeros = tl.zeros([HALF, block_d], tl.float32)
    return zeros, zeros, tl.zeros([HALF, LEAST], tl.float32)


@triton.jit
def _add_selected(within, numbers, real, size, k, v, sums, masked: tl.constexpr, sized: tl.constexpr):
    """Where `within`, a block's keys, values and sizes enter the sums of their cells, of which `numbers` says which
    row: products with a one-hot matrix. (In a region of their own the compiler spreads them over the warps by their
    own shape, not by the softmax's.)
    """
    keys, values, counts = sums
    if within:
        same = numbers[None, :] == tl.arange(0, HALF)[:, None]
        if masked:
            same = same & real[None, :]
        weights = same.to(tl.float32)  # the interpreter has no other way to bfloat16
        if sized:
            weights = weights * size[None, :]
        hot = weights.to(k.dtype)
        ones = tl.full([k.shape[0], LEAST], 1.0, k.dtype)
        counts = tl.dot(hot, ones, counts)
        if sized and k.dtype == tl.bfloat16:  # what sizes above 256 lose in so few bits (float16: above 2048)
            low = (weights - hot.to(tl.float32)).to(k.dtype)
            counts = tl.dot(low, ones, counts)
            keys, values = tl.dot(low, k, keys), tl.dot(low, v, values)
        keys, values = tl.dot(hot, k, keys), tl.dot(hot, v, values)
    return keys, values, counts


@triton.jit
def _add_listed(
    q, base, sizes, lists, start, split, state, s, block_n: tl.constexpr, masked: tl.constexpr, follow: tl.constexpr
):
    """A block of a tile's list enters the softmax, and the sums of its cells: before entry split[0] some are of their
    first half, from split[1] on of their second.

    Not masked: all its entries are listed. A list may hold anything: it is brought into range, nothing outside is read.
    """
    entries = start + tl.arange(0, block_n)
    real = entries < s.keys
    if masked:  # Entries behind the last repeat it, and weigh nothing.
        entries = tl.minimum(entries, s.keys - 1)
    listed = tl.minimum(tl.load(lists + entries).to(tl.uint32), s.columns - 1)  # what is negative becomes large first
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
    number = (listed // s.cell).to(tl.int32)
    low = _add_selected(start < split[0], number, real, size, k, v, low, masked, sized)
    high = _add_selected(start + block_n > split[1], number - HALF, real, size, k, v, high, masked, sized)
    return softmax, low, high


@triton.jit
def _sample(q, base, sizes, lists, s):
    """By keys from all over a tile's list: where rows' sums stand, above the greatest logit, and the entries before
    and from which there may be some of the first half of the cells, and of the second.
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
    low = tl.sum((listed < HALF * s.cell).to(tl.int32), 0)
    split = tl.where(low == SAMPLE, s.keys, low * apart), tl.maximum(low - 1, 0) * apart
    return tl.maximum(tl.max(logits, 1) * s.factor, LOWEST) + HEADROOM, split


@triton.jit
def _add_rest(q, cell_sums, cell_sizes, sums, state, before: tl.constexpr, s, follow: tl.constexpr):
    """Means of the keys and values that are left of each cell of a half enter the softmax, as often as are left;
    prefix keys are cells of which nothing is selected.
    """
    keys, values, counts = sums
    number = before + tl.arange(0, HALF)
    inside = number < s.entries
    rest = tl.load(cell_sizes + number, mask=inside, other=0.0) - tl.max(counts, 1)  # whose columns are all alike
    rest = tl.where(rest > 0.5, rest, 0.0)
    share = tl.where(rest > 0.5, reciprocal(tl.maximum(rest, 0.5)), 0.0)[:, None]
    k = load_rows(cell_sums, number, 2 * s.width, inside, s.width, s.block_d).to(tl.float32) * s.unit
    v = load_rows(cell_sums + s.width, number, 2 * s.width, inside, s.width, s.block_d).to(tl.float32) * s.unit
    k, v = ((k - keys) * share).to(q.dtype), ((v - values) * share).to(q.dtype)
    peak, total, out = state
    logits = tl.dot(q, tl.trans(k))
    higher = peak
    if follow:
        most = tl.max(tl.where((rest > 0.5)[None, :], logits, float("-inf")), 1) * s.factor
        higher = tl.maximum(peak, most + HEADROOM)  # what is left may be many
        decay = tl.exp2(peak - higher)[:, None]
        total, out = total * decay, out * decay
    weights = tl.exp2(logits * s.factor - higher[:, None]) * rest[None, :]
    if follow:  # else a cell of which nothing is left adds 0, or NaN where logits are taken again
        weights = tl.where((rest > 0.5)[None, :], weights, 0.0)
    weights = weights.to(q.dtype)
    total = tl.dot(weights, tl.full([HALF, LEAST], 1.0, q.dtype), total)
    return higher, total, tl.dot(weights, v, out)


@triton.jit
def _store_attended(output, q, cell_sums, cell_sizes, state, rows, real_rows, s, follow: tl.constexpr):
    """The rest of each cell enters a tile's softmax, and its output is stored; or nothing is, where sums overflowed.
    Returns whether it was stored.
    """
    softmax, low, high = state
    softmax = _add_rest(q, cell_sums, cell_sizes, low, softmax, 0, s, follow)
    if s.entries > HALF:
        softmax = _add_rest(q, cell_sums, cell_sizes, high, softmax, HALF, s, follow)
    total = tl.max(softmax[1], 1)  # whose columns are all alike
    fits = follow or tl.min((total < GREATEST_SUM).to(tl.int32)) > 0  # NaN is not
    if fits:
        out = softmax[2] * reciprocal(total)[:, None]
        store_rows(output, rows, s.channels, real_rows, s.width, s.block_d, out)
    return fits


@triton.jit
def _tile_again(
    base, sizes, lists, cell_sums, cell_sizes, output, rows, real_rows, block_m: tl.constexpr, block_n: tl.constexpr, s
):
    """A tile whose logits are so far above the sample's that sums overflowed, by a peak that follows. What the first
    try had is made again: to keep it takes registers.
    """
    q = load_rows(base, rows, s.stride, real_rows, s.width, s.block_d)
    _, split = _sample(q, base, sizes, lists, s)
    none = _no_sums(s.block_d)
    state = _no_softmax(block_m, s.block_d), none, none
    for start in tl.range(0, s.keys, block_n, num_stages=1):
        state = _add_listed(q, base, sizes, lists, start, split, state, s, block_n, True, True)
    _store_attended(output, q, cell_sums, cell_sizes, state, rows, real_rows, s, True)


@triton.jit
def _prefix_row(base, partial_out, partial_stats, row, s, cells: tl.constexpr, block_f: tl.constexpr):
    """A prefix query over the prefix, joined with its partial softmaxes over cells: [d]."""
    columns, number = tl.arange(0, s.block_d), tl.arange(0, block_f)
    inside = number < s.prefix
    q = tl.load(base + row * s.stride + columns, mask=columns < s.width, other=0.0).to(tl.float32)
    k = load_rows(base + s.channels, number, s.stride, inside, s.width, s.block_d).to(tl.float32)
    v = load_rows(base + 2 * s.channels, number, s.stride, inside, s.width, s.block_d).to(tl.float32)
    logits = tl.where(inside, tl.sum(q[None, :] * k, 1) * s.factor, float("-inf"))
    block = tl.arange(0, 2 * HALF)
    place, there = block * s.prefix + row, block < cells
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
    cell_sums,
    cell_sizes,
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
    cell: tl.constexpr,
    cells: tl.constexpr,
    factor: tl.constexpr,
    unit: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_t: tl.constexpr,
    block_f: tl.constexpr,
    block_d: tl.constexpr,
):
    """Grid (prefix + T, H, B): output [B,N,C]. None: sizes where all are 1, partial_* without prefix."""
    s: tl.constexpr = _Sizes(
        heads * width,
        3 * heads * width,
        width,
        block_d,
        prefix,
        tokens - prefix,
        keys,
        cell,
        cells + prefix,
        factor,
        unit,
    )
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = image * heads + head
    base = qkv + image * tokens * s.stride + head * width
    output += image * tokens * s.channels + head * width
    if prefix > 0 and tl.program_id(0) < prefix:  # the first part at compile time
        row = tl.program_id(0)
        parts = lane * cells * prefix
        values = _prefix_row(base, partial_out + parts * width, partial_stats + parts * 2, row, s, cells, block_f)
        place = output + row * s.channels + tl.arange(0, block_d)
        tl.store(place, values.to(output.dtype.element_ty), mask=tl.arange(0, block_d) < width)
    else:
        number = tl.program_id(0) - prefix
        rows = prefix + number * tile + tl.arange(0, block_m)
        real_rows = rows < tl.minimum(prefix + (number + 1) * tile, tokens)
        lists = indices + (lane * tiles + number) * keys
        weights = None if sizes is None else sizes + image * tokens
        cell_sums += lane * s.entries * 2 * width
        cell_sizes += lane * s.entries
        every = tl.full([block_m], True, tl.int1)
        q = load_rows(base, tl.minimum(rows, tokens - 1), s.stride, every, width, block_d)
        full: tl.constexpr = keys // block_n * block_n
        none = _no_sums(block_d)
        peak, split = _sample(q, base, weights, lists, s)
        # What does not fill a block comes first: sums begin with it.
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
        if not _store_attended(output, q, cell_sums, cell_sizes, state, rows, real_rows, s, False):
            _tile_again(
                base,
                weights,
                lists,
                cell_sums,
                cell_sizes,
                output,
                rows,
                real_rows,
                block_m,
                block_n if block_n <= FOLLOWED else block_t,
                s,
            )
