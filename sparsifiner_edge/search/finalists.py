"""Finalists as users get them: exported, measured whole and side by side, and compared with the dense model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.images import evenly
from sparsifiner_edge.profiles.measure.side import (
    MeasuredSide,
    load_side,
    measure_blocks,
    stage_progress,
    start_worker,
    warm_up,
)
from sparsifiner_edge.profiles.measure.worker import Load
from sparsifiner_edge.profiles.rules import make_rules
from sparsifiner_edge.profiles.stats import estimate, percentile, quantile_interval
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Estimate
from sparsifiner_edge.search.plan import LayerPlan
from sparsifiner_edge.sparse.student import Student, save_student

CALIBRATED = 16
"""Images at most that int8 is calibrated with."""
SECONDS = 4.0
"""Least time measured of each."""


class Contender(NamedTuple):
    """A bundle and the backend that runs it."""

    bundle: Path
    backend: str


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
        self.folder, self.start, self._trust, self._progress = folder, start, trust, progress
        self._dense_model, self.depth = dense_model, len(dense_model.backbone.layers)
        self._calibration = linked(folder / "calibration", evenly(images, CALIBRATED))
        self._made: dict[tuple[LayerPlan, str], Path] = {}

    def dense(self) -> Path:
        """The dense model in float32."""
        path = self.folder / "dense"
        if not path.exists():
            self._tell("exporting the dense model")
            save_student(self._dense_model, self.folder / "dense-student")
            export_bundle(self.folder / "dense-student", path, tokens=True, trust=self._trust)
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
                precision=precision, calibrate=calibrate, tokens=True, trust=self._trust,
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


def times(subjects: Sequence[Contender], progress: Progress | None = None) -> list[Estimate]:
    """Median milliseconds of bundles, measured in turn, each in a process of its own.

    Raises:
        BackendError: a backend rejects a bundle, or a process died or hung.
    """
    rules = make_rules("quick", SECONDS)
    on_stage = stage_progress(progress, len(subjects) * (SECONDS + 2.0))
    with contextlib.ExitStack() as stack:
        sides: list[MeasuredSide] = []
        for number, subject in enumerate(subjects):
            on_stage(f"loading {subject.bundle.name}")
            request = Load(bundle=str(subject.bundle.resolve()), backend=subject.backend, threads=None, kernels="auto")
            sides.append(load_side(str(number), stack.enter_context(start_worker()), request))
            warm_up(sides[-1], on_stage)
        measure_blocks(sides, rules, on_stage, "measuring finalists")
        return [_timed(side) for side in sides]


def _timed(side: MeasuredSide) -> Estimate:
    latency = side.latency_ms
    low, high = quantile_interval(latency, 0.5)
    return estimate(percentile(latency, 0.5), low, high, "order statistics, effective sample size")
