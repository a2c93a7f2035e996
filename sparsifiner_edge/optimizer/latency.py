"""Smooth latency of a deployment, fitted to all complete models that were timed in it.

A single timing differs from the next by a few percent, more than most changes of a plan gain. Time is a sum of what the
linear layers do per token, and what dense and sparse attention do per pair of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.plan import LayerPlan

LEAST_TIMED = 4
"""Minimum number of timed plans for a fit."""
ATTENTION_SHARE = 0.25
"""Share of a layer's linear work that is done before its tokens merge (queries, keys and values)."""


class Latency:
    """Predicts milliseconds of plans.

    Args:
        patches: Number of patches of the image.
        plans: Plans that were timed, at least `LEAST_TIMED`.
        ms: Their milliseconds.
    """

    def __init__(self, patches: int, plans: Sequence[LayerPlan], ms: Sequence[float]) -> None:
        self._patches = patches
        work, times = np.stack([self._work(plan) for plan in plans]), np.asarray(ms, float)
        self._cost = _least_squares(work / times[:, None])

    def of(self, plan: LayerPlan) -> float:
        """Return the predicted time of a plan in milliseconds."""
        return float(self._work(plan) @ self._cost)

    def _work(self, plan: LayerPlan) -> Array:
        counts = np.asarray(plan.tokens(self._patches), float) / self._patches
        before, after, dense = counts[:-1], counts[1:], np.asarray(plan.keep) == 1
        linear = (ATTENTION_SHARE * before + (1 - ATTENTION_SHARE) * after).sum()
        return np.asarray([linear, (before[dense] ** 2).sum(), (before[~dense] ** 2).sum()])


def _least_squares(work: Array) -> Array:
    """Return non-negative costs for which `work @ costs` is closest to 1."""
    best, error = np.zeros(work.shape[1]), np.inf
    for count in range(1, work.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(work.shape[1]), count)):
            costs = np.linalg.lstsq(work[:, chosen], np.ones(len(work)), rcond=None)[0]
            residual = float(np.square(work[:, chosen] @ costs - 1).sum())
            if (costs >= 0).all() and residual < error:
                best, error = np.zeros(work.shape[1]), residual
                best[chosen] = costs
    return best
