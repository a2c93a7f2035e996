"""`evaluate_student`: how near a student or bundle comes to its dense teacher, by one of several metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsifiner_edge.config import Keep
from sparsifiner_edge.corruptions import every_condition
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.classes import METRICS, ClassResult, evaluate_classes
from sparsifiner_edge.evaluate.extract import TeacherComparison
from sparsifiner_edge.evaluate.judges import Task
from sparsifiner_edge.evaluate.robustness import RobustnessQuestion, RobustnessResult, evaluate_robustness
from sparsifiner_edge.evaluate.scores import ScoresResult, evaluate_scores
from sparsifiner_edge.evaluate.top1 import Feeding, evaluate_top1
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.images import Normalisation, Normalise, evenly, list_images
from sparsifiner_edge.judge import MAPS, THRESHOLD
from sparsifiner_edge.progress import Progress


def evaluate_student(
    subject: str | Path,
    data: str | Path | list[Path],
    *,
    against: str | Path | None = None,
    weights: str | Path | None = None,
    metric: str = "cosine",
    keep: Keep | None = None,
    token_keep: tuple[tuple[int, float], ...] | None = None,
    merge: tuple[int, ...] | None = None,
    gallery: str | Path | None = None,
    queries: int | None = None,
    head: str | Path | None = None,
    backend: str = "onnxruntime",
    precision: str = "auto",
    provider: str = "cpu",
    kernels: str = "auto",
    trust: Sequence[str] = (),
    task: str | None = None,
    map_name: str | None = None,
    masks: str | Path | None = None,
    threshold: float | None = None,
    corruptions: str | None = None,
    severity: str | None = None,
    crop_pct: float | None = None,
    batch: int | None = None,
    workers: int | None = None,
    normalise: Normalise = None,
    progress: Progress | None = None,
) -> ScoresResult | ClassResult | RobustnessResult:
    """Compare a student or bundle with its dense teacher over images.

    Args:
        subject: student or bundle folder.
        data: an image, a folder of images, or a list of images; for the other metrics a folder with one folder of
            images per class.
        against: the teacher: a model (see `load_source`), or a bundle. None, for a student only: its own weights
            with dense attention everywhere.
        metric: "cosine". "knn": accuracy of the class of most of the 20 nearest gallery features by cosine. "linear":
            of logistic regression on the gallery's features. "top1": of the classifier's own answer, on images that are
            prepared as timm validates the model; see `evaluate_top1`. "task": see task.
        gallery: for knn and linear: labelled images. Of a larger gallery 5000 are taken, evenly, and an image of each
            class that has none among them.
        queries: for accuracies: use at most so many images of `data`, evenly taken; None takes all.
        head: for linear: student folder to write, the subject with the probe as its classifier.
        keep, token_keep, merge: for a student: other budgets than its own.
        backend, precision, provider, kernels: what runs bundles; see `open_session`. trust: see `load_student`.
        task, map_name, masks, threshold: for the metric "task"; see `Task`. None takes what that has.
        corruptions: judge by the same metric while images are corrupted: "all", "common", "camera" or names; see
            `corruptions`. severity: as "3", "1,3,5" or "1..5"; None takes all.
        crop_pct, batch, workers: for top1 on clean images: see `Feeding`.
        normalise: for `against`, a model: what it expects of pixels; see `sparsify`.
        progress: see `Progress`; counts images.

    Returns:
        A result of kind "evaluation", with corruptions of kind "robustness".

    Raises:
        ConfigError: no teacher for a bundle, sizes differ, or nothing to compare; for accuracies: no gallery, a class
            without images, classes that differ, or no classifier.
        SparsifinerError: subject, teacher or images are unusable.
    """
    execution = Execution(backend=backend, precision=precision, provider=provider, kernels=kernels)
    compared = TeacherComparison(
        Path(subject), against, weights, keep, token_keep, merge, execution, trust,
        Normalisation.given(normalise),
    )  # fmt: skip
    chosen = Task(task or MAPS, map_name, Path(masks) if masks else None, THRESHOLD if threshold is None else threshold)
    feeding = Feeding(crop_pct, batch, workers)
    _require_sense(metric, chosen, head, corruptions, severity)
    if metric != "top1" or corruptions is not None:
        _require_unset(feeding, metric)
    if metric in METRICS and isinstance(data, list):
        raise ConfigError(f"{metric} needs a folder of labelled images.", "Give the folder.")
    if gallery is not None and metric not in METRICS:
        raise ConfigError("Images to learn from require another metric.", f"Choose: {', '.join(METRICS)}.")
    if corruptions is not None:
        asked = RobustnessQuestion(metric, gallery, queries, chosen)
        found = data if isinstance(data, list) else Path(data)
        return evaluate_robustness(compared, found, asked, every_condition(corruptions, severity), progress)
    if metric == "top1":
        return evaluate_top1(compared, Path(str(data)), gallery, queries, feeding, progress)
    if metric in METRICS:
        return evaluate_classes(compared, Path(str(data)), metric, gallery, queries, head, progress)
    files = data if isinstance(data, list) else list_images(Path(data))
    files = files if queries is None else evenly(files, queries)
    return evaluate_scores(compared, files, chosen if metric == "task" else None, progress)


def _require_sense(
    metric: str, chosen: Task, head: str | Path | None, corruptions: str | None, severity: str | None
) -> None:
    """Refuse arguments that have no meaning beside each other."""
    if metric not in ("cosine", "task", *METRICS):
        raise ConfigError(f"metric is {metric!r}.", f"Choose one of: cosine, task, {', '.join(METRICS)}.")
    if chosen != Task() and metric != "task":
        raise ConfigError("A task, masks and a threshold require --metric task.", "Leave them out.")
    if head is not None and (metric not in ("knn", "linear") or corruptions is not None):
        raise ConfigError("A head is written by the metric linear, on clean images.", "Use that, or leave --head out.")
    if not 0 < chosen.threshold < 1:
        raise ConfigError(f"threshold is {chosen.threshold}.", "Give a number between 0 and 1.")
    if chosen.name != MAPS and (chosen.masks or chosen.output):
        raise ConfigError("Masks and the name of a map are for the task maps.", "Leave them out.")
    if severity is not None and corruptions is None:
        raise ConfigError("A severity is that of corruptions.", "Name them: --corruptions all.")


def _require_unset(feeding: Feeding, metric: str) -> None:
    """Refuse what other metrics, and corrupted images, have no use for: they take the centre of an image."""
    for name, value in feeding._asdict().items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} {value:g} is for --metric top1 on clean images; this is {metric}.",
                f"Leave {option} out, or use --metric top1 without --corruptions.",
            )
