"""The model that Gst-nvinfer's preprocessing fits, which gives planes of floats from 0 to 255.

    image uint8 [B,H,W,3] -> Cast -> pixels -> ..    becomes    image float32 [B,3,H,W] -> Transpose -> pixels -> ..

Mean and deviation stay folded in the first layer, so the one scale that such preprocessing knows is 1. Gst-nvinfer
reads every output of a classifier as the answer of one: `probabilities`, the softmax of the logits, is the only one.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from sparsifiner_edge.bundle.manifest import AGAIN
from sparsifiner_edge.errors import ConfigError

PROBABILITIES = "probabilities"
MODES = {"fp32": 0, "fp16": 2}
"""Precision -> Gst-nvinfer's network-mode."""


def for_nvinfer(model: Any) -> Any:
    """A copy that takes `image` float32 [B,3,H,W] instead of uint8 [B,H,W,3]; a classifier's gives `probabilities`.

    Raises:
        ConfigError: there is no one Cast of the one input `image` [B,H,W,3] to float32.
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
    logits = next((output for output in graph.output if output.name == "logits"), None)
    if logits is not None:
        answer = onnx.ValueInfoProto(name=PROBABILITIES, type=logits.type)
        del graph.output[:]
        graph.output.append(answer)
        graph.node.append(helper.make_node("Softmax", ["logits"], [PROBABILITIES], axis=-1))
    return changed
