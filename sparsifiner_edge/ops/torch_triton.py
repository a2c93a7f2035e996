"""The operators on a CUDA GPU: kernels in Triton where they can run (`ops.triton.why_not_triton` says why not).

Where a gradient may follow, PyTorch runs: the kernels have none.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from sparsifiner_edge.ops.operator import Attributes
from sparsifiner_edge.ops.torch_native import within_native_kernels
from sparsifiner_edge.ops.triton import why_not_triton


def triton_result(name: str, attributes: Attributes, *inputs: Tensor | None) -> Tensor | None:
    """The output of MatchTokens or MergeTokens, of its schema's inputs, or None: PyTorch runs it. Lists run by layers:
    see `triton_layer`.
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
    """The output of SparseAttention over the lists of a KeySelect, whose attributes and inputs these are (sizes
    None: no tokens merged); None where that does not run here, or a file is exported.
    """
    if torch.onnx.is_in_onnx_export() or within_native_kernels():
        return None
    if not _runs("KeySelect", attributes, qkv, proj_q, proj_k) or _needs_gradient(qkv):
        return None
    from sparsifiner_edge.ops.triton.run import run
    from sparsifiner_edge.ops.triton.schedule_layer import schedule_layer

    return run(schedule_layer, attributes, qkv=qkv, sizes=sizes, proj_q=proj_q, proj_k=proj_k)["output"]


def _runs(name: str, attributes: Attributes, x: Tensor, *others: Tensor) -> bool:
    """Others: what follows x and the sizes. Tensors of several devices are for PyTorch to refuse."""
    return all(y.device == x.device for y in others) and not why_not_triton(
        name, attributes, (x.shape, x.shape[:2], *(y.shape for y in others)), x
    )


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad
