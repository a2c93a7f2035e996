"""The kernels that there are: which operators they run, and how that is said.

What no kernel takes runs by the function body in the file, or in PyTorch. ONNX Runtime and OpenVINO take the native
ones (`runtime.backend.native_library`), PyTorch those in Triton (`ops.triton.why_not_triton`) or on request the native
ones (`ops.torch_native`), and TensorRT those in Triton that export compiled into the bundle, where they are the fastest
(`runtime.build`).
"""

from __future__ import annotations

from collections.abc import Collection

from sparsifiner_edge.ops import native

NATIVE = ("KeySelect", "SparseAttention", "DenseAttention", "CachedAttention", "MatchTokens", "MergeTokens")
"""Operators of the native kernels: of float32, on the processor."""
TRITON = ("KeySelect", "SparseAttention", "MatchTokens", "MergeTokens")
"""Operators of the kernels in Triton, on a CUDA GPU; for limits of sizes see `ops.triton.schedule.refusals`."""
LACKING = "function bodies (the native library "
"""How `describe` begins where bodies run only because the library cannot be used; its reason follows."""
TRITON_TYPES = ("float16", "bfloat16")


def describe(
    operators: Collection[str], native_library: bool, reason: str | None = None, precision: str | None = None
) -> str:
    """What runs a model's `sparsifiner` operators on the processor, for people.

    Args:
        native_library: it is registered. reason: why it is not, where that was expected.
        precision: of attention in the native library, where that is worth a word.
    """
    native_ones = set(operators) & set(NATIVE) if native_library else set()
    bodies = sorted(set(operators) - native_ones)
    if not operators:
        return "none (standard operators)"
    if not native_ones:
        return "function bodies" if reason is None else f"{LACKING}{reason})"
    rest = f"; function bodies: {', '.join(bodies)}" if bodies else ""
    how = f", attention in {precision}" if precision else ""
    return f"native, {native.target()}{how}{rest}"
