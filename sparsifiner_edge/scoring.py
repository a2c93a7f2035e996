"""Scores of a model's answer to one image, for `evaluate`, `optimize`, `distill` and `explain`.

An answer is compared with another, usually the dense model's: its parts by cosine (`alike`), dense maps by
`map_scores`, which also takes true masks. A user's own metric (`UserMetric`) scores each model's answer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.metrics import POSITIONS, auroc, cosine, intersection_over_union, mean_absolute_error
from sparsifiner_edge.plugins import NAME_IT, import_object, plugins

_Value = TypeVar("_Value")
Outputs = Mapping[str, Array]
"""Outputs by name, batch 1."""
Scores = dict[str, float | None]
"""Score by name; None if it is undefined for this image."""
MAPS = "maps"
"""Task for dense maps, which needs no metric of the user."""
METRIC_POINTS = "sparsifiner_edge.metrics"
"""Entry point group of metrics in installed packages."""
THRESHOLD = 0.5
"""Pixels of a map (0 to 1) above this value belong to the mask."""
MAP_MEASURES: dict[str, Callable[[Array, Array], float | None]] = {
    "error": mean_absolute_error,
    "iou": intersection_over_union,
    "auroc": auroc,
}
"""Measures of a map: mean absolute error, overlap of masks, and how well its values rank the pixels of a mask."""


class Prediction(NamedTuple):
    """A model's answer to one image."""

    outputs: Outputs
    prefix: int = 0

    @property
    def patches(self) -> Array:
        """Patch tokens [1,P,C]."""
        return self.outputs["tokens"][:, self.prefix :]


PARTS: dict[str, Callable[[Prediction], Array]] = {
    "features": lambda answer: answer.outputs["features"],
    "class": lambda answer: answer.outputs["tokens"][:, :1],
    "prefix": lambda answer: answer.outputs["tokens"][:, : answer.prefix],
    "patches": lambda answer: answer.patches,
}
"""Part of an answer -> rows [..., C] that are compared by cosine."""


def alike(part: str, got: Prediction, wanted: Prediction) -> float:
    """Return the mean cosine of one of `PARTS`; if `got` lacks some patches, over those that it has."""
    rows, expected = PARTS[part](got), PARTS[part](wanted)
    if part == "patches" and POSITIONS in got.outputs:
        expected = expected[:, got.outputs[POSITIONS][0]]
    return float(cosine(rows, expected).mean())


def correlation(got: Array, wanted: Array) -> float:
    """Return the correlation over all elements; 1 if both are constant."""
    return float(cosine(*(x.ravel() - x.mean(dtype=np.float64) for x in (got, wanted))))


def map_in(outputs: Outputs, name: str | None, role: str) -> tuple[str, Array]:
    """Return the name and values [h,w] of the only dense map among a model's outputs, or of the named one.

    Raises:
        ConfigError: There is no map, there are several and none is named, or the map has several channels.
    """
    maps = {key: value for key, value in outputs.items() if value.ndim > 2 and key != "tokens"}
    if name is None and len(maps) == 1:
        name = next(iter(maps))
    if name is None or name not in maps:
        raise ConfigError(
            f"The {role} outputs {len(maps)} dense maps ({', '.join(outputs)}), and none is selected.",
            "Name one: --map NAME.",
        )
    squeezed = np.squeeze(maps[name])
    if squeezed.ndim != 2:
        raise ConfigError(
            f"{name} has shape {list(maps[name].shape)}, which is not a map with one channel.",
            "Write a metric of your own: --task package.module:object.",
        )
    return name, squeezed


def map_scores(answer: Array, truth: Array, threshold: float, names: Sequence[str] = tuple(MAP_MEASURES)) -> Scores:
    """Score a map against a true mask (bool) [H,W] of any size, or another model's map of its shape, by `MAP_MEASURES`.

    Two maps that do not both lie between 0 and 1 only have an error.
    """
    masked = truth.dtype == bool
    mask = matching(truth, answer.shape) if masked else truth > threshold
    if not masked and not all(x.min() >= 0 and x.max() <= 1 for x in (answer, truth)):
        names = [name for name in names if name == "error"]
    pairs = {"error": (answer, mask if masked else truth), "iou": (answer > threshold, mask), "auroc": (answer, mask)}
    return {name: MAP_MEASURES[name](*pairs[name]) for name in names}


def matching(mask: Array, shape: Sequence[int]) -> Array:
    """Resize a mask [H,W] to a map's size [h,w] by the nearest pixel."""
    if mask.shape == tuple(shape):
        return mask
    rows, columns = (
        np.minimum(((np.arange(here) + 0.5) * there / here).astype(np.int64), there - 1)
        for there, here in zip(mask.shape, shape, strict=True)
    )
    return np.asarray(mask[rows][:, columns])


class TaskMetric(Protocol):
    """Interface of a user's task metric.

    `evaluate --metric task --task NAME` makes one instance for the model and one for the dense model. `optimize
    --metric package.module:class` makes one for both and only calls `update`.

    Attributes:
        higher_is_better: True if higher values of `result` and `update` are better.
    """

    higher_is_better: bool

    def update(self, outputs: Outputs, path: Path) -> float | None:
        """Take a model's outputs, batch 1, for one image.

        Returns:
            The score of this image, if it is defined; paired intervals use it.
        """

    def result(self) -> float:
        """Return the score over all images."""


class UserMetric:
    """Wrapper of a user's `TaskMetric`, which may fail in any way.

    Args:
        name: package.module:class, or an entry point of the group `METRIC_POINTS`.

    Raises:
        ConfigError: The metric cannot be imported or does not implement `TaskMetric`. Each method raises it if the
            metric fails.
    """

    def __init__(self, name: str) -> None:
        points = plugins(METRIC_POINTS) if ":" not in name else {}
        known = ", ".join([MAPS, *points])
        fix = f"Give {known}, or your own. {NAME_IT}"
        self._metric: TaskMetric = _call(name, import_object(points.get(name, name), fix))
        missing = [part for part in ("update", "result", "higher_is_better") if not hasattr(self._metric, part)]
        if missing:
            raise ConfigError(f"{name} has no {missing[0]}.", "Implement the interface scoring.TaskMetric.")

    @property
    def higher_is_better(self) -> bool:
        """True if higher scores are better."""
        return bool(self._metric.higher_is_better)

    def score(self, outputs: Outputs, path: Path) -> float | None:
        """Score a model's outputs, batch 1, for one image."""
        return self._number("update", outputs, path)

    def result(self) -> float | None:
        """Return the score over all images."""
        return self._number("result")

    def _number(self, method: str, *arguments: Any) -> float | None:
        def call() -> float | None:
            answer = getattr(self._metric, method)(*arguments)
            return None if answer is None else float(answer)

        return _call(f"{type(self._metric).__name__}.{method}", call)


def _call(name: str, call: Callable[[], _Value]) -> _Value:
    try:
        return call()
    except Exception as error:
        raise ConfigError(f"{name} failed: {type(error).__name__}: {error}.", "Fix the metric.") from error
