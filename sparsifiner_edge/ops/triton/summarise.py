"""What `select` and `attend` need of a layer's keys, queries and values, in one launch: `summarise`.

    a cell:       k ─┬─ proj_k ─► projected [P,c]                                     ─► select
                     ├─ sum ─► of its keys ───────────────────────────────────────────► attend
                     └─ prefix queries ─► softmax ─┐
                  v ─┬─ weighted by it ────────────┴─► partial softmax of the cell     ─► attend
                     ├─ sum ─┬─► of its values; a prefix token is a cell of its own    ─► attend
                     └───────┴─ distance to the mean ─► deviation [P]                  ─► select
    some probes:  q ─ mean of each ─ proj_q ─► probes [G,c]                            ─► select

Every element is read once, values again where a cell's do not fit into registers. Without cells a program has a block
of patches. The factor of the logits and both projections' powers of two are in `probes`, which with `projected` is
float16 where qkv is of half precision, else float32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005  (Triton knows tuples only as sums)
from __future__ import annotations

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import in_parts, load_rows, store_rows

LARGEST_HALF = tl.constexpr(60000.0)
LOWEST_PEAK = tl.constexpr(-1.0e30)
"""Where the greatest logit starts: finite, so that the difference of two is no NaN."""
COLUMNS = tl.constexpr(8)
"""That a product of the matrix units has at least."""


@triton.jit
def _weights_of(
    projection, head, width: tl.constexpr, channels: tl.constexpr, block_d: tl.constexpr, block_c: tl.constexpr
):
    """A head's projection [block_d, block_c], and the power of two below its largest entry."""
    rows = tl.arange(0, block_d)
    values = load_rows(projection + head * width * channels, rows, channels, rows < width, channels, block_c)
    values = values.to(tl.float32)
    largest = tl.max(tl.abs(values))
    # The exponent bits alone are the power of two below; 2^-100 keeps zeros from dividing by zero.
    power = (tl.maximum(largest, 7.9e-31).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return values, power


@triton.jit
def _store_projected(place, values, real, depth: tl.constexpr):
    """Rows of float32, `depth` of each, as the buffer's type, within its range; NaN stays."""
    if place.dtype.element_ty == tl.float16:
        values = values.to(tl.float16)
        most = tl.full(values.shape, LARGEST_HALF, tl.float16)
        values = tl.minimum(values, most, propagate_nan=tl.PropagateNan.ALL)
        values = tl.maximum(values, -most, propagate_nan=tl.PropagateNan.ALL)
    store_rows(place, tl.arange(0, values.shape[0]), depth, real, depth, values.shape[1], values)


@triton.jit
def _mean_queries(
    q, sizes, first, stride: tl.constexpr, width: tl.constexpr, patches: tl.constexpr, probe: tl.constexpr,
    at_once: tl.constexpr, block_g: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Weighted means of consecutive queries [block_g, block_d], from probe `first` on."""
    start = (first + tl.arange(0, block_g)) * probe
    columns = tl.arange(0, block_d)
    place = q + (start * stride)[:, None] + columns[None, :]
    total, count = tl.zeros([block_g, block_d], tl.float32), tl.zeros([block_g], tl.float32)
    for before in range(0, probe, at_once):
        for n in tl.static_range(at_once):
            rows = start + before + n
            real = rows < patches
            if probe % at_once:
                real = real & (before + n < probe)
            mask = real[:, None] if block_d == width else real[:, None] & (columns < width)[None, :]
            values = tl.load(place + (before + n) * stride, mask=mask, other=0.0).to(tl.float32)
            if sizes is not None:
                size = tl.load(sizes + rows, mask=real, other=0.0)
                values *= size[:, None]
                count += size
            total += values
    if sizes is None:
        count = tl.minimum(tl.maximum(patches - start, 1), probe).to(tl.float32)
    return total / tl.maximum(count, 1.0)[:, None]


@triton.jit
def _store_probes(
    q, sizes, proj_q, proj_k, place, head, first, stride: tl.constexpr, width: tl.constexpr, channels: tl.constexpr,
    patches: tl.constexpr, probe: tl.constexpr, at_once: tl.constexpr, factor: tl.constexpr, block_g: tl.constexpr,
    block_d: tl.constexpr, block_c: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Mean queries of block_g probes, projected, times all that `projected` leaves to them."""
    means = _mean_queries(q, sizes, first, stride, width, patches, probe, at_once, block_g, block_d)
    values, power = _weights_of(proj_q, head, width, channels, block_d, block_c)
    power_k = _weights_of(proj_k, head, width, channels, block_d, block_c)[1]
    values *= 1.0 / power
    if q.dtype.element_ty == tl.float32:
        asked = tl.dot(means, values, input_precision="tf32x3")
    else:
        high, low = in_parts(values, q.dtype.element_ty)
        great, small = in_parts(means, q.dtype.element_ty)
        asked = tl.dot(great, high, tl.dot(great, low, tl.dot(small, high)))
    number = first + tl.arange(0, block_g)
    _store_projected(
        place + first * depth, asked * (power * power_k * factor), number < (patches + probe - 1) // probe, depth
    )


@triton.jit
def _project_keys(k, parts, place, real, depth: tl.constexpr, precision: tl.constexpr):
    """A block of keys times the projection over its power of two."""
    if k.dtype == tl.float32:
        projected = tl.dot(k, parts[0], input_precision=precision)
    elif k.dtype == tl.float16:
        # What is stored is rounded to as many bits as the high part has.
        projected = tl.dot(k, parts[0])
    else:
        projected = tl.dot(k, parts[0], tl.dot(k, parts[1]))
    _store_projected(place, projected, real, depth)


@triton.jit
def _sum_rows(x, size, before, sized: tl.constexpr):
    """Sums over rows enter `before` [block_d, COLUMNS], whose columns are all alike."""
    if x.dtype == tl.float32:
        return before + tl.sum(x * size[:, None], 0)[:, None]
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
def _add_softmax(asked, k, v, size, real, state, factor: tl.constexpr, sized: tl.constexpr, precision: tl.constexpr):
    """A block of patches enters the prefix queries' softmaxes: peaks, totals [block_f], weighted sums [d, block_f]."""
    peaks, totals, out = state
    logits = tl.dot(k, asked, input_precision=precision) * factor
    if sized:
        logits += tl.log2(tl.maximum(size, 1.0))[:, None]
    logits = tl.where(real[:, None], logits, float("-inf"))
    higher = tl.maximum(peaks, tl.max(logits, 0))
    weights, decay = tl.exp2(logits - higher[None, :]), tl.exp2(peaks - higher)
    out = tl.dot(tl.trans(v), weights.to(v.dtype), out * decay[None, :], input_precision=precision)
    return higher, totals * decay + tl.sum(weights, 0), out


@triton.jit
def _load_patches(
    base, before, real, stride: tl.constexpr, width: tl.constexpr, block_p: tl.constexpr, block_d: tl.constexpr
):
    """Rows from `before` on, which is added last: loads of one place differ by a constant."""
    columns = tl.arange(0, block_d)
    place = base + tl.arange(0, block_p)[:, None] * stride + columns[None, :]
    mask = real[:, None] if block_d == width else real[:, None] & (columns < width)[None, :]
    return tl.load(place + before * stride, mask=mask, other=0.0)


@triton.jit
def _add_patches(
    base, sizes, before, count, asked, parts, place, state, heads: tl.constexpr, width: tl.constexpr,
    factor: tl.constexpr, asking: tl.constexpr, projecting: tl.constexpr, keyed: tl.constexpr, valued: tl.constexpr,
    block_p: tl.constexpr, block_d: tl.constexpr, depth: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Patches of a cell from its `before`-th on: projected, in the softmaxes, and in its sums; and their values."""
    stride: tl.constexpr = 3 * heads * width
    softmax, key_sum, value_sum, total = state
    rows = before + tl.arange(0, block_p)
    real = rows < count
    size = tl.where(real, 1.0, 0.0) if sizes is None else tl.load(sizes + rows, mask=real, other=0.0)
    keys = _load_patches(base, before, real, stride, width, block_p, block_d)
    values = _load_patches(base + heads * width, before, real, stride, width, block_p, block_d)
    if projecting:
        _project_keys(keys, parts, place + before * depth, real, depth, precision)
    if asking:
        softmax = _add_softmax(asked, keys, values, size, real, softmax, factor, sizes is not None, precision)
    if keyed:
        key_sum = _sum_rows(keys, size, key_sum, sizes is not None)
    if valued:
        value_sum = _sum_rows(values, size, value_sum, sizes is not None)
        if sizes is not None:
            total += tl.sum(size, 0)
    return (softmax, key_sum, value_sum, total), values


@triton.jit
def _store_deviation(
    deviation, values, mean, before, count, value_power: tl.constexpr, floor: tl.constexpr, block_p: tl.constexpr
):
    """Of a block of values value_power x log2 of the distance to their mean."""
    rows = before + tl.arange(0, block_p)
    apart = values.to(tl.float32) - mean[None, :]
    squares = tl.sum(apart * apart, 1)
    # The gather leaves a row to one thread, which a sum leaves to eight.
    squares = tl.gather(squares, tl.arange(0, block_p), 0)
    # NaN must survive: the comparison is false for it.
    squares = tl.where(squares < floor * floor, floor * floor, squares)
    tl.store(deviation + rows, 0.5 * value_power * tl.log2(squares), mask=rows < count)


@triton.jit
def _store_cell(
    key_sum, value_sum, size, sums, counts, place, width: tl.constexpr, unit: tl.constexpr, block_d: tl.constexpr
):
    """Sums in a `unit` that they fit into their type by."""
    columns = tl.arange(0, block_d)
    tl.store(sums + place * 2 * width + columns, key_sum * (1.0 / unit), mask=columns < width)
    tl.store(sums + (place * 2 + 1) * width + columns, value_sum * (1.0 / unit), mask=columns < width)
    tl.store(counts + place, size)


@triton.jit
def _store_prefix_cells(
    k, v, sums, counts, stride: tl.constexpr, width: tl.constexpr, prefix: tl.constexpr, unit: tl.constexpr,
    block_f: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Each prefix token is a cell of its own, behind the others."""
    rows = tl.arange(0, block_f)
    real = rows < prefix
    keys = load_rows(k, rows, stride, real, width, block_d).to(tl.float32) * (1.0 / unit)
    values = load_rows(v, rows, stride, real, width, block_d).to(tl.float32) * (1.0 / unit)
    store_rows(sums, rows, 2 * width, real, width, block_d, keys)
    store_rows(sums + width, rows, 2 * width, real, width, block_d, values)
    tl.store(counts + rows, tl.full([block_f], 1.0, tl.float32), mask=real)


@triton.jit
def _prepare(
    base, proj_k, head, stride: tl.constexpr, width: tl.constexpr, prefix: tl.constexpr, channels: tl.constexpr,
    asking: tl.constexpr, block_f: tl.constexpr, block_d: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """What keys are multiplied with: prefix queries [d, block_f], the projection in parts [d, block_c]."""
    asked, parts = 0, (0, 0)
    if asking:
        row = tl.arange(0, block_f)
        asked = tl.trans(load_rows(base, row, stride, row < prefix, width, block_d))
    if proj_k is not None:
        weights, power = _weights_of(proj_k, head, width, channels, block_d, block_c)
        weights *= 1.0 / power
        parts = (weights, weights) if base.dtype.element_ty == tl.float32 else in_parts(weights, base.dtype.element_ty)
    return asked, parts


@triton.jit
def _store_softmax(
    state, partial_out, partial_stats, number, width: tl.constexpr, prefix: tl.constexpr, block_f: tl.constexpr,
    block_d: tl.constexpr,
):  # fmt: skip
    """The prefix queries' weighted sums, greatest logits and sums of weights of one cell."""
    row = tl.arange(0, block_f)
    place, real = number * prefix + row, row < prefix
    store_rows(partial_out, place, width, real, width, block_d, tl.trans(state[2]))
    tl.store(partial_stats + 2 * place, state[0], mask=real)
    tl.store(partial_stats + 2 * place + 1, state[1], mask=real)


@triton.jit
def _add_cell(
    k, sizes, count, asked, parts, place, heads: tl.constexpr, width: tl.constexpr, rounds: tl.constexpr,
    last: tl.constexpr, factor: tl.constexpr, asking: tl.constexpr, keyed: tl.constexpr, valued: tl.constexpr,
    block_p: tl.constexpr, block_f: tl.constexpr, block_d: tl.constexpr, depth: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """A cell's patches in blocks: softmaxes, sums of keys and values, size where there are sizes; and held values."""
    projecting: tl.constexpr = place is not None
    softmax = (
        tl.full([block_f], LOWEST_PEAK, tl.float32), tl.zeros([block_f], tl.float32),
        tl.zeros([block_d, block_f], tl.float32),
    )  # fmt: skip
    none = tl.zeros([block_d, COLUMNS], tl.float32)
    state = softmax, none, none, tl.zeros([], tl.float32)
    held = ()
    for n in tl.static_range(rounds):
        state, values = _add_patches(
            k, sizes, n * block_p, count, asked, parts, place, state, heads, width, factor, asking, projecting, keyed,
            valued, block_p, block_d, depth, precision,
        )  # fmt: skip
        held = held + (values,)
    if last:
        state, values = _add_patches(
            k, sizes, rounds * block_p, count, asked, parts, place, state, heads, width, factor, asking, projecting,
            keyed, valued, last, block_d, depth, precision,
        )  # fmt: skip
        held = held + (values,)
    else:
        for before in range(0, count, block_p):
            state, values = _add_patches(
                k, sizes, before, count, asked, parts, place, state, heads, width, factor, asking, projecting, keyed,
                valued, block_p, block_d, depth, precision,
            )  # fmt: skip
    return state, held


@triton.jit
def _store_deviations(
    deviation, v, held, mean, count, stride: tl.constexpr, width: tl.constexpr, rounds: tl.constexpr,
    last: tl.constexpr, value_power: tl.constexpr, floor: tl.constexpr, block_p: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Of a cell's values, those held or read again."""
    for n in tl.static_range(rounds):
        _store_deviation(deviation, held[n], mean, n * block_p, count, value_power, floor, block_p)
    if last:
        _store_deviation(deviation, held[rounds], mean, rounds * block_p, count, value_power, floor, last)
    else:
        for before in range(0, count, block_p):
            real = before + tl.arange(0, block_p) < count
            values = _load_patches(v, before, real, stride, width, block_p, block_d)
            _store_deviation(deviation, values, mean, before, count, value_power, floor, block_p)


@triton.jit
def _cell(
    base, sizes, asked, parts, projected, deviation, sums, counts, partial_out, partial_stats, number,
    heads: tl.constexpr, width: tl.constexpr, prefix: tl.constexpr, patches: tl.constexpr, run: tl.constexpr,
    cells: tl.constexpr, rounds: tl.constexpr, last: tl.constexpr, value_power: tl.constexpr,
    floor: tl.constexpr, factor: tl.constexpr, unit: tl.constexpr, block_p: tl.constexpr, block_f: tl.constexpr,
    block_d: tl.constexpr, depth: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """All of one run of patches; pointers are those of a head of an image."""
    stride: tl.constexpr = 3 * heads * width
    start = number * run
    count = tl.minimum(run, patches - start)
    asking: tl.constexpr = partial_out is not None
    keyed: tl.constexpr = sums is not None
    valued: tl.constexpr = cells > 0 and (keyed or deviation is not None)
    k = base + (prefix * 3 + 1) * heads * width + start * stride
    state, held = _add_cell(
        k, None if sizes is None else sizes + start, count, asked, parts,
        None if projected is None else projected + start * depth, heads, width, rounds, last, factor, asking, keyed,
        valued, block_p, block_f, block_d, depth, precision,
    )  # fmt: skip
    softmax, key_sum, value_sum, size = state
    if asking:
        _store_softmax(softmax, partial_out, partial_stats, number, width, prefix, block_f, block_d)
    mean = tl.zeros([block_d], tl.float32)
    if valued:
        if sizes is None:
            size = count.to(tl.float32)
        summed = _first_column(value_sum)
        mean = summed / size
        if keyed:
            _store_cell(_first_column(key_sum), summed, size, sums, counts, number, width, unit, block_d)
            if prefix > 0 and number == 0:
                _store_prefix_cells(
                    base + heads * width, base + 2 * heads * width, sums + cells * 2 * width, counts + cells, stride,
                    width, prefix, unit, block_f, block_d,
                )  # fmt: skip
    if deviation is not None:
        _store_deviations(
            deviation + start, k + heads * width, held, mean, count, stride, width, rounds, last, value_power, floor,
            block_p, block_d,
        )  # fmt: skip


@triton.jit
def summarise_kernel(
    qkv, sizes, proj_q, proj_k, probes, projected, deviation, cell_sums, cell_sizes, partial_out, partial_stats,
    tokens: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, prefix: tl.constexpr, channels: tl.constexpr,
    probe: tl.constexpr, at_once: tl.constexpr, run: tl.constexpr, blocks: tl.constexpr, cells: tl.constexpr,
    rounds: tl.constexpr, last: tl.constexpr, value_power: tl.constexpr, floor: tl.constexpr, factor: tl.constexpr,
    unit: tl.constexpr, block_p: tl.constexpr, block_g: tl.constexpr, block_f: tl.constexpr, block_d: tl.constexpr,
    block_c: tl.constexpr, depth: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Grid (cells, or blocks of `run` patches, + probes by block_g, H, B). None is not made: sizes where all are 1,
    what KeySelect alone needs (proj_q to deviation), what the rest of cells needs (cell_*), or prefix queries
    (partial_*). Rows of probes and projected are `depth` apart. rounds, last: blocks of block_p patches and size of the
    one after, if a cell's values are held in registers; else 0.
    """
    patches: tl.constexpr = tokens - prefix
    asking: tl.constexpr = (patches + probe - 1) // probe
    stride: tl.constexpr = 3 * heads * width
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane, block = image * heads + head, tl.program_id(0)
    base = qkv + image * tokens * stride + head * width
    weights = None if sizes is None else sizes + image * tokens + prefix
    if block < blocks:
        asked, parts = _prepare(
            base, proj_k, head, stride, width, prefix, channels, partial_out is not None, block_f, block_d, block_c
        )  # fmt: skip
        _cell(
            base, weights, asked, parts,
            None if projected is None else projected + lane * patches * depth,
            None if deviation is None else deviation + lane * patches,
            None if cell_sums is None else cell_sums + lane * (cells + prefix) * 2 * width,
            None if cell_sizes is None else cell_sizes + lane * (cells + prefix),
            None if partial_out is None else partial_out + lane * blocks * prefix * width,
            None if partial_stats is None else partial_stats + lane * blocks * prefix * 2,
            block, heads, width, prefix, patches, run, cells, rounds, last, value_power, floor, factor, unit,
            block_p, block_f, block_d, depth, precision,
        )  # fmt: skip
    elif probes is not None:
        _store_probes(
            base + prefix * stride, weights, proj_q, proj_k, probes + lane * asking * depth, head,
            (block - blocks) * block_g, stride, width, channels, patches, probe, at_once, factor, block_g, block_d,
            block_c, depth,
        )  # fmt: skip
