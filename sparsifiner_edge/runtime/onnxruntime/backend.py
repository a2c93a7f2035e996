"""ONNX Runtime as a backend: on the processor, and on an NVIDIA GPU by its CUDA or its TensorRT provider.

On a GPU it is a fallback: sparse attention runs by the function bodies, and every array is copied from and to pageable
memory.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.golden import check_golden
from sparsifiner_edge.bundle.manifest import MODEL_FILE, Manifest
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.machine import package_version
from sparsifiner_edge.ops import native
from sparsifiner_edge.runtime.backend import Option, cache_folder, refuse_native
from sparsifiner_edge.runtime.cuda import probe
from sparsifiner_edge.runtime.onnxruntime.session import OrtSession, Provider, import_onnxruntime
from sparsifiner_edge.runtime.processor import ProcessorBackend, native_library
from sparsifiner_edge.runtime.session import Session

GPU_PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""`execution.PROVIDERS` that need a GPU -> ONNX Runtime's names of them."""


class OnnxRuntime(ProcessorBackend):
    """ONNX Runtime with the native library where it was built, or on a GPU.

    Linear layers compute in what the file stores. In bf16 attention does so, in the native library, which alone has it.
    """

    name = "onnxruntime"
    computes = ("auto", "bf16")

    def load(self) -> Any:
        """See `Backend.load`."""
        provider = self.execution.provider
        if provider != "cpu":
            return _import_with(GPU_PROVIDERS[provider])
        if self.execution.precision == "bf16":
            native_library("native")
            if not native.has_bfloat16():
                raise BackendError(f"{native.target()} has no bfloat16.", "Leave --precision out.")
        return import_onnxruntime()

    def session(self, model: Path, content: bytes | str, stored: str | None = None) -> OrtSession:
        """See `ProcessorBackend.session`."""
        self.load()
        return OrtSession(model, content, self.execution, stored)

    def open(self, bundle: Bundle) -> Session:
        """See `Backend.open`. On a GPU, after CUDA has answered.

        Raises:
            BackendError: no such provider, no device, or the provider does not start.
            ArtifactError, GateError: see `check_golden`; TensorRT builds its engine here, by kernels of its own choice.
        """
        if self.execution.provider == "cpu":
            return super().open(bundle)
        session = self._on_gpu(bundle)
        if self.execution.provider == "tensorrt":
            try:
                check_golden(session, bundle)
            except BaseException:
                session.close()
                raise
        return session

    def _on_gpu(self, bundle: Bundle) -> OrtSession:
        refuse_native(self.execution.kernels)
        ort, device = self.load(), probe()
        provider = Provider(
            GPU_PROVIDERS[self.execution.provider],
            _gpu_options(self.execution.provider, bundle.manifest),
            f"{device.name} (compute capability {device.compute_capability})",
        )
        # ONNX Runtime prints what it misses and why it falls back, and standard output is for results.
        with contextlib.redirect_stdout(sys.stderr):
            if hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # CUDA and cuDNN from pip's packages are found by this alone.
            with bundle.sealed_copy(MODEL_FILE) as copy:
                path, stored = bundle.folder / MODEL_FILE, bundle.manifest.precision
                return OrtSession(path, copy, self.execution, stored, provider)


def _import_with(provider: str) -> Any:
    """The module `onnxruntime`, built with a provider; see `Backend.load`."""
    ort = import_onnxruntime()
    offered = ort.get_available_providers()
    if provider not in offered:
        gpu = package_version("onnxruntime-gpu")
        installed = f"onnxruntime-gpu {gpu}" if isinstance(gpu, str) else f"onnxruntime {ort.__version__}"
        raise BackendError(
            f"{installed} has no {provider}; it offers {', '.join(offered)}.",
            'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "sparsifiner-edge[gpu]" '
            "(the two packages overwrite one another; on a Jetson see docs/jetson.md).",
        )
    return ort


def _gpu_options(provider: str, manifest: Manifest) -> dict[str, Option]:
    """Of a provider for a bundle, so that products are of the file's types.

    TF32 keeps 10 bits of a float32 product: an fp32 bundle would not give its golden output any more. TensorRT types a
    network strongly where neither `trt_fp16_enable` nor `trt_int8_enable` is set; no option asks for it. Its engines
    and times are kept per model.
    """
    if provider == "cuda":
        return {"device_id": 0, "use_tf32": 0}
    cache = cache_folder() / f"onnxruntime-{provider}" / manifest.files[MODEL_FILE][:16]
    return {
        "device_id": 0,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(cache),
    }
