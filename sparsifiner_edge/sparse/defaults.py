"""What `sparsify` takes where a setting is left open: the figures behind it are in docs/selection.md."""

from __future__ import annotations

import dataclasses
import math

from sparsifiner_edge.config import Keep, SparsityConfig
from sparsifiner_edge.sparse.hosts import Backbone

MOST_CELLS = 49
_BY_LAYER: tuple[tuple[int, tuple[float, ...]], ...] = (
    (3000, (0.05, 0.05, 0.1, 0.35, 0.35, 0.35, 1.0)),
    (600, (0.1, 0.1, 0.2, 1.0)),
    (0, (1.0,)),
)
"""From so many patches on: shares of keys of the twelfths of the layers, where tokens merge."""


def default_cells(patches: int) -> int:
    """Background cells that suit `patches` patches: 1.5 times their square root, at most `MOST_CELLS`."""
    return min(MOST_CELLS, patches, max(1, round(1.5 * math.sqrt(patches))))


def default_keep(patches: int, depth: int) -> Keep:
    """Shares of keys that suit a model of `depth` layers whose tokens merge.

    The first layers see the most tokens and need the fewest keys; the last ones see so few that plain attention is
    cheap. Measured on models of 12 layers: others take the shares of the same part of their depth.
    """
    shares = next(shares for least, shares in _BY_LAYER if patches >= least)
    by_layer = [shares[min(layer * 12 // depth, len(shares) - 1)] for layer in range(depth)]
    while len(by_layer) > 1 and by_layer[-1] == by_layer[-2]:
        by_layer.pop()  # the last goes on
    return tuple(by_layer) if len(by_layer) > 1 else by_layer[0]


def fit_to_model(
    sparsity: SparsityConfig,
    backbone: Backbone,
    keep: Keep | None,
    channels: int | None,
    cells: int | None,
) -> SparsityConfig:
    """The config with what suits the model where these are None: the paper's channels; other presets' cells, and shares
    of keys where tokens merge.
    """
    if sparsity.preset == "paper":
        return dataclasses.replace(sparsity, channels=channels or backbone.geometry.dim // 2)
    if cells is None:
        sparsity = dataclasses.replace(sparsity, cells=default_cells(backbone.patches))
    if keep is None and any(sparsity.merge):
        sparsity = dataclasses.replace(sparsity, keep=default_keep(backbone.patches, len(backbone.layers)))
    return sparsity
