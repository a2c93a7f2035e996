"""ONNX Runtime's CUDA provider, as the backend "onnxruntime-cuda"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.runtime.ort import OrtSession
from sparsifiner_edge.runtime.ort_gpu import open_gpu, refuse_build, require_provider

BACKEND, PROVIDER = "onnxruntime-cuda", "CUDAExecutionProvider"
OPTIONS: Mapping[str, Any] = {"device_id": 0, "use_tf32": 0}
"""TF32 keeps 10 bits of a float32 product: an fp32 bundle would not give its golden output any more."""


def load_backend() -> Any:
    """The module `onnxruntime`, built with this provider; see `ort_gpu.require_provider`."""
    return require_provider(PROVIDER)


def open_model(folder: Path, manifest: Manifest, threads: int, _kernels: str) -> OrtSession:
    """Load `model.onnx` of a checked bundle; see `open_session` and `ort_gpu.open_gpu`."""
    return open_gpu(BACKEND, PROVIDER, OPTIONS, folder, manifest, threads)


def plan(_request: Any) -> Any:
    """See `build.EngineBackend`: there is nothing to build."""
    refuse_build(BACKEND)
