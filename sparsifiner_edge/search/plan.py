"""What is searched over: per layer the pairs that merge, and the share of keys that is read."""

from __future__ import annotations

import dataclasses

from sparsifiner_edge.config import LARGEST_MERGE, LEAST_PATCHES, SparsityConfig

SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
"""Of the keys; 1 is dense."""
TOKEN_STEPS = 96
"""Numbers of tokens that a plan can have, spaced evenly up to those of the image."""


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Settings by layer.

    Attributes:
        merge: pairs that become one token. keep: shares of keys; 1 is dense.
    """

    merge: tuple[int, ...]
    keep: tuple[float, ...]

    def config(self, base: SparsityConfig) -> SparsityConfig:
        """The student's config with these settings."""
        return dataclasses.replace(base, merge=self.merge, keep=self.short_keep, dense_layers=())

    @property
    def short_keep(self) -> tuple[float, ...]:
        """Shares without the last ones that are the same."""
        keep = list(self.keep)
        while len(keep) > 1 and keep[-1] == keep[-2]:
            keep.pop()
        return tuple(keep)

    @property
    def is_dense(self) -> bool:
        """Nothing merges, and all keys are read."""
        return not any(self.merge) and all(share == 1 for share in self.keep)

    @property
    def first_change(self) -> int:
        """The first layer that merges or reads less than all keys; their number where none does."""
        changes = (bool(rate) or share < 1 for rate, share in zip(self.merge, self.keep, strict=True))
        return next((layer for layer, changed in enumerate(changes) if changed), len(self.merge))

    def counts(self, patches: int) -> list[int]:
        """Patch tokens that each layer's attention sees, and as the last entry those after the last layer."""
        left = [patches]
        for rate in self.merge:
            left.append(left[-1] - rate)
        return left


def dense(depth: int) -> LayerPlan:
    """The model as it is."""
    return LayerPlan((0,) * depth, (1.0,) * depth)


def uniform(rate: int, share: float, depth: int, patches: int) -> LayerPlan:
    """One rate and one share for all layers: what someone sets by hand."""
    merge, left = [], patches
    for _ in range(depth):
        merge.append(min(rate, left // LARGEST_MERGE))
        left -= merge[-1]
    return LayerPlan(tuple(merge), (share,) * depth)


def possible_counts(patches: int, tile: int) -> list[int]:
    """Numbers of patch tokens that a plan may come by, most first: the image's, and every so many fewer."""
    step = max(1, round(patches / TOKEN_STEPS))
    return list(range(patches, max(LEAST_PATCHES, tile) - 1, -step))
