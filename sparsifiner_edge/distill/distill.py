"""`distill_student`: student, teacher and images -> a better student, never a worse one."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import asdict, replace

from sparsifiner_edge.artifacts import STUDENT_FILE, require_replaceable, sha256
from sparsifiner_edge.config import Keep
from sparsifiner_edge.distill import checkpoint
from sparsifiner_edge.distill.captured import lost
from sparsifiner_edge.distill.checkpoint import TrainingState
from sparsifiner_edge.distill.data import ImageSource, folder_source
from sparsifiner_edge.distill.recipe import DEFAULT, Recipe, front_points, read_recipe
from sparsifiner_edge.distill.tensorboard import RecordLosses, recorder
from sparsifiner_edge.distill.train import Training, make_accelerator
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import io_errors
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import write_record
from sparsifiner_edge.sparse.calibrate import sparse_layers
from sparsifiner_edge.sparse.novelty import with_novelty
from sparsifiner_edge.sparse.student import Student, load_student, save_student
from sparsifiner_edge.sparse.student_file import Weights
from sparsifiner_edge.sparse.teacher import teacher_of


class NamedRecipe(Recipe, frozen=True):
    """A recipe and its name."""

    name: str


class BudgetFidelity(msgspec.Struct, frozen=True):
    """Mean cosine over held-out images with one budget: of the untrained start, and of what was kept; top-1 where that
    decided.
    """

    keep: Keep
    token_keep: tuple[tuple[int, float], ...]
    start: float
    best: float
    merge: tuple[int, ...] = ()


BY_COSINE = "cosine of patches and class token: 1 - geometric mean of 1 - cosine, held-out images and budgets"
BY_TOP1 = "top-1 of held-out images, mean of the budgets"


class Fidelity(msgspec.Struct, frozen=True):
    """All budgets together, then each; of the first process alone."""

    metric: str = BY_COSINE
    start: float | None = None
    best: float | None = None
    budgets: list[BudgetFidelity] | None = None


class Teacher(Weights, frozen=True):
    """Its name, and where its weights came from."""

    name: str


class TrainingImages(msgspec.Struct, frozen=True, rename=lambda name: name.replace("_", " ")):
    """How many were trained on; names of those held out; paths of those that could not be read."""

    trained_on: int
    held_out: list[str]
    unreadable: list[str]


class Start(msgspec.Struct, frozen=True):
    """The student that was trained: its folder's name, and the SHA-256 of its `config.json`."""

    student: str
    sha256: str


class TrainingSummary(msgspec.Struct, frozen=True):
    """A training.

    Attributes:
        steps: of the optimiser. kept: "the untrained start", or the step whose weights were kept.
        processes: that trained together. start: what was trained.
        warnings: for people, of predictors that hold less attention than they did at the start.
    """

    recipe: NamedRecipe
    steps: int
    kept: str
    fidelity: Fidelity
    teacher: Teacher
    images: TrainingImages
    processes: int
    start: Start = msgspec.field(name="from")
    warnings: list[str] = []


def distill_student(
    student: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    teacher: str | None = None,
    weights: str | Path | None = None,
    labels: bool = False,
    held_out: str | Path | None = None,
    recipe: str = DEFAULT,
    overrides: Sequence[str] = (),
    budgets: str | Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    trust: Sequence[str] = (),
    progress: Progress | None = None,
) -> TrainingSummary:
    """Train a student towards its dense teacher and write the best that was found as a student folder.

    "Best" is judged by the cosine to the teacher's final tokens over images that are not trained on, at every budget
    of the recipe (see `fidelity.joint_fidelity`); the untrained start counts. Meanwhile `<output>.training` holds a
    checkpoint and `history.jsonl`. Run under `accelerate launch` it uses all its processes.

    Args:
        student: student folder.
        data: folder of images, with or without folders by class.
        output: student folder to write; an earlier student there is replaced.
        teacher: a model (see `load_source`); None: the student's own weights, if it was never
            trained, with dense attention.
        weights: of the teacher: .safetensors or .pth file; None lets timm download them.
        labels: also learn from labels; for a classifier.
        held_out: folder of validation images, which choose the checkpoint; None takes some out of `data`.
        recipe, overrides: see `read_recipe`. budgets: the `front.json` of a search of this student, whose points it
            learns to work with in place of the recipe's.
        resume: continue from the last checkpoint of this output.
        tensorboard: also write the history to `<output>.training/tensorboard`.
        trust: see `load_student`.
        progress: see `Progress`; counts steps, and the stage says the loss; then images that `novelty` is fitted to.

    Returns:
        What was trained and how it went; the student's provenance holds the same.

    Raises:
        GateError: a loss is NaN or infinite, or exploded; the checkpoint stays.
        SparsifinerError: unusable input; nothing is written.
    """
    target = Path(output)
    require_replaceable(target, "student")
    points = [] if budgets is None else front_points(Path(budgets))
    plan, found = read_recipe(recipe, [*points, *overrides]), load_student(student, trust=trust)
    _require_learnable(found, plan)
    source = _source(Path(data), plan, found, labels, Path(held_out) if held_out else None)
    dense = teacher_of(found, teacher, Path(weights) if weights else None)
    accelerator = make_accelerator(plan)
    training = Training(accelerator, found, dense, source, plan, target.with_name(f"{target.name}.training"))
    with _begun(training, resume), _recorder(training, tensorboard) as record:
        state = training.run(progress, record)
        start = Start(Path(student).resolve().name, sha256(Path(student) / STUDENT_FILE))
        summary = _summary(training, state, dense, recipe, start)
        if accelerator.is_main_process:
            found.model.cpu().load_state_dict(state.best)
            provenance = replace(found.provenance, training=write_record(summary))
            # Other weights make other tokens: what was fitted before says nothing of them.
            seen = [path for path in source.train if str(path) not in state.unreadable]
            save_student(with_novelty(dataclasses.replace(found, provenance=provenance), seen, progress), target)
            (training.folder / checkpoint.CHECKPOINT).unlink()
        accelerator.end_training()
    return summary


def _recorder(training: Training, wanted: bool) -> contextlib.AbstractContextManager[RecordLosses | None]:
    first = training.accelerator.is_main_process
    return recorder(training.folder / "tensorboard") if wanted and first else contextlib.nullcontext()


def _require_learnable(student: Student, plan: Recipe) -> None:
    if student.sparsity.is_dense:
        raise ConfigError(f"{student.name} is dense: there is nothing to learn.", "Make it sparse with `sparsify`.")
    if (plan.reconstruct.steps or plan.reconstruct.epochs) and not sparse_layers(student.model):
        raise ConfigError(
            "No layer of this student has a predictor to reconstruct.",
            "Give --set reconstruct.steps=0 --set reconstruct.epochs=0.",
        )


@contextlib.contextmanager
def _begun(training: Training, resume: bool) -> Iterator[None]:
    """A training in its folder, which its first process holds alone, from the start or from its checkpoint."""
    first, folder = training.accelerator.is_main_process, training.folder
    _check_folder(folder, resume)
    training.accelerator.wait_for_everyone()
    with checkpoint.held(folder) if first else contextlib.nullcontext():
        if resume:
            _restore(training, folder)
        elif first:
            _clear(folder)
        yield


def _summary(training: Training, state: TrainingState, teacher: Student, recipe: str, start: Start) -> TrainingSummary:
    """What was trained and how it went; figures are the first process's."""
    fidelity = Fidelity()
    if state.fidelity:
        judged = state.top1 if training.by_top1 else state.cosines
        cosines = zip(training.budgets(), judged[0], judged[state.best_step], strict=True)
        each = [
            BudgetFidelity(budget.keep, budget.token_keep, start, best, budget.merge) for budget, start, best in cosines
        ]
        fidelity = Fidelity(
            metric=BY_TOP1 if training.by_top1 else BY_COSINE, start=state.fidelity[0],
            best=state.fidelity[state.best_step], budgets=each,
        )  # fmt: skip
    source, origin = training.source, teacher.provenance.weights or Weights()
    return TrainingSummary(
        NamedRecipe(recipe, **asdict(training.recipe)),
        state.step,
        "the untrained start" if state.best_step == 0 else f"step {state.best_step}",
        fidelity,
        Teacher(teacher.name, **asdict(origin)),
        TrainingImages(
            trained_on=len(source.train),
            held_out=[path.name for path in source.held_out],
            unreadable=sorted(state.unreadable),
        ),
        training.accelerator.num_processes,
        start,
        _warnings(training, state),
    )


def _warnings(training: Training, state: TrainingState) -> list[str]:
    """Of predictors that hold less than they did, after the phase in which they learn alone, and in what was kept; and
    of those that had to be put back.
    """
    begun, phase = state.captured.get(0, {}), training.phases[0][1]
    when = {
        f"after step {phase}, the first phase": phase,
        f"in what was kept, of step {state.best_step}": state.best_step,
    }
    found = [
        f"{where}: {what}" for where, step in when.items() if step for what in lost(begun, state.captured.get(step, {}))
    ]
    if state.predictors is not None and phase:
        gains = enumerate(state.predictors.gains)
        names = [str(n) for n, gain in gains if gain <= 0 and any(shares[n] < 1 for shares in begun.values())]
        found += [
            f"after step {phase}, the first phase: lists of sparse layers {', '.join(names)} held less of their "
            "attention than before; these layers keep the predictors that they began with"
        ] * bool(names)
    return found


def _source(data: Path, plan: Recipe, student: Student, labels: bool, held_out: Path | None) -> ImageSource:
    classes = student.backbone.classes
    if labels and not classes:
        raise ConfigError(f"{student.name} has no classifier to learn labels.", "Leave --labels out.")
    source = folder_source(data, plan.images.held_out, labels, held_out, student.labels)
    if labels and len(source.classes) != classes:
        raise ConfigError(
            f"{data} holds {len(source.classes)} classes, the student knows {classes}.", "Give one folder per class."
        )
    return source


_OWN_FILES = {checkpoint.CHECKPOINT, f"{checkpoint.CHECKPOINT}.part", checkpoint.HISTORY, "history.part", "tensorboard"}


def _check_folder(folder: Path, resume: bool) -> None:
    with io_errors(folder):
        foreign = sorted({path.name for path in folder.iterdir()} - _OWN_FILES) if folder.is_dir() else []
    if foreign or (folder.exists() and not folder.is_dir()):
        what = f"holds {foreign[0]!r}" if foreign else "is not a folder"
        raise ConfigError(f"{folder} is where checkpoints go, but {what}.", "Move it, or give another -o.")
    found = (folder / checkpoint.CHECKPOINT).is_file()
    if resume and not found:
        raise ArtifactError(f"{folder} holds no checkpoint to resume from.", "Leave --resume out to start.")
    if found and not resume:
        raise ConfigError(
            f"{folder} holds an unfinished training.", "Go on with --resume, or remove that folder to start again."
        )


def _clear(folder: Path) -> None:
    """An empty folder for a new training; what an earlier one left there goes."""
    with io_errors(folder):
        for name in _OWN_FILES & {path.name for path in folder.iterdir()}:
            if name == "tensorboard":
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink()


def _restore(training: Training, folder: Path) -> None:
    content = checkpoint.load(folder)
    now, then = training.fingerprint(), content.fingerprint
    for name, value in now.items():
        if then.get(name) != value:
            raise ConfigError(
                f"The training in {folder} began with other {name}: {then.get(name)}, now {value}.",
                f"Give what it began with, or remove {folder} to start again.",
            )
    training.restore(content)
