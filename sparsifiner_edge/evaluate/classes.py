"""Classification: nearest neighbours and linear probes on frozen features, and top-1 of a classifier; subject and
teacher answer the same queries, and the difference comes with a paired interval.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.artifacts import kind_of, require_replaceable
from sparsifiner_edge.errors import ConfigError, MissingExtraError
from sparsifiner_edge.evaluate.extract import ONNXRUNTIME, Extractor, Runner, open_subject, open_teacher, with_roles
from sparsifiner_edge.evaluate.labelled import FASHION, Labelled, labelled
from sparsifiner_edge.images import evenly
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.runtime.session import Runtime
from sparsifiner_edge.sparse.student import Student, checked_labels, load_student, save_student

NEIGHBOURS = 20
GALLERY = 5000
METRICS = ("knn", "linear", "top1")


class Accuracies(msgspec.Struct, frozen=True, kw_only=True):
    """In percent, and their difference with a paired 95 % bootstrap interval."""

    subject_percent: float
    teacher_percent: float
    difference_points: Estimate
    queries: int


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an answer was right, 1 or 0, of each query."""

    subject_right: list[int]
    teacher_right: list[int]


class ClassMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was compared; runtime by role."""

    metric: str
    queries: str
    gallery: str
    classes: list[str]
    classes_from: str
    preprocessing: str
    runtime: dict[str, Runtime]


class ClassResult(Declared, frozen=True):
    """Of kind "evaluation"."""

    method: ClassMethod
    samples: Answered
    statistics: Accuracies


def evaluate_classes(
    subject: str | Path,
    data: str | Path,
    *,
    metric: str,
    gallery: str | Path | None = None,
    queries: int | None = None,
    against: str | Path | None = None,
    weights: str | Path | None = None,
    keep: float | None = None,
    token_keep: tuple[tuple[int, float], ...] | None = None,
    head: str | Path | None = None,
    runner: Runner = ONNXRUNTIME,
    progress: Progress | None = None,
) -> ClassResult:
    """Accuracy of a student or bundle beside its teacher's.

    Args:
        subject: student or bundle folder.
        data: queries: a folder with one folder per class, or "fashion-mnist" (its test images).
        metric: "knn": the class of most of the 20 nearest gallery features by cosine. "linear": logistic regression on
            the gallery's features. "top1": the classifier's own answer.
        gallery: for knn and linear: labelled images; with "fashion-mnist" its training images are the default.
            Of a larger gallery 5000 are taken, evenly, and an image of each class that has none among them.
        queries: at most so many images of `data`, evenly taken; None takes all.
        against, weights, keep, token_keep: see `evaluate_student`.
        runner: what runs bundles.
        head: for linear: student folder to write, the subject with the probe as its classifier.
        progress: see `Progress`; counts images.

    Returns:
        A result of kind "evaluation".

    Raises:
        ConfigError: no gallery, a class without images, classes that differ, no classifier.
        SparsifinerError: subject, teacher or images are unusable.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric is {metric!r}.", f"Choose one of: {', '.join(METRICS)}.")
    if metric == "top1" and gallery is not None:
        raise ConfigError("--metric top1 asks the classifier itself.", "Leave --gallery out, or use knn or linear.")
    if head is not None:
        _check_head(Path(subject), Path(head), metric)
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(open_subject(Path(subject), runner, keep, token_keep))
        asked = labelled(data, "test", classifier=ours.labels if metric == "top1" else ()).first(queries)
        if head is not None:
            checked_labels(asked.classes, data)  # Before minutes of work that could not be written.
        known = None if metric == "top1" else _gallery(data, gallery, asked)
        teacher = stack.enter_context(open_teacher(Path(subject), against, weights, ours.size, runner))
        sides = {"subject": ours, "teacher": teacher}
        total = len(sides) * (len(asked) + (len(known) if known is not None else 0))
        count = _Count(progress, total)
        found = {role: _answers(side, metric, asked, known, count) for role, side in sides.items()}
    right = {role: answers == asked.labels for role, (answers, _) in found.items()}
    if head is not None:
        student = load_student(subject, keep=keep, token_keep=token_keep)
        write_head(student, found["subject"][1], asked.classes, Path(head))
    named = "the data set" if str(data) == FASHION else "folders, sorted"
    method = ClassMethod(
        metric={"knn": f"{NEIGHBOURS} nearest by cosine", "linear": "logistic regression", "top1": "top 1"}[metric],
        queries=f"{len(asked)} of {asked.name}",
        gallery=f"{len(known)} of {known.name}" if known is not None else "none",
        classes=list(asked.classes),
        classes_from="the classifier's labels" if asked.classes == ours.labels else named,
        preprocessing=f"centre square, bicubic to {ours.size} px",
        runtime={"subject": ours.runtime, "teacher": teacher.runtime},
    )
    answered = Answered(**{f"{role}_right": values.astype(int).tolist() for role, values in right.items()})
    compared = accuracy_statistics(right["subject"], right["teacher"])
    return ClassResult("evaluation", with_roles(ours, teacher), method, answered, compared)


class _Count:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress:
            self.progress("images", self.done, self.total)


def _gallery(data: str | Path, gallery: str | Path | None, asked: Labelled) -> Labelled:
    if gallery is None:
        if str(data) != FASHION:
            raise ConfigError("Neighbours and probes need labelled images.", "Give some: --gallery DIR.")
        gallery = data
    every = labelled(gallery, "train", asked.classes)
    first = {label: place for place, label in reversed(list(enumerate(every.labels.tolist())))}
    missing = sorted(set(range(len(asked.classes))) - first.keys())
    if missing:
        raise ConfigError(f"The gallery has no image of {asked.classes[missing[0]]!r}.", "Give some of every class.")
    taken = evenly(range(len(every)), GALLERY)
    passed_over = first.keys() - set(every.labels[taken].tolist())  # classes of few images
    known = every.at(sorted([*taken, *(first[label] for label in passed_over)]))
    if len(asked.classes) < 2:
        raise ConfigError(f"Only one class was found, {asked.classes[0]!r}.", "Give images of several.")
    return known


def _answers(
    side: Extractor, metric: str, asked: Labelled, known: Labelled | None, count: Callable[[], None]
) -> tuple[Array, Any]:
    """Classes that one side gives, and what was fitted to give them."""
    if known is None:
        logits = _outputs(side, asked, "logits", count)
        if logits.shape[1] != len(asked.classes):
            raise ConfigError(
                f"The classifier knows {logits.shape[1]} classes, the images have {len(asked.classes)}.",
                "Give one folder per class, in the order of the classifier's labels.",
            )
        return np.asarray(logits.argmax(1)), None
    features, queries = (_outputs(side, images, "features", count) for images in (known, asked))
    fitted = fit_neighbours(features, known.labels) if metric == "knn" else fit_probe(features, known.labels)
    return np.asarray(fitted.predict(queries)), fitted


def _outputs(side: Extractor, images: Labelled, name: str, count: Callable[[], None]) -> Array:
    rows = []
    for index in range(len(images)):
        outputs = side.extract(images.load(index, side.size)[None])
        if name not in outputs:
            raise ConfigError(f"{side.about.path} has no {name}.", "Choose another metric, or a classifier.")
        rows.append(outputs[name][0])
        count()
    return np.stack(rows)


def fit_neighbours(features: Array, labels: Array) -> Any:
    """The nearest of features [n,C] by cosine (scikit-learn)."""
    try:
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error
    return KNeighborsClassifier(min(NEIGHBOURS, len(features)), metric="cosine").fit(features, labels)


def fit_probe(features: Array, labels: Array) -> Any:
    """Logistic regression on standardised features [n,C] (scikit-learn)."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 steps decide the same
        return make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=300)).fit(features, labels)


def accuracy_statistics(ours: Array, teacher: Array) -> Accuracies:
    """Of answers to the same queries, each right or not."""
    difference = ours.astype(int) - teacher.astype(int)
    # Differences take three values: to draw queries again is to draw how often each comes.
    kinds = np.array([-1, 0, 1])
    shares = (difference[:, None] == kinds).mean(0)
    drawn = np.random.default_rng(0).multinomial(len(ours), shares, 2000) @ kinds
    low, high = (float(x) for x in np.quantile(100 * drawn / len(ours), [0.025, 0.975]))
    paired = stats.estimate(100 * float(difference.mean()), low, high, "paired bootstrap over queries")
    return Accuracies(
        subject_percent=100.0 * float(ours.mean()),
        teacher_percent=100.0 * float(teacher.mean()),
        difference_points=paired,
        queries=len(ours),
    )


def _check_head(subject: Path, head: Path, metric: str) -> None:
    if metric != "linear" or kind_of(subject) != "student":
        raise ConfigError("A head is written for a student's linear probe.", "Use --metric linear, and a student.")
    require_replaceable(head, "student")


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
