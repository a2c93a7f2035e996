"""KeySelect on a GPU: summarise -> select, a program for some tiles.

    projected [P,c] ─┬► two passes over the keys: each probe's log-sum-exp, each tile's scores
    probes [G,c] ────┤                     ─► scores [T,P] (stay in cache)
    deviation [P] ───┘                     ─► a tile's threshold ─► indices [T,K]

Logits are one product of the matrix units, at float32 of three TF32 products; keys are its rows, so that a tile's
probes are columns of one thread. Thresholds and lists are `best.py`'s.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005  (Triton knows tuples only as sums)
from __future__ import annotations

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.best import AT_A_TIME, NOTHING, list_best, put_scores
from sparsifiner_edge.ops.triton.common import is_nan, load_rows

GREATEST = tl.constexpr(3.0e38)
"""Of scores, either way."""
FAINTEST = tl.constexpr(1.0e-30)
"""Of a sum of weights: below it some may have vanished."""


@triton.jit
def _logits(keys, logs, asked, real, masked: tl.constexpr, sized: tl.constexpr, precision: tl.constexpr):
    """Logits in base 2 of a block of keys against probes [N,c]; -inf where there is no key."""
    logits = tl.dot(keys, tl.trans(asked), input_precision=precision)
    if sized:
        logits += logs[:, None]
    return tl.where(real[:, None], logits, float("-inf")) if masked else logits


@triton.jit
def _load_keys(
    projected, sizes, start, patches: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr, depth: tl.constexpr,
    masked: tl.constexpr,
):  # fmt: skip
    """A block of projected keys, log2 of their sizes, and which there are."""
    rows = start + tl.arange(0, block_n)
    real = rows < patches
    columns = tl.arange(0, block_c)
    place = projected + rows[:, None] * depth + columns[None, :]
    if masked:
        keys = tl.load(place, mask=real[:, None] & (columns < depth)[None, :], other=0.0)
    elif depth < block_c:
        keys = tl.load(place, mask=(columns < depth)[None, :], other=0.0)
    else:
        keys = tl.load(place)
    logs = tl.zeros([block_n], tl.float32) if sizes is None else tl.log2(tl.load(sizes + rows, mask=real, other=1.0))
    return keys, logs, real


@triton.jit
def _raise_peaks(
    asked, projected, sizes, start, peaks, patches: tl.constexpr, numbers: tl.constexpr, block_n: tl.constexpr,
    block_c: tl.constexpr, depth: tl.constexpr, masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Of each probe and each of a block's rows the greatest logit so far."""
    keys, logs, real = _load_keys(projected, sizes, start, patches, block_n, block_c, depth, masked)
    higher = ()
    for n in tl.static_range(numbers):
        logits = _logits(keys, logs, asked[n], real, masked, sizes is not None, precision)
        higher = higher + (tl.maximum(peaks[n], logits),)
    return higher


@triton.jit
def _add_weights(
    asked, projected, sizes, start, peaks, totals, patches: tl.constexpr, numbers: tl.constexpr,
    block_n: tl.constexpr, block_c: tl.constexpr, depth: tl.constexpr, masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """First pass: the sums, by row of a block, of exp2(logit), or exp2(logit - the probe's greatest)."""
    keys, logs, real = _load_keys(projected, sizes, start, patches, block_n, block_c, depth, masked)
    more = ()
    for n in tl.static_range(numbers):
        logits = _logits(keys, logs, asked[n], real, masked, sizes is not None, precision)
        if peaks is not None:
            logits -= peaks[n][None, :]
        more = more + (totals[n] + tl.exp2(logits),)
    return more


@triton.jit
def _tops(
    asked, projected, sizes, patches: tl.constexpr, numbers: tl.constexpr, block_g: tl.constexpr,
    block_n: tl.constexpr, block_c: tl.constexpr, depth: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Of each probe the greatest logit; finite, where all are NaN."""
    peaks = ()
    for _ in tl.static_range(numbers):
        peaks = peaks + (tl.full([block_n, block_g], float("-inf"), tl.float32),)
    for start in range(0, patches, block_n):
        peaks = _raise_peaks(
            asked, projected, sizes, start, peaks, patches, numbers, block_n, block_c, depth, True, precision
        )
    tops = ()
    for n in tl.static_range(numbers):
        tops = tops + (tl.maximum(tl.max(peaks[n], 0), -GREATEST),)
    return tops


@triton.jit
def _totals(
    asked, projected, sizes, tops, patches: tl.constexpr, numbers: tl.constexpr, block_g: tl.constexpr,
    block_n: tl.constexpr, block_c: tl.constexpr, depth: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Of each probe the sum of exp2(logit - top); top is 0 where None."""
    totals = ()
    for _ in tl.static_range(numbers):
        totals = totals + (tl.zeros([block_n, block_g], tl.float32),)
    full: tl.constexpr = patches // block_n * block_n
    for start in range(0, full, block_n):
        totals = _add_weights(
            asked, projected, sizes, start, tops, totals, patches, numbers, block_n, block_c, depth, False, precision
        )
    if full < patches:
        totals = _add_weights(
            asked, projected, sizes, full, tops, totals, patches, numbers, block_n, block_c, depth, True, precision
        )
    sums = ()
    for n in tl.static_range(numbers):
        sums = sums + (tl.sum(totals[n], 0),)
    return sums


@triton.jit
def _log_sums_again(
    asked, projected, sizes, patches: tl.constexpr, numbers: tl.constexpr, block_g: tl.constexpr, block_n: tl.constexpr,
    block_c: tl.constexpr, depth: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps where a sum left float32's range: from each probe's greatest logit on."""
    tops = _tops(asked, projected, sizes, patches, numbers, block_g, block_n, block_c, depth, precision)
    totals = _totals(asked, projected, sizes, tops, patches, numbers, block_g, block_n, block_c, depth, precision)
    sums = ()
    for n in tl.static_range(numbers):
        sums = sums + (tops[n] + tl.log2(totals[n]),)
    return sums


@triton.jit
def _log_sums(
    asked, projected, sizes, patches: tl.constexpr, numbers: tl.constexpr, block_g: tl.constexpr, block_n: tl.constexpr,
    block_c: tl.constexpr, depth: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Of each probe log2 of the sum of exp2(logit): no peak is needed while sums stay far within float32's range.

    Real models have heads whose logits leave it (`benchmarks/gpu_rounds.py` counts them): they take two passes more.
    """
    totals = _totals(asked, projected, sizes, None, patches, numbers, block_g, block_n, block_c, depth, precision)
    beyond = tl.zeros([block_g], tl.int32)
    sums = ()
    for n in tl.static_range(numbers):
        beyond = beyond | ((totals[n] > GREATEST) | (totals[n] < FAINTEST)).to(tl.int32)
        sums = sums + (tl.log2(totals[n]),)
    if tl.max(beyond, 0) > 0:
        sums = _log_sums_again(asked, projected, sizes, patches, numbers, block_g, block_n, block_c, depth, precision)
    return sums


@triton.jit
def _of_tiles(values, share: tl.constexpr, beside: tl.constexpr):
    """The greatest over a tile's columns: [rows, N = (columns of a tile / beside, share, beside)] -> [rows, share]."""
    rows: tl.constexpr = values.shape[0]
    apart: tl.constexpr = values.shape[1] // share // beside
    return tl.max(tl.max(tl.reshape(values, [rows, apart, share, beside]), 3), 1)


@triton.jit
def _store_scores(
    asked, projected, sizes, deviation, rows, start, lse, real_tiles, patches: tl.constexpr,
    numbers: tl.constexpr, share: tl.constexpr, beside: tl.constexpr, blocks: tl.constexpr, lanes: tl.constexpr,
    block_n: tl.constexpr, block_c: tl.constexpr, depth: tl.constexpr, masked: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Second pass: a tile's score for each key of a block."""
    keys, logs, real = _load_keys(projected, sizes, start, patches, block_n, block_c, depth, masked)
    best = None
    for n in tl.static_range(numbers):
        # Products begin with what is taken off: additions have less time than the matrix units.
        less = tl.broadcast_to(-lse[n][None, :], [block_n, lse[n].shape[0]])
        found = tl.dot(keys, tl.trans(asked[n]), less, input_precision=precision)
        best = found if best is None else tl.maximum(best, found)
    best = _of_tiles(best, share, beside)
    if sizes is not None:
        best += logs[:, None]
    if deviation is not None:
        best += tl.load(deviation + start + tl.arange(0, block_n), mask=real, other=0.0)[:, None]
    best = tl.minimum(tl.maximum(best, NOTHING), GREATEST)  # of NaN the other
    if masked:
        best = tl.where(real[:, None], best, NOTHING)
    put_scores(rows, start, best, real_tiles, blocks, lanes)


@triton.jit
def _load_probes(
    probes, before, tiles: tl.constexpr, asking: tl.constexpr, per_tile: tl.constexpr, numbers: tl.constexpr,
    share: tl.constexpr, beside: tl.constexpr, block_g: tl.constexpr, block_c: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Probes [N,c] of `share` tiles, `numbers` times, and which there are."""
    column = tl.arange(0, block_g)
    tile = before + column // beside % share
    first = (column // (beside * share) * beside + column % beside) * numbers
    asked, real = (), ()
    for n in tl.static_range(numbers):
        asks = tile * per_tile + first + n
        there = (first + n < per_tile) & (asks < asking) & (tile < tiles)
        asked = asked + (load_rows(probes, asks, depth, there, depth, block_c),)
        real = real + (there,)
    return asked, real


@triton.jit
def select_kernel(
    sizes, probes, projected, deviation, scores, indices,
    tokens: tl.constexpr, heads: tl.constexpr, prefix: tl.constexpr, probe: tl.constexpr, per_tile: tl.constexpr,
    tiles: tl.constexpr, keys: tl.constexpr, normal: tl.constexpr, rarity: tl.constexpr, numbers: tl.constexpr,
    share: tl.constexpr, beside: tl.constexpr, pitch: tl.constexpr, group: tl.constexpr, lanes: tl.constexpr,
    block_g: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr, depth: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Grid (T / share, H, B): the K highest scores of each tile, ties to the lower index, ascending.

    A program has `share` tiles and asks by `numbers` products of block_g probes. Scores of a tile are `pitch` apart,
    whole blocks, so that they are read without masks and 16 bytes at a time; those of `group` tiles fit into registers.
    """
    patches: tl.constexpr = tokens - prefix
    asking: tl.constexpr = (patches + probe - 1) // probe
    blocks: tl.constexpr = pitch // (AT_A_TIME * lanes)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = image * heads + head
    weights = None if sizes is None else sizes + image * tokens + prefix
    before = tl.program_id(0) * share
    keys_of = projected + lane * patches * depth
    bonus = None if deviation is None else deviation + lane * patches
    asked, real = _load_probes(
        probes + lane * asking * depth, before, tiles, asking, per_tile, numbers, share, beside, block_g, block_c, depth
    )
    sums = _log_sums(asked, keys_of, weights, patches, numbers, block_g, block_n, block_c, depth, precision)
    spoilt = tl.zeros([block_g], tl.int32)
    for n in tl.static_range(numbers):
        spoilt = spoilt | (is_nan(sums[n]) & real[n]).to(tl.int32)
    apart: tl.constexpr = block_g // share // beside
    spoilt = tl.broadcast_to(_of_tiles(spoilt[None, :], share, beside)[:, :, None], [apart, share, beside])
    spoilt = tl.reshape(spoilt, [block_g])
    lse = ()
    for n in tl.static_range(numbers):
        lse = lse + (tl.where(real[n] & (spoilt == 0), sums[n], float("inf")),)
    real_tiles = before + tl.arange(0, share) < tiles
    tile = tl.minimum(before + tl.arange(0, share), tiles - 1)
    rows = scores + lane * tiles * pitch + tile * pitch
    full: tl.constexpr = patches // block_n * block_n
    for start in range(0, full, block_n):
        _store_scores(
            asked, keys_of, weights, bonus, rows, start, lse, real_tiles, patches, numbers, share, beside,
            blocks, lanes, block_n, block_c, depth, False, precision,
        )  # fmt: skip
    if full < patches:
        _store_scores(
            asked, keys_of, weights, bonus, rows, full, lse, real_tiles, patches, numbers, share, beside,
            blocks, lanes, block_n, block_c, depth, True, precision,
        )  # fmt: skip
    for start in tl.static_range((patches + block_n - 1) // block_n * block_n, pitch, block_n):
        none = tl.full([block_n, share], NOTHING, tl.float32)
        put_scores(rows, start, none, real_tiles, blocks, lanes)
    tl.debug_barrier()  # what all threads wrote is read below
    for number in range(0, share, group):
        # What there is no tile for does as the last one does, and writes the same.
        chosen = tl.minimum(before + number + tl.arange(0, group), tiles - 1)
        list_best(
            scores + lane * tiles * pitch + chosen * pitch, indices + lane * tiles * keys + chosen * keys, keys, normal,
            rarity, blocks, group, lanes,
        )  # fmt: skip
