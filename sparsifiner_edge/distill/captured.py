"""How much of a layer's attention its lists hold: what a predictor is there for, and whether a training keeps it.

The published loss is the squared error of all attention. Where that is sharp, a few large entries decide it, and lists
of a quarter of the keys come to hold less than they held at the start: so of each layer the predictor goes on that held
the most.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import msgspec
import torch
from torch import Tensor, nn

from sparsifiner_edge.config import SparsityConfig, keep_text
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.attention import SparseAttention
from sparsifiner_edge.sparse.calibrate import observed, sparse_layers
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.patch import set_budget

Captured: TypeAlias = dict[str, list[float]]
"""Share of keys, as text -> of each sparse layer in turn, the share of its attention; 1 where that budget is dense."""
MOST_IMAGES = 4
"""That it is measured on: it changes little from image to image."""
LOSS = 0.005
"""What a layer may lose by a training before it is warned of."""


class BestPredictors(msgspec.Struct, forbid_unknown_fields=True):
    """Of each sparse layer in turn, the predictor whose lists held most of its attention so far.

    Attributes:
        gains: over the start, of the shares of keys at which the layer reads lists the least. weights: parameters, as
            `weights_of_predictors` names them.
    """

    gains: list[float]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> BestPredictors:
        """The start."""
        return cls([0.0] * len(sparse_layers(model)), weights_of_predictors(model))

    def take(self, model: nn.Module, start: Captured, now: Captured) -> None:
        """Those of a model that do better, by what is captured at the start and now, at the same shares of keys."""
        found = weights_of_predictors(model)
        for layer, gained in enumerate(self.gains):
            gain = min((now[keep][layer] - start[keep][layer] for keep in start if start[keep][layer] < 1), default=0.0)
            if gain > gained:
                self.gains[layer] = gain
                self.weights |= {name: x for name, x in found.items() if name.startswith(f"{layer}.")}

    @torch.no_grad()
    def give(self, model: nn.Module) -> None:
        """To the layers of a model."""
        for layer, attention in enumerate(sparse_layers(model)):
            for name, parameter in attention.select.named_parameters():
                parameter.copy_(self.weights[f"{layer}.{name}"])


def weights_of_predictors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all predictors' parameters: "<layer>.<name>", layers counted among those that are sparse."""
    found = enumerate(layer.select for layer in sparse_layers(model))
    return {f"{n}.{name}": x.detach().cpu().clone() for n, select in found for name, x in select.named_parameters()}


@torch.no_grad()
def attention_captured(model: nn.Module, images: Sequence[Tensor], budgets: Sequence[SparsityConfig]) -> Captured:
    """Of the attention that patches pay when all layers attend to all keys, the share that falls on keys which their
    lists hold, or which every query reads; means of images, heads and queries. Tokens do not merge meanwhile.

    Args:
        images: [1,3,H,W] as the model expects. budgets: of each share of keys the first.

    Returns:
        Nothing of a model none of whose layers reads lists.
    """
    before, found = cast(SparsityConfig, backbone_of(model).sparsity), Captured()
    for budget in budgets if sparse_layers(model) else ():
        if keep_text(budget.keep) not in found:
            set_budget(model, dataclasses.replace(budget, merge=()), keep_predictors=True)
            found[keep_text(budget.keep)] = _means(model, images[:MOST_IMAGES])
    set_budget(model, before, keep_predictors=True)
    return found


def _means(model: nn.Module, images: Sequence[Tensor]) -> list[float]:
    """Of each sparse layer, in the budget of now."""
    shares: dict[SparseAttention, list[float]] = {layer: [] for layer in sparse_layers(model)}

    def watch(layer: SparseAttention, qkv: Tensor, _: Tensor | None) -> None:
        shares[layer].append(_share(layer, qkv))

    with observed(model, watch, densely=True):
        for image in images:
            model(image)
    return [round(statistics.fmean(each), 6) if each else 1.0 for each in shares.values()]


def _share(layer: SparseAttention, qkv: Tensor) -> float:
    q, k, _ = (x.float() for x in ops.split_heads(qkv, layer.geometry.heads))
    prefix, lists = layer.num_prefix, layer.indices(qkv).long()
    shares = (layer.geometry.scale * q[:, :, prefix:] @ k.mT).softmax(-1)
    keys = shares.shape[-1] - prefix * layer.prefix_keys
    listed = torch.zeros(*lists.shape[:3], keys, dtype=torch.bool, device=qkv.device).scatter_(3, lists, True)
    if layer.prefix_keys:  # Lists belong to tiles, and every query reads the prefix beside them.
        rows = torch.arange(shares.shape[2], device=qkv.device) // layer.sparsity.tile
        listed = torch.nn.functional.pad(listed[:, :, rows], (prefix, 0), value=True)
    return float((shares * listed).sum(-1).mean())


def lost(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> list[str]:
    """Layers whose lists hold less than they did, for people: of each share of keys the one that lost most."""
    found = []
    for keep in before.keys() & after.keys():
        pairs = list(zip(before[keep], after[keep], strict=True))
        layer, (then, now) = max(enumerate(pairs), key=lambda x: x[1][0] - x[1][1])
        if then - now > LOSS:
            found.append(f"keep {keep}: lists of sparse layer {layer} held {then:.3f} of its attention, now {now:.3f}")
    return sorted(found)
