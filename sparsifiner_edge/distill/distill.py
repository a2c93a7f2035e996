"""`distill_student`: student, teacher and images -> a better student, never a worse one."""

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
from sparsifiner_edge.distill.recipe import DEFAULT, Recipe, front_budgets, read_recipe
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
BY_TOP1 = "top-1 of held-out images, mean of the budgets"


class BudgetFidelity(msgspec.Struct, frozen=True):
    """Mean over held-out images with one budget: of the untrained start, and of what was kept."""

    keep: Keep
    token_keep: tuple[tuple[int, float], ...]
    merge: tuple[int, ...]
    start: float
    best: float


class TrainingSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A training.

    Attributes:
        recipe: its name. settings: all that it says. steps: of the optimiser.
        kept: "the untrained start", or the step whose weights were kept.
        metric: what decided. start, best, budgets: by it, of all budgets together and of each; of the first process
            alone.
        teacher: its name. weights: where the teacher's came from.
        student: what was trained: its folder's name.
        images: how many were trained on. held_out: names. unreadable: paths of those that could not be read.
        processes: that trained together.
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
    """How a student is trained.

    Attributes:
        recipe, overrides: see `read_recipe`. budgets: the `front.json` of a search of this student, whose points it
            learns to work with in place of the recipe's.
        labels: also learn from labels; for a classifier.
        held_out: folder of validation images, which choose the checkpoint; None takes some out of the data.
        resume: continue from the last checkpoint of this output.

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
        require_lists(overrides=self.overrides)

    def settings(self) -> Recipe:
        """All that the recipe says.

        Raises:
            ConfigError: see `read_recipe`.
        """
        points = [] if self.budgets is None else [front_budgets(Path(self.budgets))]
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
    """Train a student towards its dense teacher and write the best that was found as a student folder.

    "Best" is judged by the cosine to the teacher's final tokens over images that are not trained on, at every budget
    of the recipe (see `losses.joint_fidelity`); the untrained start counts. Meanwhile `<output>.training` holds a
    checkpoint and `history.jsonl`. Run under `accelerate launch` it uses all its processes.

    Args:
        student: student folder.
        data: folder of images, with or without folders by class.
        output: student folder to write; an earlier student there is replaced.
        teacher: a model (see `load_source`); None: the student's own weights, if it was never
            trained, with dense attention.
        model: how the teacher is loaded, in the student's size; `trust` is for the student.
        options: how it is trained.
        progress: see `Progress`; counts steps, and the stage says the loss.

    Returns:
        What was trained and how it went; the student's provenance holds the same.

    Raises:
        GateError: a loss is NaN or infinite, or exploded; the checkpoint stays.
        SparsifinerError: unusable input; nothing is written.

    Example:
        >>> few = ["reconstruct.steps=1", "distil.steps=2", "batch=2"]
        >>> summary = distill_student("student", "images", "trained", options=TrainingOptions(overrides=few))
        >>> summary.steps
        3
    """
    target, model, options = Path(output), model or ModelOptions(), options or TrainingOptions()
    require_replaceable(target, "student")
    require(model.img_size is None, "A student is trained in its own size.", "Leave img_size out.")
    refuse_normalisation(model.normalise)
    settings, learner = options.settings(), load_student(student, trust=model.trust)
    _require_learnable(learner, settings)
    source = _source(Path(data), settings, learner, options)
    dense = teacher_of(learner, teacher, model.file)
    folder = target.with_name(f"{target.name}.training")
    accelerator = make_accelerator(settings)
    training = Training(accelerator, learner, dense, source, settings, folder)
    with _begun(training, options.resume):
        training.run(progress)
        summary = _summary(training, dense, options.recipe, Path(student))
        if accelerator.is_main_process:
            learner.model.cpu().load_state_dict(training.best)
            provenance = replace(learner.provenance, training=write_record(summary))
            save_student(dataclasses.replace(learner, provenance=provenance), target)
            (folder / checkpoint.CHECKPOINT).unlink()
        accelerator.wait_for_everyone()  # Whoever leaves first must not take the group from one that still writes.
        accelerator.end_training()
    return summary


def _require_learnable(student: Student, recipe: Recipe) -> None:
    if student.sparsity.is_dense:
        raise ConfigError(f"{student.name} is dense: there is nothing to learn.", "Make it sparse with `sparsify`.")
    if (recipe.reconstruct.steps or recipe.reconstruct.epochs) and not sparse_layers(student.model):
        raise ConfigError(
            "No layer of this student has a predictor to reconstruct.",
            "Give --set reconstruct.steps=0 --set reconstruct.epochs=0.",
        )


def _source(data: Path, recipe: Recipe, student: Student, options: TrainingOptions) -> ImageSource:
    labels, held_out = options.labels, None if options.held_out is None else Path(options.held_out)
    # Of a classifier that is a backbone alone: what a decoder gives is nothing that labels could teach.
    classes = student.backbone.classes if student.backbone.module is student.model else 0
    if labels and not classes:
        raise ConfigError(f"{student.name} has no classifier to learn labels.", "Leave --labels out.")
    source = folder_source(data, recipe.images.held_out, labels, held_out, student.labels)
    if labels and len(source.classes) != classes:
        raise ConfigError(
            f"{data} holds {len(source.classes)} classes, the student knows {classes}.", "Give one folder per class."
        )
    return source


@contextlib.contextmanager
def _begun(training: Training, resume: bool) -> Iterator[None]:
    """A training in its folder, which its first process holds alone, from the start or from its checkpoint."""
    first, folder = training.accelerator.is_main_process, training.folder
    with io_errors(folder):
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    expected = checkpoint.CHECKPOINT, checkpoint.HISTORY  # and what a process that was killed left of them
    if foreign := [name for name in names if not any(one in name for one in expected)]:
        raise ConfigError(
            f"{folder} is where checkpoints go, but holds {foreign[0]!r}.", "Move it, or give another -o."
        )
    begun = checkpoint.CHECKPOINT in names
    if resume and not begun:
        raise ArtifactError(f"{folder} holds no checkpoint to resume from.", "Leave --resume out to start.")
    if begun and not resume:
        raise ConfigError(
            f"{folder} holds an unfinished training.", "Go on with --resume, or remove that folder to start again."
        )
    training.accelerator.wait_for_everyone()
    with contextlib.ExitStack() as stack:
        if first:
            with io_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                ours = stack.enter_context(hold_lock(folder, wait=False))
            if not ours:
                raise ConfigError(f"Another training writes to {folder}.", "Wait for it, or give another -o.")
        if resume:
            training.restore(*checkpoint.load(folder))
        elif first:
            with io_errors(folder):
                (folder / checkpoint.HISTORY).unlink(missing_ok=True)
        yield


def _summary(training: Training, teacher: Student, recipe: str, student: Path) -> TrainingSummary:
    """What was trained and how it went; figures are the first process's."""
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
