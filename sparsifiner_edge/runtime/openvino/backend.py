"""OpenVINO as a backend: on the processor, with the native library's operators as Python ops in its graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.ops.kernels import NATIVE
from sparsifiner_edge.runtime.backend import Backend
from sparsifiner_edge.runtime.onnxruntime.session import native_library, why_portable
from sparsifiner_edge.runtime.openvino.session import OpenVinoSession, import_openvino


class OpenVino(Backend):
    """OpenVINO's CPU plugin. Attributes: precision: of the linear layers; the rest, and int8 layers, are as stored."""

    name = "openvino"
    on_processor = True
    precision: ClassVar[str] = "fp32"

    def load(self) -> Any:
        """See `Backend.load`."""
        return import_openvino(self.precision)

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
            content = Path(copy).read_bytes()
        return OpenVinoSession(
            self.name,
            bundle.folder / MODEL_FILE,
            content,
            threads,
            native_library(kernels) is not None,
            why_portable(kernels) if kernels == "auto" else None,
            self.precision,
            bundle.manifest.precision,
        )


class OpenVinoBf16(OpenVino):
    """The same in bfloat16, on processors that have it: AVX-512 BF16, AMX, Arm's BF16."""

    name, precision = "openvino-bf16", "bf16"


class OpenVinoFp16(OpenVino):
    """The same in float16, on processors that have it: AMX-FP16, Arm's FP16."""

    name, precision = "openvino-fp16", "fp16"
