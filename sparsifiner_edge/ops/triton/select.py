"""KeySelect on a GPU: summarise -> select, a program for some tiles.

    projected [P,c] ─┬► two passes over the keys: each probe's log-sum-exp, each tile's scores
    probes [G,c] ────┤                     ─► scores [T,P] (stay in cache)
    deviation [P] ───┘                     ─► a tile's threshold ─► indices [T,K]

Logits are one product of the matrix units, at float32 of three TF32 products; keys are its rows, so that a tile's
probes are columns of one thread. `select` never sorts: it looks for a score that exactly K reach, by secants of the
number that do and by halving, and writes the winners where prefix sums of each thread's own keys say.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005  (Triton knows tuples only as sums)
from __future__ import annotations

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import is_nan, load_rows

GREATEST = tl.constexpr(3.0e38)
"""Of scores, either way."""
LEAST = tl.constexpr(1.0e-30)
"""Of a sum of weights: below it some may have vanished."""
NOTHING = tl.constexpr(-3.2e38)
"""Score where there is no key, or no number: below all others, and finite."""
OUTSIDE = tl.constexpr(3.3e38)
"""Beyond all scores."""
TOGETHER = tl.constexpr(4)
"""Scores that a thread reads at once."""
SECTOR = tl.constexpr(8)
"""Scores of a sector of L2, which are of one lane."""
SECANTS = tl.constexpr(8)
"""Of as many rounds the last halves the bracket."""


@triton.jit
def _logits(keys, logs, asked, real, masked: tl.constexpr, sized: tl.constexpr, precision: tl.constexpr):
    """Logits in base 2 of a block of keys against probes [N,c]; -inf where there is no key."""
    logits = tl.dot(keys, tl.trans(asked), input_precision=precision)
    if sized:
        logits += logs[:, None]
    return tl.where(real[:, None], logits, float("-inf")) if masked else logits


@triton.jit
def _load_keys(
    projected,
    sizes,
    start,
    patches: tl.constexpr,
    block_n: tl.constexpr,
    block_c: tl.constexpr,
    depth: tl.constexpr,
    masked: tl.constexpr,
):
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

    (Of 24 heads of DINOv2 that were looked at one has greater logits, and takes two passes more.)
    """
    totals = _totals(asked, projected, sizes, None, patches, numbers, block_g, block_n, block_c, depth, precision)
    beyond = tl.zeros([block_g], tl.int32)
    sums = ()
    for n in tl.static_range(numbers):
        beyond = beyond | ((totals[n] > GREATEST) | (totals[n] < LEAST)).to(tl.int32)
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
def _put_scores(rows, start, scores, real_tiles, blocks: tl.constexpr, lanes: tl.constexpr):
    """Store a block of scores [keys, tiles]: keys of one lane, which reads them, follow each other, sector by sector of
    all lanes.
    """
    runs: tl.constexpr = scores.shape[0] // TOGETHER
    first = start + tl.arange(0, runs) * TOGETHER
    within = first % (TOGETHER * blocks)
    lane = first // (TOGETHER * blocks)
    place = within // SECTOR * (SECTOR * lanes) + lane * SECTOR + within % SECTOR
    place = place[:, None] + tl.arange(0, TOGETHER)[None, :]
    tl.store(
        rows[None, :][None, :, :] + place[:, :, None],
        tl.reshape(scores, [runs, TOGETHER, scores.shape[1]]),
        mask=real_tiles[None, :][None, :, :],
    )


@triton.jit
def _store_scores(
    asked, projected, sizes, deviation, rows, start, lse, spoilt, real_tiles, patches: tl.constexpr,
    numbers: tl.constexpr, share: tl.constexpr, beside: tl.constexpr, blocks: tl.constexpr, lanes: tl.constexpr,
    block_n: tl.constexpr, block_c: tl.constexpr, depth: tl.constexpr, masked: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Second pass: a tile's score for each key of a block."""
    keys, logs, real = _load_keys(projected, sizes, start, patches, block_n, block_c, depth, masked)
    best = _logits(keys, logs, asked[0], real, False, False, precision) - lse[0][None, :]
    for n in tl.static_range(1, numbers):
        best = tl.maximum(best, _logits(keys, logs, asked[n], real, False, False, precision) - lse[n][None, :])
    best = _of_tiles(best, share, beside)
    if sizes is not None:
        best += logs[:, None]
    columns = start + tl.arange(0, block_n)
    if deviation is not None:
        best += tl.load(deviation + columns, mask=real, other=0.0)[:, None]
    is_number = (best > float("-inf")) & (spoilt == 0)  # NaN is not
    if masked:
        is_number = is_number & real[:, None]
    best = tl.where(is_number, tl.minimum(tl.maximum(best, -GREATEST), GREATEST), NOTHING)
    _put_scores(rows, start, best, real_tiles, blocks, lanes)


@triton.jit
def _block_of_scores(rows, number, lanes: tl.constexpr):
    """Scores [tiles, lanes, TOGETHER] of tiles whose scores begin at `rows`."""
    start = number * TOGETHER // SECTOR * (SECTOR * lanes) + number * TOGETHER % SECTOR
    place = rows[:, None] + (start + tl.arange(0, lanes) * SECTOR)[None, :]
    together = tl.arange(0, TOGETHER)[None, :]
    return tl.load(place[:, :, None] + together[None, :, :])


@triton.jit
def _reached(values, score, blocks: tl.constexpr, share: tl.constexpr, lanes: tl.constexpr):
    """How many of each lane's scores reach `score`."""
    counts = tl.zeros([share, lanes, TOGETHER], tl.float32)
    for n in tl.static_range(blocks):
        counts += tl.where(values[n] >= score[:, None][:, :, None], 1.0, 0.0)
    return tl.sum(counts, 2)


@triton.jit
def _first_guess(sample, normal: tl.constexpr):
    """Where the K-th score of a normal distribution with a sample's mean and deviation lies, and that deviation."""
    some = sample > NOTHING
    count = tl.maximum(tl.sum(tl.sum(some.to(tl.float32), 2), 1), 1.0)
    known = tl.where(some, sample, 0.0)
    mean = tl.sum(tl.sum(known, 2), 1) / count
    apart = tl.where(some, sample - mean[:, None][:, :, None], 0.0)
    spread = tl.sqrt(tl.sum(tl.sum(apart * apart, 2), 1) / count)
    return mean + spread * normal, spread


@triton.jit
def _middle(low, high):
    """Halfway between two numbers, of those that float32 has: no more than 32 halvings reach neighbours."""
    low, high = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
    low, high = low ^ ((low >> 31) & 0x7FFFFFFF), high ^ ((high >> 31) & 0x7FFFFFFF)
    middle = (low & high) + ((low ^ high) >> 1)
    return (middle ^ ((middle >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _thresholds(
    values, keys: tl.constexpr, normal: tl.constexpr, rarity: tl.constexpr, blocks: tl.constexpr, share: tl.constexpr,
    lanes: tl.constexpr,
):  # fmt: skip
    """Of each tile a score that at least K reach, how many at it are wanted beside those above, K + 1 means all, and
    then how many of each lane's reach it.

    At least K reach `low`, fewer `high`, until exactly K reach what is tried or nothing lies between. Tried next is
    where the line through the last two numbers that reached says K do; first as if scores were normal, where one more
    or less is `rarity` of their deviation. Tiles go together: the reductions of one wait for no other's.
    """
    tried, spread = _first_guess(values[0], normal)
    low, high = tl.full([share], -OUTSIDE, tl.float32), tl.full([share], OUTSIDE, tl.float32)
    reached_high = tl.zeros([share], tl.float32)
    wanted = tl.full([share], keys, tl.float32)
    slope = spread * rarity
    tried = tl.where((tried > low) & (tried < high), tried, 0.0)
    before, reached_before = tried, tl.full([share], -1.0, tl.float32)
    going = wanted > 0
    mine = tl.zeros([share, lanes], tl.float32)
    number = 0
    while tl.max(going.to(tl.int32), 0) > 0:
        mine = _reached(values, tried, blocks, share, lanes)
        count = tl.sum(mine, 1)
        enough = going & (count >= keys)
        fewer = going & (count < keys)
        low = tl.where(enough, tried, low)
        high = tl.where(fewer, tried, high)
        reached_high = tl.where(fewer, count, reached_high)
        wanted = tl.where(going, tl.where(count == keys, keys + 1.0, keys - reached_high), wanted)
        moved = (reached_before >= 0) & (count != reached_before)
        slope = tl.where(moved, (tried - before) / tl.where(moved, reached_before - count, 1.0), slope)
        before, reached_before = tried, count
        middle = _middle(low, high)
        going = going & (count != keys) & (middle > low)
        secant = tried + (count - keys) * slope
        inside = (secant > low) & (secant < high) & (number % SECANTS != SECANTS - 1)
        tried = tl.where(going, tl.where(inside, secant, middle), tried)
        number += 1
    return low, wanted.to(tl.int32), mine.to(tl.int32)


@triton.jit
def _apart(values):
    """[tiles, lanes, 4] -> four of [tiles, lanes]."""
    even, odd = tl.split(tl.reshape(values, [values.shape[0], values.shape[1], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _list_reached(rows, lists, score, mine, blocks: tl.constexpr, share: tl.constexpr, lanes: tl.constexpr):
    """Write each tile's indices of what reaches its score, ascending."""
    column = tl.broadcast_to((tl.arange(0, lanes) * (TOGETHER * blocks))[None, :], [share, lanes])
    place = lists[:, None] + (tl.cumsum(mine, 1) - mine)
    for n in range(blocks):
        four = _apart(_block_of_scores(rows, n, lanes))
        for i in tl.static_range(TOGETHER):
            wins = four[i] >= score[:, None]
            tl.store(place, column, mask=wins)
            place += tl.where(wins, 1, 0)
            column += 1


@triton.jit
def _list_with_ties(rows, lists, score, wanted, blocks: tl.constexpr, share: tl.constexpr, lanes: tl.constexpr):
    """Write each tile's indices of what lies above its score and of the first `wanted` at it, ascending."""
    column = tl.broadcast_to((tl.arange(0, lanes) * (TOGETHER * blocks))[None, :], [share, lanes])
    # One prefix sum counts both: above in the high half, equal in the low one.
    mine = tl.zeros([share, lanes], tl.int32)
    for n in range(blocks):
        four = _apart(_block_of_scores(rows, n, lanes))
        for i in tl.static_range(TOGETHER):
            mine += tl.where(four[i] > score[:, None], 65536, (four[i] == score[:, None]).to(tl.int32))
    before = tl.cumsum(mine, 1) - mine
    for n in range(blocks):
        four = _apart(_block_of_scores(rows, n, lanes))
        for i in tl.static_range(TOGETHER):
            higher, same = four[i] > score[:, None], four[i] == score[:, None]
            equal = before & 0xFFFF
            place = (before >> 16) + tl.minimum(equal, wanted[:, None])
            tl.store(lists[:, None] + place, column, mask=higher | (same & (equal < wanted[:, None])))
            before += tl.where(higher, 65536, same.to(tl.int32))
            column += 1


@triton.jit
def _load_probes(
    probes, before, tiles: tl.constexpr, asking: tl.constexpr, per_tile: tl.constexpr, numbers: tl.constexpr,
    share: tl.constexpr, beside: tl.constexpr, block_g: tl.constexpr, block_c: tl.constexpr,
    depth: tl.constexpr,
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
    blocks: tl.constexpr = pitch // (TOGETHER * lanes)
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
    lse = ()
    spoilt = tl.zeros([block_g], tl.int32)
    for n in tl.static_range(numbers):
        spoilt = spoilt | (is_nan(sums[n]) & real[n]).to(tl.int32)
        lse = lse + (tl.where(real[n], sums[n], float("inf")),)
    spoilt = _of_tiles(spoilt[None, :], share, beside)
    real_tiles = before + tl.arange(0, share) < tiles
    tile = tl.minimum(before + tl.arange(0, share), tiles - 1)
    rows = scores + lane * tiles * pitch + tile * pitch
    full: tl.constexpr = patches // block_n * block_n
    for start in range(0, full, block_n):
        _store_scores(
            asked, keys_of, weights, bonus, rows, start, lse, spoilt, real_tiles, patches, numbers, share, beside,
            blocks, lanes, block_n, block_c, depth, False, precision,
        )  # fmt: skip
    if full < patches:
        _store_scores(
            asked, keys_of, weights, bonus, rows, full, lse, spoilt, real_tiles, patches, numbers, share, beside,
            blocks, lanes, block_n, block_c, depth, True, precision,
        )  # fmt: skip
    for start in tl.static_range((patches + block_n - 1) // block_n * block_n, pitch, block_n):
        none = tl.full([block_n, share], NOTHING, tl.float32)
        _put_scores(rows, start, none, real_tiles, blocks, lanes)
    tl.debug_barrier()  # what all threads wrote is read below
    for number in range(0, share, group):
        # What there is no tile for does as the last one does, and writes the same.
        chosen = tl.minimum(before + number + tl.arange(0, group), tiles - 1)
        looked_at = scores + lane * tiles * pitch + chosen * pitch
        values = ()
        for n in tl.static_range(blocks):
            values = values + (_block_of_scores(looked_at, n, lanes),)
        thresholds, wanted, mine = _thresholds(values, keys, normal, rarity, blocks, group, lanes)
        # A lane's scores lie next to each other: how many win before them says where its own go.
        lists = indices + lane * tiles * keys + chosen * keys
        if tl.min(wanted, 0) > keys:
            _list_reached(looked_at, lists, thresholds, mine, blocks, group, lanes)
        else:
            _list_with_ties(looked_at, lists, thresholds, wanted, blocks, group, lanes)
