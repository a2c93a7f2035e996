"""OpenVINO as a backend: on the processor, with the native library's operators as Python ops in its graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from sparsifiner_edge.runtime.openvino.session import OpenVinoSession, import_openvino
from sparsifiner_edge.runtime.processor import ProcessorBackend, native_library, why_portable


class OpenVino(ProcessorBackend):
    """OpenVINO's CPU plugin. Attributes: precision: of the linear layers; the rest, and int8 layers, are as stored."""

    name = "openvino"
    precision: ClassVar[str] = "fp32"

    def load(self) -> Any:
        """See `Backend.load`."""
        return import_openvino(self.precision)

    def session(
        self, model: Path, content: bytes | str, threads: int, kernels: str, stored: str | None = None
    ) -> OpenVinoSession:
        """See `ProcessorBackend.session`."""
        content = content if isinstance(content, bytes) else Path(content).read_bytes()
        why = why_portable(kernels) if kernels == "auto" else None
        native = native_library(kernels) is not None
        return OpenVinoSession(self.name, model, content, threads, native, why, self.precision, stored)


class OpenVinoBf16(OpenVino):
    """The same in bfloat16, on processors that have it: AVX-512 BF16, AMX, Arm's BF16."""

    name, precision = "openvino-bf16", "bf16"


class OpenVinoFp16(OpenVino):
    """The same in float16, on processors that have it: AMX-FP16, Arm's FP16."""

    name, precision = "openvino-fp16", "fp16"
