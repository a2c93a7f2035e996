"""The operators on a CUDA GPU: kernels in Triton where they can run (`ops.triton.kernels_for` says which, and why)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from sparsifiner_edge.ops.kernels import TRITON
from sparsifiner_edge.ops.operator import Attributes
from sparsifiner_edge.ops.torch_native import within_native_kernels
from sparsifiner_edge.ops.triton import kernels_for


def triton_result(name: str, attributes: Attributes, *inputs: Tensor | None) -> Tensor | None:
    """An operator's output, of its schema's inputs (sizes None: no token was merged), or None: PyTorch runs it.

    Where a gradient may follow PyTorch does: the kernels have none.
    """
    if name not in TRITON.operators:
        return None
    x, sizes, *others = cast(list[Tensor], inputs)
    if not _runs(name, attributes, x, *(other.shape for other in others)):
        return None
    from sparsifiner_edge.ops.triton import run

    if name in ("MatchTokens", "KeySelect"):
        choose = run.matched_tokens if name == "MatchTokens" else run.key_select
        with torch.no_grad():
            chosen: Tensor = choose(x, sizes, *others, **attributes)
        return chosen
    if run.needs_gradient(x):
        return None
    if name == "MergeTokens":
        merged: Tensor = run.merged_tokens(x, sizes, *others)
        return merged
    attended: Tensor = run.sparse_attention(x, sizes, *others, **attributes)
    return attended


def triton_layer(
    attributes: Attributes, qkv: Tensor, sizes: Tensor | None, proj_q: Tensor, proj_k: Tensor
) -> Tensor | None:
    """The output of SparseAttention over the lists of a KeySelect, whose attributes and inputs these are, launched
    together; None where that does not run here, or a file is exported.
    """
    if torch.onnx.is_in_onnx_export() or within_native_kernels():
        return None
    tiles = math.ceil((qkv.shape[1] - attributes["num_prefix"]) / attributes["tile"])
    lists = (qkv.shape[0], int(attributes["num_heads"]), tiles, int(attributes["keys"]))
    shared = {name: attributes[name] for name in ("num_heads", "num_prefix", "tile", "cell", "scale")}
    if not _runs("KeySelect", attributes, qkv, proj_q.shape, proj_k.shape) or not _runs(
        "SparseAttention", {**shared, "prefix_keys": 1}, qkv, lists
    ):
        return None
    from sparsifiner_edge.ops.triton import run

    if run.needs_gradient(qkv):
        return None
    attended: Tensor = run.layer(qkv, sizes, proj_q.detach(), proj_k.detach(), **attributes)
    return attended


def _runs(name: str, attributes: Attributes, x: Tensor, *others: Sequence[int]) -> bool:
    """Others: shapes of what follows x and the sizes."""
    return kernels_for(name, attributes, (x.shape, x.shape[:2], *others), x).name == "triton"
