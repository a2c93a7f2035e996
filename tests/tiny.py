"""Small real bundles, made with onnx.helper alone: a few MatMuls, so many that their cost is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sparsifiner_edge.bounds import ImageSize, height_width
from tests.seal import seal_bundle

DOMAIN = "sparsifiner"


def make_bundle(
    folder: Path,
    *,
    depth: int = 1,
    width: int = 8,
    size: ImageSize = 4,
    batch: int | str = "batch",
    function: bool = False,
    ballast_mb: int = 0,
    dtype: type = np.float32,
    **manifest: Any,
) -> Path:
    """A bundle of `depth` MatMuls over one token of `width` channels per pixel: `image` uint8 -> `features`
    [batch, width].

    `function` puts a node of domain sparsifiner, with a body, before the output; `ballast_mb` adds that much weight.
    """
    folder.mkdir(parents=True)
    sides = height_width(size)
    model = _model(depth, width, sides, batch, function, ballast_mb, dtype)
    onnx.save(model, folder / "model.onnx")
    image = np.random.default_rng(1).integers(0, 256, (1, *sides, 3), dtype=np.uint8)
    golden = ReferenceEvaluator(model).run(["features"], {"image": image})[0]
    np.savez(folder / "golden.npz", **{"input.image": image, "output.features": golden})
    content = {
        "name": folder.name,
        "precision": "fp32",
        "inputs": [{"name": "image", "dtype": "uint8", "shape": [batch, *sides, 3]}],
        "outputs": [{"name": "features", "dtype": np.dtype(dtype).name, "shape": [batch, width]}],
        "tolerances": {"features": 1e-5},
    }
    seal_bundle(folder, content | manifest)
    return folder


def _model(
    depth: int, width: int, sides: tuple[int, int], batch: int | str, function: bool, ballast_mb: int, dtype: type
) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = {"shape": np.array([0, -1, 3], np.int64), "embed": random.normal(0, 0.01, (3, width)).astype(dtype)}
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], to=kind),
        helper.make_node("Reshape", ["cast", "shape"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "embed"], ["x0"]),
    ]
    for layer in range(depth):
        weights[f"w{layer}"] = (random.normal(0, 1, (width, width)) / np.sqrt(width)).astype(dtype)
        nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"x{layer + 1}"]))
    last = f"x{depth}"
    if ballast_mb:
        weights["ballast"] = random.random((ballast_mb << 18, 1), dtype=np.float32).astype(dtype)
        weights["one"] = np.array([0], np.int64)
        nodes.append(helper.make_node("Gather", ["ballast", "one"], ["picked"]))
        nodes.append(helper.make_node("Add", [last, "picked"], ["weighted"]))
        last = "weighted"
    if function:
        nodes.append(helper.make_node("Double", [last], ["doubled"], domain=DOMAIN))
        last = "doubled"
    weights["axes"] = np.array([1], np.int64)
    nodes.append(helper.make_node("ReduceMean", [last, "axes"], ["features"], keepdims=0))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, *sides, 3])],
        [helper.make_tensor_value_info("features", kind, [batch, width])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    body = helper.make_function(
        DOMAIN, "Double", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], opsets[:1]
    )
    return helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=[body] if function else [])
