"""Importance of patches for a model's features, and a test of that importance.

*Integrated gradients* (Sundararajan et al., ICML 2017) attribute to every pixel its part of the change of the answer
while the image fades in from its mean colour. A patch weighs as much as the absolute sum of its pixels. The answer is
the cosine of the features to those of the whole image.

*SaCo* (Wu et al., CVPR 2024) tests the explanation: groups of patches are filled with the mean colour, and groups that
are claimed to matter more must change the answer more. 1 is always, 0 is chance, -1 is never; pairs of groups are
weighted by the difference that is claimed. Two baselines know nothing of the image: patches in random order, and the
explanation itself at another place (`elsewhere`). Scattered patches hurt a model more than a hole of the same size, so
an order that begins with one region must be compared with another order of that kind.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.ops.torch_native import native_kernels
from sparsifiner_edge.sparse.outputs import TOKENS, outputs_of
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.sparse.weights import normalise

GRADIENTS = 4
"""Number of steps of the integration. Twelve were no better by SaCo on development photographs."""
GROUPS = 10
"""Number of groups of patches, most important first, as in the experiments of the SaCo paper."""
_MANY = 1024
"""Number of patches from which half as many groups are used, because an answer takes long."""
AnswerOf = Callable[[Tensor], Tensor]
"""Pixels 0 to 255, float [1,H,W,3] -> the vector that is explained [C]."""


def answer_of(student: Student) -> AnswerOf:
    """Return a function that gives a model's features."""
    backbone, model = student.backbone, student.model.eval()

    def answer(pixels: Tensor) -> Tensor:
        outputs = outputs_of(model, normalise(pixels, student.normalisation), tokens=True)
        return backbone.heads(outputs[TOKENS])["features"][0]

    return answer


def importance_of(answer: AnswerOf, image: Pixels, grid: tuple[int, int]) -> Array:
    """Return the importance of each patch [rows,columns] for the answer to an image uint8 [H,W,3]; the sum is 1."""
    start, end = (torch.from_numpy(x)[None].float() for x in (_filler(image), image))
    with torch.no_grad():
        reference = answer(end)
    total = torch.zeros_like(end)
    for step in range(GRADIENTS):
        blend = (start + (step + 0.5) / GRADIENTS * (end - start)).requires_grad_()
        features = answer(blend)
        if not features.requires_grad:
            raise ConfigError(
                "The features of this module have no gradient, which the explanation needs.",
                "Remove torch.no_grad and torch.inference_mode from its forward.",
            )
        similarity = torch.nn.functional.cosine_similarity(features, reference, dim=0)
        total += torch.autograd.grad(similarity, blend)[0]
    pixels = ((end - start) * total)[0].sum(-1).numpy()
    (height, width), (rows, columns) = pixels.shape, grid
    parts = np.abs(pixels.reshape(rows, height // rows, columns, width // columns).sum((1, 3)))
    return np.asarray(parts / max(float(parts.sum()), 1e-30))


def _filler(image: Pixels) -> Pixels:
    """Return an image of the same size in the mean colour."""
    filler: Pixels = np.broadcast_to(image.reshape(-1, 3).mean(0).round().astype(np.uint8), image.shape).copy()
    return filler


def groups_of(grid: tuple[int, ...]) -> int:
    """Return the number of groups for a grid of patches."""
    return GROUPS if grid[0] * grid[1] <= _MANY else GROUPS // 2


def elsewhere(values: Array, random: np.random.Generator) -> Array:
    """Move a map [rows,columns] by a quarter of each side or more, perhaps mirrored, which keeps its clusters."""
    by = [int(random.integers(side // 4, side - side // 4 + 1)) for side in values.shape]
    rolled = np.roll(values, by, (0, 1))
    return np.asarray(rolled[:, ::-1] if random.random() < 0.5 else rolled)


@torch.no_grad()
def faithfulness(answer: AnswerOf, image: Pixels, values: Array) -> tuple[float, Array]:
    """Return SaCo of an explanation [rows,columns], and the drop of the answer without each group of patches.

    Groups are ordered by importance, the most important first.
    """
    filler = _filler(image)
    groups = np.array_split(np.argsort(-values.ravel(), kind="stable"), groups_of(values.shape))
    without = [np.where(_mask(group, values.shape, image.shape)[..., None], filler, image) for group in groups]
    with native_kernels(available_cores()):
        reference, *answers = (answer(torch.from_numpy(x)[None].float()).numpy() for x in (image, *without))
    drop = 1 - np.asarray(cosine(np.stack(answers), reference[None]))
    return saco(np.array([values.ravel()[group].sum() for group in groups]), drop), drop


def saco(importance: Array, drop: Array) -> float:
    """Return the salience-guided faithfulness coefficient from claimed importances and measured drops of groups."""
    first, second = np.triu_indices(len(importance), 1)
    claimed = importance[first] - importance[second]
    right = np.where(np.sign(claimed) * (drop[first] - drop[second]) >= 0, 1, -1)
    total = np.abs(claimed).sum()
    return float((np.abs(claimed) * right).sum() / total) if total else 0.0


def _mask(places: Array, grid: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Return a pixel mask of patches given by number."""
    mask = np.zeros(grid[0] * grid[1], bool)
    mask[places] = True
    down, across = shape[0] // grid[0], shape[1] // grid[1]
    return mask.reshape(grid).repeat(down, 0).repeat(across, 1)
