"""The kernels under torch: launches of a plan, and the operators as functions of tensors, without gradient.

They are registered as custom operators of torch, so `torch.compile` and CUDA graphs take them as they are. Importing
this needs torch and Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsifiner_edge.ops.operator import Attributes, AttributeValue
from sparsifiner_edge.ops.triton.compile import OPTIONS
from sparsifiner_edge.ops.triton.kernels import kernel
from sparsifiner_edge.ops.triton.plan import Plan, fitted
from sparsifiner_edge.ops.triton.plan_forward import plan_attend, plan_layer, plan_select
from sparsifiner_edge.ops.triton.plan_merge import plan_match, plan_merge

INTERPRETED = 80
"""Compute capability that Triton's interpreter, on CPU tensors, plays."""


def capability(device: torch.device) -> int:
    """Compute capability times ten, such as 87."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(plan: Plan, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a plan.

    Args:
        inputs: its input buffers; they must be contiguous.

    Returns:
        Inputs, outputs and scratch by name.
    """
    like = next(iter(inputs.values()))
    tensors = dict(inputs)
    for name, buffer in plan.buffers.items():
        if name not in tensors:
            tensors[name] = torch.empty(buffer.shape, dtype=getattr(torch, buffer.dtype), device=like.device)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(like):
        for step in (fitted(planned, capability(like.device)) for planned in plan.launches):
            given = {name: None if buffer is None else tensors[buffer] for name, buffer in step.arguments.items()}
            kernel(step.kernel)[step.grid](
                **given, **step.constants, num_warps=step.warps, num_stages=step.stages, **OPTIONS
            )
    return tensors


@functools.lru_cache(maxsize=256)
def _made(
    make: Callable[..., Plan],
    shapes: tuple[torch.Size, ...],
    attributes: tuple[tuple[str, AttributeValue], ...],
    dtype: str,
) -> Plan:
    return make(shapes, dict(attributes), dtype)


def _plan(make: Callable[..., Plan], inputs: Sequence[Tensor], attributes: Attributes) -> Plan:
    """The plan for inputs; the first has the element type. The same sizes come again at every layer and step."""
    element = str(inputs[0].dtype).removeprefix("torch.")
    return _made(make, tuple(x.shape for x in inputs), tuple(attributes.items()), element)


def _given(qkv: Tensor, sizes: Tensor | None, **others: Tensor) -> dict[str, Tensor]:
    """Inputs by name, in the schema's order, as launches take them."""
    merged = {} if sizes is None else {"sizes": sizes.float()}
    return {name: x.contiguous() for name, x in {"qkv": qkv, **merged, **others}.items()}


def _selection(
    num_heads: int, num_prefix: int, probe: int, tile: int, cell: int, keys: int, scale: float, value_power: float
) -> Attributes:
    return {
        "num_heads": num_heads, "num_prefix": num_prefix, "probe": probe, "tile": tile, "cell": cell, "keys": keys,
        "scale": scale, "value_power": value_power,
    }  # fmt: skip


def _lists(qkv: Tensor, num_heads: int, num_prefix: int, tile: int, keys: int) -> Tensor:
    """Indices of KeySelect, for shapes alone."""
    tiles = -(-(qkv.shape[1] - num_prefix) // tile)
    return qkv.new_empty((qkv.shape[0], num_heads, tiles, keys), dtype=torch.int32)


@torch.library.custom_op("sparsifiner_triton::key_select", mutates_args=())
def key_select(
    qkv: Tensor, sizes: Tensor | None, proj_q: Tensor, proj_k: Tensor, num_heads: int, num_prefix: int, probe: int,
    tile: int, cell: int, keys: int, scale: float, value_power: float,
) -> Tensor:  # fmt: skip
    """KeySelect: indices int32 [B,H,T,K]; sizes None: no token was merged."""
    given = _given(qkv, sizes, proj_q=proj_q.float(), proj_k=proj_k.float())
    a = _selection(num_heads, num_prefix, probe, tile, cell, keys, scale, value_power)
    return launch(_plan(plan_select, list(given.values()), a), given)["indices"]


@key_select.register_fake
def _(
    qkv: Tensor, _sizes: Any, _proj_q: Any, _proj_k: Any, num_heads: int, num_prefix: int, _probe: int, tile: int,
    _cell: int, keys: int, *_: Any,
) -> Tensor:  # fmt: skip
    return _lists(qkv, num_heads, num_prefix, tile, keys)


@torch.library.custom_op("sparsifiner_triton::layer", mutates_args=())
def layer(
    qkv: Tensor, sizes: Tensor | None, proj_q: Tensor, proj_k: Tensor, num_heads: int, num_prefix: int, probe: int,
    tile: int, cell: int, keys: int, scale: float, value_power: float,
) -> Tensor:  # fmt: skip
    """KeySelect and SparseAttention over its lists: [B,N,C]."""
    given = _given(qkv, sizes, proj_q=proj_q.float(), proj_k=proj_k.float())
    a = _selection(num_heads, num_prefix, probe, tile, cell, keys, scale, value_power)
    return launch(_plan(plan_layer, list(given.values()), a), given)["output"]


@layer.register_fake
def _(qkv: Tensor, *_: Any) -> Tensor:
    return _output(qkv)


def _output(qkv: Tensor) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


@torch.library.custom_op("sparsifiner_triton::sparse_attention", mutates_args=())
def sparse_attention(
    qkv: Tensor, sizes: Tensor | None, indices: Tensor, num_heads: int, num_prefix: int, tile: int, cell: int,
    scale: float, prefix_keys: int,
) -> Tensor:  # fmt: skip
    """SparseAttention: [B,N,C]."""
    a = {
        "num_heads": num_heads, "num_prefix": num_prefix, "tile": tile, "cell": cell, "scale": scale,
        "prefix_keys": prefix_keys,
    }  # fmt: skip
    given = _given(qkv, sizes, indices=indices)
    return launch(_plan(plan_attend, list(given.values()), a), given)["output"]


@sparse_attention.register_fake
def _(qkv: Tensor, *_: Any) -> Tensor:
    return _output(qkv)


@torch.library.custom_op("sparsifiner_triton::match_tokens", mutates_args=())
def matched_tokens(
    qkv: Tensor, sizes: Tensor, num_heads: int, num_prefix: int, window: int, merged: int
) -> Tensor:  # fmt: skip
    """MatchTokens: pairs int32 [B,N-merged,2]."""
    given = _given(qkv, sizes)
    a = {"num_heads": num_heads, "num_prefix": num_prefix, "window": window, "merged": merged}
    return launch(_plan(plan_match, list(given.values()), a), given)["pairs"]


@matched_tokens.register_fake
def _(qkv: Tensor, _sizes: Any, _num_heads: int, _num_prefix: int, _window: int, merged: int) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] - merged, 2), dtype=torch.int32)


@torch.library.custom_op("sparsifiner_triton::merge_tokens", mutates_args=())
def merged_tokens(x: Tensor, sizes: Tensor, pairs: Tensor) -> Tensor:
    """MergeTokens: [B,M,C], without a gradient."""
    given = {"x": x.contiguous(), "sizes": sizes.float().contiguous(), "pairs": pairs.int().contiguous()}
    return launch(_plan(plan_merge, list(given.values()), {}), given)["output"]


@merged_tokens.register_fake
def _(x: Tensor, _sizes: Any, pairs: Tensor) -> Tensor:
    return x.new_empty((*pairs.shape[:2], x.shape[2]))


def needs_gradient(x: Tensor) -> bool:
    """Whether a gradient may follow."""
    return torch.is_grad_enabled() and x.requires_grad
