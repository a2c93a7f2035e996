"""A bundle's model whose lists and merges are outputs too, so that people can see what its layers read."""

from __future__ import annotations

from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.onnx_file import read_model
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.runtime.onnxruntime.backends import OnnxRuntime
from sparsifiner_edge.runtime.session import Session

WATCHED = "watched"
LISTS = ("KeySelect", "LandmarkKeySelect")
MATCHES = "MatchTokens"


def open_watched(bundle: Bundle, backend: str, threads: int | None, kernels: str) -> Session:
    """A session that also gives what each operator that selects or matches gave: "watched.<operator>.<number>".

    Numbers follow the layers. Arguments: see `open_checked`.

    Raises:
        ConfigError: none of its layers reads lists.
        BackendError: another backend than onnxruntime: engines have the outputs that they were built with.
    """
    if backend != OnnxRuntime.name:
        raise BackendError(
            f"{backend} cannot show what layers read: only {OnnxRuntime.name} can.", f"Choose {OnnxRuntime.name}."
        )
    import onnx

    path = bundle.folder / MODEL_FILE
    model = read_model(bundle.read(MODEL_FILE), path)
    wanted = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in (*LISTS, MATCHES)]
    if all(node.op_type == MATCHES for node in wanted):
        raise ConfigError(f"No layer of {bundle.folder} reads lists of keys.", "Choose a sparser bundle.")
    for number, node in enumerate(wanted):
        name = f"{WATCHED}.{node.op_type}.{number}"
        model.graph.node.append(onnx.helper.make_node("Identity", [node.output[0]], [name]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, None))
    found = OnnxRuntime()
    return found.session(
        path, model.SerializeToString(), threads or available_cores(), found.choose_kernels(bundle, kernels),
        bundle.manifest.precision,
    )  # fmt: skip
