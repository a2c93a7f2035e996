"""Frames made as large as the model takes them, as its manifest says."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparsifiner_edge.arrays import Pixels

SQUARE = "centre square"
"""How a bundle's manifest says so."""


class Fit(NamedTuple):
    """What the model takes.

    Attributes:
        size: pixels along a side.
        display: pixels along the longer side of the frame for the overlay; 0: none.
    """

    size: int
    display: int = 0


def scaled_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height of the resized frame before it is cropped: its shorter side is `size`."""
    side = min(width, height)
    return round(width * size / side), round(height * size / side)


def to_square(scaled: Pixels, size: int) -> Pixels:
    """Crop about the centre: uint8 [h,w,3] -> [size,size,3]."""
    height, width = scaled.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(scaled[top : top + size, left : left + size])


def display_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Even width and height, at most `longest`: encoders take no odd ones."""
    scale = min(1.0, longest / max(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def fit_pillow(image: Any, fit: Fit) -> Pixels:
    """A Pillow image as the model takes it."""
    from PIL import Image

    width, height = image.size
    resized = image.convert("RGB").resize(scaled_size(width, height, fit.size), Image.Resampling.BICUBIC)
    return to_square(np.asarray(resized), fit.size)
