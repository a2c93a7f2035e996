"""What goes wrong between a scene and the bytes of its image that ImageNet-C leaves out."""

from __future__ import annotations

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.corruptions.shared import PUBLISHED_SIDE, Change, Generator, dragged, scipy_images

LOST = 16
"""Side of the blocks that a video decoder loses, in pixels (ITU-T H.264: a macroblock)."""


def _linear(x: Array) -> Array:
    """Light of sRGB values (IEC 61966-2-1), both from 0 to 1."""
    return np.where(x <= 0.04045, x / 12.92, ((np.maximum(x, 0.04045) + 0.055) / 1.055) ** 2.4)


def _encoded(light: Array) -> Array:
    """sRGB values of light; what is beyond white is white."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)


def _low_light(x: Array, level: int, rng: Generator, _scale: float) -> Array:
    """A sensor of 4000 electrons, 4 of read noise, that amplifies eight times at most (model: EMVA 1288)."""
    exposure, full, read, most = (0.2, 0.1, 0.05, 0.02, 0.008)[level], 4000, 4, 8.0
    electrons = rng.poisson(_linear(x) * exposure * full) + rng.normal(0, read, x.shape)
    return _encoded(electrons / full * min(1 / exposure, most))


def _rolling_bands(x: Array, level: int, rng: Generator, _scale: float) -> Array:
    """Light of lamps on alternating current, read row by row: three to five dark bands."""
    depth = (0.2, 0.35, 0.5, 0.7, 0.9)[level]
    rows = np.linspace(0, 1, x.shape[0])[:, None, None]
    wave = np.sin(2 * np.pi * (rng.uniform(3, 5) * rows + rng.random()))
    return _encoded(_linear(x) * (1 - depth * (0.5 + 0.5 * wave)))


def _dropped_blocks(x: Array, level: int, rng: Generator, _scale: float) -> Array:
    """Runs of macroblocks that did not arrive; a decoder repeats the line above, or shows grey."""
    found: Array = x.copy()
    lost = (0.03, 0.06, 0.12, 0.2, 0.35)[level]
    down, across = (-(-length // LOST) for length in x.shape[:2])
    while lost > 0:
        run = int(rng.integers(max(1, across // 4), across + 1))
        row, column = int(rng.integers(down)) * LOST, int(rng.integers(0, across - run + 1)) * LOST
        hole = found[row : row + LOST, column : column + run * LOST]
        hole[...] = found[row - 1, column : column + run * LOST] if row and rng.random() < 0.7 else 0.5
        lost -= run / (down * across)
    return found


def _rain(x: Array, level: int, rng: Generator, scale: float) -> Array:
    """Streaks of falling drops, brighter than what is behind them; less contrast in the distance."""
    drops, length, veil = ((60, 14, 0.03), (120, 18, 0.06), (220, 24, 0.1), (360, 30, 0.15), (550, 36, 0.2))[level]
    sky = np.zeros(x.shape[:2], np.float32)
    area = x.shape[0] * x.shape[1] / (PUBLISHED_SIDE * scale) ** 2
    size = max(1, round(scale))
    for _ in range(round(drops * area)):
        top, left = (int(rng.integers(0, n)) for n in x.shape[:2])
        sky[top : top + size, left : left + size] = rng.uniform(0.5, 1)
    streaks = dragged(sky, length * scale / 2, length * scale / 2, -90 + rng.uniform(-20, 20))
    streaks = np.clip(0.55 * streaks / max(float(streaks.max()), 1e-6), 0, 1)[..., None]
    veiled = (1 - veil) * x + veil * 0.7
    return veiled + streaks * (0.9 - veiled)


def _rotation(x: Array, level: int, rng: Generator, _scale: float) -> Array:
    """A mount that is turned to either side; the rest of the scene, which an image does not hold, is cut away."""
    degrees = (5, 10, 20, 45, 90)[level] * rng.choice([-1, 1])
    height, width = x.shape[:2]
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    # The largest upright box of this shape within the turned image.
    shrunk = min(
        height / (height * abs(cosine) + width * abs(sine)), width / (width * abs(cosine) + height * abs(sine))
    )
    rows, columns = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * shrunk for n in (height, width)), indexing="ij")
    places = [cosine * rows + sine * columns + (height - 1) / 2, cosine * columns - sine * rows + (width - 1) / 2]
    sampled = [scipy_images().map_coordinates(x[..., c], places, order=1, mode="nearest") for c in range(x.shape[2])]
    return np.stack(sampled, -1)


OF_CAMERAS: dict[str, Change] = {
    "low_light": _low_light, "rolling_bands": _rolling_bands, "dropped_blocks": _dropped_blocks, "rain": _rain,
    "rotation": _rotation,
}  # fmt: skip
"""By name."""
