"""What the page reads of results whose rooms lie beside it: the fields that it shows, as their rooms write them.

Of a profile and an estimate it reads the whole record.
"""

from __future__ import annotations

import msgspec

from sparsifiner_edge.execution import precision_text
from sparsifiner_edge.records import Known
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.runtime.session import Runtime


class EvaluationMethod(msgspec.Struct, frozen=True, kw_only=True):
    """Of any evaluation; runtime by role."""

    metric: str | None = None
    task: str | None = None
    output: str | None = None
    runtime: dict[str, Runtime]


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """Percent correct."""

    subject_percent: float
    teacher_percent: float
    difference_points: Estimate


class ClassEvaluation(Declared, frozen=True):
    """Of kind "evaluation", by classes."""

    method: EvaluationMethod
    statistics: Shares


class Score(msgspec.Struct, frozen=True):
    """Over images; least: of cosines."""

    mean: Estimate
    images: int
    least: float | None = None


class ScoreEvaluation(Declared, frozen=True):
    """Of kind "evaluation", by cosines or the model's own task."""

    method: EvaluationMethod
    statistics: dict[str, Score]


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """Of one score under one condition, shares of 1."""

    subject: float
    teacher: float
    subject_lost: Estimate
    teacher_lost: Estimate
    extra_lost: Estimate
    images: int


class LossMethod(msgspec.Struct, frozen=True, kw_only=True):
    """What scores are held against, and under which conditions."""

    truth: str
    corruptions: list[str]
    severities: list[int]


class LossTable(msgspec.Struct, frozen=True):
    """By score: means on clean images by role, and losses by condition, "all" of them together included."""

    clean: dict[str, dict[str, float]]
    stability: dict[str, dict[str, Loss]]


class Robustness(Declared, frozen=True):
    """Of kind "robustness"."""

    method: LossMethod
    statistics: LossTable


class FoundModel(msgspec.Struct, frozen=True, kw_only=True):
    """A plan in an engine, as a search found it."""

    merge: str
    keep: str
    backend: str
    stored: str
    computes: str
    fidelity: float
    ms: Estimate

    @property
    def engine(self) -> str:
        """For people."""
        computed = self.stored if self.computes == "auto" else precision_text(self.stored, self.computes)
        return f"{self.backend}, {computed}"


class FoundCheck(msgspec.Struct, frozen=True):
    """The answer on images that the search did not see."""

    fidelity: Estimate
    images: int


class FoundMethod(msgspec.Struct, frozen=True):
    """board: that milliseconds are estimated for; None: they were measured."""

    board: str | None = None


class FoundModels(msgspec.Struct, frozen=True, kw_only=True):
    """finalists: the answer first; dense: the dense model, by engine."""

    finalists: list[FoundModel]
    answer: Known[FoundModel]
    check: Known[FoundCheck]
    dense: list[FoundModel]


class SearchRecord(Declared, frozen=True):
    """Of kind "search"."""

    method: FoundMethod
    statistics: FoundModels
