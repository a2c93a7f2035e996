"""The K best of a tile's scores, for `select`: a threshold that K reach, and their indices, ascending.

Nothing is sorted. Threads ("lanes") hold scores of keys that follow each other. A score that exactly K reach is looked
for by secants of the number that do and by halving; how many of the lanes before reach it says where winners go.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005  (Triton concatenates tuples only by +)
from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-3.2e38)
"""Score where there is no key, or no number: below all others, and finite."""
OUTSIDE = tl.constexpr(3.3e38)
"""Beyond all scores."""
AT_A_TIME = tl.constexpr(4)
"""Scores that a thread reads at once."""
SECTOR = tl.constexpr(8)
"""Scores of a sector of L2, which are of one lane."""
SECANTS = tl.constexpr(8)
"""Of as many rounds the last halves the bracket."""


@triton.jit
def put_scores(rows, start, scores, real_tiles, blocks: tl.constexpr, lanes: tl.constexpr):
    """Store a block of scores [keys, tiles]: keys of one lane, which reads them, follow each other, sector by sector of
    all lanes.
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
    """Scores [tiles, lanes, AT_A_TIME] of tiles whose scores begin at `rows`."""
    start = number * AT_A_TIME // SECTOR * (SECTOR * lanes) + number * AT_A_TIME % SECTOR
    place = rows[:, None] + (start + tl.arange(0, lanes) * SECTOR)[None, :]
    together = tl.arange(0, AT_A_TIME)[None, :]
    return tl.load(place[:, :, None] + together[None, :, :])


@triton.jit
def _reached(values, score, blocks: tl.constexpr, share: tl.constexpr, lanes: tl.constexpr):
    """How many of each lane's scores reach `score`."""
    counts = tl.zeros([share, lanes, AT_A_TIME], tl.float32)
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
    values,
    keys: tl.constexpr,
    normal: tl.constexpr,
    rarity: tl.constexpr,
    blocks: tl.constexpr,
    share: tl.constexpr,
    lanes: tl.constexpr,
):
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
    """Write each tile's indices of what lies above its score and of the first `wanted` at it, ascending."""
    column = tl.broadcast_to((tl.arange(0, lanes) * (AT_A_TIME * blocks))[None, :], [share, lanes])
    # One prefix sum counts both: above in the high half, equal in the low one.
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
    """Write the indices of the K highest of `share` tiles, whose scores begin at `rows`, ties to the lower index."""
    values = ()
    for n in tl.static_range(blocks):
        values = values + (_block_of_scores(rows, n, lanes),)
    thresholds, wanted, mine = _thresholds(values, keys, normal, rarity, blocks, share, lanes)
    # A lane's scores lie next to each other: how many win before them says where its own go.
    if tl.min(wanted, 0) > keys:
        _list_reached(rows, lists, thresholds, mine, blocks, share, lanes)
    else:
        _list_with_ties(rows, lists, thresholds, wanted, blocks, share, lanes)
