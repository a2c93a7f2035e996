"""What a plan costs in fidelity: the student with its settings beside the dense model, on the user's own images."""

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
from sparsifiner_edge.judge import MAPS, THRESHOLD, Outputs, Prediction, UserMetric, alike, map_scores
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.ops.torch_native import native_kernels
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.sparse.attention import SparseAttention
from sparsifiner_edge.sparse.outputs import TOKENS, outputs_of, prediction_of
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.sparse.weights import normalise

COSINES = ("patches", "class")
FIDELITIES = (*COSINES, MAPS)
"""Mean cosine of the final patch tokens; cosine of the class token; IoU of a decoder's map at .5. Each to the dense
model's, 1 at best. Beside them what a user's own score does not lose."""
ROUNDING, COARSE = 1e-7, 1e-3
"""Distances that count as no smaller: of cosines, and of others, which may be nothing for many images."""
Distance: TypeAlias = Callable[[int, Prediction], float]
"""1 - fidelity of what a model makes of an image, by its number."""


def least_distance(metric: str) -> float:
    """A distance counts as no smaller."""
    return ROUNDING if metric in COSINES else COARSE


def distance_by(metric: str, student: Student, wanted: Sequence[Prediction], paths: Sequence[Path]) -> Distance:
    """What judges by one of `FIDELITIES`, or by a user's metric, package.module:class.

    Args:
        wanted: what the dense model makes of the images.

    Raises:
        ConfigError: this model has not what is judged; the user's metric fails, or says nothing of an image.
    """
    if metric == MAPS:
        return _overlap(student, wanted)
    if metric not in COSINES:
        return _metric_distance(metric, wanted, paths)
    if metric == "class" and not student.backbone.class_token:
        raise ConfigError("This model has no class token.", "Judge by --metric patches.")
    return lambda number, got: 1 - alike(metric, got, wanted[number])


def _overlap(student: Student, wanted: Sequence[Prediction]) -> Distance:
    others = "Judge by --metric patches, or by a metric of your own: --metric package.module:class."
    if student.backbone.module is student.model:
        raise ConfigError("This model has no decoder whose map could be judged.", others)
    names = [name for name in wanted[0].outputs if name != TOKENS]
    if len(names) != 1:
        raise ConfigError(f"One map is judged, and this model's outputs are: {', '.join(names) or 'none'}.", others)
    masks = [answer.outputs[names[0]] > THRESHOLD for answer in wanted]

    def distance(number: int, got: Prediction) -> float:
        return 1 - (map_scores(got.outputs[names[0]], masks[number], THRESHOLD, ("iou",))["iou"] or 0.0)

    return distance


def _metric_distance(name: str, wanted: Sequence[Prediction], paths: Sequence[Path]) -> Distance:
    """A user's `TaskMetric`, whose scores lie from 0 to 1; an image on which a model does better loses nothing."""
    metric = UserMetric(name)

    def score(number: int, outputs: Outputs) -> float:
        value = metric.score(outputs, paths[number])
        if value is None or not 0 <= value <= 1:
            raise ConfigError(
                f"{name} says {value} of {paths[number].name}.",
                "A search needs a score from 0 to 1 of each image: return one, or judge by another --metric.",
            )
        return value

    dense = [score(number, answer.outputs) for number, answer in enumerate(wanted)]

    def distance(number: int, got: Prediction) -> float:
        lost = dense[number] - score(number, got.outputs)
        return max(0.0, lost if metric.higher_is_better else -lost)

    return distance


MOST_REMEMBERED = 1 << 30
"""Bytes of what layers make of the images when nothing is sparse."""


class Trial:
    """A student whose layers all have predictors, and what its dense model makes of some images.

    Args:
        metric: see `distance_by`.
        fit: how images are brought to the size.

    Attributes:
        paths: of the images. judges: places of those that judge plans, at first all. patches: of the backbone.
        least: a distance counts as no smaller.
        selects: by layer whether it has a predictor; one without stays dense.
    """

    def __init__(self, student: Student, teacher: Any, paths: Sequence[Path], metric: str, fit: Fit = "crop") -> None:
        self._student, self.paths, self.judges = student, list(paths), list(range(len(paths)))
        self.selects = [isinstance(attention, SparseAttention) for attention in student.backbone.attentions]
        self.patches = student.backbone.patches
        self._raw = [load_image(path, Framing(student.img_size, fit))[None] for path in paths]
        self._pixels = [normalise(torch.from_numpy(image), student.normalisation) for image in self._raw]
        with torch.inference_mode():
            wanted = [prediction_of(teacher, image, student.outputs) for image in self._pixels]
        self._distance, self.least = distance_by(metric, student, wanted, paths), least_distance(metric)
        self._dense_outputs: list[list[Tensor]] = []

    @torch.inference_mode()
    def distances(self, plan: LayerPlan, most: int | None = None) -> list[float]:
        """1 - the metric, of every judge, or of the first `most`."""
        judges = self.judges[:most]
        if plan.is_dense:
            return [0.0] * len(judges)
        changes = (bool(rate) or share < 1 for rate, share in zip(plan.merge, plan.keep, strict=True))
        dense = self._by_dense_layers(next(layer for layer, changed in enumerate(changes) if changed))
        set_budget(self._student.model, plan.config(self._student.sparsity), keep_predictors=True)
        layers, distances = self._student.backbone.layers, []
        with native_kernels(available_cores()):
            for number, outputs in zip(judges, dense, strict=False):
                pixels = self._pixels[number]
                with _giving(layers, outputs):
                    answer = prediction_of(self._student.model, pixels, self._student.outputs)
                distances.append(self._distance(number, answer))
        return distances

    def _by_dense_layers(self, count: int) -> list[list[Tensor]]:
        """By image, what the first layers make of it while they are dense: a plan need not run them again. None where
        that takes more memory than `MOST_REMEMBERED`.
        """
        student, depth = self._student, len(self.selects)
        size = student.backbone.width * (student.backbone.prefix + self.patches) * self._pixels[0].element_size()
        if count == 0 or size * depth * len(self.judges) > MOST_REMEMBERED:
            return [[] for _ in self.judges]
        if not self._dense_outputs:
            set_budget(student.model, LayerPlan.dense(depth).config(student.sparsity), keep_predictors=True)
            self._dense_outputs = [self._outputs_of_layers(self._pixels[number]) for number in self.judges]
        return [outputs[:count] for outputs in self._dense_outputs]

    def _outputs_of_layers(self, pixels: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        # As another tensor, without what rides on it: half the memory.
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

    def choose_judges(self, distances: Sequence[float], count: int) -> None:
        """So many, which lose little and much as all do. distances: of the images that may judge, the first, by some
        plan.
        """
        spread = evenly_lost(distances, count)
        self.judges = [*spread[1::3], *spread[::3], *spread[2::3]]  # So that the first few are as they all are.
        self._dense_outputs = []

    def arrange(self, places: Sequence[int]) -> None:
        """Put the images in another order: of each that comes, its place so far."""
        before = self._distance
        self.paths, self._raw = [self.paths[place] for place in places], [self._raw[place] for place in places]
        self._pixels, self._dense_outputs = [self._pixels[place] for place in places], []
        self._distance = lambda number, got: before(places[number], got)

    def distances_of(self, infer: Callable[[dict[str, Array]], dict[str, Array]], start: int = 0) -> list[float]:
        """1 - the metric of what a session makes of each image, from that at place `start` on."""
        prefix = self._student.backbone.prefix
        answers = (Prediction(infer({"image": image}), prefix) for image in self._raw[start:])
        return [self._distance(number, answer) for number, answer in enumerate(answers, start)]


def evenly_lost(distances: Sequence[float], count: int) -> list[int]:
    """Places of so many, evenly taken by distance, least first: these are as easy and as hard as all are."""
    order = sorted(range(len(distances)), key=distances.__getitem__)
    return [order[(2 * number + 1) * len(order) // (2 * count)] for number in range(count)]


@contextlib.contextmanager
def _giving(layers: Sequence[Any], outputs: Sequence[Tensor]) -> Iterator[None]:
    """Meanwhile the first layers return these, whatever comes in."""
    for layer, output in zip(layers, outputs, strict=False):
        layer.forward = lambda *_, replacement=output, **__: replacement
    try:
        yield
    finally:
        for layer, _ in zip(layers, outputs, strict=False):
            del layer.forward
