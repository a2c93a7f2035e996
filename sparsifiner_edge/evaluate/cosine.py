"""Cosine of class and patch features between a student or bundle and its dense teacher, image by image."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import cast

import msgspec

from sparsifiner_edge.bounds import size_text
from sparsifiner_edge.evaluate.extract import TeacherComparison, open_both, with_roles
from sparsifiner_edge.evaluate.judges import FeatureJudge, clean_samples
from sparsifiner_edge.images import centre_text
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
        judge = FeatureJudge(images, subject.size)
        samples = cast(dict[str, list[float]], clean_samples(judge, subject, teacher, progress))
    method = CosineMethod(
        metric="cosine similarity per image, student or bundle against dense teacher",
        images=judge.images,
        preprocessing=f"{centre_text(subject.size)}, bicubic to {size_text(subject.size)} px",
        runtime={"subject": subject.runtime, "teacher": teacher.runtime},
    )
    statistics = {
        name: Cosine(stats.small_sample_mean(values), min(values), len(values)) for name, values in samples.items()
    }
    return CosineResult("evaluation", with_roles(subject, teacher), method, samples, Cosines(**statistics))
