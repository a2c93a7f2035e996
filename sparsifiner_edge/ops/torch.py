"""The operators in PyTorch: differentiable, batched, and exported as single nodes of the domain `sparsifiner`.

Shapes, symbols and attributes are those of `schema.py`. Under `torch.onnx.export` each operator becomes one bare node;
`ops.bodies` gives the exported file the function body that runs it. On a CUDA GPU they run as Triton kernels where
those can (`ops.triton.why_not_triton` says why not), on the processor as native ones within
`ops.torch_native.native_kernels`.

Where no token was merged, `sizes` are None here: nothing is computed of them. An exported node has them all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner_edge.ops.operator import Attributes
from sparsifiner_edge.ops.schema import DEVIATION_FLOOR, DOMAIN, OPERATORS, VERSION
from sparsifiner_edge.ops.torch_native import native_result, single_sizes
from sparsifiner_edge.ops.torch_triton import triton_result

LARGEST_MASK = 1 << 28
"""Bytes of a mask over all keys, above which lists per query are gathered."""


def run(name: str, in_torch: Callable[..., Tensor], inputs: Sequence[Tensor | None], attributes: Attributes) -> Tensor:
    """One operator: as a node where a file is exported, else by the kernels that there are for it, else in PyTorch.

    Args:
        in_torch: what that is called: the inputs and the attributes by name.
        inputs: in the schema's order; None for the sizes of tokens that were never merged.
    """
    op, x = OPERATORS[name], cast(Tensor, inputs[0])

    def output() -> tuple[list[Tensor], torch.dtype, list[Any]]:
        """All inputs, and the type and shape of the output."""
        tensors = [single_sizes(x) if tensor is None else tensor for tensor in inputs]
        dtype = torch.int32 if op.output.dtypes == ("int32",) else x.dtype
        return tensors, dtype, op.output_shape(attributes, [tensor.shape for tensor in tensors])

    if torch.onnx.is_in_onnx_export():
        tensors, dtype, shape = output()
        ordered: dict[str, Any] = {attribute.name: attributes[attribute.name] for attribute in op.attributes}
        node: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{name}", tuple(tensors), ordered, dtype=dtype, shape=shape, version=VERSION
        )
        return node
    result = native_result(name, attributes, inputs, output)
    if result is None:
        result = triton_result(name, attributes, *inputs)
    return in_torch(*inputs, **attributes) if result is None else result


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B,N,3C] -> q, k, v, each [B,H,N,d]."""
    batch, tokens, packed = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, packed // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _runs(x: Tensor, run: int) -> Tensor:
    """x [...,P,d] -> [...,ceil(P/run),run,d], the last run filled with zeros."""
    count = math.ceil(x.shape[-2] / run)
    padded = F.pad(x, (0, 0, 0, count * run - x.shape[-2]))
    return padded.reshape(*x.shape[:-2], count, run, x.shape[-1])


def run_sizes(length: int, run: int, device: torch.device) -> Tensor:
    """Number of real rows in each run: float32 [ceil(length/run)]."""
    starts = torch.arange(0, length, run, device=device)
    return (length - starts).clamp(max=run).float()


def run_means(x: Tensor, run: int, sizes: Tensor | None = None) -> Tensor:
    """Means over runs of consecutive rows: x [...,P,d] -> [...,ceil(P/run),d]; `sizes` [B,P] weigh rows [B,H,P,d]."""
    if sizes is None:
        counts = run_sizes(x.shape[-2], run, x.device)[:, None].to(x.dtype)
        return _runs(x, run).sum(-2) / counts
    rows = sizes[:, None, :, None].to(x.dtype)
    return _runs(x * rows, run).sum(-2) / _runs(rows, run).sum(-2)


def probe_logits(
    q: Tensor, k: Tensor, proj_q: Tensor, proj_k: Tensor, *, probe: int, scale: float, sizes: Tensor | None = None
) -> Tensor:
    """Predictor logits: patch q, k [B,H,P,d] -> [B,H,ceil(P/probe),P], in float32 and differentiable.

    Where the patches stand for several each, `sizes` [B,P] says for how many.
    """
    with torch.autocast(q.device.type, enabled=False):
        projected_q = scale * run_means(q.float(), probe, sizes) @ proj_q.float()
        projected_k: Tensor = k.float() @ proj_k.float()
        logits = projected_q.matmul(projected_k.transpose(-1, -2))
        return logits if sizes is None else logits + sizes.log()[:, None, None]


def value_deviation(v: Tensor, cell: int, sizes: Tensor | None = None) -> Tensor:
    """|v_j - mean value of its cell| (of v_j alone where cell is 0): patch v [B,H,P,d] -> float32 [B,H,P]."""
    v = v.float()
    if cell:
        v = v - run_means(v, cell, sizes).repeat_interleave(cell, -2)[..., : v.shape[-2], :]
    distance: Tensor = torch.linalg.vector_norm(v, dim=-1)
    return distance.clamp_min(DEVIATION_FLOOR)


@torch.no_grad()
def _key_scores(
    qkv: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    *,
    num_heads: int,
    num_prefix: int,
    probe: int,
    tile: int,
    cell: int,
    scale: float,
    value_power: float,
    sizes: Tensor | None = None,
) -> Tensor:
    """Selection scores of KeySelect: float32 [B,H,T,P]."""
    q, k, v = (part[:, :, num_prefix:] for part in split_heads(qkv, num_heads))
    sizes = None if sizes is None else sizes[:, num_prefix:]
    logits = probe_logits(q, k, proj_q, proj_k, probe=probe, scale=scale, sizes=sizes)
    scores: Tensor = logits.log_softmax(-1)
    per_tile = tile // probe
    missing = -scores.shape[2] % per_tile
    scores = F.pad(scores, (0, 0, 0, missing), value=-math.inf).unflatten(2, (-1, per_tile)).amax(3)
    if value_power:
        scores = scores + value_power * value_deviation(v, cell, sizes).log()[:, :, None]
    return scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def top_keys(scores: Tensor, keys: int) -> Tensor:
    """Indices int32 [...,K] of the highest scores, ties to the lower index, ascending.

    `torch.topk` promises no order of ties, so only its K-th value is used: all above it win, then the first equal ones.
    """
    threshold = scores.topk(keys, dim=-1).values[..., -1:]
    above, equal = scores > threshold, scores == threshold
    wanted = keys - above.sum(-1, keepdim=True)
    return true_places(above | (equal & (equal.cumsum(-1) <= wanted)), keys).to(torch.int32)


def _key_select(qkv: Tensor, sizes: Tensor | None, *projections: Tensor, keys: int, **settings: Any) -> Tensor:
    return top_keys(_key_scores(qkv, *projections, sizes=sizes, **settings), keys)


def key_select(
    qkv: Tensor, proj_q: Tensor, proj_k: Tensor, *, sizes: Tensor | None = None, **attributes: Any
) -> Tensor:
    """KeySelect: indices int32 [B,H,T,K]. Its choice has no gradient."""
    return run("KeySelect", _key_select, (qkv, sizes, proj_q, proj_k), attributes)


def sparse_attention(
    qkv: Tensor, indices: Tensor, *, sizes: Tensor | None = None, prefix_keys: int = 1, **attributes: Any
) -> Tensor:
    """SparseAttention: [B,N,C], differentiable in qkv."""
    return run("SparseAttention", _sparse_attention, (qkv, sizes, indices), {**attributes, "prefix_keys": prefix_keys})


def _sparse_attention(
    qkv: Tensor,
    sizes: Tensor | None,
    indices: Tensor,
    *,
    num_heads: int,
    num_prefix: int,
    tile: int,
    cell: int,
    scale: float,
    prefix_keys: int,
) -> Tensor:
    batch, tokens, packed = qkv.shape
    q, k, v = split_heads(qkv, num_heads)
    prefix_rows = F.scaled_dot_product_attention(q[:, :, :num_prefix], k, v, _bias(sizes, q), scale=scale)
    # What autocast gave stays; what is computed in float32 here, differences above all, must not become less again.
    with torch.autocast(qkv.device.type, enabled=False):
        patches = q[:, :, num_prefix:]
        if not prefix_keys and sizes is None and indices.shape[2] * tokens * batch * num_heads <= LARGEST_MASK:
            patch_rows = _masked_attention(patches, k, v, indices, scale)
        else:
            patch_rows = _tile_attention(patches, k, v, indices, num_prefix * prefix_keys, tile, cell, scale, sizes)
    return torch.cat([prefix_rows, patch_rows], 2).transpose(1, 2).reshape(batch, tokens, packed // 3)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> Tensor:
    """Patch queries q [B,H,P,d], each with a list of its own over all tokens -> [B,H,P,d].

    A list per query is what a tile's list is not: gathering it moves each key once per query. Training is many times
    faster with a mask over all keys; what is exported, and measured, gathers.
    """
    listed = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
    listed.scatter_(-1, indices.long(), True)
    out: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=listed, scale=scale)
    return out


def _tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    first: int,
    tile: int,
    cell: int,
    scale: float,
    sizes: Tensor | None,
) -> Tensor:
    """Patch queries q [B,H,P,d] over prefix (rows before `first`), listed keys and cells -> [B,H,P,d].

    The mean of what a tile did not select is found from what it did: with l the logits, m selected of the s keys in a
    cell and n = s - m, mean over the rest = mean of the cell - (sum of selected - m * mean of the cell) / n. So neither
    keys nor values are averaged again per tile; on the value side the same identity lowers the selected keys' weights.
    Merged tokens count by their sizes [B,N] in m, s and n, and in the sums.
    """
    tiles = _runs(q, tile)
    keys, values = (_listed_rows(x[:, :, first:], indices) for x in (k, v))
    shared_keys, shared_values = k[:, :, None, :first], v[:, :, None, :first]
    bare = _logits(tiles, keys, scale)
    logits = [_logits(tiles, shared_keys, scale), bare]
    counts = None if sizes is None else sizes[:, first:]
    weight = torch.ones_like(bare[:, :, :, :1])  # of each listed key [B,H,T,1,K]
    if counts is not None and sizes is not None:
        weight = torch.take_along_dim(counts[:, None, None], indices.long(), 3)[:, :, :, None]
        logits = [logits[0] + sizes[:, None, None, None, :first].log(), bare + weight.log()]
    if cell:
        total = run_sizes(k.shape[2] - first, cell, q.device)
        member = torch.zeros(*indices.shape, len(total), device=q.device)
        member.scatter_(-1, (indices.long() // cell)[..., None], 1.0)
        has_rest = total > member.sum(3)[:, :, :, None]
        if counts is not None:
            total = _runs(counts[..., None], cell).sum((2, 3))[:, None, None, None]
        cell_keys, cell_values = (run_means(x[:, :, first:].float(), cell, counts)[:, :, None] for x in (k, v))
        selected = weight @ member
        safe = torch.where(has_rest, total - selected, 1)
        whole = _logits(tiles.float(), cell_keys, scale)
        mean = whole - ((weight * bare) @ member - selected * whole) / safe
        logits.append((mean + safe.log()).masked_fill(~has_rest, -math.inf))
    weights = torch.cat(logits, -1).softmax(-1).split([x.shape[-1] for x in logits], -1)
    listed = weights[1]
    out: Tensor = weights[0].to(v.dtype) @ shared_values
    if cell:
        share = weights[2] / safe
        listed = listed - weight * (share @ member.transpose(-1, -2))
        out = out + ((share * total) @ cell_values).to(v.dtype)
    out = out + listed.to(v.dtype) @ values
    return out.flatten(2, 3)[:, :, : q.shape[2]]


def _listed_rows(x: Tensor, indices: Tensor) -> Tensor:
    """x [B,H,P,d] at indices [B,H,T,K] -> [B,H,T,K,d]."""
    lists = indices.long().flatten(0, 1).flatten(1)
    return rows_at(x.flatten(0, 1), lists).view(*indices.shape, x.shape[-1])


def _bias(sizes: Tensor | None, q: Tensor) -> Tensor | None:
    """What sizes [B,N] add to logits, as a mask of `scaled_dot_product_attention`."""
    return None if sizes is None else sizes.log()[:, None, None].to(q.dtype)


def _logits(tiles: Tensor, keys: Tensor, scale: float) -> Tensor:
    logits: Tensor = scale * tiles @ keys.transpose(-1, -2)
    return logits.float()


def dense_attention(qkv: Tensor, *, sizes: Tensor | None = None, **attributes: Any) -> Tensor:
    """DenseAttention: [B,N,C]."""
    return run("DenseAttention", _dense_attention, (qkv, sizes), attributes)


def _dense_attention(qkv: Tensor, sizes: Tensor | None, *, num_heads: int, scale: float) -> Tensor:
    q, k, v = split_heads(qkv, num_heads)
    out = F.scaled_dot_product_attention(q, k, v, _bias(sizes, q), scale=scale)
    return out.transpose(1, 2).flatten(2)


def cached_attention(qkv: Tensor, cache: Tensor, counts: Tensor, **attributes: Any) -> Tensor:
    """CachedAttention: [B,N,C]."""
    return run("CachedAttention", _cached_attention, (qkv, cache, counts), attributes)


def _cached_attention(qkv: Tensor, cache: Tensor, counts: Tensor, *, num_heads: int, scale: float) -> Tensor:
    q, k, v = split_heads(qkv, num_heads)
    old_k, old_v = cache.to(qkv.dtype).unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    bias = _bias(torch.cat([torch.ones_like(qkv[..., 0], dtype=counts.dtype), counts], 1), q)
    keys, values = torch.cat([k, old_k], 2), torch.cat([v, old_v], 2)
    return F.scaled_dot_product_attention(q, keys, values, bias, scale=scale).transpose(1, 2).flatten(2)


def true_places(mask: Tensor, count: int) -> Tensor:
    """Indices int64 [...,count], ascending, of what is true in each row of mask [...,P], `count` at most (then zeros):
    of a shape that `torch.export` knows, as that of `nonzero` is not.
    """
    rank = torch.where(mask, mask.cumsum(-1) - 1, count)
    places = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    return rank.new_zeros(*mask.shape[:-1], count + 1).scatter(-1, rank, places)[..., :count]


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """values [B,P,...] at index int64 [B,K] -> [B,K,...].

    One gather of whole rows from all images: one along an axis would need an index for every channel.
    """
    batch, patches = values.shape[:2]
    rows = index + patches * torch.arange(batch, device=values.device)[:, None]
    gathered: Tensor = values.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (-1, index.shape[1]))
    return gathered


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """Indices int64 [B,K] of the highest scores [B,P], ties to the lower index, ascending."""
    if torch.onnx.is_in_onnx_export():  # ONNX's TopK breaks ties as we do
        return scores.topk(count).indices.sort().values
    return top_keys(scores.nan_to_num(nan=-math.inf), count).long()
