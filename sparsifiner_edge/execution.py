"""Settings for running a bundle: backend, compute precision, kernels, threads. All commands and functions use them."""

from __future__ import annotations

import msgspec

from sparsifiner_edge.machine import available_cores

ON_PROCESSOR = ("onnxruntime", "openvino")
"""Backends (`runtime.open.BACKENDS`) that run the ONNX file on the CPU."""
KERNEL_CHOICES = ("auto", "native", "portable")
"""Implementations of the custom operators.

"auto" takes the native library if it was built, "native" requires it, "portable" runs the ONNX function bodies. For an
engine, these are the fastest implementation, the CUDA kernels and the function bodies.
"""
COMPUTE_PRECISIONS = ("auto", "fp32", "bf16", "fp16")
"""Arithmetic of everything that is not int8. See `Execution` for "auto"."""
WEIGHT_PRECISIONS = ("fp32", "fp16", "int8")
"""Types in which a file stores its weights; int8 is for the linear layers."""
INT8_TARGETS = ("cpu", "tensorrt")
"""Kinds of int8 files.

"cpu" has uint8 activations and int8 weights per channel (ONNX Runtime, OpenVINO). "tensorrt" has symmetric int8 for
both (zero point 0); `export_bundle` converts the rest of that file to float16 (`export.fp16`), which suits GPUs.
"""
PROVIDERS = ("cpu", "cuda")
"""Execution providers of ONNX Runtime."""


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """Settings for running a bundle.

    Attributes:
        backend: "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx" or a plugin's; "auto" takes the backend that the
            bundle was optimized for, else the first that works: an engine in the bundle, ONNX Runtime, OpenVINO.
        compute_precision: Arithmetic of everything that is not int8: "fp32", "bf16", "fp16"; "auto" takes the precision
            that the bundle was optimized for, else the weight precision.
        provider: ONNX Runtime's execution provider, "cpu" or "cuda".
        kernels: "auto", "native" (the library, or an error) or "portable" (ONNX function bodies). A session's
            `description` reports what runs.
        threads: Threads inside one operator; None takes the cores that this process may use.

    Example:
        >>> Execution(backend="openvino", compute_precision="bf16", threads=2).cores
        2
    """

    backend: str = "auto"
    compute_precision: str = "auto"
    provider: str = "cpu"
    kernels: str = "auto"
    threads: int | None = None

    def __str__(self) -> str:
        return self.backend if self.compute_precision == "auto" else f"{self.backend} in {self.compute_precision}"

    @property
    def cores(self) -> int:
        """Number of threads on this machine."""
        return self.threads or available_cores()

    @property
    def on_processor(self) -> bool:
        """True if a backend of this package computes on the CPU. A plugin's backend counts as a GPU's."""
        return self.backend in ON_PROCESSOR and self.provider == "cpu"


def execution_of(choice: Execution | str | None) -> Execution:
    """Return an `Execution` from an `Execution`, the name of a backend, or None for the default."""
    return choice if isinstance(choice, Execution) else Execution() if choice is None else Execution(backend=choice)


def precision_text(stored: str | None, computed: str) -> str:
    """Describe weight and compute precision: "fp32", "int8, rest bf16", "fp32, run in bf16"."""
    if stored == "int8":
        return f"int8, rest {computed}"
    return computed if stored in (None, computed) else f"{stored}, run in {computed}"
