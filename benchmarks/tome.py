"""Rivals of `frontier.py`, each as one plain module: token merging by two published rules, and fewer pixels.

ToMe (Bolya et al. 2023): in every layer, between attention and MLP, r tokens are merged by bipartite soft matching on
the keys (mean of the heads). Tokens alternate between two sets, each of the first finds its best match in the second,
and the r best pairs merge into their size-weighted mean. Attention adds the logarithm of sizes (proportional
attention). At most half of the tokens merge at a time. Patch outputs are copied back to their sources.

MAT (arXiv 2512.22760): patches lie along the Hilbert curve, the r most similar pairs of neighbours on it merge, and
runs of them become one token; the rest as in ToMe.

Fewer pixels: the dense model for a smaller image, its patch outputs resized to the grid of the larger.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsifiner_edge.export.deployed_model import DeployedModel
from sparsifiner_edge.order import hilbert_order
from sparsifiner_edge.sparse.hosts.timm import TimmModel, preprocessing

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
"""Returns tokens [B,N,C], sizes [B,N,1] and places of original tokens [B,N0] after merging by metric [B,N,d]."""


CHOSEN = (
    "4,14,14,14,12,12,10,8,4,4,2,0",
    "5,16,16,16,16,16,14,10,6,4,2,0",
    "6,20,18,18,16,16,14,10,6,4,2,0",
    "6,22,20,20,18,18,16,12,6,4,2,0",
    "8,24,22,22,20,18,16,12,6,4,2,0",
)
"""Merging rates of ours at 224 px, low in the first layer: chosen on development and training photographs."""


def schedule(rate: int | tuple[int, float] | str, depth: int) -> tuple[tuple[int, ...], str]:
    """Return rates in the form of `--merge`, and their name.

    A rate is constant, or the first layer's and the power by which it falls to 0 in the last, or as a front names it.
    """
    if isinstance(rate, str):
        return tuple(map(int, rate.split(","))), rate
    if isinstance(rate, int):
        return (rate,), str(rate)
    first, power = rate
    rates = tuple(round(first * (1 - layer / (depth - 1)) ** power) for layer in range(depth))
    return rates, f"{first}..0" + (f" ^ {power:g}" if power != 1 else "")


class ToMe(nn.Module):
    """Model from uint8 images [B,H,W,3] to class features [B,C] and tokens [B,N,C], merged at given rates per layer.

    Args:
        chained: Use MAT's rule.
    """

    def __init__(self, model: TimmModel, rates: list[int], chained: bool = False) -> None:
        super().__init__()
        self.model: Any = DeployedModel(
            model, preprocessing(model)
        ).model  # normalisation and layer scale folded, as in our own files
        self.rates, self.rule = rates, chain if chained else merge
        patches = torch.from_numpy(hilbert_order(*self.model.patch_embed.grid_size)) + 1
        count = len(patches) + 1
        order = torch.cat([torch.zeros(1, dtype=torch.long), patches]) if chained else torch.arange(count)
        self.register_buffer("order", order if chained else None, persistent=False)
        self.register_buffer("places", order.argsort()[None], persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(image.float().permute(0, 3, 1, 2))))
        x = x if self.order is None else x[:, self.order]
        places = self.places.expand(x.shape[0], -1)
        sizes = torch.ones_like(x[:, :, :1])
        for block, rate in zip(model.blocks, self.rates, strict=True):
            attention = block.attn
            packed = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=sizes.log()[:, None, :, 0][:, None])
            x = x + attention.proj(out.transpose(1, 2).flatten(2))
            pairs = min(rate, (x.shape[1] - 1) // 2)
            if pairs:
                x, sizes, places = self.rule(k.mean(1), x, sizes, places, pairs)
            x = x + block.mlp(block.norm2(x))
        x = model.norm(x)
        tokens = x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))
        return tokens[:, 0], tokens


def merge(metric: Tensor, x: Tensor, sizes: Tensor, places: Tensor, rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge by ToMe's rule; see `Rule`."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    first, second = metric[:, ::2], metric[:, 1::2]
    scores = first @ second.transpose(1, 2)
    # The class token never merges.
    scores = torch.cat([torch.full_like(scores[:, :1], -1e9), scores[:, 1:]], 1)
    best, partner = scores.max(-1)
    count = best.shape[1]
    order = best.topk(count, dim=-1).indices
    merged, stays = order[:, :rate], order[:, rate:].sort(-1).values
    target = partner.gather(1, merged)

    def joined(values: Tensor) -> Tensor:
        width = values.shape[2]
        a, b = values[:, ::2], values[:, 1::2]
        moved = a.gather(1, merged[:, :, None].expand(-1, -1, width))
        kept = a.gather(1, stays[:, :, None].expand(-1, -1, width))
        b = b.scatter_reduce(1, target[:, :, None].expand(-1, -1, width), moved, "sum")
        return torch.cat([kept, b], 1)

    total = joined(sizes)
    x = joined(x * sizes) / total
    left = count - rate
    new = torch.zeros_like(places[:, :1]).expand(-1, count + scores.shape[2])
    kept_places = torch.arange(left, device=x.device).expand(len(x), -1)
    second_places = torch.arange(scores.shape[2], device=x.device).expand(len(x), -1)
    new = new.scatter(1, 2 * stays, kept_places).scatter(1, 2 * second_places + 1, second_places + left)
    new = new.scatter(1, 2 * merged, target + left)
    return x, total, new.gather(1, places)


def chain(metric: Tensor, x: Tensor, sizes: Tensor, places: Tensor, rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge by MAT's rule; see `Rule`."""
    patches = F.normalize(metric[:, 1:], dim=-1)
    alike = (patches[:, :-1] * patches[:, 1:]).sum(-1)
    # Token 0 is the class token's; the later one of a pair joins the earlier one, which may have joined another.
    joins = torch.zeros_like(x[:, :, 0]).scatter(1, alike.topk(rate, dim=-1).indices + 2, 1.0)
    into = torch.arange(x.shape[1], device=x.device) - joins.cumsum(1).long()

    def joined(values: Tensor) -> Tensor:
        room = torch.zeros_like(values[:, : x.shape[1] - rate])
        return room.scatter_reduce(1, into[:, :, None].expand(-1, -1, values.shape[2]), values, "sum")

    total = joined(sizes)
    return joined(x * sizes) / total, total, into.gather(1, places)


class FewerPixels(nn.Module):
    """Model from uint8 images [B,h,w,3] to features [B,C] and tokens [B,N,C] of an image of `grid` patches a side.

    Args:
        model: For the small image, which is square.
    """

    def __init__(self, model: TimmModel, grid: int) -> None:
        super().__init__()
        self.dense, self.grid = ToMe(model, [0] * len(model.blocks)), grid

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features, tokens = self.dense(image)
        side = math.isqrt(tokens.shape[1] - 1)
        patches = tokens[:, 1:].transpose(1, 2).unflatten(-1, (side, side))
        patches = F.interpolate(patches, (self.grid, self.grid), mode="bilinear", align_corners=False)
        return features, torch.cat([tokens[:, :1], patches.flatten(2).transpose(1, 2)], 1)


def token_counts(rates: list[int], tokens: int) -> list[int]:
    """Return the tokens that each layer's attention sees, and last those that leave the model."""
    counts = [tokens]
    for rate in rates:
        counts.append(counts[-1] - min(rate, (counts[-1] - 1) // 2))
    return counts


def macs(rates: list[int], tokens: int, width: int, hidden: int) -> int:
    """Return the multiply-accumulates of all layers, whose MLPs see the merged tokens already, without matching."""
    counts = token_counts(rates, tokens)
    return sum(
        4 * before * width**2 + 2 * before**2 * width + 2 * after * width * hidden
        for before, after in itertools.pairwise(counts)
    )


def export(
    module: nn.Module, size: int, path: Path, batch: int = 1, outputs: Sequence[str] = ("features", "tokens")
) -> Path:
    """Export a module as one plain ONNX file."""
    example = torch.zeros(batch, size, size, 3, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            (example,),
            input_names=["image"],
            output_names=outputs,
            opset_version=20,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    part = path.with_suffix(".part")
    program.save(str(part))
    return part.rename(path)
