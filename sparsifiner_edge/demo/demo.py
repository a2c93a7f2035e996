"""The demonstration: real weights and photographs, dense beside sparse, untrained; table, result and images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import msgspec
import safetensors.numpy
from msgspec.structs import replace

from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.demo import material
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.evaluate.cosine import CosineMethod, CosineResult
from sparsifiner_edge.evaluate.evaluate import evaluate_student
from sparsifiner_edge.evaluate.explain import draw
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.files import write_bytes
from sparsifiner_edge.profiles.figures import Method, ProfileResult, Samples
from sparsifiner_edge.profiles.profile import profile_bundle
from sparsifiner_edge.profiles.rules import MIN_BLOCKS
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Declared, Estimate, read_result, write_result
from sparsifiner_edge.sparse.student import load_student, sparsify


class Setting(NamedTuple):
    """One row of the demonstration."""

    size: int
    keep: float
    cells: int

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.size} px, keep {self.keep:.2f}, {self.cells} cells"


class _Row(NamedTuple):
    """What was measured of one setting; `manifest` is the sparse bundle's."""

    fidelity: CosineResult
    profile: ProfileResult
    manifest: Manifest


class RowFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one setting."""

    features_cosine: float
    patches_cosine: float
    keys_read_share: float
    attention_macs_share: float
    dense_p50_ms: float
    sparse_p50_ms: float
    speed_ratio: Estimate
    verdict: str


class RowSamples(msgspec.Struct, frozen=True):
    """Of one setting."""

    fidelity: dict[str, list[float]]
    profile: Samples


class DemoMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was measured; fidelity and profile by setting."""

    kernels: str | Unavailable
    verdicts: list[str]
    fidelity: dict[str, CosineMethod]
    profile: dict[str, Method]
    training: str


class DemoResult(Declared, frozen=True):
    """Of kind "demo", by setting."""

    method: DemoMethod
    samples: dict[str, RowSamples]
    statistics: dict[str, RowFigures]


SETTINGS = (Setting(224, 0.25, 16), Setting(518, 0.10, 25))
LAYER = 8
"""The layer whose selection is drawn: late enough to be semantic, early enough to differ between queries."""
RESULT = "result.json"
_STAGES = ("sparsify", "export sparse", "export dense", "evaluate", "profile", "draw")
STEPS = len(SETTINGS) * len(_STAGES)


def run_demo(output: Path, progress: Progress, seconds: float = 8.0) -> DemoResult:
    """Run the demonstration into `output`; an earlier demonstration there is replaced.

    Args:
        progress: see `Progress`; counts steps.
        seconds: measured per bundle.

    Returns:
        A result of kind "demo", also written to `output`/result.json.

    Raises:
        ArtifactError: `output` holds something else.
        MissingExtraError: a package of the extra `demo` is not installed.
    """
    _require_ours(output)
    output.mkdir(parents=True, exist_ok=True)
    weights = output / "dinov2_vits14.safetensors"
    progress("unpacking weights", 0, STEPS)
    write_bytes(weights, safetensors.numpy.save(material.dinov2_state()))
    images = output / "calibration"
    _gather(material.calibration_images(), images)
    rows: dict[str, _Row] = {}
    for number, setting in enumerate(SETTINGS):
        rows[setting.name] = _one(setting, output, weights, images, number * len(_STAGES), progress, seconds)
    result = _result(rows)
    write_result(output / RESULT, result)
    return result


def _require_ours(output: Path) -> None:
    if not output.exists() and not output.is_symlink():
        return
    ours = {RESULT, "calibration", "dinov2_vits14.safetensors"}
    if not output.is_dir() or (any(output.iterdir()) and not ours & {p.name for p in output.iterdir()}):
        raise ArtifactError(f"{output} exists and holds no demonstration; it is left untouched.", "Choose another -o.")
    if (output / RESULT).exists():
        read_result(output / RESULT)
        (output / RESULT).unlink()


def _gather(images: list[Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in images:
        shutil.copyfile(path, folder / path.name)


def _one(
    setting: Setting, output: Path, weights: Path, images: Path, done: int, progress: Progress, seconds: float
) -> _Row:
    def stage(number: int) -> None:
        progress(f"{setting.size} px: {_STAGES[number]}", done + number, STEPS)

    stage(0)
    student = output / f"student_{setting.size}"
    sparsify(
        material.DINOV2,
        student,
        weights=weights,
        img_size=setting.size,
        keep=setting.keep,
        cells=setting.cells,
        calibrate=images,
    )
    stage(1)
    sparse = export_bundle(student, output / f"sparse_{setting.size}")
    stage(2)
    dense = export_bundle(material.DINOV2, output / f"dense_{setting.size}", weights=weights, img_size=setting.size)
    stage(3)
    fidelity = evaluate_student(sparse, material.photographs(), against=dense)
    stage(4)
    # What the table shows, and no more: neither time per layer nor power.
    profile = profile_bundle(sparse, against=dense, seconds=seconds, min_queries=MIN_BLOCKS, layers=False, power=False)
    stage(5)
    draw(load_student(student), material.photographs()[2], LAYER, output / f"attention_{setting.size}.png")
    progress(f"{setting.size} px: done", done + len(_STAGES), STEPS)
    assert isinstance(fidelity, CosineResult)
    return _Row(fidelity, profile, open_bundle(sparse).manifest)


def _result(rows: dict[str, _Row]) -> DemoResult:
    first = next(iter(rows.values()))
    verdicts = [(name, row.profile.statistics.comparison) for name, row in rows.items()]
    method = DemoMethod(
        kernels=first.profile.method.runtime["subject"].kernels,
        verdicts=[f"{name}: {found.sentence}" for name, found in verdicts if found is not None],
        fidelity={name: row.fidelity.method for name, row in rows.items()},
        profile={name: row.profile.method for name, row in rows.items()},
        training="none; the predictor is calibrated on images that are not among the eight",
    )
    samples = {name: RowSamples(row.fidelity.samples, row.profile.samples) for name, row in rows.items()}
    subjects = [replace(subject, setting=name) for name, row in rows.items() for subject in row.profile.subjects]
    return DemoResult("demo", subjects, method, samples, {name: _figures(row) for name, row in rows.items()})


def _figures(row: _Row) -> RowFigures:
    fidelity, profile, manifest = row.fidelity.statistics, row.profile.statistics, row.manifest
    costs, dense, sparsity, shape = manifest.costs, manifest.dense_costs, manifest.sparsity, manifest.shape
    assert fidelity.patches_cosine is not None
    assert profile.against is not None
    assert profile.comparison is not None
    assert sparsity is not None
    assert shape is not None
    core = costs["attention_macs"] + costs["cells_macs"] + costs["predictor_macs"]
    return RowFigures(
        features_cosine=fidelity.features_cosine.mean.value,
        patches_cosine=fidelity.patches_cosine.mean.value,
        keys_read_share=sparsity.keep + sparsity.cells / shape.patches,
        attention_macs_share=core / dense["attention_macs"],
        dense_p50_ms=profile.against.latency_ms.p50.value,
        sparse_p50_ms=profile.subject.latency_ms.p50.value,
        speed_ratio=profile.comparison.ratio,
        verdict=profile.comparison.verdict,
    )
