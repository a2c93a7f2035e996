"""What `select` and `attend` need of a layer's keys, queries and values, in one launch: `summarise`.

    a cell:       k ─┬─ proj_k ─► projected [P,c]                                     ─► select
                     ├─ sum ─► of its keys ───────────────────────────────────────────► attend
                     └─ prefix queries ─► softmax ─┐
                  v ─┬─ weighted by it ────────────┴─► partial softmax of the cell     ─► attend
                     ├─ sum ─┬─► of its values; a prefix token is a cell of its own    ─► attend
                     └───────┴─ distance to the mean ─► deviation [P]                  ─► select
    some probes:  q ─ mean of each ─ proj_q ─► probes [G,c]                            ─► select

Keys are read once, a cell's values again, for their distances, while they are in cache. The factor of the logits and
both projections' powers of two are in `probes`, which with `projected` is float16.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import in_parts, load_rows, store_rows

LARGEST_HALF = tl.constexpr(60000.0)
LOWEST_PEAK = tl.constexpr(-1.0e30)
"""Where the greatest logit starts: finite, so that the difference of two is no NaN."""
COLUMNS = tl.constexpr(8)
"""That a product of the matrix units has at least."""


class _Sizes(NamedTuple):
    """Constants that functions share.

    Attributes:
        channels: of all heads. stride: elements from one token's qkv to the next.
        narrow: channels of the predictor. depth: elements from one row of what is projected to the next.
        factor: of logits, in base 2. unit: that sums of cells are stored in.
        power, floor: of the distances to a mean: value_power, and the least that counts.
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
    """A head's projection [block_d, block_c], and the power of two below its largest entry."""
    rows = tl.arange(0, s.block_d)
    values = load_rows(projection + head * s.width * s.narrow, rows, s.narrow, rows < s.width, s.narrow, s.block_c)
    largest = tl.max(tl.abs(values))
    # The exponent bits alone are the power of two below; 2^-100 keeps zeros from dividing by zero.
    power = (tl.maximum(largest, 7.9e-31).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return values, power


@triton.jit
def _store_projected(place, values, real, s):
    """Rows of float32 as float16, within its range; NaN stays."""
    values = values.to(tl.float16)
    most = tl.full(values.shape, LARGEST_HALF, tl.float16)
    values = tl.minimum(values, most, propagate_nan=tl.PropagateNan.ALL)
    values = tl.maximum(values, -most, propagate_nan=tl.PropagateNan.ALL)
    store_rows(place, tl.arange(0, values.shape[0]), s.depth, real, s.depth, s.block_c, values)


@triton.jit
def _mean_queries(q, sizes, first, s, probe: tl.constexpr, block_g: tl.constexpr):
    """Weighted means of consecutive queries [block_g, block_d], from probe `first` on."""
    start = (first + tl.arange(0, block_g)) * probe
    columns = tl.arange(0, s.block_d)
    place = q + (start * s.stride)[:, None] + columns[None, :]
    total, count = tl.zeros([block_g, s.block_d], tl.float32), tl.zeros([block_g], tl.float32)
    for n in tl.static_range(probe):  # unrolled: loads are under way together
        real = start + n < s.patches
        mask = real[:, None] if s.block_d == s.width else real[:, None] & (columns < s.width)[None, :]
        values = tl.load(place + n * s.stride, mask=mask, other=0.0).to(tl.float32)
        if sizes is not None:
            size = tl.load(sizes + start + n, mask=real, other=0.0)
            values *= size[:, None]
            count += size
        total += values
    if sizes is None:
        count = tl.minimum(tl.maximum(s.patches - start, 1), probe).to(tl.float32)
    return total / tl.maximum(count, 1.0)[:, None]


@triton.jit
def _store_probes(q, sizes, proj_q, proj_k, place, head, first, s, probe: tl.constexpr, block_g: tl.constexpr):
    """Mean queries of block_g probes, projected, times all that `projected` leaves to them."""
    means = _mean_queries(q, sizes, first, s, probe, block_g)
    values, power = _weights_of(proj_q, head, s)
    power_k = _weights_of(proj_k, head, s)[1]
    high, low = in_parts(values * (1.0 / power), q.dtype.element_ty)
    great, small = in_parts(means, q.dtype.element_ty)
    products = tl.dot(great, high, tl.dot(great, low, tl.dot(small, high)))
    there = first + tl.arange(0, block_g) < (s.patches + probe - 1) // probe
    _store_projected(place + first * s.depth, products * (power * power_k * s.factor), there, s)


@triton.jit
def _sum_rows(x, size, before, sized: tl.constexpr):
    """Sums over rows enter `before` [block_d, COLUMNS], whose columns are all alike."""
    if not sized:
        return tl.dot(tl.trans(x), tl.full([x.shape[0], COLUMNS], 1.0, x.dtype), before)
    weights = tl.broadcast_to(size[:, None], [x.shape[0], COLUMNS])
    high, low = in_parts(weights, x.dtype)
    if x.dtype == tl.bfloat16:  # what sizes above 256 lose in so few bits (float16: above 2048)
        before = tl.dot(tl.trans(x), low, before)
    return tl.dot(tl.trans(x), high, before)


@triton.jit
def _first_column(sums):
    """Of sums whose columns are all alike, COLUMNS being a power of two."""
    return tl.sum(sums, 1) * (1.0 / COLUMNS)


@triton.jit
def _add_softmax(queries, k, v, size, real, state, factor: tl.constexpr, sized: tl.constexpr):
    """A block of patches enters the prefix queries' softmaxes: peaks, totals [block_f], weighted sums [d, block_f]."""
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
    """Rows from `before` on, which is added last: loads of one place differ by a constant."""
    columns = tl.arange(0, s.block_d)
    place = base + tl.arange(0, s.block_p)[:, None] * s.stride + columns[None, :]
    mask = real[:, None] if s.block_d == s.width else real[:, None] & (columns < s.width)[None, :]
    return tl.load(place + before * s.stride, mask=mask, other=0.0)


@triton.jit
def _add_patches(k, sizes, before, count, queries, parts, place, state, s):
    """Patches of a cell from its `before`-th on: projected, in the softmaxes, and in its sums."""
    softmax, key_sum, value_sum, total = state
    rows = before + tl.arange(0, s.block_p)
    real = rows < count
    sized: tl.constexpr = sizes is not None
    size = tl.load(sizes + rows, mask=real, other=0.0) if sized else tl.where(real, 1.0, 0.0)
    keys, values = _load_patches(k, before, real, s), _load_patches(k + s.channels, before, real, s)
    # What is stored in float16 is rounded to as many bits as the high part has; bfloat16's has fewer.
    projected = tl.dot(keys, parts[0], tl.dot(keys, parts[1])) if keys.dtype == tl.bfloat16 else tl.dot(keys, parts[0])
    _store_projected(place + before * s.depth, projected, real, s)
    if s.prefix > 0:
        softmax = _add_softmax(queries, keys, values, size, real, softmax, s.factor, sized)
    total += tl.sum(size, 0)
    return softmax, _sum_rows(keys, size, key_sum, sized), _sum_rows(values, size, value_sum, sized), total


@triton.jit
def _store_deviations(deviation, v, mean, count, s):
    """Of a cell's values s.power x log2 of the distance to their mean."""
    for before in range(0, count, s.block_p):
        rows = tl.arange(0, s.block_p)
        real = before + rows < count
        apart = _load_patches(v, before, real, s).to(tl.float32) - mean[None, :]
        squares = tl.sum(apart * apart, 1)
        # The gather leaves a row to one thread, which a sum leaves to eight.
        squares = tl.gather(squares, rows, 0)
        # NaN must survive: the comparison is false for it.
        squares = tl.where(squares < s.floor * s.floor, s.floor * s.floor, squares)
        tl.store(deviation + before + rows, 0.5 * s.power * tl.log2(squares), mask=real)


@triton.jit
def _store_cell(key_sum, value_sum, size, sums, counts, place, s):
    """Sums in a `unit` that they fit into their type by."""
    columns = tl.arange(0, s.block_d)
    tl.store(sums + place * 2 * s.width + columns, key_sum * (1.0 / s.unit), mask=columns < s.width)
    tl.store(sums + (place * 2 + 1) * s.width + columns, value_sum * (1.0 / s.unit), mask=columns < s.width)
    tl.store(counts + place, size)


@triton.jit
def _store_prefix_cells(k, sums, counts, s):
    """Each prefix token is a cell of its own, behind the others."""
    rows = tl.arange(0, s.block_f)
    real = rows < s.prefix
    for part in tl.static_range(2):
        x = load_rows(k + part * s.channels, rows, s.stride, real, s.width, s.block_d).to(tl.float32)
        store_rows(sums + part * s.width, rows, 2 * s.width, real, s.width, s.block_d, x * (1.0 / s.unit))
    tl.store(counts + rows, tl.full([s.block_f], 1.0, tl.float32), mask=real)


@triton.jit
def _store_softmax(state, partial_out, partial_stats, number, s):
    """The prefix queries' weighted sums, greatest logits and sums of weights of one cell."""
    row = tl.arange(0, s.block_f)
    place, real = number * s.prefix + row, row < s.prefix
    store_rows(partial_out, place, s.width, real, s.width, s.block_d, tl.trans(state[2]))
    tl.store(partial_stats + 2 * place, state[0], mask=real)
    tl.store(partial_stats + 2 * place + 1, state[1], mask=real)


@triton.jit
def _cell(
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
    cell: tl.constexpr,
    cells: tl.constexpr,
):
    """All of one cell; pointers are those of a head of an image."""
    start = number * cell
    count = tl.minimum(cell, s.patches - start)
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
    _store_cell(_first_column(key_sum), summed, size, sums, counts, number, s)
    if s.prefix > 0 and number == 0:
        _store_prefix_cells(base + s.channels, sums + cells * 2 * s.width, counts + cells, s)
    _store_deviations(deviation + start, k + s.channels, summed / size, count, s)


@triton.jit
def summarise_kernel(
    qkv,
    sizes,
    proj_q,
    proj_k,
    probes,
    projected,
    deviation,
    cell_sums,
    cell_sizes,
    partial_out,
    partial_stats,
    tokens: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
    prefix: tl.constexpr,
    channels: tl.constexpr,
    probe: tl.constexpr,
    cell: tl.constexpr,
    cells: tl.constexpr,
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
    """Grid (cells + probes by block_g, H, B). None: sizes where all are 1, partial_* without prefix."""
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
    if block < cells:
        _cell(
            base,
            weights,
            proj_k,
            head,
            projected + lane * s.patches * depth,
            deviation + lane * s.patches,
            cell_sums + lane * (cells + prefix) * 2 * width,
            cell_sizes + lane * (cells + prefix),
            None if partial_out is None else partial_out + lane * cells * prefix * width,
            None if partial_stats is None else partial_stats + lane * cells * prefix * 2,
            block,
            s,
            cell,
            cells,
        )
    else:
        place = probes + lane * ((s.patches + probe - 1) // probe) * depth
        first = (block - cells) * block_g
        _store_probes(base + prefix * s.stride, weights, proj_q, proj_k, place, head, first, s, probe, block_g)
