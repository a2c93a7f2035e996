"""The model for preprocessing that gives planes of float pixels: Gst-nvinfer's, and that of many others.

    image uint8 [B,H,W,3] -> Cast -> x [B,H,W,3] -> Transpose -> planes [B,3,H,W] -> ...
    becomes                 image float32 [B,3,H,W], pixels from 0 to 255      -> ...

Mean and deviation stay folded in the first layer, so the one scale that such preprocessing knows is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.golden import check_golden
from sparsifiner_edge.bundle.manifest import AGAIN, MODEL_FILE
from sparsifiner_edge.errors import ArtifactError, ConfigError, GateError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.ops.graph import drop_unused
from sparsifiner_edge.package.common import ImageBundle, read_golden_image
from sparsifiner_edge.runtime.onnxruntime.session import OrtSession

PROBABILITIES = "probabilities"
_TO_PLANES = [0, 3, 1, 2]
_CLOSE = 1e-4
"""Greatest difference of a probability from the softmax of the logits: both come from one runtime."""


def write_float_model(bundle: ImageBundle, folder: Path) -> dict[str, float]:
    """Write `model.onnx` with float planes in; for a classifier `probabilities` [B,classes] is its only output.

    The golden pair is run through it first.

    Returns:
        Per output: its difference from golden, relative to its range.

    Raises:
        ArtifactError: the model's outputs are not the manifest's.
        ConfigError: the model does not begin as our exports do.
        GateError: it disagrees with the golden pair.
        MissingExtraError: ONNX Runtime is not installed.
    """
    model = float_model(bundle.model())
    present = [output.name for output in model.graph.output]
    if present != [output.name for output in bundle.manifest.outputs]:
        said = ", ".join(map(repr, present))
        raise ArtifactError(f"{bundle.folder}: the model gives {said:.100}; its manifest differs.", "Do not use it.")
    path, inputs = folder / MODEL_FILE, {"image": read_golden_image(bundle)}
    path.write_bytes(model.SerializeToString())
    with _PlanesSession(path, bundle) as session:
        found, logits = check_golden(session, bundle), session.infer(inputs).get("logits")
    if logits is not None:
        path.write_bytes(classifier_model(model).SerializeToString())
        with _PlanesSession(path, bundle) as session:
            _check_probabilities(session.infer(inputs)[PROBABILITIES], logits)
    return {name: values["range_relative_error"] for name, values in found.items()}


def float_model(model: Any) -> Any:
    """A copy that takes `image` float32 [B,3,H,W] instead of uint8 [B,H,W,3].

    Raises:
        ConfigError: there is no Cast of `image` to float32, or what surrounds it does not take an image.
    """
    try:
        return _float_model(model)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ConfigError(f"The model does not begin as exports do: {error}.", AGAIN) from error


def _float_model(model: Any) -> Any:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    cast = next((n for n in graph.node if n.op_type == "Cast" and list(n.input) == ["image"]), None)
    if cast is None or [a.i for a in cast.attribute if a.name == "to"] != [TensorProto.FLOAT]:
        raise ConfigError("The model does not begin with a Cast of `image` to float32.", AGAIN)
    batch, height, width, channels = graph.input[0].type.tensor_type.shape.dim
    shape = [batch.dim_param or batch.dim_value, channels.dim_value, height.dim_value, width.dim_value]
    pixels = cast.output[0]
    graph.node.remove(cast)
    transposed = [n for n in graph.node if n.op_type == "Transpose" and list(n.input) == [pixels]]
    transposed = [n for n in transposed if [list(a.ints) for a in n.attribute if a.name == "perm"] == [_TO_PLANES]]
    planes = {node.output[0] for node in transposed}
    for node in [n for n in graph.node if n.output[0] in planes]:  # A node without outputs is rejected here.
        graph.node.remove(node)
    for node in graph.node:
        for number, name in enumerate(node.input):
            if name in planes:
                node.input[number] = "image"
            elif name == "image":
                node.input[number] = pixels
    # What still asks for the pixels' own layout, such as the Shape that finds a dynamic batch.
    if any(pixels in node.input for node in graph.node):
        graph.node.insert(0, helper.make_node("Transpose", ["image"], [pixels], "node_pixels", perm=[0, 2, 3, 1]))
    graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, shape))
    del graph.value_info[:]
    return made


def classifier_model(model: Any) -> Any:
    """A copy whose only output is the softmax of `logits`: Gst-nvinfer reads each output as a classifier's answer."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    logits = next(output for output in graph.output if output.name == "logits")
    answer = onnx.ValueInfoProto(name=PROBABILITIES, type=logits.type)
    gone = {output.name for output in graph.output}
    del graph.output[:]
    graph.output.append(answer)
    graph.node.append(helper.make_node("Softmax", ["logits"], [PROBABILITIES], "node_probabilities", axis=-1))
    drop_unused(made)
    entries = {p.key: p.value for p in made.metadata_props if p.key not in gone}
    helper.set_model_props(made, entries | {PROBABILITIES: f"sparsifiner-edge-{PROBABILITIES}"})
    return made


class _PlanesSession(OrtSession):
    """A session on a float model that takes images as the bundle does."""

    def __init__(self, path: Path, bundle: ImageBundle) -> None:
        super().__init__(path, path.read_bytes(), Execution(kernels="portable"), bundle.precision)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """uint8 [B,H,W,3] -> float32 [B,3,H,W] -> outputs."""
        return super().infer({"image": inputs["image"].transpose(_TO_PLANES).astype(np.float32)})


def _check_probabilities(got: Array, logits: Array) -> None:
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    worst = float(np.abs(got - weights / weights.sum(-1, keepdims=True)).max())
    if not worst <= _CLOSE:  # Written so that NaN fails.
        raise GateError(
            f"Probabilities differ from the softmax of the logits by {worst:.3g} (allowed {_CLOSE:.0e}).",
            "Report this with the model's name.",
        )
