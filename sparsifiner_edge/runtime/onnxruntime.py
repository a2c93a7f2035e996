"""ONNX Runtime as a backend: on the processor, and on an NVIDIA GPU by its CUDA provider.

On a GPU it is a fallback: sparse attention runs by the function bodies, and every array is copied from and to pageable
memory.
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
    BF16_TOLERANCE_FREE,
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
CUDA = "CUDAExecutionProvider"
_OPTIONS = {"device_id": 0, "use_tf32": 0}
"""TF32 keeps 10 bits of a float32 product: an fp32 bundle would not give its golden output any more."""
FALLBACK = "function bodies, not the CUDA kernels, with pageable copies"
"""What a GPU's provider runs of sparse attention, for people."""


def import_onnxruntime() -> Any:
    """The module `onnxruntime`; see `import_package`."""
    onnxruntime = import_package("onnxruntime", "onnxruntime", "cpu", "Reinstall onnxruntime.")
    if hasattr(onnxruntime, "disable_telemetry_events"):  # Whoever imported it before us may have left them on.
        onnxruntime.disable_telemetry_events()
    return onnxruntime


class OnnxRuntime(ProcessorBackend):
    """ONNX Runtime with the native library where it was built, or on a GPU.

    Linear layers compute in what the file stores. In bf16 attention does so, in the native library, which alone has it.
    """

    name = "onnxruntime"
    computes = ("auto", "bf16")

    def load(self) -> Any:
        """See `Backend.load`."""
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
                raise BackendError("The native kernels are the processor's.", "Leave --kernels out, or --provider.")
        elif self.execution.precision == "bf16":
            if self.execution.kernels == "portable":
                raise BackendError("Function bodies have no bfloat16.", "Leave --precision out.")
            native_library("native")  # Raises where it cannot be used.
            if not native.has_bfloat16():
                raise BackendError(f"{native.target()} has no bfloat16.", "Leave --precision out.")
        return ort

    def check(self, bundle: Bundle) -> None:
        """See `Backend.check`."""
        self.load()
        execution, manifest = self.execution, bundle.manifest
        if execution.precision != "bf16" or execution.provider != "cpu":
            require_precision(execution.precision, manifest.float_precision, "ONNX Runtime")
        elif not manifest.stream and not any(name.endswith("Attention") for name in manifest.ops):
            what = f"{bundle.folder / MODEL_FILE} has no attention that could run in bfloat16."
            raise BackendError(what, "Leave --precision out.")

    def open(self, bundle: Bundle) -> Session:
        """See `Backend.open`."""
        self.check(bundle)
        return super().open(bundle)

    def session(self, model: Path, content: bytes | str, stored: str | None = None) -> _OrtSession:
        """See `ProcessorBackend.session`. On a GPU, after CUDA has answered."""
        ort = self.load()
        if self.execution.provider == "cpu":
            return _OrtSession(model, content, self.execution, stored)
        device = probe()
        # ONNX Runtime prints what it misses and why it falls back, and standard output is for results.
        with contextlib.redirect_stdout(sys.stderr):
            if hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # CUDA and cuDNN from pip's packages are found by this alone.
            return _OrtSession(model, content, self.execution, stored, device)


class _OrtSession(Session):
    """A `Session` on ONNX Runtime; see `ProcessorBackend.session`. device: the CUDA device that runs it.

    Raises:
        BackendError: ONNX Runtime rejects the model, or would quietly run it on the CPU, or in another precision,
            instead of what was asked for.
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
        halves = execution.precision == "bf16" and on_cpu
        kernels = "native" if halves else execution.kernels if on_cpu else "portable"
        # The parsed file goes before ONNX Runtime reads it: memory is short on a board.
        file = read_file(content, model, kernels)[1]
        computed = "fp16" if file.float16 else "fp32"
        if not halves:
            require_precision(execution.precision, computed, "ONNX Runtime")
        bfloat16 = halves and any(name.endswith("Attention") for name in file.names)
        self.least_tolerance = BF16_TOLERANCE_FREE if bfloat16 else 0.0
        options = session_options(execution.cores, bfloat16)
        start = time.perf_counter_ns()
        session = inference_session(content, options, file.library, model, cuda=not on_cpu)
        running = [str(name) for name in session.get_providers()]
        if not on_cpu and running[:1] != [CUDA]:  # It says so on standard error alone.
            raise BackendError(
                f"{CUDA} does not start; ONNX Runtime would run the model on {', '.join(running)} instead.",
                "Its reason is in the lines above this one, often a CUDA or cuDNN that is missing or that it was not "
                'built for: pip install "onnxruntime-gpu[cuda,cudnn]". Or leave --provider out.',
            )
        self.load_ms = (time.perf_counter_ns() - start) / 1e6
        self.inputs, self.outputs = file.inputs, file.outputs
        self._session: Any = session
        text = file.text("bfloat16" if bfloat16 else None)
        text += "; bfloat16 in steps of a stream alone" * (halves and not bfloat16)
        if not on_cpu:
            text = FALLBACK if file.names else f"{text}, with pageable copies"
        precision = precision_text(stored, computed) + (", attention bf16" if bfloat16 else "")
        self.description = Runtime(
            backend=self.backend,
            version=str(import_onnxruntime().__version__),
            provider=running[0],
            device=str(device or "CPU"),
            precision=Unavailable("the bundle does not say") if stored is None else precision,
            kernels=text,
            threads=execution.cores,
        )

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        if self._session is None:
            raise self.closed_error()
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def close(self) -> None:
        """See `Session.close`."""
        super().close()
        self._session = None


def session_options(threads: int = 0, bfloat16: bool = False) -> Any:
    """ONNX Runtime's, for any session of ours: errors alone are logged, and int8 products are exact.

    AVX2, and AVX-512 without VNNI, add pairs of uint8 x int8 in 16 bits, which saturate. There weights become uint8
    (onnxruntime_session_options_config_keys.h, x64quantprecision), which takes longer: elsewhere too (ONNX Runtime
    1.32), for nothing.

    Args:
        threads: inside one operator; 0: as ONNX Runtime likes. bfloat16: the native library multiplies it in attention.
    """
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait for the next run take a core from whatever comes between, such as another session.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not has_int8_products():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if bfloat16:
        options.add_session_config_entry("sparsifiner.attention", "bfloat16")
    return options


def inference_session(
    source: bytes | str, options: Any, library: Path | None, origin: object, fix: str = AGAIN, cuda: bool = False
) -> Any:
    """ONNX Runtime's own session, the only place that makes one.

    Args:
        source: of the file: its content, or a path. origin: where it is from; fix: what to do where it is refused.
        options: of `session_options`; they serve one session. library: the native one, of `native_library`.
        cuda: on a GPU; ONNX Runtime puts the processor in its place where it does not start.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        BackendError: it refuses the file or the native library.
    """
    ort = import_onnxruntime()
    providers: list[Any] = [(CUDA, _OPTIONS)] if cuda else []
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
    except Exception as error:  # Such as an ONNX Runtime older than the library's interface.
        raise BackendError(
            f"ONNX Runtime {ort.__version__} rejects the native library: {one_line(error)}",
            "Upgrade onnxruntime, or choose the portable kernels.",
        ) from error
    try:
        return ort.InferenceSession(source, options, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base but Exception.
        raise BackendError(f"ONNX Runtime rejects {origin}: {one_line(error)}", fix) from error
