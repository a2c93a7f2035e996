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
    """A plan that the search measured in one deployment.

    Attributes:
        merge: As `export --merge` takes it.
        keep: As `export --keep` takes it.
        deployment: The deployment.
        fidelity: Mean over the selection images, scaled so that the answer's is its mean over all images.
        ms: Median latency of the whole model; for a board an estimate.
        pareto_optimal: True if no other plan in this deployment is faster and at least as good.
    """

    merge: str
    keep: str
    deployment: str
    fidelity: float
    ms: float
    pareto_optimal: bool


class Interim(NamedTuple):
    """The best model of a search so far, measured briefly.

    Attributes:
        merge: Merges by layer, as text.
        keep: Shares of keys by layer, as text.
        deployment: Where it runs.
        fidelity: Fidelity on the held-out images.
        ms: Its milliseconds.
        dense: Deployment of the dense model.
        dense_ms: Milliseconds of the dense model.
    """

    merge: str
    keep: str
    deployment: Deployment
    fidelity: float
    ms: float
    dense: Deployment
    dense_ms: float


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that was exported, in one deployment; or the dense model.

    Attributes:
        backend: See `Deployment`.
        precision: See `Deployment`.
        compute_precision: See `Deployment`.
        fidelity: Mean over all images, held-out ones included; for the dense model and levers over the held-out images.
        held_out_fidelity: Mean over the held-out images.
        ms: Median latency of the whole model; for a board an estimate, as `ms.interval` states.
        file_bytes: Size of model.onnx.
    """

    merge: str
    keep: str
    backend: str
    precision: str
    compute_precision: str
    fidelity: float
    held_out_fidelity: float
    ms: Quantity
    file_bytes: int

    @property
    def deployment(self) -> Deployment:
        """Deployment that runs it."""
        return Deployment(self.backend, self.precision, self.compute_precision)


class Lever(msgspec.Struct, frozen=True, kw_only=True):
    """A step from the dense model to the answer.

    Attributes:
        change: What was added to the step before.
        candidate: The model with this and all earlier changes.
    """

    change: str
    candidate: Candidate


class SearchMethod(msgspec.Struct, frozen=True, kw_only=True):
    """Method of a search.

    Attributes:
        board: Name of the board; None for this machine.
        images: Names of the images by use: "search", of which "selection" compares plans, and "held_out".
        minutes: Time limit.
        seconds: Time that the search took.
        settled: True if the search ended because no change helped any more.
    """

    metric: str
    at_least: float | None = None
    at_most_ms: float | None = None
    board: str | None = None
    images: dict[str, list[str]]
    minutes: float
    seconds: float
    settled: bool


class ParetoFront(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of the search.

    Attributes:
        points: Plans in the order of fidelity.
        finalists: Exported candidates that were measured at the end, the answer first if there is one.
        answer: Candidate that keeps the bound.
        check: Fidelity of the answer on the held-out images, which were not used for calibration. They only decide how
            much the answer merges.
        dense: The dense model in the deployments that were tried, the fastest first.
        levers: What each change contributes, from the dense model to the answer; empty if there was no time.
        unverified: Reasons why the answer must not be relied on, such as too few held-out images.
        left_out: Backends that do not run here and deployments whose precision drops too much, with the reason.
        remarks: Remarks on the images and on bounds that were not reached.
    """

    points: list[Point]
    finalists: list[Candidate]
    answer: Known[Candidate]
    check: Known[Quantity]
    dense: list[Candidate]
    levers: list[Lever]
    unverified: list[str]
    left_out: dict[str, str]
    remarks: list[str]

    @property
    def speed_up(self) -> float | None:
        """Times that the answer is as fast as the dense model in its fastest deployment; None if that was not timed."""
        if not self.dense:
            return None
        return min(one.ms.value for one in self.dense) / self.finalists[0].ms.value


class SearchResult(Result, frozen=True):
    """Result of kind "search"; samples hold the fidelity of each held-out image by deployment of the finalists."""

    method: SearchMethod
    samples: dict[str, list[float]]
    statistics: ParetoFront
