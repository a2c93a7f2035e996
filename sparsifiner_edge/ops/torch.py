"""The operators in PyTorch: differentiable, batched, and exported as single nodes of the ONNX domain `sparsifiner`.

Shapes, symbols and attributes are those of `schema.py`. Under `torch.onnx.export` each operator becomes one node, and
`ops.bodies` adds its function body to the exported file. On a CUDA GPU the operators run as Triton kernels where
possible (`ops.triton.why_not_triton` returns the reasons if not). On the CPU they run as native kernels inside
`ops.torch_native.native_kernels`.

`sizes` is None if no token was merged, which skips their computation. An exported node has this input in any case.
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
"""Largest size in bytes of an attention mask over all keys. Above it, listed keys are gathered per query instead."""


def run(name: str, in_torch: Callable[..., Tensor], inputs: Sequence[Tensor | None], attributes: Attributes) -> Tensor:
    """Run one operator: as an ONNX node during export, else with an available kernel, else in PyTorch.

    Args:
        name: Name of the operator.
        in_torch: PyTorch implementation, called with the inputs in order and the attributes by name.
        inputs: Inputs in the order of the schema; None stands for the sizes of tokens that were never merged.
        attributes: Attributes by name.

    Returns:
        The output of the operator.
    """
    op, x = OPERATORS[name], cast(Tensor, inputs[0])

    def output() -> tuple[list[Tensor], torch.dtype, list[Any]]:
        """Return all inputs (with sizes), and the type and shape of the output."""
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
    """Split qkv [B,N,3C] into q, k and v, each [B,H,N,d]."""
    batch, tokens, packed = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, packed // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _runs(x: Tensor, run: int) -> Tensor:
    """Split rows x [...,P,d] into runs [...,ceil(P/run),run,d]; the last run is padded with zeros."""
    count = math.ceil(x.shape[-2] / run)
    padded = F.pad(x, (0, 0, 0, count * run - x.shape[-2]))
    return padded.reshape(*x.shape[:-2], count, run, x.shape[-1])


def run_sizes(length: int, run: int, device: torch.device) -> Tensor:
    """Return the number of rows in each run without padding: float32 [ceil(length/run)]."""
    starts = torch.arange(0, length, run, device=device)
    return (length - starts).clamp(max=run).float()


def run_means(x: Tensor, run: int, sizes: Tensor | None = None) -> Tensor:
    """Average runs of consecutive rows.

    Args:
        x: Rows [...,P,d], or [B,H,P,d] with `sizes`.
        run: Number of rows per run; the last run may be shorter.
        sizes: Weights [B,P] of the rows; None weights them equally.

    Returns:
        Means [...,ceil(P/run),d].
    """
    if sizes is None:
        counts = run_sizes(x.shape[-2], run, x.device)[:, None].to(x.dtype)
        return _runs(x, run).sum(-2) / counts
    rows = sizes[:, None, :, None].to(x.dtype)
    return _runs(x * rows, run).sum(-2) / _runs(rows, run).sum(-2)


def pooled_query_logits(
    q: Tensor, k: Tensor, proj_q: Tensor, proj_k: Tensor, *, query_pool: int, scale: float, sizes: Tensor | None = None
) -> Tensor:
    """Return the predictor's logits [B,H,ceil(P/query_pool),P] in float32, differentiable.

    Args:
        q: Patch queries [B,H,P,d].
        k: Patch keys [B,H,P,d].
        proj_q: Projection [H,d,c] of the pooled queries.
        proj_k: Projection [H,d,c] of the keys.
        query_pool: Number of consecutive queries averaged into one pooled query.
        scale: Scale of the logits.
        sizes: Sizes [B,P] of merged tokens, or None.
    """
    with torch.autocast(q.device.type, enabled=False):
        projected_q = scale * run_means(q.float(), query_pool, sizes) @ proj_q.float()
        projected_k: Tensor = k.float() @ proj_k.float()
        logits = projected_q.matmul(projected_k.transpose(-1, -2))
        return logits if sizes is None else logits + sizes.log()[:, None, None]


def value_deviation(v: Tensor, key_pool: int, sizes: Tensor | None = None) -> Tensor:
    """Return the distance of each value to the mean value of its key pool, or its norm if `key_pool` is 0.

    Args:
        v: Patch values [B,H,P,d].
        key_pool: Number of consecutive patches per pool, or 0.
        sizes: Sizes [B,P] of merged tokens, or None.

    Returns:
        Distances [B,H,P] in float32, at least `DEVIATION_FLOOR`.
    """
    v = v.float()
    if key_pool:
        v = v - run_means(v, key_pool, sizes).repeat_interleave(key_pool, -2)[..., : v.shape[-2], :]
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
    query_pool: int,
    tile: int,
    key_pool: int,
    scale: float,
    value_power: float,
    sizes: Tensor | None = None,
) -> Tensor:
    """Return the selection scores of KeySelect: float32 [B,H,T,P]."""
    q, k, v = (part[:, :, num_prefix:] for part in split_heads(qkv, num_heads))
    sizes = None if sizes is None else sizes[:, num_prefix:]
    logits = pooled_query_logits(q, k, proj_q, proj_k, query_pool=query_pool, scale=scale, sizes=sizes)
    scores: Tensor = logits.log_softmax(-1)
    per_tile = tile // query_pool
    missing = -scores.shape[2] % per_tile
    scores = F.pad(scores, (0, 0, 0, missing), value=-math.inf).unflatten(2, (-1, per_tile)).amax(3)
    if value_power:
        scores = scores + value_power * value_deviation(v, key_pool, sizes).log()[:, :, None]
    return scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def top_keys(scores: Tensor, keys: int) -> Tensor:
    """Return the ascending int32 indices [...,K] of the `keys` highest scores; ties go to the lower index.

    `torch.topk` does not define the order of ties, so only its K-th value is used: all higher scores are selected, then
    the first scores equal to it.
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
    """Run KeySelect: int32 indices [B,H,T,K]. The selection has no gradient."""
    return run("KeySelect", _key_select, (qkv, sizes, proj_q, proj_k), attributes)


def sparse_attention(
    qkv: Tensor, indices: Tensor, *, sizes: Tensor | None = None, prefix_keys: int = 1, **attributes: Any
) -> Tensor:
    """Run SparseAttention: [B,N,C], differentiable in qkv."""
    return run("SparseAttention", _sparse_attention, (qkv, sizes, indices), {**attributes, "prefix_keys": prefix_keys})


def _sparse_attention(
    qkv: Tensor,
    sizes: Tensor | None,
    indices: Tensor,
    *,
    num_heads: int,
    num_prefix: int,
    tile: int,
    key_pool: int,
    scale: float,
    prefix_keys: int,
) -> Tensor:
    batch, tokens, packed = qkv.shape
    q, k, v = split_heads(qkv, num_heads)
    prefix_rows = F.scaled_dot_product_attention(q[:, :, :num_prefix], k, v, _bias(sizes, q), scale=scale)
    # Inputs keep the type that autocast gave them. What is computed in float32 below must not be cast down again.
    with torch.autocast(qkv.device.type, enabled=False):
        patches = q[:, :, num_prefix:]
        if not prefix_keys and sizes is None and indices.shape[2] * tokens * batch * num_heads <= LARGEST_MASK:
            patch_rows = _masked_attention(patches, k, v, indices, scale)
        else:
            patch_rows = _tile_attention(patches, k, v, indices, num_prefix * prefix_keys, tile, key_pool, scale, sizes)
    return torch.cat([prefix_rows, patch_rows], 2).transpose(1, 2).reshape(batch, tokens, packed // 3)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> Tensor:
    """Compute attention of patch queries q [B,H,P,d] that each have their own key list over all tokens: [B,H,P,d].

    With one list per query, gathering would move each key once per query. Training is many times faster with a mask
    over all keys. The exported function body gathers, and so do all measurements.
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
    key_pool: int,
    scale: float,
    sizes: Tensor | None,
) -> Tensor:
    """Compute attention of patch queries q [B,H,P,d] to prefix tokens, listed keys and background tokens: [B,H,P,d].

    Rows before `first` are the prefix tokens. The mean over the patches of a pool that a tile did not select is derived
    from those that it selected. If m of the s keys of a pool are selected and n = s - m remain, then

        mean of the rest = mean of the pool - (sum of the selected - m * mean of the pool) / n.

    This holds for logits too, so neither keys nor values are averaged again per tile. For the values, the same identity
    lowers the weights of the selected keys. Merged tokens enter m, s, n and the sums with their sizes [B,N].
    """
    tiles = _runs(q, tile)
    keys, values = (_listed_rows(x[:, :, first:], indices) for x in (k, v))
    shared_keys, shared_values = k[:, :, None, :first], v[:, :, None, :first]
    bare = _logits(tiles, keys, scale)
    logits = [_logits(tiles, shared_keys, scale), bare]
    counts = None if sizes is None else sizes[:, first:]
    weight = torch.ones_like(bare[:, :, :, :1])  # size of each listed key [B,H,T,1,K]
    if counts is not None and sizes is not None:
        weight = torch.take_along_dim(counts[:, None, None], indices.long(), 3)[:, :, :, None]
        logits = [logits[0] + sizes[:, None, None, None, :first].log(), bare + weight.log()]
    if key_pool:
        total = run_sizes(k.shape[2] - first, key_pool, q.device)
        member = torch.zeros(*indices.shape, len(total), device=q.device)
        member.scatter_(-1, (indices.long() // key_pool)[..., None], 1.0)
        has_rest = total > member.sum(3)[:, :, :, None]
        if counts is not None:
            total = _runs(counts[..., None], key_pool).sum((2, 3))[:, None, None, None]
        pool_keys, pool_values = (run_means(x[:, :, first:].float(), key_pool, counts)[:, :, None] for x in (k, v))
        selected = weight @ member
        safe = torch.where(has_rest, total - selected, 1)
        whole = _logits(tiles.float(), pool_keys, scale)
        mean = whole - ((weight * bare) @ member - selected * whole) / safe
        logits.append((mean + safe.log()).masked_fill(~has_rest, -math.inf))
    weights = torch.cat(logits, -1).softmax(-1).split([x.shape[-1] for x in logits], -1)
    listed = weights[1]
    out: Tensor = weights[0].to(v.dtype) @ shared_values
    if key_pool:
        share = weights[2] / safe
        listed = listed - weight * (share @ member.transpose(-1, -2))
        out = out + ((share * total) @ pool_values).to(v.dtype)
    out = out + listed.to(v.dtype) @ values
    return out.flatten(2, 3)[:, :, : q.shape[2]]


def _listed_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Gather the rows of x [B,H,P,d] at indices [B,H,T,K]: [B,H,T,K,d]."""
    lists = indices.long().flatten(0, 1).flatten(1)
    return rows_at(x.flatten(0, 1), lists).view(*indices.shape, x.shape[-1])


def _bias(sizes: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the logarithm of sizes [B,N] as an additive mask for `scaled_dot_product_attention`."""
    return None if sizes is None else sizes.log()[:, None, None].to(q.dtype)


def _logits(tiles: Tensor, keys: Tensor, scale: float) -> Tensor:
    logits: Tensor = scale * tiles @ keys.transpose(-1, -2)
    return logits.float()


def dense_attention(qkv: Tensor, *, sizes: Tensor | None = None, **attributes: Any) -> Tensor:
    """Run DenseAttention: [B,N,C]."""
    return run("DenseAttention", _dense_attention, (qkv, sizes), attributes)


def _dense_attention(qkv: Tensor, sizes: Tensor | None, *, num_heads: int, scale: float) -> Tensor:
    q, k, v = split_heads(qkv, num_heads)
    out = F.scaled_dot_product_attention(q, k, v, _bias(sizes, q), scale=scale)
    return out.transpose(1, 2).flatten(2)


def cached_attention(qkv: Tensor, cache: Tensor, counts: Tensor, **attributes: Any) -> Tensor:
    """Run CachedAttention: [B,N,C]."""
    return run("CachedAttention", _cached_attention, (qkv, cache, counts), attributes)


def _cached_attention(qkv: Tensor, cache: Tensor, counts: Tensor, *, num_heads: int, scale: float) -> Tensor:
    q, k, v = split_heads(qkv, num_heads)
    old_k, old_v = cache.to(qkv.dtype).unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    bias = _bias(torch.cat([torch.ones_like(qkv[..., 0], dtype=counts.dtype), counts], 1), q)
    keys, values = torch.cat([k, old_k], 2), torch.cat([v, old_v], 2)
    return F.scaled_dot_product_attention(q, keys, values, bias, scale=scale).transpose(1, 2).flatten(2)


def true_places(mask: Tensor, count: int) -> Tensor:
    """Return the ascending int64 indices [...,count] of the true entries in each row of `mask` [...,P].

    A row must not have more than `count` true entries. If it has fewer, the remaining indices are 0. Unlike `nonzero`,
    the output has a shape that `torch.export` knows.
    """
    rank = torch.where(mask, mask.cumsum(-1) - 1, count)
    places = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    return rank.new_zeros(*mask.shape[:-1], count + 1).scatter(-1, rank, places)[..., :count]


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """Gather rows of `values` [B,P,...] at the int64 `index` [B,K]: [B,K,...].

    A single `index_select` reads whole rows of all images. `gather` along an axis would need an index per channel.
    """
    batch, patches = values.shape[:2]
    if isinstance(batch, int) and batch == 1:  # No constant of an exported file depends on the number of patches.
        return values[0].index_select(0, index[0])[None]
    rows = index + patches * torch.arange(batch, device=values.device)[:, None]
    gathered: Tensor = values.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (-1, index.shape[1]))
    return gathered


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """Return the ascending int64 indices [B,K] of the highest scores [B,P]; ties go to the lower index."""
    if torch.onnx.is_in_onnx_export():  # ONNX TopK breaks ties in the same way
        return scores.topk(count).indices.sort().values
    return top_keys(scores.nan_to_num(nan=-math.inf), count).long()
