"""Frames made as large as the model takes them, as its manifest says."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.bounds import ImageSize, height_width


def scaled_size(width: int, height: int, size: ImageSize) -> tuple[int, int]:
    """Width and height of the resized frame before it is cropped: no smaller than `size`, one side as long."""
    rows, columns = height_width(size)
    if width * rows <= height * columns:
        return columns, round(height * columns / width)
    return round(width * rows / height), rows


def cropped(scaled: Pixels, size: ImageSize) -> Pixels:
    """Crop about the centre: uint8 [h,w,3] -> [H,W,3] of `size`."""
    height, width = scaled.shape[:2]
    rows, columns = height_width(size)
    top, left = (height - rows) // 2, (width - columns) // 2
    return np.ascontiguousarray(scaled[top : top + rows, left : left + columns])


def fit_pillow(image: Any, size: ImageSize) -> Pixels:
    """A Pillow image as the model takes it."""
    from PIL import Image

    width, height = image.size
    resized = image.convert("RGB").resize(scaled_size(width, height, size), Image.Resampling.BICUBIC)
    return cropped(np.asarray(resized), size)
