"""ONNX Runtime as a backend: on the processor, and on an NVIDIA GPU by its CUDA provider.

On a GPU it is a fallback: sparse attention runs by the function bodies, and every array is copied from and to pageable
memory.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.machine import package_version
from sparsifiner_edge.ops import native
from sparsifiner_edge.runtime.backend import refuse_native
from sparsifiner_edge.runtime.cuda import probe
from sparsifiner_edge.runtime.onnxruntime.session import OrtSession, Provider, import_onnxruntime
from sparsifiner_edge.runtime.processor import ProcessorBackend, native_library
from sparsifiner_edge.runtime.session import Session

CUDA = "CUDAExecutionProvider"
_OPTIONS = {"device_id": 0, "use_tf32": 0}
"""TF32 keeps 10 bits of a float32 product: an fp32 bundle would not give its golden output any more."""


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
            _require_cuda(ort)
        elif self.execution.precision == "bf16":
            native_library("native")
            if not native.has_bfloat16():
                raise BackendError(f"{native.target()} has no bfloat16.", "Leave --precision out.")
        return ort

    def session(self, model: Path, content: bytes | str, stored: str | None = None) -> OrtSession:
        """See `ProcessorBackend.session`."""
        self.load()
        return OrtSession(model, content, self.execution, stored)

    def open(self, bundle: Bundle) -> Session:
        """See `Backend.open`. On a GPU, after CUDA has answered.

        Raises:
            BackendError: no such provider, no device, or the provider does not start.
        """
        if self.execution.provider == "cpu":
            return super().open(bundle)
        refuse_native(self.execution.kernels)
        ort, device = self.load(), probe()
        provider = Provider(CUDA, _OPTIONS, f"{device.name} (compute capability {device.compute_capability})")
        # ONNX Runtime prints what it misses and why it falls back, and standard output is for results.
        with contextlib.redirect_stdout(sys.stderr):
            if hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # CUDA and cuDNN from pip's packages are found by this alone.
            with bundle.sealed_copy(MODEL_FILE) as copy:
                path, stored = bundle.folder / MODEL_FILE, bundle.manifest.precision
                return OrtSession(path, copy, self.execution, stored, provider)


def _require_cuda(ort: Any) -> None:
    """Refuse a build without the provider; see `Backend.load`."""
    offered = ort.get_available_providers()
    if CUDA not in offered:
        gpu = package_version("onnxruntime-gpu")
        installed = f"onnxruntime-gpu {gpu}" if isinstance(gpu, str) else f"onnxruntime {ort.__version__}"
        raise BackendError(
            f"{installed} has no {CUDA}; it offers {', '.join(offered)}.",
            'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "sparsifiner-edge[gpu]" '
            "(the two packages overwrite one another; on a Jetson see docs/jetson.md).",
        )
