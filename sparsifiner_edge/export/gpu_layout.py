"""Layout for GPUs, if images show that a sparse model tolerates it.

Key lists that 16 queries share keep a CPU core busy; tensor cores need 64, and the CUDA kernels have room for 32
background tokens. The predictor's parameters depend on neither, so both are chosen at export, and the cost is measured
on images.
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
from sparsifiner_edge.ops.triton.schedule import MOST_BACKGROUND
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.sparse.weights import normalise

GPU_TILE = 64
"""Query tile on GPUs: a quarter of the keys that tile 16 gathers, and whole tiles of the tensor cores."""
LEAST_TOKENS_COSINE = 0.97
"""Gate: mean cosine of the final tokens to those with the model's own layout, over the images."""


def gpu_sparsity(current: SparsityConfig, prefix: int, patches: int) -> SparsityConfig:
    """Return settings with `GPU_TILE`, if there are enough patches, and at most `MOST_BACKGROUND` background tokens."""
    tile = max(current.tile, GPU_TILE) if patches >= GPU_TILE else current.tile
    return dataclasses.replace(
        current, tile=tile, background_tokens=min(current.background_tokens, MOST_BACKGROUND - prefix)
    )


def fit_to_gpus(student: Student, images: Sequence[Path]) -> tuple[Student, Retiled | None]:
    """Return the model with the layout of `gpu_sparsity`, with its background tokens only, or unchanged.

    The gate decides; without images the model is unchanged. The second value is the manifest's entry with the reason,
    None if nothing had to change.
    """
    current, refused = student.sparsity, None
    if current.is_dense or current.preset != "edge":
        return student, None
    wanted = gpu_sparsity(current, student.backbone.prefix, student.backbone.patches)
    background_tokens = wanted.background_tokens
    for tile in dict.fromkeys((wanted.tile, current.tile)):
        if (tile, background_tokens) == (current.tile, current.background_tokens):
            continue
        outcome = _with_layout(student, tile, background_tokens, images)
        if not isinstance(outcome, str):
            changed, cosine = outcome
            return changed, Retiled(current.tile, current.background_tokens, cosine, len(images), refused)
        refused = refused or outcome
    return student, Retiled(current.tile, current.background_tokens, refused=refused) if refused else None


def _with_layout(
    student: Student, tile: int, background_tokens: int, images: Sequence[Path]
) -> tuple[Student, float] | str:
    """Return a copy of a model with another layout and the cosine of its tokens, or why there is none."""
    current = student.sparsity
    if current.token_keep:
        return "Another layout prunes other tokens, so the two cannot be compared: use `sparsify --set tile=64`."
    if not images:
        return "There are no images to check it on: give a folder with --calibrate DIR."
    sparsity = dataclasses.replace(current, tile=tile, background_tokens=background_tokens)
    changed = dataclasses.replace(student, model=copy.deepcopy(student.model), sparsity=sparsity)
    try:
        set_budget(changed.model, sparsity)
    except ConfigError as error:
        return f"{error.what} {error.fix}"
    cosine = _cosine(student, changed, images)
    if cosine >= LEAST_TOKENS_COSINE:
        return changed, cosine
    return (
        f"With tile {tile} and {background_tokens} background tokens, the cosine of the final tokens to those with "
        f"tile {current.tile} and {current.background_tokens} background tokens is {cosine:.4f}; at least "
        f"{LEAST_TOKENS_COSINE} is needed. Read more keys: --keep."
    )


@torch.no_grad()
def _cosine(original: Student, changed: Student, images: Sequence[Path]) -> float:
    """Return the mean cosine over images and final tokens."""
    means = []
    for path in images:
        image = normalise(torch.from_numpy(load_image(path, original.img_size))[None], original.normalisation)
        before, after = (student.backbone.tokens(image) for student in (original, changed))
        means.append(float(torch.cosine_similarity(before, after, dim=-1).mean()))
    return statistics.fmean(means)
