"""What `select` and `attend` need of a layer's keys, queries and values, in one launch: `summarise`.

    a block of patches:  q ─ mean of each probe ─ proj_q ─► probes [G,c]        ─► select
                         k ─────────────────────── proj_k ─► projected [P,c]    ─► select
                         prefix queries x k, v ─► partial softmaxes             ─► attend
    a cell:              v ─ distance to the cell's mean ─► deviation [P]       ─► select
                         sums of k and v; a prefix token is a cell of its own   ─► attend

The factor of the logits and both projections' powers of two are in `probes`, which with `projected` is float16 where
qkv is of half precision, else float32. What projects them is split in two parts, high + low, of twice the bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import in_parts, is_nan, load_rows, store_rows

LARGEST_HALF = tl.constexpr(60000.0)


@triton.jit
def _projection(
    projection, head, width: tl.constexpr, channels: tl.constexpr, block_d: tl.constexpr, block_c: tl.constexpr
):
    """A head's projection [block_d, block_c] over the power of two below its largest entry, and that power."""
    rows = tl.arange(0, block_d)
    values = load_rows(projection + head * width * channels, rows, channels, rows < width, channels, block_c)
    values = values.to(tl.float32)
    largest = tl.max(tl.max(tl.abs(values), 1), 0)
    # The exponent bits alone are the power of two below; 2^-100 keeps zeros from dividing by zero.
    power = (tl.maximum(largest, 7.9e-31).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return values / power, power


@triton.jit
def _store_projected(place, values, real, block_c: tl.constexpr):
    """Rows of float32 as the buffer's type, within its range; NaN stays."""
    inside = tl.minimum(tl.maximum(values, -LARGEST_HALF), LARGEST_HALF)
    if place.dtype.element_ty == tl.float16:
        values = tl.where(is_nan(values), values, inside)
    store_rows(place, tl.arange(0, values.shape[0]), block_c, real, block_c, block_c, values)


@triton.jit
def _product(x, weights, precision: tl.constexpr):
    """x (its own type) times float32 weights as exactly as the type's parts can: two products at half precision."""
    if x.dtype == tl.float32:
        return tl.dot(x, weights, input_precision=precision)
    high, low = in_parts(weights, x.dtype)
    return tl.dot(x, high, tl.dot(x, low))


@triton.jit
def _store_probes(
    q, weights, real, proj_q, power_k, place, head, width: tl.constexpr, channels: tl.constexpr, probe: tl.constexpr,
    left, factor: tl.constexpr, block_g: tl.constexpr, block_d: tl.constexpr, block_c: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Weighted means of consecutive queries, projected: one product with who belongs to which probe."""
    number = tl.arange(0, block_g)
    same = ((tl.arange(0, q.shape[0]) // probe)[None, :] == number[:, None]) & real[None, :]
    members = tl.where(same, weights[None, :], 0.0)
    # A product would spread what is not finite over all probes of the block: it spoils its own.
    bad = tl.where(tl.sum(q.to(tl.float32) * 0.0, 1) == 0.0, 0, 1)
    q = tl.where(bad[:, None] > 0, 0.0, q.to(tl.float32)).to(q.dtype)
    spoilt = tl.max(tl.where(same, bad[None, :], 0), 1)
    means = tl.trans(_product(tl.trans(q), tl.trans(members), precision))
    means = means / tl.maximum(tl.sum(members, 1), 1.0)[:, None]
    means = tl.where(spoilt[:, None] > 0, float("nan"), means)
    values, power = _projection(proj_q, head, width, channels, block_d, block_c)
    if q.dtype == tl.float32:
        asked = tl.dot(means, values, input_precision=precision)
    else:
        high, low = in_parts(means, q.dtype)
        asked = _product(high, values, precision) + tl.dot(low, values.to(q.dtype))
    _store_projected(place, asked * (power * power_k * factor), number < left, block_c)


@triton.jit
def _cell(
    k, v, sizes, deviation, sums, counts, number, stride: tl.constexpr, width: tl.constexpr, patches: tl.constexpr,
    prefix: tl.constexpr, cell: tl.constexpr, value_power: tl.constexpr, floor: tl.constexpr, block_p: tl.constexpr,
    block_d: tl.constexpr,
):  # fmt: skip
    """A cell's sums of keys and values, its size, and of each of its values value_power x log2 of the distance to their
    mean. Where cell is 0: of block_p patches the distance to zero. Behind the cells each prefix token is one alone.
    """
    run: tl.constexpr = cell if cell else block_p
    cells: tl.constexpr = (patches + run - 1) // run
    start = tl.where(number < cells, number * run, number - cells - prefix)
    stop = tl.where(number < cells, tl.minimum(start + run, patches), start + 1)
    key_sum, value_sum = tl.zeros([block_d], tl.float32), tl.zeros([block_d], tl.float32)
    count = tl.zeros([block_p], tl.float32)
    if cell:
        for row in range(start, stop, block_p):
            rows = row + tl.arange(0, block_p)
            weights = tl.where(rows < stop, 1.0, 0.0)
            if sizes is not None:
                weights = tl.load(sizes + rows, mask=rows < stop, other=0.0)
            values = load_rows(v, rows, stride, rows < stop, width, block_d).to(tl.float32)
            value_sum += tl.sum(values * weights[:, None], 0)
            if sums is not None:
                keys = load_rows(k, rows, stride, rows < stop, width, block_d).to(tl.float32)
                key_sum += tl.sum(keys * weights[:, None], 0)
            count += weights
        size = tl.sum(count, 0)
        if sums is not None:
            columns = tl.arange(0, block_d)
            tl.store(sums + columns, key_sum, mask=columns < width)
            tl.store(sums + width + columns, value_sum, mask=columns < width)
            tl.store(counts, size)
        value_sum = value_sum / size
    if deviation is not None:
        for row in range(start, stop, block_p):
            rows = row + tl.arange(0, block_p)
            apart = load_rows(v, rows, stride, rows < stop, width, block_d).to(tl.float32) - value_sum[None, :]
            squares = tl.sum(apart * apart, 1)
            # NaN must survive: the comparison is false for it.
            distance = tl.where(squares < floor * floor, floor, tl.sqrt(squares))
            tl.store(deviation + rows, value_power * tl.log2(distance), mask=(rows >= 0) & (rows < stop))


@triton.jit
def _partial_softmax(
    base, k, v, logs, real, place, partial_out, partial_stats, prefix: tl.constexpr, stride: tl.constexpr,
    width: tl.constexpr, factor: tl.constexpr, block_f: tl.constexpr, block_d: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The prefix queries over one block of patches: weighted sum [prefix,d], greatest logit and sum of weights."""
    rows = tl.arange(0, block_f)
    q = load_rows(base, rows, stride, rows < prefix, width, block_d)
    logits = tl.dot(q, tl.trans(k), input_precision=precision) * factor + logs[None, :]
    logits = tl.where(real[None, :], logits, float("-inf"))
    peak = tl.max(logits, 1)
    weights = tl.exp2(logits - peak[:, None])
    out = tl.dot(weights.to(v.dtype), v, input_precision=precision)
    store_rows(partial_out + place * width, rows, width, rows < prefix, width, block_d, out)
    tl.store(partial_stats + 2 * (place + rows), peak, mask=rows < prefix)
    tl.store(partial_stats + 2 * (place + rows) + 1, tl.sum(weights, 1), mask=rows < prefix)


@triton.jit
def summarise_kernel(
    qkv, sizes, proj_q, proj_k, probes, projected, deviation, cell_sums, cell_sizes, partial_out, partial_stats,
    tokens: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, prefix: tl.constexpr, channels: tl.constexpr,
    probe: tl.constexpr, run: tl.constexpr, cell: tl.constexpr, value_power: tl.constexpr, floor: tl.constexpr,
    factor: tl.constexpr, block_p: tl.constexpr, block_g: tl.constexpr, block_f: tl.constexpr,
    block_d: tl.constexpr, block_c: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of `run` patches + cells + prefix, H, B). None is not made: sizes where all are 1, what KeySelect
    alone needs (proj_q to deviation), what the rest of cells needs (cell_*), or prefix queries (partial_*).
    """
    patches: tl.constexpr = tokens - prefix
    blocks: tl.constexpr = (patches + run - 1) // run
    stride: tl.constexpr = 3 * heads * width
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane, block = image * heads + head, tl.program_id(0)
    base = qkv + image * tokens * stride + head * width
    first = base + prefix * stride
    weights = None if sizes is None else sizes + image * tokens + prefix
    if block < blocks:
        number = tl.arange(0, block_p)
        rows = block * run + number
        real = (number < run) & (rows < patches)
        k = load_rows(first + heads * width, rows, stride, real, width, block_d)
        size = tl.where(real, 1.0, 0.0)
        if sizes is not None:
            size = tl.load(weights + rows, mask=real, other=0.0)
        if proj_k is not None:
            values, power = _projection(proj_k, head, width, channels, block_d, block_c)
            _store_projected(
                projected + (lane * patches + block * run) * block_c, _product(k, values, precision), real, block_c
            )  # fmt: skip
            asking: tl.constexpr = (patches + probe - 1) // probe
            before = block * (run // probe)
            q = load_rows(first, rows, stride, real, width, block_d)
            _store_probes(
                q, size, real, proj_q, power, probes + (lane * asking + before) * block_c, head, width, channels,
                probe, tl.minimum(run // probe, asking - before), factor, block_g, block_d, block_c, precision,
            )  # fmt: skip
        if partial_out is not None:
            v = load_rows(first + 2 * heads * width, rows, stride, real, width, block_d)
            logs = tl.log2(tl.maximum(size, 1.0))
            _partial_softmax(
                base, k, v, logs, real, (lane * blocks + block) * prefix, partial_out, partial_stats, prefix, stride,
                width, factor, block_f, block_d, precision,
            )  # fmt: skip
    elif (deviation is not None) | (cell_sums is not None):
        place = lane * ((patches + cell - 1) // cell + prefix) + block - blocks if cell else 0
        _cell(
            first + heads * width, first + 2 * heads * width, weights,
            None if deviation is None else deviation + lane * patches,
            None if cell_sums is None else cell_sums + place * 2 * width,
            None if cell_sizes is None else cell_sizes + place,
            block - blocks, stride, width, patches, prefix, cell, value_power, floor, block_p, block_d,
        )  # fmt: skip
