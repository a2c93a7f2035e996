"""The layout that suits GPUs, where images show that a student tolerates it.

A CPU core is busy with lists shared by 16 queries, tensor cores want 64, and the CUDA kernels have room for 32 cells.
The predictor's parameters depend on neither, so both are chosen at export; what they lose is measured on images.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from sparsifiner_edge.bundle.entries import Retiled
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.images import load_image
from sparsifiner_edge.ops.triton.schedule import MOST_CELLS
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.sparse.weights import normalise

GPU_TILE = 64
"""A quarter of the keys that tile 16 gathers, and whole tiles of the matrix units."""
LEAST_TOKENS_COSINE = 0.97
"""Gate: mean cosine of the final tokens to those of the student with its own layout, over the images."""


def gpu_sparsity(current: SparsityConfig, prefix: int, patches: int) -> SparsityConfig:
    """With `GPU_TILE`, where there are so many patches, and no more cells than the kernels have room for."""
    tile = max(current.tile, GPU_TILE) if patches >= GPU_TILE else current.tile
    return dataclasses.replace(current, tile=tile, cells=min(current.cells, MOST_CELLS - prefix))


def fit_to_gpus(student: Student, images: Sequence[Path]) -> tuple[Student, Retiled | None]:
    """The student with the layout of `gpu_sparsity`, or with its cells alone, or as it is, where that fails the gate or
    cannot be judged; and the manifest's entry, which says why. None where nothing is to change.
    """
    current, refused = student.sparsity, None
    if current.is_dense or current.preset != "edge":
        return student, None
    wanted = gpu_sparsity(current, student.backbone.prefix, student.backbone.patches)
    cells = wanted.cells
    for tile in dict.fromkeys((wanted.tile, current.tile)):
        if (tile, cells) == (current.tile, current.cells):
            continue
        outcome = _with_layout(student, tile, cells, images)
        if not isinstance(outcome, str):
            changed, cosine = outcome
            return changed, Retiled(current.tile, current.cells, cosine, len(images), refused)
        refused = refused or outcome
    return student, Retiled(current.tile, current.cells, refused=refused) if refused else None


def _with_layout(student: Student, tile: int, cells: int, images: Sequence[Path]) -> tuple[Student, float] | str:
    """A copy of a student with another layout, and how near its tokens are; or why there is none."""
    current = student.sparsity
    if current.token_keep:
        return "With another layout other tokens are pruned, so the two cannot be compared: `sparsify --set tile=64`."
    if not images:
        return "There are no images to judge it by: give some with --calibrate DIR."
    sparsity = dataclasses.replace(current, tile=tile, cells=cells)
    changed = dataclasses.replace(student, model=copy.deepcopy(student.model), sparsity=sparsity)
    try:
        set_budget(changed.model, sparsity)
    except ConfigError as error:
        return f"{error.what} {error.fix}"
    cosine = _cosine(student, changed, images)
    if cosine >= LEAST_TOKENS_COSINE:
        return changed, cosine
    return (
        f"With tile {tile}, {cells} cells the final tokens have cosine {cosine:.4f} to those with tile {current.tile}, "
        f"{current.cells} cells, allowed {LEAST_TOKENS_COSINE}; read more keys: --keep."
    )


@torch.no_grad()
def _cosine(original: Student, changed: Student, images: Sequence[Path]) -> float:
    """Mean over images and final tokens."""
    means = []
    for path in images:
        image = normalise(torch.from_numpy(load_image(path, original.img_size))[None], original.normalisation)
        before, after = (student.backbone.tokens(image) for student in (original, changed))
        means.append(float(torch.cosine_similarity(before, after, dim=-1).mean()))
    return statistics.fmean(means)
