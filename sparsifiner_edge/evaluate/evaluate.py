"""`evaluate_student`: how near a student or bundle comes to its dense teacher, by one of several metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsifiner_edge.bounds import MOST_WORKERS
from sparsifiner_edge.config import Keep
from sparsifiner_edge.corruptions import parse_corruptions
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.classes import METRICS, gallery_of, predictor_of, require_head, write_head
from sparsifiner_edge.evaluate.extract import Extractor, TeacherComparison, open_both, with_roles
from sparsifiner_edge.evaluate.judges import (
    COMPARED,
    ClassJudge,
    FeatureJudge,
    Judge,
    JudgedImage,
    MapJudge,
    OwnJudge,
    Task,
    answers,
)
from sparsifiner_edge.evaluate.reading import Feed, Labelled, labelled, preparation_of
from sparsifiner_edge.evaluate.robustness import (
    CLEAN,
    RobustnessMethod,
    RobustnessResult,
    corrupted_scores,
    robustness_statistics,
)
from sparsifiner_edge.evaluate.scores import (
    Answered,
    ClassMethod,
    ClassResult,
    ScoresMethod,
    ScoresResult,
    accuracies,
    clean_scores,
)
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.images import Normalisation, Normalise, evenly, list_images
from sparsifiner_edge.judge import MAP_MEASURES, MAPS
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.session import Runtime
from sparsifiner_edge.sparse.student import load_student

COSINE = "cosine similarity per image, student or bundle against dense teacher"
SEVERITY = 3


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
    corruptions: str | None = None,
    severity: int | None = None,
    workers: int | None = None,
    normalise: Normalise = None,
    progress: Progress | None = None,
) -> ScoresResult | ClassResult | RobustnessResult:
    """Compare a student or bundle with its dense teacher over images.

    Args:
        subject: student or bundle folder.
        data: an image, a folder of images, or a list of images; to judge classes a folder with one folder of images
            per class.
        against: the teacher: a model (see `load_source`), or a bundle. None, for a student only: its own weights
            with dense attention everywhere.
        metric: "cosine". "knn": accuracy of the class of most of the 20 nearest gallery features by cosine. "linear":
            of logistic regression on the gallery's features. "top1": of the classifier's own answer, on images that are
            prepared as timm validates the model. "task": see task.
        gallery: for knn and linear: labelled images.
        queries: use at most so many images of `data`, evenly taken; None takes all.
        head: for linear: student folder to write, the subject with the probe as its classifier.
        keep, token_keep, merge: for a student: other budgets than its own.
        backend, precision, provider, kernels: what runs bundles; see `open_session`. trust: see `load_student`.
        task, map_name, masks: for the metric "task"; see `Task`.
        corruptions: judge by the same metric while images are corrupted: "all", or names of `corruptions.COMMON` with
            commas between. severity: of these, 1 to 5; None takes the middle one.
        workers: processes that read images; see `read_images`.
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
        Normalisation.given(normalise), "logits" if metric == "top1" else None,
    )  # fmt: skip
    chosen = Task(task or MAPS, map_name, Path(masks) if masks else None)
    _require_sense(metric, chosen, gallery, head, corruptions, severity, workers)
    names = () if corruptions is None else parse_corruptions(corruptions)
    with contextlib.ExitStack() as stack:
        models = open_both(compared, stack)
        preparation = preparation_of(models[0].timm_name if metric == "top1" else None, models[0].size)
        reading = Feed(preparation, workers, names, SEVERITY if severity is None else severity)
        compare = _Comparison(models, reading, metric, progress)
        if metric not in METRICS:
            files = data if isinstance(data, list) else list_images(Path(data))
            return compare.by_scores(files if queries is None else evenly(files, queries), chosen)
        if isinstance(data, list):
            raise ConfigError(f"{metric} needs a folder of labelled images.", "Give the folder.")
        asked = labelled(Path(data), classifier=models[0].labels if metric == "top1" else ()).first(queries)
        if head is not None:
            require_head(compared.subject, Path(head), asked.classes)
        result, fitted = compare.by_classes(asked, gallery)
    if head is not None:
        student = load_student(compared.subject, None, keep, token_keep, merge, trust)
        write_head(student, fitted, asked.classes, Path(head))
    return result


class _Comparison(NamedTuple):
    """Two models that are open, the subject first; and how they are compared."""

    models: tuple[Extractor, Extractor]
    reading: Feed
    metric: str
    progress: Progress | None

    def by_scores(self, files: Sequence[Path], task: Task) -> ScoresResult | RobustnessResult:
        """Cosines, or what a task is judged by."""
        by_cosine, size = self.metric == "cosine", self.models[0].size
        measures = ("iou",) if self.reading.corruptions else tuple(MAP_MEASURES)
        judge: Judge = FeatureJudge(files, size)
        if not by_cosine:
            judge = MapJudge(task, files, size, measures) if task.name == MAPS else OwnJudge(task.name, files, size)
        if self.reading.corruptions:
            return self._under_corruptions(judge, task.name if self.metric == "task" else self.metric)
        samples, statistics = clean_scores(judge, self._answers(judge), by_cosine)
        method = ScoresMethod(
            metric=COSINE if by_cosine else None, task=None if by_cosine else task.name, **self._method(judge),
            **judge.said(),
        )  # fmt: skip
        return ScoresResult("evaluation", with_roles(*self.models), method, samples, statistics)

    def by_classes(self, asked: Labelled, folder: str | Path | None) -> tuple[ClassResult | RobustnessResult, Any]:
        """Accuracies; and the subject's probe."""
        gallery = gallery_of(self.metric, folder, asked)
        learning = (asked, gallery, self.reading, self.progress)
        predictors = [predictor_of(model, self.metric, *learning) for model in self.models]
        judge = ClassJudge(asked, METRICS[self.metric], self.models[0].size, predictors)
        if self.reading.corruptions:
            return self._under_corruptions(judge, self.metric), None
        right = corrupted_scores(judge, self._answers(judge))["accuracy"][CLEAN]
        method = ClassMethod(
            metric=METRICS[self.metric], queries=f"{len(asked)} of {asked.name}",
            gallery=f"{len(gallery)} of {gallery.name}" if gallery else "none", classes=list(asked.classes),
            classes_from="the classifier's labels" if asked.classes == self.models[0].labels else "folders, sorted",
            preprocessing=self.reading.preparation.text, runtime=self._runtime(),
        )  # fmt: skip
        answered = Answered(**{f"{role}_right": [int(x == 1) for x in values] for role, values in right.items()})
        statistics = accuracies(answered.subject_right, answered.teacher_right)
        result = ClassResult("evaluation", with_roles(*self.models), method, answered, statistics)
        return result, predictors[0].fitted

    def _under_corruptions(self, judge: Judge, metric: str) -> RobustnessResult:
        samples = corrupted_scores(judge, self._answers(judge))
        method = RobustnessMethod(
            metric=metric, truth=judge.truth, corruptions=list(self.reading.corruptions),
            severities=[self.reading.severity], **self._method(judge),
        )  # fmt: skip
        return RobustnessResult("robustness", with_roles(*self.models), method, samples, robustness_statistics(samples))

    def _answers(self, judge: Judge) -> Iterator[JudgedImage]:
        return answers(judge, *self.models, self.reading, self.progress)

    def _method(self, judge: Judge) -> dict[str, Any]:
        """What every method says."""
        corrupted = ", then corrupted" if self.reading.corruptions else ""
        return {
            "images": [path.name for path in judge.files], "runtime": self._runtime(),
            "preprocessing": f"{self.reading.preparation.text}{corrupted}",
        }  # fmt: skip

    def _runtime(self) -> dict[str, Runtime]:
        return {role: model.runtime for role, model in zip(COMPARED, self.models, strict=True)}


def _require_sense(
    metric: str, task: Task, gallery: str | Path | None, head: str | Path | None, corruptions: str | None,
    severity: int | None, workers: int | None,
) -> None:  # fmt: skip
    """Refuse arguments that have no meaning beside each other."""
    if metric not in ("cosine", "task", *METRICS):
        raise ConfigError(f"metric is {metric!r}.", f"Choose one of: cosine, task, {', '.join(METRICS)}.")
    if task != Task() and metric != "task":
        raise ConfigError("A task and masks require --metric task.", "Leave them out.")
    if task.name != MAPS and (task.masks or task.output):
        raise ConfigError("Masks and the name of a map are for the task maps.", "Leave them out.")
    if gallery is not None and metric not in METRICS:
        raise ConfigError("Images to learn from require another metric.", f"Choose: {', '.join(METRICS)}.")
    if head is not None and (metric != "linear" or corruptions is not None):
        raise ConfigError("A head is written by the metric linear, on clean images.", "Use that, or leave --head out.")
    if workers is not None and not 0 <= workers <= MOST_WORKERS:
        raise ConfigError(f"workers is {workers}.", f"Give a whole number from 0 to {MOST_WORKERS}.")
    if severity is not None and corruptions is None:
        raise ConfigError("A severity is that of corruptions.", "Name them: --corruptions all.")
