"""What each tile left of each cell, from lists alone: membership -> rest, where `attend` has no room for sums of cells:
at float32, at head dimensions above 64, with more than 32 cells and prefix tokens.

    indices [T,K] ─► membership: bytes [T,P], 1 where a tile selected a key
                  ─► rest: of every tile and cell the mean key, mean value and log2 of the size of what the tile did
                     not select: one product (1 - membership) x keys for all tiles
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import load_rows, store_rows


@triton.jit
def membership_kernel(
    indices, member, heads: tl.constexpr, tiles: tl.constexpr, keys: tl.constexpr, columns: tl.constexpr,
    pitch: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """Grid (T, H, B): int8 [B,H,T,pitch], 1 where a listed key is. Numbers out of range are brought into it."""
    lane = (tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)) * tiles + tl.program_id(0)
    for start in range(0, pitch, block_n):
        place = start + tl.arange(0, block_n)
        tl.store(member + lane * pitch + place, tl.zeros([block_n], tl.int8), mask=place < pitch)
    tl.debug_barrier()  # the zeros of all threads first
    for start in range(0, keys, block_n):
        entry = start + tl.arange(0, block_n)
        listed = tl.load(indices + lane * keys + entry, mask=entry < keys, other=0)
        listed = tl.minimum(tl.maximum(listed, 0), columns - 1)
        tl.store(member + lane * pitch + listed, tl.full([block_n], 1, tl.int8), mask=entry < keys)


@triton.jit
def rest_kernel(
    qkv, sizes, member, rest_keys, rest_values, rest_sizes,
    tokens: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, prefix: tl.constexpr, tiles: tl.constexpr,
    cell: tl.constexpr, cells: tl.constexpr, pitch: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Grid (R x tile blocks, H, B): of every tile (rows) the mean key and value of a cell without what it selected."""
    stride: tl.constexpr = 3 * heads * width
    number = tl.program_id(0) % cells
    lane = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    k = qkv + (tl.program_id(2).to(tl.int64) * tokens + prefix) * stride + (heads + tl.program_id(1)) * width
    rows = tl.program_id(0) // cells * block_m + tl.arange(0, block_m)
    stop = tl.minimum((number + 1) * cell, tokens - prefix)
    count = tl.zeros([block_m], tl.float32)
    key_sum = tl.zeros([block_m, block_d], tl.float32)
    value_sum = tl.zeros([block_m, block_d], tl.float32)
    for start in range(number * cell, stop, block_n):
        columns = start + tl.arange(0, block_n)
        real = columns < stop
        place = member + lane * tiles * pitch + rows[:, None] * pitch + columns[None, :]
        chosen = tl.load(place, mask=(rows < tiles)[:, None] & real[None, :], other=1) != 0
        left = tl.where(chosen, 0.0, 1.0)
        if sizes is not None:
            weights = sizes + tl.program_id(2).to(tl.int64) * tokens + prefix + columns
            left = left * tl.load(weights, mask=real, other=0.0)[None, :]
        keys = load_rows(k, columns, stride, real, width, block_d)
        share = left.to(keys.dtype)
        values = load_rows(k + heads * width, columns, stride, real, width, block_d)
        if sizes is not None and keys.dtype != tl.float32:  # what a large size loses in so few bits
            low = (left - share.to(tl.float32)).to(keys.dtype)
            key_sum, value_sum = tl.dot(low, keys, key_sum), tl.dot(low, values, value_sum)
        key_sum = tl.dot(share, keys, key_sum, input_precision=precision)
        value_sum = tl.dot(share, values, value_sum, input_precision=precision)
        count += tl.sum(left, 1)
    size = tl.maximum(count, 1.0)
    out = (lane * tiles * cells + number) * width
    store_rows(rest_keys + out, rows, cells * width, rows < tiles, width, block_d, key_sum / size[:, None])
    store_rows(rest_values + out, rows, cells * width, rows < tiles, width, block_d, value_sum / size[:, None])
    logs = tl.where(count > 0, tl.log2(size), float("-inf"))
    tl.store(rest_sizes + (lane * tiles + rows) * cells + number, logs, mask=rows < tiles)
