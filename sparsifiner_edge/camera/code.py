"""A number drawn into an image, so that whoever reads the answer knows which frame it is about.

The centre square of the image is a grid of 8 x 8 cells; the upper four rows hold 32 bits, black or white: 24 of the
number, 8 of its check. Plain Python: servers in tests draw it without NumPy.
"""

from __future__ import annotations

GRID = 8
BITS = 24
CELLS = 32


def cells_of(number: int) -> list[bool]:
    """The 32 cells, in raster order, that say `number` modulo 2^24."""
    number %= 1 << BITS
    # Multiplication spreads every bit; black or white all over must not pass as zero.
    check = ((number + 1) * 0x9E3779B1 >> 16) & 0xFF
    return [bool((number << 8 | check) >> (CELLS - 1 - place) & 1) for place in range(CELLS)]
