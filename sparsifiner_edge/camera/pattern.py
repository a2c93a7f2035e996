"""The source `test`: a moving pattern that carries the number of its frame, so that an answer tells its frame.

The centre square of an image is a grid of 8 x 8 cells; the upper four rows hold 32 bits, black or white: 24 of the
number, 8 of its check. Servers in tests draw such images, too, with a Python that has no NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsifiner_edge.arrays import Pixels

GRID = 8
BITS = 24
CELLS = 32


def cells_of(number: int) -> list[bool]:
    """The 32 cells, in raster order, that say `number` modulo 2^24."""
    number %= 1 << BITS
    # Multiplication spreads every bit; black or white all over must not pass as zero.
    check = ((number + 1) * 0x9E3779B1 >> 16) & 0xFF
    return [bool((number << 8 | check) >> (CELLS - 1 - place) & 1) for place in range(CELLS)]


def draw_pattern(number: int, width: int = 640, height: int = 480) -> Pixels:
    """Frame `number`: uint8 RGB [height, width, 3]."""
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
