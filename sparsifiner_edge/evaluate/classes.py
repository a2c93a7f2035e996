"""Evaluator of classes: a classifier, or nearest neighbours and linear probes on frozen features.

A linear probe may become a sparse model's classifier.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.artifacts import kind_of, require_replaceable
from sparsifiner_edge.errors import ConfigError, MissingExtraError
from sparsifiner_edge.evaluate.evaluators import COMPARED, EvaluatedImage, Evaluator
from sparsifiner_edge.evaluate.extract import Extractor
from sparsifiner_edge.evaluate.reading import Feed, Labelled, class_set, read_images
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.scoring import Outputs, Scores
from sparsifiner_edge.sparse.student import Student, save_student
from sparsifiner_edge.sparse.student_file import check_labels, read_config

NEIGHBOURS = 20
"""Number of nearest gallery features that vote on the class."""
METRICS = {"knn": f"{NEIGHBOURS} nearest by cosine", "linear": "logistic regression", "top1": "top 1"}
"""Metric that predicts classes -> its description in results."""


class ClassEvaluator(Evaluator):
    """Scores "accuracy" of classifiers, or of predictors that are fitted on clean images, one per model.

    Attributes:
        fits: Predictors of scikit-learn for the subject and the teacher; None for a classifier.

    Raises:
        ConfigError: The gallery has no images, or none of some class.
    """

    def __init__(
        self,
        queries: Labelled,
        metric: str,
        folder: str | Path | None,
        models: Sequence[Extractor],
        feed: Feed,
        progress: Progress | None,
    ) -> None:
        super().__init__(queries.files, feed.framing)
        self._queries, self._gallery = queries, gallery_of(metric, folder, queries)
        self.truth = f"classes, by {METRICS[metric]}"
        fit = fit_neighbours if metric == "knn" else fit_probe
        self.fits = [
            None
            if self._gallery is None
            else fit(_features(model, self._gallery, feed, progress), self._gallery.labels)
            for model in models
        ]

    def scores(self, image: EvaluatedImage) -> tuple[Scores, Scores]:
        """Return the scores of the subject and of the teacher."""
        subject, teacher = (
            Scores(accuracy=float(self._predict(f"The {role}", fit, answer.outputs) == self._label(image)))
            for role, fit, answer in zip(COMPARED, self.fits, (image.subject, image.teacher), strict=True)
        )
        return subject, teacher

    def details(self) -> dict[str, Any]:
        """Return what the method of a result says about this evaluator."""
        gallery = self._gallery
        gallery_text = None if gallery is None else f"{len(gallery)} of {gallery.name}"
        return {"gallery": gallery_text, "classes": list(self._queries.classes)}

    def _label(self, image: EvaluatedImage) -> int:
        return int(self._queries.labels[image.number])

    def _predict(self, model: str, fit: Any, outputs: Outputs) -> int:
        if fit is not None:
            return int(fit.predict(_require(outputs, "features", model))[0])
        logits, classes = _require(outputs, "logits", model)[0], self._queries.classes
        if len(logits) != len(classes):
            what = f"The classifier knows {len(logits)} classes, the images have {len(classes)}."
            raise ConfigError(what, "Give one folder per class, in the order of the classifier's labels.")
        return int(logits.argmax())


def gallery_of(metric: str, folder: str | Path | None, queries: Labelled) -> Labelled | None:
    """Return the images to fit on, with the queries' classes; None for a classifier.

    Raises:
        ConfigError: There are no images, or none of some class.
    """
    if metric == "top1":
        if folder is not None:
            raise ConfigError("--metric top1 uses the classifier itself.", "Leave --gallery out, or use knn or linear.")
        return None
    if importlib.util.find_spec("sklearn") is None:  # Check before reading images for hours.
        raise MissingExtraError("scikit-learn", "train")
    if folder is None:
        raise ConfigError(
            "The metrics knn and linear require labelled images.", "Give a folder of them: --gallery DIR."
        )
    if len(queries.classes) < 2:
        raise ConfigError(f"Only one class was found, {queries.classes[0]!r}.", "Give images of several classes.")
    gallery = class_set(Path(folder), queries.classes)
    if missing := set(range(len(queries.classes))).difference(gallery.labels.tolist()):
        raise ConfigError(
            f"The gallery has no image of {queries.classes[min(missing)]!r}.", "Give images of every class."
        )
    return gallery


def _features(model: Extractor, gallery: Labelled, feed: Feed, progress: Progress | None) -> Array:
    """Return the features of clean images [n,C]."""
    rows = list[Array]()
    for _, pixels in read_images(gallery.files, feed._replace(corruptions=()), model.together):
        rows += [_require(x, "features", str(model.about.path))[0] for x in model.each(pixels)]
        if progress:
            progress("gallery", len(rows), len(gallery))
    return np.stack(rows)


def _require(outputs: Outputs, name: str, model: str) -> Array:
    """Return one of a model's outputs.

    Raises:
        ConfigError: The model has no output of this name.
    """
    if name not in outputs:
        raise ConfigError(f"{model} has no {name}.", "Choose another metric, or a classifier.")
    return outputs[name]


def fit_neighbours(features: Array, labels: Array) -> Any:
    """Fit a nearest-neighbour classifier on features [n,C] by cosine (scikit-learn)."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(min(NEIGHBOURS, len(features)), metric="cosine").fit(features, labels)


def fit_probe(features: Array, labels: Array) -> Any:
    """Fit logistic regression on standardised features [n,C] (scikit-learn)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 steps give the same classes.
        return make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=300)).fit(features, labels)


def require_head(subject: Path, head: Path, classes: tuple[str, ...]) -> None:
    """Refuse early, before minutes of work, a model that cannot take a linear probe as its classifier.

    Raises:
        ConfigError: The subject is no timm model, or cannot take these classes.
        ArtifactError: The output folder must not be replaced.
    """
    if kind_of(subject) != "student" or read_config(subject).host != "timm":
        raise ConfigError("A head requires a sparse model that was made from a timm model.", "Leave --head out.")
    require_replaceable(head, "student")
    check_labels(classes, subject)


def write_head(student: Student, fitted: Any, classes: tuple[str, ...], output: Path) -> Path:
    """Write a sparse model, changed in place, with a linear probe of its features as its classifier."""
    scaler, regression = (step for _, step in fitted.steps)
    student.model.reset_classifier(len(classes))
    weight = regression.coef_ / scaler.scale_
    bias = regression.intercept_ - weight @ scaler.mean_
    if len(classes) == 2:  # scikit-learn gives one row: the second class against the first
        weight, bias = (np.concatenate([-x / 2, x / 2]) for x in (weight, bias))
    # DeiT's two heads are averaged, and so are the features that the probe was fitted on.
    layers = [getattr(student.model, name) for name in ("head", "head_dist") if hasattr(student.model, name)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
    return save_student(dataclasses.replace(student, labels=classes), output)
