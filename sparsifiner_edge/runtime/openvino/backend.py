"""OpenVINO as a backend: on the processor, with the native library's operators as Python ops in its graph."""

from __future__ import annotations

from typing import Any

from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.ops.kernels import NATIVE
from sparsifiner_edge.runtime.backend import Backend
from sparsifiner_edge.runtime.onnxruntime.session import native_library, why_portable
from sparsifiner_edge.runtime.openvino.session import OpenVinoSession, import_openvino


class OpenVino(Backend):
    """OpenVINO's CPU plugin."""

    name = OpenVinoSession.backend

    def load(self) -> Any:
        """See `Backend.load`."""
        return import_openvino()

    def choose_kernels(self, bundle: Bundle, kernels: str) -> str:
        """See `Backend.choose_kernels`: a file of a type that the native kernels do not take runs by its bodies."""
        if bundle.manifest.float16 is None or "float16" in NATIVE.dtypes:
            return kernels
        if kernels == "native":
            raise BackendError("The native kernels take no float16.", "Choose auto or portable, or export fp32.")
        return "portable"

    def open(self, bundle: Bundle, threads: int, kernels: str) -> OpenVinoSession:
        """See `Backend.open`."""
        with bundle.sealed_copy(MODEL_FILE) as copy:
            content = copy if isinstance(copy, bytes) else open(copy, "rb").read()
        return OpenVinoSession(
            bundle.folder / MODEL_FILE,
            content,
            threads,
            native_library(kernels) is not None,
            why_portable(kernels) if kernels == "auto" else None,
            "fp32",
            bundle.manifest.precision,
        )
