"""ONNX Runtime as a backend: on the processor, and on an NVIDIA GPU by its CUDA or its TensorRT provider.

On a GPU it is a fallback: sparse attention runs by the function bodies, and every array is copied from and to pageable
memory.
"""

from __future__ import annotations

import abc
import contextlib
import sys
from pathlib import Path
from typing import Any, ClassVar

from sparsifiner_edge.bundle.golden import check_golden
from sparsifiner_edge.bundle.manifest import MODEL_FILE, Manifest
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.machine import package_version
from sparsifiner_edge.ops import native
from sparsifiner_edge.runtime.backend import Backend, Option, cache_folder
from sparsifiner_edge.runtime.cuda import probe
from sparsifiner_edge.runtime.onnxruntime.session import ON_CPU, Execution, OrtSession, import_onnxruntime
from sparsifiner_edge.runtime.processor import ProcessorBackend, native_library


class OnnxRuntime(ProcessorBackend):
    """ONNX Runtime's CPU provider, with the native library where it was built."""

    name = ON_CPU.backend
    execution: ClassVar[Execution] = ON_CPU

    def load(self) -> Any:
        """See `Backend.load`."""
        return import_onnxruntime()

    def session(
        self, model: Path, content: bytes | str, threads: int, kernels: str, stored: str | None = None
    ) -> OrtSession:
        """See `ProcessorBackend.session`."""
        return OrtSession(model, content, threads, kernels, stored, self.execution)


class OnnxRuntimeBf16(OnnxRuntime):
    """The same with attention in bfloat16, which the native library alone has; linear layers are as stored."""

    name = "onnxruntime-bf16"
    execution = Execution(name, bfloat16=True)

    def load(self) -> Any:
        """See `Backend.load`."""
        native_library("native")
        if not native.has_bfloat16():
            raise BackendError(f"{native.target()} has no bfloat16.", "Choose onnxruntime.")
        return import_onnxruntime()

    def choose_kernels(self, bundle: Bundle, kernels: str) -> str:
        """See `Backend.choose_kernels`: the native ones, or none."""
        if kernels == "portable":
            raise BackendError("Function bodies have no bfloat16.", "Choose onnxruntime.")
        return super().choose_kernels(bundle, "native")

    def session(
        self, model: Path, content: bytes | str, threads: int, kernels: str, stored: str | None = None
    ) -> OrtSession:
        """See `ProcessorBackend.session`."""
        self.load()
        return super().session(model, content, threads, kernels, stored)


class GpuProvider(Backend):
    """A provider of a GPU. Attributes: provider: ONNX Runtime's name of it."""

    provider: ClassVar[str]

    @abc.abstractmethod
    def options(self, manifest: Manifest) -> dict[str, Option]:
        """Options of the provider for a bundle."""

    def load(self) -> Any:
        """The module `onnxruntime`, built with this provider; see `Backend.load`."""
        ort = import_onnxruntime()
        offered = ort.get_available_providers()
        if self.provider not in offered:
            gpu = package_version("onnxruntime-gpu")
            installed = f"onnxruntime-gpu {gpu}" if isinstance(gpu, str) else f"onnxruntime {ort.__version__}"
            raise BackendError(
                f"{installed} has no {self.provider}; it offers {', '.join(offered)}.",
                'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "sparsifiner-edge[gpu]" '
                "(the two packages overwrite one another; on a Jetson see docs/jetson.md).",
            )
        return ort

    def open(self, bundle: Bundle, threads: int, kernels: str) -> OrtSession:  # noqa: ARG002
        """A session after CUDA has answered; see `Backend.open`.

        Raises:
            BackendError: no such provider, no device, or the provider does not start.
        """
        ort = self.load()
        device = probe()
        execution = Execution(
            self.name,
            self.provider,
            self.options(bundle.manifest),
            f"{device.name} (compute capability {device.compute_capability})",
        )
        # ONNX Runtime prints what it misses and why it falls back, and standard output is for results.
        with contextlib.redirect_stdout(sys.stderr):
            if hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # CUDA and cuDNN from pip's packages are found by this alone.
            with bundle.sealed_copy(MODEL_FILE) as copy:
                path, precision = bundle.folder / MODEL_FILE, bundle.manifest.precision
                return OrtSession(path, copy, threads, "portable", precision, execution)


class OnnxRuntimeCuda(GpuProvider):
    """ONNX Runtime's CUDA provider."""

    name, provider = "onnxruntime-cuda", "CUDAExecutionProvider"

    def options(self, manifest: Manifest) -> dict[str, Option]:  # noqa: ARG002
        """TF32 keeps 10 bits of a float32 product: an fp32 bundle would not give its golden output any more."""
        return {"device_id": 0, "use_tf32": 0}


class OnnxRuntimeTensorRt(GpuProvider):
    """ONNX Runtime's TensorRT provider. It keeps its engines between runs."""

    name, provider = "onnxruntime-tensorrt", "TensorrtExecutionProvider"

    def options(self, manifest: Manifest) -> dict[str, Option]:
        """Engines and times are kept per model. Types are those of the file: ONNX Runtime types a network strongly
        where neither `trt_fp16_enable` nor `trt_int8_enable` is set, and has no option that asks for it.
        """
        cache = cache_folder() / self.name / manifest.files[MODEL_FILE][:16]
        return {
            "device_id": 0,
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(cache),
        }

    def open(self, bundle: Bundle, threads: int, kernels: str) -> OrtSession:
        """A session whose engine has given the golden output: TensorRT builds it here, by kernels of its own choice.

        Raises:
            BackendError: see `GpuProvider.open`.
            ArtifactError, GateError: see `check_golden`.
        """
        session = super().open(bundle, threads, kernels)
        try:
            check_golden(session, bundle)
        except BaseException:
            session.close()
            raise
        return session
