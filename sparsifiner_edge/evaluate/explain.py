"""What a query attends to: the keys that a sparse layer selects, beside the dense attention it replaces."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.errors import ConfigError, MissingExtraError
from sparsifiner_edge.images import load_image
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.attention import SparseAttention
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.sparse.weights import normalise


class Explanation(NamedTuple):
    """One query in one layer, as maps over the patch grid [h,w].

    Attributes:
        query: row and column of the query's patch. tile: 1 for the patches that share its key list.
        attention: dense attention of the query, mean of the heads. selected: share of the heads that read a patch.
    """

    query: tuple[int, int]
    tile: Array
    attention: Array
    selected: Array


@torch.no_grad()
def explain(student: Student, image: Array, queries: list[tuple[int, int]], layer: int) -> list[Explanation]:
    """What `queries` attend to in layer `layer` for one image uint8 [H,W,3].

    Raises:
        ConfigError: the layer is not sparse, sees pruned or merged tokens, or is of the preset "paper", whose lists
            belong to queries and not to tiles.
    """
    backbone = student.backbone
    attention = backbone.attentions[layer] if layer < len(backbone.layers) else None
    if not isinstance(attention, SparseAttention):
        raise ConfigError(f"Layer {layer} is not sparse.", "Choose another layer.")
    if student.sparsity.preset == "paper":
        raise ConfigError("Lists of the preset paper belong to no tile.", "Choose a student of another preset.")
    height, width = backbone.grid
    if attention.layout.patches != height * width:
        raise ConfigError(f"Layer {layer} sees pruned or merged tokens.", "Choose an earlier layer.")
    qkv, raster = _qkv(student, attention, image), backbone.layers[0].curve.raster
    q, k, _ = ops.split_heads(qkv, attention.geometry.heads)
    dense = (attention.geometry.scale * q[0] @ k[0].mT).softmax(-1).mean(0)[:, attention.num_prefix :]
    lists = attention.indices(qkv)[0].long()
    tiles = torch.arange(height * width) // attention.sparsity.tile

    def grid(values: Tensor) -> Array:
        return np.asarray(values[raster].reshape(height, width).numpy())

    found = []
    for row, column in queries:
        if not (0 <= row < height and 0 <= column < width):
            raise ConfigError(
                f"Query {(row, column)} lies outside the {height} x {width} grid.", "Choose another patch."
            )
        place = int(raster[row * width + column])
        read = lists[:, tiles[place]].flatten()
        selected = torch.bincount(read, minlength=height * width) / len(lists)
        attended = dense[attention.num_prefix + place]
        found.append(Explanation((row, column), grid((tiles == tiles[place]).float()), grid(attended), grid(selected)))
    return found


def _qkv(student: Student, attention: SparseAttention, image: Array) -> Tensor:
    """What a layer attends with, [1,N,3C]."""
    seen: list[Tensor] = []
    attention.observer = lambda _, qkv, __: seen.append(qkv)
    try:
        student.model(normalise(torch.from_numpy(image)[None], student.normalisation))
    finally:
        del attention.observer
    return seen[0]


def draw(student: Student, path: Path, layer: int, output: Path) -> None:
    """An image of what three queries attend to: photograph, dense attention, selected keys.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "demo") from error
    image = load_image(path, student.img_size)
    rows, columns = student.backbone.grid
    height, width = height_width(student.img_size)
    down, across = height // rows, width // columns
    queries = [(rows // 4, columns // 3), (rows // 2, columns // 2), (3 * rows // 4, 2 * columns // 3)]
    longer = max(height, width)
    figure = Figure(figsize=(10 * width / longer, 10 * height / longer + 0.6), layout="constrained")
    axes = figure.subplots(3, 3)
    titles = ("query (cross) and its tile", "dense attention, mean of heads", "keys read, share of heads")
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=10)
    for row, found in zip(axes, explain(student, image, queries, layer), strict=True):
        maps = ((found.tile, "Blues"), (found.attention**0.5, "magma"), (found.selected, "magma"))
        for axis, (values, colours) in zip(row, maps, strict=True):
            axis.imshow(image)
            axis.imshow(values, cmap=colours, alpha=0.65, extent=(0, width, height, 0))
            axis.plot((found.query[1] + 0.5) * across, (found.query[0] + 0.5) * down, "c+", markersize=12, mew=2)
            axis.set_axis_off()
    keys = student.sparsity.of_layer(layer, len(student.backbone.layers)).layout(rows * columns).keys
    figure.suptitle(f"{path.stem}, layer {layer}: each tile reads {keys} of {rows * columns} patch keys per head")
    figure.savefig(output, dpi=80)
