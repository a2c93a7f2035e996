"""What is judged of a model's answer: how far it is from the dense model's, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.metrics import answered, intersection_over_union, metric_maker
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.outputs import TOKENS, ModelAnswer
from sparsifiner_edge.sparse.student import Student

FIDELITIES = ("patches", "class", "task")
"""Mean cosine of the final patch tokens; cosine of the class token; of a task: IoU of a decoder's map at .5 or what a
user's own score does not lose. Each to the dense model's, 1 at best."""
ROUNDING, COARSE = 1e-7, 1e-3
"""Distances that count as no smaller: of cosines, and of a task's figures, which may be nothing for many images."""


class Judge:
    """Compares with what the dense model makes of some images.

    Attributes:
        reads: names of the outputs that it needs of a bundle. least: a distance counts as no smaller.
    """

    reads: frozenset[str] = frozenset({TOKENS})
    least = ROUNDING

    def distance(self, number: int, seen: ModelAnswer) -> float:
        """1 - fidelity of what a model makes of an image."""
        raise NotImplementedError


class _Cosine(Judge):
    def __init__(self, wanted: Sequence[ModelAnswer], rows: slice) -> None:
        self._wanted, self._rows = wanted, rows

    def distance(self, number: int, seen: ModelAnswer) -> float:
        got, wanted = (x.tokens[:, self._rows] for x in (seen, self._wanted[number]))
        return 1 - float(torch.cosine_similarity(got, wanted, dim=-1).mean())


class _Overlap(Judge):
    least = COARSE

    def __init__(self, wanted: Sequence[ModelAnswer]) -> None:
        if len(wanted[0].outputs) != 1:
            named = ", ".join(wanted[0].outputs) or "none"
            raise ConfigError(
                f"One map is judged, and this model's outputs are: {named}.",
                "Judge by --metric patches, or a metric of your own: --task package.module:class.",
            )
        (self._name,) = wanted[0].outputs
        self._masks = [self._mask(x) for x in wanted]
        self.reads = frozenset({self._name})

    def distance(self, number: int, seen: ModelAnswer) -> float:
        found = intersection_over_union(self._mask(seen), self._masks[number])
        return 0.0 if found is None else 1 - found

    def _mask(self, seen: ModelAnswer) -> Array:
        return (seen.outputs[self._name] > 0.5).numpy()


class _OwnScore(Judge):
    """A user's `TaskMetric`, whose scores lie from 0 to 1; an image on which a model does better loses nothing."""

    least = COARSE

    def __init__(
        self, task: str, model: nn.Module, teacher: nn.Module, wanted: Sequence[ModelAnswer], paths: Sequence[Path]
    ) -> None:
        self._task, self._metric, self._paths = task, metric_maker(task)(), paths
        self._model = model
        self.reads = frozenset(_named(teacher, wanted[0])) - {TOKENS}
        self._wanted = [self._score(number, _named(teacher, x)) for number, x in enumerate(wanted)]

    def distance(self, number: int, seen: ModelAnswer) -> float:
        lost = self._wanted[number] - self._score(number, _named(self._model, seen))
        return max(0.0, lost if self._metric.higher_is_better else -lost)

    def _score(self, number: int, outputs: dict[str, Tensor]) -> float:
        arrays = {name: x.numpy() for name, x in outputs.items()}
        found = answered(self._metric, self._metric.update, arrays, self._paths[number])
        if found is None or not 0 <= found <= 1:
            raise ConfigError(
                f"{self._task} says {found} of {self._paths[number].name}.",
                "A search needs a score from 0 to 1 of each image: return one, or judge by another --metric.",
            )
        return found


@torch.no_grad()
def _named(model: nn.Module, seen: ModelAnswer) -> dict[str, Tensor]:
    """All that a bundle of the model would give."""
    return {TOKENS: seen.tokens} | (seen.outputs or backbone_of(model).heads(seen.tokens))


def judge_of(
    metric: str, task: str | None, student: Student, teacher: Any, wanted: Sequence[ModelAnswer], paths: Sequence[Path]
) -> Judge:
    """What judges by one of `FIDELITIES`.

    Args:
        task: a user's metric, package.module:class. teacher: the dense model; wanted: what it makes of the images.

    Raises:
        ConfigError: this model has not what is judged; the user's metric fails, or says nothing of an image.
    """
    backbone = student.backbone
    if metric == "task":
        if task is not None:
            return _OwnScore(task, student.model, teacher, wanted, paths)
        if backbone.module is student.model:
            raise ConfigError(
                "This model has no decoder whose map could be judged.",
                "Judge by --metric patches, or by a metric of your own: --task package.module:class.",
            )
        return _Overlap(wanted)
    if metric == "class" and not backbone.class_token:
        raise ConfigError("This model has no class token.", "Judge by --metric patches.")
    return _Cosine(wanted, slice(0, 1) if metric == "class" else slice(backbone.prefix, None))
