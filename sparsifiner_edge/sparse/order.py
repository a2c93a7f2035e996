"""Token order: a Hilbert curve over any grid, so that a run of consecutive tokens is a compact patch of the image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
_Step = tuple[int, int]


def hilbert_order(height: int, width: int) -> IntArray:
    """Raster indices of a height x width grid in the order of a generalised Hilbert curve: int64 [height * width].

    On a square whose side is a power of two every aligned run of 4^n tokens is a square. Other grids are cut in
    halves or thirds along their longer side until one row is left, which keeps steps between neighbours short.
    """
    across, down = (width, 0), (0, height)
    path = _curve((0, 0), across, down) if width >= height else _curve((0, 0), down, across)
    return np.array([y * width + x for x, y in path], dtype=np.int64)


def inverse(order: IntArray) -> IntArray:
    """The permutation that undoes `order`."""
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return back


def _curve(start: _Step, long: _Step, short: _Step) -> Iterator[_Step]:
    """Points of the curve that fills the box spanned by `long` and `short` from `start`, ending along `long`."""
    length, breadth = abs(sum(long)), abs(sum(short))
    along, aside = _unit(long), _unit(short)
    if breadth == 1 or length == 1:
        step = along if breadth == 1 else aside
        yield from (_move(start, step, i) for i in range(max(length, breadth)))
        return
    half_long, half_short = _half(long), _half(short)
    if 2 * length > 3 * breadth:
        half_long = _even(half_long, along, length)
        yield from _curve(start, half_long, short)
        yield from _curve(_add(start, half_long), _sub(long, half_long), short)
        return
    half_short = _even(half_short, aside, breadth)
    yield from _curve(start, half_short, half_long)
    yield from _curve(_add(start, half_short), long, _sub(short, half_short))
    corner = _add(_add(start, _sub(long, along)), _sub(half_short, aside))
    yield from _curve(corner, _scale(half_short, -1), _scale(_sub(long, half_long), -1))


def _even(half: _Step, unit: _Step, whole: int) -> _Step:
    """Lengthen an odd half by one, so that the curve can turn without a diagonal step."""
    return _add(half, unit) if abs(sum(half)) % 2 and whole > 2 else half


def _half(step: _Step) -> _Step:
    return step[0] // 2, step[1] // 2


def _unit(step: _Step) -> _Step:
    return (step[0] > 0) - (step[0] < 0), (step[1] > 0) - (step[1] < 0)


def _add(a: _Step, b: _Step) -> _Step:
    return a[0] + b[0], a[1] + b[1]


def _sub(a: _Step, b: _Step) -> _Step:
    return a[0] - b[0], a[1] - b[1]


def _scale(step: _Step, factor: int) -> _Step:
    return step[0] * factor, step[1] * factor


def _move(start: _Step, step: _Step, times: int) -> _Step:
    return _add(start, _scale(step, times))
