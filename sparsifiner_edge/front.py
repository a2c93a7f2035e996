"""What a search found: every plan with what was predicted and measured, as a result file, and what ran it."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from sparsifiner_edge.execution import ON_PROCESSOR, Execution, precision_text
from sparsifiner_edge.records import Known
from sparsifiner_edge.results import Quantity, Result


class Deployment(NamedTuple):
    """What runs a model: a backend of the processor, or a board by name.

    Attributes:
        stored: precision of the file. computes: what of it is not int8 is computed in (`execution.PRECISIONS`).
    """

    backend: str
    stored: str
    computes: str = "auto"

    @property
    def is_here(self) -> bool:
        """Whether it is a backend of this machine; else a board, whose latency is estimated."""
        return self.backend in ON_PROCESSOR

    @property
    def execution(self) -> Execution:
        """What its bundles' fidelity is measured in."""
        return Execution(backend=self.backend, precision=self.computes) if self.is_here else Execution()

    @property
    def dense_host(self) -> Deployment:
        """What runs the dense model: in ONNX Runtime bfloat16 is for operators of ours alone."""
        return self._replace(computes="auto") if self.backend == "onnxruntime" else self

    def __str__(self) -> str:
        precision = self.stored if self.computes == "auto" else precision_text(self.stored, self.computes)
        return f"{self.backend}, {precision}"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that was looked at.

    Attributes:
        merge, keep: as `export --merge --keep` take them.
        fidelity: mean over the images that were searched with, in float32.
        predicted_ms: by engine. on_front: no other plan is at least as good in fidelity and
            in every engine's time, and better in one.
    """

    merge: str
    keep: str
    fidelity: float
    predicted_ms: dict[str, float]
    on_front: bool


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A plan as it was exported, in one engine; or the dense model.

    Attributes:
        backend, stored, computes: see `Deployment`.
        fidelity: of the bundle, mean over the images searched with; of the dense model over those kept back.
        check_fidelity: over those kept back.
        predicted_fidelity: by a model that was fitted to all plans but this one; of the dense model, 1.
        ms: median of the whole model, or for a board that is not here an estimate of it, as `ms.interval` says.
        predicted_ms: from parts, corrected by the dense model's time beside it; of that its own.
        file_bytes: of model.onnx.
    """

    merge: str
    keep: str
    backend: str
    stored: str
    computes: str
    fidelity: float
    check_fidelity: float
    predicted_fidelity: float
    predicted_ms: float
    ms: Quantity
    file_bytes: int

    @property
    def engine(self) -> Deployment:
        """What runs it."""
        return Deployment(self.backend, self.stored, self.computes)


class SearchMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was searched.

    Attributes:
        board: None: this machine. images: names by use. minutes: that it might take, and seconds: that it took.
    """

    metric: str
    at_least: float | None = None
    at_most_ms: float | None = None
    board: str | None = None
    images: dict[str, list[str]]
    minutes: float
    seconds: float


class Front(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        points: in the order of fidelity. finalists: the answer first, if there is one.
        check: fidelity of the answer on images that nothing was searched or calibrated with.
        dense: the dense model in what runs finalists, and in others that were tried; the fastest first.
        left_out: backends that do not run here, engines whose precision lost too much, and why.
        remarks: on the images, and on what was not reached.
    """

    points: list[Point]
    finalists: list[Candidate]
    answer: Known[Candidate]
    check: Known[Quantity]
    dense: list[Candidate]
    left_out: dict[str, str]
    remarks: list[str]


class SearchResult(Result, frozen=True):
    """Of kind "search"; samples: per plan, "merge | keep", the fidelity of each image it was judged by; and "check"."""

    method: SearchMethod
    samples: dict[str, list[float]]
    statistics: Front
