"""Measures of agreement between two arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from sparsifiner_edge.arrays import Array


def cosine(a: Array, b: Array) -> Array:
    """Cosine similarity along the last axis, in float64: [..., C] x [..., C] -> [...]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.maximum(norms, 1e-30))


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How one output compares with its reference.

    Attributes:
        difference: greatest difference.
        error: greatest difference, relative to the range of the reference (for a constant its magnitude; for zeros 1).
        cosine, mean: least and mean cosine over the rows of the last axis.
        worst: index of the element with the greatest difference; got, expected: its values.
        beyond: share of elements whose difference exceeds the tolerance.
    """

    difference: float
    error: float
    cosine: float
    mean: float
    worst: tuple[int, ...]
    got: float
    expected: float
    beyond: float


def agreement(got: Array, expected: Array, tolerance: float) -> Agreement:
    """Compare two arrays of one shape; a difference that is NaN or infinite counts as infinite."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    scale = float(np.ptp(b)) or float(np.abs(b).max()) or 1.0
    difference = np.abs(a - b)
    relative = np.where(np.isfinite(difference / scale), difference / scale, np.inf)
    worst = tuple(int(i) for i in np.unravel_index(int(relative.argmax()), relative.shape))
    with np.errstate(invalid="ignore"):
        cosines = np.nan_to_num(cosine(a, b), nan=-1.0)
    return Agreement(
        difference=float(difference[worst]),
        error=float(relative[worst]),
        cosine=float(cosines.min()),
        mean=float(cosines.mean()),
        worst=worst,
        got=float(a[worst]),
        expected=float(b[worst]),
        beyond=float((relative > tolerance).mean()),
    )


POSITIONS = "token_positions"
"""Output that says where the patches in "tokens" lie, in models that prune tokens."""
OTHER_TOKENS = 0.02
"""Share of the tokens that may differ from the reference's: of two with equal scores either may stay."""


def aligned(got: Mapping[str, Array], expected: Mapping[str, Array]) -> tuple[dict[str, Array], int]:
    """Outputs of a model that prunes tokens, with its patches at another's positions.

    Args:
        got, expected: outputs by name.

    Returns:
        `got` without positions, where a patch that only `expected` kept is that of `expected`; and the number of those.
        Other outputs, and those of models that do not prune, are unchanged.
    """
    outputs = {name: value for name, value in got.items() if name != POSITIONS}
    if POSITIONS not in got or POSITIONS not in expected:
        return outputs, 0
    wanted, tokens, missing = expected[POSITIONS], expected["tokens"].copy(), 0
    prefix = tokens.shape[1] - wanted.shape[1]
    for number, (own, other) in enumerate(zip(got[POSITIONS], wanted, strict=True)):
        place = np.searchsorted(own, other).clip(max=len(own) - 1)
        found = own[place] == other
        tokens[number, :prefix] = got["tokens"][number, :prefix]
        tokens[number, prefix:][found] = got["tokens"][number, prefix:][place[found]]
        missing += int((~found).sum())
    return outputs | {"tokens": tokens}, missing
