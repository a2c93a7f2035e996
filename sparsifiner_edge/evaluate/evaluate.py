"""`evaluate_student`: how near a student or bundle comes to its dense teacher, by one of several metrics."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from sparsifiner_edge.bounds import MOST_WORKERS
from sparsifiner_edge.config import Budget, require
from sparsifiner_edge.corruptions import parse_corruptions
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.classes import METRICS, ClassJudge, require_head, write_head
from sparsifiner_edge.evaluate.extract import Extractor, TeacherComparison, open_both, with_roles
from sparsifiner_edge.evaluate.judges import COMPARED, Judge, answers, judge_of
from sparsifiner_edge.evaluate.reading import Feed, class_set, feed_of
from sparsifiner_edge.evaluate.scores import clean_scores, corrupted_scores, score_statistics, stability
from sparsifiner_edge.execution import Execution, execution_of
from sparsifiner_edge.fitting import Box, Fit, Framing
from sparsifiner_edge.images import Normalisation, evenly, list_images
from sparsifiner_edge.judge import MAPS
from sparsifiner_edge.outcomes import EvaluationMethod, RobustnessResult, ScoresResult
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.sparse.model_options import ModelOptions
from sparsifiner_edge.sparse.student import load_student

SEVERITY = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """By what a model is judged.

    Attributes:
        metric: "cosine". "knn": accuracy of the class of most of the 20 nearest gallery features by cosine. "linear":
            of logistic regression on the gallery's features. "top1": of the classifier's own answer, on images that are
            prepared as timm validates the model. "task": see task.
        gallery: for knn and linear: labelled images.
        queries: use at most this many images, evenly taken; None takes all.
        head: for linear: student folder to write, the subject with the probe as its classifier.
        task: for the metric "task": "maps" (None), or a user's metric: see `judge.UserMetric`. map_name: of maps, the
            output that is one; None: the only one there is. masks: a folder of true masks, named as the images.
        corruptions: judge by the same metric while images are corrupted: "all", or names of `corruptions.COMMON` with
            commas between. severity: of these, 1 to 5; None takes the middle one.
        workers: processes that read images; see `read_images`.
        fit, region: how images are brought to the model's size, see `fitting.Framing`; of None as a bundle says, else
            "crop", or for top1 as timm validates the model.

    Raises:
        ConfigError: values that have no meaning, or none beside each other.

    Example:
        >>> EvaluationOptions(corruptions="fog,snow", severity=3).metric
        'cosine'
    """

    metric: str = "cosine"
    gallery: str | Path | None = None
    queries: int | None = None
    head: str | Path | None = None
    task: str | None = None
    map_name: str | None = None
    masks: str | Path | None = None
    corruptions: str | None = None
    severity: int | None = None
    workers: int | None = None
    fit: Fit | None = None
    region: Box | None = None

    def __post_init__(self) -> None:
        metric, choices = self.metric, ", ".join(METRICS)
        Framing(1, self.fit or "crop", self.region)  # Checks both.
        known = metric in ("cosine", "task", *METRICS)
        require(known, f"metric is {metric!r}.", f"Choose one of: cosine, task, {choices}.")
        of_task = metric == "task" or not (self.task or self.map_name or self.masks)
        require(of_task, "A task and masks require --metric task.", "Leave them out.")
        of_maps = self.task in (None, MAPS) or not (self.masks or self.map_name)
        require(of_maps, "Masks and the name of a map are for the task maps.", "Leave them out.")
        learnt = self.gallery is None or metric in METRICS
        require(learnt, "Images to learn from require another metric.", f"Choose: {choices}.")
        clean = self.head is None or (metric == "linear" and self.corruptions is None)
        fix = "Use that, or leave --head out."
        require(clean, "A head is written by the metric linear, on clean images.", fix)
        counted = self.workers is None or 0 <= self.workers <= MOST_WORKERS
        require(counted, f"workers is {self.workers}.", f"Give a whole number from 0 to {MOST_WORKERS}.")
        corrupted = self.severity is None or self.corruptions is not None
        require(corrupted, "A severity is that of corruptions.", "Name them: --corruptions all.")


def evaluate_student(
    subject: str | Path,
    data: str | Path | list[Path],
    *,
    against: str | Path | None = None,
    model: ModelOptions | None = None,
    budget: Budget | None = None,
    execution: Execution | str | None = None,
    options: EvaluationOptions | None = None,
    progress: Progress | None = None,
) -> ScoresResult | RobustnessResult:
    """Compare a student or bundle with its dense teacher over images.

    Args:
        subject: student or bundle folder.
        data: an image, a folder of images, or a list of images; to judge classes a folder with one folder of images
            per class.
        against: the teacher: a model (see `load_source`), or a bundle. None, for a student only: its own weights
            with dense attention everywhere.
        model: how the teacher is loaded, in the subject's size; `trust` is for the subject.
        budget: of a student. execution: of bundles: a backend, or all of it.
        options: by what it is judged.
        progress: see `Progress`; counts images.

    Returns:
        A result of kind "evaluation", with corruptions of kind "robustness".

    Raises:
        ConfigError: no teacher for a bundle, sizes differ, or nothing to compare; for accuracies: no gallery, a class
            without images, classes that differ, or no classifier.
        SparsifinerError: subject, teacher or images are unusable.

    Example:
        >>> result = evaluate_student("bundle", "images", against="dense")
        >>> 0.9 < result.statistics["features_cosine"].mean.value <= 1
        True
    """
    model, options = model or ModelOptions(), options or EvaluationOptions()
    Normalisation.parse(model.normalise)  # Before anything is loaded.
    require(model.img_size is None, "An evaluation takes images of the subject's size.", "Leave img_size out.")
    metric, names = options.metric, () if options.corruptions is None else parse_corruptions(options.corruptions)
    compared = TeacherComparison(
        Path(subject),
        against,
        model,
        budget or Budget(),
        execution_of(execution),
        "logits" if metric == "top1" else None,
    )
    with contextlib.ExitStack() as stack:
        models = open_both(compared, stack)
        framing = Framing(models[0].size, options.fit or models[0].fit, options.region)
        as_timm = metric == "top1" and options.fit is None and framing.is_centre
        feed = feed_of(models[0].timm_name if as_timm else None, framing)._replace(
            workers=options.workers,
            corruptions=names,
            severity=SEVERITY if options.severity is None else options.severity,
        )
        if metric in METRICS:
            return _judge_classes(compared, data, options, models, feed, progress)
        files = data if isinstance(data, list) else list_images(Path(data))
        files = files if options.queries is None else evenly(files, options.queries)
        task = (options.task or MAPS) if metric == "task" else None
        judge = judge_of(task, files, framing, options.map_name, options.masks, clean=not names)
        return _result(judge, models, feed, task or metric, progress)


def _judge_classes(
    compared: TeacherComparison,
    data: str | Path | list[Path],
    options: EvaluationOptions,
    models: tuple[Extractor, Extractor],
    feed: Feed,
    progress: Progress | None,
) -> ScoresResult | RobustnessResult:
    """Of labelled images; the metric linear also writes its probe, where it is asked for."""
    metric, head = options.metric, None if options.head is None else Path(options.head)
    if isinstance(data, list):
        raise ConfigError(f"{metric} needs a folder of labelled images.", "Give the folder.")
    queries = class_set(Path(data), classifier=models[0].labels if metric == "top1" else ()).first(options.queries)
    if head is not None:
        require_head(compared.subject, head, queries.classes)
    judge = ClassJudge(queries, metric, options.gallery, models, feed, progress)
    result = _result(judge, models, feed, metric, progress)
    if head is not None:
        student = load_student(compared.subject, budget=compared.budget, trust=compared.model.trust)
        write_head(student, judge.fits[0], queries.classes, head)
    return result


def _result(
    judge: Judge, models: tuple[Extractor, Extractor], feed: Feed, metric: str, progress: Progress | None
) -> ScoresResult | RobustnessResult:
    """Of images that are judged one by one."""
    judged, roles = answers(judge, *models, feed, progress), with_roles(*models)

    def method() -> EvaluationMethod:
        """Once all are judged."""
        return EvaluationMethod(
            metric=metric,
            truth=judge.truth,
            images=[path.name for path in judge.files],
            preprocessing=feed.text + ", then corrupted" * bool(feed.corruptions),
            runtime={role: model.runtime for role, model in zip(COMPARED, models, strict=True)},
            corruptions=feed.corruptions,
            severity=feed.severity if feed.corruptions else None,
            **judge.details(),
        )

    if feed.corruptions:
        worse = corrupted_scores(judge, judged)
        return RobustnessResult("robustness", roles, method(), worse, stability(worse))
    samples = clean_scores(judge, judged)
    return ScoresResult("evaluation", roles, method(), samples, score_statistics(samples))
