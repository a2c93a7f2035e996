"""Distillation of a student folder: `distill_student`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from sparsifiner_edge.artifacts import require_replaceable
from sparsifiner_edge.config import Keep, require, require_lists
from sparsifiner_edge.distill import checkpoint
from sparsifiner_edge.distill.data import ImageSource, folder_source
from sparsifiner_edge.distill.recipe import DEFAULT, Recipe, pareto_budgets, read_recipe
from sparsifiner_edge.distill.train import Training, make_accelerator
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import hold_lock, io_errors
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import write_record
from sparsifiner_edge.sparse.calibrate import sparse_layers
from sparsifiner_edge.sparse.model_options import ModelOptions
from sparsifiner_edge.sparse.student import Student, load_student, refuse_normalisation, save_student, teacher_of
from sparsifiner_edge.sparse.student_file import Weights

BY_COSINE = "cosine of patches and class token: 1 - geometric mean of 1 - cosine, held-out images and budgets"
"""Description of the metric that selects the weights by default."""
BY_TOP1 = "top-1 of held-out images, mean of the budgets"
"""Description of the metric that selects the weights by accuracy."""


class BudgetFidelity(msgspec.Struct, frozen=True):
    """Evaluation at one budget, as a mean over the held-out images.

    Attributes:
        keep: Shares of keys.
        token_keep: Layers and shares of token pruning.
        merge: Numbers of token pairs that merge.
        start: Value of the student before this training.
        best: Value of the weights that were kept.
    """

    keep: Keep
    token_keep: tuple[tuple[int, float], ...]
    merge: tuple[int, ...]
    start: float
    best: float


class TrainingSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a training.

    Attributes:
        recipe: Name of the recipe.
        settings: All settings of the recipe.
        steps: Number of optimiser steps.
        kept: "the untrained start", or the step whose weights were kept.
        metric: Metric that selected the weights.
        start: Value of the student before this training, over all budgets.
        best: Value of the weights that were kept, over all budgets.
        budgets: Values at each budget. Like `start` and `best`, they are known to the main process only.
        teacher: Name of the teacher.
        weights: Origin of the teacher's weights.
        student: Name of the student's folder.
        images: Number of images to train on.
        held_out: Names of the held-out images.
        unreadable: Paths of images that could not be read.
        processes: Number of processes of the training.
    """

    recipe: str
    settings: Recipe
    steps: int
    kept: str
    metric: str
    start: float | None = None
    best: float | None = None
    budgets: list[BudgetFidelity] = []
    teacher: str
    weights: Weights
    student: str
    images: int
    held_out: list[str]
    unreadable: list[str]
    processes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of a training.

    Attributes:
        recipe: Name or path of the recipe; see `read_recipe`.
        overrides: Settings that replace those of the recipe; see `read_recipe`.
        budgets: Result `front.json` of a search with this student, whose points replace the budgets of the recipe.
        labels: Also train with labels. Requires a classifier.
        held_out: Folder of validation images, which select the checkpoint. None takes some images out of the data.
        resume: Continue from the last checkpoint of this output.

    Example:
        >>> TrainingOptions(overrides=["distil.steps=100"]).settings().distil.steps
        100
    """

    recipe: str = DEFAULT
    overrides: Sequence[str] = ()
    budgets: str | Path | None = None
    labels: bool = False
    held_out: str | Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Check that `overrides` is a list or tuple."""
        require_lists(overrides=self.overrides)

    def settings(self) -> Recipe:
        """Return all settings of the recipe, with budgets and overrides applied.

        Raises:
            ConfigError: If the recipe or an override is invalid; see `read_recipe`.
            ArtifactError: If `budgets` is not the result of a search.
        """
        points = [] if self.budgets is None else [pareto_budgets(Path(self.budgets))]
        return read_recipe(self.recipe, [*points, *self.overrides])


def distill_student(
    student: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    teacher: str | None = None,
    model: ModelOptions | None = None,
    options: TrainingOptions | None = None,
    progress: Progress | None = None,
) -> TrainingSummary:
    """Train a student towards its dense teacher and write the best weights as a student folder.

    The weights are selected by the cosine to the teacher's final tokens on held-out images, at every budget of the
    recipe (see `losses.joint_fidelity`). The untrained start takes part, so that the result is never worse by this
    metric. During the training, `<output>.training` holds a checkpoint and `history.jsonl`. Under `accelerate launch`
    all its processes are used.

    Args:
        student: Student folder.
        data: Folder of images, with or without class folders.
        output: Student folder to write. An earlier student there is replaced.
        teacher: Model (see `load_source`). None takes the student's own weights with dense attention, which requires
            that the student was never trained.
        model: Options for loading the teacher. Its image size is that of the student; `trust` applies to the student.
        options: Options of the training.
        progress: Callback that counts steps and reports the loss as its stage; see `Progress`.

    Returns:
        A summary of the training, which the student's provenance also contains.

    Raises:
        GateError: If a loss is NaN, infinite or explodes. The checkpoint is kept.
        SparsifinerError: If an input is unusable. Nothing is written in this case.

    Example:
        >>> few = ["reconstruct.steps=1", "distil.steps=2", "batch=2"]
        >>> summary = distill_student("student", "images", "trained", options=TrainingOptions(overrides=few))
        >>> summary.steps
        3
    """
    target, model, options = Path(output), model or ModelOptions(), options or TrainingOptions()
    require_replaceable(target, "student")
    require(model.img_size is None, "A student is trained at its own image size.", "Leave img_size out.")
    refuse_normalisation(model.normalise)
    settings, learner = options.settings(), load_student(student, trust=model.trust)
    _require_learnable(learner, settings)
    source = _source(Path(data), settings, learner, options)
    dense = teacher_of(learner, teacher, model.file)
    folder = target.with_name(f"{target.name}.training")
    accelerator = make_accelerator(settings)
    training = Training(accelerator, learner, dense, source, settings, folder)
    with _training_folder(training, options.resume):
        training.run(progress)
        summary = _summary(training, dense, options.recipe, Path(student))
        if accelerator.is_main_process:
            learner.model.cpu().load_state_dict(training.best)
            provenance = replace(learner.provenance, training=write_record(summary))
            save_student(dataclasses.replace(learner, provenance=provenance), target)
            (folder / checkpoint.CHECKPOINT).unlink()
        accelerator.wait_for_everyone()  # A process that leaves early would end the group while another one writes.
        accelerator.end_training()
    return summary


def _require_learnable(student: Student, recipe: Recipe) -> None:
    """Refuse a dense student, and a reconstruction phase without predictors."""
    if student.sparsity.is_dense:
        raise ConfigError(f"{student.name} is dense and needs no training.", "Make it sparse with `sparsify`.")
    if (recipe.reconstruct.steps or recipe.reconstruct.epochs) and not sparse_layers(student.model):
        raise ConfigError(
            "No layer of this student has a predictor to reconstruct.",
            "Give --set reconstruct.steps=0 --set reconstruct.epochs=0.",
        )


def _source(data: Path, recipe: Recipe, student: Student, options: TrainingOptions) -> ImageSource:
    """Return the images of a training, after checking that its labels fit the student."""
    labels, held_out = options.labels, None if options.held_out is None else Path(options.held_out)
    # Labels apply only to a bare backbone with a classifier, not to the outputs of a decoder.
    classes = student.backbone.classes if student.backbone.module is student.model else 0
    if labels and not classes:
        raise ConfigError(f"{student.name} has no classifier to train with labels.", "Leave --labels out.")
    source = folder_source(data, recipe.images.held_out, labels, held_out, student.labels)
    if labels and len(source.classes) != classes:
        raise ConfigError(
            f"{data} holds {len(source.classes)} classes, but the student has {classes}.", "Give one folder per class."
        )
    return source


@contextlib.contextmanager
def _training_folder(training: Training, resume: bool) -> Iterator[None]:
    """Hold the folder of a training exclusively inside a `with` block, and restore the checkpoint if it resumes."""
    first, folder = training.accelerator.is_main_process, training.folder
    with io_errors(folder):
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    expected = checkpoint.CHECKPOINT, checkpoint.HISTORY  # Their temporary files may remain after a kill.
    if foreign := [name for name in names if not any(file in name for file in expected)]:
        raise ConfigError(
            f"{folder} is reserved for checkpoints, but holds {foreign[0]!r}.", "Move it, or give another -o."
        )
    unfinished = checkpoint.CHECKPOINT in names
    if resume and not unfinished:
        raise ArtifactError(f"{folder} holds no checkpoint to resume from.", "Leave --resume out to start.")
    if unfinished and not resume:
        raise ConfigError(
            f"{folder} holds an unfinished training.", "Continue with --resume, or remove that folder to start again."
        )
    training.accelerator.wait_for_everyone()
    with contextlib.ExitStack() as stack:
        if first:
            with io_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                acquired = stack.enter_context(hold_lock(folder, wait=False))
            if not acquired:
                raise ConfigError(f"Another training writes to {folder}.", "Wait for it, or give another -o.")
        if resume:
            training.restore(*checkpoint.load(folder))
        elif first:
            with io_errors(folder):
                (folder / checkpoint.HISTORY).unlink(missing_ok=True)
        yield


def _summary(training: Training, teacher: Student, recipe: str, student: Path) -> TrainingSummary:
    """Return the summary of a training; the main process has the evaluations."""
    state, source = training.state, training.source
    start, best = state.start, state.best
    rows = zip(training.budgets, start.figures, best.figures, strict=True) if start and best else ()
    return TrainingSummary(
        recipe=recipe,
        settings=training.recipe,
        steps=state.step,
        kept="the untrained start" if state.best_step == 0 else f"step {state.best_step}",
        metric=BY_TOP1 if training.by_top1 else BY_COSINE,
        start=start.score if start else None,
        best=best.score if best else None,
        budgets=[BudgetFidelity(b.keep, b.token_keep, b.merge, *figures) for b, *figures in rows],
        teacher=teacher.name,
        weights=teacher.provenance.weights or Weights(),
        student=student.resolve().name,
        images=len(source.train),
        held_out=[path.name for path in source.held_out],
        unreadable=sorted(state.unreadable),
        processes=training.accelerator.num_processes,
    )
