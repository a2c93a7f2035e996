"""Another tile than a student's own, for processors that want one, behind a gate on what it changes.

A CPU core is busy with lists shared by 16 queries, tensor cores want 64. The predictor's parameters do not depend on
either, so the tile is chosen at export; what a larger one loses is measured on images.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from sparsifiner_edge.bundle.entries import Retiled, Tiling
from sparsifiner_edge.errors import ConfigError, GateError
from sparsifiner_edge.images import load_image
from sparsifiner_edge.sparse.models import normalise, preprocessing
from sparsifiner_edge.sparse.patch import final_tokens, set_budget
from sparsifiner_edge.sparse.student import Student

LEAST_TOKENS_COSINE = 0.97
"""Gate: mean cosine of the final tokens to those of the student with its own tile, over the images."""


def with_tile(student: Student, tile: int | None, probe: int | None, images: Sequence[Path]) -> tuple[Student, Retiled]:
    """A student with another tile or probe, and what that changed, for the manifest.

    Args:
        student: of the preset "edge"; left as it is.
        tile, probe: consecutive patches that share one list, and that ask as one; None keeps the student's own.
        images: what the gate judges by.

    Raises:
        ConfigError: a dense student, the preset "paper", no images, or sizes that do not fit.
        GateError: the final tokens change by more than `LEAST_TOKENS_COSINE` allows.
    """
    if student.sparsity.is_dense or student.sparsity.preset != "edge":
        raise ConfigError("--tile and --probe require a sparse student of the preset 'edge'.", "Leave them out.")
    if student.sparsity.token_keep:
        raise ConfigError(
            "A student that prunes tokens keeps different tokens with another tile, so the two cannot be compared.",
            'Choose the tile with `sparsify --tile`, or export with --token-keep "".',
        )
    if not images:
        raise ConfigError("Another tile requires images to judge it by.", "Give some: --calibrate DIR.")
    own = student.sparsity
    sparsity = dataclasses.replace(
        own, tile=own.tile if tile is None else tile, probe=own.probe if probe is None else probe
    )
    changed = dataclasses.replace(student, model=copy.deepcopy(student.model), sparsity=sparsity)
    set_budget(changed.model, sparsity)
    found = _cosine(student, changed, images)
    if found < LEAST_TOKENS_COSINE:
        raise GateError(
            f"With tile {sparsity.tile}, probe {sparsity.probe} the final tokens have cosine {found:.4f} to those "
            f"with tile {own.tile}, probe {own.probe}, allowed {LEAST_TOKENS_COSINE}.",
            "Choose a smaller tile, or read more keys: --keep.",
        )
    before, after = (Tiling(x.tile, x.probe) for x in (own, sparsity))
    return changed, Retiled(before, after, found, len(images))


@torch.no_grad()
def _cosine(own: Student, changed: Student, images: Sequence[Path]) -> float:
    """Mean over images and final tokens."""
    pre, means = preprocessing(own.model), []
    for path in images:
        image = normalise(torch.from_numpy(load_image(path, own.img_size))[None], pre)
        before, after = (final_tokens(student.model, image)[0] for student in (own, changed))
        means.append(float(torch.cosine_similarity(before, after, dim=-1).mean()))
    return statistics.fmean(means)
