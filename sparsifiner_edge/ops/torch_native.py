"""The native kernels from PyTorch, where someone asks for them: to judge many plans, and never where gradients flow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.native.interface import Operators
from sparsifiner_edge.ops.operator import Attributes

_OPERATORS: ContextVar[Operators | None] = ContextVar("operators", default=None)


@contextlib.contextmanager
def native_kernels(threads: int) -> Iterator[None]:
    """Meanwhile `key_select` and `sparse_attention` of float32 tensors on the processor run in the native kernels; in
    PyTorch as ever where those are not built (`native.why_unusable`) or a gradient is asked for.

    Raises:
        BackendError: so many threads cannot be started.
    """
    if native.why_unusable() is not None:
        yield
        return
    operators = Operators(threads)
    token = _OPERATORS.set(operators)
    try:
        yield
    finally:
        _OPERATORS.reset(token)
        operators.close()


def within_native_kernels() -> bool:
    """Whether `native_kernels` are asked for, and there."""
    return not torch.compiler.is_compiling() and _OPERATORS.get() is not None


def single_sizes(x: Tensor) -> Tensor:
    """The sizes of tokens x [B,N,C] that were never merged: ones, float32 [B,N]."""
    return x.new_ones(x.shape[:2], dtype=torch.float32)


def native_result(
    name: str,
    attributes: Attributes,
    qkv: Tensor,
    sizes: Tensor | None,
    others: Sequence[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor | None:
    """What the native kernels make of an operator's inputs (sizes None: no token was merged); None where they are not
    asked to.
    """
    if torch.compiler.is_compiling():
        return None
    operators = _OPERATORS.get()
    if operators is None or qkv.dtype != torch.float32 or qkv.device.type != "cpu":
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, *others)):
        return None
    inputs = (qkv, single_sizes(qkv) if sizes is None else sizes, *others)
    output = torch.empty(tuple(shape), dtype=dtype)
    operators.run(name, attributes, [x.detach().contiguous().numpy() for x in inputs], output.numpy())
    return output
