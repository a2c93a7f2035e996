"""SparseAttention on a GPU, forward: `attend`, a tile of queries over its list, the rest of each cell and the prefix.

    listed keys and values, in blocks ─┬► softmax ────────────────────────────────────────┐
                                       └► one-hot by cell x keys, values: what the tile    ├─► output
                                          selected of each cell                            │
    cells' sums (summarise) ─────────────► less what it selected, over what is left; prefix┘
    partial softmaxes of the prefix queries (summarise) ──────────────────────────────────► output

A cell's rest is its sum less what the tile selected of it, so neither masks nor means pass through memory. Where there
are more cells than registers have room for, `rest` makes the means before. Nothing is accumulated by atomics: two runs
give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

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


@triton.jit
def _softmax_block(
    q, k, v, offset, state, factor: tl.constexpr, raised: tl.constexpr, follow: tl.constexpr, precision: tl.constexpr
):
    """Logits factor q k (base 2), raised by `offset` if so said, enter the sums of weights and of what they weigh, or
    begin them where they are None.

    follow: the peak goes with the greatest logit. Else it stays: sums need not be brought to a new one, but what comes
    may overflow. The sum of weights is a product with ones: the matrix units have time for it, additions have not.
    """
    peak, total, out = state
    logits = tl.dot(q, tl.trans(k), input_precision=precision)
    if raised:
        logits = logits * factor + offset[None, :]
    if follow:
        higher = tl.maximum(peak, tl.max(logits, 1) * (1.0 if raised else factor))
        if total is not None:
            decay = tl.exp2(peak - higher)[:, None]
            total, out = total * decay, out * decay
        peak = higher
    weights = tl.exp2((logits if raised else logits * factor) - peak[:, None])
    if v.dtype == tl.float32:
        added = tl.broadcast_to(tl.sum(weights, 1)[:, None], [q.shape[0], LEAST])
        total = added if total is None else total + added
    else:
        total = tl.dot(weights.to(v.dtype), tl.full([k.shape[0], LEAST], 1.0, v.dtype), total)
    out = tl.dot(weights.to(v.dtype), v, out, input_precision=precision)
    return peak, total, out


@triton.jit
def _no_softmax(block_m: tl.constexpr, block_d: tl.constexpr):
    """Of a list that is yet to come."""
    return (
        tl.full([block_m], LOWEST, tl.float32), tl.zeros([block_m, LEAST], tl.float32),
        tl.zeros([block_m, block_d], tl.float32),
    )  # fmt: skip


@triton.jit
def _no_sums(block_d: tl.constexpr):
    """Keys, values and sizes of half the cells."""
    zeros = tl.zeros([HALF, block_d], tl.float32)
    return zeros, zeros, tl.zeros([HALF, LEAST], tl.float32)


@triton.jit
def _add_selected(
    within, numbers, real, size, k, v, sums, masked: tl.constexpr, sized: tl.constexpr, precision: tl.constexpr
):
    """Where `within`, a block's keys, values and sizes enter the sums of their cells, of which `numbers` says which
    row: products with a one-hot matrix. (In a region of their own the compiler spreads them over the warps by their
    own shape, not by the softmax's.)
    """
    keys, values, counts = sums
    if within:
        same = numbers[None, :] == tl.arange(0, HALF)[:, None]
        if masked:
            same = same & real[None, :]
        weights = same.to(tl.float32)  # the interpreter knows no other way to bfloat16
        if sized:
            weights = weights * size[None, :]
        hot = weights.to(k.dtype)
        ones = tl.full([k.shape[0], LEAST], 1.0, k.dtype)
        counts = tl.dot(hot, ones, counts, input_precision=precision)
        if sized and k.dtype == tl.bfloat16:  # what sizes above 256 lose in so few bits (float16: above 2048)
            low = (weights - hot.to(tl.float32)).to(k.dtype)
            counts = tl.dot(low, ones, counts)
            keys, values = tl.dot(low, k, keys), tl.dot(low, v, values)
        keys = tl.dot(hot, k, keys, input_precision=precision)
        values = tl.dot(hot, v, values, input_precision=precision)
    return keys, values, counts


@triton.jit
def _add_listed(
    q, base, sizes, lists, start, split, state, heads: tl.constexpr, width: tl.constexpr, first: tl.constexpr,
    behind: tl.constexpr, columns: tl.constexpr, keys: tl.constexpr, cell: tl.constexpr, factor: tl.constexpr,
    block_n: tl.constexpr, block_d: tl.constexpr, precision: tl.constexpr, masked: tl.constexpr,
    follow: tl.constexpr,
):  # fmt: skip
    """A block of a tile's list, with `behind` prefix tokens behind it, enters the softmax, and the sums of its cells
    where `cell` is not 0: before entry split[0] some are of their first half, from split[1] on of their second.

    Not masked: all its entries are listed. A list may hold anything: it is brought into range, nothing outside is read.
    """
    stride: tl.constexpr = 3 * heads * width
    entries = start + tl.arange(0, block_n)
    real = entries < keys + behind
    if masked:  # What is behind the last is the last once more, and weighs nothing.
        entries = tl.minimum(entries, keys + behind - 1)
    listed = tl.load(lists + (tl.minimum(entries, keys - 1) if masked and behind > 0 else entries))
    listed = tl.minimum(listed.to(tl.uint32), columns - 1)  # what is negative becomes large first
    token = first + listed.to(tl.int32)
    if masked and behind > 0:
        token = tl.where(entries < keys, token, entries - keys)
    every = tl.full([block_n], True, tl.int1)
    k = load_rows(base + heads * width, token, stride, every, width, block_d)
    v = load_rows(base + 2 * heads * width, token, stride, every, width, block_d)
    sized: tl.constexpr = sizes is not None
    size = tl.load(sizes + token) if sized else 1.0
    offset = tl.log2(size) if sized else tl.zeros([block_n], tl.float32)
    if masked:
        offset = tl.where(real, offset, float("-inf"))
    softmax, low, high = state
    softmax = _softmax_block(q, k, v, offset, softmax, factor, masked or sized, follow, precision)
    if cell:
        number = (listed // cell).to(tl.int32)
        low = _add_selected(start < split[0], number, real, size, k, v, low, masked, sized, precision)
        high = _add_selected(
            start + block_n > split[1], number - HALF, real, size, k, v, high, masked, sized, precision
        )  # fmt: skip
    return softmax, low, high


@triton.jit
def _sample(
    q, base, sizes, lists, heads: tl.constexpr, width: tl.constexpr, first: tl.constexpr, columns: tl.constexpr,
    keys: tl.constexpr, cell: tl.constexpr, factor: tl.constexpr, block_d: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """By keys from all over a tile's list: where rows' sums stand, above the greatest logit, and the entries before
    and from which there may be some of the first half of the cells, and of the second.
    """
    number, apart = tl.arange(0, SAMPLE), max(keys // SAMPLE, 1)
    real = number < keys
    listed = tl.load(lists + number * apart, mask=real, other=-1).to(tl.uint32)
    token = first + tl.minimum(listed, columns - 1).to(tl.int32)
    k = load_rows(base + heads * width, token, 3 * heads * width, real, width, block_d)
    logits = tl.dot(q, tl.trans(k), input_precision=precision)
    if sizes is not None:
        unscaled: tl.constexpr = 1.0 / factor if factor != 0 else 1.0
        logits += (tl.log2(tl.load(sizes + token, mask=real, other=1.0)) * unscaled)[None, :]
    if keys < SAMPLE:
        logits = tl.where(real[None, :], logits, float("-inf"))
    split = 0, 0
    if cell:
        low = tl.sum((listed < HALF * cell).to(tl.int32), 0)
        split = tl.where(low == SAMPLE, keys, low * apart), tl.maximum(low - 1, 0) * apart
    return tl.maximum(tl.max(logits, 1) * factor, LOWEST) + HEADROOM, split


@triton.jit
def _add_means(
    q, rest_keys, rest_values, rest_sizes, state, width: tl.constexpr, cells: tl.constexpr, factor: tl.constexpr,
    block_r: tl.constexpr, block_d: tl.constexpr, precision: tl.constexpr, follow: tl.constexpr,
):  # fmt: skip
    """The rest of each cell, made before, enters the softmax."""
    for start in range(0, cells, block_r):
        number = start + tl.arange(0, block_r)
        k = load_rows(rest_keys, number, width, number < cells, width, block_d)
        v = load_rows(rest_values, number, width, number < cells, width, block_d)
        offset = tl.load(rest_sizes + number, mask=number < cells, other=float("-inf"))
        state = _softmax_block(q, k, v, offset, state, factor, True, follow, precision)
    return state


@triton.jit
def _add_rest(
    q, cell_sums, cell_sizes, sums, state, before: tl.constexpr, width: tl.constexpr, entries: tl.constexpr,
    factor: tl.constexpr, unit: tl.constexpr, block_d: tl.constexpr, precision: tl.constexpr, follow: tl.constexpr,
):  # fmt: skip
    """Means of the keys and values that are left of each cell of a half enter the softmax, as often as are left;
    prefix keys are cells of which nothing is selected.
    """
    keys, values, counts = sums
    number = before + tl.arange(0, HALF)
    inside = number < entries
    left = tl.load(cell_sizes + number, mask=inside, other=0.0) - tl.max(counts, 1)  # whose columns are all alike
    left = tl.where(left > 0.5, left, 0.0)
    share = tl.where(left > 0.5, reciprocal(tl.maximum(left, 0.5)), 0.0)[:, None]
    k = load_rows(cell_sums, number, 2 * width, inside, width, block_d).to(tl.float32) * unit
    v = load_rows(cell_sums + width, number, 2 * width, inside, width, block_d).to(tl.float32) * unit
    k, v = ((k - keys) * share).to(q.dtype), ((v - values) * share).to(q.dtype)
    peak, total, out = state
    logits = tl.dot(q, tl.trans(k), input_precision=precision)
    higher = peak
    if follow:
        most = tl.max(tl.where((left > 0.5)[None, :], logits, float("-inf")), 1) * factor
        higher = tl.maximum(peak, most + HEADROOM)  # what is left may be many
        decay = tl.exp2(peak - higher)[:, None]
        total, out = total * decay, out * decay
    weights = tl.exp2(logits * factor - higher[:, None]) * left[None, :]
    if follow:  # else a cell of which nothing is left adds 0, or NaN where logits are taken again
        weights = tl.where((left > 0.5)[None, :], weights, 0.0)
    weights = weights.to(q.dtype)
    total = tl.dot(weights, tl.full([HALF, LEAST], 1.0, q.dtype), total)
    return higher, total, tl.dot(weights, v, out, input_precision=precision)


@triton.jit
def _add_cells(
    q, sums, sizes, rest_keys, rest_values, rest_sizes, state, lane, number, width: tl.constexpr, tiles: tl.constexpr,
    cell: tl.constexpr, cells: tl.constexpr, first: tl.constexpr, factor: tl.constexpr, unit: tl.constexpr,
    block_r: tl.constexpr, block_d: tl.constexpr, precision: tl.constexpr, follow: tl.constexpr,
):  # fmt: skip
    """What a tile has not listed enters its softmax, by the sums of its cells or by means; see `attend_kernel`."""
    softmax, low, high = state
    if cell:
        entries: tl.constexpr = cells + first
        sums += lane * entries * 2 * width
        sizes += lane * entries
        softmax = _add_rest(q, sums, sizes, low, softmax, 0, width, entries, factor, unit, block_d, precision, follow)
        if entries > HALF:
            softmax = _add_rest(
                q, sums, sizes, high, softmax, HALF, width, entries, factor, unit, block_d, precision, follow
            )  # fmt: skip
    elif rest_keys is not None:
        place = (lane * tiles + number) * cells
        softmax = _add_means(
            q, rest_keys + place * width, rest_values + place * width, rest_sizes + place, softmax, width, cells,
            factor, block_r, block_d, precision, follow,
        )  # fmt: skip
    return softmax


@triton.jit
def _store_tile(output, total, out, rows, real_rows, heads: tl.constexpr, width: tl.constexpr, block_d: tl.constexpr):
    """A tile's output, from its first token's and head's place on."""
    store_rows(output, rows, heads * width, real_rows, width, block_d, out * reciprocal(total)[:, None])


@triton.jit
def _tile_again(
    base, weights, lists, cell_sums, cell_sizes, rest_keys, rest_values, rest_sizes, output, lane, number, rows,
    real_rows, heads: tl.constexpr, width: tl.constexpr, first: tl.constexpr, behind: tl.constexpr,
    columns: tl.constexpr, tiles: tl.constexpr, keys: tl.constexpr, cell: tl.constexpr, cells: tl.constexpr,
    factor: tl.constexpr, unit: tl.constexpr, block_n: tl.constexpr, block_r: tl.constexpr, block_d: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """A tile whose logits are so far above the sample's that sums overflowed, by a peak that follows. What the first
    try had is made again: to keep it takes registers.
    """
    q = load_rows(base, rows, 3 * heads * width, real_rows, width, block_d)
    _, split = _sample(q, base, weights, lists, heads, width, first, columns, keys, cell, factor, block_d, precision)
    none = _no_sums(block_d)
    state = _no_softmax(q.shape[0], block_d), none, none
    for start in tl.range(0, keys + behind, block_n, num_stages=1):
        state = _add_listed(
            q, base, weights, lists, start, split, state, heads, width, first, behind, columns, keys, cell, factor,
            block_n, block_d, precision, True, True,
        )  # fmt: skip
    _, total, out = _add_cells(
        q, cell_sums, cell_sizes, rest_keys, rest_values, rest_sizes, state, lane, number, width, tiles, cell, cells,
        first, factor, unit, block_r, block_d, precision, True,
    )  # fmt: skip
    _store_tile(output, tl.max(total, 1), out, rows, real_rows, heads, width, block_d)


@triton.jit
def _prefix_row(
    base, partial_out, partial_stats, row, prefix: tl.constexpr, heads: tl.constexpr, width: tl.constexpr,
    blocks: tl.constexpr, factor: tl.constexpr, block_f: tl.constexpr, block_b: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """A prefix query over the prefix, joined with its partial softmaxes over blocks of patches: [d]."""
    stride: tl.constexpr = 3 * heads * width
    columns, number = tl.arange(0, block_d), tl.arange(0, block_f)
    q = tl.load(base + row * stride + columns, mask=columns < width, other=0.0).to(tl.float32)
    k = load_rows(base + heads * width, number, stride, number < prefix, width, block_d).to(tl.float32)
    v = load_rows(base + 2 * heads * width, number, stride, number < prefix, width, block_d).to(tl.float32)
    logits = tl.where(number < prefix, tl.sum(q[None, :] * k, 1) * factor, float("-inf"))
    peak = tl.max(logits, 0)
    own = tl.exp2(logits - peak)
    total, out = tl.sum(own, 0), tl.sum(own[:, None] * v, 0)
    for start in range(0, blocks, block_b):
        block = start + tl.arange(0, block_b)
        place, there = block * prefix + row, block < blocks
        peaks = tl.load(partial_stats + 2 * place, mask=there, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(peaks, 0))
        shares, decay = tl.exp2(peaks - higher), tl.exp2(peak - higher)
        total = total * decay + tl.sum(shares * tl.load(partial_stats + 2 * place + 1, mask=there, other=0.0), 0)
        out = out * decay + tl.sum(shares[:, None] * load_rows(partial_out, place, width, there, width, block_d), 0)
        peak = higher
    return out / total


@triton.jit
def attend_kernel(
    qkv, sizes, indices, cell_sums, cell_sizes, rest_keys, rest_values, rest_sizes, partial_out, partial_stats,
    output,
    tokens: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, prefix: tl.constexpr, first: tl.constexpr,
    tile: tl.constexpr, tiles: tl.constexpr, keys: tl.constexpr, cell: tl.constexpr, cells: tl.constexpr,
    blocks: tl.constexpr, factor: tl.constexpr, unit: tl.constexpr, chunks: tl.constexpr, block_m: tl.constexpr,
    block_n: tl.constexpr, block_t: tl.constexpr, block_r: tl.constexpr, block_b: tl.constexpr, block_f: tl.constexpr,
    block_d: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Grid (prefix + T x chunks of a tile, H, B): output [B,N,C].

    None: sizes where all are 1, cell_* where there are no cells or rest_* are given (`cell` is 0 then), partial_*
    without prefix.
    """
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = image * heads + head
    base = qkv + image * tokens * 3 * heads * width + head * width
    if prefix > 0 and tl.program_id(0) < prefix:  # the first part at compile time
        row = tl.program_id(0)
        found = _prefix_row(
            base, partial_out + lane * blocks * prefix * width, partial_stats + lane * blocks * prefix * 2, row,
            prefix, heads, width, blocks, factor, block_f, block_b, block_d,
        )  # fmt: skip
        place = output + ((image * tokens + row) * heads + head) * width + tl.arange(0, block_d)
        tl.store(place, found.to(output.dtype.element_ty), mask=tl.arange(0, block_d) < width)
    else:
        chunk = tl.program_id(0) - prefix
        number = chunk // chunks
        rows = prefix + number * tile + chunk % chunks * block_m + tl.arange(0, block_m)
        real_rows = rows < tl.minimum(prefix + (number + 1) * tile, tokens)
        lists = indices + (lane * tiles + number) * keys
        weights = None if sizes is None else sizes + image * tokens
        every = tl.full([block_m], True, tl.int1)
        q = load_rows(base, tl.minimum(rows, tokens - 1), 3 * heads * width, every, width, block_d)
        full: tl.constexpr = keys // block_n * block_n
        behind: tl.constexpr = 0 if cell else first  # with cells that are summed here the prefix is among those
        none = _no_sums(block_d)
        # At float32 a peak that follows costs little beside three products, and nothing is taken again.
        follow: tl.constexpr = qkv.dtype.element_ty == tl.float32
        peak, split = tl.full([block_m], LOWEST, tl.float32), (0, 0)
        if not follow:
            peak, split = _sample(
                q, base, weights, lists, heads, width, first, tokens - first, keys, cell, factor, block_d, precision
            )  # fmt: skip
        # What does not fill a block comes first: sums begin with it.
        if full < keys + behind:
            state = _add_listed(
                q, base, weights, lists, full, split, ((peak, None, None), none, none), heads, width, first, behind,
                tokens - first, keys, cell, factor, block_t, block_d, precision, True, follow,
            )  # fmt: skip
        else:
            _, total, out = _no_softmax(block_m, block_d)
            state = (peak, total, out), none, none
        for start in range(full + block_t, keys + behind, block_t):
            state = _add_listed(
                q, base, weights, lists, start, split, state, heads, width, first, behind, tokens - first, keys, cell,
                factor, block_t, block_d, precision, True, follow,
            )  # fmt: skip
        for start in range(0, full, block_n):
            state = _add_listed(
                q, base, weights, lists, start, split, state, heads, width, first, behind, tokens - first, keys, cell,
                factor, block_n, block_d, precision, False, follow,
            )  # fmt: skip
        _, total, out = _add_cells(
            q, cell_sums, cell_sizes, rest_keys, rest_values, rest_sizes, state, lane, number, width, tiles, cell,
            cells, first, factor, unit, block_r, block_d, precision, follow,
        )  # fmt: skip
        target = output + image * tokens * heads * width + head * width
        total = tl.max(total, 1)  # its columns are all alike
        if follow or tl.min((total < GREATEST_SUM).to(tl.int32)) > 0:  # NaN is not
            _store_tile(target, total, out, rows, real_rows, heads, width, block_d)
        else:
            _tile_again(
                base, weights, lists, cell_sums, cell_sizes, rest_keys, rest_values, rest_sizes, target, lane,
                number, rows, real_rows, heads, width, first, behind, tokens - first, tiles, keys, cell, cells, factor,
                unit, block_n if block_n <= FOLLOWED else block_t, block_r, block_d, precision,
            )  # fmt: skip
