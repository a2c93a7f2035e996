"""ONNX Runtime sessions on exported files in memory, and access to their inner tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import onnx

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.runtime.backend import holds_float16, native_library
from sparsifiner_edge.runtime.onnxruntime import import_onnxruntime, inference_session, session_options


def file_session(model: onnx.ModelProto, kernels: str = "auto") -> Any:
    """Open a session on the CPU.

    Args:
        model: The file.
        kernels: One of `sparsifiner_edge.runtime.KERNEL_CHOICES`; "auto" takes function bodies for a float16 file.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        BackendError: The native library is missing or unusable, or ONNX Runtime refuses the file.
    """
    library, fix = native_library(kernels, holds_float16(model)), "Choose other settings, and report this as a bug."
    content, options = model.SerializeToString(), session_options()
    # Reduce observations at once and return the memory: a file with 5,000 tokens has scores of a gigabyte in the
    # function body of each layer.
    options.execution_order = import_onnxruntime().ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    return inference_session(content, options, library, "the file that would be written", fix)


def file_runner(model: onnx.ModelProto, kernels: str = "auto") -> Callable[..., dict[str, Array]]:
    """Return a function from `image`, and other inputs by name, to the outputs by name; see `file_session`."""
    infer = runner_of(model, kernels)

    def run(image: Array, others: Mapping[str, Array] | None = None) -> dict[str, Array]:
        return infer({"image": image, **(others or {})})

    return run


def runner_of(model: onnx.ModelProto, kernels: str = "auto") -> Callable[[dict[str, Array]], dict[str, Array]]:
    """Return the same function for inputs by name; inputs that the file lacks are ignored."""
    session = file_session(model, kernels)
    taken, names = ([value.name for value in side] for side in (session.get_inputs(), session.get_outputs()))
    return lambda given: dict(zip(names, session.run(names, {name: given[name] for name in taken}), strict=True))


def results_of(model: onnx.ModelProto, kind: str) -> list[str]:
    """Return the outputs of our operators whose name ends in `kind`, first layer first."""
    return [node.output[0] for node in model.graph.node if node.domain == DOMAIN and node.op_type.endswith(kind)]


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return a copy of a file that also outputs these inner tensors."""
    watched = copy.deepcopy(model)
    watched.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    return watched


def with_matches(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a file that takes the results of its MatchTokens nodes as inputs."""
    changed, names = copy.deepcopy(model), results_of(model, "MatchTokens")
    del changed.graph.node[:]
    changed.graph.node.extend(node for node in model.graph.node if node.op_type != "MatchTokens")
    changed.graph.input.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, None) for name in names)
    return changed
