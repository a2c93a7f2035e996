"""Operators that have native or Triton kernels, and the description of the kernels in use.

An operator without a kernel runs as the function body in the model file, or in PyTorch. The kernels are used by:

- ONNX Runtime and OpenVINO: the native kernels (`runtime.backend.native_library`).
- PyTorch: the Triton kernels (`ops.triton.why_not_triton`), or the native kernels on request (`ops.torch_native`).
- TensorRT: the Triton kernels that the export compiled into the bundle, where they are the fastest (`runtime.build`).
"""

from __future__ import annotations

from collections.abc import Collection

from sparsifiner_edge.ops import native

NATIVE = ("KeySelect", "SparseAttention", "DenseAttention", "CachedAttention", "MatchTokens", "MergeTokens")
"""Operators that have native kernels (float32, on the CPU)."""
TRITON = ("KeySelect", "SparseAttention", "MatchTokens", "MergeTokens")
"""Operators that have Triton kernels (CUDA GPUs); `ops.triton.schedule.refusals` checks the size limits."""
FROM_PYTHON = "called from Python"
"""Part of the description if OpenVINO calls the operators from Python, which is slower."""
REBUILD = 'Compile them for this OpenVINO: run `pip install --force-reinstall --no-deps ".[openvino]"` in a checkout.'
"""Fix for operators that OpenVINO calls from Python."""
LACKING = "function bodies (the native library "
"""Start of the description if function bodies run because the native library is unusable; the reason follows."""
TRITON_TYPES = ("float16", "bfloat16")
"""Element types that the Triton kernels support."""


def describe(
    operators: Collection[str], native_library: bool, reason: str | None = None, precision: str | None = None
) -> str:
    """Describe the kernels that run a model's `sparsifiner` operators on the CPU, for display.

    Args:
        operators: Names of the operators in the model.
        native_library: True if the native library is registered.
        reason: Reason why the native library is not registered although it was expected.
        precision: Precision of attention in the native library; None leaves it out.

    Returns:
        For example "native, AVX2; function bodies: LandmarkKeySelect".
    """
    in_library = set(operators) & set(NATIVE) if native_library else set()
    bodies = sorted(set(operators) - in_library)
    if not operators:
        return "none (standard operators)"
    if not in_library:
        return "function bodies" if reason is None else f"{LACKING}{reason})"
    rest = f"; function bodies: {', '.join(bodies)}" if bodies else ""
    attention = f", attention in {precision}" if precision else ""
    return f"native, {native.target()}{attention}{rest}"
