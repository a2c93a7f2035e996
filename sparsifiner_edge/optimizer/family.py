"""The plans that a search starts from: sparse attention in the first layers, and merges that fall from layer to layer.

A layer merges `rate * (1 - layer / (depth - 1)) ** power` of the image's patches. The first layers see the most tokens,
so merging early saves the most, and sparse attention pays there first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sparsifiner_edge.plan import LEAST_PATCHES, PATCHES_PER_MERGE, LayerPlan
from sparsifiner_edge.sparse.attention import SparseAttention
from sparsifiner_edge.sparse.defaults import default_keep
from sparsifiner_edge.sparse.student import Student

POWER = 1.5
"""Power by which merges fall where the first layers are sparse."""
DENSE_POWER = 1.0
"""Power by which merges fall where all layers are dense, as for small images."""
FIRST_SCALE = 0.16
"""Share of the patches that the first of twelve layers merges at first; deeper models merge less per layer.

It costs about .02 of the cosine of a DINOv2 at 518 pixels.
"""
DENSE_FIRST_SCALE = 0.085
"""The same for small images, at 224 pixels."""
DEPTH = 12
"""Number of layers to which these shares belong."""
MOST_SCALE = 0.6
"""Maximum scale: layers beyond a quarter of their patches are cut there."""
LEAST_RATE = 0.002
"""Share of the patches below which merging costs a layer more than it saves."""
TYPICAL_RATE = 0.14
"""Share of the patches that the first of twelve layers merges in the plan from which others are derived."""
TYPICAL_POWER = 2.0
"""Power of that plan."""
TYPICAL_SHARE = 0.25
"""Share of the keys that layers read in that plan where the family has dense attention."""
NEXT_SHARE = 0.35
"""Share of the keys that is tried in the first layer with dense attention."""


def falling(rate: float, power: float, depth: int) -> tuple[float, ...]:
    """Return the shares of the patches that merge in each layer.

    Args:
        rate: Share in the first layer of a model of twelve layers; deeper models merge less per layer.
        power: Power by which the shares fall from layer to layer.
        depth: Number of layers.
    """
    return tuple(rate * DEPTH / depth * (1 - layer / max(1, depth - 1)) ** power for layer in range(depth))


def allowed(rates: Sequence[float], patches: int, least: int = 0) -> tuple[int, ...]:
    """Round merges by layer, within what a layer may merge and must leave.

    Args:
        rates: Merges by layer.
        patches: Number of patches of the image.
        least: Minimum of merges of each layer.
    """
    merge, remaining = list[int](), patches
    for layer, rate in enumerate(rates):
        spare = remaining - LEAST_PATCHES - least * (len(rates) - 1 - layer)
        merge.append(max(least, min(round(rate), remaining // PATCHES_PER_MERGE, spare)))
        remaining -= merge[-1]
    return tuple(merge)


def first_shares(student: Student) -> tuple[float, ...]:
    """Return the shares of keys of the family: those that `sparsify` takes by default at this size."""
    backbone = student.backbone
    default = default_keep(backbone.patches, len(backbone.layers))
    shares = default if isinstance(default, tuple) else (default,)
    by_layer = [shares[min(layer, len(shares) - 1)] for layer in range(len(backbone.layers))]
    return tuple(share if usable else 1.0 for share, usable in zip(by_layer, sparse_layers(student), strict=True))


def sparse_layers(student: Student) -> list[bool]:
    """Return by layer whether a plan may read less than all keys.

    Later layers see so few tokens after merging that dense attention is cheap.
    """
    attentions = student.backbone.attentions
    return [
        isinstance(attention, SparseAttention) and 2 * layer < len(attentions)
        for layer, attention in enumerate(attentions)
    ]


def everything(student: Student) -> LayerPlan:
    """Return a typical plan in which all layers merge and all that may be are sparse, to derive others from."""
    backbone = student.backbone
    rates = falling(TYPICAL_RATE * backbone.patches, TYPICAL_POWER, len(backbone.layers))
    shares = [
        min(share, TYPICAL_SHARE) if usable else 1.0
        for share, usable in zip(first_shares(student), sparse_layers(student), strict=True)
    ]
    return LayerPlan(allowed(rates, backbone.patches, least=1), tuple(shares))


class Shape(NamedTuple):
    """Plans that differ only in how much they merge.

    Attributes:
        profile: Merges by layer relative to the largest.
        keep: Shares of keys by layer.
    """

    profile: tuple[float, ...]
    keep: tuple[float, ...]

    def plan(self, scale: float, patches: int) -> LayerPlan:
        """Return the plan whose largest layer merges the share `scale` of the patches."""
        merge = allowed([scale * part * patches for part in self.profile], patches)
        least = max(1, round(LEAST_RATE * patches))
        return LayerPlan(tuple(rate if rate >= least else 0 for rate in merge), self.keep)

    def clip(self, scale: float, patches: int) -> float:
        """Return the nearest scale that changes the plan: a layer merges a quarter of its patches at most."""
        return min(max(scale, 1 / patches), MOST_SCALE)

    @property
    def rounded(self) -> Shape:
        """The shape with a rounded profile, to compare shapes."""
        return self._replace(profile=tuple(round(part, 4) for part in self.profile))

    def powered(self, exponent: float) -> Shape:
        """Return the shape with merges that fall faster (above 0) or slower from layer to layer."""
        depth = len(self.profile)
        return self.normalised([part * (1 - layer / depth) ** exponent for layer, part in enumerate(self.profile)])

    def normalised(self, profile: Sequence[float]) -> Shape:
        """Return the shape with another profile, scaled so that about as many patches merge as before."""
        ratio = sum(self.profile) / max(sum(profile), 1e-9)
        return self._replace(profile=tuple(part * ratio for part in profile))

    def neighbours(self, usable: Sequence[bool]) -> list[Shape]:
        """Return shapes whose merges fall faster or slower, and shapes with other shares of keys.

        Args:
            usable: By layer, whether it may be sparse.
        """
        depth = len(self.keep)
        typical = tuple(TYPICAL_SHARE if may and 4 * layer < depth else 1.0 for layer, may in enumerate(usable))
        shares = [(1.0,) * depth, typical]
        dense = [layer for layer, may in enumerate(usable) if may and self.keep[layer] == 1]
        if dense and min(self.keep) < 1:
            shares.append((*self.keep[: dense[0]], NEXT_SHARE, *self.keep[dense[0] + 1 :]))
        others = [self._replace(keep=each) for each in shares if each != self.keep]
        return [*(self.powered(exponent) for exponent in (-0.5, 0.5, -1.0)), *others]


def family(student: Student) -> tuple[Shape, float]:
    """Return the shape that a search starts from, and its scale."""
    depth, shares = len(student.backbone.layers), first_shares(student)
    sparse = min(shares) < 1
    rates = falling(FIRST_SCALE if sparse else DENSE_FIRST_SCALE, POWER if sparse else DENSE_POWER, depth)
    return Shape(tuple(rate / rates[0] for rate in rates), shares), rates[0]
