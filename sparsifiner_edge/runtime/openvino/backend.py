"""OpenVINO as a backend: on the processor, with the native library's operators as Python ops in its graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsifiner_edge.runtime.openvino.session import OpenVinoSession, import_openvino
from sparsifiner_edge.runtime.processor import ProcessorBackend


class OpenVino(ProcessorBackend):
    """OpenVINO's CPU plugin, on all that is not int8 in float32, or in bf16 or fp16 where the processor has them."""

    name = "openvino"
    computes = ("auto", "bf16", "fp16")

    def load(self) -> Any:
        """See `Backend.load`."""
        return import_openvino(self.execution.precision)

    def session(self, model: Path, content: bytes | str, stored: str | None = None) -> OpenVinoSession:
        """See `ProcessorBackend.session`."""
        content = content if isinstance(content, bytes) else Path(content).read_bytes()
        return OpenVinoSession(model, content, self.execution, stored)
