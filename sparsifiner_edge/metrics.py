"""Measures of agreement between two arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from sparsifiner_edge.arrays import Array


def cosine(a: Array, b: Array) -> Array:
    """Return the cosine similarity along the last axis in float64; two zero vectors give 1.

    The shapes are [..., C] x [..., C] -> [...].
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm_a, norm_b = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore"):
        cosines = (a * b).sum(-1) / np.maximum(norm_a * norm_b, 1e-30)
    return np.asarray(np.where((norm_a == 0) & (norm_b == 0), 1.0, cosines))


def row_cosines(name: str, got: Array, expected: Array) -> Array:
    """Return the cosines of an output's rows: each token of "tokens" [B,N,C], each image of any other output.

    Cosines of single rows of a nearly empty map would be meaningless.
    """
    if name != "tokens":
        got, expected = (x.reshape(len(x), -1) for x in (got, expected))
    return cosine(got, expected)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Comparison of one output with its reference.

    Attributes:
        error: Greatest difference relative to the range of the reference (to its magnitude if it is constant, to 1 if
            it is 0).
        cosine: Lowest cosine over the rows; see `row_cosines`.
        mean: Mean cosine over the rows.
        worst: Index of the element with the greatest difference.
        got: Value there.
        expected: Reference value there.
        beyond: Share of elements whose difference exceeds the tolerance.
    """

    error: float
    cosine: float
    mean: float
    worst: tuple[int, ...]
    got: float
    expected: float
    beyond: float


def agreement(name: str, got: Array, expected: Array, tolerance: float) -> Agreement:
    """Compare two outputs of the same name and shape. NaN and infinite differences count as infinite."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    scale = float(np.ptp(b)) or float(np.abs(b).max()) or 1.0
    difference = np.abs(a - b)
    relative = np.where(np.isfinite(difference / scale), difference / scale, np.inf)
    worst = tuple(int(i) for i in np.unravel_index(int(relative.argmax()), relative.shape))
    cosines = np.nan_to_num(row_cosines(name, a, b), nan=-1.0)
    return Agreement(
        error=float(relative[worst]),
        cosine=float(cosines.min()),
        mean=float(cosines.mean()),
        worst=worst,
        got=float(a[worst]),
        expected=float(b[worst]),
        beyond=float((relative > tolerance).mean()),
    )


def mean_absolute_error(got: Array, expected: Array) -> float:
    """Return the mean absolute difference over all elements."""
    return float(np.abs(got.astype(np.float64) - expected.astype(np.float64)).mean())


def intersection_over_union(got: Array, expected: Array) -> float:
    """Return the IoU of two masks; 1 if both are empty."""
    union = int(np.logical_or(got, expected).sum())
    return int(np.logical_and(got, expected).sum()) / union if union else 1.0


def auroc(scores: Array, truth: Array) -> float | None:
    """Return the area under the ROC curve of scores for a mask; ties count half.

    None if the mask is empty or full: no order is right or wrong then.
    """
    flat, wanted = scores.ravel(), truth.ravel().astype(bool)
    positive = int(wanted.sum())
    negative = wanted.size - positive
    if not positive or not negative:
        return None
    _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[wanted].sum() - positive * (positive + 1) / 2) / (positive * negative))


POSITIONS = "token_positions"
"""Output with the positions of the patches in "tokens", for models that prune tokens."""
OTHER_TOKENS = 0.02
"""Share of the tokens that may differ from the reference's: of two tokens with equal scores, either may stay."""


def align(got: Mapping[str, Array], expected: Mapping[str, Array]) -> tuple[dict[str, Array], int]:
    """Align the outputs of a model that prunes tokens with those of another.

    Args:
        got: Outputs by name.
        expected: Outputs of the reference by name.

    Returns:
        `got` without positions, where a patch that only `expected` kept has the value of `expected`; and the number of
        those. Other outputs, and those of models that do not prune, are unchanged.
    """
    outputs = {name: value for name, value in got.items() if name != POSITIONS}
    if POSITIONS not in got or POSITIONS not in expected:
        return outputs, 0
    wanted, tokens, missing = expected[POSITIONS], expected["tokens"].copy(), 0
    prefix = tokens.shape[1] - wanted.shape[1]
    for number, (positions, reference) in enumerate(zip(got[POSITIONS], wanted, strict=True)):
        place = np.searchsorted(positions, reference).clip(max=len(positions) - 1)
        shared = positions[place] == reference
        tokens[number, :prefix] = got["tokens"][number, :prefix]
        tokens[number, prefix:][shared] = got["tokens"][number, prefix:][place[shared]]
        missing += int((~shared).sum())
    return outputs | {"tokens": tokens}, missing
