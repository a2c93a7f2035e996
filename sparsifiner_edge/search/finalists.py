"""Finalists as users get them: exported, measured whole and side by side, and compared with the dense model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.images import evenly
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.profiles.estimate import estimate_bundle
from sparsifiner_edge.profiles.measure.side import (
    MeasuredSide,
    measure_blocks,
    open_side,
    stage_progress,
    warm_up,
)
from sparsifiner_edge.profiles.measure.worker import Load
from sparsifiner_edge.profiles.rules import make_rules
from sparsifiner_edge.profiles.stats import medians_in_turn
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Estimate
from sparsifiner_edge.search.latency import Deployment
from sparsifiner_edge.sparse.student import Student, save_student

CALIBRATED = 16
"""Images at most that int8 is calibrated with."""
SECONDS = 4.0
"""Least time measured of each."""
LEAST_ROUNDS = 10
"""Of slow models; of ten, the second least and second greatest bound a median at 95 %."""
ESTIMATED = 0.9
"""Confidence of an estimate's bounds: what its fit was widened to."""


class Contender(NamedTuple):
    """A bundle and what runs it."""

    bundle: Path
    engine: Deployment


class Exports:
    """Bundles of a student and of its dense model, each made when it is first asked for.

    Args:
        folder: for them. start: the student's folder. dense_model: what it is compared with.
        images: to calibrate int8 with. trust: see `load_student`.
    """

    def __init__(
        self, folder: Path, start: Path, dense_model: Student, images: Sequence[Path], trust: Sequence[str],
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.folder, self.start, self.trust, self._progress = folder, start, trust, progress
        self._dense_model = dense_model
        self._calibration = linked(folder / "calibration", evenly(images, CALIBRATED))
        self._made: dict[tuple[LayerPlan, str], Path] = {}

    def dense_for(self, host: Deployment) -> Path:
        """The dense model as an engine of this machine takes it; a board's precision is only reckoned with.

        Raises:
            GateError: int8 loses too much.
        """
        stored = host.stored if host.is_here else "fp32"
        path = self.folder / f"dense-{stored}"
        if not path.exists():
            self._tell(f"exporting the dense model in {stored}")
            source = self.folder / "dense-student"
            if not source.exists():
                save_student(self._dense_model, source)
            export_bundle(
                source, path, precision=stored, calibrate=self._calibration if stored == "int8" else None,
                tokens=True, trust=self.trust,
            )  # fmt: skip
        return path

    def of(self, plan: LayerPlan, precision: str) -> Path:
        """A plan in a precision.

        Raises:
            GateError: int8 loses too much.
        """
        key = plan, precision
        if key not in self._made:
            self._tell(f"exporting {precision}")
            calibrate = self._calibration if precision == "int8" else None
            self._made[key] = export_bundle(
                self.start, self.folder / f"bundle-{len(self._made)}", merge=plan.merge, keep=plan.short_keep,
                precision=precision, calibrate=calibrate, tokens=True, trust=self.trust,
            )  # fmt: skip
        return self._made[key]

    def _tell(self, stage: str) -> None:
        if self._progress:
            self._progress(stage, len(self._made), len(self._made) + 1)


def linked(folder: Path, images: Sequence[Path]) -> Path:
    """A folder of links to images, whose names say their order."""
    folder.mkdir()
    for number, path in enumerate(images):
        (folder / f"{number:05}{path.suffix.lower()}").symlink_to(path.resolve())
    return folder


class Stopwatch:
    """Times of whole models: measured on this machine, or estimated for a board that is not here.

    Args:
        board: None: this machine.
    """

    def __init__(self, board: Board | None, progress: Progress | None) -> None:
        self.board, self._progress = board, progress

    def times(self, subjects: Sequence[Contender]) -> list[Estimate]:
        """Median milliseconds, measured in turn, each in a process of its own; or an estimate with its bounds.

        Raises:
            BackendError: a backend rejects a bundle, or a process died or hung.
        """
        if self.board is None:
            return self._measured(subjects)
        found = []
        for subject in subjects:
            of_bundle = estimate_bundle(subject.bundle, self.board, precision=subject.engine.stored).statistics
            ms = of_bundle.latency_ms
            found.append(Estimate(ms.value, ms.low, ms.high, ESTIMATED, f"estimated, not measured: {ms.method}"))
        return found

    def _measured(self, subjects: Sequence[Contender]) -> list[Estimate]:
        rules = replace(make_rules(SECONDS, LEAST_ROUNDS), blocks=LEAST_ROUNDS)
        on_stage = stage_progress(self._progress, len(subjects) * (SECONDS + 2.0))
        with contextlib.ExitStack() as stack:
            sides: list[MeasuredSide] = []
            for number, subject in enumerate(subjects):
                on_stage(f"loading {subject.bundle.name}")
                request = Load(bundle=str(subject.bundle.resolve()), execution=subject.engine.execution)
                sides.append(stack.enter_context(open_side(str(number), request)))
                warm_up(sides[-1], on_stage)
            measure_blocks(sides, rules, on_stage, "measuring whole models")
            return medians_in_turn([side.blocks for side in sides])
