"""Real weights, real photographs, no training: what `benchmarks/fidelity.py` reports at 518 px, guarded at 224 px."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.numpy

from sparsifiner_edge.demo import material, split
from sparsifiner_edge.sparse.student import sparsify
from tests.plain import evaluate_student

pytestmark = pytest.mark.everything


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "dinov2.safetensors"
    safetensors.numpy.save_file(material.dinov2_state(), path)
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    for path in split.images("calibration"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_untrained_fidelity(weights: Path, calibration: Path, tmp_path: Path) -> None:
    def patches(name: str, **options: object) -> float:
        student = sparsify(
            material.DINOV2, tmp_path / name, weights=weights, img_size=224, keep=0.25, cells=16, **options
        )  # fmt: skip
        result = evaluate_student(student, split.images("development"))
        assert result["statistics"]["features_cosine"]["mean"]["value"] > 0.98
        return float(result["statistics"]["patches_cosine"]["mean"]["value"])

    calibrated = patches("calibrated", calibrate=calibration)
    from_weights = patches("from_weights")
    assert calibrated >= 0.988
    assert calibrated > from_weights + 0.001
