"""The demonstration: real weights and photographs, the fastest at a fidelity beside dense; result and images."""

from __future__ import annotations

import itertools
import shutil
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
from sparsifiner_edge.evaluate.explain import explain_image
from sparsifiner_edge.evaluate.scores import ScoresMethod, ScoresResult
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.images import evenly
from sparsifiner_edge.profiles.figures import Method, ProfileResult, Samples, Statistics
from sparsifiner_edge.profiles.profile import profile_bundle
from sparsifiner_edge.profiles.rules import MIN_BLOCKS
from sparsifiner_edge.progress import Progress, prefixed
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report import write_report
from sparsifiner_edge.report.explain_page import write_overview
from sparsifiner_edge.results import Declared, Estimate, read_result, write_result
from sparsifiner_edge.search.front import Candidate
from sparsifiner_edge.search.search import BUNDLE, FRONT, STUDENT, search_model
from sparsifiner_edge.sparse.student import load_student


class _Row(NamedTuple):
    """What was measured of one setting."""

    name: str
    bundle: Path
    task: ScoresResult
    profile: ProfileResult
    figures: RowFigures


class RowFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one setting; merge, keep and fidelity as the search found them; error and overlap (IoU) are of the map to the
    dense model's, shares of the dense backbone's multiply-accumulates, tokens those that leave the last layer.
    """

    merge: str
    keep: str
    fidelity: float
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
    task: dict[str, ScoresMethod]
    profile: dict[str, Method]
    training: str


class DemoResult(Declared, frozen=True):
    """Of kind "demo", by setting."""

    method: DemoMethod
    samples: dict[str, RowSamples]
    statistics: dict[str, RowFigures]


SIZE, AT_LEAST = 518, 0.98
"""Of images, and of the fidelity asked for: cosine of the final patch tokens."""
BACKEND, PRECISION = "onnxruntime", "fp32"
"""What runs it: more of both would be searched for longer than a demonstration may take."""
MINUTES, FEWEST = 8.0, 5
"""Of the search, which may look at one image for each of them; at least at so many."""
MODULE = "sparsifiner_edge.demo.saliency"
DRAWN = (2, 0, 1)
"""Of the development photographs."""
RESULT, PAGE, IMAGES, FOUND, SPARSE = "result.json", "report.html", "images", "found", "sparse"
STEPS = 5


def run_demo(output: Path, progress: Progress, minutes: float = MINUTES) -> DemoResult:
    """Run the demonstration into `output`; one that ended or was stopped there is replaced.

    Args:
        progress: see `Progress`; counts steps, and tells of those of the search.
        minutes: of the search; see `search_model`. Fewer of them look at fewer images.

    Returns:
        A result of kind "demo", also written to `output`/result.json; pictures and a page lie beside it.

    Raises:
        ArtifactError: `output` holds something else.
        GateError: nothing that fast is found.
        MissingExtraError: a package of the extra `demo` is not installed.
    """
    _require_demonstration(output)
    images = output / IMAGES
    images.mkdir(parents=True, exist_ok=True)
    searched = evenly(split.calibration(), max(FEWEST, round(minutes)))
    for path in split.calibration():
        if path in searched:
            shutil.copyfile(path, images / path.name)
        else:  # One that was stopped may have had more time.
            (images / path.name).unlink(missing_ok=True)
    source, done = f"{MODULE}:saliency", itertools.count()

    def stage(name: str) -> None:
        progress(name, next(done), STEPS)

    found = search_model(
        source, images, output / FOUND, at_least=AT_LEAST, img_size=SIZE, backends=[BACKEND], computes=["auto"],
        precisions=[PRECISION], minutes=minutes, trust=[MODULE], progress=prefixed(progress, "search: "),
    )  # fmt: skip
    answer = found.statistics.answer
    if isinstance(answer, Unavailable):
        raise GateError(f"Searched for {AT_LEAST}: {answer.why}.", "Try it on an idle machine.")
    stage("export dense")
    dense = export_bundle(source, output / "dense", img_size=SIZE)
    stage("evaluate")
    bundle = output / SPARSE
    if not bundle.is_symlink():
        bundle.symlink_to(Path(FOUND) / BUNDLE)
    task = evaluate_student(bundle, split.development(), against=dense, metric="task")
    stage("profile")
    # What the table shows, and no more: neither time per layer nor power.
    profile = profile_bundle(bundle, against=dense, seconds=8.0, min_queries=MIN_BLOCKS, layers=False, power=False)
    assert isinstance(task, ScoresResult)
    figures = _figures(answer, task, profile.statistics, open_bundle(bundle).manifest)
    row = _Row(f"the fastest at {AT_LEAST}", bundle, task, profile, figures)
    stage("draw")
    photographs = [split.development()[number] for number in DRAWN]
    draw_maps(
        Drawn(dense, "dense", row.figures.dense_p50_ms), [Drawn(row.bundle, row.name, row.figures.sparse_p50_ms)],
        photographs, OUTPUT, output / "maps.png",
    )  # fmt: skip
    student = load_student(output / FOUND / STUDENT, trust=[MODULE])
    write_overview(explain_image(student, photographs[0], judge=False), output / "what-was-read.png")
    stage("write the page")
    result = _result(row)
    write_result(output / RESULT, result)
    _write_page(output, row)
    progress("done", STEPS, STEPS)
    return result


def _write_page(output: Path, row: _Row) -> None:
    results = [output / FOUND / FRONT]
    for kind, result in (("task", row.task), ("speed", row.profile)):
        results.append(output / f"{kind}.json")
        write_result(results[-1], result)
    write_report(results, output / PAGE, images=False, pictures=[output / "maps.png", output / "what-was-read.png"])


def _require_demonstration(output: Path) -> None:
    """Refuse a folder that holds something else; drop what an earlier demonstration left."""
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / RESULT).exists() and not _was_stopped(output)):
        raise ArtifactError(f"{output} exists and holds no demonstration; it is left untouched.", "Choose another -o.")
    if (output / RESULT).exists():
        read_result(output / RESULT)
        (output / RESULT).unlink()
    shutil.rmtree(output / FOUND, ignore_errors=True)


def _was_stopped(output: Path) -> bool:
    """Whether its images are those of a demonstration, and nobody's own."""
    known, images = {path.name for path in split.calibration()}, output / IMAGES
    return images.is_dir() and all(path.name in known for path in images.iterdir())


def _result(row: _Row) -> DemoResult:
    name, profile, verdict = row.name, row.profile, row.profile.statistics.comparison
    method = DemoMethod(
        kernels=profile.method.runtime["subject"].kernels,
        verdicts=[] if verdict is None else [f"{name}: {verdict.sentence}"],
        task={name: row.task.method},
        profile={name: profile.method},
        training="none; searched and calibrated on images that are not among the eight",
    )
    subjects = [replace(subject, setting=name) for subject in profile.subjects]
    samples = {name: RowSamples(row.task.samples, profile.samples)}
    return DemoResult("demo", subjects, method, samples, {name: row.figures})


def _figures(answer: Candidate, task: ScoresResult, profile: Statistics, manifest: Manifest) -> RowFigures:
    costs, dense, shape = manifest.costs, manifest.dense_costs, manifest.shape
    assert profile.against is not None
    assert profile.comparison is not None
    assert shape is not None
    core = costs["attention_macs"] + costs["cells_macs"] + costs["predictor_macs"]
    return RowFigures(
        merge=answer.merge,
        keep=answer.keep,
        fidelity=answer.fidelity,
        error=task.statistics["error"].mean.value,
        iou=task.statistics["iou"].mean.value,
        tokens_left_share=1 - sum(manifest.plan.merge if manifest.plan else ()) / shape.patches,
        attention_macs_share=core / dense["attention_macs"],
        macs_share=costs["total_macs"] / dense["total_macs"],
        dense_p50_ms=profile.against.latency_ms.p50.value,
        sparse_p50_ms=profile.subject.latency_ms.p50.value,
        speed_ratio=profile.comparison.ratio,
        verdict=profile.comparison.verdict,
    )
