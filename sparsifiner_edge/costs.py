"""Multiply-accumulates (MACs) and bytes per layer and kind, from a model's shape and `SparsityConfig` alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, NamedTuple, TypeAlias

from msgspec import Meta

from sparsifiner_edge.config import LANDMARK_FACTOR, TOP_COEFFICIENTS, Layout, SparsityConfig
from sparsifiner_edge.plan import plan_of

FLOAT = 4
"""Bytes of a float32 element; half of it for fp16, a quarter for int8."""
_Size = Annotated[int, Meta(ge=1, le=1 << 20)]
"""Size of a model, as read from a file. No real model reaches the limit."""


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that decide its cost.

    Attributes:
        depth: Number of layers.
        heads: H, number of heads.
        width: C, channels of a token.
        hidden: Channels of the MLP's hidden layer.
        prefix: Number of tokens that are not patches.
        patches: P, number of patch tokens.
        patch: Side of a patch in pixels.
    """

    depth: Annotated[int, Meta(ge=1, le=1024)]
    heads: _Size
    width: _Size
    hidden: _Size
    prefix: Annotated[int, Meta(ge=0, le=1 << 20)]
    patches: _Size
    patch: _Size


class Work(NamedTuple):
    """MACs and bytes of a part of a layer at batch 1.

    Bytes count what is moved at least once in fp32: weights and activations that are read or written by code that keeps
    no score matrix. Keys and values that a tile gathers count each time.
    """

    macs: int = 0
    bytes: int = 0


LayerCosts: TypeAlias = dict[str, Work]
"""Kind -> work of one layer."""
MAC_KINDS = ("projections", "predictor", "attention", "background", "mlp", "pruning")
"""Kinds of work.

- projections: QKV and output projection.
- predictor: selection of keys.
- attention: logits and weighted sums over prefix and listed keys. Attention and predictor together are the "MHSA" of
  published tables.
- background: logits and weighted sums over background tokens.
- mlp: both linear layers, for the remaining tokens.
- pruning: the class token's logits for pruning, or the search for pairs to merge.
"""


def layers(shape: ModelShape, sparsity: SparsityConfig) -> Iterator[tuple[ModelShape, float, int]]:
    """Yield the shape with its number of patches, the share of keys and the remaining patches of each layer."""
    plan = plan_of(sparsity, shape.depth, shape.patches)
    counts = plan.tokens(shape.patches)
    for share, patches, remaining in zip(plan.keep, counts, counts[1:], strict=False):
        yield dataclasses.replace(shape, patches=patches), share, remaining


def layer_costs(shape: ModelShape, sparsity: SparsityConfig) -> list[LayerCosts]:
    """Return the costs of every layer. After pruning or merging, only the remaining tokens count."""
    costs = []
    for here, share, remaining in layers(shape, sparsity):
        ranking = (here.patches + shape.prefix) * shape.width if here.patches != remaining else 0
        if ranking and sparsity.merge:
            ranking += here.patches // 2 * sparsity.merge_window * shape.width // shape.heads
        reads = sparsity.of_share(share) if share < 1 else None
        costs.append(_layer(here, reads, remaining + shape.prefix, ranking))
    return costs


def _layer(shape: ModelShape, sparsity: SparsityConfig | None, remaining: int, ranking: int) -> LayerCosts:
    """Return the costs of a layer.

    Args:
        shape: Shape with the patches that the layer sees.
        sparsity: Settings; None is dense attention.
        remaining: Number of tokens that the MLP sees.
        ranking: MACs of choosing those tokens; 0 if all remain.
    """
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
        "predictor": (_landmarks if sparsity.preset == "paper" else _pooled_queries)(shape, sparsity, layout),
        "attention": Work(2 * width * reads, FLOAT * 2 * width * (tokens + gathered)),
        "background": Work(
            2 * width * patches * layout.background_tokens,
            FLOAT * 2 * width * (patches + layout.background_tokens) if layout.background_tokens else 0,
        ),
    }


def _pooled_queries(shape: ModelShape, sparsity: SparsityConfig, layout: Layout) -> Work:
    """Return the predictor's work.

    Per head: d c for each pooled query and key, c for each pair, and d for each key's deviation.
    """
    patches, width, channels = shape.patches, shape.width, sparsity.channels
    pooled_queries = math.ceil(patches / sparsity.query_pool)
    deviation = width * patches if sparsity.value_power else 0
    lists = shape.heads * layout.tiles * layout.keys
    return Work(
        channels * (width * (pooled_queries + patches) + shape.heads * pooled_queries * patches) + deviation,
        FLOAT * ((3 if deviation else 2) * width * patches + 2 * width * channels + lists),
    )


def _landmarks(shape: ModelShape, sparsity: SparsityConfig, layout: Layout) -> Work:
    """Return the work of channel reduction, landmarks, coefficients and scores in the preset "paper"."""
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
    """Return MACs over all layers by kind (`<kind>_macs`), and their total."""
    layers = layer_costs(shape, sparsity)
    macs = {f"{kind}_macs": sum(costs[kind].macs for costs in layers) for kind in MAC_KINDS}
    macs["embedding_macs"] = shape.patches * 3 * shape.patch * shape.patch * shape.width
    return {**macs, "total_macs": sum(macs.values())}
