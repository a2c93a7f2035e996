"""Sessions on exported files that are still in memory: for the check, for int8, for `--measure`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.runtime.backend import ProcessorBackend, holds_float16, usable_kernels
from sparsifiner_edge.runtime.onnxruntime import inference_session, session_options
from sparsifiner_edge.runtime.open import find_backend


def file_session(model: onnx.ModelProto, kernels: str = "auto") -> Any:
    """A session on the CPU.

    Args:
        kernels: one of `sparsifiner_edge.runtime.KERNEL_CHOICES`; "auto" takes the bodies for a float16 file.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        BackendError: the native library is missing or cannot be used, or ONNX Runtime refuses the file.
    """
    kernels, fix = usable_kernels(holds_float16(model), kernels), "Choose other settings, and report this as a bug."
    return inference_session(
        model.SerializeToString(), session_options(), kernels, "the file that would be written", fix
    )


@contextlib.contextmanager
def processor_run(
    model: onnx.ModelProto, execution: Execution, stored: str | None = None
) -> Iterator[tuple[Callable[[Mapping[str, Array]], Any], str]]:
    """What runs a graph in a backend of the processor, and the kernels that it does so on.

    stored: precision of its linear layers, where it is not the backend's own: "int8".

    Raises:
        ConfigError: the backend is none of the processor's.
        MissingExtraError, BackendError: as `open_session`.
    """
    found = find_backend(execution)
    if not isinstance(found, ProcessorBackend) or execution.provider != "cpu":
        raise ConfigError(f"{execution.backend} does not run on the processor.", "Measure in onnxruntime or openvino.")
    with found.session(Path("layer"), model.SerializeToString(), stored) as opened:
        yield opened.infer, str(opened.description.kernels)


def file_runner(model: onnx.ModelProto, kernels: str = "auto") -> Callable[..., dict[str, Array]]:
    """A function from the input `image`, and other inputs by name, to the outputs by name; see `file_session`."""
    session = file_session(model, kernels)
    names = [output.name for output in session.get_outputs()]

    def run(image: Array, others: Mapping[str, Array] | None = None) -> dict[str, Array]:
        return dict(zip(names, session.run(names, {"image": image, **(others or {})}), strict=True))

    return run


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of a file that gives inner tensors too."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    return watched


def match_names(model: onnx.ModelProto) -> list[str]:
    """The outputs of a file's MatchTokens: which tokens merge, layer by layer."""
    return [name for node in model.graph.node if node.op_type == "MatchTokens" for name in node.output]


def with_matches(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of a file that is given these outputs of its MatchTokens as inputs."""
    given = onnx.ModelProto()
    given.CopyFrom(model)
    del given.graph.node[:]
    given.graph.node.extend(node for node in model.graph.node if node.op_type != "MatchTokens")
    given.graph.input.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, None) for name in names)
    return given
