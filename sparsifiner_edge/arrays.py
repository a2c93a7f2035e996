"""Types of NumPy arrays, and raw memory as an array."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Pixels = npt.NDArray[np.uint8]
"""Decoded RGB images: [..., height, width, 3]."""


def bytes_at(address: int, size: int) -> Array:
    """Return memory of this process as an array of bytes."""
    view: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    return view
