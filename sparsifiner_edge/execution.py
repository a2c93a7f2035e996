"""How a bundle is run, as every command and function that runs one takes it: backend, precision, kernels, threads."""

from __future__ import annotations

import msgspec

from sparsifiner_edge.machine import available_cores

ON_PROCESSOR = ("onnxruntime", "openvino")
"""Backends (`runtime.open.BACKENDS`) that run the file itself on the processor."""
KERNEL_CHOICES = ("auto", "native", "portable")
"""What runs the operators of the domain `sparsifiner`: the native library if it was built, only it, or the bodies. For
an engine: the fastest, the CUDA kernels, or the bodies."""
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
"""What everything but int8, which stays int8, is computed in; auto: see `Execution`."""
STORED_PRECISIONS = ("fp32", "fp16", "int8")
"""What a file may store its weights in; int8: of the linear layers."""
INT8_TARGETS = ("cpu", "tensorrt")
"""cpu: uint8 activations, int8 weights per channel (ONNX Runtime). tensorrt: both int8 and symmetric, zero point 0;
`export_bundle` makes the rest of that file float16 afterwards (`export.fp16`), as GPUs have it."""
PROVIDERS = ("cpu", "cuda")
"""Of ONNX Runtime: what it runs on, and by whose kernels."""


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """How to run a bundle.

    Attributes:
        backend: "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", or another package's; "auto": what the bundle
            is intended for, else the first that runs here of an engine in it, ONNX Runtime and OpenVINO.
        precision: what is computed in: "fp32", "bf16", "fp16"; "auto": intended with the backend, else as stored.
        provider: of ONNX Runtime: "cpu" or "cuda".
        kernels: "auto", "native" (the library, or an error) or "portable" (bodies of standard operators); a session's
            `description` says what runs.
        threads: inside one operator; None takes the cores that this process may run on.

    Example:
        >>> Execution(backend="openvino", precision="bf16", threads=2).cores
        2
    """

    backend: str = "auto"
    precision: str = "auto"
    provider: str = "cpu"
    kernels: str = "auto"
    threads: int | None = None

    def __str__(self) -> str:
        return self.backend if self.precision == "auto" else f"{self.backend} in {self.precision}"

    @property
    def cores(self) -> int:
        """How many threads that is here."""
        return self.threads or available_cores()

    @property
    def on_processor(self) -> bool:
        """Whether a backend of ours computes on the processor; another package's counts as a GPU's."""
        return self.backend in ON_PROCESSOR and self.provider == "cpu"


def execution_of(choice: Execution | str | None) -> Execution:
    """The `Execution` that a caller means: as given, of a backend's name, or the default for None."""
    return choice if isinstance(choice, Execution) else Execution() if choice is None else Execution(backend=choice)


def precision_text(stored: str | None, computed: str) -> str:
    """What a file stores and what it is computed in, for people: "fp32", "int8, rest bf16", "fp32, run in bf16"."""
    if stored == "int8":
        return f"int8, rest {computed}"
    return computed if stored in (None, computed) else f"{stored}, run in {computed}"
