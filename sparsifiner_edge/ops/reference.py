"""The operators in NumPy, in float64, written for reading: every other implementation is checked against these.

Shapes and symbols are those of `schema.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.ops.schema import DEVIATION_FLOOR


def split_heads(qkv: Array, num_heads: int) -> tuple[Array, Array, Array]:
    """qkv [B,N,3C] -> q, k, v, each [B,H,N,d] in float64."""
    batch, tokens, packed = qkv.shape
    parts = qkv.astype(np.float64).reshape(batch, tokens, 3, num_heads, packed // (3 * num_heads))
    q, k, v = parts.transpose(2, 0, 3, 1, 4)
    return q, k, v


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def _merge_heads(heads: Array) -> Array:
    batch, _, tokens, _ = heads.shape
    return np.asarray(heads.transpose(0, 2, 1, 3).reshape(batch, tokens, -1))


def run_means(x: Array, run: int) -> Array:
    """Means over runs of `run` consecutive rows: x [...,P,d] -> [...,ceil(P/run),d]; the last run may be short."""
    return np.stack([x[..., i : i + run, :].mean(-2) for i in range(0, x.shape[-2], run)], -2)


def key_scores(
    qkv: Array,
    proj_q: Array,
    proj_k: Array,
    *,
    num_heads: int,
    num_prefix: int,
    probe: int,
    tile: int,
    cell: int,
    scale: float,
    value_power: float,
) -> Array:
    """Selection scores [B,H,T,P] of KeySelect."""
    q, k, v = (part[:, :, num_prefix:] for part in split_heads(qkv, num_heads))
    probes = run_means(q, probe) @ proj_q.astype(np.float64)
    keys = k @ proj_k.astype(np.float64)
    logits = scale * probes @ keys.swapaxes(-1, -2)
    logits = logits - logits.max(-1, keepdims=True)
    log_weights = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    per_tile = tile // probe
    probe_count = log_weights.shape[2]
    scores = np.stack([log_weights[:, :, i : i + per_tile].max(2) for i in range(0, probe_count, per_tile)], 2)
    if value_power:
        center = np.repeat(run_means(v, cell), cell, axis=2)[:, :, : v.shape[2]] if cell else 0
        deviation = np.sqrt(((v - center) ** 2).sum(-1))
        scores = scores + value_power * np.log(np.maximum(deviation, DEVIATION_FLOOR))[:, :, None]
    return np.where(np.isnan(scores), -np.inf, scores)


def top_keys(scores: Array, keys: int) -> Array:
    """Indices int32 [...,K] of the highest scores, ties to the lower index, ascending."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :keys]
    return np.sort(order, axis=-1).astype(np.int32)


def key_select(
    qkv: Array,
    proj_q: Array,
    proj_k: Array,
    *,
    num_heads: int,
    num_prefix: int,
    probe: int,
    tile: int,
    cell: int,
    keys: int,
    scale: float,
    value_power: float,
) -> Array:
    """KeySelect: indices int32 [B,H,T,K]."""
    scores = key_scores(
        qkv,
        proj_q,
        proj_k,
        num_heads=num_heads,
        num_prefix=num_prefix,
        probe=probe,
        tile=tile,
        cell=cell,
        scale=scale,
        value_power=value_power,
    )
    return top_keys(scores, keys)


def landmark_scores(
    qkv: Array,
    proj_q: Array,
    bias_q: Array,
    proj_k: Array,
    bias_k: Array,
    down: Array,
    up: Array,
    *,
    num_heads: int,
    scale: float,
    top_coefficients: int,
    basis_threshold: float,
) -> Array:
    """Selection scores [B,H,N-1,N] of LandmarkKeySelect."""
    q, k, _ = split_heads(qkv, num_heads)
    asking = q[:, :, 1:] @ proj_q.astype(np.float64).T + bias_q
    landmarks = (k @ proj_k.astype(np.float64).T + bias_k).swapaxes(-1, -2) @ down.astype(np.float64)
    coefficients = _softmax(scale * asking @ landmarks)
    least = np.sort(coefficients, -1)[..., -top_coefficients, None]
    coefficients = np.where(coefficients >= least, coefficients, 0)
    basis = np.abs(up.astype(np.float64))
    scores = coefficients @ np.where(basis > basis_threshold, basis, 0).T
    return np.where(np.isnan(scores), -np.inf, scores)


def landmark_key_select(qkv: Array, *weights: Array, keys: int, **settings: Any) -> Array:
    """LandmarkKeySelect: indices int32 [B,H,N-1,K]; inputs and settings as in `landmark_scores`."""
    return top_keys(landmark_scores(qkv, *weights, **settings), keys)


def sparse_attention(
    qkv: Array,
    indices: Array,
    *,
    num_heads: int,
    num_prefix: int,
    tile: int,
    cell: int,
    scale: float,
    prefix_keys: int = 1,
) -> Array:
    """SparseAttention: float64 [B,N,C]."""
    q, k, v = split_heads(qkv, num_heads)
    out = np.empty_like(q)
    out[:, :, :num_prefix] = _softmax(scale * q[:, :, :num_prefix] @ k.swapaxes(-1, -2)) @ v
    first = num_prefix if prefix_keys else 0
    for batch, head, t in np.ndindex(*indices.shape[:3]):
        rows = slice(num_prefix + t * tile, min(num_prefix + (t + 1) * tile, q.shape[2]))
        entries = _entries(k[batch, head], v[batch, head], indices[batch, head, t], first, cell)
        out[batch, head, rows] = _attend(q[batch, head, rows], *entries, scale)
    return _merge_heads(out)


def _entries(k: Array, v: Array, selected: Array, first: int, cell: int) -> tuple[Array, Array, Array]:
    """Keys, values and logit offsets that one tile attends to: prefix, selection, background cells."""
    listed = np.concatenate([np.arange(first), first + selected.astype(np.int64)])
    keys, values, offsets = [k[listed]], [v[listed]], [np.zeros(len(listed))]
    patches = k.shape[0] - first
    for start in range(0, patches, cell) if cell else ():
        rest = np.setdiff1d(np.arange(start, min(start + cell, patches)), selected)
        if len(rest):
            keys.append(k[first + rest].mean(0, keepdims=True))
            values.append(v[first + rest].mean(0, keepdims=True))
            offsets.append(np.array([math.log(len(rest))]))
    return np.concatenate(keys), np.concatenate(values), np.concatenate(offsets)


def _attend(q: Array, keys: Array, values: Array, offsets: Array, scale: float) -> Array:
    return np.asarray(_softmax(scale * q @ keys.T + offsets) @ values)


def dense_attention(qkv: Array, *, num_heads: int, scale: float) -> Array:
    """DenseAttention: float64 [B,N,C]."""
    q, k, v = split_heads(qkv, num_heads)
    return _merge_heads(_softmax(scale * q @ k.swapaxes(-1, -2)) @ v)


def token_score(qkv: Array, *, num_heads: int, scale: float) -> Array:
    """TokenScore: float64 [B,N]."""
    q, k, _ = split_heads(qkv, num_heads)
    return np.asarray(_softmax(scale * q[:, :, :1] @ k.swapaxes(-1, -2))[:, :, 0].mean(1))
