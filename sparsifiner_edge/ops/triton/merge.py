"""MatchTokens and MergeTokens on a GPU.

    keys [P,H,d] ─► metric [P,d]: mean over the heads, divided by its length
                 ─► partners: for each even patch, the most similar odd patch in its window, and the similarity
                 ─► suitors: for each odd patch, the most similar even patch that chose it; similarity as an integer
                 ─► pairs: one program per image finds the threshold that the `merged` highest integers reach, bit by
                    bit, and positions all tokens with prefix sums, without sorting

    x [N,C], pairs [M,2] ─► merge: [M,C]

Even patches are `seekers`, odd patches are `sought`. Dot products are computed in float32 without tensor cores, always
in the same order, so equal tokens have equal similarities.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import load_rows, store_rows

BROKEN = tl.constexpr(-1e30)
"""Lower bound of the similarity of two tokens; NaN counts as this value."""
NOBODY = tl.constexpr(-3e30)
"""Similarity that stands for "no partner"; it is below every real similarity."""
AT_ONCE = tl.constexpr(512)
"""Number of pairs that are read back at a time."""
TOGETHER = tl.constexpr(4)
"""Number of heads whose keys are loaded at a time."""


@triton.jit
def metric_kernel(
    qkv,
    metric,
    tokens: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
    prefix: tl.constexpr,
    block_p: tl.constexpr,
    block_d: tl.constexpr,
):
    """Compute the metric [B,P,d]: the mean of each patch's keys over the heads, divided by its length.

    Grid: (P / block_p, 1, B).
    """
    patches: tl.constexpr = tokens - prefix
    stride: tl.constexpr = 3 * heads * width
    image = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * block_p + tl.arange(0, block_p)
    keys = qkv + (image * tokens + prefix) * stride + heads * width
    total = tl.zeros([block_p, block_d], tl.float32)
    for head in range(0, heads, TOGETHER):
        for n in tl.static_range(TOGETHER):
            real = (rows < patches) & (head + n < heads)
            total += load_rows(keys + (head + n) * width, rows, stride, real, width, block_d).to(tl.float32)
    mean = tl.div_rn(total, tl.full([block_p, block_d], heads, tl.float32))
    length = tl.where(rows < patches, tl.sqrt_rn(tl.sum(mean * mean, 1)), 1.0)
    mean = tl.div_rn(mean, tl.broadcast_to(length[:, None], [block_p, block_d]))
    store_rows(metric + image * patches * width, rows, width, rows < patches, width, block_d, mean)


@triton.jit
def partners_kernel(
    metric,
    sizes,
    best,
    partner,
    tokens: tl.constexpr,
    width: tl.constexpr,
    prefix: tl.constexpr,
    half: tl.constexpr,
    block_e: tl.constexpr,
    block_o: tl.constexpr,
    block_d: tl.constexpr,
):
    """Compute for each even patch the similarity to its best partner, and the index of that odd patch, both [B,E].

    Grid: (E / block_e, 1, B).
    """
    patches: tl.constexpr = tokens - prefix
    seekers: tl.constexpr = (patches + 1) // 2
    image = tl.program_id(2).to(tl.int64)
    metric += image * patches * width
    sizes += image * tokens + prefix
    e = tl.program_id(0) * block_e + tl.arange(0, block_e)
    seek = load_rows(metric, 2 * e, width, e < seekers, width, block_d)
    a = tl.load(sizes + 2 * e, mask=e < seekers, other=1.0)[:, None]
    channels = tl.arange(0, block_d)
    highest = tl.full([block_e], NOBODY, tl.float32)
    which = tl.zeros([block_e], tl.int32)
    for start in range(0, 2 * half, block_o):
        offsets = start + tl.arange(0, block_o)
        places = e[:, None] + (offsets - half)[None, :]
        real = (places >= 0) & (places < patches // 2) & (offsets < 2 * half)[None, :]
        rows = metric + (2 * places + 1) * width
        mask = real[:, :, None] & (channels < width)[None, None, :]
        sought = tl.load(rows[:, :, None] + channels[None, None, :], mask=mask, other=0.0)
        b = tl.load(sizes + 2 * places + 1, mask=real, other=1.0)
        near = tl.sum(seek[:, None, :] * sought, 2) - 1.0
        alike = tl.sqrt_rn(tl.div_rn(a * b, a + b)) * near
        alike = tl.where(real, tl.where(alike > BROKEN, alike, BROKEN), NOBODY)  # false for NaN
        top = tl.max(alike, 1)
        first = tl.min(tl.where(alike == top[:, None], places, patches), 1)
        which = tl.where(top > highest, first, which)
        highest = tl.maximum(highest, top)
    tl.store(best + image * seekers + e, highest, mask=e < seekers)
    tl.store(partner + image * seekers + e, which, mask=e < seekers)


@triton.jit
def suitors_kernel(
    best,
    partner,
    score,
    suitor,
    patches: tl.constexpr,
    half: tl.constexpr,
    block_j: tl.constexpr,
    block_o: tl.constexpr,
):
    """Compute for each odd patch its best suitor, or -1, and their similarity as an integer, both [B,O].

    The integers have the same order as the similarities. Grid: (O / block_j, 1, B).
    """
    seekers: tl.constexpr = (patches + 1) // 2
    image = tl.program_id(2).to(tl.int64)
    j = tl.program_id(0) * block_j + tl.arange(0, block_j)
    highest = tl.full([block_j], NOBODY, tl.float32)
    which = tl.full([block_j], -1, tl.int32)
    for start in range(0, 2 * half, block_o):
        offsets = start + tl.arange(0, block_o)
        e = j[:, None] + (offsets + 1 - half)[None, :]
        real = (e >= 0) & (e < seekers) & (offsets < 2 * half)[None, :]
        woos = tl.load(partner + image * seekers + e, mask=real, other=-1) == j[:, None]
        alike = tl.load(best + image * seekers + e, mask=real & woos, other=NOBODY)
        top = tl.max(alike, 1)
        first = tl.min(tl.where(alike == top[:, None], e, patches), 1)
        which = tl.where(top > highest, first, which)
        highest = tl.maximum(highest, top)
    bits = tl.where(highest == 0.0, 0.0, highest).to(tl.int32, bitcast=True)  # maps -0 to 0
    place = image * (patches // 2) + j
    tl.store(score + place, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), mask=j < patches // 2)
    tl.store(suitor + place, which, mask=j < patches // 2)


@triton.jit
def _winners(score, real, merged: tl.constexpr):
    """Return the mask of the `merged` highest integers; ties go to the lower index."""
    least = tl.full([], -(2**31), tl.int32)
    for n in range(32):
        # The smallest integer with the bits found so far and the next one. The first bit is the sign.
        higher = least ^ (tl.full([], 1, tl.int32) << (31 - n))
        reached = tl.sum((real & (score >= higher)).to(tl.int32), 0)
        least = tl.where(reached >= merged, higher, least)
    above = real & (score > least)
    equal = (real & (score == least)).to(tl.int32)
    wanted = merged - tl.sum(above.to(tl.int32), 0)
    return above | ((equal > 0) & (tl.cumsum(equal, 0) <= wanted))


@triton.jit
def pairs_kernel(
    partner,
    score,
    suitor,
    chosen,
    free,
    pairs,
    after,
    tokens: tl.constexpr,
    prefix: tl.constexpr,
    merged: tl.constexpr,
    block: tl.constexpr,
):
    """Compute the pairs of tokens to merge.

    Grid: (1, 1, B). Scratch buffers are `chosen` [B,O], the suitor of each selected odd patch or -1, and `free` [B,E],
    the unmatched even patches. The optional output `after` [B,P] is the index of the new token that contains each
    patch, counted from the first patch.
    """
    patches: tl.constexpr = tokens - prefix
    seekers: tl.constexpr = (patches + 1) // 2
    sought: tl.constexpr = patches // 2
    image = tl.program_id(2).to(tl.int64)
    partner += image * seekers
    free += image * seekers
    chosen += image * sought
    pairs += image * (tokens - merged) * 2
    n = tl.arange(0, block)
    wins = _winners(tl.load(score + image * sought + n, mask=n < sought, other=0), n < sought, merged)
    second = tl.where(wins, tl.load(suitor + image * sought + n, mask=n < sought, other=-1), -1)
    tl.store(chosen + n, second, mask=n < sought)
    alone = wins & (second < 0)
    count = tl.sum(alone.to(tl.int32), 0)
    tl.debug_barrier()  # values written by all threads are read below
    taken = tl.load(chosen + tl.load(partner + n, mask=n < seekers, other=0), mask=n < seekers, other=-1) == n
    spare = (n < seekers) & (taken == 0)
    spares = tl.cumsum(spare.to(tl.int32), 0)  # up to and including this one
    tl.store(free + spares - 1, n, mask=spare & (spares <= count))
    tl.debug_barrier()
    # Selected odd patches without a suitor are paired with the free even patches, both in ascending order.
    number = tl.cumsum(alone.to(tl.int32), 0) - 1
    second = tl.where(alone, tl.load(free + number, mask=alone, other=0), second)
    gone = n + 1 - spares + tl.minimum(spares, count)  # up to and including this one
    even, odd = prefix + 2 * n, prefix + 2 * n + 1
    stays = spare & (spares > count)
    tl.store(pairs + 2 * (even - gone), even, mask=stays)
    tl.store(pairs + 2 * (even - gone) + 1, even, mask=stays)
    tl.store(pairs + 2 * (odd - gone), odd, mask=n < sought)
    tl.store(pairs + 2 * (odd - gone) + 1, tl.where(wins, prefix + 2 * second, odd), mask=n < sought)
    for start in range(0, 2 * prefix, block):
        tl.store(pairs + start + n, (start + n) // 2, mask=start + n < 2 * prefix)
    if after is not None:
        tl.debug_barrier()  # Pairs are read back in parts: all at once would not fit into registers.
        for start in range(prefix, tokens - merged, AT_ONCE):
            row = start + tl.arange(0, AT_ONCE)
            for side in tl.static_range(2):
                token = tl.load(pairs + 2 * row + side, mask=row < tokens - merged, other=prefix)
                tl.store(after + image * patches + token - prefix, row - prefix, mask=row < tokens - merged)


@triton.jit
def merge_kernel(
    x,
    sizes,
    pairs,
    after,
    places,
    output,
    sizes_out,
    places_out,
    tokens: tl.constexpr,
    channels: tl.constexpr,
    rows: tl.constexpr,
    patches: tl.constexpr,
    whole: tl.constexpr,
    block_m: tl.constexpr,
    block_c: tl.constexpr,
    block_w: tl.constexpr,
):
    """Compute the mean of each pair, weighted by size.

    Grid: (M / block_m x C / block_c, 1, B). Indices out of range are clamped. Two more outputs are optional:
    `sizes_out` [B,M], the sum of the sizes of each pair, and `places_out` [B,whole], the new token index of each
    original patch. Its index before is in `places`, or is its own index if no tokens were merged before.
    """
    parts: tl.constexpr = (channels + block_c - 1) // block_c
    image = tl.program_id(2).to(tl.int64)
    x += image * tokens * channels
    row = tl.program_id(0) // parts * block_m + tl.arange(0, block_m)
    start = tl.program_id(0) % parts * block_c
    pair = pairs + (image * rows + row) * 2
    first = tl.minimum(tl.maximum(tl.load(pair, mask=row < rows, other=0), 0), tokens - 1)
    second = tl.minimum(tl.maximum(tl.load(pair + 1, mask=row < rows, other=0), 0), tokens - 1)
    a = tl.load(sizes + image * tokens + first, mask=row < rows, other=1.0)
    b = tl.load(sizes + image * tokens + second, mask=row < rows, other=1.0)
    share = tl.div_rn(a, a + b)[:, None]
    column = start + tl.arange(0, block_c)
    real = (row < rows)[:, None] & (column < channels)[None, :]
    one = tl.load(x + first[:, None] * channels + column[None, :], mask=real, other=0.0).to(tl.float32)
    two = tl.load(x + second[:, None] * channels + column[None, :], mask=real, other=0.0).to(tl.float32)
    mean = tl.where((first == second)[:, None], one, share * one + (1.0 - share) * two)
    place = output + image * rows * channels + row[:, None] * channels + column[None, :]
    tl.store(place, mean.to(output.dtype.element_ty), mask=real)
    if after is not None:
        total = tl.where(first == second, a, a + b)
        tl.store(sizes_out + image * rows + row, total, mask=row < tl.where(start == 0, rows, 0))
        patch = tl.program_id(0) * block_w + tl.arange(0, block_w)
        was = patch
        if places is not None:
            was = tl.load(places + image * whole + patch, mask=patch < whole, other=0)
        was = tl.minimum(tl.maximum(was, 0), patches - 1)
        now = tl.load(after + image * patches + was, mask=patch < whole, other=0)
        tl.store(places_out + image * whole + patch, now, mask=patch < whole)
