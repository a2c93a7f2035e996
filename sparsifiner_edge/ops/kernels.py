"""The kernels that there are: which operators they run, on what, and why not here.

What no kernel takes runs by the function body in the file, or in PyTorch. ONNX Runtime and OpenVINO take the native
ones (`runtime.backend.native_library`), PyTorch those in Triton (`ops.triton.kernels_for`), and TensorRT those
in Triton that export compiled into the bundle, where they are the fastest (`runtime.build`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from typing import NamedTuple

from sparsifiner_edge.ops import native


class Kernels(NamedTuple):
    """An implementation of operators.

    Attributes:
        operators: those that it has.
        device: "cpu" or "cuda".
        dtypes: element types that it takes; sizes have limits of their own, see `ops.triton.plan.refusals`.
        why_missing: why it cannot run in this process, to be put after its name; None where it can.
    """

    operators: tuple[str, ...]
    device: str
    dtypes: tuple[str, ...]
    why_missing: Callable[[], str | None]


def _triton_missing() -> str | None:
    return "is not installed" if importlib.util.find_spec("triton") is None else None


NATIVE = Kernels(
    ("KeySelect", "SparseAttention", "DenseAttention", "MatchTokens", "MergeTokens"),
    "cpu",
    ("float32",),
    native.why_unusable,
)
TRITON = Kernels(
    ("KeySelect", "SparseAttention", "MatchTokens", "MergeTokens"),
    "cuda",
    ("float16", "bfloat16"),
    _triton_missing,
)


def described(
    operators: Collection[str], native_library: bool, reason: str | None = None, precision: str | None = None
) -> str:
    """What runs a model's `sparsifiner` operators on the processor, for people.

    Args:
        native_library: it is registered. reason: why it is not, where that was expected.
        precision: of attention in the native library, where that is worth a word.
    """
    native_ones = set(operators) & set(NATIVE.operators) if native_library else set()
    bodies = sorted(set(operators) - native_ones)
    if not operators:
        return "none (standard operators)"
    if not native_ones:
        return "function bodies" if reason is None else f"function bodies (the native library {reason})"
    rest = f"; function bodies: {', '.join(bodies)}" if bodies else ""
    how = f", attention in {precision}" if precision else ""
    return f"native, {native.target()}{how}{rest}"
