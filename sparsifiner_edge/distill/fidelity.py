"""How close a student is to its teacher on held-out images, by which a training keeps its best weights; and how much of
a layer's attention its lists hold, which is what a predictor is there for.

The published loss is the squared error of all attention. Where that is sharp, a few large entries decide it, and lists
of a quarter of the keys come to hold less than they held at the start: such a layer goes on with what it began with.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from sparsifiner_edge.config import SparsityConfig, keep_text
from sparsifiner_edge.judge import Prediction, alike, correlation
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.attention import SparseAttention
from sparsifiner_edge.sparse.calibrate import observed, sparse_layers
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.outputs import TOKENS, ModelAnswer, seen_by
from sparsifiner_edge.sparse.patch import set_budget

LEAST_ERROR = 1e-6
"""Cosine distance at which a budget counts as perfect: rounding is as large."""


class HeldOut(NamedTuple):
    """An image [1,3,H,W], what the teacher makes of it, and its class, where that decides."""

    image: Tensor
    wanted: ModelAnswer
    label: int | None = None


class Judgement(NamedTuple):
    """Of weights, on held-out images.

    Attributes:
        fidelity: see `joint_fidelity`; -1 where it is NaN. cosines: of each budget. top1: of each budget, where images
            have classes.
    """

    fidelity: float
    cosines: list[float]
    top1: list[float]

    @property
    def score(self) -> float:
        """What decides: the greater, the better."""
        return statistics.fmean(self.top1) if self.top1 and self.fidelity > -1 else self.fidelity


@torch.no_grad()
def judge_weights(
    model: nn.Module, held_out: Sequence[HeldOut], budgets: list[SparsityConfig], names: tuple[str, ...] | None = None
) -> Judgement:
    """Cosines of tokens to the teacher's, and first classes where images have one.

    A budget's cosine of an image is the mean of the patch tokens', the prefix tokens', and of the correlation with each
    output of what is around the backbone.
    """
    backbone = backbone_of(model)
    before, each, top1 = cast(SparsityConfig, backbone.sparsity), list[list[float]](), list[float]()
    for sparsity in budgets:
        set_budget(model, sparsity, keep_predictors=True)
        values, right = list[float](), list[bool]()
        for one in held_out:
            seen = seen_by(model, one.image, names)
            values.append(_cosine(seen.prediction(backbone.prefix), one.wanted.prediction(backbone.prefix)))
            if one.label is not None:
                right.append(int(backbone.heads(seen.tokens)["logits"].argmax()) == one.label)
        each.append(values)
        top1 += [statistics.fmean(right)] if right else []
    set_budget(model, before, keep_predictors=True)
    joint, cosines = joint_fidelity(each), [statistics.fmean(values) for values in each]
    sound = math.isfinite(joint)
    return Judgement(joint if sound else -1.0, [x if math.isfinite(x) else -1.0 for x in cosines], top1)


def _cosine(got: Prediction, wanted: Prediction) -> float:
    parts = [alike(part, got, wanted) for part in (("prefix", "patches") if got.prefix else ("patches",))]
    others = wanted.outputs.keys() - {TOKENS, POSITIONS}
    return statistics.fmean(parts + [correlation(got.outputs[name], wanted.outputs[name]) for name in others])


def joint_fidelity(cosines: list[list[float]]) -> float:
    """One figure for all budgets and images: 1 minus the geometric mean of 1 - cosine.

    Each counts by the share of its own error: else a small gain where errors are large, with few keys or on an image
    unlike the others, would buy a great loss everywhere else. NaN where a cosine is.
    """
    every = [cosine for values in cosines for cosine in values]
    if not all(map(math.isfinite, every)):
        return math.nan
    return 1 - statistics.geometric_mean(max(1 - cosine, LEAST_ERROR) for cosine in every)


Captured: TypeAlias = dict[str, list[float]]
"""Share of keys, as text -> of each sparse layer in turn, the share of its attention; 1 where that budget is dense."""
Predictors: TypeAlias = list[dict[str, Tensor]]
"""Parameters of each sparse layer's, in turn."""
MOST_IMAGES = 4
"""That it is measured on: it changes little from image to image."""


def predictors_of(model: nn.Module) -> Predictors:
    """Copies."""
    return [
        {name: x.detach().clone() for name, x in layer.select.state_dict().items()} for layer in sparse_layers(model)
    ]


def put_back_worse(
    model: nn.Module, start: Predictors, images: Sequence[Tensor], budgets: Sequence[SparsityConfig]
) -> list[int]:
    """Of each sparse layer the predictor of the start goes on, unless the model's own holds more of its attention at
    every share of keys at which the layer reads lists; which layers those are that got their start back.
    """
    learnt, now = predictors_of(model), attention_captured(model, images, budgets)
    _set_predictors(model, start)
    before = attention_captured(model, images, budgets)
    worse = [
        layer
        for layer in range(len(start))
        if min((now[keep][layer] - before[keep][layer] for keep in before if before[keep][layer] < 1), default=1.0) <= 0
    ]
    _set_predictors(model, [start[n] if n in worse else one for n, one in enumerate(learnt)])
    return worse


def _set_predictors(model: nn.Module, predictors: Predictors) -> None:
    for layer, parameters in zip(sparse_layers(model), predictors, strict=True):
        layer.select.load_state_dict(parameters)


@torch.no_grad()
def attention_captured(model: nn.Module, images: Sequence[Tensor], budgets: Sequence[SparsityConfig]) -> Captured:
    """Of the attention that patches pay when all layers attend to all keys, the share that falls on keys which their
    lists hold, or which every query reads; means of images, heads and queries. Tokens do not merge meanwhile.

    Args:
        images: [1,3,H,W] as the model expects. budgets: of each share of keys the first.

    Returns:
        Nothing of a model none of whose layers reads lists.
    """
    before, captured = cast(SparsityConfig, backbone_of(model).sparsity), Captured()
    for budget in budgets if sparse_layers(model) else ():
        if keep_text(budget.keep) not in captured:
            set_budget(model, dataclasses.replace(budget, merge=()), keep_predictors=True)
            captured[keep_text(budget.keep)] = _means(model, images[:MOST_IMAGES])
    set_budget(model, before, keep_predictors=True)
    return captured


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
