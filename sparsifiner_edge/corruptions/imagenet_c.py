"""The fifteen corruptions of ImageNet-C, by its parameters."""

from __future__ import annotations

import io

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.corruptions.shared import (
    Change,
    Generator,
    blurred,
    dragged,
    pillow_images,
    scipy_images,
    to_pillow,
)  # fmt: skip

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
    radius, edge = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    return _through_lens(x, radius * scale, edge * scale)


def _through_lens(x: Array, radius: float, edge: float) -> Array:
    """Every point becomes a disk, whose edge is soft."""
    reach = np.arange(-int(radius + 3), int(radius + 3) + 1)
    disk = blurred((reach[:, None] ** 2 + reach**2 <= radius**2).astype(np.float32), edge)
    disk /= disk.sum()
    around = [(len(reach) // 2,) * 2] * 2
    shape = [length + 2 * len(reach) for length in x.shape[:2]]
    spread = np.fft.rfft2(disk, shape)
    found = np.empty_like(x)
    for channel in range(x.shape[2]):
        padded = np.pad(x[..., channel], around, "reflect")
        whole = np.fft.irfft2(np.fft.rfft2(padded, shape) * spread, shape)
        found[..., channel] = whole[len(reach) - 1 :, len(reach) - 1 :][: x.shape[0], : x.shape[1]]
    return found


def _glass_blur(x: Array, level: int, rng: Generator, scale: float) -> Array:
    sigma, reach, passes = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    x, far = blurred(x, sigma * scale).copy(), max(1, round(reach * scale))
    # Each pixel changes places with one near it. Published one by one; here a lattice of pixels at a time, no two of
    # which can meet.
    step = 2 * far + 1
    for _ in range(passes):
        for offset in rng.permutation(step * step):
            rows, columns = (
                grid.ravel()
                for grid in np.meshgrid(*(np.arange(o, n, step) for o, n in zip(divmod(int(offset), step), x.shape[:2],
                                                                               strict=True)), indexing="ij")
            )  # fmt: skip
            others = [
                np.clip(at + rng.integers(-far, far + 1, at.shape), 0, n - 1)
                for at, n in zip((rows, columns), x.shape[:2], strict=True)
            ]
            x[rows, columns], x[others[0], others[1]] = x[others[0], others[1]], x[rows, columns].copy()
    return blurred(x, sigma * scale)


def _motion_blur(x: Array, level: int, rng: Generator, scale: float) -> Array:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return dragged(x, radius * scale, sigma * scale, rng.uniform(-45, 45))


def _zoom_blur(x: Array, level: int, _rng: Generator, _scale: float) -> Array:
    most, step = ((1.10, 0.01), (1.15, 0.01), (1.20, 0.02), (1.24, 0.02), (1.30, 0.03))[level]
    factors = np.arange(1, most + step / 2, step)
    return (x + sum(_zoomed(x, float(factor)) for factor in factors)) / (len(factors) + 1)


def _zoomed(x: Array, factor: float) -> Array:
    """The centre of [H,W,3], enlarged to its size."""
    height, width = x.shape[:2]
    across, down = width / factor, height / factor
    left, top = (width - across) / 2, (height - down) / 2
    box, pillow = (left, top, left + across, top + down), pillow_images()
    enlarged = to_pillow(x).resize((width, height), pillow.Resampling.BILINEAR, box=box)
    return np.asarray(enlarged, np.float32) / 255


# Weather


def _snow(x: Array, level: int, rng: Generator, scale: float) -> Array:
    mean, deviation, zoom, least, radius, sigma, kept = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    height, width = x.shape[:2]
    size = [int(np.ceil(length / (zoom * scale))) + 1 for length in (height, width)]
    flakes = rng.normal(mean, deviation, size).astype(np.float32)
    rows, columns = (np.arange(length) / (zoom * scale) for length in (height, width))
    flakes = scipy_images().map_coordinates(flakes, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest")
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    flakes = dragged(flakes, radius * scale, sigma * scale, rng.uniform(-135, -45))[..., None]
    pale = kept * x + (1 - kept) * np.maximum(x, _grey(x)[..., None] * 1.5 + 0.5)
    snowy: Array = pale + flakes + flakes[::-1, ::-1]
    return snowy


def _grey(x: Array) -> Array:
    """Luma (ITU-R BT.601)."""
    return np.asarray(x @ np.array([0.299, 0.587, 0.114], np.float32))


def _frost(x: Array, level: int, rng: Generator, scale: float) -> Array:
    kept, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    return kept * x + ice * _crystals(x.shape[:2], rng, scale)


def _crystals(shape: tuple[int, ...], rng: Generator, scale: float) -> Array:
    """Ice on a pane [H,W,3]: needles along ridges, bluish; mean .62 and deviation .17, about those of photographs."""
    field = _clouds(shape, 1.4, rng)
    ridges = 1 - np.abs(2 * _clouds(shape, 1.3, rng) - 1)
    needles = dragged(
        rng.random(shape, np.float32) ** 6 * ridges.astype(np.float32), 12 * scale, 6 * scale, rng.uniform(0, 360)
    )
    drawn = field + ridges**3 + 2 * needles
    drawn = 0.62 + 0.17 * (drawn - drawn.mean()) / drawn.std()
    return np.asarray(np.clip(drawn[..., None] * np.array([0.92, 1, 1.08]), 0, 1))


def _fog(x: Array, level: int, rng: Generator, _scale: float) -> Array:
    density, roughness = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[level]
    most = x.max()
    foggy: Array = (x + density * _clouds(x.shape[:2], roughness, rng)[..., None]) * most / (most + density)
    return foggy


def _clouds(shape: tuple[int, ...], roughness: float, rng: Generator) -> Array:
    """A fractal surface [H,W] from 0 to 1, by midpoint displacement on a torus (the diamond-square algorithm).

    Args:
        roughness: displacements shrink by its square when distances halve: 2 is smooth, 1.4 rough.
    """
    side = 1 << int(np.ceil(np.log2(max(*shape, 2))))
    surface, reach = np.zeros((1, 1)), 1.0
    while len(surface) < side:
        # Points between: first the centres of squares, then those of edges, each the mean of its four neighbours.
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


def _brightness(x: Array, level: int, _rng: Generator, _scale: float) -> Array:
    # More of V in HSV, where hue and saturation stay: the colour times the ratio of the values.
    value = x.max(-1, keepdims=True)
    brighter = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 1)
    brightened: Array = np.where(value > 0, x * brighter / np.maximum(value, 1e-6), brighter)
    return brightened


# Digital


def _contrast(x: Array, level: int, _rng: Generator, _scale: float) -> Array:
    mean = x.mean((0, 1))
    return np.asarray((x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean)


def _elastic_transform(x: Array, level: int, rng: Generator, scale: float) -> Array:
    stretch, sigma, shear = (
        (488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88),
    )[level]  # fmt: skip
    height, width = x.shape[:2]
    # Three points about the centre move at random, which is an affine map; then everything is displaced smoothly.
    third = min(height, width) / 3
    corners = np.array([(1, 1), (1, -1), (-1, -1)]) * third
    to = corners + rng.uniform(-shear, shear, corners.shape) * scale
    affine = np.linalg.solve(np.column_stack([to, np.ones(3)]), corners)
    centre = np.array([height, width]) / 2
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1) - centre
    places = grid @ affine[:2] + affine[2] + centre
    for axis in (0, 1):
        drift = rng.uniform(-1, 1, (height, width))
        places[..., axis] += (
            stretch * scale * scipy_images().gaussian_filter(drift, sigma * scale, mode="reflect", truncate=3)
        )
    sampled = [scipy_images().map_coordinates(x[..., c], np.moveaxis(places, -1, 0), order=1, mode="mirror")
               for c in range(x.shape[2])]  # fmt: skip
    return np.stack(sampled, -1)


def _pixelate(x: Array, level: int, _rng: Generator, _scale: float) -> Array:
    share, pillow = (0.6, 0.5, 0.4, 0.3, 0.25)[level], pillow_images()
    height, width = x.shape[:2]
    small = to_pillow(x).resize((max(1, int(width * share)), max(1, int(height * share))), pillow.Resampling.BOX)
    return np.asarray(small.resize((width, height), pillow.Resampling.NEAREST), np.float32) / 255


def _jpeg_compression(x: Array, level: int, _rng: Generator, _scale: float) -> Array:
    file = io.BytesIO()
    to_pillow(x).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    return np.asarray(pillow_images().open(file), np.float32) / 255


IMAGENET_C: dict[str, Change] = {
    "gaussian_noise": _gaussian_noise, "shot_noise": _shot_noise, "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur, "glass_blur": _glass_blur, "motion_blur": _motion_blur, "zoom_blur": _zoom_blur,
    "snow": _snow, "frost": _frost, "fog": _fog, "brightness": _brightness, "contrast": _contrast,
    "elastic_transform": _elastic_transform, "pixelate": _pixelate, "jpeg_compression": _jpeg_compression,
}  # fmt: skip
"""By name, in the order of the paper."""
