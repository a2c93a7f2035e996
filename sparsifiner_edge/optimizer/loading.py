"""The model of a search and its images: loaded, compared with the dense model, with fitted predictors."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import NamedTuple

from torch import nn

from sparsifiner_edge.artifacts import kind_of
from sparsifiner_edge.config import SparsityConfig, require
from sparsifiner_edge.export.gpu_layout import gpu_sparsity
from sparsifiner_edge.files import scratch_folder
from sparsifiner_edge.optimizer.clock import Clock
from sparsifiner_edge.optimizer.models import link_images
from sparsifiner_edge.optimizer.request import LEAST_IMAGES, SearchRequest, held_out_count
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.sparse.defaults import fit_to_model
from sparsifiner_edge.sparse.model_options import ModelOptions
from sparsifiner_edge.sparse.outputs import check_names
from sparsifiner_edge.sparse.source import load_source, normalisation_of
from sparsifiner_edge.sparse.student import (
    Student,
    calibrate_student,
    load_student,
    make_student,
    refuse_normalisation,
    teacher_of,
)

START_SHARE = 0.25
"""Share of keys of the model from which plans are made; each plan sets its own."""
PREDICTOR_IMAGES = 8
"""Maximum number of images for fitting the predictors."""
LEARNING_IMAGES = 4.0
"""Fitting the predictors to an image takes about as long as the dense model does for this many images."""
LEARNING_SHARE = 0.12
"""Maximum share of the whole time for fitting the predictors."""
INT8_IMAGES = 9
"""Maximum number of images for int8 calibration."""
LEAST_INT8_IMAGES = 6
"""Minimum of them, if there are so many."""
INT8_SHARE = 0.01
"""Share of the whole time that the dense model takes for the images for int8 calibration."""
DENSE_SHARE = 0.12
"""Maximum share of the whole time for running the dense model on all images."""


class Source(NamedTuple):
    """The model that is searched.

    Attributes:
        student: Model with predictors, from which plans are made.
        dense: Its dense model.
        path: Path as given; None for a module in memory.
        ready: True if its predictors are fitted.
    """

    student: Student
    dense: Student
    path: str | None
    ready: bool


def load(source: str | Path | nn.Module, options: ModelOptions, teacher: str | None, kernels: bool) -> Source:
    """Load the model of a search.

    Args:
        source: See `optimize`.
        options: How it is loaded.
        teacher: Dense model of a trained sparse model.
        kernels: Whether a new model is for GPU kernels.

    Raises:
        ConfigError: A size or a teacher does not fit the source, or plans cannot be made from the model.
    """
    if not isinstance(source, nn.Module) and Path(source).is_dir() and kind_of(Path(source)) == "student":
        require(options.img_size is None, "A sparse model has a fixed image size.", "Leave --img-size out.")
        refuse_normalisation(options.normalise)
        student = load_student(source, trust=options.trust)
        usable = not student.sparsity.is_dense and not student.sparsity.token_keep and student.sparsity.preset == "edge"
        what = f"{source} is dense, prunes tokens, or uses another preset than edge."
        require(usable, what, "Give the dense model, or a sparse model made by `sparsify MODEL --keep 0.25`.")
        return Source(student, teacher_of(student, teacher, options.file), str(source), ready=True)
    require(teacher is None, "--teacher requires a sparse model.", "Leave it out: a dense model is its own teacher.")
    if isinstance(source, nn.Module):
        pixels = normalisation_of(source, f"This {type(source).__name__}", options.normalisation)
        names = check_names(getattr(source, "output_names", None))
        module = copy.deepcopy(source).eval().float()
        dense = Student(module, type(source).__name__, pixels, outputs=names)
        require(dense.backbone.sparsity is None, "This module is sparse already.", "Call `restore_model` first.")
    else:
        dense = load_source(str(source), options.file, options.img_size, options.normalisation)
    depth = len(dense.backbone.layers)
    # Later layers see so few tokens after merging that dense attention is cheap: they need no predictor.
    shares = tuple(START_SHARE if 2 * layer < depth else 1.0 for layer in range(depth))
    sparsity = fit_to_model(SparsityConfig(keep=shares), dense.backbone, {"keep": shares})
    sparsity = gpu_sparsity(sparsity, dense.backbone.prefix, dense.backbone.patches) if kernels else sparsity
    student = make_student(dataclasses.replace(dense, model=copy.deepcopy(dense.model)), sparsity)
    return Source(student, dense, None if isinstance(source, nn.Module) else str(source), ready=False)


def open_trial(request: SearchRequest, source: Source, clock: Clock) -> tuple[SearchRequest, Trial]:
    """Return what evaluates plans; if the dense model is too slow for the time limit, fewer images are used."""
    student, teacher, paths = source.student, source.dense.model, [*request.images, *request.reserved]
    with clock.step("first image", "the dense model on the first image"):
        Trial(student, teacher, paths[:1], request.metric, request.fit)  # A warm-up.
    until = clock.elapsed_s + DENSE_SHARE * clock.seconds

    def enough(count: int) -> bool:
        return count >= LEAST_IMAGES and clock.elapsed_s > until

    begun = clock.elapsed_s
    trial = Trial(student, teacher, paths, request.metric, request.fit, clock.tell, enough)
    clock.note("dense image", (clock.elapsed_s - begun) / len(trial.paths))
    kept = len(trial.paths) - held_out_count(len(trial.paths))
    return request._replace(images=trial.paths[:kept], reserved=trial.paths[kept:]), trial


def calibration_images(request: SearchRequest, clock: Clock) -> list[Path]:
    """Return the images for int8 calibration, the first ones; few if the model is slow for the time limit."""
    count = int(INT8_SHARE * clock.seconds / clock.took("dense image"))
    return request.images[: min(max(count, LEAST_INT8_IMAGES), INT8_IMAGES)]


def fit_predictors(request: SearchRequest, source: Source, clock: Clock) -> tuple[Source, int, str | None]:
    """Fit the predictors to the first images.

    Returns:
        The model, the number of images, and a remark if there was no time.
    """
    count = min(PREDICTOR_IMAGES, int(LEARNING_SHARE * clock.seconds / (LEARNING_IMAGES * clock.took("dense image"))))
    if source.ready:
        return source, 0, None
    if count < 2:
        return source, 0, "There was no time to fit the predictors to your images. Give more --minutes."
    with scratch_folder() as scratch, clock.step("learning", "fitting the predictors"):
        images = link_images(scratch / "images", request.images[:count])
        student = calibrate_student(source.student, images, clock.tell)
        return source._replace(student=student), min(count, len(request.images)), None
