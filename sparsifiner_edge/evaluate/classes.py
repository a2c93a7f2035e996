"""Classification: nearest neighbours and linear probes on frozen features; subject and teacher predict the same
queries, and the difference comes with a paired interval. A classifier's own answer is judged in `top1.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.artifacts import kind_of, require_replaceable
from sparsifiner_edge.bounds import size_text
from sparsifiner_edge.errors import ConfigError, MissingExtraError
from sparsifiner_edge.evaluate.extract import Extractor, TeacherComparison, open_subject, open_teacher, with_roles
from sparsifiner_edge.evaluate.labelled import Labelled, labelled
from sparsifiner_edge.images import centre_text, evenly
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.runtime.session import Runtime
from sparsifiner_edge.sparse.student import Student, load_student, save_student
from sparsifiner_edge.sparse.student_file import checked_labels, read_config

NEIGHBOURS = 20
GALLERY = 5000
METRICS = ("knn", "linear", "top1")
BY_LABELS, BY_FOLDERS = "the classifier's labels", "folders, sorted"


class Accuracies(msgspec.Struct, frozen=True, kw_only=True):
    """In percent, and their difference with a paired 95 % bootstrap interval.

    Attributes:
        images_per_second: through both models, from files on; of top 1.
    """

    subject_percent: float
    teacher_percent: float
    difference_points: Estimate
    queries: int
    images_per_second: float | None = None


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """Of each query, whether the predicted class was right: 1 or 0."""

    subject_right: list[int]
    teacher_right: list[int]


class ClassMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was compared; runtime by role.

    Attributes:
        preprocessing: of the subject's images; of top 1 the teacher's are said apart. batch: images at once, by role.
        workers: processes that read images, of each process that ran the models.
    """

    metric: str
    queries: str
    gallery: str
    classes: list[str]
    classes_from: str
    preprocessing: str
    runtime: dict[str, Runtime]
    teacher_preprocessing: str | None = None
    batch: dict[str, int] | None = None
    workers: int | None = None
    processes: int | None = None


class ClassResult(Declared, frozen=True):
    """Of kind "evaluation"."""

    method: ClassMethod
    samples: Answered
    statistics: Accuracies


def evaluate_classes(
    compared: TeacherComparison,
    data: Path,
    metric: str,
    gallery: str | Path | None,
    queries: int | None,
    head: str | Path | None,
    progress: Progress | None,
) -> ClassResult:
    """Accuracy by neighbours or probes of a student or bundle beside its teacher's; see `evaluate_student`."""
    if head is not None:
        if metric != "linear" or kind_of(compared.subject) != "student":
            raise ConfigError("A head is written for a student's linear probe.", "Use --metric linear, and a student.")
        if read_config(compared.subject).host != "timm":
            raise ConfigError("A head is written for a model of timm alone.", "Leave --head out.")
        require_replaceable(Path(head), "student")
    with contextlib.ExitStack() as stack:
        subject = open_subject(compared, stack)
        query_set = labelled(data).first(queries)
        if head is not None:
            checked_labels(query_set.classes, data)  # Before minutes of work that could not be written.
        gallery_set = gallery_for(metric, gallery, query_set)
        teacher = open_teacher(compared, subject.size, stack)
        count = image_counter(progress, 2 * (len(query_set) + (len(gallery_set) if gallery_set else 0)))
        predictors = [predictor_of(x, metric, query_set, gallery_set, count) for x in (subject, teacher)]
        predicted, expected = (
            predictor.predict(predictor.rows(extractor, query_set, count))
            for predictor, extractor in zip(predictors, (subject, teacher), strict=True)
        )
    if head is not None:
        student = load_student(
            compared.subject,
            keep=compared.keep,
            token_keep=compared.token_keep,
            merge=compared.merge,
            trust=compared.trust,
        )
        write_head(student, predictors[0].fitted, query_set.classes, Path(head))
    method = ClassMethod(
        metric={"knn": f"{NEIGHBOURS} nearest by cosine", "linear": "logistic regression"}[metric],
        queries=f"{len(query_set)} of {query_set.name}",
        gallery=f"{len(gallery_set)} of {gallery_set.name}" if gallery_set else "none",
        classes=list(query_set.classes),
        classes_from=BY_LABELS if query_set.classes == subject.labels else BY_FOLDERS,
        preprocessing=f"{centre_text(subject.size)}, bicubic to {size_text(subject.size)} px",
        runtime={"subject": subject.runtime, "teacher": teacher.runtime},
    )
    right, teacher_right = predicted == query_set.labels, expected == query_set.labels
    answered = Answered(subject_right=right.astype(int).tolist(), teacher_right=teacher_right.astype(int).tolist())
    accuracies = accuracy_statistics(right, teacher_right)
    return ClassResult("evaluation", with_roles(subject, teacher), method, answered, accuracies)


def image_counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """What is called after each of `total` images."""
    done = itertools.count(1)

    def count() -> None:
        if progress:
            progress("images", next(done), total)

    return count


def gallery_for(metric: str, folder: str | Path | None, query_set: Labelled) -> Labelled | None:
    """Images to learn from, with the queries' classes; None for a classifier.

    Raises:
        ConfigError: there are none, or of some classes none.
    """
    if metric == "top1":
        if folder is not None:
            raise ConfigError("--metric top1 uses the classifier itself.", "Leave --gallery out, or use knn or linear.")
        return None
    if folder is None:
        raise ConfigError("Neighbours and probes require labelled images.", "Give some: --gallery DIR.")
    if len(query_set.classes) < 2:
        raise ConfigError(f"Only one class was found, {query_set.classes[0]!r}.", "Give images of several.")
    every = labelled(Path(folder), query_set.classes)
    found, first = np.unique(every.labels, return_index=True)
    missing = set(range(len(query_set.classes))).difference(found.tolist())
    if missing:
        raise ConfigError(
            f"The gallery has no image of {query_set.classes[min(missing)]!r}.", "Give some of every class."
        )
    taken = evenly(range(len(every)), GALLERY)
    passed_over = first[~np.isin(found, every.labels[taken])]  # classes of few images
    return every.at(sorted([*taken, *passed_over.tolist()]))


class Predictor(NamedTuple):
    """What predicts classes from a model's outputs.

    Attributes:
        output: the name of that which it takes. predict: rows of it [n,C] -> classes [n]. fitted: by scikit-learn.
    """

    output: str
    predict: Callable[[Array], Array]
    fitted: Any = None

    def rows(self, extractor: Extractor, images: Labelled, count: Callable[[], None]) -> Array:
        """The output that it takes, of every image."""
        return _outputs(extractor, images, self.output, count)


def predictor_of(
    extractor: Extractor, metric: str, query_set: Labelled, gallery_set: Labelled | None, count: Callable[[], None]
) -> Predictor:
    """The classifier itself, or what learns from the features of a gallery."""
    if gallery_set is None:
        return Predictor("logits", lambda logits: top_class(logits, query_set.classes))
    features = _outputs(extractor, gallery_set, "features", count)
    fitted = (fit_neighbours if metric == "knn" else fit_probe)(features, gallery_set.labels)
    return Predictor("features", fitted.predict, fitted)


def top_class(logits: Array, classes: tuple[str, ...]) -> Array:
    """Of logits [n,C] the greatest: [n].

    Raises:
        ConfigError: the classifier has other classes than so many.
    """
    if logits.shape[1] != len(classes):
        raise ConfigError(
            f"The classifier knows {logits.shape[1]} classes, the images have {len(classes)}.",
            "Give one folder per class, in the order of the classifier's labels.",
        )
    return np.asarray(logits.argmax(1))


def _outputs(extractor: Extractor, images: Labelled, name: str, count: Callable[[], None]) -> Array:
    rows = []
    for outputs in extractor.each(images.load(index, extractor.size) for index in range(len(images))):
        rows.append(required_output(extractor, outputs, name)[0])
        count()
    return np.stack(rows)


def required_output(extractor: Extractor, outputs: Mapping[str, Array], name: str) -> Array:
    """One of a model's outputs.

    Raises:
        ConfigError: it has none of that name.
    """
    if name not in outputs:
        raise ConfigError(f"{extractor.about.path} has no {name}.", "Choose another metric, or a classifier.")
    return outputs[name]


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error


def fit_neighbours(features: Array, labels: Array) -> Any:
    """The nearest of features [n,C] by cosine (scikit-learn)."""
    neighbours = _sklearn("neighbors").KNeighborsClassifier(min(NEIGHBOURS, len(features)), metric="cosine")
    return neighbours.fit(features, labels)


def fit_probe(features: Array, labels: Array) -> Any:
    """Logistic regression on standardised features [n,C] (scikit-learn)."""
    regression = _sklearn("linear_model").LogisticRegression(C=0.05, max_iter=300)
    probe = _sklearn("pipeline").make_pipeline(_sklearn("preprocessing").StandardScaler(), regression)
    with warnings.catch_warnings():
        # 300 steps decide the same.
        warnings.simplefilter("ignore", _sklearn("exceptions").ConvergenceWarning)
        return probe.fit(features, labels)


def accuracy_statistics(subject: Array, teacher: Array, images_per_second: float | None = None) -> Accuracies:
    """Of predictions for the same queries, each right or not."""
    difference = subject.astype(int) - teacher.astype(int)
    # Differences take three values: to draw queries again is to draw how often each comes.
    kinds = np.array([-1, 0, 1])
    shares = (difference[:, None] == kinds).mean(0)
    drawn = np.random.default_rng(0).multinomial(len(subject), shares, 2000) @ kinds
    low, high = (float(x) for x in np.quantile(100 * drawn / len(subject), [0.025, 0.975]))
    return Accuracies(
        subject_percent=100.0 * float(subject.mean()),
        teacher_percent=100.0 * float(teacher.mean()),
        difference_points=stats.estimate(100 * float(difference.mean()), low, high, "paired bootstrap over queries"),
        queries=len(subject),
        images_per_second=images_per_second,
    )


def write_head(student: Student, fitted: Any, classes: tuple[str, ...], output: Path) -> Path:
    """A student, changed in place, with a linear probe of its features as its classifier, as a student folder."""
    scaler, regression = (step for _, step in fitted.steps)
    student.model.reset_classifier(len(classes))
    weight = regression.coef_ / scaler.scale_
    bias = regression.intercept_ - weight @ scaler.mean_
    if len(classes) == 2:  # scikit-learn gives one row, for the second class against the first
        weight, bias = (np.concatenate([-x / 2, x / 2]) for x in (weight, bias))
    # DeiT's two heads are averaged, and so are the features that the probe was fitted on.
    layers = [getattr(student.model, name) for name in ("head", "head_dist") if hasattr(student.model, name)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
    return save_student(dataclasses.replace(student, labels=classes), output)
