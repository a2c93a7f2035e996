"""What a plan costs in fidelity: the student with its settings beside the dense model, on the user's own images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.images import load_image
from sparsifiner_edge.judge import Prediction
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.ops.torch_native import native_kernels
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.search.judge import fidelity_of
from sparsifiner_edge.sparse.attention import SparseAttention
from sparsifiner_edge.sparse.outputs import outputs_of, prediction_of
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.sparse.weights import normalise

MOST_REMEMBERED = 1 << 30
"""Bytes of what layers make of the images when nothing is sparse."""


class Trial:
    """A student whose layers all have predictors, and what its dense model makes of some images.

    Args:
        metric: one of `judge.FIDELITIES`. task: of "task" a user's metric; None: a decoder's map.

    Attributes:
        patches: of the backbone. judge: of what a model makes of the images.
        selects: by layer whether it has a predictor; one without stays dense.
    """

    def __init__(
        self, student: Student, teacher: Any, paths: Sequence[Path], metric: str, task: str | None = None
    ) -> None:
        self._student = student
        self.selects = [isinstance(attention, SparseAttention) for attention in student.backbone.attentions]
        self.patches = student.backbone.patches
        self._raw = [load_image(path, student.img_size)[None] for path in paths]
        self._pixels = [normalise(torch.from_numpy(image), student.normalisation) for image in self._raw]
        with torch.inference_mode():
            wanted = [prediction_of(teacher, image, student.outputs) for image in self._pixels]
        self.judge = fidelity_of(metric, task, student, wanted, paths)
        self._made: list[list[Tensor]] = []

    @torch.inference_mode()
    def distances(self, plan: LayerPlan) -> list[float]:
        """1 - the metric, of every image."""
        if plan.is_dense:
            return [0.0] * len(self._pixels)
        changes = (bool(rate) or share < 1 for rate, share in zip(plan.merge, plan.keep, strict=True))
        made = self._by_dense_layers(next(layer for layer, changed in enumerate(changes) if changed))
        set_budget(self._student.model, plan.config(self._student.sparsity), keep_predictors=True)
        layers, found = self._student.backbone.layers, []
        with native_kernels(available_cores()):
            for number, (pixels, outputs) in enumerate(zip(self._pixels, made, strict=True)):
                with _giving(layers, outputs):
                    answer = prediction_of(self._student.model, pixels, self._student.outputs)
                found.append(self.judge.distance(number, answer))
        return found

    def _by_dense_layers(self, count: int) -> list[list[Tensor]]:
        """By image, what the first layers make of it while they are dense: a plan need not run them again. None where
        that takes more memory than `MOST_REMEMBERED`.
        """
        student, depth = self._student, len(self.selects)
        size = student.backbone.width * (student.backbone.prefix + self.patches) * self._pixels[0].element_size()
        if count == 0 or size * depth * len(self._pixels) > MOST_REMEMBERED:
            return [[] for _ in self._pixels]
        if not self._made:
            set_budget(student.model, LayerPlan.dense(depth).config(student.sparsity), keep_predictors=True)
            self._made = [self._outputs_of_layers(pixels) for pixels in self._pixels]
        return [outputs[:count] for outputs in self._made]

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

    def distances_of(self, infer: Callable[[dict[str, Array]], dict[str, Array]]) -> list[float]:
        """1 - the metric, image by image, of what a session makes of them."""
        prefix = self._student.backbone.prefix
        got = (Prediction(infer({"image": image}), prefix) for image in self._raw)
        return [self.judge.distance(number, answer) for number, answer in enumerate(got)]


@contextlib.contextmanager
def _giving(layers: Sequence[Any], outputs: Sequence[Tensor]) -> Iterator[None]:
    """Meanwhile the first layers return these, whatever comes in."""
    for layer, output in zip(layers, outputs, strict=False):
        layer.forward = lambda *_, given=output, **__: given
    try:
        yield
    finally:
        for layer, _ in zip(layers, outputs, strict=False):
            del layer.forward
