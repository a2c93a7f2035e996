"""The demonstration: real weights and photographs, dense beside sparse, untrained; table, result and images."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.demo import split
from sparsifiner_edge.demo.maps import Drawn, draw_maps
from sparsifiner_edge.demo.saliency import OUTPUT
from sparsifiner_edge.errors import ArtifactError, GateError
from sparsifiner_edge.evaluate.evaluate import evaluate_student
from sparsifiner_edge.evaluate.explain import draw
from sparsifiner_edge.evaluate.task import TaskMethod, TaskResult
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.images import evenly
from sparsifiner_edge.profiles.figures import Method, ProfileResult, Samples, Statistics
from sparsifiner_edge.profiles.profile import profile_bundle
from sparsifiner_edge.profiles.rules import MIN_BLOCKS
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report import write_report
from sparsifiner_edge.results import Declared, Estimate, read_result, write_result
from sparsifiner_edge.search.search import FRONT, search_model
from sparsifiner_edge.sparse.student import load_student


class Asked(NamedTuple):
    """One row of the demonstration: its bundle's folder, and the cosine of patches that is searched for."""

    folder: str
    at_least: float

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"patches at least {self.at_least}"


class _Row(NamedTuple):
    """What was found and measured at one fidelity; plan: what merges and is read."""

    bundle: Path
    plan: str
    task: TaskResult
    profile: ProfileResult
    figures: RowFigures


class RowFigures(msgspec.Struct, frozen=True, kw_only=True):
    """At one fidelity; error and overlap (IoU) are of the map to the dense model's, shares of the dense backbone's
    multiply-accumulates, tokens those that leave the last layer.
    """

    error: float
    iou: float
    tokens_left_share: float
    attention_macs_share: float
    macs_share: float
    dense_p50_ms: float
    sparse_p50_ms: float
    speed_ratio: Estimate
    verdict: str


class RowSamples(msgspec.Struct, frozen=True):
    """Of one setting."""

    task: dict[str, list[float | None]]
    profile: Samples


class DemoMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was measured; plans, task and profile by what was asked for."""

    kernels: str | Unavailable
    verdicts: list[str]
    plans: dict[str, str]
    task: dict[str, TaskMethod]
    profile: dict[str, Method]
    training: str


class DemoResult(Declared, frozen=True):
    """Of kind "demo", by what was asked for."""

    method: DemoMethod
    samples: dict[str, RowSamples]
    statistics: dict[str, RowFigures]


SIZE = 518
ASKED = (Asked("sparse_close", 0.99), Asked("sparse_fast", 0.98))
LOOKED_AT = 8
"""Photographs that are searched with, one of them kept for the check."""
MINUTES = 3.0
"""Of the first search; the next one goes on from it."""
MODULE = "sparsifiner_edge.demo.saliency"
SOURCE = f"{MODULE}:saliency"
DRAWN_KEEP = 0.1
"""Share of keys in the drawn layer, where nothing is merged."""
LAYER = 8
"""The layer whose selection is drawn: late enough to be semantic, early enough to differ between queries."""
DRAWN = (2, 0, 1)
"""Of the development photographs."""
RESULT, PAGE, CALIBRATION, SEARCH = "result.json", "report.html", "calibration", "search"
STEPS = 4 + 3 * len(ASKED)


def run_demo(output: Path, progress: Progress) -> DemoResult:
    """Run the demonstration into `output`; an earlier demonstration there is replaced.

    Args:
        progress: see `Progress`; counts steps.

    Returns:
        A result of kind "demo", also written to `output`/result.json; pictures and a page lie beside it.

    Raises:
        ArtifactError: `output` holds something else.
        MissingExtraError: a package of the extra `demo` is not installed.
    """
    _require_demonstration(output)
    calibration = output / CALIBRATION
    calibration.mkdir(parents=True, exist_ok=True)
    for path in evenly(split.calibration(), LOOKED_AT):
        shutil.copyfile(path, calibration / path.name)
    shutil.rmtree(output / SEARCH, ignore_errors=True)
    done = itertools.count()

    def stage(name: str) -> None:
        progress(name, next(done), STEPS)

    stage("export dense")
    dense = export_bundle(SOURCE, output / "dense", img_size=SIZE, tokens=True)
    rows = {asked.name: _one(asked, output, dense, stage, progress) for asked in ASKED}
    stage("draw")
    photographs = [split.development()[number] for number in DRAWN]
    sides = [Drawn(row.bundle, name, row.figures.sparse_p50_ms) for name, row in rows.items()]
    slow = next(iter(rows.values())).figures.dense_p50_ms
    draw_maps(Drawn(dense, "dense", slow), sides, photographs, OUTPUT, output / "maps.png")
    unmerged = load_student(output / SEARCH / "start", merge=(), keep=DRAWN_KEEP, trust=[MODULE])
    draw(unmerged, photographs[0], LAYER, output / "attention.png")
    stage("write the page")
    result = _result(rows)
    write_result(output / RESULT, result)
    _write_page(output, rows)
    progress("done", STEPS, STEPS)
    return result


def _write_page(output: Path, rows: dict[str, _Row]) -> None:
    results = []
    for row in rows.values():
        for kind, result in (("task", row.task), ("speed", row.profile)):
            results.append(output / f"{row.bundle.name}_{kind}.json")
            write_result(results[-1], result)
    results.append(output / SEARCH / FRONT)
    write_report(results, output / PAGE, images=False, pictures=[output / "maps.png", output / "attention.png"])


def _require_demonstration(output: Path) -> None:
    """Refuse a folder that holds something else; drop the result of an earlier demonstration."""
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or (
        any(output.iterdir()) and not any((output / name).exists() for name in (RESULT, CALIBRATION))
    ):
        raise ArtifactError(f"{output} exists and holds no demonstration; it is left untouched.", "Choose another -o.")
    if (output / RESULT).exists():
        read_result(output / RESULT)
        (output / RESULT).unlink()


def _one(asked: Asked, output: Path, dense: Path, stage: Callable[[str], None], progress: Progress) -> _Row:
    stage(f"{asked.name}: search")
    found = search_model(
        SOURCE, output / CALIBRATION, output / SEARCH, at_least=asked.at_least, img_size=SIZE, minutes=MINUTES,
        backends=["onnxruntime"], precisions=["fp32"], trust=[MODULE], progress=progress,
    ).statistics.answer  # fmt: skip
    if isinstance(found, Unavailable):
        raise GateError(f"The search found nothing: {found.why}.", "Report this as a bug.")
    bundle = output / asked.folder
    shutil.rmtree(bundle, ignore_errors=True)
    (output / SEARCH / "bundle").rename(bundle)
    stage(f"{asked.name}: evaluate")
    task = evaluate_student(bundle, split.development(), against=dense, metric="task")
    stage(f"{asked.name}: profile")
    # What the table shows, and no more: neither time per layer nor power.
    profile = profile_bundle(bundle, against=dense, seconds=8.0, min_queries=MIN_BLOCKS, layers=False, power=False)
    assert isinstance(task, TaskResult)
    plan = f"merge {found.merge}, keep {found.keep}"
    return _Row(bundle, plan, task, profile, _figures(task, profile.statistics, open_bundle(bundle).manifest))


def _result(rows: dict[str, _Row]) -> DemoResult:
    first = next(iter(rows.values()))
    verdicts = [(name, row.profile.statistics.comparison) for name, row in rows.items()]
    method = DemoMethod(
        kernels=first.profile.method.runtime["subject"].kernels,
        verdicts=[f"{name}: {found.sentence}" for name, found in verdicts if found is not None],
        plans={name: row.plan for name, row in rows.items()},
        task={name: row.task.method for name, row in rows.items()},
        profile={name: row.profile.method for name, row in rows.items()},
        training="none; the predictor is calibrated on images that are not among the eight",
    )
    samples = {name: RowSamples(row.task.samples, row.profile.samples) for name, row in rows.items()}
    subjects = [replace(subject, setting=name) for name, row in rows.items() for subject in row.profile.subjects]
    return DemoResult("demo", subjects, method, samples, {name: row.figures for name, row in rows.items()})


def _figures(task: TaskResult, profile: Statistics, manifest: Manifest) -> RowFigures:
    costs, dense, shape = manifest.costs, manifest.dense_costs, manifest.shape
    assert profile.against is not None
    assert profile.comparison is not None
    assert shape is not None
    core = costs["attention_macs"] + costs["cells_macs"] + costs["predictor_macs"]
    return RowFigures(
        error=task.statistics["error"].mean.value,
        iou=task.statistics["iou"].mean.value,
        tokens_left_share=1 - sum(manifest.merged or ()) / shape.patches,
        attention_macs_share=core / dense["attention_macs"],
        macs_share=costs["total_macs"] / dense["total_macs"],
        dense_p50_ms=profile.against.latency_ms.p50.value,
        sparse_p50_ms=profile.subject.latency_ms.p50.value,
        speed_ratio=profile.comparison.ratio,
        verdict=profile.comparison.verdict,
    )
