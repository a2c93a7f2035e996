"""Multiply-accumulates (MACs) and bytes of a model per layer and kind, from its shape and SparsityConfig alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated

from msgspec import Meta

from sparsifiner_edge.config import Layout, SparsityConfig
from sparsifiner_edge.plan import plan_of

FLOAT = 4
"""Bytes of an element; half or quarter them for fp16 or int8."""
_Size = Annotated[int, Meta(ge=1, le=1 << 20)]
"""No size of a model comes near; checked where a file says it."""


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes that decide costs.

    Attributes:
        depth: layers. heads: H. width: C. hidden: width of the MLP.
        prefix: tokens that are no patches. patches: P. patch: side of a patch in pixels.
    """

    depth: Annotated[int, Meta(ge=1, le=1024)]
    heads: _Size
    width: _Size
    hidden: _Size
    prefix: Annotated[int, Meta(ge=0, le=1 << 20)]
    patches: _Size
    patch: _Size


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """MACs of one layer at batch 1, and the bytes that each part moves at least once in fp32.

    Attributes:
        projections: qkv and output projection. predictor: the choice of keys. attention: logits and weighted sums over
            prefix and listed keys (the "MHSA" of published tables is this and the predictor). cells: the same over
            background cells. mlp: both linear layers, for the tokens that are left. pruning: the class token's logits
            once more, where tokens are pruned by them.
        projections_bytes, predictor_bytes, attention_bytes, cells_bytes, mlp_bytes, pruning_bytes: weights and
            activations read or written by code that keeps no score matrix; keys and values that a tile gathers count
            each time.
    """

    projections: int
    predictor: int
    attention: int
    cells: int
    mlp: int
    pruning: int
    projections_bytes: int
    predictor_bytes: int
    attention_bytes: int
    cells_bytes: int
    mlp_bytes: int
    pruning_bytes: int


MAC_KINDS = ("projections", "predictor", "attention", "cells", "mlp", "pruning")


def layers(shape: ModelShape, sparsity: SparsityConfig) -> Iterator[tuple[ModelShape, float, int]]:
    """Each layer: the shape with the patches that it sees, its share of keys, and the patches that it leaves."""
    plan = plan_of(sparsity, shape.depth, shape.patches)
    counts = plan.tokens(shape.patches)
    for share, patches, left in zip(plan.keep, counts, counts[1:], strict=False):
        yield dataclasses.replace(shape, patches=patches), share, left


def layer_costs(shape: ModelShape, sparsity: SparsityConfig) -> list[LayerCosts]:
    """Costs of every layer, first to last; after each place where tokens are pruned or merged, of those that are
    left.
    """
    costs = []
    for here, share, left in layers(shape, sparsity):
        ranking = (here.patches + shape.prefix) * shape.width if here.patches != left else 0
        if ranking and sparsity.merge:
            ranking += here.patches // 2 * sparsity.merge_window * shape.width // shape.heads
        reads = sparsity.of_share(share) if share < 1 else None
        costs.append(_layer(here, reads, left + shape.prefix, ranking))
    return costs


def _layer(shape: ModelShape, sparsity: SparsityConfig | None, left: int, ranking: int) -> LayerCosts:
    """`left`: tokens that the MLP sees; `ranking`: MACs that find those, where it is fewer."""
    tokens, width = shape.prefix + shape.patches, shape.width
    fixed = {
        "projections": 4 * tokens * width * width,
        "projections_bytes": FLOAT * (4 * width * width + 6 * tokens * width),
        "mlp": 2 * left * width * shape.hidden,
        "mlp_bytes": FLOAT * (2 * width * shape.hidden + 2 * left * (width + shape.hidden)),
        "pruning": ranking,
        "pruning_bytes": FLOAT * tokens * width if ranking else 0,
    }
    if sparsity is None:
        dense = {"attention": 2 * tokens * tokens * width, "attention_bytes": FLOAT * 4 * tokens * width}
        return LayerCosts(**fixed, **dense, predictor=0, predictor_bytes=0, cells=0, cells_bytes=0)
    layout = sparsity.layout(shape.patches, shape.prefix)
    predictor = _landmarks if sparsity.preset == "paper" else _probes
    return LayerCosts(**fixed, **predictor(shape, sparsity), **_attention(shape, sparsity, layout))


def _attention(shape: ModelShape, sparsity: SparsityConfig, layout: Layout) -> dict[str, int]:
    tokens, width, patches = shape.prefix + shape.patches, shape.width, shape.patches
    read = layout.keys if sparsity.preset == "paper" else layout.keys + shape.prefix
    gathered = shape.prefix * tokens + layout.tiles * read
    return {
        "attention": 2 * width * (shape.prefix * tokens + patches * read),
        "attention_bytes": FLOAT * 2 * width * (tokens + gathered),
        "cells": 2 * width * patches * layout.cells,
        "cells_bytes": FLOAT * 2 * width * (patches + layout.cells) if layout.cells else 0,
    }


def _probes(shape: ModelShape, sparsity: SparsityConfig) -> dict[str, int]:
    """Per head d c for each probe and key, then c for each pair; the value deviation is d for each key."""
    patches, width, channels = shape.patches, shape.width, sparsity.channels
    probes = math.ceil(patches / sparsity.probe)
    layout = sparsity.layout(patches, shape.prefix)
    deviation = width * patches if sparsity.value_power else 0
    lists = shape.heads * layout.tiles * layout.keys
    return {
        "predictor": channels * (width * (probes + patches) + shape.heads * probes * patches) + deviation,
        "predictor_bytes": FLOAT * ((3 if deviation else 2) * width * patches + 2 * width * channels + lists),
    }


def _landmarks(shape: ModelShape, sparsity: SparsityConfig) -> dict[str, int]:
    """Channel reduction of q and k, keys to landmarks, coefficients, and scores from the coefficients that are kept."""
    tokens, width, channels = shape.prefix + shape.patches, shape.width, sparsity.channels
    landmarks = tokens // sparsity.landmark_factor
    per_head = tokens * landmarks * channels + shape.patches * landmarks * channels
    per_head += shape.patches * tokens * min(sparsity.top_coefficients, landmarks)
    lists = shape.heads * shape.patches * sparsity.layout(shape.patches, shape.prefix).keys
    return {
        "predictor": 2 * tokens * width * channels + shape.heads * per_head,
        "predictor_bytes": FLOAT * (2 * width * tokens + 2 * landmarks * tokens + lists),
    }


def summary(shape: ModelShape, sparsity: SparsityConfig) -> dict[str, int]:
    """Totals per kind over all layers, as a manifest holds them: `<kind>_macs`, `<kind>_bytes`, totals."""
    layers = layer_costs(shape, sparsity)
    macs = {f"{kind}_macs": sum(getattr(c, kind) for c in layers) for kind in MAC_KINDS}
    macs["embedding_macs"] = shape.patches * 3 * shape.patch * shape.patch * shape.width
    moved = {f"{kind}_bytes": sum(getattr(c, f"{kind}_bytes") for c in layers) for kind in MAC_KINDS}
    return {**macs, "total_macs": sum(macs.values()), **moved, "total_bytes": sum(moved.values())}
