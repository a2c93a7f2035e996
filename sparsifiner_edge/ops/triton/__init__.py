"""CUDA kernels in Triton: KeySelect, SparseAttention, MatchTokens and MergeTokens, without gradients. Importing this
package needs neither Triton nor a GPU; `kernels_for` says what runs an operator, and why.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sparsifiner_edge.errors import BackendError, ConfigError, MissingExtraError
from sparsifiner_edge.ops.kernels import TRITON
from sparsifiner_edge.ops.operator import AttributeValue
from sparsifiner_edge.ops.triton.plan import refusals

VARIABLE = "SPARSIFINER_KERNELS"
"""Environment variable that forces a choice: "torch", or "triton" (an error where Triton's kernels cannot run)."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs an operator. name: "triton" or "torch". reasons: why it is not Triton; empty when it is."""

    name: str
    reasons: tuple[str, ...] = ()


def kernels_for(
    name: str, attributes: Mapping[str, AttributeValue], shapes: Sequence[Sequence[int]], qkv: Any
) -> Choice:
    """What runs an operator of `ops.torch` on tensors like these: Triton's kernels on a CUDA GPU where they can.

    Args:
        name, attributes: the operator, as in its schema. shapes: of its inputs, in order.
        qkv: the first input, for its device and element type.

    Raises:
        ConfigError: `SPARSIFINER_KERNELS` holds another word.
        MissingExtraError, BackendError: it says "triton", and they are not installed, or refuse.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "torch", "triton"):
        raise ConfigError(f"{VARIABLE} is {wanted!r}.", 'Set it to "torch" or "triton", or unset it.')
    if wanted == "torch":
        return Choice("torch", (f"{VARIABLE} is torch",))
    device = _device_refusals(qkv, forced=wanted == "triton")
    if device and not wanted:
        return Choice("torch", tuple(device))
    missing = TRITON.why_missing()
    if missing and wanted:
        raise MissingExtraError("triton", "triton")
    if missing:
        return Choice("torch", (f"triton {missing}",))
    reasons = tuple(device or _refusals(name, attributes, shapes, qkv))
    if reasons and wanted:
        raise BackendError(f"Triton's kernels cannot run {name}: {'; '.join(reasons)}.", f"Unset {VARIABLE}.")
    return Choice("torch", reasons) if reasons else Choice("triton")


def _device_refusals(qkv: Any, forced: bool) -> list[str]:
    """On a CPU only the interpreter runs, which is for tests: so only when asked for."""
    if qkv.device.type == TRITON.device or (forced and os.environ.get("TRITON_INTERPRET") == "1"):
        return []
    return [f"the tensors are on {qkv.device}, not on a CUDA GPU"]


def _refusals(
    name: str, attributes: Mapping[str, AttributeValue], shapes: Sequence[Sequence[int]], qkv: Any
) -> list[str]:
    from sparsifiner_edge.ops.triton.run import capability

    return refusals(name, attributes, shapes, str(qkv.dtype).removeprefix("torch."), capability(qkv.device))
