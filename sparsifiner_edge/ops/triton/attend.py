"""SparseAttention on a GPU, forward: membership -> rest -> attend.

    indices [T,K] ─► membership: bytes [T,P], 1 where a tile selected a key
                  ─► rest: of every tile and cell the mean key, mean value and log2 of the count of what the tile did
                     not select: one product (1 - membership) x keys for all tiles
                  ─► attend: each tile over prefix, listed keys and its cells

A cell's rest could be found inside `attend` from the selected keys; as a matrix product over all tiles it reads every
key once instead of once for each tile, and costs 1/tile of dense attention.
Without cells `attend` runs alone. Nothing is accumulated by atomics: two runs give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import listed_tokens, load_rows, softmax_step, store_rows


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
    qkv, member, rest_keys, rest_values, rest_sizes,
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
        left = tl.load(place, mask=(rows < tiles)[:, None] & real[None, :], other=1) == 0
        keys = load_rows(k, columns, stride, real, width, block_d)
        share = left.to(tl.float32).to(keys.dtype)  # by way of float32: the interpreter knows no other way to bfloat16
        key_sum = tl.dot(share, keys, key_sum, input_precision=precision)
        values = load_rows(k + heads * width, columns, stride, real, width, block_d)
        value_sum = tl.dot(share, values, value_sum, input_precision=precision)
        count += tl.sum(left.to(tl.float32), 1)
    size = tl.maximum(count, 1.0)
    out = (lane * tiles * cells + number) * width
    store_rows(rest_keys + out, rows, cells * width, rows < tiles, width, block_d, key_sum / size[:, None])
    store_rows(rest_values + out, rows, cells * width, rows < tiles, width, block_d, value_sum / size[:, None])
    logs = tl.where(count > 0, tl.log2(size), float("-inf"))
    tl.store(rest_sizes + (lane * tiles + rows) * cells + number, logs, mask=rows < tiles)


@triton.jit
def attend_kernel(
    qkv, indices, rest_keys, rest_values, rest_sizes, output, lse,
    tokens: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, prefix: tl.constexpr, first: tl.constexpr,
    tile: tl.constexpr, tiles: tl.constexpr, keys: tl.constexpr, cells: tl.constexpr, factor: tl.constexpr,
    chunks: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_r: tl.constexpr,
    block_d: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Grid (prefix blocks + T x chunks of a tile, H, B): output [B,N,C], and for the backward log2 of every row's
    softmax sum [B,H,N].

    Prefix rows come first: they read every token, and the many short programs of the tiles fill in behind them.
    """
    stride: tl.constexpr = 3 * heads * width
    prefix_blocks: tl.constexpr = (prefix + block_m - 1) // block_m
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    everything = tl.program_id(0) < prefix_blocks
    chunk = tl.maximum(tl.program_id(0) - prefix_blocks, 0)
    number = chunk // chunks
    start = tl.where(everything, tl.program_id(0) * block_m, prefix + number * tile + chunk % chunks * block_m)
    rows = start + tl.arange(0, block_m)
    real_rows = rows < tl.where(everything, prefix, tl.minimum(prefix + (number + 1) * tile, tokens))
    lane = image * heads + head
    lists = indices + (lane * tiles + number) * keys
    base = qkv + image * tokens * stride + head * width
    q = load_rows(base, rows, stride, real_rows, width, block_d)
    peak = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    out = tl.zeros([block_m, block_d], tl.float32)
    count = tl.where(everything, tokens, first + keys)
    for begin in range(0, count, block_n):
        entries = begin + tl.arange(0, block_n)
        real = entries < count
        token = listed_tokens(lists, entries, real, everything, first, tokens - first)
        k = load_rows(base + heads * width, token, stride, real, width, block_d)
        v = load_rows(base + 2 * heads * width, token, stride, real, width, block_d)
        offset = tl.where(real, 0.0, float("-inf"))[None, :]
        peak, total, out = softmax_step(q, k, v, offset, peak, total, out, factor, precision)
    if cells:
        rest = (lane * tiles + number) * cells
        for begin in range(0, tl.where(everything, 0, cells), block_r):
            entries = begin + tl.arange(0, block_r)
            k = load_rows(rest_keys + rest * width, entries, width, entries < cells, width, block_d)
            v = load_rows(rest_values + rest * width, entries, width, entries < cells, width, block_d)
            offset = tl.load(rest_sizes + rest + entries, mask=entries < cells, other=float("-inf"))[None, :]
            peak, total, out = softmax_step(q, k, v, offset, peak, total, out, factor, precision)
    store_rows(
        output + image * tokens * heads * width + head * width,
        rows, heads * width, real_rows, width, block_d, out / total[:, None],
    )  # fmt: skip
    tl.store(lse + lane * tokens + rows, peak + tl.log2(total), mask=real_rows)
