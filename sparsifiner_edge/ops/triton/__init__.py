"""CUDA kernels in Triton, without gradients: a layer of KeySelect and SparseAttention, MatchTokens and MergeTokens.
Importing this package needs neither Triton nor a GPU; `why_not_triton` says what runs an operator, and why.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from sparsifiner_edge.ops.operator import Attributes
from sparsifiner_edge.ops.triton.schedule import refusals


def why_not_triton(name: str, attributes: Attributes, shapes: Sequence[Sequence[int]], qkv: Any) -> list[str]:
    """Why Triton's kernels do not run an operator of `ops.torch` on tensors like these; empty where they do, on a CUDA
    GPU. (On a processor they run in Triton's interpreter, where `TRITON_INTERPRET` is 1: for tests.)

    Args:
        name, attributes: the operator, as in its schema; KeySelect stands for its layer.
        shapes: of its inputs, in order. qkv: the first input, for its device and element type.
    """
    if qkv.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return [f"the tensors are on {qkv.device}, not on a CUDA GPU"]
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed"]
    from sparsifiner_edge.ops.triton.run import capability

    element = str(qkv.dtype).removeprefix("torch.")
    return refusals(name, attributes, shapes, element, capability(qkv.device))
