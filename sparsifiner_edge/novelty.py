"""How unlike the images that a model was calibrated on an image is: one number, from what early layers make of it.

Of the patches after an early layer, the mean of each channel and the logarithm of its deviation are the *statistics* of
an image. Calibration fits a Gaussian to those of its images: variances along their principal components, one variance
for all that is left (probabilistic PCA, Tipping and Bishop 1999; as a detector on inner features, Lee et al. 2018).
`novelty` is the Mahalanobis distance to it, over the distance that a stated share of images like the calibration's
exceed: above 1 is unlike them.

That misses what is emptier than any image, such as a covered lens: it lies near the middle of everything. So the mean
of the logarithms, an image's *contrast*, counts as well; its fourth power, which hardly moves the score of others.

Final features say next to nothing of all this: their training made them alike under what changes early ones. Layer and
statistics were chosen on development images (`benchmarks/novelty.py score --development`).
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import ConfigError

NOVELTY = "novelty"
"""The output's name, and of its part in a file: initialisers are "novelty.mean" and so on, after the fields below."""
FALSE_ALARMS = 0.01
"""Share of images like the calibration's that may score above 1."""
LEAST_IMAGES = 8
COMPONENTS = 64
_THIRDS, _TENTHS = 3, 10
_FARTHEST = 3.0
"""How many times as far from the middle as the farthest image, judged by its own kind, the limit may lie at most."""
_NEAREST = 1e-6
"""Squared distance: images that are all the same have none."""
_FEWEST = 4.0
"""Independent images that any calibration counts for."""
_SHRINK = 0.1
"""How far variances are drawn towards 1: few images say little of them."""


class Density(NamedTuple):
    """The Gaussian, float32.

    Attributes:
        mean: of the statistics [S]. scale: one over their deviations [S]. components: [S,64], beyond what the images
            tell zeros. variances: 1 over the variance along each, less `rest` [64]. rest: 1 over the variance of all
            that is left [1].
        limit: 1 over the greatest squared distance [1]. usual: contrast [1]. below: 1 over how far below that [1].
    """

    mean: Array
    scale: Array
    components: Array
    variances: Array
    rest: Array
    limit: Array
    usual: Array
    below: Array


def fit_density(rows: Array, false_alarms: float = FALSE_ALARMS) -> Density:
    """Fit to statistics [images,S] of images in their order.

    Limits come of images that the Gaussian they are judged by has not seen. How far they scatter is told by thirds,
    each judged by the two others, for neighbours may show the same. Their middle is that of tenths, since two thirds of
    few images know less than all of them.

    Where a third is of another kind than the rest, such as a night at the end, it lies so far from them that no limit
    would be left. So each image is judged as well by images before and after it, of thirds that are two sixths each.

    Raises:
        ConfigError: fewer than `LEAST_IMAGES`; a share of false alarms that is none; images that are all the same.
    """
    if len(rows) < LEAST_IMAGES:
        raise ConfigError(f"{len(rows)} images are too few to say what is like them.", f"Give {LEAST_IMAGES} or more.")
    if not 0 < false_alarms < 0.5:
        raise ConfigError(f"{false_alarms:g} is no share of false alarms.", "Give one between 0 and .5, such as .01.")
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all() or np.ptp(rows, 0).max() == 0:
        raise ConfigError("These images are all the same, or make NaN.", "Give frames that differ as the scene does.")
    contrast = _contrast(rows)
    distances, emptiness = _held_out(rows, contrast, _THIRDS)
    middle = float(np.median(_held_out(rows, contrast, _TENTHS)[0]))
    scattered = distances - np.median(distances)
    farthest = float(_held_out(rows, contrast, _THIRDS, 2)[0].max()) + 2 * math.log(_FARTHEST)
    limits = {
        # Either may raise the alarm: each gets half of the share.
        "limit": math.exp(-min(middle + _reach(scattered, false_alarms / 2), farthest)),
        "usual": float(np.median(contrast)),
        "below": 1 / _reach(emptiness, false_alarms / 2),
    }
    return _gaussian(rows)._replace(**{name: np.array([value], np.float32) for name, value in limits.items()})


def _held_out(rows: Array, contrast: Array, shares: int, runs: int = 1) -> tuple[Array, Array]:
    """Of each image, by all outside of its share, which is so many runs of neighbours: log distance, and how far below
    their contrast it is.
    """
    distances, emptiness = np.empty(len(rows)), np.empty(len(rows))
    parts = np.array_split(np.arange(len(rows)), min(shares * runs, len(rows)))
    for first in range(min(shares, len(parts))):
        run = np.concatenate(parts[first::shares])
        squares = squared_distance(_gaussian(np.delete(rows, run, 0)), rows[run])
        distances[run] = np.log(np.maximum(squares, _NEAREST))
        emptiness[run] = np.median(np.delete(contrast, run)) - contrast[run]
    return distances, emptiness


def novelty(density: Density, rows: Array) -> Array:
    """The score of statistics [images,S] -> [images], 0 and above."""
    emptier = np.maximum((density.usual - _contrast(rows)) * density.below, 0)
    return np.asarray(np.maximum(np.sqrt(squared_distance(density, rows) * density.limit), emptier**4))


def squared_distance(density: Density, rows: Array) -> Array:
    """[images,S] -> [images]."""
    z = (rows - density.mean) * density.scale
    along = z @ density.components
    return np.asarray(along**2 @ density.variances + (z**2).sum(1) * density.rest)


def _contrast(rows: Array) -> Array:
    """The mean of the statistics' second half."""
    return np.asarray(rows[:, rows.shape[1] // 2 :].mean(1))


def _gaussian(rows: Array) -> Density:
    mean, deviation = rows.mean(0), rows.std(0)
    # A channel that hardly varies would tell every image apart.
    scale = 1 / np.maximum(deviation, 0.01 * np.median(deviation) + 1e-12)
    z = (rows - mean) * scale
    _, singular, axes = np.linalg.svd(z, full_matrices=False)
    kept = min(COMPONENTS, len(rows) // 4, rows.shape[1] - 1)
    along = singular**2 / len(rows)
    rest = along[kept:].sum() / (rows.shape[1] - kept)
    along, rest = ((1 - _SHRINK) * x + _SHRINK for x in (along[:kept], rest))
    components, variances = np.zeros((rows.shape[1], COMPONENTS)), np.zeros(COMPONENTS)
    components[:, :kept], variances[:kept] = axes[:kept].T, 1 / along - 1 / rest
    parts = mean, scale, components, variances, [1 / rest], [1], [0], [1]
    return Density(*(np.ascontiguousarray(part, np.float32) for part in parts))


def _reach(values: Array, share: float) -> float:
    """How far above 0 a share of such values lies: by a normal's upper half, with room for how little few values say
    (Student's t, the first term of its expansion), or as far as the values themselves go.

    Neighbouring frames are alike: so many count as would be independent with the correlation that neighbours have.
    """
    squares = float((values**2).sum())
    correlation = float(np.clip((values[1:] * values[:-1]).sum() / max(squares, 1e-12), 0, 0.999))
    count = max(_FEWEST, len(values) * (1 - correlation) / (1 + correlation))
    z = NormalDist().inv_cdf(1 - share)
    above = values[values >= 0]
    deviation = math.sqrt(float((above**2).mean())) if above.size else 0.0
    predicted = (z + (z**3 + z) / (4 * (count - 1))) * math.sqrt(1 + 1 / count) * deviation
    return max(predicted, float(np.quantile(values, 1 - share)), 1e-6)
