"""What a query attends to: the keys that a sparse layer selects, beside the dense attention it replaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import ConfigError, MissingExtraError
from sparsifiner_edge.images import load_image
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.attention import SparseAttention
from sparsifiner_edge.sparse.models import normalise, preprocessing
from sparsifiner_edge.sparse.student import Student


class Explanation(NamedTuple):
    """One query in one layer, as maps over the patch grid [h,w].

    Attributes:
        query: row and column of the query's patch.
        tile: 1 for the patches that share its key list.
        attention: dense attention of the query, mean of the heads.
        selected: share of the heads that read a patch.
    """

    query: tuple[int, int]
    tile: Array
    attention: Array
    selected: Array


@torch.no_grad()
def explain(student: Student, image: Array, queries: list[tuple[int, int]], layer: int) -> list[Explanation]:
    """What `queries` attend to in layer `layer` for one image uint8 [S,S,3].

    Raises:
        ConfigError: the layer is not sparse or sees pruned tokens, the preset is the paper's, whose lists belong to
            queries and not to tiles, or a query lies outside the grid.
    """
    model = cast(Any, student.model)
    attention = model.blocks[layer].attn if layer < len(model.blocks) else None
    if not isinstance(attention, SparseAttention):
        raise ConfigError(f"Layer {layer} is not sparse.", "Choose another layer.")
    if student.sparsity.preset == "paper":
        raise ConfigError("Lists of the preset paper belong to no tile.", "Choose a student of another preset.")
    height, width = model.patch_embed.grid_size
    if attention.layout.patches != height * width:
        raise ConfigError(f"Layer {layer} sees pruned tokens.", "Choose an earlier layer.")
    seen: list[Tensor] = []

    def attend(qkv: Tensor) -> Tensor:
        seen.append(qkv)
        return type(attention).attend(attention, qkv)

    try:
        attention.attend = attend  # type: ignore[method-assign]
        model(normalise(torch.from_numpy(image)[None], preprocessing(model)))
    finally:
        attention.__dict__.pop("attend", None)
    (qkv,) = seen
    q, k, _ = ops.split_heads(qkv, attention.num_heads)
    weights = (attention.scale * q[0] @ k[0].mT).softmax(-1).mean(0)[:, attention.num_prefix :]
    lists = attention.indices(qkv)[0]
    return [_one(model, attention, weights, lists, query) for query in queries]


def _one(model: Any, attention: SparseAttention, weights: Tensor, lists: Tensor, query: tuple[int, int]) -> Explanation:
    height, width = model.patch_embed.grid_size
    if not (0 <= query[0] < height and 0 <= query[1] < width):
        raise ConfigError(f"Query {query} lies outside the {height} x {width} grid.", "Choose another patch.")
    patches = height * width
    place = int(model.raster_order[query[0] * width + query[1]])
    tile = place // attention.sparsity.tile
    selected = torch.zeros(patches).index_add_(0, lists[:, tile].reshape(-1).long(), torch.ones(lists[:, tile].numel()))
    mates = (torch.arange(patches) // attention.sparsity.tile == tile).float()

    def grid(values: Tensor) -> Array:
        return np.asarray(values[model.raster_order].reshape(height, width).numpy())

    attended = weights[attention.num_prefix + place]
    return Explanation(query, grid(mates), grid(attended), grid(selected / lists.shape[0]))


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
    side = student.img_size // cast(Any, student.model).patch_embed.grid_size[0]
    rows, columns = cast(Any, student.model).patch_embed.grid_size
    queries = [(rows // 4, columns // 3), (rows // 2, columns // 2), (3 * rows // 4, 2 * columns // 3)]
    figure = Figure(figsize=(10, 10.6), layout="constrained")
    axes = figure.subplots(3, 3, squeeze=False)
    titles = ("query (cross) and its tile", "dense attention, mean of heads", "keys read, share of heads")
    for row, found in enumerate(explain(student, image, queries, layer)):
        for column, (shown, colours) in enumerate(
            ((found.tile, "Blues"), (found.attention**0.5, "magma"), (found.selected, "magma"))
        ):
            axis = axes[row][column]
            axis.imshow(image)
            axis.imshow(shown, cmap=colours, alpha=0.65, extent=(0, student.img_size, student.img_size, 0))
            axis.plot((found.query[1] + 0.5) * side, (found.query[0] + 0.5) * side, "c+", markersize=12, mew=2)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(titles[column], fontsize=10)
    keys = student.sparsity.layout(rows * columns).keys
    figure.suptitle(f"{path.stem}, layer {layer}: each tile reads {keys} of {rows * columns} patch keys per head")
    figure.savefig(output, dpi=80)
