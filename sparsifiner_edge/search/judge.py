"""What a search judges a model's answer by: how far it is from the dense model's, image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.judge import THRESHOLD, Outputs, OwnMetric, Prediction, alike, map_scores
from sparsifiner_edge.sparse.outputs import TOKENS
from sparsifiner_edge.sparse.student import Student

FIDELITIES = ("patches", "class", "task")
"""Mean cosine of the final patch tokens; cosine of the class token; of a task: IoU of a decoder's map at .5 or what a
user's own score does not lose. Each to the dense model's, 1 at best."""
ROUNDING, COARSE = 1e-7, 1e-3
"""Distances that count as no smaller: of cosines, and of a task's figures, which may be nothing for many images."""


class FidelityMeasure(NamedTuple):
    """How answers are judged.

    Attributes:
        distance: 1 - fidelity of what a model makes of an image, by its number. least: a distance counts as no smaller.
    """

    distance: Callable[[int, Prediction], float]
    least: float = ROUNDING


def fidelity_of(
    metric: str, task: str | None, student: Student, wanted: Sequence[Prediction], paths: Sequence[Path]
) -> FidelityMeasure:
    """What judges by one of `FIDELITIES`.

    Args:
        task: a user's metric, package.module:class. wanted: what the dense model makes of the images.

    Raises:
        ConfigError: this model has not what is judged; the user's metric fails, or says nothing of an image.
    """
    backbone = student.backbone
    if metric == "task":
        if task is not None:
            return _own(task, wanted, paths)
        if backbone.module is student.model:
            raise ConfigError(
                "This model has no decoder whose map could be judged.",
                "Judge by --metric patches, or by a metric of your own: --task package.module:class.",
            )
        return _overlap(wanted)
    if metric == "class" and not backbone.class_token:
        raise ConfigError("This model has no class token.", "Judge by --metric patches.")
    return FidelityMeasure(lambda number, got: 1 - alike(metric, got, wanted[number]))


def _overlap(wanted: Sequence[Prediction]) -> FidelityMeasure:
    names = [name for name in wanted[0].outputs if name != TOKENS]
    if len(names) != 1:
        raise ConfigError(
            f"One map is judged, and this model's outputs are: {', '.join(names) or 'none'}.",
            "Judge by --metric patches, or a metric of your own: --task package.module:class.",
        )
    masks = [answer.outputs[names[0]] > THRESHOLD for answer in wanted]

    def distance(number: int, got: Prediction) -> float:
        return 1 - (map_scores(got.outputs[names[0]], masks[number], THRESHOLD, ("iou",))["iou"] or 0.0)

    return FidelityMeasure(distance, COARSE)


def _own(task: str, wanted: Sequence[Prediction], paths: Sequence[Path]) -> FidelityMeasure:
    """A user's `TaskMetric`, whose scores lie from 0 to 1; an image on which a model does better loses nothing."""
    metric = OwnMetric(task)

    def score(number: int, outputs: Outputs) -> float:
        found = metric.score(outputs, paths[number])
        if found is None or not 0 <= found <= 1:
            raise ConfigError(
                f"{task} says {found} of {paths[number].name}.",
                "A search needs a score from 0 to 1 of each image: return one, or judge by another --metric.",
            )
        return found

    dense = [score(number, answer.outputs) for number, answer in enumerate(wanted)]

    def distance(number: int, got: Prediction) -> float:
        lost = dense[number] - score(number, got.outputs)
        return max(0.0, lost if metric.higher_is_better else -lost)

    return FidelityMeasure(distance, COARSE)
