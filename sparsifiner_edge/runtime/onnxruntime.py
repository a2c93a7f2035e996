"""ONNX Runtime backend, on the CPU and on NVIDIA GPUs through the CUDA execution provider.

On a GPU this backend is a fallback: sparse attention runs as ONNX function bodies, and every array is copied from and
to pageable memory.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import AGAIN, MODEL_FILE
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, pip_install
from sparsifiner_edge.execution import Execution, precision_text
from sparsifiner_edge.machine import has_int8_products, package_version
from sparsifiner_edge.ops import native
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.runtime.backend import (
    BF16_TOLERANCE_SELECTING,
    ProcessorBackend,
    import_package,
    native_library,
    read_file,
    require_precision,
)
from sparsifiner_edge.runtime.cuda import CudaDevice, probe
from sparsifiner_edge.runtime.session import Runtime, Session
from sparsifiner_edge.text import one_line

_ERRORS_ONLY = 3
"""Log severity of ONNX Runtime that suppresses everything below errors."""
CUDA = "CUDAExecutionProvider"
"""Name of the execution provider for NVIDIA GPUs."""
_OPTIONS = {"device_id": 0, "use_tf32": 0}
"""Options of the CUDA provider: the first device, and TF32 off.

TF32 keeps 10 bits of the mantissa, with which an fp32 bundle would fail its golden check.
"""
FALLBACK = "function bodies, not the CUDA kernels, with pageable copies"
"""Description, for users, of how the CUDA provider runs sparse attention."""


def import_onnxruntime() -> Any:
    """Import `onnxruntime` and disable its telemetry; see `import_package`."""
    onnxruntime = import_package("onnxruntime", "onnxruntime", "cpu", "Reinstall onnxruntime.")
    # Code that imported the module earlier may have left the telemetry on.
    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
    return onnxruntime


class OnnxRuntime(ProcessorBackend):
    """ONNX Runtime on the CPU, with the native library if it was built, or on an NVIDIA GPU.

    Linear layers compute in the weight precision of the file. The compute precision bf16 affects attention only, and
    requires the native library.
    """

    name = "onnxruntime"
    compute_precisions = ("auto", "bf16")

    def load(self) -> Any:
        """Import ONNX Runtime and check the provider and the precision; see `Backend.load`."""
        ort = import_onnxruntime()
        if self.execution.provider == "cuda":
            offered = ort.get_available_providers()
            if CUDA not in offered:
                gpu = package_version("onnxruntime-gpu")
                installed = f"onnxruntime-gpu {gpu}" if isinstance(gpu, str) else f"onnxruntime {ort.__version__}"
                raise BackendError(
                    f"{installed} has no {CUDA}; it offers {', '.join(offered)}.",
                    f"pip uninstall -y onnxruntime onnxruntime-gpu && {pip_install('gpu')} "
                    "(the two packages overwrite one another; on a Jetson see docs/jetson.md).",
                )
            if self.execution.kernels == "native":
                raise BackendError("The native kernels run on the CPU only.", "Leave --kernels or --provider out.")
        elif self.execution.compute_precision == "bf16":
            if self.execution.kernels == "portable":
                raise BackendError("Function bodies have no bfloat16.", "Leave --compute-precision out.")
            native_library("native")  # Raises if the library cannot be used.
            if not native.has_bfloat16():
                raise BackendError(f"{native.target()} has no bfloat16.", "Leave --compute-precision out.")
        return ort

    def check(self, bundle: Bundle) -> None:
        """Check that ONNX Runtime can run a bundle in the requested precision; see `Backend.check`."""
        self.load()
        execution, manifest = self.execution, bundle.manifest
        if execution.compute_precision != "bf16" or execution.provider != "cpu":
            require_precision(execution.compute_precision, manifest.float_precision, "ONNX Runtime")
        elif not manifest.stream and not any(name.endswith("Attention") for name in manifest.ops):
            what = f"{bundle.folder / MODEL_FILE} has no attention that could run in bfloat16."
            raise BackendError(what, "Leave --compute-precision out.")

    def open(self, bundle: Bundle) -> Session:
        """Check a bundle and open a session on its model; see `Backend.open`."""
        self.check(bundle)
        return super().open(bundle)

    def session(self, model: Path, content: bytes | str, stored: str | None = None) -> _OrtSession:
        """Open a session on an ONNX file, after a check of CUDA for the CUDA provider; see `ProcessorBackend`."""
        ort = self.load()
        if self.execution.provider == "cpu":
            return _OrtSession(model, content, self.execution, stored)
        device = probe()
        # ONNX Runtime prints missing libraries and reasons for a fallback; standard output is reserved for results.
        with contextlib.redirect_stdout(sys.stderr):
            if hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # Without this call, CUDA and cuDNN from pip packages are not found.
            return _OrtSession(model, content, self.execution, stored, device)


class _OrtSession(Session):
    """A `Session` on ONNX Runtime.

    Args:
        model: Path of the file, for messages.
        content: Content of the file, or the path of a copy that nobody modifies.
        execution: Options for running it.
        stored: Weight precision according to the bundle; None if unknown.
        device: CUDA device that runs the model; None for the CPU.

    Raises:
        BackendError: ONNX Runtime rejects the model, or would silently run it on the CPU instead of the GPU or in a
            precision other than the requested one.
    """

    def __init__(
        self,
        model: Path,
        content: bytes | str,
        execution: Execution,
        stored: str | None = None,
        device: CudaDevice | None = None,
    ) -> None:
        on_cpu = device is None
        self.backend, self.model = execution.backend, model
        halves = execution.compute_precision == "bf16" and on_cpu
        kernels = "native" if halves else execution.kernels if on_cpu else "portable"
        # Drop the parsed model before ONNX Runtime reads the file: boards have little memory.
        file = read_file(content, model, kernels)[1]
        computed = "fp16" if file.float16 else "fp32"
        if not halves:
            require_precision(execution.compute_precision, computed, "ONNX Runtime")
        bfloat16 = halves and any(name.endswith("Attention") for name in file.names)
        self.least_tolerance = BF16_TOLERANCE_SELECTING if bfloat16 else 0.0
        options = session_options(execution.cores, bfloat16)
        start = time.perf_counter_ns()
        session = inference_session(content, options, file.library, model, cuda=not on_cpu)
        running = [str(name) for name in session.get_providers()]
        # ONNX Runtime reports a failed provider on standard error only, and then uses the CPU.
        if not on_cpu and running[:1] != [CUDA]:
            raise BackendError(
                f"{CUDA} does not start; ONNX Runtime would run the model on {', '.join(running)} instead.",
                "The lines above give the reason, often a missing or incompatible CUDA or cuDNN: "
                'pip install "onnxruntime-gpu[cuda,cudnn]". Or leave --provider out.',
            )
        self.load_ms = (time.perf_counter_ns() - start) / 1e6
        self.inputs, self.outputs = file.inputs, file.outputs
        self._session: Any = session
        text = file.text("bfloat16" if bfloat16 else None)
        text += "; bfloat16 only in streaming inference" * (halves and not bfloat16)
        if not on_cpu:
            text = FALLBACK if file.names else f"{text}, with pageable copies"
        precision = precision_text(stored, computed) + (", attention bf16" if bfloat16 else "")
        self.description = Runtime(
            backend=self.backend,
            version=str(import_onnxruntime().__version__),
            provider=running[0],
            device=str(device or "CPU"),
            precision=Unavailable("not recorded in the bundle") if stored is None else precision,
            kernels=text,
            threads=execution.cores,
        )

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        if self._session is None:
            raise self.closed_error()
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def close(self) -> None:
        """Release the ONNX Runtime session; see `Session.close`."""
        super().close()
        self._session = None


def session_options(threads: int = 0, bfloat16: bool = False) -> Any:
    """Return session options of ONNX Runtime that log errors only and keep int8 products exact.

    AVX2, and AVX-512 without VNNI, add pairs of uint8 x int8 products in 16 bits, which saturate. On such CPUs the
    option `session.x64quantprecision` (onnxruntime_session_options_config_keys.h) converts the weights to uint8. It is
    set only there, because it costs time on other CPUs without any benefit (ONNX Runtime 1.32).

    Args:
        threads: Number of threads inside one operator; 0 leaves the choice to ONNX Runtime.
        bfloat16: True to let the native library multiply in bfloat16 in attention.

    Returns:
        An `onnxruntime.SessionOptions`, for one session.
    """
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin between runs would take a core from other work, such as another session.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not has_int8_products():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if bfloat16:
        options.add_session_config_entry("sparsifiner.attention", "bfloat16")
    return options


def inference_session(
    source: bytes | str, options: Any, library: Path | None, origin: object, fix: str = AGAIN, cuda: bool = False
) -> Any:
    """Create an `onnxruntime.InferenceSession`; all sessions of ONNX Runtime are created here.

    Args:
        source: Content of the ONNX file, or its path.
        options: Options from `session_options`, for this session only.
        library: Native library from `native_library`; None for none.
        origin: Origin of the file, for messages.
        fix: Advice for the case that ONNX Runtime rejects the file.
        cuda: True to run on a GPU. ONNX Runtime falls back to the CPU if the CUDA provider does not start.

    Returns:
        The session of ONNX Runtime.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        BackendError: ONNX Runtime rejects the file or the native library.
    """
    ort = import_onnxruntime()
    providers: list[Any] = [(CUDA, _OPTIONS)] if cuda else []
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
    except Exception as error:  # For example an ONNX Runtime older than the library's interface.
        raise BackendError(
            f"ONNX Runtime {ort.__version__} rejects the native library: {one_line(error)}",
            "Upgrade onnxruntime, or choose the portable kernels.",
        ) from error
    try:
        return ort.InferenceSession(source, options, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common base class but Exception.
        raise BackendError(f"ONNX Runtime rejects {origin}: {one_line(error)}", fix) from error
