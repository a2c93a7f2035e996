"""Conversion of a model to the input that Gst-nvinfer's preprocessing produces: planes of floats from 0 to 255.

    image uint8 [B,H,W,3] -> Cast -> pixels -> ..    becomes    image float32 [B,3,H,W] -> Transpose -> pixels -> ..

Mean and deviation stay folded into the first layer, so the single scale that Gst-nvinfer supports is 1. Gst-nvinfer
parses every output of a classifier as class probabilities, so `probabilities`, the softmax of the logits, is the only
output. Of a segmentation it reads the first output at the size of the image (its fillSegmentationOutput): `map`,
float32 [B,C,H,W].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.bundle.manifest import AGAIN
from sparsifiner_edge.bundle.store import GOLDEN_FILE, Bundle
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.runtime.golden import read_golden

PROBABILITIES = "probabilities"
"""Name of a classifier's only output."""
MAP = "map"
"""Name of a segmentation's only output."""
MODES = {"fp32": 0, "fp16": 2}
"""Gst-nvinfer's network-mode for each precision."""


def for_nvinfer(model: Any) -> Any:
    """Return a copy of a model that takes `image` float32 [B,3,H,W] instead of uint8 [B,H,W,3].

    A classifier's copy outputs `probabilities` instead of logits.

    Raises:
        ConfigError: The model does not begin with a single Cast of its only input `image` [B,H,W,3] to float32.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    casts = [node for node in graph.node if (node.op_type, list(node.input)) == ("Cast", ["image"])]
    kinds = [(a.i, len(cast.output)) for cast in casts for a in cast.attribute if a.name == "to"]
    dims = [list(value.type.tensor_type.shape.dim) for value in graph.input]
    if kinds != [(TensorProto.FLOAT, 1)] or list(map(len, dims)) != [4]:
        raise ConfigError("The model does not begin with one Cast of `image` [B,H,W,3] to float32.", AGAIN)
    pixels = casts[0].output[0]
    graph.node.remove(casts[0])
    for node in graph.node:
        node.input[:] = [pixels if name == "image" else name for name in node.input]
    graph.node.insert(0, helper.make_node("Transpose", ["image"], [pixels], perm=[0, 2, 3, 1]))
    batch, height, width, _ = (dim.dim_param or dim.dim_value for dim in dims[0])
    graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, height, width]))
    del graph.value_info[:]
    if (logits := next((output for output in graph.output if output.name == "logits"), None)) is not None:
        probabilities = onnx.ValueInfoProto(name=PROBABILITIES, type=logits.type)
        del graph.output[:]
        graph.output.append(probabilities)
        graph.node.append(helper.make_node("Softmax", ["logits"], [PROBABILITIES], axis=-1))
    return changed


def give_map(model: Any, bundle: Bundle) -> int:
    """Replace a model's only output by `map` float32 [B,C,H,W] of the image's size, if it is a map of probabilities.

    Such an output is float32 [B,h,w] or [B,C,h,w], has sides that divide the image's, and values from 0 to 1 in the
    golden pair.

    Args:
        model: Model to change in place.
        bundle: Bundle of the model.

    Returns:
        Number of channels of the map; 0 if the output is not such a map, and the model is unchanged.
    """
    graph, outputs, (height, width) = model.graph, bundle.manifest.outputs, height_width(bundle.image_size)
    if len(outputs) != 1 or [outputs[0].name] != [output.name for output in graph.output]:
        return 0
    values = read_golden(bundle)[1].get(outputs[0].name) if GOLDEN_FILE in bundle.manifest.files else None
    if values is None or values.ndim not in (3, 4) or outputs[0].name == "tokens" or values.dtype != np.float32:
        return 0
    channels, rows, columns = map(int, (1, *values.shape[1:])[-3:])
    fits = values.size and values.shape[1:] == outputs[0].shape[1:] and height % rows == width % columns == 0
    if not (fits and values.min() >= 0 and values.max() <= 1):
        return 0
    renamed = {MAP: "map.own", outputs[0].name: "map.small"}  # A tensor of the model may already be named `map`.
    for names in (names for node in graph.node for names in (node.input, node.output)):
        names[:] = [renamed.get(name, name) for name in names]
    for weights in graph.initializer:
        weights.name = renamed.get(weights.name, weights.name)
    planes, scales = np.array([-1, channels, rows, columns]), np.array([1, 1, height / rows, width / columns], "f")
    graph.initializer.extend(map(numpy_helper.from_array, (planes, scales), ("map.shape", "map.scales")))
    graph.node.append(helper.make_node("Reshape", ["map.small", "map.shape"], ["map.planes"]))
    graph.node.append(helper.make_node("Resize", ["map.planes", "", "map.scales"], [MAP], mode="linear"))
    batch = graph.output[0].type.tensor_type.shape.dim[0]
    shape = [batch.dim_param or batch.dim_value, channels, height, width]
    graph.output[0].CopyFrom(helper.make_tensor_value_info(MAP, TensorProto.FLOAT, shape))
    return channels
