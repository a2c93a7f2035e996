"""Settings of each layer. All packages read a `SparsityConfig` in this form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparsifiner_edge.config import Budget, Pairs, Share, SparsityConfig, require, share_of

PATCHES_PER_MERGE = 4
"""A layer may merge at most one in this many of the patches that it sees."""
LEAST_PATCHES = 16
"""Minimum number of patches that must remain after every layer if patches merge."""


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Settings by layer.

    Attributes:
        merge: Number of patch token pairs that merge.
        keep: Share of the keys that are read; 1 is dense.
        token_keep: Share of the patch tokens that are not pruned; empty if nothing is pruned.
    """

    merge: tuple[Pairs, ...]
    keep: tuple[Share, ...]
    token_keep: tuple[Share, ...] = ()

    @classmethod
    def dense(cls, depth: int) -> LayerPlan:
        """Return the plan of the dense model."""
        return cls((0,) * depth, (1.0,) * depth)

    @property
    def is_dense(self) -> bool:
        """True if nothing merges or is pruned and all keys are read."""
        return not any(self.merge) and not self.token_keep and all(share == 1 for share in self.keep)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the layers that read less than all keys."""
        return tuple(layer for layer, share in enumerate(self.keep) if share < 1)

    @property
    def short_keep(self) -> tuple[float, ...]:
        """Shares without repetitions at the end."""
        return shortest(self.keep)

    def tokens(self, patches: int) -> list[int]:
        """Return the number of patch tokens that each layer's attention sees.

        The last entry is the number after the last layer.
        """
        counts = [patches]
        for rate, share in zip(self.merge, self.token_keep or (1.0,) * len(self.merge), strict=True):
            counts.append(share_of(share, counts[-1]) - rate)
        return counts

    @property
    def budget(self) -> Budget:
        """Budget that gives a sparse model this plan."""
        return Budget(keep=self.short_keep, merge=self.merge)

    def config(self, base: SparsityConfig) -> SparsityConfig:
        """Return settings with the merges and shares of this plan."""
        return dataclasses.replace(base, merge=self.merge, keep=self.short_keep)


def shortest(keep: Sequence[float]) -> tuple[float, ...]:
    """Return shares without repetitions at the end: the last share applies to all remaining layers."""
    end = len(keep)
    while end > 1 and keep[end - 1] == keep[end - 2]:
        end -= 1
    return tuple(keep[:end])


def plan_of(sparsity: SparsityConfig, depth: int, patches: int) -> LayerPlan:
    """Return the plan of a config for a model of `depth` layers.

    A layer merges its rate, but at most a quarter of the patches that it sees.

    Raises:
        ConfigError: There are more shares than layers, the number of merge rates does not fit, a layer does not exist,
            or a layer would leave fewer than `LEAST_PATCHES` patches.
    """
    shares = dict(sparsity.token_keep)
    last = max(shares, default=0)
    what = f"tokens are pruned at layer {last}: the model has {depth} layers."
    require(last < depth, what, f"Give indices from 0 to {depth - 1}.")
    merge, remaining = [], patches
    for layer, rate in enumerate(_rates(sparsity.merge, depth)):
        merge.append(min(rate, remaining // PATCHES_PER_MERGE))
        remaining -= merge[-1]
        require(
            remaining >= LEAST_PATCHES or not sparsity.merge,
            f"merging {rate} tokens in layer {layer} leaves {remaining} patches; a layer merges a quarter at most.",
            f"Merge less, so that {LEAST_PATCHES} are left, or choose a larger image.",
        )
    pruned = tuple(shares.get(layer, 1.0) for layer in range(depth)) if shares else ()
    return LayerPlan(tuple(merge), _shares(sparsity, depth), pruned)


def _shares(sparsity: SparsityConfig, depth: int) -> tuple[float, ...]:
    shares = sparsity.keep if isinstance(sparsity.keep, tuple) else (sparsity.keep,)
    require(
        len(shares) <= depth,
        f"keep has {len(shares)} shares: the model has {depth} layers.",
        f"Give {depth} at most; the last share applies to all remaining layers.",
    )
    return tuple(float(shares[min(layer, len(shares) - 1)]) for layer in range(depth))


def _rates(merge: tuple[int, ...], depth: int) -> list[int]:
    """Return the number of pairs that each layer merges."""
    if len(merge) == 2:
        first, last = merge
        return [round(first + (last - first) * layer / max(depth - 1, 1)) for layer in range(depth)]
    require(
        len(merge) in (0, 1, depth),
        f"merge has {len(merge)} rates: the model has {depth} layers.",
        f"Give one rate, the first and the last as 160..0, or {depth}.",
    )
    return list(merge) if len(merge) == depth else [merge[0] if merge else 0] * depth


def falling(rate: float, patches: int, depth: int) -> LayerPlan:
    """Return a plan that merges `rate` patches in the first layer, linearly fewer later, and none in the last."""
    return plan_of(SparsityConfig(keep=1.0, merge=(max(1, round(rate)), 0)), depth, patches)
