"""What each layer of a model does with its tokens: the one form in which every room reads a `SparsityConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparsifiner_edge.config import Budget, Pairs, Share, SparsityConfig, require, share_of

PATCHES_PER_MERGE, LEAST_PATCHES = 4, 16
"""One patch in this many may merge in a layer, and this many must remain after the last."""


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Settings by layer.

    Attributes:
        merge: pairs of patch tokens that become one. keep: shares of the keys that are read; 1 is dense.
        token_keep: shares of the patch tokens that are not pruned; empty: nothing is.
    """

    merge: tuple[Pairs, ...]
    keep: tuple[Share, ...]
    token_keep: tuple[Share, ...] = ()

    @classmethod
    def dense(cls, depth: int) -> LayerPlan:
        """The model as it is."""
        return cls((0,) * depth, (1.0,) * depth)

    @property
    def is_dense(self) -> bool:
        """Nothing merges or is pruned, and all keys are read."""
        return not any(self.merge) and not self.token_keep and all(share == 1 for share in self.keep)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the layers that read less than all keys."""
        return tuple(layer for layer, share in enumerate(self.keep) if share < 1)

    @property
    def short_keep(self) -> tuple[float, ...]:
        """Shares without the last ones that are the same."""
        return shortest(self.keep)

    def tokens(self, patches: int) -> list[int]:
        """Of an image's patches, how many tokens each layer's attention sees, and as the last entry how many leave the
        last layer.
        """
        counts = [patches]
        for rate, share in zip(self.merge, self.token_keep or (1.0,) * len(self.merge), strict=True):
            counts.append(share_of(share, counts[-1]) - rate)
        return counts

    @property
    def budget(self) -> Budget:
        """A student's that merges and reads by this plan."""
        return Budget(keep=self.short_keep, merge=self.merge)

    def config(self, base: SparsityConfig) -> SparsityConfig:
        """A student's config that merges and reads by this plan."""
        return dataclasses.replace(base, merge=self.merge, keep=self.short_keep)


def shortest(keep: Sequence[float]) -> tuple[float, ...]:
    """Shares without the last ones that are the same: the last one goes on."""
    end = len(keep)
    while end > 1 and keep[end - 1] == keep[end - 2]:
        end -= 1
    return tuple(keep[:end])


def plan_of(sparsity: SparsityConfig, depth: int, patches: int) -> LayerPlan:
    """What a config means for a model of `depth` layers: a layer merges what its rate says, but at most a
    quarter of the patches that it sees.

    Raises:
        ConfigError: it gives more shares than there are layers, or other rates, or names a layer that does not exist;
            or a layer would leave fewer than `LEAST_PATCHES`.
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
        f"Give {depth} at most; the last goes on to the layers that are left.",
    )
    return tuple(float(shares[min(layer, len(shares) - 1)]) for layer in range(depth))


def _rates(merge: tuple[int, ...], depth: int) -> list[int]:
    """Pairs that each layer merges, of one rate, of the first and the last, or of each layer's."""
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
    """Merging `rate` patches in the first layer, evenly fewer in each one after it, none in the last."""
    return plan_of(SparsityConfig(keep=1.0, merge=(max(1, round(rate)), 0)), depth, patches)
