"""A model of how what single layers lose adds up, fitted to what was measured.

A layer that merges a share f of its tokens loses a_l f^s t^b: the pairs most alike merge first, so that more merge ever
worse (s); t is the mean size of the tokens, since those that merged before are less alike than single ones (b). One
that reads a share of its keys loses k_l share^-p times the share of tokens that is left to the power q. Distances (1 -
cosine) of perturbations that do not know of each other add; what they lack or exceed together is one factor and one
exponent for all. Everything starts from two measurements of each layer alone, and is fitted anew to all plans that were
measured, in the logarithm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.optimizer.trial import ROUNDING
from sparsifiner_edge.plan import LayerPlan

PROBED = 0.2
"""Share of keys that each layer is measured with alone."""
STEEP, SIZE, LEFT, FALL = 1.6, 0.5, 0.0, 1.6
"""s, b, q and each layer's p before anything is fitted."""
QUARTER = 0.25
"""Share that merges where a layer is measured alone."""
SPREADS = {
    "merge": 0.7,
    "keep": 0.7,
    "fall": 0.4,
    "steep": 0.5,
    "size": 1.0,
    "left": 0.7,
    "factor": 0.7,
    "exponent": 0.15,
}
"""How far each parameter is expected to move, against a distance's logarithm."""
NOISE = 0.1
"""Of a measured distance's logarithm that no model explains."""
FIT_STEPS, FIT_RATE = 400, 0.05


class FidelityModel:
    """Distances of plans.

    Args:
        merge, keep: of the model with one layer changed: where an even quarter of its patches merges [L], and where it
            reads `PROBED` of its keys [L].
        patches: of the image. least: a distance counts as no smaller.
    """

    def __init__(self, merge: Sequence[float], keep: Sequence[float], patches: int, least: float = ROUNDING) -> None:
        self.patches, self._least = patches, least
        self._quarter, self._at_probed = (torch.tensor(x, dtype=torch.float64).clamp_min(least) for x in (merge, keep))
        self.parameters = {name: torch.zeros(1).double() for name in SPREADS}
        self.parameters |= {name: torch.zeros(len(merge)).double() for name in ("merge", "keep", "fall")}

    def merging(self, layer: int, before: Array, after: Array) -> Array:
        """What merging from `before` to `after` patches loses in this layer."""
        remaining, merged = (torch.from_numpy(np.asarray(x, float)) for x in (before, before - after))
        return np.asarray(float(self._merge_weights()[layer]) * self._merging(remaining, merged).numpy())

    def reading(self, layer: int, share: float, counts: Array) -> Array:
        """What a share of keys loses in this layer, at numbers of patches."""
        if share == 1:
            return np.zeros(np.shape(counts))
        remaining = np.asarray(counts, float) / self.patches
        weight = float(self._keep_weights()[layer]) * (share / PROBED) ** -float(self._falls()[layer])
        return np.asarray(weight * remaining ** float(self.parameters["left"]))

    def of(self, plan: LayerPlan) -> float:
        """The distance of a plan."""
        with torch.no_grad():
            return float(self._logs([plan]).exp())

    def fit(self, plans: Sequence[LayerPlan], distances: Sequence[float]) -> FidelityModel:
        """Fit to what was measured, in place; without any, it stays at what each layer alone loses."""
        if not plans:
            return self
        wanted = torch.log(torch.tensor(distances).double().clamp_min(self._least))
        for value in self.parameters.values():
            value.requires_grad_(True)
        optimiser = torch.optim.Adam(list(self.parameters.values()), lr=FIT_RATE)
        for _ in range(FIT_STEPS):
            optimiser.zero_grad()
            loss = ((self._logs(plans) - wanted) / NOISE).square().sum()
            for name, spread in SPREADS.items():
                loss = loss + (self.parameters[name] / spread).square().sum()
            loss.backward()
            optimiser.step()
        for value in self.parameters.values():
            value.requires_grad_(False)
        return self

    def _merging(self, before: Tensor, merged: Tensor) -> Tensor:
        """Relative to a quarter of single tokens."""
        share = (merged / before / QUARTER).clamp_min(1e-9)
        steep, size = STEEP + self.parameters["steep"], SIZE + self.parameters["size"]
        return share ** steep.clamp(1.0, 4.0) * (self.patches / before) ** size.clamp(-1.0, 3.0)

    def _merge_weights(self) -> Tensor:
        return self._quarter * self.parameters["merge"].exp()

    def _keep_weights(self) -> Tensor:
        return self._at_probed * self.parameters["keep"].exp()

    def _falls(self) -> Tensor:
        return (FALL + self.parameters["fall"]).clamp(0.2, 4.0)

    def _logs(self, plans: Sequence[LayerPlan]) -> Tensor:
        counts = torch.tensor([plan.tokens(self.patches) for plan in plans]).double()
        remaining = (counts / self.patches) ** self.parameters["left"]
        shares = torch.tensor([plan.keep for plan in plans]).double()
        merging = (self._merge_weights() * self._merging(counts[:, :-1], counts[:, :-1] - counts[:, 1:])).sum(1)
        reading = self._keep_weights() * (shares / PROBED) ** -self._falls() * remaining[:, :-1]
        total = merging + (reading * (shares < 1)).sum(1)
        exponent = 1 + self.parameters["exponent"]
        return self.parameters["factor"] + exponent * torch.log(total.clamp_min(self._least))
