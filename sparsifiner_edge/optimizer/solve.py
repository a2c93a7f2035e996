"""The best plan for a price of fidelity: an exact dynamic program over layers.

Latency and error are sums over layers of terms that depend only on the token counts before and after. With a price that
converts one into the other, each layer's best choice follows from the later ones. 12 layers x 96 token counts x 6
shares of keys can all be enumerated, so no sampler is needed. The price that just meets a bound is found by bisection.
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
"""Number of token counts that a plan may have, evenly spaced up to the image's."""
BISECTIONS = 40
"""Number of bisection steps."""
PRICES = (1e-3, 1e9)
"""Minimum and maximum of milliseconds per unit of error."""


class Solver:
    """Finds plans for one deployment.

    Args:
        latency: Latency model.
        model: Fidelity model.
        selects: By layer, whether it can read less than all keys.
        tile: Query tile of the model.
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
        """Return the best plan if an error of 1 is worth `price` milliseconds."""
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
        """Return the most faithful plan predicted to take at most `ms`; the fastest if there is none."""
        return self._bisect(self.at_price(PRICES[0]), lambda plan: self.latency.of(plan) <= ms, dearer=True)

    def at_error(self, error: float) -> LayerPlan:
        """Return the fastest plan predicted to stay within `error`; the dense plan if there is none."""
        dense = LayerPlan.dense(len(self.selects))
        return self._bisect(dense, lambda plan: plan.is_dense or self.model.of(plan) <= error, dearer=False)

    def _bisect(self, best: LayerPlan, fits: Callable[[LayerPlan], bool], dearer: bool) -> LayerPlan:
        """Bisect the price; return the plan at the highest price that fits if `dearer`, else at the lowest.

        If no plan fits, `best` is returned.
        """
        low, high = (math.log(price) for price in PRICES)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            plan = self.at_price(math.exp(middle))
            fit = fits(plan)
            best = plan if fit else best
            low, high = (middle, high) if fit == dearer else (low, middle)
        return best


def possible_counts(patches: int, tile: int) -> Array:
    """Return the numbers of patch tokens that a plan may have, from the image's down in equal steps."""
    return np.arange(patches, max(LEAST_PATCHES, tile) - 1, -max(1, round(patches / TOKEN_STEPS)))
