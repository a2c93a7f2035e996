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
from sparsifiner_edge.config import Keep, keep_text, merge_text
from sparsifiner_edge.demo import split
from sparsifiner_edge.demo.maps import Drawn, draw_maps
from sparsifiner_edge.demo.saliency import OUTPUT
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.evaluate.evaluate import evaluate_student
from sparsifiner_edge.evaluate.explain import draw
from sparsifiner_edge.evaluate.task import TaskMethod, TaskResult
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.profiles.figures import Method, ProfileResult, Samples, Statistics
from sparsifiner_edge.profiles.profile import profile_bundle
from sparsifiner_edge.profiles.rules import MIN_BLOCKS
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report import write_report
from sparsifiner_edge.results import Declared, Estimate, read_result, write_result
from sparsifiner_edge.sparse.student import load_student, sparsify


class Setting(NamedTuple):
    """One row of the demonstration: its bundle's folder, how much is merged, and which keys are read."""

    folder: str
    merge: tuple[int, ...]
    keep: Keep

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"merge {merge_text(self.merge)}, keep {keep_text(self.keep)}"


class _Row(NamedTuple):
    """What was measured of one setting."""

    bundle: Path
    task: TaskResult
    profile: ProfileResult
    figures: RowFigures


class RowFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one setting; error and overlap (IoU) are of the map to the dense model's, shares of the dense backbone's
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
    """How it was measured; task and profile by setting."""

    kernels: str | Unavailable
    verdicts: list[str]
    task: dict[str, TaskMethod]
    profile: dict[str, Method]
    training: str


class DemoResult(Declared, frozen=True):
    """Of kind "demo", by setting."""

    method: DemoMethod
    samples: dict[str, RowSamples]
    statistics: dict[str, RowFigures]


SIZE, CELLS = 518, 49
SETTINGS = (Setting("sparse_close", (40,), 1.0), Setting("sparse_fast", (160, 0), (0.1, 0.1, 0.2, 1.0)))
MODULE = "sparsifiner_edge.demo.saliency"
DRAWN_KEEP = 0.1
"""Share of keys in the drawn layer, where nothing is merged."""
LAYER = 8
"""The layer whose selection is drawn: late enough to be semantic, early enough to differ between queries."""
DRAWN = (2, 0, 1)
"""Of the development photographs."""
RESULT, PAGE, CALIBRATION, STUDENT = "result.json", "report.html", "calibration", "student"
STEPS = 4 + 3 * len(SETTINGS)


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
    calibration, student = output / CALIBRATION, output / STUDENT
    calibration.mkdir(parents=True, exist_ok=True)
    for path in split.calibration():
        shutil.copyfile(path, calibration / path.name)
    done = itertools.count()

    def stage(name: str) -> None:
        progress(name, next(done), STEPS)

    stage("sparsify")
    source = f"{MODULE}:saliency"
    sparsify(source, student, img_size=SIZE, keep=DRAWN_KEEP, cells=CELLS, merge=SETTINGS[-1].merge,
             calibrate=calibration)  # fmt: skip
    stage("export dense")
    dense = export_bundle(source, output / "dense", img_size=SIZE)
    rows = {setting.name: _one(setting, output, dense, stage) for setting in SETTINGS}
    stage("draw")
    photographs = [split.development()[number] for number in DRAWN]
    sides = [Drawn(row.bundle, name, row.figures.sparse_p50_ms) for name, row in rows.items()]
    slow = next(iter(rows.values())).figures.dense_p50_ms
    draw_maps(Drawn(dense, "dense", slow), sides, photographs, OUTPUT, output / "maps.png")
    unmerged = load_student(student, merge=(), trust=[MODULE])
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


def _one(setting: Setting, output: Path, dense: Path, stage: Callable[[str], None]) -> _Row:
    stage(f"{setting.name}: export")
    bundle = export_bundle(
        output / STUDENT, output / setting.folder, keep=setting.keep, merge=setting.merge, trust=[MODULE]
    )
    stage(f"{setting.name}: evaluate")
    task = evaluate_student(bundle, split.development(), against=dense, metric="task")
    stage(f"{setting.name}: profile")
    # What the table shows, and no more: neither time per layer nor power.
    profile = profile_bundle(bundle, against=dense, seconds=8.0, min_queries=MIN_BLOCKS, layers=False, power=False)
    assert isinstance(task, TaskResult)
    return _Row(bundle, task, profile, _figures(task, profile.statistics, open_bundle(bundle).manifest))


def _result(rows: dict[str, _Row]) -> DemoResult:
    first = next(iter(rows.values()))
    verdicts = [(name, row.profile.statistics.comparison) for name, row in rows.items()]
    method = DemoMethod(
        kernels=first.profile.method.runtime["subject"].kernels,
        verdicts=[f"{name}: {found.sentence}" for name, found in verdicts if found is not None],
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
