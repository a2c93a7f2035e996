"""Shared functions of the kernels: loading and storing rows of a head, and splitting values into two parts.

Names follow `schema.py`. All sizes are compile-time constants, so a kernel takes only pointers. `block_*` are powers of
two of at least 16, as the tensor cores require. Rows and columns beyond the real sizes are read as zeros and not
written.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, stride: tl.constexpr, real, width: tl.constexpr, block_d: tl.constexpr):
    """Load rows of `width` elements at base + row x stride as [rows, block_d], with zeros where `real` is false."""
    columns = tl.arange(0, block_d)
    mask = real[:, None]
    if block_d != width:
        mask = mask & (columns < width)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, rows, stride: tl.constexpr, real, width: tl.constexpr, block_d: tl.constexpr, values):
    """Store rows at base + row x stride where `real` is true, cast to the element type of `base`."""
    columns = tl.arange(0, block_d)
    mask = real[:, None]
    if block_d != width:
        mask = mask & (columns < width)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def in_parts(values, dtype: tl.constexpr):
    """Split float32 values into high + low, both of `dtype`, which doubles its number of significant bits."""
    high = values.to(dtype)
    return high, (values - high.to(tl.float32)).to(dtype)


@triton.jit
def reciprocal(values):
    """Return 1 / values for positive values, accurate to 21 bits, in half the instructions of a division."""
    root = tl.rsqrt(values)
    return root * root
