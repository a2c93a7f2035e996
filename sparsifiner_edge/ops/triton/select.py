"""KeySelect on a GPU: summarise -> select; summarise also gives what SparseAttention needs of prefix and cells.

    summarise, a block of patches:  q ─ mean of each probe ─ proj_q ─► probes [G,c] ──────────┐
                                    k ─────────────────────── proj_k ─► projected [P,c] ──────┤
                                    prefix queries x k, v ─► partial softmaxes, for `attend`  │
    summarise, a cell:              v ─ distance to the cell's mean ─► deviation [P] ─────────┤
                                    sums of k and v, for `attend`                             │
    select, some tiles:  three passes over projected keys: greatest logit of each probe,   ◄──┘
                         its log-sum-exp, score of each tile ─► scores [T,P] (stay in cache)
                         ─► a tile's threshold ─► indices [T,K]

Logits are one product of the matrix units: the factor and both projections' powers of two are in `probes`, which with
`projected` is float16 where qkv is of half precision, else float32 in three TF32 products. What projects them is split
in two parts, high + low, of twice the bits.

`select` never sorts: it halves a bracket around the K-th score, until exactly K scores lie above its middle or nothing
lies within, and compacts the winners with prefix sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005  (Triton knows tuples only as sums)
from __future__ import annotations

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import in_parts, load_rows, store_rows

LARGEST_HALF = tl.constexpr(60000.0)
GREATEST = tl.constexpr(3.0e38)
"""Of scores, so that the middle of two is finite."""


@triton.jit
def _is_nan(values):
    return values != values  # noqa: PLR0124


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
        values = tl.where(_is_nan(values), values, inside)
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


@triton.jit
def _logits(asked, keys, logs, real, masked: tl.constexpr, sized: tl.constexpr, precision: tl.constexpr):
    """Logits in base 2 of probes [16,c] against a block of keys; -inf where there is none."""
    logits = tl.dot(asked, tl.trans(keys), input_precision=precision)
    if sized:
        logits += logs[None, :]
    return tl.where(real[None, :], logits, float("-inf")) if masked else logits


@triton.jit
def _load_keys(
    projected, sizes, start, patches: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr, masked: tl.constexpr
):
    """A block of projected keys, log2 of their sizes, and which there are."""
    columns = start + tl.arange(0, block_n)
    real = columns < patches
    place = projected + columns[:, None] * block_c + tl.arange(0, block_c)[None, :]
    keys = tl.load(place, mask=real[:, None], other=0.0) if masked else tl.load(place)
    logs = tl.zeros([block_n], tl.float32) if sizes is None else tl.log2(tl.load(sizes + columns, mask=real, other=1.0))
    return keys, logs, real


@triton.jit
def _raise_peaks(
    asked, projected, sizes, start, peaks, patches: tl.constexpr, numbers: tl.constexpr, block_n: tl.constexpr,
    block_c: tl.constexpr, masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """First pass: of each probe and each of a block's columns the greatest logit so far."""
    keys, logs, real = _load_keys(projected, sizes, start, patches, block_n, block_c, masked)
    higher = ()
    for n in tl.static_range(numbers):
        logits = _logits(asked[n], keys, logs, real, masked, sizes is not None, precision)
        higher = higher + (tl.maximum(peaks[n], logits),)
    return higher


@triton.jit
def _add_weights(
    asked, projected, sizes, start, peaks, totals, patches: tl.constexpr, numbers: tl.constexpr,
    block_n: tl.constexpr, block_c: tl.constexpr, masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Second pass: the sums, by column of a block, of exp2(logit - the probe's greatest)."""
    keys, logs, real = _load_keys(projected, sizes, start, patches, block_n, block_c, masked)
    more = ()
    for n in tl.static_range(numbers):
        logits = _logits(asked[n], keys, logs, real, masked, sizes is not None, precision)
        more = more + (totals[n] + tl.exp2(logits - peaks[n][:, None]),)
    return more


@triton.jit
def _store_scores(
    asked, projected, sizes, deviation, rows, start, lse, spoilt, real_tiles, patches: tl.constexpr,
    numbers: tl.constexpr, sub: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr,
    masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Third pass: a tile's score for each key of a block."""
    keys, logs, real = _load_keys(projected, sizes, start, patches, block_n, block_c, masked)
    best = tl.full([block_m, block_n], float("-inf"), tl.float32)
    for n in tl.static_range(numbers):
        best = tl.maximum(best, _logits(asked[n], keys, logs, real, False, False, precision) - lse[n][:, None])
    if sub > 1:
        best = tl.max(tl.reshape(best, [block_m // sub, sub, block_n]), 1)
    best += logs[None, :]
    if deviation is not None:
        columns = start + tl.arange(0, block_n)
        best += tl.load(deviation + columns, mask=real, other=0.0)[None, :]
    best = tl.where(spoilt[:, None] > 0, float("-inf"), tl.where(best > GREATEST, GREATEST, best))
    place = rows[:, None] + (start + tl.arange(0, block_n))[None, :]
    tl.store(place, best, mask=real_tiles[:, None] & real[None, :])


@triton.jit
def _block_of_scores(rows, start, patches: tl.constexpr, block_v: tl.constexpr, masked: tl.constexpr):
    """A block of scores of tiles, whose scores begin at `rows` [tiles]; NaN, which never wins, where there is none."""
    columns = start + tl.arange(0, block_v)
    place = rows[:, None] + columns[None, :]
    if masked:
        return tl.load(place, mask=(columns < patches)[None, :], other=float("nan"))
    return tl.load(place)


@triton.jit
def _reached(rows, middle, patches: tl.constexpr, share: tl.constexpr, block_v: tl.constexpr):
    """How many scores of each tile reach `middle`."""
    full: tl.constexpr = patches // block_v * block_v
    counts = tl.zeros([share, block_v], tl.int32)
    for start in range(0, full, block_v):
        counts += (_block_of_scores(rows, start, patches, block_v, False) >= middle[:, None]).to(tl.int32)
    if full < patches:
        counts += (_block_of_scores(rows, full, patches, block_v, True) >= middle[:, None]).to(tl.int32)
    return tl.sum(counts, 1)


@triton.jit
def _thresholds(rows, patches: tl.constexpr, keys: tl.constexpr, share: tl.constexpr, block_v: tl.constexpr):
    """Of each tile a score that at least K reach, and how many at it are wanted beside those above: K + 1 means all.

    A bracket is halved: at least K reach its low end, fewer its high end, until exactly K reach its middle or nothing
    lies between. Tiles go together, so that the reductions of one wait for no other's.
    """
    lowest = tl.full([share, block_v], float("inf"), tl.float32)
    highest = tl.full([share, block_v], float("-inf"), tl.float32)
    for start in range(0, patches, block_v):
        values = _block_of_scores(rows, start, patches, block_v, True)
        real = values > float("-inf")
        lowest = tl.where(real & (values < lowest), values, lowest)
        highest = tl.where(real & (values > highest), values, highest)
    low, high = tl.min(lowest, 1), tl.max(highest, 1)
    finite = _reached(rows, low, patches, share, block_v)
    # With fewer than K finite scores the others, -inf or NaN, are wanted in the order of their index.
    going = finite > keys
    reached_high = tl.where(going, 0, finite)
    wanted = tl.where(going, keys, tl.where(finite == keys, keys + 1, keys - finite))
    high = tl.where(going, high, 0.0)
    high += tl.maximum(tl.abs(high) * 1e-6, 1e-30)
    low = tl.where(finite >= keys, low, float("-inf"))
    while tl.max(going.to(tl.int32), 0) > 0:
        middle = tl.where(going, low, 0.0) * 0.5 + high * 0.5
        going = going & (middle > low) & (middle < high)
        count = _reached(rows, middle, patches, share, block_v)
        low = tl.where(going & (count >= keys), middle, low)
        high = tl.where(going & (count < keys), middle, high)
        reached_high = tl.where(going & (count < keys), count, reached_high)
        wanted = tl.where(going, tl.where(count == keys, keys + 1, keys - reached_high), wanted)
        going = going & (count != keys)
    return low, wanted


@triton.jit
def _list_winners(
    rows, lists, thresholds, wanted, patches: tl.constexpr, keys: tl.constexpr, share: tl.constexpr,
    block_v: tl.constexpr,
):  # fmt: skip
    """Write each tile's indices of what lies above its threshold and of the first `wanted` at it, ascending."""
    above = tl.zeros([share], tl.int32)
    if tl.min(wanted, 0) > keys:  # all at a threshold win
        for start in range(0, patches, block_v):
            kind = (_block_of_scores(rows, start, patches, block_v, True) >= thresholds[:, None]).to(tl.int32)
            place = above[:, None] + tl.cumsum(kind, 1) - 1
            columns = tl.broadcast_to(start + tl.arange(0, block_v)[None, :], [share, block_v])
            tl.store(lists[:, None] + place, columns, mask=kind > 0)
            above += tl.sum(kind, 1)
    else:
        equal = tl.zeros([share], tl.int32)
        for start in range(0, patches, block_v):
            columns = tl.broadcast_to(start + tl.arange(0, block_v)[None, :], [share, block_v])
            values = _block_of_scores(rows, start, patches, block_v, True)
            values = tl.where(_is_nan(values), float("-inf"), values)
            # One prefix sum counts both: above in the high half, equal in the low one.
            kind = tl.where(values > thresholds[:, None], 65536, (values == thresholds[:, None]).to(tl.int32))
            kind = tl.where(columns < patches, kind, 0)
            before = tl.cumsum(kind, 1) - kind
            equal_before = equal[:, None] + (before & 0xFFFF)
            chosen = (kind == 65536) | ((kind == 1) & (equal_before < wanted[:, None]))
            place = above[:, None] + (before >> 16) + tl.minimum(equal_before, wanted[:, None])
            tl.store(lists[:, None] + place, columns, mask=chosen)
            total = tl.sum(kind, 1)
            above += total >> 16
            equal += total & 0xFFFF


@triton.jit
def select_kernel(
    sizes, probes, projected, deviation, scores, indices,
    tokens: tl.constexpr, heads: tl.constexpr, prefix: tl.constexpr, probe: tl.constexpr, per_tile: tl.constexpr,
    tiles: tl.constexpr, keys: tl.constexpr, numbers: tl.constexpr, sub: tl.constexpr, block_m: tl.constexpr,
    block_n: tl.constexpr, block_v: tl.constexpr, block_c: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Grid (T / (block_m / sub), H, B): the K highest scores of each tile, ties to the lower index, ascending.

    A program has block_m / sub tiles. Its rows are (tile, one of sub); each row asks by `numbers` probes in turn.
    """
    patches: tl.constexpr = tokens - prefix
    asking: tl.constexpr = (patches + probe - 1) // probe
    share: tl.constexpr = block_m // sub
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = image * heads + head
    weights = None if sizes is None else sizes + image * tokens + prefix
    before = tl.program_id(0) * share
    keys_of = projected + lane * patches * block_c
    bonus = None if deviation is None else deviation + lane * patches
    row = tl.arange(0, block_m)
    asked, peaks, totals = (), (), ()
    for n in tl.static_range(numbers):
        within = row % sub * numbers + n
        number = (before + row // sub) * per_tile + within
        real = (within < per_tile) & (number < asking) & (before + row // sub < tiles)
        asked = asked + (load_rows(probes + lane * asking * block_c, number, block_c, real, block_c, block_c),)
        peaks = peaks + (tl.full([block_m, block_n], float("-inf"), tl.float32),)
        totals = totals + (tl.zeros([block_m, block_n], tl.float32),)
    full: tl.constexpr = patches // block_n * block_n
    for start in range(0, full, block_n):
        peaks = _raise_peaks(
            asked, keys_of, weights, start, peaks, patches, numbers, block_n, block_c, False, precision
        )
    if full < patches:
        peaks = _raise_peaks(asked, keys_of, weights, full, peaks, patches, numbers, block_n, block_c, True, precision)
    tops = ()
    for n in tl.static_range(numbers):
        tops = tops + (tl.maximum(tl.max(peaks[n], 1), -GREATEST),)  # finite, where all logits are NaN
    for start in range(0, full, block_n):
        totals = _add_weights(
            asked, keys_of, weights, start, tops, totals, patches, numbers, block_n, block_c, False, precision
        )
    if full < patches:
        totals = _add_weights(
            asked, keys_of, weights, full, tops, totals, patches, numbers, block_n, block_c, True, precision
        )
    lse = ()
    spoilt = tl.zeros([block_m], tl.int32)
    for n in tl.static_range(numbers):
        within = row % sub * numbers + n
        real = (within < per_tile) & ((before + row // sub) * per_tile + within < asking)
        sums = tops[n] + tl.log2(tl.sum(totals[n], 1))
        spoilt = spoilt | (_is_nan(sums) & real).to(tl.int32)
        lse = lse + (tl.where(real, sums, float("inf")),)
    if sub > 1:
        spoilt = tl.max(tl.reshape(spoilt, [share, sub]), 1)
    real_tiles = before + tl.arange(0, share) < tiles
    tile = tl.minimum(before + tl.arange(0, share), tiles - 1)
    rows = scores + lane * tiles * patches + tile * patches
    for start in range(0, full, block_n):
        _store_scores(
            asked, keys_of, weights, bonus, rows, start, lse, spoilt, real_tiles, patches, numbers, sub, block_m,
            block_n, block_c, False, precision,
        )  # fmt: skip
    if full < patches:
        _store_scores(
            asked, keys_of, weights, bonus, rows, full, lse, spoilt, real_tiles, patches, numbers, sub, block_m,
            block_n, block_c, True, precision,
        )  # fmt: skip
    tl.debug_barrier()  # what all threads wrote is read below
    # What there is no tile for does as the last one does, and writes the same.
    thresholds, wanted = _thresholds(rows, patches, keys, share, block_v)
    lists = indices + lane * tiles * keys + tile * keys
    _list_winners(rows, lists, thresholds, wanted, patches, keys, share, block_v)
