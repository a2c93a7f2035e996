"""Whole models as users get them: exported, timed in turn, and compared with the dense model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from msgspec.structs import replace

from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.export.export import ExportOptions, FloatFile, export_student, float_file
from sparsifiner_edge.images import evenly
from sparsifiner_edge.optimizer.clock import Clock
from sparsifiner_edge.optimizer.latency import takes_kernels
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.pareto import Deployment
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.profiles.estimate import estimate_bundle
from sparsifiner_edge.profiles.measure.side import MeasuredSide, Rules, measure_blocks, open_side, warm_up
from sparsifiner_edge.profiles.stats import CONFIDENCE, medians_in_turn
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Quantity
from sparsifiner_edge.runtime.open import checked_bundle, session_on
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student

INT8_IMAGES = 9
"""Maximum number of images for int8 calibration."""
DENSE_INT8_IMAGES = 4
"""Maximum number of images for int8 calibration of the dense model, which is only the baseline."""
PlanInEngine: TypeAlias = tuple[LayerPlan, Deployment]
QUICK = Rules(seconds=0.4, min_queries=8, blocks=8, max_seconds=8.0)
"""Rules for a quick timing against the reference. The order alternates between the eight blocks."""
WARM_UP_S = 0.8
"""Maximum warm-up in seconds."""
THOROUGH = Rules(seconds=2.0, min_queries=10, blocks=10, max_seconds=60.0)
"""Rules for the last timing. With ten blocks, the second lowest and second highest value bound the median at 95 %."""


class WholeModels:
    """Bundles of a model by plan, each made when it is first needed; the dense plan is the dense model.

    Args:
        folder: Folder for the bundles.
        student: The model; the search changes its settings of keep and merge in place.
        dense_model: The dense model.
        images: Images for int8 calibration.
        board: Board whose times are estimated; None measures here.
        clock: Time budget.
        options: Export options except the precision.
    """

    def __init__(
        self,
        folder: Path,
        student: Student,
        dense_model: Student,
        images: Sequence[Path],
        board: Board | None,
        clock: Clock,
        options: ExportOptions | None = None,
    ) -> None:
        self._folder, self._student, self._dense, self._board, self._clock = folder, student, dense_model, board, clock
        self._options = dataclasses.replace(options or ExportOptions(), tokens=True)
        self.images = images
        self._bundles: dict[tuple[LayerPlan, str], Path] = {}
        self._floats: dict[LayerPlan, tuple[Student, FloatFile]] = {}
        self._reference: tuple[MeasuredSide, float] | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> WholeModels:
        """Enter the block; processes that it opens end with it."""
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @functools.cached_property
    def _calibration(self) -> Path:
        return link_images(self._folder / "calibration", evenly(self.images, INT8_IMAGES))

    @functools.cached_property
    def _dense_calibration(self) -> Path:
        return link_images(self._folder / "few", evenly(self.images, DENSE_INT8_IMAGES))

    def bundle(self, plan: LayerPlan, deployment: Deployment) -> Path:
        """Return the bundle of a plan for a deployment.

        Raises:
            GateError: Its precision adds too much error.
        """
        stored, dense_text = deployment.precision, "the dense model in " * plan.is_dense
        if (plan, stored) not in self._bundles:
            if plan not in self._floats:
                with self._clock.step("export", f"exporting {dense_text or 'a plan in '}fp32"):
                    student = self.student_of(plan)
                    self._floats[plan] = student, float_file(student, tokens=True)
            student, base = self._floats[plan]
            images = self._dense_calibration if plan.is_dense else self._calibration
            calibrate = images if stored == "int8" else None
            options = dataclasses.replace(self._options, precision=stored, calibrate=calibrate)
            if self._board is not None and self._board.kind == "gpu":
                target = "tensorrt" if stored == "int8" else "cpu"
                boards = (self._board,) * (not plan.is_dense and takes_kernels(self._board, stored))
                options = dataclasses.replace(options, int8_target=target, boards=boards)
            folder = self._folder / f"bundle-{len(self._bundles)}"
            with self._clock.step(f"export {stored}", f"exporting {dense_text or 'a plan in '}{stored}"):
                try:
                    self._bundles[plan, stored] = export_student(student, folder, options, base, self._clock.tell)
                except ConfigError:  # Nothing can be compiled: function bodies run it.
                    if not options.boards:
                        raise
                    options = dataclasses.replace(options, boards=())
                    self._bundles[plan, stored] = export_student(student, folder, options, base, self._clock.tell)
        return self._bundles[plan, stored]

    def student_of(self, plan: LayerPlan) -> Student:
        """Return the model with a plan; for the dense plan the dense model."""
        if plan.is_dense:
            return self._dense
        sparsity = plan.config(self._student.sparsity)
        student = dataclasses.replace(self._student, model=copy.deepcopy(self._student.model), sparsity=sparsity)
        set_budget(student.model, sparsity)
        return student

    def file_bytes(self, plan: LayerPlan, deployment: Deployment) -> int:
        """Return the size of the file that a deployment reads."""
        return (self.bundle(plan, deployment) / MODEL_FILE).stat().st_size

    def errors(self, plan: LayerPlan, deployment: Deployment, trial: Trial, start: int = 0) -> list[float]:
        """Return the errors of a plan's bundle in a deployment, image by image from place `start` on.

        Raises:
            GateError: See `bundle`.
            BackendError: The deployment does not take the bundle.
        """
        bundle = checked_bundle(self.bundle(plan, deployment))
        with (
            self._clock.step("evaluating", f"evaluating a plan in {deployment}"),
            session_on(bundle, deployment.execution) as session,
        ):
            return trial.errors_of(session.infer, start)

    def ms(self, plan: LayerPlan, deployment: Deployment) -> Quantity:
        """Return milliseconds, measured in turn with the reference, or an estimate with its bounds.

        The reference is the first model that was timed. Times are relative to its first timing, whatever the machine's
        speed became.

        Raises:
            GateError: See `errors`.
            BackendError: See `errors`; or a process died or hung.
        """
        bundle = self.bundle(plan, deployment)
        if self._board is not None:
            return _estimate(bundle, self._board, deployment.precision)
        with self._clock.step("timing", f"timing a full model in {deployment}"), contextlib.ExitStack() as stack:
            if self._reference is None:
                reference = self._open.enter_context(_side("reference", bundle, deployment, self._clock))
                self._reference = reference, _quick_ms([reference], self._clock)[0]
                ms = self._reference[1]
            else:
                reference, nominal = self._reference
                side = stack.enter_context(_side("subject", bundle, deployment, self._clock))
                reference_ms, side_ms = _quick_ms([reference, side], self._clock)
                ms = side_ms * nominal / reference_ms
            none = Unavailable("it was only measured briefly, in turn with a reference")
            return Quantity(ms, none, none, CONFIDENCE, "median of rounds, in turn with a reference")

    def times(self, subjects: Sequence[PlanInEngine], most_s: float = THOROUGH.max_seconds) -> list[Quantity]:
        """Return median milliseconds, measured in turn, each in its own process, or estimates with their bounds.

        Args:
            subjects: Plans and deployments.
            most_s: Approximate maximum of seconds for each.

        Raises:
            GateError: See `ms`.
            BackendError: See `ms`.
        """
        bundles = [(self.bundle(plan, deployment), deployment) for plan, deployment in subjects]
        if self._board is not None:
            return [_estimate(bundle, self._board, deployment.precision) for bundle, deployment in bundles]
        return whole_ms(bundles, self._clock, most_s)


def whole_ms(
    bundles: Sequence[tuple[Path, Deployment]], clock: Clock, most_s: float = THOROUGH.max_seconds
) -> list[Quantity]:
    """Return median milliseconds of bundles in deployments of this machine; see `WholeModels.times`."""
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(_side(str(n), *bundle, clock)) for n, bundle in enumerate(bundles)]
        most_s = max(1.0, min(most_s, clock.remaining / len(sides)))
        measure_blocks(sides, replace(THOROUGH, max_seconds=most_s), clock.tell, "measuring full models")
        return medians_in_turn([side.blocks for side in sides])


def _quick_ms(sides: Sequence[MeasuredSide], clock: Clock) -> list[float]:
    """Return median milliseconds in turn; whatever slows a whole round cancels."""
    for side in sides:
        side.blocks, side.seconds, side.queries, side.wall_s = [], 0.0, 0, 0.0
    measure_blocks(list(sides), QUICK, clock.tell, "timing full models")
    return [ms.value for ms in medians_in_turn([side.blocks for side in sides])]


@contextlib.contextmanager
def _side(role: str, bundle: Path, deployment: Deployment, clock: Clock) -> Iterator[MeasuredSide]:
    """Open a bundle in its own process, loaded and warmed up."""
    with open_side(role, bundle, deployment.execution, clock.tell) as side:
        warm_up(side, clock.tell, WARM_UP_S)
        yield side


def _estimate(bundle: Path, board: Board, precision: str) -> Quantity:
    ms = estimate_bundle(bundle, board, compute_precision=precision).statistics.latency_ms
    return Quantity(ms.value, ms.low, ms.high, ms.confidence, f"estimated, not measured: {ms.interval}")


def link_images(folder: Path, images: Sequence[Path]) -> Path:
    """Make a folder of links to images, in order."""
    folder.mkdir()
    for number, path in enumerate(images):
        (folder / f"{number:05}{path.suffix.lower()}").symlink_to(path.resolve())
    return folder


class Attempt(NamedTuple):
    """A plan that became a bundle in a deployment.

    Attributes:
        ms: Milliseconds relative to the reference, or of the last measurement in turn with the dense model.
        errors: Error of each image of the search, in the order of `Trial.paths`.
        reserved: Errors of the held-out images.
        predicted: Error and milliseconds predicted before it was measured; the measured ones if there was no
            prediction.
        again: True if it was measured again at the end.
    """

    plan: LayerPlan
    deployment: Deployment
    ms: Quantity
    errors: list[float]
    reserved: list[float]
    predicted: tuple[float, float]
    again: bool = False
