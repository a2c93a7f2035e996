"""`evaluate_student`: how near a student or bundle comes to its dense teacher, by one of several metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from sparsifiner_edge.bounds import MOST_WORKERS
from sparsifiner_edge.config import Keep
from sparsifiner_edge.corruptions import parse_corruptions
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.classes import METRICS, ClassJudge, require_head, write_head
from sparsifiner_edge.evaluate.extract import Extractor, TeacherComparison, open_both, with_roles
from sparsifiner_edge.evaluate.judges import COMPARED, Judge, answers, judge_of
from sparsifiner_edge.evaluate.reading import Feed, feed_of, labelled
from sparsifiner_edge.evaluate.scores import clean_scores, corrupted_scores, score_statistics, stability
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.images import Normalisation, Normalise, evenly, list_images
from sparsifiner_edge.judge import MAPS
from sparsifiner_edge.outcomes import EvaluationMethod, RobustnessResult, ScoresResult
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.sparse.student import load_student

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
) -> ScoresResult | RobustnessResult:
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
        task: for the metric "task": "maps" (None), or a user's metric: see `judge.OwnMetric`. map_name: of maps, the
            output that is one; None: the only one there is. masks: a folder of true masks, named as the images.
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
        Normalisation.parse(normalise), "logits" if metric == "top1" else None,
    )  # fmt: skip
    _require_sense(metric, task, map_name, masks, gallery, head, corruptions, severity, workers)
    names = () if corruptions is None else parse_corruptions(corruptions)
    with contextlib.ExitStack() as stack:
        models = open_both(compared, stack)
        size, timm_name = models[0].size, models[0].timm_name if metric == "top1" else None
        feed = feed_of(timm_name, size)._replace(
            workers=workers, corruptions=names, severity=SEVERITY if severity is None else severity
        )
        if metric not in METRICS:
            files = data if isinstance(data, list) else list_images(Path(data))
            files = files if queries is None else evenly(files, queries)
            named = (task or MAPS) if metric == "task" else None
            return _result(
                judge_of(named, files, size, map_name, masks, not names), models, feed, named or metric, progress
            )
        if isinstance(data, list):
            raise ConfigError(f"{metric} needs a folder of labelled images.", "Give the folder.")
        labelled_queries = labelled(Path(data), classifier=models[0].labels if metric == "top1" else ()).first(queries)
        if head is not None:
            require_head(compared.subject, Path(head), labelled_queries.classes)
        judge = ClassJudge(labelled_queries, metric, gallery, models, feed, progress)
        result = _result(judge, models, feed, metric, progress)
    if head is not None:
        student = load_student(compared.subject, None, keep, token_keep, merge, trust)
        write_head(student, judge.fits[0], labelled_queries.classes, Path(head))
    return result


def _result(
    judge: Judge, models: tuple[Extractor, Extractor], feed: Feed, metric: str, progress: Progress | None
) -> ScoresResult | RobustnessResult:
    """Of images that are judged one by one."""
    judged, roles = answers(judge, *models, feed, progress), with_roles(*models)

    def method() -> EvaluationMethod:
        """Once all are judged."""
        return EvaluationMethod(
            metric=metric, truth=judge.truth, images=[path.name for path in judge.files],
            preprocessing=feed.text + ", then corrupted" * bool(feed.corruptions),
            runtime={role: model.runtime for role, model in zip(COMPARED, models, strict=True)},
            corruptions=feed.corruptions, severity=feed.severity if feed.corruptions else None, **judge.said(),
        )  # fmt: skip

    if feed.corruptions:
        worse = corrupted_scores(judge, judged)
        return RobustnessResult("robustness", roles, method(), worse, stability(worse))
    samples = clean_scores(judge, judged)
    return ScoresResult("evaluation", roles, method(), samples, score_statistics(samples))


def _require_sense(
    metric: str, task: str | None, map_name: str | None, masks: str | Path | None, gallery: str | Path | None,
    head: str | Path | None, corruptions: str | None, severity: int | None, workers: int | None,
) -> None:  # fmt: skip
    """Refuse arguments that have no meaning beside each other."""
    if metric not in ("cosine", "task", *METRICS):
        raise ConfigError(f"metric is {metric!r}.", f"Choose one of: cosine, task, {', '.join(METRICS)}.")
    if metric != "task" and (task or map_name or masks):
        raise ConfigError("A task and masks require --metric task.", "Leave them out.")
    if task not in (None, MAPS) and (masks or map_name):
        raise ConfigError("Masks and the name of a map are for the task maps.", "Leave them out.")
    if gallery is not None and metric not in METRICS:
        raise ConfigError("Images to learn from require another metric.", f"Choose: {', '.join(METRICS)}.")
    if head is not None and (metric != "linear" or corruptions is not None):
        raise ConfigError("A head is written by the metric linear, on clean images.", "Use that, or leave --head out.")
    if workers is not None and not 0 <= workers <= MOST_WORKERS:
        raise ConfigError(f"workers is {workers}.", f"Give a whole number from 0 to {MOST_WORKERS}.")
    if severity is not None and corruptions is None:
        raise ConfigError("A severity is that of corruptions.", "Name them: --corruptions all.")
