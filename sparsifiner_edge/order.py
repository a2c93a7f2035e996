"""Token order along a Hilbert curve, so that consecutive tokens form a compact region of the image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def hilbert_order(height: int, width: int) -> IntArray:
    """Return the raster indices of a grid along a generalised Hilbert curve: int64 [height * width].

    On a square whose side is a power of two, every aligned run of 4^n tokens is a square. Other grids are cut in halves
    or thirds along their longer side until one row is left, which keeps steps between neighbours short.
    """
    across, down = complex(width, 0), complex(0, height)
    path = np.array(list(_curve(0, across, down) if width >= height else _curve(0, down, across)))
    return np.asarray(path.imag * width + path.real, dtype=np.int64)


def _curve(start: complex, long: complex, short: complex) -> Iterator[complex]:
    """Yield the points x + yi of the curve that fills the box spanned by `long` and `short`, ending along `long`."""
    length, breadth = abs(long), abs(short)
    along, aside = long / length, short / breadth
    if breadth == 1 or length == 1:
        step = along if breadth == 1 else aside
        yield from (start + i * step for i in range(int(max(length, breadth))))
        return
    half_long, half_short = (complex(side.real // 2, side.imag // 2) for side in (long, short))
    if 2 * length > 3 * breadth:
        half_long = _even(half_long, along, length)
        yield from _curve(start, half_long, short)
        yield from _curve(start + half_long, long - half_long, short)
        return
    half_short = _even(half_short, aside, breadth)
    yield from _curve(start, half_short, half_long)
    yield from _curve(start + half_short, long, short - half_short)
    corner = start + (long - along) + (half_short - aside)
    yield from _curve(corner, -half_short, half_long - long)


def _even(half: complex, unit: complex, whole: float) -> complex:
    """Lengthen an odd half by one, so that the curve can turn without a diagonal step."""
    return half + unit if abs(half) % 2 and whole > 2 else half
