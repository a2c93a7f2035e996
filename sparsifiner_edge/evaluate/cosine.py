"""Cosine of class and patch features between a student or bundle and its dense teacher, image by image."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.extract import (
    ONNXRUNTIME,
    Extractor,
    Runner,
    open_subject,
    open_teacher,
    with_roles,
)
from sparsifiner_edge.images import load_image
from sparsifiner_edge.metrics import POSITIONS, cosine
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.runtime.session import Runtime


class Cosine(msgspec.Struct, frozen=True):
    """Over images: the mean with Student's t interval, and the least."""

    mean: Estimate
    least: float
    images: int = msgspec.field(name="pictures")


class Cosines(msgspec.Struct, frozen=True, kw_only=True):
    """Of the class or pooled feature; and the mean over patch tokens, of those that are left where some are pruned."""

    features_cosine: Cosine
    patches_cosine: Cosine | None = None


class CosineMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was compared; runtime by role."""

    metric: str
    images: list[str] = msgspec.field(name="pictures")
    preprocessing: str
    runtime: dict[str, Runtime]


class CosineResult(Declared, frozen=True):
    """Of kind "evaluation"; samples: one value per image, by name."""

    method: CosineMethod
    samples: dict[str, list[float]]
    statistics: Cosines


def evaluate_cosine(
    subject: Path,
    images: list[Path],
    *,
    against: str | Path | None = None,
    weights: str | Path | None = None,
    keep: float | None = None,
    token_keep: tuple[tuple[int, float], ...] | None = None,
    runner: Runner = ONNXRUNTIME,
    progress: Progress | None = None,
) -> CosineResult:
    """Features and patches of a student or bundle beside its teacher's; see `evaluate_student`."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(open_subject(subject, runner, keep, token_keep))
        teacher = stack.enter_context(open_teacher(subject, against, weights, ours.size, runner))
        if teacher.size != ours.size:
            raise ConfigError(f"The subject takes {ours.size} px, the teacher {teacher.size} px.", "Use one size.")
        samples = _compare(ours, teacher, images, progress)
    method = CosineMethod(
        metric="cosine similarity per image, student or bundle against dense teacher",
        images=[p.name for p in images],
        preprocessing=f"centre square, bicubic to {ours.size} px",
        runtime={"subject": ours.runtime, "teacher": teacher.runtime},
    )
    statistics = Cosines(**{name: _summary(values) for name, values in samples.items()})
    return CosineResult("evaluation", with_roles(ours, teacher), method, samples, statistics)


def _compare(
    ours: Extractor, teacher: Extractor, images: list[Path], progress: Progress | None
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {}
    for number, path in enumerate(images):
        image = load_image(path, ours.size)[np.newaxis]
        got, expected = ours.extract(image), teacher.extract(image)
        _require_comparable(got, expected)
        values = {"features_cosine": float(cosine(got["features"], expected["features"]).mean())}
        if "tokens" in got and "tokens" in expected:
            wanted = _at(expected["tokens"][:, teacher.prefix :], got.get(POSITIONS))
            patches = cosine(got["tokens"][:, ours.prefix :], wanted)
            values["patches_cosine"] = float(patches.mean())
        for name, value in values.items():
            samples.setdefault(name, []).append(value)
        if progress:
            progress("images", number + 1, len(images))
    return samples


def _require_comparable(got: dict[str, Array], expected: dict[str, Array]) -> None:
    """Refuse a teacher that is no teacher of the subject."""
    for name, outputs in (("subject", got), ("teacher", expected)):
        if "features" not in outputs:
            raise ConfigError(f"The {name} gives {', '.join(outputs)}.", "Cosines need features: take another metric.")
    shapes = [
        {"features": x["features"].shape, "tokens": x.get("tokens", np.empty((0,))).shape} for x in (got, expected)
    ]
    pruned = POSITIONS in got
    if POSITIONS in expected:
        raise ConfigError("The teacher prunes tokens.", "Compare with a model that keeps all of them.")
    both = "tokens" in got and "tokens" in expected
    for name in ("features", "tokens") if both and not pruned else ("features",):
        if shapes[0][name] != shapes[1][name]:
            raise ConfigError(
                f"The subject's {name} have shape {list(shapes[0][name])}, the teacher's {list(shapes[1][name])}.",
                "Give the model that the subject was made from.",
            )


def _at(patches: Array, positions: Array | None) -> Array:
    """Patches [1,P,C] at raster places [1,P'], all where None."""
    return patches if positions is None else patches[:, positions[0]]


def _summary(values: list[float]) -> Cosine:
    return Cosine(stats.small_sample_mean(values), min(values), len(values))
