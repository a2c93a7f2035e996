"""How close a student is to its teacher on held-out images, by which a training keeps its best weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.judge import Prediction, alike, correlation
from sparsifiner_edge.metrics import POSITIONS
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
