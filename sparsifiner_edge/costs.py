"""Multiply-accumulates (MACs) and bytes of a model per layer and kind, from its shape and SparsityConfig alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, NamedTuple, TypeAlias

from msgspec import Meta

from sparsifiner_edge.config import LANDMARK_FACTOR, TOP_COEFFICIENTS, Layout, SparsityConfig
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


class Work(NamedTuple):
    """MACs of a part of a layer at batch 1, and the bytes that it moves at least once in fp32: weights and activations
    read or written by code that keeps no score matrix; keys and values that a tile gathers count each time.
    """

    macs: int = 0
    bytes: int = 0


LayerCosts: TypeAlias = dict[str, Work]
"""Of one layer, by kind."""
MAC_KINDS = ("projections", "predictor", "attention", "cells", "mlp", "pruning")
"""qkv and output projection; the choice of keys; logits and weighted sums over prefix and listed keys (the "MHSA" of
published tables is this and the predictor); the same over background cells; both linear layers, for the tokens that are
left; the class token's logits once more, where tokens are pruned by them; or, where tokens merge, what finds the pairs.
"""


def layers(shape: ModelShape, sparsity: SparsityConfig) -> Iterator[tuple[ModelShape, float, int]]:
    """Each layer: the shape with the patches that it sees, its share of keys, and the patches that it leaves."""
    plan = plan_of(sparsity, shape.depth, shape.patches)
    counts = plan.tokens(shape.patches)
    for share, patches, remaining in zip(plan.keep, counts, counts[1:], strict=False):
        yield dataclasses.replace(shape, patches=patches), share, remaining


def layer_costs(shape: ModelShape, sparsity: SparsityConfig) -> list[LayerCosts]:
    """Costs of every layer, first to last; after each place where tokens are pruned or merged, of those that are
    left.
    """
    costs = []
    for here, share, remaining in layers(shape, sparsity):
        ranking = (here.patches + shape.prefix) * shape.width if here.patches != remaining else 0
        if ranking and sparsity.merge:
            ranking += here.patches // 2 * sparsity.merge_window * shape.width // shape.heads
        reads = sparsity.of_share(share) if share < 1 else None
        costs.append(_layer(here, reads, remaining + shape.prefix, ranking))
    return costs


def _layer(shape: ModelShape, sparsity: SparsityConfig | None, remaining: int, ranking: int) -> LayerCosts:
    """`remaining`: tokens that the MLP sees; `ranking`: MACs that find those, where it is fewer."""
    tokens, width, hidden = shape.prefix + shape.patches, shape.width, shape.hidden
    costs = dict.fromkeys(MAC_KINDS, Work()) | {
        "projections": Work(4 * tokens * width * width, FLOAT * (4 * width * width + 6 * tokens * width)),
        "mlp": Work(2 * remaining * width * hidden, FLOAT * (2 * width * hidden + 2 * remaining * (width + hidden))),
        "pruning": Work(ranking, FLOAT * tokens * width if ranking else 0),
    }
    if sparsity is None:
        return costs | {"attention": Work(2 * tokens * tokens * width, FLOAT * 4 * tokens * width)}
    patches, layout = shape.patches, sparsity.layout(shape.patches, shape.prefix)
    read = layout.keys if sparsity.preset == "paper" else layout.keys + shape.prefix
    reads, gathered = (shape.prefix * tokens + queries * read for queries in (patches, layout.tiles))
    return costs | {
        "predictor": (_landmarks if sparsity.preset == "paper" else _probes)(shape, sparsity, layout),
        "attention": Work(2 * width * reads, FLOAT * 2 * width * (tokens + gathered)),
        "cells": Work(
            2 * width * patches * layout.cells, FLOAT * 2 * width * (patches + layout.cells) if layout.cells else 0
        ),
    }


def _probes(shape: ModelShape, sparsity: SparsityConfig, layout: Layout) -> Work:
    """Per head d c for each probe and key, then c for each pair; the value deviation is d for each key."""
    patches, width, channels = shape.patches, shape.width, sparsity.channels
    probes = math.ceil(patches / sparsity.probe)
    deviation = width * patches if sparsity.value_power else 0
    lists = shape.heads * layout.tiles * layout.keys
    return Work(
        channels * (width * (probes + patches) + shape.heads * probes * patches) + deviation,
        FLOAT * ((3 if deviation else 2) * width * patches + 2 * width * channels + lists),
    )


def _landmarks(shape: ModelShape, sparsity: SparsityConfig, layout: Layout) -> Work:
    """Channel reduction of q and k, keys to landmarks, coefficients, and scores from the coefficients that are kept."""
    tokens, width, channels = shape.prefix + shape.patches, shape.width, sparsity.channels
    landmarks = tokens // LANDMARK_FACTOR
    per_head = tokens * landmarks * channels + shape.patches * landmarks * channels
    per_head += shape.patches * tokens * min(TOP_COEFFICIENTS, landmarks)
    lists = shape.heads * shape.patches * layout.keys
    return Work(
        2 * tokens * width * channels + shape.heads * per_head,
        FLOAT * (2 * width * tokens + 2 * landmarks * tokens + lists),
    )


def summary(shape: ModelShape, sparsity: SparsityConfig) -> dict[str, int]:
    """MACs per kind over all layers, `<kind>_macs`, and their total."""
    layers = layer_costs(shape, sparsity)
    macs = {f"{kind}_macs": sum(costs[kind].macs for costs in layers) for kind in MAC_KINDS}
    macs["embedding_macs"] = shape.patches * 3 * shape.patch * shape.patch * shape.width
    return {**macs, "total_macs": sum(macs.values())}
