"""What may be asked of `sparsify`, and what it takes where a setting is left open: the figures behind that are in
docs/selection.md.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypedDict

from sparsifiner_edge.config import Keep, SparsityConfig
from sparsifiner_edge.plan import shortest
from sparsifiner_edge.sparse.hosts import Backbone

DEFAULT_CELLS = 49
_BY_LAYER: tuple[tuple[int, tuple[float, ...]], ...] = (
    (3000, (0.05, 0.05, 0.1, 0.35, 0.35, 0.35, 1.0)),
    (600, (0.1, 0.1, 0.2, 1.0)),
    (0, (1.0,)),
)
"""From this many patches on: shares of keys of the twelfths of the layers, where tokens merge."""


class SparsityOptions(TypedDict, total=False):
    """Settings of `sparsify` and `sparsify_model`: fields of `SparsityConfig`, which says what they mean. What is left
    out, or None, is the preset's own or suits the model (`fit_to_model`). `merge` may be one number.
    """

    preset: str
    keep: Keep | None
    tile: int | None
    probe: int | None
    channels: int | None
    cells: int | None
    token_keep: tuple[tuple[int, float], ...]
    merge: int | tuple[int, ...]
    merge_window: int | None


def fit_to_model(sparsity: SparsityConfig, backbone: Backbone, options: SparsityOptions) -> SparsityConfig:
    """The config with what suits the model where that was left open: of the preset paper, channels of half the heads'
    dimension; of others the cells, and shares of keys where tokens merge.
    """
    fitting: dict[str, Any] = {}
    if sparsity.preset == "paper":
        fitting["channels"] = backbone.geometry.dim // 2
    else:
        fitting["cells"] = default_cells(backbone.patches)
        if any(sparsity.merge):
            fitting["keep"] = default_keep(backbone.patches, len(backbone.layers))
    return dataclasses.replace(sparsity, **{name: x for name, x in fitting.items() if options.get(name) is None})


def default_cells(patches: int) -> int:
    """Background cells that suit `patches` patches: 1.5 times their square root, at most `DEFAULT_CELLS`."""
    return min(DEFAULT_CELLS, patches, max(1, round(1.5 * math.sqrt(patches))))


def default_keep(patches: int, depth: int) -> Keep:
    """Shares of keys that suit a model of `depth` layers whose tokens merge.

    The first layers see the most tokens and need the fewest keys; the last ones see so few that plain attention is
    cheap. Measured on models of 12 layers: others take the shares of the same part of their depth.
    """
    shares = next(shares for least, shares in _BY_LAYER if patches >= least)
    by_layer = shortest([shares[min(layer * 12 // depth, len(shares) - 1)] for layer in range(depth)])
    return by_layer if len(by_layer) > 1 else by_layer[0]
