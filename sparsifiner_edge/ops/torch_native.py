"""The native kernels from PyTorch, on request: to judge many plans, and never where gradients flow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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
    PyTorch still where those are not built (`native.why_unusable`) or a gradient is asked for.

    Raises:
        BackendError: that many threads cannot be started.
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
    """Whether `native_kernels` are requested, and there."""
    return not torch.compiler.is_compiling() and _OPERATORS.get() is not None


def single_sizes(x: Tensor) -> Tensor:
    """The sizes of tokens x [B,N,C] that were never merged: ones, float32 [B,N]."""
    return x.new_ones(x.shape[:2], dtype=torch.float32)


def native_result(
    name: str,
    attributes: Attributes,
    inputs: Sequence[Tensor | None],
    output: Callable[[], tuple[list[Tensor], torch.dtype, list[int]]],
) -> Tensor | None:
    """What the native kernels make of an operator's inputs; None where they are not requested, or cannot run it.

    Args:
        output: gives all inputs, and the type and shape of the output.
    """
    operators = None if torch.compiler.is_compiling() else _OPERATORS.get()
    if operators is None or name not in ("KeySelect", "SparseAttention"):
        return None
    present = [x for x in inputs if x is not None]
    if present[0].dtype != torch.float32 or present[0].device.type != "cpu":
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in present):
        return None
    tensors, dtype, shape = output()
    result = torch.empty(tuple(shape), dtype=dtype)
    operators.run(name, attributes, [x.detach().contiguous().numpy() for x in tensors], result.numpy())
    return result
