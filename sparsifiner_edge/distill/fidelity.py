"""How close a student is to its teacher on held-out images, by which a training keeps its best weights."""

from __future__ import annotations

import math
import statistics
from typing import cast

import torch
from torch import Tensor, nn

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.distill.losses import at_positions
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.outputs import ModelAnswer, seen_by
from sparsifiner_edge.sparse.patch import set_budget

LEAST_ERROR = 1e-6
"""Cosine distance at which a budget counts as perfect: rounding is as large."""


@torch.no_grad()
def fidelities(
    model: nn.Module,
    held_out: list[tuple[Tensor, ModelAnswer]],
    budgets: list[SparsityConfig],
    names: tuple[str, ...] | None = None,
) -> list[list[float]]:
    """Per budget and image, the mean of the patch tokens' and the prefix tokens' cosines to the teacher's, and of the
    correlation with each output of what is around the backbone.
    """
    backbone = backbone_of(model)
    before, prefix, found = cast(SparsityConfig, backbone.sparsity), backbone.prefix, []
    for sparsity in budgets:
        set_budget(model, sparsity, keep_predictors=True)
        values = []
        for image, wanted in held_out:
            seen = seen_by(model, image, names)
            expected = at_positions(wanted.tokens, seen.positions, prefix)
            cosine = torch.cosine_similarity(seen.tokens, expected, dim=-1)[0]
            parts = [cosine[:prefix], cosine[prefix:]] if prefix else [cosine]
            parts += [_correlation(seen.outputs[name], output) for name, output in wanted.outputs.items()]
            values.append(statistics.fmean(float(part.mean()) for part in parts))
        found.append(values)
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
