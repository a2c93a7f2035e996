"""How close a student is to its teacher on held-out images, by which a training keeps its best weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.distill.losses import at_positions
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.outputs import ModelAnswer, seen_by
from sparsifiner_edge.sparse.patch import set_budget

LEAST_ERROR = 1e-6
"""Cosine distance at which a budget counts as perfect: rounding is as large."""


class HeldOutScores(NamedTuple):
    """Per budget and image: cosines, see `fidelities`; whether the first class is right, empty where nobody knows."""

    cosines: list[list[float]]
    right: list[list[bool]]


@torch.no_grad()
def fidelities(
    model: nn.Module,
    held_out: list[tuple[Tensor, ModelAnswer]],
    budgets: list[SparsityConfig],
    names: tuple[str, ...] | None = None,
    labels: Sequence[int] = (),
) -> HeldOutScores:
    """Per budget and image, the mean of the patch tokens' and the prefix tokens' cosines to the teacher's, and of the
    correlation with each output of what is around the backbone; with labels also whether they are given.
    """
    backbone = backbone_of(model)
    before, prefix, found = cast(SparsityConfig, backbone.sparsity), backbone.prefix, HeldOutScores([], [])
    for sparsity in budgets:
        set_budget(model, sparsity, keep_predictors=True)
        values, right = [], []
        for number, (image, wanted) in enumerate(held_out):
            seen = seen_by(model, image, names)
            expected = at_positions(wanted.tokens, seen.positions, prefix)
            cosine = torch.cosine_similarity(seen.tokens, expected, dim=-1)[0]
            parts = [cosine[:prefix], cosine[prefix:]] if prefix else [cosine]
            parts += [_correlation(seen.outputs[name], output) for name, output in wanted.outputs.items()]
            values.append(statistics.fmean(float(part.mean()) for part in parts))
            if labels:
                right.append(int(backbone.heads(seen.tokens)["logits"].argmax()) == labels[number])
        found.cosines.append(values)
        found.right.append(right)
    set_budget(model, before)
    return found


def _correlation(got: Tensor, wanted: Tensor) -> Tensor:
    """Of all elements; 1 where both are constant."""
    a, b = (x.flatten() - x.mean() for x in (got, wanted))
    norms = a.norm() * b.norm()
    return a @ b / norms if float(norms) > 0 else torch.ones(())


def joint_fidelity(cosines: list[list[float]]) -> float:
    """One figure for all budgets and images: 1 minus the geometric mean of 1 - cosine.

    Each counts by the share of its own error: else a small gain where errors are large, with few keys or on an image
    unlike the others, would buy a great loss everywhere else. NaN where a cosine is.
    """
    every = [cosine for values in cosines for cosine in values]
    if not all(map(math.isfinite, every)):
        return math.nan
    return 1 - statistics.geometric_mean(max(1 - cosine, LEAST_ERROR) for cosine in every)
