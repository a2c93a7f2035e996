"""Frames made as large as the model takes them, as its manifest says."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.bounds import ImageSize, height_width


class Fit(NamedTuple):
    """What the model takes.

    Attributes:
        size: pixels of the image.
        display: pixels along the longer side of the frame for the overlay; 0: none.
    """

    size: ImageSize
    display: int = 0


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


def display_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Even width and height, at most `longest`: encoders take no odd ones."""
    scale = min(1.0, longest / max(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def fit_pillow(image: Any, fit: Fit) -> Pixels:
    """A Pillow image as the model takes it."""
    from PIL import Image

    width, height = image.size
    resized = image.convert("RGB").resize(scaled_size(width, height, fit.size), Image.Resampling.BICUBIC)
    return cropped(np.asarray(resized), fit.size)
