"""Result of a search: every plan with its predictions and measurements, and the deployments."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from sparsifiner_edge.execution import ON_PROCESSOR, Execution, precision_text
from sparsifiner_edge.records import Known
from sparsifiner_edge.results import Quantity, Result


class Deployment(NamedTuple):
    """Deployment of a model: a CPU backend, or a board by name.

    Attributes:
        precision: Weight precision of the file.
        compute_precision: Arithmetic of everything that is not int8 (`execution.COMPUTE_PRECISIONS`).
    """

    backend: str
    precision: str
    compute_precision: str = "auto"

    @property
    def is_here(self) -> bool:
        """True for a backend of this machine; False for a board, whose latency is estimated."""
        return self.backend in ON_PROCESSOR

    @property
    def execution(self) -> Execution:
        """Execution in which the fidelity of its bundles is measured."""
        return (
            Execution(backend=self.backend, compute_precision=self.compute_precision) if self.is_here else Execution()
        )

    @property
    def dense_host(self) -> Deployment:
        """Deployment of the dense model. In ONNX Runtime, only the custom operators have bfloat16."""
        return self._replace(compute_precision="auto") if self.backend == "onnxruntime" else self

    def __str__(self) -> str:
        precision = (
            self.precision
            if self.compute_precision == "auto"
            else precision_text(self.precision, self.compute_precision)
        )
        return f"{self.backend}, {precision}"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that the search evaluated.

    Attributes:
        merge: As `export --merge` takes it.
        keep: As `export --keep` takes it.
        fidelity: Mean over the selection images, in float32.
        predicted_ms: Predicted latency by deployment.
        pareto_optimal: True if no other plan is at least as good in fidelity and in every deployment's time, and better
            in one.
    """

    merge: str
    keep: str
    fidelity: float
    predicted_ms: dict[str, float]
    pareto_optimal: bool


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that was exported, in one deployment; or the dense model.

    Attributes:
        backend: See `Deployment`.
        precision: See `Deployment`.
        compute_precision: See `Deployment`.
        fidelity: Fidelity of the bundle, mean over the selection images; for the dense model over the held-out images.
        check_fidelity: Mean over the held-out images.
        predicted_fidelity: Prediction of a model that was fitted to all other plans; 1 for the dense model.
        ms: Median latency of the whole model; for a board an estimate, as `ms.interval` states.
        predicted_ms: Prediction from parts, corrected by the dense model's time; for the dense model its own time.
        file_bytes: Size of model.onnx.
    """

    merge: str
    keep: str
    backend: str
    precision: str
    compute_precision: str
    fidelity: float
    check_fidelity: float
    predicted_fidelity: float
    predicted_ms: float
    ms: Quantity
    file_bytes: int

    @property
    def deployment(self) -> Deployment:
        """Deployment that runs it."""
        return Deployment(self.backend, self.precision, self.compute_precision)


class SearchMethod(msgspec.Struct, frozen=True, kw_only=True):
    """Method of a search.

    Attributes:
        board: Name of the board; None for this machine.
        images: Names of the images by use.
        minutes: Time limit.
        seconds: Time that the search took.
    """

    metric: str
    at_least: float | None = None
    at_most_ms: float | None = None
    board: str | None = None
    images: dict[str, list[str]]
    minutes: float
    seconds: float


class ParetoFront(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of the search.

    Attributes:
        points: Plans in the order of fidelity.
        finalists: Measured candidates, the answer first if there is one.
        answer: Candidate that keeps the bound.
        check: Fidelity of the answer on images that were used neither for search nor for calibration.
        dense: The dense model in the deployments of the finalists and in others that were tried, the fastest first.
        left_out: Backends that do not run here and deployments whose precision drops too much, with the reason.
        remarks: Remarks on the images and on bounds that were not reached.
    """

    points: list[Point]
    finalists: list[Candidate]
    answer: Known[Candidate]
    check: Known[Quantity]
    dense: list[Candidate]
    left_out: dict[str, str]
    remarks: list[str]


class SearchResult(Result, frozen=True):
    """Result of kind "search"; samples hold the fidelity of each image by plan ("merge | keep"), and "check"."""

    method: SearchMethod
    samples: dict[str, list[float]]
    statistics: ParetoFront
