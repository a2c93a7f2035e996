"""Reference implementation of the operators in NumPy, in float64.

It is written for readability. Every other implementation is tested against it. Shapes and symbols are those of
`schema.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.ops.schema import DEVIATION_FLOOR


def split_heads(qkv: Array, num_heads: int) -> tuple[Array, Array, Array]:
    """Split qkv [B,N,3C] into q, k and v, each [B,H,N,d] in float64."""
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


def run_means(x: Array, run: int, sizes: Array) -> Array:
    """Average runs of consecutive rows, weighted by size.

    Args:
        x: Rows [B,H,P,d].
        run: Number of rows per run; the last run may be shorter.
        sizes: Sizes [B,P] of the rows.

    Returns:
        Means [B,H,ceil(P/run),d].
    """
    rows = sizes[:, None, :, None]
    starts = range(0, x.shape[2], run)
    sums = [(x * rows)[:, :, i : i + run].sum(2) / rows[:, :, i : i + run].sum(2) for i in starts]
    return np.stack(sums, 2)


def _key_scores(
    qkv: Array,
    sizes: Array,
    proj_q: Array,
    proj_k: Array,
    *,
    num_heads: int,
    num_prefix: int,
    query_pool: int,
    tile: int,
    key_pool: int,
    scale: float,
    value_power: float,
) -> Array:
    """Return the selection scores [B,H,T,P] of KeySelect."""
    q, k, v = (part[:, :, num_prefix:] for part in split_heads(qkv, num_heads))
    patches = sizes[:, num_prefix:].astype(np.float64)
    pooled_queries = run_means(q, query_pool, patches) @ proj_q.astype(np.float64)
    keys = k @ proj_k.astype(np.float64)
    logits = scale * pooled_queries @ keys.swapaxes(-1, -2) + np.log(patches)[:, None, None]
    logits = logits - logits.max(-1, keepdims=True)
    log_weights = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    per_tile = tile // query_pool
    query_pool_count = log_weights.shape[2]
    scores = np.stack([log_weights[:, :, i : i + per_tile].max(2) for i in range(0, query_pool_count, per_tile)], 2)
    if value_power:
        center = np.repeat(run_means(v, key_pool, patches), key_pool, axis=2)[:, :, : v.shape[2]] if key_pool else 0
        deviation = np.sqrt(((v - center) ** 2).sum(-1))
        scores = scores + value_power * np.log(np.maximum(deviation, DEVIATION_FLOOR))[:, :, None]
    return np.where(np.isnan(scores), -np.inf, scores)


def top_keys(scores: Array, keys: int) -> Array:
    """Return the ascending int32 indices [...,K] of the `keys` highest scores; ties go to the lower index."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :keys]
    return np.sort(order, axis=-1).astype(np.int32)


def key_select(qkv: Array, *others: Array, keys: int, **settings: Any) -> Array:
    """Compute KeySelect: int32 indices [B,H,T,K]. Inputs and attributes are those of the schema."""
    return top_keys(_key_scores(qkv, *others, **settings), keys)


def _landmark_scores(
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
    """Return the selection scores [B,H,N-1,N] of LandmarkKeySelect."""
    q, k, _ = split_heads(qkv, num_heads)
    projected_q = q[:, :, 1:] @ proj_q.astype(np.float64).T + bias_q
    landmarks = (k @ proj_k.astype(np.float64).T + bias_k).swapaxes(-1, -2) @ down.astype(np.float64)
    coefficients = _softmax(scale * projected_q @ landmarks)
    dropped = np.argsort(-coefficients, axis=-1, kind="stable")[..., top_coefficients:]
    np.put_along_axis(coefficients, dropped, 0, -1)
    basis = np.abs(up.astype(np.float64))
    scores = coefficients @ np.where(basis > basis_threshold, basis, 0).T
    return np.where(np.isnan(scores), -np.inf, scores)


def landmark_key_select(qkv: Array, *weights: Array, keys: int, **settings: Any) -> Array:
    """Compute LandmarkKeySelect: int32 indices [B,H,N-1,K]. Inputs and attributes are those of the schema."""
    return top_keys(_landmark_scores(qkv, *weights, **settings), keys)


SCORES = {"KeySelect": _key_scores, "LandmarkKeySelect": _landmark_scores}
"""Functions that return the selection scores, by operator name. Tests use them to check the indices of a kernel."""


def sparse_attention(qkv: Array, sizes: Array, indices: Array, **attributes: Any) -> Array:
    """Compute SparseAttention: float64 [B,N,C]. Attributes are those of the schema."""
    return _sparse_attention(qkv, sizes, indices, **attributes)


def _sparse_attention(
    qkv: Array,
    sizes: Array,
    indices: Array,
    *,
    num_heads: int,
    num_prefix: int,
    tile: int,
    key_pool: int,
    scale: float,
    prefix_keys: int = 1,
) -> Array:
    q, k, v = split_heads(qkv, num_heads)
    counts = sizes.astype(np.float64)
    out = np.empty_like(q)
    logits = scale * q[:, :, :num_prefix] @ k.swapaxes(-1, -2) + np.log(counts)[:, None, None]
    out[:, :, :num_prefix] = _softmax(logits) @ v
    first = num_prefix if prefix_keys else 0
    for batch, head, t in np.ndindex(*indices.shape[:3]):
        rows = slice(num_prefix + t * tile, min(num_prefix + (t + 1) * tile, q.shape[2]))
        entries = _entries(k[batch, head], v[batch, head], counts[batch], indices[batch, head, t], first, key_pool)
        out[batch, head, rows] = _attend(q[batch, head, rows], *entries, scale)
    return _merge_heads(out)


def _entries(
    k: Array, v: Array, sizes: Array, selected: Array, first: int, key_pool: int
) -> tuple[Array, Array, Array]:
    """Return the keys, values and logit offsets of one tile: prefix tokens, listed keys, background tokens.

    Args:
        k: Keys [N,d] of one head.
        v: Values [N,d] of one head.
        sizes: Sizes [N] of the tokens.
        selected: Key list [K] of the tile.
        first: Index of the token that index 0 of the list refers to; earlier tokens are always attended to.
        key_pool: Number of patches per background token, or 0.
    """
    listed = np.concatenate([np.arange(first), first + selected.astype(np.int64)])
    keys, values, offsets = [k[listed]], [v[listed]], [np.log(sizes[listed])]
    patches = k.shape[0] - first
    for start in range(0, patches, key_pool) if key_pool else ():
        rest = first + np.setdiff1d(np.arange(start, min(start + key_pool, patches)), selected)
        if len(rest):
            keys.append(np.average(k[rest], 0, sizes[rest])[None])
            values.append(np.average(v[rest], 0, sizes[rest])[None])
            offsets.append(np.log(sizes[rest].sum(keepdims=True)))
    return np.concatenate(keys), np.concatenate(values), np.concatenate(offsets)


def _attend(q: Array, keys: Array, values: Array, offsets: Array, scale: float) -> Array:
    return np.asarray(_softmax(scale * q @ keys.T + offsets) @ values)


def dense_attention(qkv: Array, sizes: Array, *, num_heads: int, scale: float) -> Array:
    """Compute DenseAttention: float64 [B,N,C]."""
    q, k, v = split_heads(qkv, num_heads)
    offsets = np.log(sizes.astype(np.float64))[:, None, None]
    return _merge_heads(_softmax(scale * q @ k.swapaxes(-1, -2) + offsets) @ v)


def cached_attention(qkv: Array, cache: Array, counts: Array, *, num_heads: int, scale: float) -> Array:
    """Compute CachedAttention: float64 [B,N,C]."""
    q, k, v = split_heads(qkv, num_heads)
    # The keys are repeated as placeholder queries, which `split_heads` expects.
    _, old_k, old_v = split_heads(np.concatenate([cache[..., : cache.shape[-1] // 2], cache], -1), num_heads)
    with np.errstate(divide="ignore"):
        offsets = np.log(np.concatenate([np.ones(qkv.shape[:2]), counts], 1, dtype=np.float64))[:, None, None]
    keys, values = np.concatenate([k, old_k], 2), np.concatenate([v, old_v], 2)
    return _merge_heads(_softmax(scale * q @ keys.swapaxes(-1, -2) + offsets) @ values)


def match_tokens(qkv: Array, sizes: Array, *, num_heads: int, num_prefix: int, window: int, merged: int) -> Array:
    """Compute MatchTokens: int32 pairs [B,N-merged,2]."""
    metric = split_heads(qkv, num_heads)[1][:, :, num_prefix:].mean(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        metric = metric / np.sqrt((metric**2).sum(-1, keepdims=True))
        weights = sizes.astype(np.float64)[:, num_prefix:]
        return np.stack([_pairs(*image, num_prefix, window, merged) for image in zip(metric, weights, strict=True)])


def _pairs(metric: Array, sizes: Array, prefix: int, window: int, merged: int) -> Array:
    """Return the pairs [N-merged,2] of one image, given its metric [P,d] and sizes [P].

    Each even patch is a suitor of its most similar odd patch within the window.
    """
    patches = metric.shape[0]
    sought = patches // 2
    suitors: dict[int, tuple[float, int]] = {}
    for e in range((patches + 1) // 2):
        best, partner = -np.inf, -1
        for j in range(max(0, e - window // 2), min(sought, e + window // 2)):
            a, b = sizes[2 * e], sizes[2 * j + 1]
            score = np.sqrt(a * b / (a + b)) * (metric[2 * e] @ metric[2 * j + 1] - 1)
            score = -1e30 if np.isnan(score) else max(score, -1e30)
            if score > best:
                best, partner = score, j
        if partner >= 0 and (partner not in suitors or best > suitors[partner][0]):
            suitors[partner] = (best, e)
    ranked = sorted(range(sought), key=lambda j: (-suitors[j][0] if j in suitors else np.inf, j))[:merged]
    taken = {suitors[j][1] for j in ranked if j in suitors}
    free = iter(e for e in range((patches + 1) // 2) if e not in taken)
    partners = {2 * j + 1: 2 * (suitors[j][1] if j in suitors else next(free)) for j in ranked}
    gone = set(partners.values())
    stays = [*range(-prefix, 0), *(i for i in range(patches) if i not in gone)]
    return np.array([(prefix + i, prefix + partners.get(i, i)) for i in stays], np.int32)


def merge_tokens(x: Array, sizes: Array, pairs: Array) -> Array:
    """Compute MergeTokens: float64 [B,M,C]."""
    rows = np.arange(x.shape[0])[:, None]
    first, second = pairs[..., 0], pairs[..., 1]
    x, weight = x.astype(np.float64), sizes.astype(np.float64)
    a, b = weight[rows, first][..., None], weight[rows, second][..., None]
    both = (a * x[rows, first] + b * x[rows, second]) / (a + b)
    return np.where((first == second)[..., None], x[rows, first], both)
