"""CUDA kernels in Triton, without gradients: a layer of KeySelect and SparseAttention, MatchTokens and MergeTokens.
Importing this package needs neither Triton nor a GPU; `kernels_for` says what runs an operator, and why.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sparsifiner_edge.ops.kernels import TRITON
from sparsifiner_edge.ops.operator import AttributeValue
from sparsifiner_edge.ops.triton.plan import refusals


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs an operator. name: "triton" or "torch". reasons: why it is not Triton; empty when it is."""

    name: str
    reasons: tuple[str, ...] = ()


def kernels_for(
    name: str, attributes: Mapping[str, AttributeValue], shapes: Sequence[Sequence[int]], qkv: Any
) -> Choice:
    """What runs an operator of `ops.torch` on tensors like these: Triton's kernels on a CUDA GPU where they can. (On a
    processor they run in Triton's interpreter, where `TRITON_INTERPRET` is 1: for tests.)

    Args:
        name, attributes: the operator, as in its schema; KeySelect stands for its layer.
        shapes: of its inputs, in order. qkv: the first input, for its device and element type.
    """
    if qkv.device.type != TRITON.device and os.environ.get("TRITON_INTERPRET") != "1":
        return Choice("torch", (f"the tensors are on {qkv.device}, not on a CUDA GPU",))
    missing = TRITON.why_missing()
    if missing:
        return Choice("torch", (f"triton {missing}",))
    from sparsifiner_edge.ops.triton.run import capability

    element = str(qkv.dtype).removeprefix("torch.")
    reasons = refusals(name, attributes, shapes, element, capability(qkv.device))
    return Choice("torch", tuple(reasons)) if reasons else Choice("triton")
