"""Dispatch of the PyTorch operators to Triton kernels on a CUDA GPU.

The kernels run where possible; `ops.triton.why_not_triton` returns the reasons if not. They have no backward pass, so
PyTorch runs wherever a gradient may be needed.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from sparsifiner_edge.ops.operator import Attributes
from sparsifiner_edge.ops.torch_native import within_native_kernels
from sparsifiner_edge.ops.triton import why_not_triton


def triton_result(name: str, attributes: Attributes, *inputs: Tensor | None) -> Tensor | None:
    """Run MatchTokens or MergeTokens with the Triton kernels.

    KeySelect and SparseAttention run together as one layer; see `triton_layer`.

    Args:
        name: Name of the operator.
        attributes: Attributes of the operator.
        *inputs: Inputs in the order of the schema.

    Returns:
        The output, or None if PyTorch must run the operator.
    """
    if name not in ("MatchTokens", "MergeTokens"):
        return None
    x, sizes, *pairs = cast(list[Tensor], inputs)
    if not _runs(name, attributes, x, *pairs) or (name == "MergeTokens" and _needs_gradient(x)):
        return None
    from sparsifiner_edge.ops.triton.run import run
    from sparsifiner_edge.ops.triton.schedule_merge import schedule_match, schedule_merge

    if name == "MatchTokens":
        return run(schedule_match, attributes, qkv=x, sizes=sizes)["pairs"]
    return run(schedule_merge, attributes, x=x, sizes=sizes, pairs=pairs[0])["output"]


def triton_layer(
    attributes: Attributes, qkv: Tensor, sizes: Tensor | None, proj_q: Tensor, proj_k: Tensor
) -> Tensor | None:
    """Run KeySelect and the SparseAttention that reads its key lists with the Triton kernels.

    Args:
        attributes: Attributes of KeySelect.
        qkv: Packed queries, keys and values [B,N,3C].
        sizes: Token sizes [B,N], or None if no tokens were merged.
        proj_q: Projection [H,d,c] of the pooled queries.
        proj_k: Projection [H,d,c] of the keys.

    Returns:
        The output [B,N,C] of SparseAttention, or None if the kernels cannot run here or a model is being exported.
    """
    if torch.onnx.is_in_onnx_export() or within_native_kernels():
        return None
    if not _runs("KeySelect", attributes, qkv, proj_q, proj_k) or _needs_gradient(qkv):
        return None
    from sparsifiner_edge.ops.triton.run import run
    from sparsifiner_edge.ops.triton.schedule_layer import schedule_layer

    return run(schedule_layer, attributes, qkv=qkv, sizes=sizes, proj_q=proj_q, proj_k=proj_k)["output"]


def _runs(name: str, attributes: Attributes, x: Tensor, *others: Tensor) -> bool:
    """Return True if the Triton kernels can run an operator.

    Args:
        name: Name of the operator.
        attributes: Attributes of the operator.
        x: First input.
        *others: Inputs after `x` and the sizes. If they are on another device, PyTorch raises the error.
    """
    return all(y.device == x.device for y in others) and not why_not_triton(
        name, attributes, (x.shape, x.shape[:2], *(y.shape for y in others)), x
    )


def _needs_gradient(x: Tensor) -> bool:
    """Return True if autograd records operations on `x`."""
    return torch.is_grad_enabled() and x.requires_grad
