"""`evaluate_student`: compare a sparse model or bundle with the dense model by one of several metrics."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from sparsifiner_edge.bounds import MOST_WORKERS
from sparsifiner_edge.config import Budget, require
from sparsifiner_edge.corruptions import parse_corruptions
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.classes import METRICS, ClassEvaluator, require_head, write_head
from sparsifiner_edge.evaluate.evaluators import COMPARED, Evaluator, answers, evaluator_of
from sparsifiner_edge.evaluate.extract import Extractor, TeacherComparison, open_both, with_roles
from sparsifiner_edge.evaluate.reading import Feed, class_set, feed_of
from sparsifiner_edge.evaluate.scores import clean_scores, corrupted_scores, score_statistics, stability
from sparsifiner_edge.execution import Execution, execution_of
from sparsifiner_edge.fitting import Box, Fit, Framing
from sparsifiner_edge.images import Normalisation, evenly, list_images
from sparsifiner_edge.outcomes import EvaluationMethod, RobustnessResult, ScoresResult
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.scoring import MAPS
from sparsifiner_edge.sparse.model_options import ModelOptions
from sparsifiner_edge.sparse.student import load_student

SEVERITY = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of an evaluation.

    Attributes:
        metric: "cosine"; "knn": accuracy of a vote of the 20 nearest gallery features by cosine; "linear": accuracy of
            logistic regression on the gallery's features; "top1": accuracy of the classifier, on images prepared as
            timm validates the model; "task": the metric of `task`.
        gallery: Folder of labelled images, for knn and linear.
        queries: Use at most this many images, evenly spaced; None takes all.
        head: For linear: folder to write the subject to, with the probe as its classifier.
        task: For the metric "task": "maps" (None) or a user's metric; see `scoring.UserMetric`.
        map_name: Output that holds the map; None takes the only one.
        masks: Folder of true masks, named as the images.
        corruptions: Also evaluate on corrupted images: "all", or comma-separated names of `corruptions.COMMON`.
        severity: Severity of the corruptions, 1 to 5; None takes the middle one.
        workers: Number of processes that read images; see `read_images`.
        fit: How images are brought to the model's size; see `fitting.Framing`. None takes the bundle's setting, else
            "crop", or for top1 what timm does.
        region: Part of each image that is read; see `fitting.Framing`.

    Raises:
        ConfigError: A value is invalid, or values do not go together.

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
        Framing(1, self.fit or "crop", self.region)  # Raises if either is invalid.
        metric_ok = metric in ("cosine", "task", *METRICS)
        require(metric_ok, f"metric is {metric!r}.", f"Choose one of: cosine, task, {choices}.")
        task_ok = metric == "task" or not (self.task or self.map_name or self.masks)
        require(task_ok, "A task and masks require --metric task.", "Leave them out.")
        maps_ok = self.task in (None, MAPS) or not (self.masks or self.map_name)
        require(maps_ok, "Masks and the name of a map require the task maps.", "Leave them out.")
        gallery_ok = self.gallery is None or metric in METRICS
        require(gallery_ok, "A gallery requires a metric that learns from images.", f"Choose: {choices}.")
        head_ok = self.head is None or (metric == "linear" and self.corruptions is None)
        fix = "Use --metric linear without --corruptions, or leave --head out."
        require(head_ok, "A head requires the metric linear and clean images.", fix)
        workers_ok = self.workers is None or 0 <= self.workers <= MOST_WORKERS
        require(workers_ok, f"workers is {self.workers}.", f"Give a whole number from 0 to {MOST_WORKERS}.")
        severity_ok = self.severity is None or self.corruptions is not None
        require(severity_ok, "A severity requires corruptions.", "Name them: --corruptions all.")


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
    """Compare a sparse model or bundle with the dense model over images.

    Args:
        subject: Folder of a sparse model or bundle.
        data: An image, a folder of images, or a list of images; for accuracies a folder with one subfolder per class.
        against: Dense model (see `load_source`) or bundle. None, for a sparse model only: its own weights with dense
            attention.
        model: How the dense model is loaded, in the subject's size; `trust` is for the subject.
        budget: Settings that replace those of a sparse model.
        execution: How bundles run: a backend, or an `Execution`.
        options: How the model is evaluated.
        progress: Progress callback; counts images.

    Returns:
        A result of kind "evaluation", or with corruptions of kind "robustness".

    Raises:
        ConfigError: There is no dense model for a bundle, sizes differ, or there is nothing to compare; for accuracies:
            no gallery, a class without images, classes that differ, or no classifier.
        SparsifinerError: The subject, the dense model or the images are unusable.

    Example:
        >>> result = evaluate_student("bundle", "images", against="dense")
        >>> 0.9 < result.statistics["features_cosine"].mean.value <= 1
        True
    """
    model, options = model or ModelOptions(), options or EvaluationOptions()
    Normalisation.parse(model.normalise)  # Check before loading anything.
    require(model.img_size is None, "An evaluation uses the image size of the evaluated model.", "Leave img_size out.")
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
            return _evaluate_classes(compared, data, options, models, feed, progress)
        files = data if isinstance(data, list) else list_images(Path(data))
        files = files if options.queries is None else evenly(files, options.queries)
        task = (options.task or MAPS) if metric == "task" else None
        evaluator = evaluator_of(task, files, framing, options.map_name, options.masks, clean=not names)
        return _result(evaluator, models, feed, task or metric, progress)


def _evaluate_classes(
    compared: TeacherComparison,
    data: str | Path | list[Path],
    options: EvaluationOptions,
    models: tuple[Extractor, Extractor],
    feed: Feed,
    progress: Progress | None,
) -> ScoresResult | RobustnessResult:
    """Evaluate labelled images; the metric linear also writes its probe if `head` is set."""
    metric, head = options.metric, None if options.head is None else Path(options.head)
    if isinstance(data, list):
        raise ConfigError(f"{metric} needs a folder of labelled images.", "Give the folder.")
    queries = class_set(Path(data), classifier=models[0].labels if metric == "top1" else ()).first(options.queries)
    if head is not None:
        require_head(compared.subject, head, queries.classes)
    evaluator = ClassEvaluator(queries, metric, options.gallery, models, feed, progress)
    result = _result(evaluator, models, feed, metric, progress)
    if head is not None:
        student = load_student(compared.subject, budget=compared.budget, trust=compared.model.trust)
        write_head(student, evaluator.fits[0], queries.classes, head)
    return result


def _result(
    evaluator: Evaluator, models: tuple[Extractor, Extractor], feed: Feed, metric: str, progress: Progress | None
) -> ScoresResult | RobustnessResult:
    """Evaluate images one by one."""
    judged, roles = answers(evaluator, *models, feed, progress), with_roles(*models)

    def method() -> EvaluationMethod:
        """Describe the method, after all images were evaluated."""
        return EvaluationMethod(
            metric=metric,
            truth=evaluator.truth,
            images=[path.name for path in evaluator.files],
            preprocessing=feed.text + ", then corrupted" * bool(feed.corruptions),
            runtime={role: model.runtime for role, model in zip(COMPARED, models, strict=True)},
            corruptions=feed.corruptions,
            severity=feed.severity if feed.corruptions else None,
            **evaluator.details(),
        )

    if feed.corruptions:
        worse = corrupted_scores(evaluator, judged)
        return RobustnessResult("robustness", roles, method(), worse, stability(worse))
    samples = clean_scores(evaluator, judged)
    return ScoresResult("evaluation", roles, method(), samples, score_statistics(samples))
