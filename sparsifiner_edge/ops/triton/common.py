"""What the kernels share: reading and writing rows of heads, and values in parts.

Names follow `schema.py`; every size is a compile-time constant, so a kernel takes pointers alone. `block_*` are powers
of two of at least 16, as the matrix units want; rows and columns beyond the real sizes are read as zeros and not
written.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, stride: tl.constexpr, real, width: tl.constexpr, block_d: tl.constexpr):
    """Rows of `width` elements at base + row x stride -> [rows, block_d], zeros where not real."""
    columns = tl.arange(0, block_d)
    mask = real[:, None]
    if block_d != width:
        mask = mask & (columns < width)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, rows, stride: tl.constexpr, real, width: tl.constexpr, block_d: tl.constexpr, values):
    """The inverse of `load_rows`, cast to the element type of `base`."""
    columns = tl.arange(0, block_d)
    mask = real[:, None]
    if block_d != width:
        mask = mask & (columns < width)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def in_parts(values, dtype: tl.constexpr):
    """float32 values = high + low, both of `dtype`: twice its significant bits."""
    high = values.to(dtype)
    return high, (values - high.to(tl.float32)).to(dtype)


@triton.jit
def reciprocal(values):
    """1 / values, where they are positive, to 21 bits: half the instructions of a division."""
    root = tl.rsqrt(values)
    return root * root
