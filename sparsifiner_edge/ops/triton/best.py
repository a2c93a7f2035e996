"""Selection of the K highest scores of a tile for `select`: a threshold that K scores reach, and their indices.

Nothing is sorted. Each thread ("lane") holds the scores of consecutive keys. The threshold that exactly K scores reach
is searched with secant steps on the number of scores that reach it, and with bisection. The counts of the preceding
lanes determine where a lane writes its indices.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005  (Triton concatenates tuples only by +)
from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-3.2e38)
"""Score of a missing key or of NaN: finite and below all other scores."""
OUTSIDE = tl.constexpr(3.3e38)
"""Bound above the magnitude of all scores."""
AT_A_TIME = tl.constexpr(4)
"""Number of scores that a thread reads at a time."""
SECTOR = tl.constexpr(8)
"""Number of scores in a sector of the L2 cache; a sector belongs to one lane."""
SECANTS = tl.constexpr(8)
"""Length of a cycle of search steps, the last of which is a bisection."""


@triton.jit
def put_scores(rows, start, scores, real_tiles, blocks: tl.constexpr, lanes: tl.constexpr):
    """Store a block of scores [keys, tiles] in the layout that `_block_of_scores` reads.

    Each lane reads the scores of consecutive keys. In memory, the sectors of all lanes alternate.
    """
    runs: tl.constexpr = scores.shape[0] // AT_A_TIME
    first = start + tl.arange(0, runs) * AT_A_TIME
    within = first % (AT_A_TIME * blocks)
    lane = first // (AT_A_TIME * blocks)
    place = within // SECTOR * (SECTOR * lanes) + lane * SECTOR + within % SECTOR
    place = place[:, None] + tl.arange(0, AT_A_TIME)[None, :]
    tl.store(
        rows[None, :][None, :, :] + place[:, :, None],
        tl.reshape(scores, [runs, AT_A_TIME, scores.shape[1]]),
        mask=real_tiles[None, :][None, :, :],
    )


@triton.jit
def _block_of_scores(rows, number, lanes: tl.constexpr):
    """Load a block of scores [tiles, lanes, AT_A_TIME] of the tiles whose scores start at `rows`."""
    start = number * AT_A_TIME // SECTOR * (SECTOR * lanes) + number * AT_A_TIME % SECTOR
    place = rows[:, None] + (start + tl.arange(0, lanes) * SECTOR)[None, :]
    together = tl.arange(0, AT_A_TIME)[None, :]
    return tl.load(place[:, :, None] + together[None, :, :])


@triton.jit
def _reached(values, score, blocks: tl.constexpr, share: tl.constexpr, lanes: tl.constexpr):
    """Count the scores of each lane that reach `score` (one per tile)."""
    counts = tl.zeros([share, lanes, AT_A_TIME], tl.float32)
    for n in tl.static_range(blocks):
        counts += tl.where(values[n] >= score[:, None][:, :, None], 1.0, 0.0)
    return tl.sum(counts, 2)


@triton.jit
def _first_guess(sample, normal: tl.constexpr):
    """Estimate the K-th score by a normal distribution with the mean and standard deviation of a sample.

    `normal` is the quantile of the standard normal distribution. The standard deviation is returned too.
    """
    some = sample > NOTHING
    count = tl.maximum(tl.sum(tl.sum(some.to(tl.float32), 2), 1), 1.0)
    known = tl.where(some, sample, 0.0)
    mean = tl.sum(tl.sum(known, 2), 1) / count
    apart = tl.where(some, sample - mean[:, None][:, :, None], 0.0)
    spread = tl.sqrt(tl.sum(tl.sum(apart * apart, 2), 1) / count)
    return mean + spread * normal, spread


@triton.jit
def _middle(low, high):
    """Return the midpoint of two numbers in the order of float32 values, so at most 32 bisections reach neighbors."""
    low, high = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
    low, high = low ^ ((low >> 31) & 0x7FFFFFFF), high ^ ((high >> 31) & 0x7FFFFFFF)
    middle = (low & high) + ((low ^ high) >> 1)
    return (middle ^ ((middle >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _thresholds(
    values,
    keys: tl.constexpr,
    normal: tl.constexpr,
    rarity: tl.constexpr,
    blocks: tl.constexpr,
    share: tl.constexpr,
    lanes: tl.constexpr,
):
    """Find the threshold of each tile.

    At least K scores reach `low` and fewer reach `high`. The search ends if exactly K scores reach the tried value or
    no float32 lies between `low` and `high`. The next value follows from the line through the last two counts
    (secant). The first slope assumes normally distributed scores: one score more or less corresponds to `rarity`
    standard deviations. All tiles are searched together, so that their reductions overlap.

    Returns:
        A score that at least K scores reach, the number of scores equal to it that are selected in addition to the
        higher ones (K + 1: all), and in that case the number of scores of each lane that reach it.
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
    """Split [tiles, lanes, 4] into four tensors [tiles, lanes]."""
    even, odd = tl.split(tl.reshape(values, [values.shape[0], values.shape[1], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _list_reached(rows, lists, score, mine, blocks: tl.constexpr, share: tl.constexpr, lanes: tl.constexpr):
    """Write the ascending indices of the scores that reach the threshold of each tile."""
    column = tl.broadcast_to((tl.arange(0, lanes) * (AT_A_TIME * blocks))[None, :], [share, lanes])
    place = lists[:, None] + (tl.cumsum(mine, 1) - mine)
    for n in range(blocks):
        four = _apart(_block_of_scores(rows, n, lanes))
        for i in tl.static_range(AT_A_TIME):
            wins = four[i] >= score[:, None]
            tl.store(place, column, mask=wins)
            place += tl.where(wins, 1, 0)
            column += 1


@triton.jit
def _list_with_ties(rows, lists, score, wanted, blocks: tl.constexpr, share: tl.constexpr, lanes: tl.constexpr):
    """Write the ascending indices of the scores above each tile's threshold and of the first `wanted` equal to it."""
    column = tl.broadcast_to((tl.arange(0, lanes) * (AT_A_TIME * blocks))[None, :], [share, lanes])
    # One prefix sum counts both: higher scores in the upper 16 bits, equal scores in the lower 16 bits.
    mine = tl.zeros([share, lanes], tl.int32)
    for n in range(blocks):
        four = _apart(_block_of_scores(rows, n, lanes))
        for i in tl.static_range(AT_A_TIME):
            mine += tl.where(four[i] > score[:, None], 65536, (four[i] == score[:, None]).to(tl.int32))
    before = tl.cumsum(mine, 1) - mine
    for n in range(blocks):
        four = _apart(_block_of_scores(rows, n, lanes))
        for i in tl.static_range(AT_A_TIME):
            higher, same = four[i] > score[:, None], four[i] == score[:, None]
            equal = before & 0xFFFF
            place = (before >> 16) + tl.minimum(equal, wanted[:, None])
            tl.store(lists[:, None] + place, column, mask=higher | (same & (equal < wanted[:, None])))
            before += tl.where(higher, 65536, same.to(tl.int32))
            column += 1


@triton.jit
def list_best(
    rows,
    lists,
    keys: tl.constexpr,
    normal: tl.constexpr,
    rarity: tl.constexpr,
    blocks: tl.constexpr,
    share: tl.constexpr,
    lanes: tl.constexpr,
):
    """Write the ascending indices of the K highest scores of `share` tiles; ties go to the lower index.

    The scores of the tiles start at `rows`, their key lists at `lists`.
    """
    values = ()
    for n in tl.static_range(blocks):
        values = values + (_block_of_scores(rows, n, lanes),)
    thresholds, wanted, mine = _thresholds(values, keys, normal, rarity, blocks, share, lanes)
    # Each lane holds consecutive keys, so the counts of the preceding lanes give the position of its first index.
    if tl.min(wanted, 0) > keys:
        _list_reached(rows, lists, thresholds, mine, blocks, share, lanes)
    else:
        _list_with_ties(rows, lists, thresholds, wanted, blocks, share, lanes)
