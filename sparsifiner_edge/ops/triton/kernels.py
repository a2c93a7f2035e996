"""Kernels by name. Importing this needs Triton; torch it does not need."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import triton  # noqa: F401  fails here, at once, where it is missing

from sparsifiner_edge.ops.triton.plan import KERNEL_MODULES


@functools.cache
def kernel(name: str) -> Any:
    """A kernel of `KERNEL_MODULES` by its name."""
    return getattr(importlib.import_module(f"sparsifiner_edge.ops.triton.{KERNEL_MODULES[name]}"), f"{name}_kernel")
