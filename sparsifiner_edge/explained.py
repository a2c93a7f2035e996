"""What an explanation says, as types: the result file, and the arrays that a page shows."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.results import Declared

OURS, RANDOM, MOVED = "ours", "random", "moved"
"""What is judged; and beside it what knows nothing of the image: patches in any order, and ours at another place."""


class LayerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A layer in figures.

    Attributes:
        tokens: patches' tokens on entry. merged: that become one with another. keys: that each tile reads; None: all.
    """

    layer: int
    tokens: int
    merged: int
    keys: int | None


class ImageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """An image in figures.

    Attributes:
        saco: by "ours", "random" and "moved"; empty: not judged. better: whether ours is above chance and both others.
    """

    image: str
    layers: list[LayerSummary]
    saco: dict[str, float]
    better: bool = False


class ExplainMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was explained.

    Attributes:
        groups: of patches, for what is claimed. filled: what stands for patches that are taken away.
    """

    groups: int
    filled: str
    preprocessing: str
    images: list[str]


class ExplainStatistics(msgspec.Struct, frozen=True):
    """Image by image."""

    images: list[ImageSummary]


class ExplainResult(Declared, frozen=True):
    """Of kind "explanation"; samples: by image and order, what the answer lost without each group, the first first."""

    method: ExplainMethod
    samples: dict[str, dict[str, list[float]]]
    statistics: ExplainStatistics


class LayerMaps(NamedTuple):
    """A layer for a page. token: of each patch, in raster order [P]. read: how many heads read a token, mean over
    tiles [N].
    """

    token: Array
    read: Array


class Explained(NamedTuple):
    """An image for a page.

    Attributes:
        importance: of each patch how much the answer hangs on it [rows,columns], its sum is 1. drops: see `samples` of
            the result.
    """

    path: Path
    image: Pixels
    layers: list[LayerMaps]
    importance: Array
    summary: ImageSummary
    drops: dict[str, list[float]]
