"""The source `test`: a moving pattern that carries the number of its frame (see `code`)."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.camera.code import GRID, cells_of


def draw_pattern(number: int, width: int = 640, height: int = 480) -> Pixels:
    """Frame `number`: uint8 RGB [height, width, 3]."""
    across = (np.arange(width, dtype=np.uint32) + 3 * number).astype(np.uint8)
    down = np.arange(height, dtype=np.uint32).astype(np.uint8)
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = across, down[:, None], 128
    side = min(width, height)
    left, top, cell = (width - side) // 2, (height - side) // 2, side // GRID
    for place, white in enumerate(cells_of(number)):
        y, x = top + place // GRID * cell, left + place % GRID * cell
        image[y : y + cell, x : x + cell] = 255 if white else 0
    return image


def paced_images(fps: float) -> Iterator[tuple[int, int, Pixels]]:
    """Frames at `fps`: number, nanoseconds of the monotonic clock when it was due, image. Late ones are left out."""
    start, period, number = time.monotonic_ns(), 1e9 / fps, 0
    while True:
        due = start + round(number * period)
        late = time.monotonic_ns() - due
        if late > period:
            number += int(late // period)
            continue
        if late < 0:
            time.sleep(-late / 1e9)
        yield number, due, draw_pattern(number)
        number += 1
