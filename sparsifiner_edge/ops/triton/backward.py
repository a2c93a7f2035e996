"""Gradient of SparseAttention in qkv: membership, rest (as forward) -> queries -> cells -> keys.

    queries: each tile over its entries again (weights from the saved lse): dq, row sums of dO x O, and what it owes
             the keys and values of each cell
    cells:   that reaches what a tile did not select: one product (1 - membership)^T x gradient / n
    keys:    each block of keys over all rows, masked by membership: dk, dv

Every element is written by one program, in a fixed order: no atomics. `keys` skips what no row of a block selected.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from sparsifiner_edge.ops.triton.common import load_rows, store_rows


@triton.jit
def _listed_tokens(lists, entries, real, everything, first: tl.constexpr, columns: tl.constexpr):
    """Token of each entry of a tile: the prefix, then its list; or, for prefix rows, simply every token.

    A list that is not one of KeySelect's may hold anything: it is brought into range, nothing outside is ever read.
    """
    listed = tl.load(lists + entries - first, mask=real & (entries >= first) & (not everything), other=0)
    listed = first + tl.minimum(tl.maximum(listed, 0), columns - 1)
    return tl.where(everything | (entries < first), entries, listed)


@triton.jit
def _weight_gradients(q, k, grad, v, lse, delta, offset, factor: tl.constexpr, precision: tl.constexpr):
    """Softmax weights p [rows, entries] and the gradient of their logits p (dO v - delta).

    With (k, q, v, grad) instead, and lse and delta along the other axis, both come out transposed.
    """
    logits = tl.dot(q, tl.trans(k), input_precision=precision) * factor + offset
    weights = tl.exp2(logits - lse)
    return weights, weights * (tl.dot(grad, tl.trans(v), input_precision=precision) - delta)


@triton.jit
def queries_kernel(
    qkv, indices, rest_keys, rest_values, rest_sizes, output, lse, grad, grad_qkv, delta, grad_rest_keys,
    grad_rest_values,
    tokens: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, prefix: tl.constexpr, first: tl.constexpr,
    tile: tl.constexpr, tiles: tl.constexpr, keys: tl.constexpr, cells: tl.constexpr, factor: tl.constexpr,
    scale: tl.constexpr, chunks: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    block_r: tl.constexpr, block_d: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Grid (prefix blocks + T x chunks of a tile, H, B): dq into grad_qkv, delta [B,H,N], and what every chunk owes the
    keys of a cell, [B,H,T x chunks,R,d].
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
    place = image * tokens * heads * width + head * width
    q = load_rows(base, rows, stride, real_rows, width, block_d)
    dout = load_rows(grad + place, rows, heads * width, real_rows, width, block_d)
    out = load_rows(output + place, rows, heads * width, real_rows, width, block_d)
    row_delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + lane * tokens + rows, row_delta, mask=real_rows)
    row_lse = tl.load(lse + lane * tokens + rows, mask=real_rows, other=float("inf"))
    dq = tl.zeros([block_m, block_d], tl.float32)
    count = tl.where(everything, tokens, first + keys)
    for begin in range(0, count, block_n):
        entries = begin + tl.arange(0, block_n)
        real = entries < count
        token = _listed_tokens(lists, entries, real, everything, first, tokens - first)
        k = load_rows(base + heads * width, token, stride, real, width, block_d)
        v = load_rows(base + 2 * heads * width, token, stride, real, width, block_d)
        offset = tl.where(real, 0.0, float("-inf"))[None, :]
        _, dlogits = _weight_gradients(
            q, k, dout, v, row_lse[:, None], row_delta[:, None], offset, factor, precision
        )  # fmt: skip
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision=precision)
    if cells:
        rest = (lane * tiles + number) * cells
        for begin in range(0, tl.where(everything, 0, cells), block_r):
            entries = begin + tl.arange(0, block_r)
            real = entries < cells
            k = load_rows(rest_keys + rest * width, entries, width, real, width, block_d)
            v = load_rows(rest_values + rest * width, entries, width, real, width, block_d)
            logs = tl.load(rest_sizes + rest + entries, mask=real, other=float("-inf"))
            weights, dlogits = _weight_gradients(
                q, k, dout, v, row_lse[:, None], row_delta[:, None], logs[None, :], factor, precision
            )  # fmt: skip
            dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision=precision)
            # The mean's gradient reaches each of its n keys as 1/n; where n is 0 there is none.
            share = tl.where(logs > float("-inf"), tl.exp2(-logs), 0.0)[:, None]
            dk = tl.dot(tl.trans(dlogits.to(q.dtype)), q, input_precision=precision) * (scale * share)
            dv = tl.dot(tl.trans(weights.to(dout.dtype)), dout, input_precision=precision) * share
            owed = (lane * tiles * chunks + chunk) * cells * width
            store_rows(grad_rest_keys + owed, entries, width, real, width, block_d, dk)
            store_rows(grad_rest_values + owed, entries, width, real, width, block_d, dv)
    store_rows(grad_qkv + image * tokens * stride + head * width, rows, stride, real_rows, width, block_d, dq * scale)


@triton.jit
def cells_kernel(
    member, grad_rest_keys, grad_rest_values, grad_cells,
    patches: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, tiles: tl.constexpr, cell: tl.constexpr,
    cells: tl.constexpr, pitch: tl.constexpr, chunks: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Grid (R x blocks of a cell's patches, H, B): what cells owe each key | value, float32 [B,H,P,2,d]."""
    number = tl.program_id(0) % cells
    lane = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    columns = number * cell + tl.program_id(0) // cells * block_n + tl.arange(0, block_n)
    real = columns < tl.minimum((number + 1) * cell, patches)
    dk = tl.zeros([block_n, block_d], tl.float32)
    dv = tl.zeros([block_n, block_d], tl.float32)
    source = (lane * tiles * chunks * cells + number) * width
    for start in range(0, tiles * chunks, block_m):
        rows = start + tl.arange(0, block_m)
        place = member + lane * tiles * pitch + (rows // chunks)[None, :] * pitch + columns[:, None]
        left = (tl.load(place, mask=real[:, None] & (rows < tiles * chunks)[None, :], other=1) == 0).to(tl.float32)
        rest = load_rows(grad_rest_keys + source, rows, cells * width, rows < tiles * chunks, width, block_d)
        dk = tl.dot(left, rest, dk, input_precision=precision)
        rest = load_rows(grad_rest_values + source, rows, cells * width, rows < tiles * chunks, width, block_d)
        dv = tl.dot(left, rest, dv, input_precision=precision)
    out = grad_cells + lane * patches * 2 * width
    store_rows(out, columns, 2 * width, real, width, block_d, dk)
    store_rows(out + width, columns, 2 * width, real, width, block_d, dv)


@triton.jit
def keys_kernel(
    qkv, member, lse, grad, delta, grad_cells, grad_qkv,
    tokens: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, prefix: tl.constexpr, first: tl.constexpr,
    tile: tl.constexpr, tiles: tl.constexpr, cells: tl.constexpr, pitch: tl.constexpr, factor: tl.constexpr,
    scale: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, H, B): dk and dv of a block of tokens, over all rows that read any of them."""
    stride: tl.constexpr = 3 * heads * width
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = image * heads + head
    base = qkv + image * tokens * stride + head * width
    columns = tl.program_id(0) * block_n + tl.arange(0, block_n)
    real = columns < tokens
    k = load_rows(base + heads * width, columns, stride, real, width, block_d)
    v = load_rows(base + 2 * heads * width, columns, stride, real, width, block_d)
    dk = tl.zeros([block_n, block_d], tl.float32)
    dv = tl.zeros([block_n, block_d], tl.float32)
    for start in range(0, tokens, block_m):
        rows = start + tl.arange(0, block_m)
        real_rows = rows < tokens
        number = tl.maximum(rows - prefix, 0) // tile
        read = real[:, None] & real_rows[None, :]
        place = member + (lane * tiles + number)[None, :] * pitch + (columns - first)[:, None]
        patch = read & (rows >= prefix)[None, :] & (columns >= first)[:, None]
        chosen = tl.load(place, mask=patch, other=0) != 0
        read = read & (chosen | (rows < prefix)[None, :] | (columns < first)[:, None])
        if tl.max(tl.max(read.to(tl.int32), 1), 0) > 0:
            q = load_rows(base, rows, stride, real_rows, width, block_d)
            dout = load_rows(
                grad + image * tokens * heads * width + head * width,
                rows, heads * width, real_rows, width, block_d,
            )  # fmt: skip
            row_lse = tl.load(lse + lane * tokens + rows, mask=real_rows, other=float("inf"))[None, :]
            row_delta = tl.load(delta + lane * tokens + rows, mask=real_rows, other=0.0)[None, :]
            offset = tl.where(read, 0.0, float("-inf"))
            weights, dlogits = _weight_gradients(k, q, v, dout, row_lse, row_delta, offset, factor, precision)
            dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision=precision)
            dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=precision)
    dk = dk * scale
    if cells:
        owed = grad_cells + lane * (tokens - first) * 2 * width
        inside = real & (columns >= first)
        dk += load_rows(owed, columns - first, 2 * width, inside, width, block_d)
        dv += load_rows(owed + width, columns - first, 2 * width, inside, width, block_d)
    target = grad_qkv + image * tokens * stride + (heads + head) * width
    store_rows(target, columns, stride, real, width, block_d, dk)
    store_rows(target + heads * width, columns, stride, real, width, block_d, dv)
