"""KeySelect on a GPU: prepare -> lse -> scores -> select.

    q ─ probe means ─ proj_q ─► a [G,c] ─┐
    k ─────────────── proj_k ─► b [P,c] ─┴─► lse: log-sum-exp of each probe over all keys ─┐
    v ─ distance to cell mean ► deviation [P] ──► scores: max over a tile's probes + deviation ┴─► [T,P]
    ─► select: [T,K]

Scores must be right to 1e-4 at every element type, which one product of the matrix units' 11 bits is not. So a and b
are scaled by a power of two (exact, and nothing overflows) and split in two float16 parts, high + low, which makes 22
bits; a product is three products of the parts, the fourth being below float32's own rounding. That takes half the time
of three TF32 products and runs on Turing as well.

`select` never sorts: it narrows a bracket around the K-th score on the float's own bits, until exactly K scores lie
above or the bracket is one value, and compacts the winners with prefix sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import load_rows

LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _is_nan(values):
    return values != values  # noqa: PLR0124


@triton.jit
def _store_split(parts, powers, rows, real, values, block_c: tl.constexpr):
    """values [rows, block_c] -> parts float16 [rows, high|low, block_c] of values / powers, powers float32 [rows]."""
    largest = tl.max(tl.abs(values), 1)
    # The exponent bits alone are the power of two below; 2^-100 keeps zeros and subnormals from dividing by zero.
    power = (tl.maximum(largest, 7.9e-31).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # A NaN may be lost in a maximum, but not in the sum, and must not be lost in float16's conversion either.
    power = tl.where(tl.sum(values * 0.0, 1) == 0.0, power, float("nan"))
    scaled = values / power[:, None]
    high = scaled.to(tl.float16)
    low = (scaled - high.to(tl.float32)).to(tl.float16)
    columns = tl.arange(0, block_c)
    place = parts + rows[:, None] * (2 * block_c) + columns[None, :]
    tl.store(place, high, mask=real[:, None])
    tl.store(place + block_c, low, mask=real[:, None])
    tl.store(powers + rows, power, mask=real)


@triton.jit
def _load_projection(
    projection, head, width: tl.constexpr, channels: tl.constexpr, block_d: tl.constexpr, block_c: tl.constexpr
):
    rows = tl.arange(0, block_d)
    base = projection + head * width * channels
    return load_rows(base, rows, channels, rows < width, channels, block_c).to(tl.float32)


@triton.jit
def _deviations(
    v, out, cell_number, stride: tl.constexpr, width: tl.constexpr, patches: tl.constexpr, cell: tl.constexpr,
    value_power: tl.constexpr, floor: tl.constexpr, block_m: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """value_power x log2 of each value's distance to its cell's mean; where cell is 0, to zero, in runs of block_m."""
    run: tl.constexpr = cell if cell else block_m
    start = cell_number * run
    stop = tl.minimum(start + run, patches)
    mean = tl.zeros([block_d], tl.float32)
    if cell:
        for row in range(start, stop, block_m):
            rows = row + tl.arange(0, block_m)
            mean += tl.sum(load_rows(v, rows, stride, rows < stop, width, block_d).to(tl.float32), 0)
        mean = mean / (stop - start).to(tl.float32)
    for row in range(start, stop, block_m):
        rows = row + tl.arange(0, block_m)
        apart = load_rows(v, rows, stride, rows < stop, width, block_d).to(tl.float32) - mean[None, :]
        squares = tl.sum(apart * apart, 1)
        # NaN must survive: the comparison is false for it.
        distance = tl.where(squares < floor * floor, floor, tl.sqrt(squares))
        tl.store(out + rows, value_power * tl.log2(distance), mask=rows < stop)


@triton.jit
def prepare_kernel(
    qkv, proj_q, proj_k, projected_q, projected_q_powers, projected_k, projected_k_powers, deviation,
    tokens: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, prefix: tl.constexpr, channels: tl.constexpr,
    probe: tl.constexpr, cell: tl.constexpr, value_power: tl.constexpr, floor: tl.constexpr,
    block_m: tl.constexpr, block_d: tl.constexpr, block_c: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks + probe blocks + cells, H, B): projected keys, projected mean probes, value deviations."""
    patches: tl.constexpr = tokens - prefix
    probes: tl.constexpr = (patches + probe - 1) // probe
    key_blocks: tl.constexpr = (patches + block_m - 1) // block_m
    probe_blocks: tl.constexpr = (probes + block_m - 1) // block_m
    stride: tl.constexpr = 3 * heads * width
    block, head = tl.program_id(0), tl.program_id(1)
    lane = tl.program_id(2).to(tl.int64) * heads + head
    q = qkv + (tl.program_id(2).to(tl.int64) * tokens + prefix) * stride + head * width
    if block < key_blocks:
        rows = block * block_m + tl.arange(0, block_m)
        k = load_rows(q + heads * width, rows, stride, rows < patches, width, block_d).to(tl.float32)
        projected = tl.dot(
            k, _load_projection(proj_k, head, width, channels, block_d, block_c), input_precision=precision
        )
        _store_split(
            projected_k + lane * patches * 2 * block_c, projected_k_powers + lane * patches,
            rows, rows < patches, projected, block_c,
        )  # fmt: skip
    elif block < key_blocks + probe_blocks:
        rows = (block - key_blocks) * block_m + tl.arange(0, block_m)
        total = tl.zeros([block_m, block_d], tl.float32)
        for step in range(probe):
            row = rows * probe + step
            total += load_rows(q, row, stride, row < patches, width, block_d).to(tl.float32)
        size = tl.maximum(tl.minimum(patches - rows * probe, probe), 1)
        projected = tl.dot(
            total / size.to(tl.float32)[:, None],
            _load_projection(proj_q, head, width, channels, block_d, block_c),
            input_precision=precision,
        )
        _store_split(
            projected_q + lane * probes * 2 * block_c, projected_q_powers + lane * probes,
            rows, rows < probes, projected, block_c,
        )  # fmt: skip
    elif value_power != 0:
        _deviations(
            q + 2 * heads * width, deviation + lane * patches, block - key_blocks - probe_blocks,
            stride, width, patches, cell, value_power, floor, block_m, block_d,
        )  # fmt: skip


@triton.jit
def _load_split(parts, powers, rows, real, block_c: tl.constexpr):
    high = load_rows(parts, rows, 2 * block_c, real, block_c, block_c)
    low = load_rows(parts + block_c, rows, 2 * block_c, real, block_c, block_c)
    return high, low, tl.load(powers + rows, mask=real, other=0.0)


@triton.jit
def _logits(high, low, power, key_high, key_low, key_power, factor: tl.constexpr):
    """Logits in base 2 of rows against keys, from their float16 parts; the small products first."""
    product = tl.dot(low, tl.trans(key_high))
    product = tl.dot(high, tl.trans(key_low), product)
    product = tl.dot(high, tl.trans(key_high), product)
    return product * (power * factor)[:, None] * key_power[None, :]


@triton.jit
def lse_kernel(
    projected_q, projected_q_powers, projected_k, projected_k_powers, lse,
    patches: tl.constexpr, heads: tl.constexpr, probe: tl.constexpr, factor: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """Grid (probe blocks, H, B): log2-sum-exp2 of every probe's logits over all keys, NaN where any of them is."""
    probes: tl.constexpr = (patches + probe - 1) // probe
    lane = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    rows = tl.program_id(0) * block_m + tl.arange(0, block_m)
    real = rows < probes
    high, low, power = _load_split(
        projected_q + lane * probes * 2 * block_c, projected_q_powers + lane * probes, rows, real, block_c
    )
    keys, key_powers = projected_k + lane * patches * 2 * block_c, projected_k_powers + lane * patches
    peak = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    for start in range(0, patches, block_n):
        columns = start + tl.arange(0, block_n)
        key_high, key_low, key_power = _load_split(keys, key_powers, columns, columns < patches, block_c)
        logits = _logits(high, low, power, key_high, key_low, key_power, factor)
        logits = tl.where((columns < patches)[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        peak = higher
    tl.store(lse + lane * probes + rows, peak + tl.log2(total), mask=real)


@triton.jit
def scores_kernel(
    projected_q, projected_q_powers, projected_k, projected_k_powers, lse, deviation, scores,
    patches: tl.constexpr, heads: tl.constexpr, probe: tl.constexpr, tile: tl.constexpr, value_power: tl.constexpr,
    factor: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """Grid (tile blocks x key blocks, H, B): scores [B,H,T,P], base 2. Rows are tiles, their probes follow in turn."""
    probes: tl.constexpr = (patches + probe - 1) // probe
    tiles: tl.constexpr = (patches + tile - 1) // tile
    key_blocks: tl.constexpr = (patches + block_n - 1) // block_n
    per_tile: tl.constexpr = tile // probe
    lane = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    columns = tl.program_id(0) % key_blocks * block_n + tl.arange(0, block_n)
    rows = tl.program_id(0) // key_blocks * block_m + tl.arange(0, block_m)
    key_high, key_low, key_power = _load_split(
        projected_k + lane * patches * 2 * block_c, projected_k_powers + lane * patches,
        columns, columns < patches, block_c,
    )  # fmt: skip
    best = tl.full([block_m, block_n], float("-inf"), tl.float32)
    spoilt = tl.zeros([block_m], tl.int32)
    for number in range(per_tile):
        row = rows * per_tile + number
        high, low, power = _load_split(
            projected_q + lane * probes * 2 * block_c, projected_q_powers + lane * probes, row, row < probes, block_c
        )
        peak = tl.load(lse + lane * probes + row, mask=row < probes, other=float("inf"))
        best = tl.maximum(best, _logits(high, low, power, key_high, key_low, key_power, factor) - peak[:, None])
        spoilt = spoilt | _is_nan(peak).to(tl.int32)
    best = tl.where((spoilt != 0)[:, None], float("-inf"), best)
    if value_power != 0:
        best += tl.load(deviation + lane * patches + columns, mask=columns < patches, other=0.0)[None, :]
    place = scores + (lane * tiles + rows)[:, None] * patches + columns[None, :]
    tl.store(place, best, mask=(rows < tiles)[:, None] & (columns < patches)[None, :])


@triton.jit
def _ordered_scores(row, columns, patches: tl.constexpr):
    """Scores as int32 of the same order: NaN lowest with -inf, both zeros equal, below all where there is no patch."""
    values = tl.load(row + columns, mask=columns < patches, other=float("-inf"))
    values = tl.where(values == 0.0, 0.0, values)
    values = tl.where(_is_nan(values), float("-inf"), values)
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(columns < patches, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), LOWEST)


@triton.jit
def _threshold(order, columns, patches: tl.constexpr, keys: tl.constexpr):
    """The K-th highest of `order`, or any value that exactly K reach."""
    # `order` is at least that of -inf; bracket: at least K reach `low`, fewer than K reach `high`.
    low = tl.min(tl.where(columns < patches, order, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(order, 0).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        reached = tl.sum((order >= middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(reached >= keys, middle, low)
        high = tl.where(reached == keys, middle + 1, tl.where(reached < keys, middle, high))
    return low.to(tl.int32)


@triton.jit
def select_kernel(
    scores, indices, patches: tl.constexpr, heads: tl.constexpr, tiles: tl.constexpr, keys: tl.constexpr,
    block_n: tl.constexpr, block_s: tl.constexpr,
):  # fmt: skip
    """Grid (T, H, B): the K highest of each row of scores, ties to the lower index, ascending.

    The bracket narrows on a row held in registers; winners are written in parts of block_s, which need many more.
    """
    lane = (tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)) * tiles + tl.program_id(0)
    order = _ordered_scores(scores + lane * patches, tl.arange(0, block_n), patches)
    threshold = _threshold(order, tl.arange(0, block_n), patches, keys)
    wanted = keys - tl.sum((order > threshold).to(tl.int32), 0)
    above, equal = 0, 0
    for start in range(0, patches, block_s):
        columns = start + tl.arange(0, block_s)
        part = _ordered_scores(scores + lane * patches, columns, patches)
        # One prefix sum counts both: above in the high half, equal in the low one (patches stay below 2^15).
        kind = tl.where(part > threshold, 65536, (part == threshold).to(tl.int32))
        before = tl.cumsum(kind, 0) - kind
        equal_before = equal + (before & 0xFFFF)
        chosen = (kind == 65536) | ((kind == 1) & (equal_before < wanted))
        place = above + (before >> 16) + tl.minimum(equal_before, wanted)
        tl.store(indices + lane * keys + place, columns, mask=chosen)
        total = tl.sum(kind, 0)
        above += total >> 16
        equal += total & 0xFFFF
