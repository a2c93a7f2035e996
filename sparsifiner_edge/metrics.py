"""Measures of agreement between two arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def cosine(a: Array, b: Array) -> Array:
    """Cosine similarity along the last axis, in float64: [..., C] x [..., C] -> [...]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.maximum(norms, 1e-30))


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How one output compares with its reference.

    Attributes:
        error: greatest difference, relative to the range of the reference.
        cosine: least cosine over the rows of the last axis.
        worst: index of the element with the greatest difference; got, expected: its values.
        beyond: share of elements whose difference exceeds the tolerance.
    """

    error: float
    cosine: float
    worst: tuple[int, ...]
    got: float
    expected: float
    beyond: float


def agreement(got: Array, expected: Array, tolerance: float) -> Agreement:
    """Compare two arrays of one shape; NaN and infinity count as an infinite difference."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    difference = np.abs(a - b) / max(float(np.ptp(b)), 1e-30)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    worst = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape))
    return Agreement(
        error=float(difference.max()),
        cosine=float(np.nan_to_num(cosine(a, b), nan=-1.0).min()),
        worst=worst,
        got=float(a[worst]),
        expected=float(b[worst]),
        beyond=float((difference > tolerance).mean()),
    )
