"""Multiply-accumulates (MACs) of a model per layer and kind, from its shape and SparsityConfig alone."""

from __future__ import annotations

import dataclasses
import math

from sparsifiner_edge.config import SparsityConfig


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes that decide costs.

    Attributes:
        depth: layers. heads: H. width: C. hidden: width of the MLP.
        prefix: tokens that are no patches. patches: P. patch: side of a patch in pixels.
    """

    depth: int
    heads: int
    width: int
    hidden: int
    prefix: int
    patches: int
    patch: int


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """MACs of one layer at batch 1.

    Attributes:
        projections: qkv and output projection. predictor: KeySelect. attention: logits and weighted sums over
            prefix and listed keys. cells: the same over background cells. mlp: both linear layers.
    """

    projections: int
    predictor: int
    attention: int
    cells: int
    mlp: int

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return sum(dataclasses.astuple(self))


def layer_costs(shape: ModelShape, sparsity: SparsityConfig) -> list[LayerCosts]:
    """MACs of every layer, first to last."""
    sparse = set(sparsity.sparse_layers(shape.depth))
    return [_layer(shape, sparsity if number in sparse else None) for number in range(shape.depth)]


def _layer(shape: ModelShape, sparsity: SparsityConfig | None) -> LayerCosts:
    tokens, width, patches = shape.prefix + shape.patches, shape.width, shape.patches
    projections, mlp = 4 * tokens * width * width, 2 * tokens * width * shape.hidden
    if sparsity is None:
        return LayerCosts(projections, 0, 2 * tokens * tokens * width, 0, mlp)
    layout = sparsity.layout(patches)
    probes = math.ceil(patches / sparsity.probe)
    # Per head d * c for each probe and key, then c for each pair; the value deviation is d for each key.
    predictor = sparsity.channels * (width * (probes + patches) + shape.heads * probes * patches)
    predictor += width * patches if sparsity.value_power else 0
    attention = 2 * width * (shape.prefix * tokens + patches * (shape.prefix + layout.keys))
    return LayerCosts(projections, predictor, attention, 2 * width * patches * layout.cells, mlp)


def summary(shape: ModelShape, sparsity: SparsityConfig) -> dict[str, int]:
    """MACs per kind over all layers, `embedding` and `total` included, as a manifest holds them."""
    layers = layer_costs(shape, sparsity)
    kinds = {f.name: sum(getattr(c, f.name) for c in layers) for f in dataclasses.fields(LayerCosts)}
    kinds["embedding"] = shape.patches * 3 * shape.patch * shape.patch * shape.width
    return {f"{kind}_macs": count for kind, count in kinds.items()} | {"total_macs": sum(kinds.values())}
