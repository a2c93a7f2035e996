"""Whole models as users get them: exported, timed side by side, and compared with the dense model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from msgspec.structs import replace

from sparsifiner_edge.export.export import ExportOptions, export_bundle
from sparsifiner_edge.front import Deployment
from sparsifiner_edge.images import evenly
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.profiles.estimate import estimate_bundle
from sparsifiner_edge.profiles.measure.side import (
    MeasuredSide,
    make_rules,
    measure_blocks,
    open_side,
    stage_progress,
    warm_up,
)
from sparsifiner_edge.profiles.stats import medians_in_turn
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Quantity
from sparsifiner_edge.runtime.open import checked_bundle, session_on
from sparsifiner_edge.sparse.model_options import ModelOptions
from sparsifiner_edge.sparse.student import Student, save_student

INT8_IMAGES = 16
"""Images at most that int8 is calibrated with."""
SECONDS = 4.0
"""Least time measured of each."""
MOST_SECONDS = 60.0
"""Most, so that slow models get their rounds."""
LEAST_ROUNDS = 10
"""Of slow models; of ten, the second least and second greatest bound a median at 95 %."""
PlanInEngine: TypeAlias = tuple[LayerPlan, Deployment]


class WholeModels:
    """Bundles of a student by plan, each made when it is first asked for; the dense plan is the dense model.

    Args:
        folder: for them. start: the student's folder. dense_model: what it is compared with.
        images: to calibrate int8 with. board: that times are estimated for; None: they are measured, here.
        trust: see `load_student`.
    """

    def __init__(
        self, folder: Path, start: Path, dense_model: Student, images: Sequence[Path], board: Board | None,
        trust: Sequence[str], progress: Progress | None,
    ) -> None:  # fmt: skip
        self._start, self._trust, self._folder, self._board, self._progress = start, trust, folder, board, progress
        self._dense = save_student(dense_model, folder / "dense-student")
        self._calibration = link_images(folder / "calibration", evenly(images, INT8_IMAGES))
        self._bundles: dict[tuple[LayerPlan, str], Path] = {}

    def bundle(self, plan: LayerPlan, engine: Deployment) -> Path:
        """A plan as an engine takes it.

        Raises:
            GateError: its precision loses too much.
        """
        stored = engine.stored
        if (plan, stored) not in self._bundles:
            count = len(self._bundles)
            if self._progress:
                self._progress(f"exporting {'the dense model in ' * plan.is_dense}{stored}", count, count + 1)
            self._bundles[plan, stored] = export_bundle(
                self._dense if plan.is_dense else self._start, self._folder / f"bundle-{count}",
                model=ModelOptions(trust=self._trust), budget=None if plan.is_dense else plan.budget,
                options=ExportOptions(
                    precision=stored, calibrate=self._calibration if stored == "int8" else None, tokens=True
                ),
            )  # fmt: skip
        return self._bundles[plan, stored]

    def distances(self, plan: LayerPlan, engine: Deployment, trial: Trial) -> list[float]:
        """Of a plan's bundle in an engine, from the dense model in float32, image by image."""
        with session_on(checked_bundle(self.bundle(plan, engine)), engine.execution) as session:
            return trial.distances_of(session.infer)

    def times(self, subjects: Sequence[PlanInEngine]) -> list[Quantity]:
        """Median milliseconds, measured in turn, each in a process of its own; or an estimate with its bounds.

        Raises:
            BackendError: a backend rejects a bundle, or a process died or hung.
        """
        bundles = [(self.bundle(plan, engine), engine) for plan, engine in subjects]
        if self._board is None:
            return whole_ms(bundles, self._progress)
        return [_estimate(bundle, self._board, engine.stored) for bundle, engine in bundles]


def whole_ms(bundles: Sequence[tuple[Path, Deployment]], progress: Progress | None = None) -> list[Quantity]:
    """Median milliseconds of bundles in engines of this machine; see `WholeModels.times`."""
    rules = replace(make_rules(SECONDS, LEAST_ROUNDS), blocks=LEAST_ROUNDS, max_seconds=MOST_SECONDS)
    on_stage = stage_progress(progress, len(bundles) * (SECONDS + 2.0))
    with contextlib.ExitStack() as stack:
        sides: list[MeasuredSide] = []
        for number, (bundle, engine) in enumerate(bundles):
            sides.append(stack.enter_context(open_side(str(number), bundle, engine.execution, on_stage)))
            warm_up(sides[-1], on_stage)
        measure_blocks(sides, rules, on_stage, "measuring whole models")
        return medians_in_turn([side.blocks for side in sides])


def _estimate(bundle: Path, board: Board, precision: str) -> Quantity:
    ms = estimate_bundle(bundle, board, precision=precision).statistics.latency_ms
    return Quantity(ms.value, ms.low, ms.high, ms.confidence, f"estimated, not measured: {ms.interval}")


def link_images(folder: Path, images: Sequence[Path]) -> Path:
    """A folder of links to images, whose names say their order."""
    folder.mkdir()
    for number, path in enumerate(images):
        (folder / f"{number:05}{path.suffix.lower()}").symlink_to(path.resolve())
    return folder
