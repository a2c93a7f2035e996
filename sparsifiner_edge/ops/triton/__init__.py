"""CUDA kernels in Triton, without gradients: KeySelect with SparseAttention as one layer, MatchTokens and MergeTokens.

Importing this package requires neither Triton nor a GPU. `why_not_triton` returns the reasons why an operator cannot
run with these kernels.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from sparsifiner_edge.ops.operator import Attributes
from sparsifiner_edge.ops.triton.schedule import refusals


def why_not_triton(name: str, attributes: Attributes, shapes: Sequence[Sequence[int]], qkv: Any) -> list[str]:
    """Return the reasons why the Triton kernels cannot run an operator, or an empty list if they can.

    The kernels require a CUDA GPU. For tests, they also run on the CPU in Triton's interpreter if the environment
    variable `TRITON_INTERPRET` is 1.

    Args:
        name: Name of the operator; KeySelect stands for the layer of KeySelect and SparseAttention.
        attributes: Attributes of the operator.
        shapes: Shapes of the inputs, in the order of the schema.
        qkv: First input, which determines the device and the element type.
    """
    if qkv.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return [f"the tensors are on {qkv.device}, not on a CUDA GPU"]
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed"]
    from sparsifiner_edge.ops.triton.run import capability

    element = str(qkv.dtype).removeprefix("torch.")
    return refusals(name, attributes, shapes, element, capability(qkv.device))
