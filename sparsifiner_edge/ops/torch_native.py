"""The native kernels from PyTorch, where someone asks for them: to judge many plans, and never where gradients flow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import cast

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


def runs_natively(name: str, inputs: Sequence[Tensor | None]) -> bool:
    """Whether the native kernels are asked for an operator of these inputs."""
    if not within_native_kernels() or name not in ("KeySelect", "SparseAttention"):
        return False
    tensors = [x for x in inputs if x is not None]
    floats = tensors[0].dtype == torch.float32 and tensors[0].device.type == "cpu"
    return floats and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def native_result(
    name: str, attributes: Attributes, inputs: Sequence[Tensor], dtype: torch.dtype, shape: Sequence[int]
) -> Tensor:
    """What the native kernels make of an operator's inputs."""
    output = torch.empty(tuple(shape), dtype=dtype)
    arrays = [x.detach().contiguous().numpy() for x in inputs]
    cast(Operators, _OPERATORS.get()).run(name, attributes, arrays, output.numpy())
    return output
