"""Types of NumPy arrays, and memory as one."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Pixels = npt.NDArray[np.uint8]
"""RGB, as images are decoded: [..., height, width, 3]."""


def bytes_at(address: int, size: int) -> Array:
    """Memory of this process as an array of bytes."""
    view: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    return view
