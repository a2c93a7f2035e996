"""The kernels under torch: launches of a plan, and the operators as functions of tensors, with gradient.

They are registered as custom operators of torch, so `torch.compile` and CUDA graphs take them as they are. Importing
this needs torch and Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsifiner_edge.ops.schema import AttributeValue
from sparsifiner_edge.ops.triton.compile import OPTIONS
from sparsifiner_edge.ops.triton.kernels import kernel
from sparsifiner_edge.ops.triton.plan import Plan, plan_select
from sparsifiner_edge.ops.triton.plan_attention import plan_attend, plan_backward

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
        for step in plan.launches:
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
    sm: int,
) -> Plan:
    return make(shapes, dict(attributes), dtype, sm)


def _plan(make: Callable[..., Plan], inputs: Sequence[Tensor], attributes: dict[str, AttributeValue]) -> Plan:
    """The plan for inputs of which the first is qkv; the same sizes come again at every layer and step."""
    qkv, shapes = inputs[0], tuple(x.shape for x in inputs)
    element = str(qkv.dtype).removeprefix("torch.")
    return _made(make, shapes, tuple(attributes.items()), element, capability(qkv.device))


@torch.library.custom_op("sparsifiner_triton::key_select", mutates_args=())
def key_select(
    qkv: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    num_heads: int,
    num_prefix: int,
    probe: int,
    tile: int,
    cell: int,
    keys: int,
    scale: float,
    value_power: float,
) -> Tensor:
    """KeySelect: indices int32 [B,H,T,K]."""
    a: dict[str, AttributeValue] = {
        "num_heads": num_heads, "num_prefix": num_prefix, "probe": probe, "tile": tile, "cell": cell, "keys": keys,
        "scale": scale, "value_power": value_power,
    }  # fmt: skip
    plan = _plan(plan_select, (qkv, proj_q, proj_k), a)
    given = {"qkv": qkv.contiguous(), "proj_q": proj_q.float().contiguous(), "proj_k": proj_k.float().contiguous()}
    return launch(plan, given)["indices"]


@key_select.register_fake
def _(qkv: Tensor, *rest: Any) -> Tensor:
    num_heads, num_prefix, _, tile, _, keys = rest[2:8]
    tiles = -(-(qkv.shape[1] - num_prefix) // tile)
    return qkv.new_empty((qkv.shape[0], num_heads, tiles, keys), dtype=torch.int32)


def _attention_attributes(
    num_heads: int, num_prefix: int, tile: int, cell: int, scale: float, prefix_keys: int
) -> dict[str, AttributeValue]:
    return {
        "num_heads": num_heads, "num_prefix": num_prefix, "tile": tile, "cell": cell, "scale": scale,
        "prefix_keys": prefix_keys,
    }  # fmt: skip


@torch.library.custom_op("sparsifiner_triton::sparse_attention", mutates_args=())
def _sparse_attention(
    qkv: Tensor,
    indices: Tensor,
    num_heads: int,
    num_prefix: int,
    tile: int,
    cell: int,
    scale: float,
    prefix_keys: int,
) -> tuple[Tensor, Tensor]:
    """SparseAttention: output [B,N,C] and the softmax lse [B,H,N] that its gradient needs."""
    a = _attention_attributes(num_heads, num_prefix, tile, cell, scale, prefix_keys)
    plan = _plan(plan_attend, (qkv, indices), a)
    done = launch(plan, {"qkv": qkv.contiguous(), "indices": indices.contiguous()})
    return done["output"], done["lse"]


@_sparse_attention.register_fake
def _(qkv: Tensor, _: Tensor, num_heads: int, *__: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, packed = qkv.shape
    lse = qkv.new_empty((batch, num_heads, tokens), dtype=torch.float32)
    return qkv.new_empty((batch, tokens, packed // 3)), lse


@torch.library.custom_op("sparsifiner_triton::sparse_attention_backward", mutates_args=())
def _sparse_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    indices: Tensor,
    output: Tensor,
    lse: Tensor,
    num_heads: int,
    num_prefix: int,
    tile: int,
    cell: int,
    scale: float,
    prefix_keys: int,
) -> Tensor:
    """Gradient of SparseAttention in qkv: [B,N,3C]."""
    a = _attention_attributes(num_heads, num_prefix, tile, cell, scale, prefix_keys)
    plan = _plan(plan_backward, (qkv, indices), a)
    given = {"qkv": qkv, "indices": indices, "output": output, "lse": lse, "grad": grad}
    return launch(plan, {name: x.contiguous() for name, x in given.items()})["grad_qkv"]


@_sparse_attention_backward.register_fake
def _(_: Tensor, qkv: Tensor, *__: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], *output)
    ctx.settings = inputs[2:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return _sparse_attention_backward(grad, *ctx.saved_tensors, *ctx.settings), None, *(None for _ in ctx.settings)


_sparse_attention.register_autograd(_backward, setup_context=_setup)


def sparse_attention(qkv: Tensor, indices: Tensor, **attributes: Any) -> Tensor:
    """SparseAttention, with every attribute of its schema: [B,N,C], differentiable in qkv."""
    out: Tensor = _sparse_attention(qkv, indices, **attributes)[0]
    return out
