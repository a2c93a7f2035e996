"""What several corruptions are made of."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import MissingExtraError

PUBLISHED_SIDE = 224
"""Pixels of the images that lengths are published for."""
Generator: TypeAlias = np.random.Generator
Change: TypeAlias = Callable[[Array, int, Generator, float], Array]
"""(image [H,W,3] from 0 to 1, severity from 0, what draws, pixels now for one that was published) -> image."""


def scipy_images() -> Any:
    """SciPy's module of filters and of maps of coordinates."""
    try:
        return importlib.import_module("scipy.ndimage")
    except ImportError as error:
        raise MissingExtraError("scipy", "train") from error


def pillow_images() -> Any:
    """Pillow's module of images."""
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise MissingExtraError("pillow", "train") from error


def to_pillow(image: Array) -> Any:
    """Of [H,W,3] from 0 to 1."""
    return pillow_images().fromarray(np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8))


def blurred(image: Array, sigma: float) -> Array:
    """Gaussian, along rows and columns."""
    blurred: Array = scipy_images().gaussian_filter(image, (sigma, sigma, *(0,) * (image.ndim - 2)), mode="nearest")
    return blurred


def dragged(x: Array, radius: float, sigma: float, degrees: float) -> Array:
    """Every point leaves a trail to one side, that fades as a Gaussian."""
    count = 2 * round(radius) + 1
    weights = np.exp(-0.5 * (np.arange(count) / sigma) ** 2)
    weights /= weights.sum()
    down, right = -np.sin(np.deg2rad(degrees)), -np.cos(np.deg2rad(degrees))
    padded = np.pad(x, ((count, count), (count, count), *((0, 0),) * (x.ndim - 2)), "edge")
    found = np.zeros_like(x)
    for number, weight in enumerate(weights):
        top, left = (count + round(number * part) for part in (down, right))
        found += weight * padded[top : top + x.shape[0], left : left + x.shape[1]]
    return found
