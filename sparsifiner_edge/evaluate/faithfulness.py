"""Which patches a model's features hang on, and whether that is true.

*Integrated gradients* (Sundararajan et al., ICML 2017) give every pixel its part of how far the answer moves while the
image fades in from its own mean colour; a patch weighs as much as the sum of its pixels' parts, whatever the sign. The
answer is the cosine of the features to those of the whole image.

*SaCo* (Wu et al., CVPR 2024) judges: of groups of patches, each filled with the mean colour, whether those that are
said to matter more change the answer more: 1 always, 0 as by chance, -1 never; pairs count by how much more is claimed.
Two explanations that know nothing of the image stand beside: patches in any order, and the explanation itself at
another place (`elsewhere`). Patches from everywhere hurt a model more than a hole of the same size, so an order that
begins with one region has to be compared with one that does too.
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
"""Of the way from the mean colour: twelve are no truer by SaCo on development photographs."""
GROUPS = 10
"""Of patches, most important first; as in SaCo's own experiments."""
_MANY = 1024
"""Patches beyond which half of the groups have to do: an answer takes long there."""
AnswerOf = Callable[[Tensor], Tensor]
"""Pixels 0 to 255, float [1,H,W,3] -> what is explained [C]."""


def answer_of(student: Student) -> AnswerOf:
    """A student's features."""
    backbone, model = student.backbone, student.model.eval()

    def answer(pixels: Tensor) -> Tensor:
        outputs = outputs_of(model, normalise(pixels, student.normalisation), tokens=True)
        return backbone.heads(outputs[TOKENS])["features"][0]

    return answer


def importance_of(answer: AnswerOf, image: Pixels, grid: tuple[int, int]) -> Array:
    """Of each patch [rows,columns] how much the answer to an image uint8 [H,W,3] hangs on it; the sum is 1."""
    start, end = (torch.from_numpy(x)[None].float() for x in (_filler(image), image))
    with torch.no_grad():
        whole = answer(end)
    total = torch.zeros_like(end)
    for step in range(GRADIENTS):
        between = (start + (step + 0.5) / GRADIENTS * (end - start)).requires_grad_()
        features = answer(between)
        if not features.requires_grad:
            raise ConfigError(
                "This module's forward takes no gradient, which the explanation needs.",
                "Leave torch.no_grad and inference_mode to its caller.",
            )
        near = torch.nn.functional.cosine_similarity(features, whole, dim=0)
        total += torch.autograd.grad(near, between)[0]
    pixels = ((end - start) * total)[0].sum(-1).numpy()
    (height, width), (rows, columns) = pixels.shape, grid
    parts = np.abs(pixels.reshape(rows, height // rows, columns, width // columns).sum((1, 3)))
    return np.asarray(parts / max(float(parts.sum()), 1e-30))


def _filler(image: Pixels) -> Pixels:
    """The image's mean colour, as large as it is."""
    filler: Pixels = np.broadcast_to(image.reshape(-1, 3).mean(0).round().astype(np.uint8), image.shape).copy()
    return filler


def groups_of(grid: tuple[int, ...]) -> int:
    """How many groups the patches of a grid are taken away in."""
    return GROUPS if grid[0] * grid[1] <= _MANY else GROUPS // 2


def elsewhere(values: Array, random: np.random.Generator) -> Array:
    """A map [rows,columns] moved round by a quarter of each side or more, mirrored or not: as clustered as it was."""
    by = [int(random.integers(side // 4, side - side // 4 + 1)) for side in values.shape]
    rolled = np.roll(values, by, (0, 1))
    return np.asarray(rolled[:, ::-1] if random.random() < 0.5 else rolled)


@torch.no_grad()
def faithfulness(answer: AnswerOf, image: Pixels, values: Array) -> tuple[float, Array]:
    """SaCo of an explanation [rows,columns] of an image; and what the answer loses without each group of patches, those
    first that are said to matter most.
    """
    filler = _filler(image)
    groups = np.array_split(np.argsort(-values.ravel(), kind="stable"), groups_of(values.shape))
    without = [np.where(_mask(group, values.shape, image.shape)[..., None], filler, image) for group in groups]
    with native_kernels(available_cores()):
        whole, *answers = (answer(torch.from_numpy(x)[None].float()).numpy() for x in (image, *without))
    drop = 1 - np.asarray(cosine(np.stack(answers), whole[None]))
    return saco(np.array([values.ravel()[group].sum() for group in groups]), drop), drop


def saco(importance: Array, drop: Array) -> float:
    """Salience-guided faithfulness coefficient of groups: what is claimed of each, and what its absence cost."""
    first, second = np.triu_indices(len(importance), 1)
    claimed = importance[first] - importance[second]
    right = np.where(np.sign(claimed) * (drop[first] - drop[second]) >= 0, 1, -1)
    total = np.abs(claimed).sum()
    return float((np.abs(claimed) * right).sum() / total) if total else 0.0


def _mask(places: Array, grid: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Patches by number as a mask of pixels."""
    mask = np.zeros(grid[0] * grid[1], bool)
    mask[places] = True
    down, across = shape[0] // grid[0], shape[1] // grid[1]
    return mask.reshape(grid).repeat(down, 0).repeat(across, 1)
