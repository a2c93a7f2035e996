"""ONNX Runtime on the processor."""

from __future__ import annotations

from typing import Any

from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.ops.kernels import NATIVE
from sparsifiner_edge.runtime.backend import Backend
from sparsifiner_edge.runtime.onnxruntime.session import CPU, OrtSession, load_backend


class OnnxRuntime(Backend):
    """ONNX Runtime's CPU provider, with the native library where it was built."""

    name = CPU.backend

    def load(self) -> Any:
        """See `Backend.load`."""
        return load_backend()

    def choose_kernels(self, bundle: Bundle, kernels: str) -> str:
        """See `Backend.choose_kernels`: a file of a type that the native kernels do not take runs by its bodies."""
        if bundle.manifest.float16 is None or "float16" in NATIVE.dtypes:
            return kernels
        if kernels == "native":
            raise BackendError("The native kernels take no float16.", "Choose auto or portable, or export fp32.")
        return "portable"

    def open(self, bundle: Bundle, threads: int, kernels: str) -> OrtSession:
        """See `Backend.open`."""
        with bundle.sealed_copy(MODEL_FILE) as copy:
            return OrtSession(bundle.folder / MODEL_FILE, copy, threads, kernels, bundle.manifest.precision)
