"""Optional dispatch of the PyTorch operators to the native kernels, to evaluate many plans quickly on the CPU.

The native kernels never run where a gradient is needed.
"""

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
"""Native operators of the active `native_kernels` context, or None."""


@contextlib.contextmanager
def native_kernels(threads: int) -> Iterator[None]:
    """Run `key_select` and `sparse_attention` of float32 CPU tensors with the native kernels inside this context.

    PyTorch still runs them where the native library is unusable (`native.why_unusable`) or a gradient is needed.

    Args:
        threads: Number of threads, including the calling one.

    Raises:
        BackendError: The threads cannot be started.
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
    """Return True inside an active `native_kernels` context whose native library is usable."""
    return not torch.compiler.is_compiling() and _OPERATORS.get() is not None


def single_sizes(x: Tensor) -> Tensor:
    """Return the sizes of tokens x [B,N,C] that were never merged: ones, float32 [B,N]."""
    return x.new_ones(x.shape[:2], dtype=torch.float32)


def native_result(
    name: str,
    attributes: Attributes,
    inputs: Sequence[Tensor | None],
    output: Callable[[], tuple[list[Tensor], torch.dtype, list[int]]],
) -> Tensor | None:
    """Run an operator with the native kernels.

    Args:
        name: Name of the operator.
        attributes: Attributes of the operator.
        inputs: Inputs in the order of the schema; None stands for the sizes of tokens that were never merged.
        output: Function that returns all inputs (with sizes), and the type and shape of the output.

    Returns:
        The output, or None if the native kernels are not requested or cannot run the operator.
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
