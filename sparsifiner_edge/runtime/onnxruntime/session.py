"""A session of ONNX Runtime: on the CPU, or on the provider that it is given."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import AGAIN, TensorSpec
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import Execution, precision_text
from sparsifiner_edge.onnx_file import all_nodes, read_model
from sparsifiner_edge.ops.kernels import described
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.runtime.backend import import_package, require_stored
from sparsifiner_edge.runtime.processor import (
    BF16_TOLERANCE_FREE,
    as_line,
    holds_float16,
    native_library,
    usable_kernels,
    why_portable,
)
from sparsifiner_edge.runtime.session import Description, Session, validate_outputs

_ERRORS_ONLY = 3
_TYPES = {"float": "float32", "double": "float64"}  # The others have NumPy's names.


class Provider(NamedTuple):
    """What shall run a model: ONNX Runtime's name of it, which must really run; its options; the device, for people."""

    name: str = "CPUExecutionProvider"
    options: Mapping[str, Any] = {}
    device: str = "CPU"


ON_CPU = Provider()
FALLBACK = "function bodies, not the CUDA kernels, with pageable copies"
"""What a GPU's provider runs of sparse attention, for people."""


def import_onnxruntime() -> Any:
    """The module `onnxruntime`.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is installed and cannot be imported.
    """
    onnxruntime = import_package("onnxruntime", "onnxruntime", "cpu", "Reinstall onnxruntime.")
    if hasattr(onnxruntime, "disable_telemetry_events"):  # Whoever imported it before us may have left them on.
        onnxruntime.disable_telemetry_events()
    return onnxruntime


class OrtSession(Session):
    """A `Session` on ONNX Runtime.

    Attributes:
        least_tolerance: see `bundle.golden.check_golden`.

    Args:
        model: where the ONNX file is from, for messages; it is not read.
        source: its content, or the path of a copy that nobody changes meanwhile.
        execution: precision, kernels and threads.
        stored: the bundle's own word for its precision, if it has one.
        provider: on what.

    Raises:
        ArtifactError: it is no ONNX file, or needs another file.
        BackendError: ONNX Runtime rejects the model, or would quietly run it on the CPU, or in another precision,
            instead of what was asked for.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        model: Path,
        source: bytes | str,
        execution: Execution | None = None,
        stored: str | None = None,
        provider: Provider = ON_CPU,
    ) -> None:
        execution = execution or Execution()
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        graph = read_model(content, model)
        operators = {node.op_type for node in all_nodes(graph) if node.domain == DOMAIN}
        float16 = holds_float16(graph)
        del content, graph  # Before ONNX Runtime reads it: memory is short on a board.
        self.backend, self._model = execution.backend, model
        bfloat16, kernels = _chosen(execution, operators, float16, model, provider)
        self.least_tolerance = BF16_TOLERANCE_FREE if bfloat16 else 0.0
        options, native = session_options(execution.cores, bfloat16), native_library(kernels) is not None
        start = time.perf_counter_ns()
        session = inference_session(source, options, kernels, model, provider=provider)
        _require_provider(session, provider)
        self.load_ms = (time.perf_counter_ns() - start) / 1e6
        self.inputs = [_spec(node) for node in session.get_inputs()]
        self.outputs = [_spec(node) for node in session.get_outputs()]
        if not self.inputs or not self.outputs:
            raise BackendError(f"{model} has no {'output' if self.inputs else 'input'}.", "Export the bundle again.")
        self._session: Any = session
        self._description = Description(
            backend=self.backend,
            version=str(import_onnxruntime().__version__),
            provider=provider.name,
            device=provider.device,
            precision=_precision(stored, float16, bfloat16),
            kernels=_kernels(operators, kernels, native, bfloat16, provider),
            threads=execution.cores,
        )

    @property
    def description(self) -> Description:
        """See `Session.description`."""
        return self._description

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.infer`."""
        if self._session is None:
            raise BackendError(f"The session of {self._model} is closed.", "Open it again.")
        self.validate(inputs)
        names = [spec.name for spec in self.outputs]
        try:
            outputs = self._session.run(names, {name: np.ascontiguousarray(value) for name, value in inputs.items()})
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self._model}: {as_line(error)}", "Export it again.") from error
        answer = dict(zip(names, outputs, strict=True))
        validate_outputs(self._model, answer)
        return answer

    def close(self) -> None:
        """See `Session.close`."""
        self._session = None


def session_options(threads: int = 0, bfloat16: bool = False) -> Any:
    """ONNX Runtime's, for any session of ours: errors alone are logged, and int8 products are exact.

    AVX2, and AVX-512 without VNNI, add pairs of uint8 x int8 in 16 bits, which saturate. There weights become uint8,
    which takes longer; elsewhere nothing changes (onnxruntime_session_options_config_keys.h, x64quantprecision).

    Args:
        threads: inside one operator; 0: as ONNX Runtime likes. bfloat16: the native library multiplies it in attention.
    """
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    if bfloat16:
        options.add_session_config_entry("sparsifiner.attention", "bfloat16")
    return options


def inference_session(
    source: bytes | str, options: Any, kernels: str, origin: object, fix: str = AGAIN, provider: Provider = ON_CPU
) -> Any:
    """ONNX Runtime's own session, the only place that makes one.

    Args:
        source: of the file: its content, or a path. origin: where it is from; fix: what to do where it is refused.
        options: of `session_options`; they serve one session. kernels: one of `execution.KERNEL_CHOICES`.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        BackendError: it refuses the file or the native library, or that is asked for and cannot be used.
    """
    ort, library = import_onnxruntime(), native_library(kernels)
    providers: list[Any] = [(provider.name, dict(provider.options))]
    if provider.name != ON_CPU.name:
        providers.append(ON_CPU.name)
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
    except Exception as error:  # Such as an ONNX Runtime older than the library's interface.
        raise BackendError(
            f"ONNX Runtime {ort.__version__} rejects the native library: {as_line(error)}",
            "Upgrade onnxruntime, or choose the portable kernels.",
        ) from error
    try:
        return ort.InferenceSession(source, options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors share no base but Exception.
        raise BackendError(f"ONNX Runtime rejects {origin}: {as_line(error)}", fix) from error


def _chosen(
    execution: Execution, operators: set[str], float16: bool, model: Path, provider: Provider
) -> tuple[bool, str]:
    """Whether attention is computed in bfloat16, and the kernels.

    Raises:
        BackendError: a precision that cannot be had of this file, or not by these kernels.
    """
    on_cpu = provider.name == ON_CPU.name
    if execution.precision != "bf16" or not on_cpu:
        require_stored(execution.precision, "fp16" if float16 else "fp32", "ONNX Runtime")
        return False, usable_kernels(float16, execution.kernels) if on_cpu else "portable"
    if execution.kernels == "portable":
        raise BackendError("Function bodies have no bfloat16.", "Leave --precision out.")
    if not any(name.endswith("Attention") for name in operators):  # Nothing of it would be bfloat16.
        raise BackendError(f"{model} has no attention that could run in bfloat16.", "Leave --precision out.")
    return True, usable_kernels(float16, "native")


def _precision(stored: str | None, float16: bool, bfloat16: bool) -> str | Unavailable:
    """What a file holds and is computed in: linear layers run in what it holds."""
    if stored is None:
        return Unavailable("the bundle does not say")
    return precision_text(stored, "fp16" if float16 else "fp32") + (", attention bf16" if bfloat16 else "")


def _kernels(operators: set[str], kernels: str, native: bool, bfloat16: bool, provider: Provider) -> str:
    """What runs the operators, and what was not chosen: function bodies are several times slower."""
    if provider.name != ON_CPU.name:
        return FALLBACK if operators else f"{described(operators, native)}, with pageable copies"
    reason = why_portable(kernels) if kernels == "auto" else None
    return described(operators, native, reason, "bfloat16" if bfloat16 else None)


def _require_provider(session: Any, provider: Provider) -> None:
    """ONNX Runtime puts the CPU in the place of a provider that does not start, and says so on standard error alone."""
    running = [str(name) for name in session.get_providers()]
    if running[:1] != [provider.name]:
        raise BackendError(
            f"{provider.name} does not start; ONNX Runtime would run the model on {', '.join(running)} instead.",
            "Its reason is in the lines above this one, often a CUDA, cuDNN or TensorRT that is missing or that it was "
            'not built for: pip install "onnxruntime-gpu[cuda,cudnn]". Or leave --provider out.',
        )


def _spec(node: Any) -> TensorSpec:
    """From ONNX Runtime's "tensor(uint8)"."""
    element = str(node.type).removeprefix("tensor(").removesuffix(")")
    dtype = _TYPES.get(element, element)
    try:
        np.dtype(dtype)
    except TypeError as error:
        raise BackendError(
            f"{node.name!r} has type {node.type}, which NumPy lacks.", "Export it with another type."
        ) from error
    return TensorSpec(str(node.name), dtype, tuple(node.shape))
