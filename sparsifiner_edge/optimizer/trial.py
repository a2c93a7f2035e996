"""Fidelity of a plan: the sparse model compared with the dense model on the user's images."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.fitting import Fit, Framing
from sparsifiner_edge.images import load_image
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.ops.torch_native import native_kernels
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.scoring import MAPS, THRESHOLD, Outputs, Prediction, UserMetric, alike, map_scores
from sparsifiner_edge.sparse.outputs import TOKENS, prediction_of
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.sparse.weights import normalise

COSINES = ("patches", "class")
"""Metrics that are cosines: of the final patch tokens (mean), of the class token."""
FIDELITIES = (*COSINES, MAPS)
"""Metrics with the dense model as reference, 1 at best: the cosines, and the IoU of a dense map at .5."""
ROUNDING = 1e-7
"""Floor of the error for cosines: smaller errors are set to it."""
COARSE = 1e-3
"""Floor of the error for other metrics, which may be 0 for many images."""
ErrorFunction: TypeAlias = Callable[[int, Prediction], float]
"""(number of the image, answer) -> 1 - fidelity."""


def least_error(metric: str) -> float:
    """Return the floor of the error: smaller errors are set to it."""
    return ROUNDING if metric in COSINES else COARSE


def error_by(metric: str, student: Student, wanted: Sequence[Prediction], paths: Sequence[Path]) -> ErrorFunction:
    """Return the error function of one of `FIDELITIES`, or of a user's metric, package.module:class.

    Args:
        metric: Name of the metric.
        student: The sparse model.
        wanted: The dense model's answers to the images.
        paths: The images.

    Raises:
        ConfigError: The model lacks what is compared, or the user's metric fails or is undefined for an image.
    """
    if metric == MAPS:
        return _overlap(student, wanted)
    if metric not in COSINES:
        return _metric_error(metric, wanted, paths)
    if metric == "class" and not student.backbone.class_token:
        raise ConfigError("This model has no class token.", "Use --metric patches.")
    return lambda number, got: 1 - alike(metric, got, wanted[number])


def _overlap(student: Student, wanted: Sequence[Prediction]) -> ErrorFunction:
    others = "Use --metric patches, or a metric of your own: --metric package.module:class."
    if student.backbone.module is student.model:
        raise ConfigError("This model has no decoder, so there is no map to compare.", others)
    names = [name for name in wanted[0].outputs if name != TOKENS]
    if len(names) != 1:
        raise ConfigError(
            f"The metric maps requires exactly one map, but this model outputs: {', '.join(names) or 'none'}.", others
        )
    masks = [answer.outputs[names[0]] > THRESHOLD for answer in wanted]

    def error(number: int, got: Prediction) -> float:
        return 1 - (map_scores(got.outputs[names[0]], masks[number], THRESHOLD, ("iou",))["iou"] or 0.0)

    return error


def _metric_error(name: str, wanted: Sequence[Prediction], paths: Sequence[Path]) -> ErrorFunction:
    """Return the error function of a user's `TaskMetric` with scores from 0 to 1.

    A score better than the dense model's counts as error 0.
    """
    metric = UserMetric(name)

    def score(number: int, outputs: Outputs) -> float:
        value = metric.score(outputs, paths[number])
        if value is None or not 0 <= value <= 1:
            raise ConfigError(
                f"{name} returned {value} for {paths[number].name}.",
                "A search needs a score from 0 to 1 for each image: return one, or use another --metric.",
            )
        return value

    dense = [score(number, answer.outputs) for number, answer in enumerate(wanted)]

    def error(number: int, got: Prediction) -> float:
        drop = dense[number] - score(number, got.outputs)
        return max(0.0, drop if metric.higher_is_better else -drop)

    return error


class Trial:
    """A model with predictors in the layers that may be sparse, and the dense model's outputs for the images.

    Args:
        student: The model.
        teacher: The dense model.
        paths: The images.
        metric: See `error_by`.
        fit: How images are brought to the size.
        progress: Progress callback.
        enough: Called with the number of images so far; once it returns True, the other images are left out.

    Attributes:
        paths: The images that are used.
        least: Floor of the error; see `least_error`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Any,
        paths: Sequence[Path],
        metric: str,
        fit: Fit = "crop",
        progress: Progress | None = None,
        enough: Callable[[int], bool] | None = None,
    ) -> None:
        self._student = student
        self._own: Student | None = None
        self._raw, wanted = list[Array](), list[Prediction]()
        for path in paths:
            self._raw.append(load_image(path, Framing(student.img_size, fit))[None])
            with torch.inference_mode():
                wanted.append(prediction_of(teacher, self._pixels(self._raw[-1]), student.outputs))
            if progress:
                progress("the dense model on the images", len(wanted), len(paths))
            if enough and enough(len(wanted)):
                break
        self.paths = paths = list(paths[: len(wanted)])
        self._error, self.least = error_by(metric, student, wanted, paths), least_error(metric)

    def _pixels(self, image: Array) -> Tensor:
        return normalise(torch.from_numpy(image), self._student.normalisation)

    @torch.inference_mode()
    def errors(self, plan: LayerPlan, places: Sequence[int]) -> list[float]:
        """Return 1 - the metric of a plan in torch on the images at some places.

        The plan is set on a copy of the model.
        """
        if plan.is_dense:
            return [0.0] * len(places)
        if self._own is None:
            self._own = dataclasses.replace(self._student, model=copy.deepcopy(self._student.model))
        own, errors = self._own, list[float]()
        set_budget(own.model, plan.config(own.sparsity), keep_predictors=True)
        with native_kernels(available_cores()):
            for place in places:
                answer = prediction_of(own.model, self._pixels(self._raw[place]), own.outputs)
                errors.append(self._error(place, answer))
        return errors

    def arrange(self, places: Sequence[int]) -> None:
        """Reorder the images; `places` gives the old place of each."""
        before = self._error
        self.paths, self._raw = [self.paths[place] for place in places], [self._raw[place] for place in places]
        self._error = lambda number, got: before(places[number], got)

    def errors_of(
        self,
        infer: Callable[[dict[str, Array]], dict[str, Array]],
        places: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[float]:
        """Return 1 - the metric of a session's answer to the images at some places, or to all."""
        prefix, errors = self._student.backbone.prefix, list[float]()
        for place in range(len(self._raw)) if places is None else places:
            errors.append(self._error(place, Prediction(infer({"image": self._raw[place]}), prefix)))
            if progress:
                progress("evaluating", len(errors), 0)
        return errors


def evenly_by_error(errors: Sequence[float], count: int) -> list[int]:
    """Return the places of `count` images whose errors are spread like all errors and have about the same mean.

    The images are sorted by error and cut into `count` groups. Each group gives the image that keeps the mean, the
    hardest group first: a few images often have most of the error.
    """
    order, chosen, missing = sorted(range(len(errors)), key=errors.__getitem__), list[int](), 0.0
    for number in reversed(range(count)):
        group = order[number * len(order) // count : (number + 1) * len(order) // count]
        wanted = sum(errors[place] for place in group) * count / len(errors) + missing
        chosen.append(min(group, key=lambda place: abs(errors[place] - wanted)))
        missing = wanted - errors[chosen[-1]]
    return chosen[::-1]
