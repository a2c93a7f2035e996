"""Cosine of class and patch features between a student or bundle and its dense teacher, image by image."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bounds import size_text
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.extract import Extractor, TeacherComparison, open_both, with_roles
from sparsifiner_edge.images import centre_text, load_image
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


def evaluate_cosine(compared: TeacherComparison, images: list[Path], progress: Progress | None) -> CosineResult:
    """Features and patches of a student or bundle beside its teacher's; see `evaluate_student`."""
    with contextlib.ExitStack() as stack:
        subject, teacher = open_both(compared, stack)
        samples = _compare(subject, teacher, images, progress)
    method = CosineMethod(
        metric="cosine similarity per image, student or bundle against dense teacher",
        images=[p.name for p in images],
        preprocessing=f"{centre_text(subject.size)}, bicubic to {size_text(subject.size)} px",
        runtime={"subject": subject.runtime, "teacher": teacher.runtime},
    )
    statistics = {
        name: Cosine(stats.small_sample_mean(values), min(values), len(values)) for name, values in samples.items()
    }
    return CosineResult("evaluation", with_roles(subject, teacher), method, samples, Cosines(**statistics))


def _compare(
    subject: Extractor, teacher: Extractor, images: list[Path], progress: Progress | None
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {}
    for number, path in enumerate(images):
        image = load_image(path, subject.size)[None]
        got, expected = subject.extract(image), teacher.extract(image)
        require_comparable(got, expected)
        values = {"features_cosine": cosine(got["features"], expected["features"])}
        if "tokens" in got and "tokens" in expected:
            values["patches_cosine"] = cosine(*patches_of(got, expected, (subject.prefix, teacher.prefix)))
        for name, value in values.items():
            samples.setdefault(name, []).append(float(value.mean()))
        if progress:
            progress("images", number + 1, len(images))
    return samples


def patches_of(
    got: Mapping[str, Array], expected: Mapping[str, Array], prefixes: tuple[int, int]
) -> tuple[Array, Array]:
    """Patch tokens of a subject and its teacher, side by side: of those that the subject kept."""
    patches = expected["tokens"][:, prefixes[1] :]
    if POSITIONS in got:
        patches = patches[:, got[POSITIONS][0]]
    return got["tokens"][:, prefixes[0] :], patches


def require_comparable(got: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Refuse a teacher that is no teacher of the subject."""
    for name, outputs in (("subject", got), ("teacher", expected)):
        if "features" not in outputs:
            raise ConfigError(f"The {name} gives {', '.join(outputs)}.", "Cosines need features: take another metric.")
    if POSITIONS in expected:
        raise ConfigError("The teacher prunes tokens.", "Compare with a model that keeps all of them.")
    for name in ("features", "tokens") if POSITIONS not in got else ("features",):
        if name in got and name in expected and got[name].shape != expected[name].shape:
            raise ConfigError(
                f"The subject's {name} have shape {list(got[name].shape)}, the teacher's {list(expected[name].shape)}.",
                "Give the model that the subject was made from.",
            )
