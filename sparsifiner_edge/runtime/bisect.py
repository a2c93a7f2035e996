"""Search for the layer at which an engine deviates from the file that it is built from (`bisect_layers`).

In a copy of the file, the outputs of all layers become outputs of the model. An engine built from the copy and ONNX
Runtime both run the golden input, and their outputs are compared layer by layer. The engine is discarded afterwards,
because the additional outputs may change which kernels TensorRT uses.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from sparsifiner_edge.bundle.engines import BODIES, BatchRange, Details
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.metrics import OTHER_TOKENS, agreement
from sparsifiner_edge.runtime.child import serve, start_child
from sparsifiner_edge.runtime.golden import is_beyond, read_golden
from sparsifiner_edge.runtime.onnxruntime import inference_session, session_options
from sparsifiner_edge.runtime.open import find_backend
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend
from sparsifiner_edge.runtime.tensorrt.session import EngineSession

_FIX = "Build without --bisect, or raise --timeout."
"""Advice for the case that the process of the comparison dies or hangs."""


class LayerAgreement(msgspec.Struct, frozen=True, kw_only=True):
    """Comparison of a layer's output in an engine with that of ONNX Runtime.

    Attributes:
        layer: Name of the layer as in its nodes, such as "blocks.3".
        error: Maximum absolute difference, relative to the range of ONNX Runtime's output.
        tolerance: Largest golden tolerance of the bundle.
        cosine: Mean cosine of the rows of the output.
        beyond: True if the golden check would reject the output.
    """

    layer: str
    error: float
    tolerance: float
    cosine: float
    beyond: bool


def bisect_layers(bundle: str | Path, backend: str, *, timeout_s: float = 1800.0) -> list[LayerAgreement]:
    """Compare every layer of a bundle between an engine for this machine's GPU and ONNX Runtime.

    The engine runs the operators of the domain `sparsifiner` as ONNX function bodies.

    Args:
        bundle: Folder of the bundle.
        backend: "tensorrt" or "tensorrt-rtx".
        timeout_s: Time limit in seconds for the build and the comparison.

    Returns:
        One comparison per layer, in the order of the model.

    Raises:
        SparsifinerError: The engine cannot be built or run on this machine.
    """
    with start_child(__name__, f"The builder of {backend}", _FIX) as child:
        folder = str(open_bundle(Path(bundle)).folder.resolve())
        return child.ask("bisect", timeout_s, list[LayerAgreement], folder=folder, backend=backend)


def _bisect(folder: str, backend: str) -> list[LayerAgreement]:
    """Compare every layer of a bundle in this process, the child."""
    builder, bundle = find_backend(Execution(backend=backend)), open_bundle(Path(folder))
    if not isinstance(builder, TensorRtBackend):
        raise ConfigError(f"{backend} builds no engine.", "Choose --backend tensorrt or tensorrt-rtx.")
    inputs, _ = read_golden(bundle)
    size = len(next(iter(inputs.values())))
    (engine,) = builder.engines_to_build(bundle, (), BatchRange(size, size, size))
    plan = bundle.manifest.plan
    if plan is not None and plan.token_keep:
        what = "The model prunes tokens, and the engine may keep other tokens than ONNX Runtime."
        raise ConfigError(what, "Bisect a model that prunes no tokens.")
    if why := builder.why_not_here(engine):
        raise BackendError(f"The engine cannot run here: {why}", "Bisect on the machine that the engine is for.")
    model, layers = bundle.model(), dict[str, str]()
    known = {value.name: value for value in model.graph.value_info}
    for node in model.graph.node:
        if (match := re.match(r"(?:[a-z_]+\.)*\d+(?=\.)", node.name)) and node.output[0] in known:
            layers[match[0]] = node.output[0]  # The last node of a layer overwrites the earlier ones.
    if not layers:
        raise BackendError("The names of the file's nodes contain no layers.", "Export the bundle again.")
    outputs = {output.name for output in model.graph.output}
    model.graph.output.extend(known[name] for name in dict.fromkeys(layers.values()) if name not in outputs)
    file = model.SerializeToString()
    content = builder.compile(model, msgspec.structs.replace(engine, details=Details(kernels=BODIES)), bundle)
    with EngineSession(builder.load(), bundle.folder, content, engine, bundle.manifest) as session:
        got = session.infer(inputs)
    reference, names = inference_session(file, session_options(), None, folder), [*layers.values()]
    tolerance = max(bundle.manifest.tolerances.values(), default=0.0)
    share, rows = OTHER_TOKENS if plan is not None and any(plan.merge) else 0.0, []
    for layer, wanted in zip(layers, reference.run(names, inputs), strict=True):
        result = agreement(layer, got[layers[layer]], wanted, tolerance)
        beyond = is_beyond(result, tolerance, share)
        rows.append(
            LayerAgreement(layer=layer, error=result.error, tolerance=tolerance, cosine=result.mean, beyond=beyond)
        )
    return rows


if __name__ == "__main__":
    serve({"bisect": _bisect})
