"""Fidelity of a plan: the sparse model compared with the dense model on the user's images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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
from sparsifiner_edge.scoring import MAPS, THRESHOLD, Outputs, Prediction, UserMetric, alike, map_scores
from sparsifiner_edge.sparse.attention import SparseAttention
from sparsifiner_edge.sparse.outputs import TOKENS, outputs_of, prediction_of
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


MOST_REMEMBERED = 1 << 30
"""Maximum bytes of cached outputs of dense layers."""


class Trial:
    """A model with predictors in the layers that may be sparse, and the dense model's outputs for the images.

    Args:
        student: The model.
        teacher: The dense model.
        paths: The images.
        metric: See `error_by`.
        fit: How images are brought to the size.

    Attributes:
        paths: The images.
        selection: Places of the selection images; at first all.
        patches: Number of patches of the backbone.
        least: Floor of the error; see `least_error`.
        selects: By layer, whether it has a predictor; a layer without one stays dense.
    """

    def __init__(self, student: Student, teacher: Any, paths: Sequence[Path], metric: str, fit: Fit = "crop") -> None:
        self._student, self.paths, self.selection = student, list(paths), list(range(len(paths)))
        self.selects = [isinstance(attention, SparseAttention) for attention in student.backbone.attentions]
        self.patches = student.backbone.patches
        self._raw = [load_image(path, Framing(student.img_size, fit))[None] for path in paths]
        self._pixels = [normalise(torch.from_numpy(image), student.normalisation) for image in self._raw]
        with torch.inference_mode():
            wanted = [prediction_of(teacher, image, student.outputs) for image in self._pixels]
        self._error, self.least = error_by(metric, student, wanted, paths), least_error(metric)
        self._dense_outputs: list[list[Tensor]] = []

    @torch.inference_mode()
    def errors(self, plan: LayerPlan, most: int | None = None) -> list[float]:
        """Return 1 - the metric on every selection image, or on the first `most`."""
        selection = self.selection[:most]
        if plan.is_dense:
            return [0.0] * len(selection)
        changes = (bool(rate) or share < 1 for rate, share in zip(plan.merge, plan.keep, strict=True))
        dense = self._by_dense_layers(next(layer for layer, changed in enumerate(changes) if changed))
        set_budget(self._student.model, plan.config(self._student.sparsity), keep_predictors=True)
        layers, errors = self._student.backbone.layers, []
        with native_kernels(available_cores()):
            for number, outputs in zip(selection, dense, strict=False):
                pixels = self._pixels[number]
                with _giving(layers, outputs):
                    answer = prediction_of(self._student.model, pixels, self._student.outputs)
                errors.append(self._error(number, answer))
        return errors

    def _by_dense_layers(self, count: int) -> list[list[Tensor]]:
        """Return, by image, the cached outputs of the first `count` layers, which are dense in the plan.

        Empty if that takes more memory than `MOST_REMEMBERED`.
        """
        student, depth = self._student, len(self.selects)
        size = student.backbone.width * (student.backbone.prefix + self.patches) * self._pixels[0].element_size()
        if count == 0 or size * depth * len(self.selection) > MOST_REMEMBERED:
            return [[] for _ in self.selection]
        if not self._dense_outputs:
            set_budget(student.model, LayerPlan.dense(depth).config(student.sparsity), keep_predictors=True)
            self._dense_outputs = [self._outputs_of_layers(self._pixels[number]) for number in self.selection]
        return [outputs[:count] for outputs in self._dense_outputs]

    def _outputs_of_layers(self, pixels: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        # A copy without the tensor's extra data halves the memory.
        hooks = [
            layer.register_forward_hook(lambda _, __, out: outputs.append(out.view_as(out)))
            for layer in self._student.backbone.layers
        ]
        try:
            outputs_of(self._student.model, pixels, self._student.outputs)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    def choose_selection(self, errors: Sequence[float], count: int) -> None:
        """Choose `count` selection images whose errors represent all.

        Args:
            errors: Errors of some plan on the first images, which may be selected.
            count: Number of selection images.
        """
        spread = evenly_by_error(errors, count)
        self.selection = [*spread[1::3], *spread[::3], *spread[2::3]]  # So that the first few represent all.
        self._dense_outputs = []

    def arrange(self, places: Sequence[int]) -> None:
        """Reorder the images; `places` gives the old place of each."""
        before = self._error
        self.paths, self._raw = [self.paths[place] for place in places], [self._raw[place] for place in places]
        self._pixels, self._dense_outputs = [self._pixels[place] for place in places], []
        self._error = lambda number, got: before(places[number], got)

    def errors_of(self, infer: Callable[[dict[str, Array]], dict[str, Array]], start: int = 0) -> list[float]:
        """Return 1 - the metric of a session's answer to each image from place `start` on."""
        prefix = self._student.backbone.prefix
        answers = (Prediction(infer({"image": image}), prefix) for image in self._raw[start:])
        return [self._error(number, answer) for number, answer in enumerate(answers, start)]


def evenly_by_error(errors: Sequence[float], count: int) -> list[int]:
    """Return the places of `count` images, evenly spaced by error, so that they are as easy and hard as all."""
    order = sorted(range(len(errors)), key=errors.__getitem__)
    return [order[(2 * number + 1) * len(order) // (2 * count)] for number in range(count)]


@contextlib.contextmanager
def _giving(layers: Sequence[Any], outputs: Sequence[Tensor]) -> Iterator[None]:
    """Make the first layers return these outputs during the block, whatever their input."""
    for layer, output in zip(layers, outputs, strict=False):
        layer.forward = lambda *_, replacement=output, **__: replacement
    try:
        yield
    finally:
        for layer, _ in zip(layers, outputs, strict=False):
            del layer.forward
