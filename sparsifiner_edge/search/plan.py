"""The plans that are searched over: per layer the pairs that merge, and the share of keys that is read."""

from __future__ import annotations

from sparsifiner_edge.plan import LEAST_PATCHES

SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
"""Of the keys; 1 is dense."""
TOKEN_STEPS = 96
"""Numbers of tokens that a plan can have, spaced evenly up to those of the image."""


def possible_counts(patches: int, tile: int) -> list[int]:
    """Numbers of patch tokens that a plan may come by, most first: the image's, and every so many fewer."""
    step = max(1, round(patches / TOKEN_STEPS))
    return list(range(patches, max(LEAST_PATCHES, tile) - 1, -step))
