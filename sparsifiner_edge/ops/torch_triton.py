"""The operators on a CUDA GPU: kernels in Triton where they can run (`ops.triton.kernels_for` says which, and why)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsifiner_edge.ops.operator import Attributes
from sparsifiner_edge.ops.torch_native import within_native_kernels
from sparsifiner_edge.ops.triton import kernels_for


def triton_result(name: str, attributes: Attributes, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """An operator's output, in order of its schema's inputs, or None: PyTorch runs it.

    The gradient over merged tokens, and of merging them, is PyTorch's.
    """
    merged = name.startswith("Merged")
    if not _runs(name, attributes, inputs[0], [x.shape for x in inputs]):
        return None
    from sparsifiner_edge.ops.triton import run

    if name == "MergeTokens":
        return None if run.needs_gradient(inputs[0]) else run.merged_tokens(*inputs)
    if name == "MatchTokens":
        with torch.no_grad():
            pairs: Tensor = run.matched_tokens(*inputs, **attributes)
        return pairs
    qkv, *others = inputs
    sizes = others.pop(0) if merged else None
    if name.endswith("KeySelect"):
        with torch.no_grad():
            lists: Tensor = run.key_select(qkv, sizes, *others, **attributes)
        return lists
    if merged and run.needs_gradient(qkv):
        return None
    settings: dict[str, Any] = {**attributes}
    return run.sparse_attention(qkv, sizes, *others, **settings)


def triton_layer(attributes: Attributes, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """The output of SparseAttention over the lists of a KeySelect, whose attributes and inputs these are, launched
    together; None where that does not run here, or a file is exported.
    """
    if torch.onnx.is_in_onnx_export() or within_native_kernels():
        return None
    qkv, *others = inputs
    sizes = others.pop(0) if len(others) == 3 else None
    prefix = "Merged" if sizes is not None else ""
    tiles = math.ceil((qkv.shape[1] - attributes["num_prefix"]) / attributes["tile"])
    lists = (qkv.shape[0], int(attributes["num_heads"]), tiles, int(attributes["keys"]))
    shared = {name: attributes[name] for name in ("num_heads", "num_prefix", "tile", "cell", "scale")}
    if not _runs(f"{prefix}KeySelect", attributes, qkv, [x.shape for x in inputs]) or not _runs(
        f"{prefix}SparseAttention", {**shared, "prefix_keys": 1}, qkv, [*(x.shape for x in inputs[:-2]), lists]
    ):
        return None
    from sparsifiner_edge.ops.triton import run

    if sizes is not None and run.needs_gradient(qkv):
        return None
    settings: dict[str, Any] = {**attributes}
    return run.layer(qkv, sizes, *others, **settings)


def _runs(name: str, attributes: Attributes, qkv: Tensor, shapes: Sequence[Sequence[int]]) -> bool:
    return kernels_for(name, attributes, shapes, qkv).name == "triton"
