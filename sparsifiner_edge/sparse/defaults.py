"""Settings of `sparsify` and their defaults; docs/how.md has the measurements behind the defaults."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypedDict

from sparsifiner_edge.config import Keep, SparsityConfig
from sparsifiner_edge.plan import shortest
from sparsifiner_edge.sparse.hosts import Backbone

DEFAULT_BACKGROUND_TOKENS = 49
"""Most background tokens that are chosen by default."""
_BY_LAYER: tuple[tuple[int, tuple[float, ...]], ...] = (
    (3000, (0.05, 0.05, 0.1, 0.35, 0.35, 0.35, 1.0)),
    (600, (0.1, 0.1, 0.2, 1.0)),
    (0, (1.0,)),
)
"""Default shares of keys where tokens merge: (least number of patches, one share for each twelfth of the layers)."""


class SparsityOptions(TypedDict, total=False):
    """Settings of `sparsify` and `sparsify_model`.

    The keys are fields of `SparsityConfig`, which documents them. A setting that is missing or None takes the preset's
    value or one that fits the model (`fit_to_model`). `merge` may be a single number.
    """

    preset: str
    keep: Keep | None
    tile: int | None
    query_pool: int | None
    channels: int | None
    background_tokens: int | None
    token_keep: tuple[tuple[int, float], ...]
    merge: int | tuple[int, ...]
    merge_window: int | None


def fit_to_model(sparsity: SparsityConfig, backbone: Backbone, options: SparsityOptions) -> SparsityConfig:
    """Return the config with defaults that fit the model in place of settings that were left open.

    The preset "paper" takes half the head dimension as `channels`. Other presets take a number of background tokens
    and, where tokens merge, shares of keys.
    """
    fitting: dict[str, Any] = {}
    if sparsity.preset == "paper":
        fitting["channels"] = backbone.geometry.dim // 2
    else:
        fitting["background_tokens"] = default_background_tokens(backbone.patches)
        if any(sparsity.merge):
            fitting["keep"] = default_keep(backbone.patches, len(backbone.layers))
    return dataclasses.replace(sparsity, **{name: x for name, x in fitting.items() if options.get(name) is None})


def default_background_tokens(patches: int) -> int:
    """Return 1.5 times the square root of `patches`, at most `DEFAULT_BACKGROUND_TOKENS`."""
    return min(DEFAULT_BACKGROUND_TOKENS, patches, max(1, round(1.5 * math.sqrt(patches))))


def default_keep(patches: int, depth: int) -> Keep:
    """Return the default shares of keys for a model of `depth` layers whose tokens merge.

    The first layers see the most tokens and need the smallest share of keys. The last layers see so few tokens that
    dense attention is cheap. The shares were measured on models of 12 layers; models of another depth use the share at
    the same relative depth.
    """
    shares = next(shares for least, shares in _BY_LAYER if patches >= least)
    by_layer = shortest([shares[min(layer * 12 // depth, len(shares) - 1)] for layer in range(depth)])
    return by_layer if len(by_layer) > 1 else by_layer[0]
