"""The best plan for a price of fidelity: an exact dynamic program over layers.

Both latency and loss are sums over layers of what depends on the tokens before and behind alone, so with a price that
turns one into the other each layer's best choice follows from the next ones': no sampler is needed where 12 layers x 96
numbers of tokens x 6 shares of keys can all be looked at. The price that just meets a bound is bisected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.optimizer.fidelity_model import FidelityModel
from sparsifiner_edge.optimizer.latency import SHARES, PlanLatency, name_of
from sparsifiner_edge.plan import LEAST_PATCHES, PATCHES_PER_MERGE, LayerPlan

TOKEN_STEPS = 96
"""Numbers of tokens that a plan can have, spaced evenly up to those of the image."""
BISECTIONS = 40
PRICES = (1e-3, 1e9)
"""Milliseconds that one of distance is worth: the least and the most."""


class Solver:
    """Plans for one engine.

    Args:
        latency, model: of its plans. selects: by layer whether it can read less than all keys. tile: the student's.
    """

    def __init__(self, latency: PlanLatency, model: FidelityModel, selects: Sequence[bool], tile: int) -> None:
        self.latency, self.model, self.selects = latency, model, selects
        self.counts = possible_counts(model.patches, tile)
        before, after = self.counts[:, None], self.counts[None, :]
        pairs = np.broadcast_arrays(before, np.minimum(before, after))
        self._merging = [model.merging(layer, *pairs) for layer in range(len(selects))]
        self._reading = [
            np.stack([model.reading(layer, share, self.counts) for share in SHARES]) for layer in range(len(selects))
        ]
        self._allowed = (before >= after) & (before - after <= before // PATCHES_PER_MERGE)
        part = latency.of_part
        merging = np.where(before != after, part("merging", self.counts)[:, None], 0.0)
        self._fixed = part("projections", self.counts)[:, None] + merging + part("mlp", self.counts)[None, :]
        self._attention = np.stack([part(name_of(share), self.counts) for share in SHARES])

    def at_price(self, price: float) -> LayerPlan:
        """The best plan where a distance of 1 is worth `price` milliseconds."""
        ahead = np.zeros(len(self.counts))
        choices: list[tuple[Array, Array]] = []
        for layer, selects in reversed(list(enumerate(self.selects))):
            reading = self._attention + price * self._reading[layer]
            if not selects:
                reading[:-1] = np.inf  # the last share is 1
            costs = np.where(self._allowed, self._fixed + price * self._merging[layer] + ahead[None, :], np.inf)
            choices.append((costs.argmin(1), reading.argmin(0)))
            ahead = costs.min(1) + reading.min(0)
        merge, keep, state = [], [], 0
        for following, share in reversed(choices):
            keep.append(SHARES[int(share[state])])
            merge.append(int(self.counts[state] - self.counts[following[state]]))
            state = int(following[state])
        return LayerPlan(tuple(merge), tuple(keep))

    def at_latency(self, ms: float) -> LayerPlan:
        """The nearest to the dense model of those predicted to take `ms` at most; the fastest where none is."""
        return self._bisect(self.at_price(PRICES[0]), lambda plan: self.latency.of(plan) <= ms, dearer=True)

    def at_distance(self, distance: float) -> LayerPlan:
        """The fastest of those predicted to lie within `distance`; the dense model where none is."""
        dense = LayerPlan.dense(len(self.selects))
        return self._bisect(dense, lambda plan: plan.is_dense or self.model.of(plan) <= distance, dearer=False)

    def _bisect(self, best: LayerPlan, fits: Callable[[LayerPlan], bool], dearer: bool) -> LayerPlan:
        """The last plan that fits, on the way to the dearest price that gives one, or to the cheapest."""
        low, high = (math.log(price) for price in PRICES)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            plan = self.at_price(math.exp(middle))
            fit = fits(plan)
            best = plan if fit else best
            low, high = (middle, high) if fit == dearer else (low, middle)
        return best


def possible_counts(patches: int, tile: int) -> Array:
    """Numbers of patch tokens that a plan may come by, most first: the image's, and down in equal steps."""
    return np.arange(patches, max(LEAST_PATCHES, tile) - 1, -max(1, round(patches / TOKEN_STEPS)))
