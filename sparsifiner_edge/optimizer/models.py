"""Plans as complete models: a file of each plan, its error in a deployment, and its time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from msgspec.structs import replace

from sparsifiner_edge.bundle.entries import Quantisation
from sparsifiner_edge.bundle.manifest import MODEL_FILE, Manifest
from sparsifiner_edge.bundle.store import open_bundle, seal_bundle
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.export.export import ExportOptions, FloatFile, export_student, float_file
from sparsifiner_edge.export.replan import replan
from sparsifiner_edge.images import evenly
from sparsifiner_edge.ops.triton.schedule import LEAST_CAPABILITY
from sparsifiner_edge.optimizer.clock import Clock
from sparsifiner_edge.optimizer.family import everything
from sparsifiner_edge.pareto import Deployment
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.profiles.estimate import why_no_kernels
from sparsifiner_edge.profiles.measure.side import MeasuredSide, Rules, measure_blocks, open_side, planned_s, warm_up
from sparsifiner_edge.profiles.stats import medians_in_turn
from sparsifiner_edge.results import Quantity
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student

DENSE_INT8_IMAGES = 4
"""Maximum number of images for int8 calibration of the dense model, which is only the baseline."""
QUICK = Rules(seconds=0.4, min_queries=8, blocks=8, max_seconds=4.0)
"""Rules for a timing during the search. The order alternates between the eight blocks."""
THOROUGH = Rules(seconds=1.0, min_queries=10, blocks=10, max_seconds=60.0)
"""Rules for the last timing. With ten blocks, the second lowest and second highest value bound the median at 95 %."""
WARM_UP_S = 0.8
"""Maximum warm-up in seconds."""


class Models:
    """Files of plans for the deployments of a search.

    torch's exporter runs once, for a plan with everything; the files of all other plans are derived from it
    (`export.replan`) in a fraction of a second. Nothing changes the student.

    Args:
        folder: Scratch folder.
        student: Sparse model with predictors.
        dense: The dense model.
        clock: Time budget.
        images: Images for int8 calibration.
        options: Export options except the precision.
        board: Board for which files are made; None for this machine.
    """

    def __init__(
        self,
        folder: Path,
        student: Student,
        dense: Student,
        clock: Clock,
        images: Sequence[Path],
        options: ExportOptions,
        board: Board | None = None,
    ) -> None:
        self._folder, self.student, self._dense, self._clock, self._board = folder, student, dense, clock, board
        self._options = dataclasses.replace(options, tokens=True)
        self._calibration = link_images(folder / "calibration", images)
        self._dense_calibration = link_images(folder / "few", evenly(images, DENSE_INT8_IMAGES))
        self._bases: dict[str, tuple[onnx.ModelProto, Manifest]] = {}
        self._exported: dict[tuple[LayerPlan, str], Path] = {}
        self._base: FloatFile | None = None
        self._floats: dict[LayerPlan, FloatFile] = {}

    def student_of(self, plan: LayerPlan) -> Student:
        """Return a model with a plan; for the dense plan the dense model."""
        if plan.is_dense:
            return self._dense
        sparsity = plan.config(self.student.sparsity)
        student = dataclasses.replace(self.student, model=copy.deepcopy(self.student.model), sparsity=sparsity)
        set_budget(student.model, sparsity)
        return student

    def trial(self, plan: LayerPlan, precision: str, own: bool = False) -> Path:
        """Return a bundle of a plan for measurements, derived from a file with other merges and shares.

        An int8 file keeps the scales that were calibrated for `family.everything`.

        Args:
            plan: The plan.
            precision: Weight precision.
            own: Return a folder of its own; else the next call replaces the folder.

        Raises:
            GateError: The precision adds too much error.
        """
        if precision not in self._bases:
            folder = self._write(everything(self.student), precision, base=True)
            bundle = open_bundle(folder)
            self._bases[precision] = bundle.model(), bundle.manifest
        model, manifest = self._bases[precision]
        name = f"trial-{precision}"
        folder = self._folder / (f"{name}-{len(list(self._folder.glob(f'{name}-*')))}" if own else name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / MODEL_FILE).write_bytes(self._derived(model, manifest, plan).SerializeToString())
        seal_bundle(folder, replace(manifest, plan=plan, sparsity=plan.config(self.student.sparsity)))
        return folder

    def export(self, plan: LayerPlan, precision: str) -> Path:
        """Return the bundle of a plan, checked against torch.

        An int8 file has the scales that were calibrated for `family.everything`, if a trial has calibrated them.

        Raises:
            GateError: The precision adds too much error.
        """
        if (plan, precision) not in self._exported:
            self._exported[plan, precision] = self._write(plan, precision)
        return self._exported[plan, precision]

    def _write(self, plan: LayerPlan, precision: str, base: bool = False) -> Path:
        """Export a plan; a base, from which others are derived, is not checked against torch."""
        student, dense_text = self.student_of(plan), "the dense model in " * plan.is_dense
        calibrate = self._dense_calibration if plan.is_dense else self._calibration
        options = dataclasses.replace(
            self._options, precision=precision, calibrate=calibrate if precision == "int8" else None
        )
        board = self._board
        if board is not None and board.kind == "gpu":
            boards = (board,) * (not plan.is_dense and takes_kernels(board, precision))
            options = dataclasses.replace(
                options, int8_target="tensorrt" if precision == "int8" else "cpu", boards=boards
            )
        folder = self._folder / f"bundle-{len(self._exported)}{'-base' * base}"
        kind = f"export {precision}" if self._base is not None or self._board is not None else "export base"
        with self._clock.step(kind, f"exporting {dense_text}{precision}"):
            file = self._float_file(student, plan, base)
            int8 = self._int8_file(plan) if precision == "int8" else None
            try:
                return export_student(student, folder, options, file, self._clock.tell, int8)
            except ConfigError:  # Nothing can be compiled for the board: function bodies run it.
                if not options.boards:
                    raise
                without = dataclasses.replace(options, boards=())
                return export_student(student, folder, without, file, self._clock.tell)

    def _int8_file(self, plan: LayerPlan) -> tuple[onnx.ModelProto, Quantisation] | None:
        """Return the int8 file of a plan and the report of its calibration, if one with everything was calibrated."""
        if self._board is not None or "int8" not in self._bases:
            return None
        calibrated, manifest = self._bases["int8"]
        assert manifest.quantisation is not None
        return self._derived(calibrated, manifest, plan), manifest.quantisation

    def _derived(self, model: onnx.ModelProto, manifest: Manifest, plan: LayerPlan) -> onnx.ModelProto:
        shape = manifest.shape
        assert shape is not None
        return replan(model, self.student.sparsity, plan, shape.patches, shape.prefix)

    def is_exported(self, plan: LayerPlan, precision: str) -> bool:
        """Return True if `export` has made this bundle."""
        return (plan, precision) in self._exported

    def _float_file(self, student: Student, plan: LayerPlan, base: bool) -> FloatFile:
        if self._board is not None:
            return float_file(student, tokens=True)
        if self._base is None:
            self._base = float_file(self.student_of(everything(self.student)), tokens=True, check=False)
        if base:
            return self._base
        if plan not in self._floats:
            self._floats = {plan: float_file(student, tokens=True, other=self._base.model)}
        return self._floats[plan]


def takes_kernels(board: Board | None, stored: str = "fp16") -> bool:
    """Return True if files of a precision can carry kernels for a board.

    Its GPU and JetPack must be supported, and Triton must work.
    """
    if board is None or board.sm < LEAST_CAPABILITY or stored == "fp32" or why_no_kernels(board.release(None)):
        return False
    return importlib.util.find_spec("triton") is not None


def link_images(folder: Path, images: Sequence[Path]) -> Path:
    """Make a folder of links to images, in order."""
    folder.mkdir()
    for number, path in enumerate(images):
        (folder / f"{number:05}{path.suffix.lower()}").symlink_to(path.resolve())
    return folder


class Stopwatch:
    """Times bundles of this machine in turn with a reference, so that a change of the machine's speed cancels.

    The reference is the first bundle that is timed. Each bundle runs in a process of its own.

    Args:
        clock: Time budget.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock, self._reference, self._open = clock, list[tuple[MeasuredSide, float]](), contextlib.ExitStack()

    def __enter__(self) -> Stopwatch:
        """Enter the block; processes that it opens end with it."""
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def ms(self, bundle: Path, deployment: Deployment, kind: str = "timing") -> float:
        """Return milliseconds, relative to the reference's first timing.

        Args:
            bundle: The bundle.
            deployment: Where it runs.
            kind: Kind of the step, for the clock.

        Raises:
            BackendError: The deployment does not take the bundle, or a process died or hung.
        """
        with self._clock.step(kind, f"timing in {deployment}"), contextlib.ExitStack() as stack:
            if not self._reference:
                side = self._open.enter_context(self._side(bundle, deployment))
                self._reference.append((side, self._quick([side])[0]))
                return self._reference[0][1]
            reference, nominal = self._reference[0]
            side = stack.enter_context(self._side(bundle, deployment))
            reference_ms, ms = self._quick([reference, side])
            return ms * nominal / reference_ms

    def _quick(self, sides: Sequence[MeasuredSide]) -> list[float]:
        for side in sides:
            side.blocks, side.seconds, side.queries, side.wall_s = [], 0.0, 0, 0.0
        measure_blocks(list(sides), QUICK, self._clock.tell, "timing full models")
        return [ms.value for ms in medians_in_turn([side.blocks for side in sides])]

    @contextlib.contextmanager
    def _side(self, bundle: Path, deployment: Deployment) -> Iterator[MeasuredSide]:
        """Open a bundle in its own process, loaded and warmed up."""
        with open_side(bundle.name, bundle, deployment.execution, self._clock.tell) as side:
            warm_up(side, self._clock.tell, WARM_UP_S)
            yield side

    def last(self, bundles: Sequence[tuple[Path, Deployment]], rules: Rules = THOROUGH) -> list[Quantity]:
        """Return median milliseconds with intervals, measured in turn, each in its own process.

        Args:
            bundles: Bundles and their deployments, the most important first.
            rules: Rules for the timing.

        Returns:
            The times of as many of the first bundles as there was time for, but at least one.

        Raises:
            BackendError: See `ms`.
        """
        with contextlib.ExitStack() as stack:
            sides = list[MeasuredSide]()
            for bundle, deployment in bundles:
                if sides and not self._clock.fits("loading", reserve_s=planned_s([*sides, sides[-1]], rules)):
                    break
                with self._clock.step("loading", f"loading for {deployment}"):
                    sides.append(stack.enter_context(self._side(bundle, deployment)))
            left_s = max(1.0, self._clock.remaining) / len(sides)
            rules = replace(rules, max_seconds=min(rules.max_seconds, left_s))
            measure_blocks(sides, rules, self._clock.tell, "measuring full models")
            return medians_in_turn([side.blocks for side in sides])
