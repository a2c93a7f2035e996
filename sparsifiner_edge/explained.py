"""What an explanation says, as types: the result file, and the arrays that a page shows."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.results import Declared

OURS, DENSE, RANDOM, MOVED = "ours", "dense", "random", "moved"
CONTROLS = RANDOM, MOVED


class Faithful(msgspec.Struct, frozen=True, kw_only=True):
    """See `evaluate.faithfulness`.

    Attributes:
        curve: the answer after 1, 2, .. groups were taken away. gained: after they were given.
    """

    saco: float
    deletion: float
    insertion: float
    curve: list[float]
    gained: list[float]


class ReadKey(msgspec.Struct, frozen=True, kw_only=True):
    """A patch that a place reads, row and column of its first patch; score = probe + deviation, means of the heads."""

    patch: tuple[int, int]
    heads: int
    probe: float
    deviation: float
    attention: float


class LayerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A layer in figures.

    Attributes:
        tokens: patches' tokens on entry. merged: that become one with another. keys: that each tile reads; None: all.
        cells: share of attention on cells, mean of heads and patches.
        place: of the place that was asked for, what it reads, most heads first; None: none was.
    """

    layer: int
    tokens: int
    merged: int
    keys: int | None
    cells: float
    place: list[ReadKey] | None = None


class ImageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """An image in figures.

    Attributes:
        faithful: by "ours", "dense", and what knows nothing of the image: "random", patches in any order, and "moved",
            ours at another place.
        better: whether ours explains more than either of these, by SaCo and by deletion.
    """

    image: str
    layers: list[LayerSummary]
    faithful: dict[str, Faithful]
    better: bool = False


class ExplainMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was explained.

    Attributes:
        explained: for people. heads: of a layer. place: pixels from the left and the top; None: the features.
        groups: of patches, for what is claimed. filled: what stands for patches that are taken away.
    """

    explained: str
    heads: int
    place: tuple[int, int] | None
    groups: int
    filled: str
    preprocessing: str
    images: list[str]


class ExplainStatistics(msgspec.Struct, frozen=True):
    """Image by image."""

    images: list[ImageSummary]


class ExplainResult(Declared, frozen=True):
    """Of kind "explanation"; samples: by image and explanation the curves of deletion."""

    method: ExplainMethod
    samples: dict[str, dict[str, list[float]]]
    statistics: ExplainStatistics


class LayerMaps(NamedTuple):
    """A layer for a page.

    Attributes:
        token: of each patch, in raster order [P]. tile: consecutive tokens that share a list.
        heads: how many read a token, for each tile [T,N]. probe: their scores' mean, [T,N]. deviation: [N].
        cells: share of each token's attention on cells, mean of the heads [N].
    """

    token: Array
    tile: int
    heads: Array
    probe: Array
    deviation: Array
    cells: Array


class Explained(NamedTuple):
    """An image for a page: reached by "ours" and "dense", [rows,columns], sums are 1."""

    path: Path
    image: Pixels
    layers: list[LayerMaps]
    reached: dict[str, Array]
    summary: ImageSummary
