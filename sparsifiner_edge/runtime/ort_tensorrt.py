"""ONNX Runtime's TensorRT provider, as the backend "onnxruntime-tensorrt". It keeps its engines between runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.manifest import MODEL_FILE, Manifest
from sparsifiner_edge.runtime.cache import cache_folder
from sparsifiner_edge.runtime.ort import OrtSession
from sparsifiner_edge.runtime.ort_gpu import open_gpu, refuse_build, require_provider

BACKEND, PROVIDER = "onnxruntime-tensorrt", "TensorrtExecutionProvider"


def load_backend() -> Any:
    """The module `onnxruntime`, built with this provider; see `ort_gpu.require_provider`."""
    return require_provider(PROVIDER)


def options(manifest: Manifest) -> dict[str, Any]:
    """Options of the provider: engines and times are kept per model, and types are those of the file."""
    cache = cache_folder() / BACKEND / manifest.files[MODEL_FILE][:16]
    return {
        "device_id": 0,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(cache),
        # These allow the types that the file has; a file in float32 stays in float32.
        "trt_fp16_enable": manifest.precision == "fp16",
        "trt_int8_enable": manifest.precision == "int8",
    }


def open_model(folder: Path, manifest: Manifest, threads: int, _kernels: str) -> OrtSession:
    """Load `model.onnx` of a checked bundle; see `open_session` and `ort_gpu.open_gpu`."""
    return open_gpu(BACKEND, PROVIDER, options(manifest), folder, manifest, threads)


def plan(_request: Any) -> Any:
    """See `build.EngineBackend`: there is nothing to build."""
    refuse_build(BACKEND)
