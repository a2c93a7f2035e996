"""A session of ONNX Runtime: on the CPU, or on the provider that it is given."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import TensorSpec
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.onnx_file import all_nodes, read_model
from sparsifiner_edge.ops.kernels import described
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.runtime.backend import import_package
from sparsifiner_edge.runtime.processor import BF16_TOLERANCE_FREE, as_line, native_library, why_portable
from sparsifiner_edge.runtime.session import Description, Session, validate_outputs

_ERRORS_ONLY = 3
_TYPES = {"float": "float32", "double": "float64"}  # The others have NumPy's names.


class Execution(NamedTuple):
    """What shall run a model.

    Attributes:
        backend: as given to `open_session`.
        provider: ONNX Runtime's name of it; it must really run. options: of it.
        device: for people.
        bfloat16: attention multiplies bfloat16 in the native library; the rest is as the file has it.
    """

    backend: str = "onnxruntime"
    provider: str = "CPUExecutionProvider"
    options: Mapping[str, Any] = {}
    device: str = "CPU"
    bfloat16: bool = False


ON_CPU = Execution()
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
        threads: threads inside one operator.
        kernels: see `open_session`.
        precision: the bundle's own word for it, if it has one.
        execution: the provider.

    Raises:
        ArtifactError: it is no ONNX file, or needs another file.
        BackendError: ONNX Runtime rejects the model, or would quietly run it on the CPU, or in float32, instead of what
            was asked for.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        model: Path,
        source: bytes | str,
        threads: int,
        kernels: str = "auto",
        precision: str | None = None,
        execution: Execution = ON_CPU,
    ) -> None:
        ort = import_onnxruntime()
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        operators = {node.op_type for node in all_nodes(read_model(content, model)) if node.domain == DOMAIN}
        del content  # Before ONNX Runtime reads it: memory is short on a board.
        self.backend, self._model = execution.backend, model
        options = session_options()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        providers: list[Any] = [(execution.provider, dict(execution.options))]
        if execution.provider != ON_CPU.provider:
            providers.append(ON_CPU.provider)
        library = native_library(kernels)
        self.least_tolerance = 0.0
        if execution.bfloat16:
            _require_attention(operators, model)
            attend_in_bfloat16(options)
            self.least_tolerance = BF16_TOLERANCE_FREE
        start = time.perf_counter_ns()
        if library is not None:
            try:
                options.register_custom_ops_library(str(library))
            except Exception as error:  # Such as an ONNX Runtime older than the library's interface.
                raise BackendError(
                    f"ONNX Runtime {ort.__version__} rejects the native library: {as_line(error)}",
                    "Upgrade onnxruntime, or choose the portable kernels.",
                ) from error
        try:
            session = ort.InferenceSession(source, options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors share no base but Exception.
            raise BackendError(f"ONNX Runtime rejects {model}: {as_line(error)}", "Export the bundle again.") from error
        _require_provider(session, execution)
        self.load_ms = (time.perf_counter_ns() - start) / 1e6
        self.inputs = [_spec(node) for node in session.get_inputs()]
        self.outputs = [_spec(node) for node in session.get_outputs()]
        if not self.inputs or not self.outputs:
            raise BackendError(f"{model} has no {'output' if self.inputs else 'input'}.", "Export the bundle again.")
        self._session: Any = session
        self._description = Description(
            backend=self.backend,
            version=str(ort.__version__),
            provider=execution.provider,
            device=execution.device,
            precision=precision or Unavailable("the bundle does not say"),
            kernels=_kernels(operators, kernels, library is not None, execution),
            threads=threads,
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


def session_options() -> Any:
    """ONNX Runtime's, for any session of ours: errors alone are logged, and int8 products are exact.

    AVX2, and AVX-512 without VNNI, add pairs of uint8 x int8 in 16 bits, which saturate. There weights become uint8,
    which takes longer; elsewhere nothing changes (onnxruntime_session_options_config_keys.h, x64quantprecision).
    """
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def attend_in_bfloat16(options: Any) -> None:
    """Have the native library, once it is registered with these options of a session, multiply bfloat16."""
    options.add_session_config_entry("sparsifiner.attention", "bfloat16")


def _kernels(operators: set[str], kernels: str, native: bool, execution: Execution) -> str:
    """What runs the operators, and what was not chosen: function bodies are several times slower."""
    if execution.provider != ON_CPU.provider:
        return FALLBACK if operators else f"{described(operators, native)}, with pageable copies"
    reason = why_portable(kernels) if kernels == "auto" else None
    return described(operators, native, reason, "bfloat16" if execution.bfloat16 else None)


def _require_attention(operators: set[str], model: Path) -> None:
    """Something of a file must be attention as an operator, or nothing of it would be bfloat16."""
    if not any(name.endswith("Attention") for name in operators):
        raise BackendError(f"{model} has no attention that could run in bfloat16.", "Choose onnxruntime.")


def _require_provider(session: Any, execution: Execution) -> None:
    """ONNX Runtime puts the CPU in the place of a provider that does not start, and says so on standard error alone."""
    running = [str(name) for name in session.get_providers()]
    if running[:1] != [execution.provider]:
        raise BackendError(
            f"{execution.provider} does not start; ONNX Runtime would run the model on {', '.join(running)} instead.",
            "Its reason is in the lines above this one, often a CUDA, cuDNN or TensorRT that is missing or that it was "
            'not built for: pip install "onnxruntime-gpu[cuda,cudnn]". Or choose --backend onnxruntime.',
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
