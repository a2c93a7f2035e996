"""Measurements of a search: complete models on this machine, or estimates of plans for a board."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.export.export import model_shape
from sparsifiner_edge.optimizer.clock import Clock
from sparsifiner_edge.optimizer.family import sparse_layers
from sparsifiner_edge.optimizer.models import Models, Stopwatch, takes_kernels
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.pareto import Deployment
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles import roofline
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.profiles.estimate import estimate_bundle
from sparsifiner_edge.profiles.roofline import CPU_FIT, GRAPH_FIT, Workload
from sparsifiner_edge.results import Quantity
from sparsifiner_edge.runtime.open import checked_bundle, session_on

TIMING_DENSE = "timing the dense model"
"""Kind of the step that times the dense model, for the clock."""
EVALUATING_ALL = "evaluating all"
"""Kind of the step that evaluates a plan on all images."""
CLOSING_TIMED = 7
"""Number of complete models that are timed at the end."""
CLOSING_SHARE = 0.2
"""Maximum share of the whole time for that."""


class Subject:
    """Measures plans of one model.

    Args:
        trial: The images, with the dense model's answers.
        models: Files of plans.
        stopwatch: Times complete models.
        clock: Time budget.
        board: Board whose times are estimated; None measures here.
        calibrating: Number of images, the first ones, that calibrate int8 or the predictors; they are never held out.

    Attributes:
        calibrating: See above.
        answer_ms: By deployment of this machine, the median milliseconds of an answer while a plan was last evaluated.
    """

    def __init__(
        self, trial: Trial, models: Models, stopwatch: Stopwatch, clock: Clock, board: Board | None, calibrating: int
    ) -> None:
        self._trial, self._models, self._stopwatch, self._clock = trial, models, stopwatch, clock
        self._board, self.calibrating = board, calibrating
        self.student, self.patches, self.least = models.student, models.student.backbone.patches, trial.least
        self.sparse_layers, self.answer_ms = sparse_layers(models.student), dict[Deployment, float]()

    @property
    def paths(self) -> list[Path]:
        """The images, in the order of `errors`."""
        return self._trial.paths

    def arrange(self, places: Sequence[int]) -> None:
        """Reorder the images; `places` gives the old place of each."""
        self._trial.arrange(places)

    def errors(self, plan: LayerPlan, deployment: Deployment, places: Sequence[int]) -> list[float]:
        """Return the errors of a plan on the images at some places, in a deployment; for a board in float32.

        Raises:
            GateError: The precision adds too much error.
            BackendError: The deployment does not take the model.
        """
        if self._board is not None:
            with self._clock.step(self._kind(places), "evaluating a plan"):
                return self._trial.errors(plan, places)
        return self.errors_of(self._models.trial(plan, deployment.precision), deployment, places)

    def ms(self, plan: LayerPlan, deployment: Deployment) -> float:
        """Return the milliseconds of a plan in a deployment.

        Raises:
            GateError: See `errors`.
            BackendError: See `errors`; or a process died or hung.
        """
        if self._board is not None:
            return self._estimate(plan, deployment.precision)
        return self._stopwatch.ms(self._models.trial(plan, deployment.precision), deployment)

    def all_errors(self, plan: LayerPlan, deployment: Deployment) -> list[float]:
        """Return the errors of a plan's file on all images, also for a board.

        Raises:
            GateError: See `errors`.
            BackendError: See `errors`.
        """
        places = range(len(self.paths))
        if self._board is not None:
            return self.errors_of(self._models.export(plan, deployment.precision), deployment, places)
        return self.errors(plan, deployment, places)

    def export(self, plan: LayerPlan, deployment: Deployment) -> None:
        """Export a plan, checked against torch.

        Raises:
            GateError: The precision adds too much error.
        """
        self._models.export(plan, deployment.precision)

    def exported_ms(self, plan: LayerPlan, deployment: Deployment) -> float:
        """Return the milliseconds of a plan's own bundle.

        Raises:
            BackendError: See `ms`.
        """
        bundle = self._models.export(plan, deployment.precision)
        if self._board is not None:
            return estimated(bundle, self._board, deployment).value
        return self._stopwatch.ms(bundle, deployment)

    def dense_ms(self, deployment: Deployment) -> float:
        """Return the milliseconds of the dense model.

        Raises:
            BackendError: See `ms`.
        """
        plan = LayerPlan.dense(len(self.sparse_layers))
        if self._board is not None:
            return self.exported_ms(plan, deployment)
        return self._stopwatch.ms(self._models.trial(plan, deployment.precision), deployment, TIMING_DENSE)

    def own_bundle(self, plan: LayerPlan, deployment: Deployment) -> Path:
        """Return a bundle that later calls leave alone: the exported one, or one that is derived.

        Raises:
            GateError: See `errors`.
        """
        if self._board is not None or self._models.is_exported(plan, deployment.precision):
            return self._models.export(plan, deployment.precision)
        return self._models.trial(plan, deployment.precision, own=True)

    def times(self, bundles: Sequence[tuple[Path, Deployment]]) -> list[Quantity]:
        """Return the milliseconds of bundles, measured in turn, or estimates with their bounds.

        Raises:
            BackendError: See `ms`.
        """
        if self._board is None:
            return self._stopwatch.last(bundles)
        return [estimated(bundle, self._board, deployment) for bundle, deployment in bundles]

    def closing_s(self) -> float:
        """Return the seconds to reserve for the closing measurements."""
        if self._board is not None:
            return 0.0
        return min(CLOSING_TIMED * self._clock.took("timing"), CLOSING_SHARE * self._clock.seconds)

    def errors_of(self, bundle: Path, deployment: Deployment, places: Sequence[int]) -> list[float]:
        """Return the errors of a bundle on the images at some places.

        Raises:
            BackendError: The deployment does not take the bundle.
        """
        found, durations = checked_bundle(bundle), list[float]()
        with (
            self._clock.step(self._kind(places), f"evaluating a plan in {deployment}"),
            session_on(found, deployment.execution) as session,
        ):

            def infer(inputs: dict[str, Array]) -> dict[str, Array]:
                begun = time.perf_counter()
                outputs = session.infer(inputs)
                durations.append(1e3 * (time.perf_counter() - begun))
                return outputs

            errors = self._trial.errors_of(infer, places, self._clock.tell)
        self.answer_ms[deployment] = median(durations)
        return errors

    def _kind(self, places: Sequence[int]) -> str:
        return EVALUATING_ALL if len(places) == len(self.paths) else "evaluating"

    def _estimate(self, plan: LayerPlan, precision: str) -> float:
        """Return the estimate of a plan on the board, as `estimate` computes it from a bundle."""
        board = self._board
        assert board is not None
        runs = "native"
        if board.kind == "gpu":
            runs = "kernels" if takes_kernels(board, precision) else "bodies"
        work = Workload(model_shape(self.student.model), plan.config(self.student.sparsity), kernels=runs)
        fit = GRAPH_FIT if board.kind == "gpu" else CPU_FIT
        return 1e3 * roofline.seconds(roofline.costs(work, board, precision, fit))


def estimated(bundle: Path, board: Board, deployment: Deployment) -> Quantity:
    """Return the estimated milliseconds of a bundle on a board."""
    ms = estimate_bundle(bundle, board, compute_precision=deployment.precision).statistics.latency_ms
    return Quantity(ms.value, ms.low, ms.high, ms.confidence, f"estimated, not measured: {ms.interval}")
