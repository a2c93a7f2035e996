"""A number drawn into an image, so that whoever reads the answer knows which frame it is about.

The centre square of the image is a grid of 8 x 8 cells; the upper four rows hold 32 bits, black or white: 24 of the
number, 8 of its check. Plain Python: servers in tests draw it without NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence

GRID = 8
BITS = 24
_CELLS = 32
_UNSURE = 0.2


def cells_of(number: int) -> list[bool]:
    """The 32 cells, in raster order, that say `number` modulo 2^24."""
    number %= 1 << BITS
    word = number << 8 | _check(number)
    return [bool(word >> (_CELLS - 1 - place) & 1) for place in range(_CELLS)]


def number_of(brightness: Sequence[float]) -> int | None:
    """The number that cells of mean brightness 0-255, at least the first 32 of the grid, say; None if they do not."""
    word = 0
    for value in brightness[:_CELLS]:
        if abs(value / 255 - 0.5) < _UNSURE:
            return None
        word = word << 1 | (value > 127.5)
    number, check = word >> 8, word & 0xFF
    return number if check == _check(number) else None


def _check(number: int) -> int:
    # Multiplication spreads every bit; black or white all over must not pass as zero.
    return ((number + 1) * 0x9E3779B1 >> 16) & 0xFF
