"""A baseline for `fidelity.py`: token merging (ToMe, Bolya et al. 2023) by its published rule, at equal MACs.

In every layer, between attention and MLP, r tokens are merged by bipartite soft matching on the keys (mean of the
heads): tokens alternate between two sets, each of the first finds its best match in the second, the r best pairs merge
into their size-weighted mean; attention adds the logarithm of sizes. Patch outputs are copied back to their sources.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from fidelity_subject import Subject
from torch import Tensor

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape, layer_costs
from sparsifiner_edge.export.export import model_shape
from sparsifiner_edge.sparse.student import dense_twin


def measure_merging(size: int, against: SparsityConfig) -> dict[str, Any]:
    """Fidelity of merging whose whole model costs what a student with `against` costs."""
    subject = Subject(size)
    shape = model_shape(subject.model)
    wanted = sum(_total(c) for c in layer_costs(shape, against))
    rate = next(r for r in range(1, shape.patches) if merged_macs(shape, r) <= wanted)
    model: Any = dense_twin(subject.student).model
    features, patches = [], []
    with torch.no_grad():
        for picture, teacher in zip(subject.photographs, subject.teacher, strict=True):
            found = F.cosine_similarity(merged_forward(model, picture, rate), teacher[0], dim=-1)
            features.append(float(found[0]))
            patches.append(float(found[1:].mean()))
    counts = token_counts(shape, rate)
    dense = sum(c.attention for c in layer_costs(shape, SparsityConfig(keep=1)))
    return {
        "group": "baselines",
        "name": f"ToMe, r = {rate} a layer",
        "size": size,
        "sparsity": {},
        "projections": "none",
        "order": "raster",
        "keys_share": sum(counts) / len(counts) / counts[0],
        "macs_share": sum(2 * n * n * shape.width for n in counts) / dense,
        "predictor_share": 0.0,
        "features_cosine": features,
        "patches_cosine": patches,
        "layer_errors": {"unavailable": "merged tokens have no counterpart in the teacher"},
        "seconds": 0.0,
    }


def token_counts(shape: ModelShape, rate: int) -> list[int]:
    """Tokens that the attention of each layer sees; at most half of them merge at a time."""
    counts, tokens = [], shape.prefix + shape.patches
    for _ in range(shape.depth):
        counts.append(tokens)
        tokens -= min(rate, (tokens - shape.prefix) // 2)
    return counts


def merged_macs(shape: ModelShape, rate: int) -> int:
    """MACs of all layers; the MLP of a layer sees the merged tokens already. Matching itself is not counted."""
    counts = [*token_counts(shape, rate), 0]
    total = 0
    for layer in range(shape.depth):
        before = counts[layer]
        after = counts[layer + 1] or before - min(rate, (before - shape.prefix) // 2)
        total += 4 * before * shape.width**2 + 2 * before**2 * shape.width + 2 * after * shape.width * shape.hidden
    return total


def _total(costs: Any) -> int:
    return int(costs.projections + costs.predictor + costs.attention + costs.cells + costs.mlp)


def merged_forward(model: Any, picture: Tensor, rate: int) -> Tensor:
    """Image [1,3,S,S] -> tokens [N,C] after the final norm, merged patches copied back to their sources."""
    x = model._pos_embed(model.patch_embed(picture))
    sizes = torch.ones(x.shape[1])
    source = torch.arange(x.shape[1])
    for block in model.blocks:
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sizes.log()[None, None, None])
        x = x + block.ls1(attention.proj(out.transpose(1, 2).flatten(2)))
        place, count = match(k[0].mean(0), min(rate, (x.shape[1] - 1) // 2))
        merged = torch.zeros(count, x.shape[2]).index_add_(0, place, x[0] * sizes[:, None])
        sizes = torch.zeros(count).index_add_(0, place, sizes)
        x, source = (merged / sizes[:, None])[None], place[source]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.norm(x)[0][source]


def match(metric: Tensor, rate: int) -> tuple[Tensor, int]:
    """New place [N] of every token when `rate` of the first set merge into the second, and the new count."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    tokens = torch.arange(metric.shape[0])
    first, second = tokens[::2], tokens[1::2]
    scores = metric[first] @ metric[second].T
    scores[0] = -math.inf  # the class token never merges
    best, partner = scores.max(-1)
    merged = best.argsort(descending=True)[:rate]
    stays = torch.ones(len(tokens), dtype=torch.bool)
    stays[first[merged]] = False
    place = stays.cumsum(0) - 1
    place[first[merged]] = place[second[partner[merged]]]
    return place, int(stays.sum())
