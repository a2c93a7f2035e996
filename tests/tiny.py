"""Small real bundles made without torch: MatMuls of known cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
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
    **manifest: Any,
) -> Path:
    """Write a bundle of `depth` MatMuls with one token of `width` channels per pixel.

    The bundle maps `image` uint8 to `features` [batch, width]. `function` adds a node of domain sparsifiner with a
    function body before the output; `ballast_mb` adds that much weight.
    """
    folder.mkdir(parents=True)
    sides, random = height_width(size), np.random.default_rng(0)
    weights = {"embed": random.normal(0, 0.01, (3, width)).astype(np.float32)}
    for n in range(depth):
        weights[f"w{n}"] = (random.normal(0, 1, (width, width)) / np.sqrt(width)).astype(np.float32)
    nodes = [f"x{n + 1} = MatMul (x{n}, w{n})" for n in range(depth)]
    if ballast_mb:
        weights["ballast"] = random.random((ballast_mb << 18, 1), dtype=np.float32)
        weights["one"] = np.zeros(1, np.int64)
        nodes += ["picked = Gather (ballast, one)", f"weighted = Add (x{depth}, picked)"]
    if function:
        nodes.append(f"doubled = {DOMAIN}.Double ({'weighted' if ballast_mb else f'x{depth}'})")
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20, "{DOMAIN}": 1]>
        tiny (uint8[{batch}, {sides[0]}, {sides[1]}, 3] image) => (float[{batch}, {width}] features)
        <int64[3] shape = {{0, -1, 3}}, int64[1] axes = {{1}}> {{
            cast = Cast <to = 1> (image)
            pixels = Reshape (cast, shape)
            x0 = MatMul (pixels, embed)
            {" ".join(nodes)}
            features = ReduceMean <keepdims = 0> ({nodes[-1].split()[0]}, axes)
        }}
        {f'<domain: "{DOMAIN}", opset_import: ["": 20]> Double (x) => (y) {{ y = Add (x, x) }}' if function else ""}""")
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.save(model, folder / "model.onnx")
    image = np.random.default_rng(1).integers(0, 256, (1, *sides, 3), dtype=np.uint8)
    golden = ReferenceEvaluator(model).run(["features"], {"image": image})[0]
    np.savez(folder / "golden.npz", **{"input.image": image, "output.features": golden})
    content = {
        "name": folder.name,
        "precision": "fp32",
        "inputs": [{"name": "image", "dtype": "uint8", "shape": [batch, *sides, 3]}],
        "outputs": [{"name": "features", "dtype": "float32", "shape": [batch, width]}],
        "tolerances": {"features": 1e-5},
    }
    seal_bundle(folder, content | manifest)
    return folder
