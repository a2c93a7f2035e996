"""The fifteen corruptions of ImageNet-C with its parameters.

Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR
2019. The published lengths are for images of 224 px. Here they scale with the shorter side, so that a severity has the
same effect on a scene at any size. Frost is drawn, while the published one is pasted from photographs. No maintained
library provides these corruptions.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.errors import ConfigError

SEVERITIES = (1, 2, 3, 4, 5)
PUBLISHED_SIDE = 224
"""Side in pixels of the images that the published lengths are for."""
Generator: TypeAlias = np.random.Generator
Change: TypeAlias = Callable[[Array, int, Generator, float], Array]
"""(image [H,W,3] from 0 to 1, severity from 0, generator, scale of lengths) -> image."""


def corrupt(image: Pixels, name: str, severity: int, seed: int) -> Pixels:
    """Return a corrupted image.

    Args:
        image: uint8 RGB [H,W,3].
        name: Name of a corruption, from `COMMON`.
        severity: Severity, from `SEVERITIES`.
        seed: Seed of the random parts.

    Returns:
        uint8 RGB [H,W,3]; the same for the same arguments.

    Raises:
        ConfigError: The name or the severity is unknown.
    """
    rng, scale = _draw(name, severity, seed), min(image.shape[:2]) / PUBLISHED_SIDE
    changed = _CHANGES[name](image.astype(np.float32) / 255, severity - 1, rng, scale)
    pixels: Pixels = np.rint(255 * np.clip(changed, 0, 1)).astype(np.uint8)
    return pixels


def move_mask(mask: npt.NDArray[np.bool_], name: str, severity: int, seed: int) -> npt.NDArray[np.bool_]:
    """Move a mask [H,W] as `corrupt` moves the pixels of its image.

    Only "elastic_transform" moves pixels.
    """
    rng = _draw(name, severity, seed)
    if name != "elastic_transform":
        return mask
    scale = min(mask.shape) / PUBLISHED_SIDE
    return np.asarray(_elastic_transform(mask[..., None].astype(np.float32), severity - 1, rng, scale)[..., 0] > 0.5)


def parse_corruptions(text: str) -> tuple[str, ...]:
    """Parse "all" or comma-separated names; returns them in the order of `COMMON`.

    Raises:
        ConfigError: A name is unknown, or none is given.
    """
    named = set(COMMON) if text == "all" else {part.strip() for part in text.split(",")}
    if unknown := named.difference(COMMON):
        fix = f"Choose all, or of: {', '.join(COMMON)}."
        raise ConfigError(f"The corruption {min(unknown)!r} is unknown.", fix)
    return tuple(name for name in COMMON if name in named)


def _draw(name: str, severity: int, seed: int) -> Generator:
    """Return a generator that depends only on the arguments."""
    (name,) = parse_corruptions(name)
    if severity not in SEVERITIES:
        raise ConfigError(f"severity is {severity}.", f"Choose {SEVERITIES[0]} to {SEVERITIES[-1]}.")
    return np.random.default_rng([seed, COMMON.index(name), severity])


# Noise


def _gaussian_noise(x: Array, level: int, rng: Generator, _scale: float) -> Array:
    return x + rng.normal(0, (0.08, 0.12, 0.18, 0.26, 0.38)[level], x.shape)


def _shot_noise(x: Array, level: int, rng: Generator, _scale: float) -> Array:
    photons = (60, 25, 12, 5, 3)[level]
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Array, level: int, rng: Generator, _scale: float) -> Array:
    hit = rng.random(x.shape) < (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    return np.where(hit, rng.integers(0, 2, x.shape), x)


# Blur


def _defocus_blur(x: Array, level: int, _rng: Generator, scale: float) -> Array:
    """Blur every point to a disk with a soft edge."""
    radius, edge = (scale * x for x in ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level])
    reach = np.arange(-int(radius + 3), int(radius + 3) + 1)
    disk = _blur((reach[:, None] ** 2 + reach**2 <= radius**2).astype(np.float32), edge)
    around, shape = len(reach) // 2, [length + 2 * len(reach) for length in x.shape[:2]]
    spread = np.fft.rfft2(disk / disk.sum(), shape)[..., None]
    padded = np.pad(x, ((around, around), (around, around), (0, 0)), "reflect")
    blurred = np.fft.irfft2(np.fft.rfft2(padded, shape, (0, 1)) * spread, shape, (0, 1))
    return np.asarray(blurred[len(reach) - 1 :, len(reach) - 1 :][: x.shape[0], : x.shape[1]])


def _glass_blur(x: Array, level: int, rng: Generator, scale: float) -> Array:
    sigma, reach, passes = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    x, far = _blur(x, sigma * scale).copy(), max(1, round(reach * scale))
    # Each pixel swaps places with a neighbour. The published code swaps one pixel at a time. Here all pixels of a
    # lattice are swapped at once; the lattice is so wide that their neighbourhoods do not overlap.
    step = 2 * far + 1
    for _ in range(passes):
        for offset in rng.permutation(step * step):
            lines = (np.arange(o, n, step) for o, n in zip(divmod(int(offset), step), x.shape[:2], strict=True))
            rows, columns = (grid.ravel() for grid in np.meshgrid(*lines, indexing="ij"))
            others = tuple(
                np.clip(at + rng.integers(-far, far + 1, at.shape), 0, n - 1)
                for at, n in zip((rows, columns), x.shape[:2], strict=True)
            )
            x[rows, columns], x[others] = x[others], x[rows, columns].copy()
    return _blur(x, sigma * scale)


def _motion_blur(x: Array, level: int, rng: Generator, scale: float) -> Array:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return _drag(x, radius * scale, sigma * scale, rng.uniform(-45, 45))


def _zoom_blur(x: Array, level: int, _rng: Generator, _scale: float) -> Array:
    most, step = ((1.10, 0.01), (1.15, 0.01), (1.20, 0.02), (1.24, 0.02), (1.30, 0.03))[level]
    factors = np.arange(1, most + step / 2, step)
    (height, width), image = x.shape[:2], _to_pillow(x)
    total = x.copy()
    for factor in factors:
        left, top = (width - width / factor) / 2, (height - height / factor) / 2
        box = (left, top, width - left, height - top)
        total += np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box), np.float32) / 255
    return np.asarray(total / (len(factors) + 1))


# Weather


def _snow(x: Array, level: int, rng: Generator, scale: float) -> Array:
    mean, deviation, zoom, least, radius, sigma, share = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    size = [int(np.ceil(length / (zoom * scale))) + 1 for length in x.shape[:2]]
    flakes = rng.normal(mean, deviation, size).astype(np.float32)
    places = np.meshgrid(*(np.arange(length) / (zoom * scale) for length in x.shape[:2]), indexing="ij")
    flakes = ndimage.map_coordinates(flakes, places, order=1, mode="nearest")
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    flakes = _drag(flakes, radius * scale, sigma * scale, rng.uniform(-135, -45))[..., None]
    grey = x @ np.array([0.299, 0.587, 0.114], np.float32)  # luma, ITU-R BT.601
    pale = share * x + (1 - share) * np.maximum(x, grey[..., None] * 1.5 + 0.5)
    return np.asarray(pale + flakes + flakes[::-1, ::-1])


def _frost(x: Array, level: int, rng: Generator, scale: float) -> Array:
    """Draw bluish ice needles along ridges, with the mean (.62) and deviation (.17) of photographs of frost."""
    share, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    shape = x.shape[:2]
    field = _clouds(shape, 1.4, rng)
    ridges = 1 - np.abs(2 * _clouds(shape, 1.3, rng) - 1)
    seeds = rng.random(shape, np.float32) ** 6 * ridges.astype(np.float32)
    drawn = field + ridges**3 + 2 * _drag(seeds, 12 * scale, 6 * scale, rng.uniform(0, 360))
    drawn = 0.62 + 0.17 * (drawn - drawn.mean()) / drawn.std()
    return np.asarray(share * x + ice * np.clip(drawn[..., None] * np.array([0.92, 1, 1.08]), 0, 1))


def _fog(x: Array, level: int, rng: Generator, _scale: float) -> Array:
    density, roughness = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[level]
    most = x.max()
    return np.asarray((x + density * _clouds(x.shape[:2], roughness, rng)[..., None]) * most / (most + density))


def _brightness(x: Array, level: int, _rng: Generator, _scale: float) -> Array:
    # Raise V in HSV: multiply the colour by the ratio of the values, which keeps hue and saturation.
    value = x.max(-1, keepdims=True)
    brighter = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 1)
    return np.asarray(np.where(value > 0, x * brighter / np.maximum(value, 1e-6), brighter))


# Digital


def _contrast(x: Array, level: int, _rng: Generator, _scale: float) -> Array:
    mean = x.mean((0, 1))
    return np.asarray((x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean)


def _elastic_transform(x: Array, level: int, rng: Generator, scale: float) -> Array:
    stretch, sigma, shear = (
        (488, 170.8, 24.4),
        (488, 19.52, 48.8),
        (12.2, 2.44, 4.88),
        (17.08, 2.44, 4.88),
        (29.28, 2.44, 4.88),
    )[level]
    shape = x.shape[:2]
    # Three points around the centre move at random (an affine map), then everything is displaced smoothly.
    corners = np.array([(1, 1), (1, -1), (-1, -1)]) * min(shape) / 3
    to = corners + rng.uniform(-shear, shear, corners.shape) * scale
    affine = np.linalg.solve(np.column_stack([to, np.ones(3)]), corners)
    centre = np.array(shape) / 2
    grid = np.moveaxis(np.indices(shape), 0, -1) - centre
    places = np.moveaxis(grid @ affine[:2] + affine[2] + centre, -1, 0)
    for axis in (0, 1):
        drift = ndimage.gaussian_filter(rng.uniform(-1, 1, shape), sigma * scale, mode="reflect", truncate=3)
        places[axis] += stretch * scale * drift
    return np.stack([ndimage.map_coordinates(x[..., c], places, order=1, mode="mirror") for c in range(x.shape[2])], -1)


def _pixelate(x: Array, level: int, _rng: Generator, _scale: float) -> Array:
    share, (height, width) = (0.6, 0.5, 0.4, 0.3, 0.25)[level], x.shape[:2]
    small = _to_pillow(x).resize((max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST), np.float32) / 255


def _jpeg_compression(x: Array, level: int, _rng: Generator, _scale: float) -> Array:
    file = io.BytesIO()
    _to_pillow(x).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    return np.asarray(Image.open(file), np.float32) / 255


# Shared helpers


def _clouds(shape: tuple[int, ...], roughness: float, rng: Generator) -> Array:
    """Return a fractal surface [H,W] from 0 to 1 (diamond-square algorithm on a torus).

    Args:
        shape: Height and width; more axes are ignored.
        roughness: Displacements shrink by its square when distances halve: 2 is smooth, 1.4 is rough.
        rng: Random generator.
    """
    side = 1 << int(np.ceil(np.log2(max(*shape, 2))))
    surface, reach = np.zeros((1, 1)), 1.0
    while len(surface) < side:
        # First the centres of squares, then of edges: each is the mean of its four neighbours.
        centres = (surface + np.roll(surface, -1, 0) + np.roll(surface, -1, 1) + np.roll(surface, (-1, -1), (0, 1))) / 4
        centres = centres + reach * rng.uniform(-1, 1, centres.shape)
        right = (surface + np.roll(surface, -1, 1) + centres + np.roll(centres, 1, 0)) / 4
        below = (surface + np.roll(surface, -1, 0) + centres + np.roll(centres, 1, 1)) / 4
        finer = np.empty((2 * len(surface), 2 * len(surface)))
        finer[::2, ::2], finer[1::2, 1::2] = surface, centres
        finer[::2, 1::2] = right + reach * rng.uniform(-1, 1, right.shape)
        finer[1::2, ::2] = below + reach * rng.uniform(-1, 1, below.shape)
        surface, reach = finer, reach / roughness**2
    surface = surface - surface.min()
    return np.asarray((surface / max(surface.max(), 1e-9))[: shape[0], : shape[1]])


def _to_pillow(image: Array) -> Any:
    """Convert [H,W,3] from 0 to 1 to a Pillow image."""
    return Image.fromarray(np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8))


def _blur(image: Array, sigma: float) -> Array:
    """Apply a Gaussian along rows and columns."""
    return np.asarray(ndimage.gaussian_filter(image, (sigma, sigma, *(0,) * (image.ndim - 2)), mode="nearest"))


def _drag(x: Array, radius: float, sigma: float, degrees: float) -> Array:
    """Smear every point to one side, with weights that fall off as a Gaussian."""
    count = 2 * round(radius) + 1
    weights = np.exp(-0.5 * (np.arange(count) / sigma) ** 2)
    weights /= weights.sum()
    down, right = -np.sin(np.deg2rad(degrees)), -np.cos(np.deg2rad(degrees))
    padded = np.pad(x, ((count, count), (count, count), *((0, 0),) * (x.ndim - 2)), "edge")
    trail = np.zeros_like(x)
    for number, weight in enumerate(weights):
        top, left = (count + round(number * part) for part in (down, right))
        trail += weight * padded[top : top + x.shape[0], left : left + x.shape[1]]
    return trail


_CHANGES: dict[str, Change] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
COMMON = tuple(_CHANGES)
"""Names in the order of the paper."""
