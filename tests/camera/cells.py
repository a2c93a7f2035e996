"""A bundle whose features are the brightness of the image's 8 x 8 cells.

What a frame's image carries (see `sparsifiner_edge.camera.pattern`) so comes out of the whole chain, model included, in
the records of `sparsifiner-edge run`: measurements of age need no special code in what they measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparsifiner_edge.bundle.manifest import BUNDLE_SCHEMA, Manifest, Preprocessing, TensorSpec
from sparsifiner_edge.bundle.store import seal_bundle
from sparsifiner_edge.camera import pattern

GRID = pattern.GRID
CELLS = GRID * GRID
_UNSURE = 0.2


def number_of(brightness: Sequence[float]) -> int | None:
    """The number that cells of mean brightness 0-255, at least the first 32 of the grid, say; None if they do not."""
    levels = brightness[: pattern.CELLS]
    if any(abs(level / 255 - 0.5) < _UNSURE for level in levels):
        return None
    cells = [level > 127.5 for level in levels]
    number = sum(white << place for place, white in enumerate(reversed(cells[: pattern.BITS])))
    return number if cells == pattern.cells_of(number) else None


def make_cells_bundle(folder: Path, size: int = 224, work: int = 0) -> Path:
    """A bundle of `image` uint8 [1,size,size,3] -> `features` [1,64].

    Args:
        folder: to write.
        size: pixels along a side, a multiple of 8.
        work: times that the image is enlarged and made small again, which costs time as a model does.
    """
    folder.mkdir(parents=True)
    model = _model(size, work)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    manifest = Manifest(
        schema_version=BUNDLE_SCHEMA, files={}, name="cells", precision="fp32", preprocessing=Preprocessing(size),
        inputs=(TensorSpec("image", "uint8", (1, size, size, 3)),),
        outputs=(TensorSpec("features", "float32", (1, CELLS)),), tolerances={"features": 1e-5},
    )  # fmt: skip
    seal_bundle(folder, manifest)
    return folder


def _model(size: int, work: int) -> onnx.ModelProto:
    cell = size // GRID
    weights = {
        "channels": np.array([3], np.int64), "planes": np.array([1, 1, size, size], np.int64),
        "flat": np.array([1, CELLS], np.int64), "scales": np.array([1, 1, 32, 32], np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "channels"], ["grey"], keepdims=0),
        helper.make_node("Reshape", ["grey", "planes"], ["plane0"]),
    ]
    for number in range(work):
        large, small = f"large{number}", f"plane{number + 1}"
        nodes.append(helper.make_node("Resize", [f"plane{number}", "", "scales"], [large], mode="nearest"))
        nodes.append(helper.make_node("AveragePool", [large], [small], kernel_shape=[32, 32], strides=[32, 32]))
    nodes += [
        helper.make_node("AveragePool", [f"plane{work}"], ["cells"], kernel_shape=[cell, cell], strides=[cell, cell]),
        helper.make_node("Reshape", ["cells", "flat"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes, "cells",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, size, size, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, CELLS])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
