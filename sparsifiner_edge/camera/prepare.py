"""Frames made as large as the model takes them, as its manifest says."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparsifiner_edge.images import Pixels

SQUARE, LETTERBOX = "centre square", "letterbox"


class Fit(NamedTuple):
    """What the model takes.

    Attributes:
        size: pixels along a side.
        letterbox: the whole frame with black bars; else its centre square.
        display: pixels along the longer side of the frame for the overlay; 0: none.
    """

    size: int
    letterbox: bool = False
    display: int = 0


def scaled_size(width: int, height: int, fit: Fit) -> tuple[int, int]:
    """Width and height of the resized frame before it is cropped or padded."""
    side = max(width, height) if fit.letterbox else min(width, height)
    return max(1, round(width * fit.size / side)), max(1, round(height * fit.size / side))


def to_square(scaled: Pixels, size: int) -> Pixels:
    """Crop or pad about the centre: uint8 [h,w,3] -> [size,size,3]."""
    height, width = scaled.shape[:2]
    top, left = max(0, height - size) // 2, max(0, width - size) // 2
    cut = scaled[top : top + size, left : left + size]
    if cut.shape[:2] == (size, size):
        return np.ascontiguousarray(cut)
    padded = np.zeros((size, size, 3), np.uint8)
    y, x = (size - cut.shape[0]) // 2, (size - cut.shape[1]) // 2
    padded[y : y + cut.shape[0], x : x + cut.shape[1]] = cut
    return padded


def display_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Even width and height, at most `longest`: encoders take no odd ones."""
    scale = min(1.0, longest / max(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def fit_pillow(image: Any, fit: Fit) -> Pixels:
    """A Pillow image as the model takes it."""
    from PIL import Image

    width, height = image.size
    resized = image.convert("RGB").resize(scaled_size(width, height, fit), Image.Resampling.BICUBIC)
    return to_square(np.asarray(resized), fit.size)
