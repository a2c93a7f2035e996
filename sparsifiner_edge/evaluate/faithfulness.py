"""Is an explanation true? What a model answers while patches are taken from the image in its order, or given back.

- *deletion*: the mean answer while the most important patches go first; the lower the better.
- *insertion*: the mean answer while they come first into an image without any; the higher the better.
- *SaCo* (Wu et al., CVPR 2024): of groups of patches, whether those that are said to matter more do: 1 always, 0 as by
  chance, -1 never; pairs count by how much more is claimed.

Two explanations that know nothing of the image stand beside: patches in any order, and the explanation itself at
another place (`elsewhere`). Patches from everywhere hurt a model more than a hole of the same size, so an order that
begins with one region has to be compared with one that does too.

The answer is the cosine of what is explained (the features, or one patch's token) to that of the whole image. What is
taken away is filled with the image's mean colour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.evaluate.extract import images_together
from sparsifiner_edge.explained import Faithful
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.ops.torch_native import native_kernels
from sparsifiner_edge.sparse.outputs import tokens_of
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.sparse.weights import normalise

GROUPS = 10
"""Of patches, most important first; as in SaCo's own experiments."""
_MANY = 1024
"""Patches beyond which half of the groups have to do: an answer takes long there."""
AnswerOf = Callable[[Sequence[Pixels]], Array]
"""Images uint8 [H,W,3] -> what is explained of each [n,C]."""


def answer_of(student: Student, place: tuple[int, int] | None = None) -> AnswerOf:
    """What a student gives: its features, or its token of the patch at a row and column."""
    backbone = student.backbone
    together = images_together(backbone)

    @torch.no_grad()
    def answer(images: Sequence[Pixels]) -> Array:
        rows = []
        with native_kernels(available_cores()):
            for start in range(0, len(images), together):
                some = np.stack(images[start : start + together])
                pixels = normalise(torch.from_numpy(some), student.normalisation)
                tokens = tokens_of(student.model, pixels)  # A decoder may take as long as all else.
                index = 0 if place is None else backbone.prefix + place[0] * backbone.grid[1] + place[1]
                rows.append(backbone.heads(tokens)["features"] if place is None else tokens[:, index])
        return np.asarray(torch.cat(rows).numpy())

    return answer


def groups_of(grid: tuple[int, int]) -> int:
    """How many groups the patches of a grid are taken away in."""
    return GROUPS if grid[0] * grid[1] <= _MANY else GROUPS // 2


def elsewhere(values: Array, random: np.random.Generator) -> Array:
    """A map [rows,columns] moved round by a quarter of each side or more, mirrored or not: as clustered as it was."""
    by = [int(random.integers(side // 4, side - side // 4 + 1)) for side in values.shape]
    rolled = np.roll(values, by, (0, 1))
    return np.asarray(rolled[:, ::-1] if random.random() < 0.5 else rolled)


def faithfulness(answer: AnswerOf, image: Pixels, maps: Mapping[str, Array]) -> dict[str, Faithful]:
    """Explanations [rows,columns] of one image, by name, beside each other."""
    filler = np.broadcast_to(image.reshape(-1, 3).mean(0).round().astype(np.uint8), image.shape)
    whole = answer([image])[0]
    found = {}
    for name, values in maps.items():
        rows, columns = values.shape
        groups = groups_of((rows, columns))
        order = np.argsort(-values.ravel(), kind="stable")
        parts = [_mask(part, values.shape, image.shape) for part in np.array_split(order, groups)]
        shown = np.cumsum(parts, 0).astype(bool)
        # Without the first group, and with all but the last, stand among those that lack one.
        images = [
            *(np.where(part[..., None], filler, image) for part in parts),
            *(np.where(part[..., None], filler, image) for part in shown[1:-1]),
            *(np.where(part[..., None], image, filler) for part in shown[:-2]),
        ]
        answers = np.asarray(cosine(answer(images), whole[None]))
        alone, without, given = np.split(answers, [groups, 2 * groups - 2])
        without, given = np.append(alone[0], without), np.append(given, alone[-1])
        importance = np.array([values.ravel()[part].sum() for part in np.array_split(order, groups)])
        found[name] = Faithful(
            saco=saco(importance, 1 - alone), deletion=float(without.mean()), insertion=float(given.mean()),
            curve=without.tolist(), gained=given.tolist(),
        )  # fmt: skip
    return found


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
