"""Model of how errors of single layers add up, fitted to measurements.

A layer that merges a share f of its tokens adds a_l f^s t^b: the most similar pairs merge first, so further merges are
worse (s); t is the mean size of the tokens, since merged tokens are less similar than single ones (b). A layer that
reads a share of its keys adds k_l share^-p times the share of remaining tokens to the power q. Errors (1 - cosine) of
independent perturbations add; one factor and one exponent for all absorb the deviation. Everything starts from two
measurements of each layer alone and is fitted in the logarithm to all measured plans.
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
"""Share of keys with which each layer is measured alone."""
STEEP = 1.6
"""Initial value of s."""
SIZE = 0.5
"""Initial value of b."""
LEFT = 0.0
"""Initial value of q."""
FALL = 1.6
"""Initial value of each layer's p."""
QUARTER = 0.25
"""Share of the tokens that merges where a layer is measured alone."""
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
"""Prior standard deviation of each parameter: how far the fit may move it from its initial value."""
NOISE = 0.1
"""Unexplained deviation of the logarithm of a measured error."""
FIT_STEPS = 400
FIT_RATE = 0.05


class FidelityModel:
    """Predicts errors of plans.

    Args:
        merge: Error of the model with one layer changed: a quarter of its patches merges [L].
        keep: Error of the model with one layer changed: it reads `PROBED` of its keys [L].
        patches: Number of patches of the image.
        least: Floor of the error; see `trial.least_error`.
    """

    def __init__(self, merge: Sequence[float], keep: Sequence[float], patches: int, least: float = ROUNDING) -> None:
        self.patches, self._least = patches, least
        self._quarter, self._at_probed = (torch.tensor(x, dtype=torch.float64).clamp_min(least) for x in (merge, keep))
        self.parameters = {name: torch.zeros(1).double() for name in SPREADS}
        self.parameters |= {name: torch.zeros(len(merge)).double() for name in ("merge", "keep", "fall")}

    def merging(self, layer: int, before: Array, after: Array) -> Array:
        """Return the error of merging from `before` to `after` patches in a layer."""
        remaining, merged = (torch.from_numpy(np.asarray(x, float)) for x in (before, before - after))
        return np.asarray(float(self._merge_weights()[layer]) * self._merging(remaining, merged).numpy())

    def reading(self, layer: int, share: float, counts: Array) -> Array:
        """Return the error of reading a share of the keys in a layer, for numbers of patches."""
        if share == 1:
            return np.zeros(np.shape(counts))
        remaining = np.asarray(counts, float) / self.patches
        weight = float(self._keep_weights()[layer]) * (share / PROBED) ** -float(self._falls()[layer])
        return np.asarray(weight * remaining ** float(self.parameters["left"]))

    def of(self, plan: LayerPlan) -> float:
        """Return the predicted error of a plan."""
        with torch.no_grad():
            return float(self._logs([plan]).exp())

    def fit(self, plans: Sequence[LayerPlan], errors: Sequence[float]) -> FidelityModel:
        """Fit to measurements, in place; without any, the model keeps the errors of single layers."""
        if not plans:
            return self
        wanted = torch.log(torch.tensor(errors).double().clamp_min(self._least))
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
        """Return the error relative to merging a quarter of single tokens."""
        share = (merged / before / QUARTER).clamp_min(1e-9)
        exponent, size = STEEP + self.parameters["steep"], SIZE + self.parameters["size"]
        return share ** exponent.clamp(1.0, 4.0) * (self.patches / before) ** size.clamp(-1.0, 3.0)

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
