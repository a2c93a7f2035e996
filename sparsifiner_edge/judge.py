"""How good a model's answer to an image is: one judge, for `evaluate`, `optimize`, `distill` and `explain`.

An answer is compared with another, mostly the dense model's: parts of it by their cosine (`alike`), dense maps by
`map_scores`, which take true masks as well. A user's own metric (`UserMetric`) looks at each model's answer alone.
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
"""By name, batch 1."""
Scores = dict[str, float | None]
"""By name; None: it says nothing of this image."""
MAPS = "maps"
"""The task that needs no code: dense maps."""
METRIC_POINTS = "sparsifiner_edge.metrics"
"""The group of entry points by which packages give metrics a name."""
THRESHOLD = 0.5
"""Above which a pixel of a map from 0 to 1 belongs to the mask."""
MAP_MEASURES: dict[str, Callable[[Array, Array], float | None]] = {
    "error": mean_absolute_error,
    "iou": intersection_over_union,
    "auroc": auroc,
}
"""Of a map and what is true: its error, of masks their overlap, and how well a map's values order a mask's pixels."""


class Prediction(NamedTuple):
    """What a model gives for one image.

    Attributes:
        outputs: "tokens" [1,N,C] are the prefix and the patches, those that are left where
            `POSITIONS` [1,P] says which. prefix: how many come before the patches.
    """

    outputs: Outputs
    prefix: int = 0

    @property
    def patches(self) -> Array:
        """[1,P,C]."""
        return self.outputs["tokens"][:, self.prefix :]


PARTS: dict[str, Callable[[Prediction], Array]] = {
    "features": lambda answer: answer.outputs["features"],
    "class": lambda answer: answer.outputs["tokens"][:, :1],
    "prefix": lambda answer: answer.outputs["tokens"][:, : answer.prefix],
    "patches": lambda answer: answer.patches,
}
"""Rows [..., C] of an answer that are compared by their cosine."""


def alike(part: str, got: Prediction, wanted: Prediction) -> float:
    """Mean cosine of one of `PARTS`; of patches, where `got` lacks some, of those that it has."""
    rows, expected = PARTS[part](got), PARTS[part](wanted)
    if part == "patches" and POSITIONS in got.outputs:
        expected = expected[:, got.outputs[POSITIONS][0]]
    return float(cosine(rows, expected).mean())


def correlation(got: Array, wanted: Array) -> float:
    """Of all elements; 1 where both are constant."""
    return float(cosine(*(x.ravel() - x.mean(dtype=np.float64) for x in (got, wanted))))


def map_in(outputs: Outputs, name: str | None, role: str) -> tuple[str, Array]:
    """The one dense map among a model's outputs, or that of a name: its name, and [h,w].

    Raises:
        ConfigError: there is none, there are several and no name, or it has several channels.
    """
    maps = {key: value for key, value in outputs.items() if value.ndim > 2 and key != "tokens"}
    if name is None and len(maps) == 1:
        name = next(iter(maps))
    if name is None or name not in maps:
        raise ConfigError(
            f"The {role} gives {len(maps)} dense maps ({', '.join(outputs)}); which is judged?",
            "Name one: --map NAME.",
        )
    squeezed = np.squeeze(maps[name])
    if squeezed.ndim != 2:
        raise ConfigError(
            f"{name} has shape {list(maps[name].shape)}: no map of one channel.",
            "Write a metric of your own: --task package.module:object.",
        )
    return name, squeezed


def map_scores(answer: Array, truth: Array, threshold: float, names: Sequence[str] = tuple(MAP_MEASURES)) -> Scores:
    """A map against a true mask (bool), [H,W] of any size, or another model's map of its shape, by `MAP_MEASURES`.

    Two maps that do not both lie between 0 and 1 have an error alone.
    """
    masked = truth.dtype == bool
    mask = matching(truth, answer.shape) if masked else truth > threshold
    if not masked and not all(x.min() >= 0 and x.max() <= 1 for x in (answer, truth)):
        names = [name for name in names if name == "error"]
    pairs = {"error": (answer, mask if masked else truth), "iou": (answer > threshold, mask), "auroc": (answer, mask)}
    return {name: MAP_MEASURES[name](*pairs[name]) for name in names}


def matching(mask: Array, shape: Sequence[int]) -> Array:
    """A mask [H,W] at a map's size [h,w], by the nearest pixel."""
    if mask.shape == tuple(shape):
        return mask
    rows, columns = (
        np.minimum(((np.arange(here) + 0.5) * there / here).astype(np.int64), there - 1)
        for there, here in zip(mask.shape, shape, strict=True)
    )
    return np.asarray(mask[rows][:, columns])


class TaskMetric(Protocol):
    """How well a model does a user's task; `evaluate --metric task --task NAME` makes one for the model and one for its
    teacher, `optimize --metric package.module:class` one for both, of which it asks `update` alone.

    Attributes:
        higher_is_better: of `result`, and of what `update` returns.
    """

    higher_is_better: bool

    def update(self, outputs: Outputs, path: Path) -> float | None:
        """Take a model's outputs, batch 1, for one image.

        Returns:
            How well it did on that image, if that can be said; paired intervals come of these.
        """

    def result(self) -> float:
        """How well it did on all."""


class UserMetric:
    """A user's `TaskMetric`, which may fail in any way.

    Args:
        name: package.module:class, or an entry point of the group `METRIC_POINTS`, which a package declares.

    Raises:
        ConfigError: it cannot be imported, or makes no `TaskMetric`; by each method: it fails.
    """

    def __init__(self, name: str) -> None:
        points = plugins(METRIC_POINTS) if ":" not in name else {}
        known = ", ".join([MAPS, *points])
        fix = f"Give {known}, or your own. {NAME_IT}"
        self._metric: TaskMetric = _call(name, import_object(points.get(name, name), fix))
        lacking = [part for part in ("update", "result", "higher_is_better") if not hasattr(self._metric, part)]
        if lacking:
            raise ConfigError(f"{name} has no {lacking[0]}.", "See judge.TaskMetric for what one has.")

    @property
    def higher_is_better(self) -> bool:
        """Of its scores."""
        return bool(self._metric.higher_is_better)

    def score(self, outputs: Outputs, path: Path) -> float | None:
        """Of a model's outputs, batch 1, for one image."""
        return self._number("update", outputs, path)

    def result(self) -> float | None:
        """Of all that was scored."""
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
        raise ConfigError(f"{name} failed: {type(error).__name__}: {error}.", "Mend the metric.") from error
