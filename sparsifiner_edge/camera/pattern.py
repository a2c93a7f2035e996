"""Moving test pattern of the source `test`. It carries the frame number, so that an answer can be matched to its frame.

The centre square of an image is a grid of 8 x 8 cells. Its upper four rows hold 32 black or white bits: 24 of the
number and 8 of a checksum. The test servers draw the same images with a Python that has no NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsifiner_edge.arrays import Pixels

GRID = 8
"""Cells along a side of the grid."""
BITS = 24
"""Bits of the frame number."""
CELLS = 32
"""Cells that carry bits: the number and its checksum."""


def cells_of(number: int) -> list[bool]:
    """Return the 32 cells, in raster order, that encode `number` modulo 2^24; True is white."""
    number %= 1 << BITS
    # The multiplication spreads every bit. All-black and all-white images do not pass the check.
    check = ((number + 1) * 0x9E3779B1 >> 16) & 0xFF
    return [bool((number << 8 | check) >> (CELLS - 1 - place) & 1) for place in range(CELLS)]


def draw_pattern(number: int, width: int = 640, height: int = 480) -> Pixels:
    """Return frame `number`, uint8 RGB [height,width,3]."""
    import numpy as np

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
