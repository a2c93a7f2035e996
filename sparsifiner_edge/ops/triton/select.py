"""KeySelect on a GPU: summarise -> select, a program for some tiles.

    probes [G,c] ────┬► two passes over the keys: each probe's log-sum-exp, each tile's scores
    projected [P,c] ─┤                     ─► scores [T,P] (stay in cache)
    deviation [P] ───┘                     ─► a tile's threshold ─► indices [T,K]

Logits are one product of the matrix units, at float32 of three TF32 products. `select` never sorts: it halves a bracket
around the K-th score, until exactly K scores lie above its middle or nothing lies within, and compacts the winners with
prefix sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005  (Triton knows tuples only as sums)
from __future__ import annotations

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import is_nan, load_rows

GREATEST = tl.constexpr(3.0e38)
"""Of scores, so that the middle of two is finite."""


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
    """Of each probe and each of a block's columns the greatest logit so far."""
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
    """First pass: the sums, by column of a block, of exp2(logit - a great one of the probe)."""
    keys, logs, real = _load_keys(projected, sizes, start, patches, block_n, block_c, masked)
    more = ()
    for n in tl.static_range(numbers):
        logits = _logits(asked[n], keys, logs, real, masked, sizes is not None, precision)
        more = more + (totals[n] + tl.exp2(logits - peaks[n][:, None]),)
    return more


@triton.jit
def _tops(
    asked, projected, sizes, length: tl.constexpr, patches: tl.constexpr, numbers: tl.constexpr, block_m: tl.constexpr,
    block_n: tl.constexpr, block_c: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Of each probe the greatest logit among its first `length` keys; finite, where all are NaN."""
    peaks = ()
    for _ in tl.static_range(numbers):
        peaks = peaks + (tl.full([block_m, block_n], float("-inf"), tl.float32),)
    for start in range(0, length, block_n):
        peaks = _raise_peaks(asked, projected, sizes, start, peaks, patches, numbers, block_n, block_c, True, precision)
    tops = ()
    for n in tl.static_range(numbers):
        tops = tops + (tl.maximum(tl.max(peaks[n], 1), -GREATEST),)
    return tops


@triton.jit
def _totals(
    asked, projected, sizes, tops, patches: tl.constexpr, numbers: tl.constexpr, block_m: tl.constexpr,
    block_n: tl.constexpr, block_c: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Of each probe the sum of exp2(logit - top)."""
    totals = ()
    for _ in tl.static_range(numbers):
        totals = totals + (tl.zeros([block_m, block_n], tl.float32),)
    full: tl.constexpr = patches // block_n * block_n
    for start in range(0, full, block_n):
        totals = _add_weights(
            asked, projected, sizes, start, tops, totals, patches, numbers, block_n, block_c, False, precision
        )
    if full < patches:
        totals = _add_weights(
            asked, projected, sizes, full, tops, totals, patches, numbers, block_n, block_c, True, precision
        )
    sums = ()
    for n in tl.static_range(numbers):
        sums = sums + (tl.sum(totals[n], 1),)
    return sums


@triton.jit
def _again(
    asked, projected, sizes, patches: tl.constexpr, numbers: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    block_c: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Tops and totals where logits lie so far apart that one block's greatest does not stand for all."""
    tops = _tops(asked, projected, sizes, patches, patches, numbers, block_m, block_n, block_c, precision)
    return tops, _totals(asked, projected, sizes, tops, patches, numbers, block_m, block_n, block_c, precision)


@triton.jit
def _store_scores(
    asked, projected, sizes, deviation, rows, start, lse, spoilt, real_tiles, patches: tl.constexpr,
    numbers: tl.constexpr, sub: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr,
    masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Second pass: a tile's score for each key of a block; NaN, which never wins, where there is no key."""
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
    if masked:
        best = tl.where(real[None, :], best, float("nan"))
    tl.store(rows[:, None] + (start + tl.arange(0, block_n))[None, :], best, mask=real_tiles[:, None])


@triton.jit
def _block_of_scores(rows, start, block_v: tl.constexpr):
    """A block of scores of tiles, whose scores begin at `rows` [tiles]."""
    return tl.load(rows[:, None] + (start + tl.arange(0, block_v))[None, :])


@triton.jit
def _reached(values, middle, blocks: tl.constexpr, share: tl.constexpr, block_v: tl.constexpr):
    """How many scores of each tile reach `middle`."""
    counts = tl.zeros([share, block_v], tl.float32)
    for n in tl.static_range(blocks):
        counts += tl.where(values[n] >= middle[:, None], 1.0, 0.0)
    return tl.sum(counts, 1).to(tl.int32)


@triton.jit
def _thresholds(rows, pitch: tl.constexpr, keys: tl.constexpr, share: tl.constexpr, block_v: tl.constexpr):
    """Of each tile a score that at least K reach, and how many at it are wanted beside those above: K + 1 means all.

    A bracket is halved: at least K reach its low end, fewer its high end, until exactly K reach its middle or nothing
    lies between. Scores stay in registers, and tiles go together, so that the reductions of one wait for no other's.
    """
    blocks: tl.constexpr = pitch // block_v
    values = ()
    lowest = tl.full([share, block_v], float("inf"), tl.float32)
    highest = tl.full([share, block_v], float("-inf"), tl.float32)
    for n in tl.static_range(blocks):
        values = values + (_block_of_scores(rows, n * block_v, block_v),)
        # Not the minimum and maximum of two, which the interpreter takes NaN for.
        lowest = tl.where((values[n] < lowest) & (values[n] > float("-inf")), values[n], lowest)
        highest = tl.where(values[n] > highest, values[n], highest)
    low, high = tl.min(lowest, 1), tl.max(highest, 1)
    finite = _reached(values, low, blocks, share, block_v)
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
        count = _reached(values, middle, blocks, share, block_v)
        low = tl.where(going & (count >= keys), middle, low)
        high = tl.where(going & (count < keys), middle, high)
        reached_high = tl.where(going & (count < keys), count, reached_high)
        wanted = tl.where(going, tl.where(count == keys, keys + 1, keys - reached_high), wanted)
        going = going & (count != keys)
    return low, wanted


@triton.jit
def _list_winners(
    rows, lists, thresholds, wanted, patches: tl.constexpr, pitch: tl.constexpr, keys: tl.constexpr,
    share: tl.constexpr, block_v: tl.constexpr,
):  # fmt: skip
    """Write each tile's indices of what lies above its threshold and of the first `wanted` at it, ascending."""
    above = tl.zeros([share], tl.int32)
    if tl.min(wanted, 0) > keys:  # all at a threshold win
        for start in range(0, pitch, block_v):
            kind = (_block_of_scores(rows, start, block_v) >= thresholds[:, None]).to(tl.int32)
            place = above[:, None] + tl.cumsum(kind, 1) - 1
            columns = tl.broadcast_to(start + tl.arange(0, block_v)[None, :], [share, block_v])
            tl.store(lists[:, None] + place, columns, mask=kind > 0)
            above += tl.sum(kind, 1)
    else:
        equal = tl.zeros([share], tl.int32)
        for start in range(0, pitch, block_v):
            columns = tl.broadcast_to(start + tl.arange(0, block_v)[None, :], [share, block_v])
            values = _block_of_scores(rows, start, block_v)
            values = tl.where(is_nan(values), float("-inf"), values)
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
    tiles: tl.constexpr, keys: tl.constexpr, numbers: tl.constexpr, sub: tl.constexpr, pitch: tl.constexpr,
    group: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_v: tl.constexpr, block_c: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Grid (T / (block_m / sub), H, B): the K highest scores of each tile, ties to the lower index, ascending.

    A program has block_m / sub tiles. Its rows are (tile, one of sub); each row asks by `numbers` probes in turn.
    Scores of a tile are `pitch` apart, whole blocks, so that they are read without masks and 16 bytes at a time; those
    of `group` tiles fit into registers.
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
    asked = ()
    for n in tl.static_range(numbers):
        within = row % sub * numbers + n
        asks = (before + row // sub) * per_tile + within
        real = (within < per_tile) & (asks < asking) & (before + row // sub < tiles)
        asked = asked + (load_rows(probes + lane * asking * block_c, asks, block_c, real, block_c, block_c),)
    # The greatest of a block stands for the greatest of all, unless a sum of weights leaves float32's range.
    tops = _tops(asked, keys_of, weights, block_n, patches, numbers, block_m, block_n, block_c, precision)
    totals = _totals(asked, keys_of, weights, tops, patches, numbers, block_m, block_n, block_c, precision)
    beyond = tl.zeros([block_m], tl.int32)
    for n in tl.static_range(numbers):
        beyond = beyond | (totals[n] == float("inf")).to(tl.int32)
    if tl.max(beyond, 0) > 0:
        tops, totals = _again(asked, keys_of, weights, patches, numbers, block_m, block_n, block_c, precision)
    lse = ()
    spoilt = tl.zeros([block_m], tl.int32)
    for n in tl.static_range(numbers):
        within = row % sub * numbers + n
        real = (within < per_tile) & ((before + row // sub) * per_tile + within < asking)
        sums = tops[n] + tl.log2(totals[n])
        spoilt = spoilt | (is_nan(sums) & real).to(tl.int32)
        lse = lse + (tl.where(real, sums, float("inf")),)
    if sub > 1:
        spoilt = tl.max(tl.reshape(spoilt, [share, sub]), 1)
    real_tiles = before + tl.arange(0, share) < tiles
    tile = tl.minimum(before + tl.arange(0, share), tiles - 1)
    rows = scores + lane * tiles * pitch + tile * pitch
    full: tl.constexpr = patches // block_n * block_n
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
    for start in tl.static_range((patches + block_n - 1) // block_n * block_n, pitch, block_n):
        none = tl.full([share, block_n], float("nan"), tl.float32)
        tl.store(rows[:, None] + (start + tl.arange(0, block_n))[None, :], none, mask=real_tiles[:, None])
    tl.debug_barrier()  # what all threads wrote is read below
    for number in range(0, share, group):
        # What there is no tile for does as the last one does, and writes the same.
        chosen = tl.minimum(before + number + tl.arange(0, group), tiles - 1)
        looked_at = scores + lane * tiles * pitch + chosen * pitch
        thresholds, wanted = _thresholds(looked_at, pitch, keys, group, block_v)
        lists = indices + lane * tiles * keys + chosen * keys
        _list_winners(looked_at, lists, thresholds, wanted, patches, pitch, keys, group, block_v)
