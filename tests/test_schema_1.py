"""What earlier versions wrote still loads: tests/data/schema_1 was made by the last version of bundle schema 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sparsifiner_edge.artifacts import BUNDLE_FILE, STUDENT_FILE, WEIGHTS_FILE, sha256
from sparsifiner_edge.bundle.manifest import parse_manifest
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.evaluate.scores import ScoresResult
from sparsifiner_edge.profiles.estimate import EstimateResult
from sparsifiner_edge.profiles.figures import ProfileResult
from sparsifiner_edge.profiles.sweep import SweepResult
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, read_result
from sparsifiner_edge.sparse.student import load_student, save_student
from tests.commands import assert_refused, call
from tests.models import TINY, images, student, vit
from tests.plain import estimate_bundle
from tests.tiny import make_bundle

OLD = Path(__file__).parent / "data" / "schema_1"
FORMS: dict[str, type[Result]] = {
    "profile": ProfileResult,
    "comparison": ProfileResult,
    "sweep": SweepResult,
    "estimate": EstimateResult,
    "evaluation": ScoresResult,
}
RESULTS = sorted((OLD / "results").glob("*.json"))
Capsys = pytest.CaptureFixture[str]


def test_a_signed_bundle(capsys: Capsys, pictures: Path, tmp_path: Path) -> None:
    bundle, key = OLD / "bundle", OLD / "key.pub"
    outcome = call(capsys, "bundle", "verify", bundle, "--public-key", key, "--json")
    assert {check["name"]: check["passed"] for check in json.loads(outcome.out)["checks"]} == {
        "files": True, "signature": True, "model": True, "inputs, outputs": True, "operators": True,
        "metadata": False,  # The tests' small bundle has none, then as now.
        "engines": True, "golden pair": True,
    }  # fmt: skip
    outcome = call(capsys, "run", bundle, "--source", pictures, "--require-signature", key)
    assert outcome.code == 0, outcome.err
    assert len(outcome.out.splitlines()) == 3
    assert call(capsys, "profile", bundle, "--seconds", ".1", "-o", tmp_path / "result.json").code == 0


def test_a_manifest_of_a_real_export() -> None:
    path = OLD / BUNDLE_FILE
    manifest = parse_manifest(path.read_bytes(), path)
    assert (manifest.schema_version, manifest.name, manifest.precision, manifest.batch) == (1, TINY, "fp32", 1)
    assert manifest.sparsity is not None
    assert (manifest.sparsity.keep, manifest.sparsity.token_keep) == (0.25, ((3, 0.7),))
    assert [spec.name for spec in manifest.outputs] == ["logits", "features"]
    assert manifest.costs["total_macs"] < manifest.dense_costs["total_macs"]
    assert manifest.shape is None
    assert manifest.preprocessing is not None
    assert (manifest.preprocessing.size, manifest.preprocessing.resize) == (160, "centre square, bicubic")
    assert open_bundle(OLD / "bundle").image_size == 8


@pytest.mark.parametrize("entry", ["check", "retiled", "measured", "quantisation", "float16"])
def test_what_is_for_people_may_lack_anything_and_hold_more(entry: str, tmp_path: Path) -> None:
    more = {entry: {"of another version": [None]}, "boards": [{}], "provenance": {"teacher": {"x": 1}}}
    manifest = open_bundle(make_bundle(tmp_path / "b", preprocessing={"size": 4, "folded": {}}, **more)).manifest
    assert getattr(manifest, entry) is not None
    assert (manifest.boards[0].launches, manifest.provenance) == (0, {"teacher": {"x": 1}})
    with pytest.raises(ArtifactError, match=f"{entry} is 5, not dict"):
        open_bundle(make_bundle(tmp_path / "c", **{entry: 5}))


def test_what_needs_the_shape_says_so(tmp_path: Path, capsys: Capsys) -> None:
    bundle = Path(shutil.copytree(OLD / "bundle", tmp_path / "b"))
    assert open_bundle(bundle).manifest.schema_version == 1
    with pytest.raises(ArtifactError, match=r"shape is missing"):
        estimate_bundle(bundle, "t4")
    assert_refused(call(capsys, "estimate", bundle, "--board", "t4"), "shape is missing", "Export the bundle again")


GONE = {
    "memory_sources", "rewarm_queries", "window_queries", "window_medians_ms",
    "rss_after_load_bytes", "rss_after_first_inference_bytes",
    "minor_faults", "minor_faults_per_query", "involuntary_switches", "usage.swapped_bytes", "usage.seconds",
    "mlperf.percentile", "mlperf.confidence", "mlperf.seconds", "mlperf.queries",
    "layers_compared.queries", "layers_compared.profiled_ms",
    "sensor.notes", "memory_bytes.weights", "memory_bytes.layer", "memory_bytes.scores",
}  # fmt: skip
"""What results no longer hold."""


ADDED = {"rules": {"blocks": 20}}
"""What results have come to say since, where they say this: what held then without being written."""


def still_there(content: Any, parent: str = "") -> Any:
    if isinstance(content, dict):
        kept = {name: value for name, value in content.items() if not GONE & {name, f"{parent}.{name}"}}
        return ADDED.get(parent, {}) | {name: still_there(value, name) for name, value in kept.items()}
    return content


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results(path: Path, tmp_path: Path, capsys: Capsys) -> None:
    """Every figure that there still is has a place in the class of its kind, and is written back the same."""
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["kind"] == path.stem
    assert write_record(read_result(path)) == content
    assert write_record(read_result(path, FORMS[path.stem])) == still_there(content)
    outcome = call(capsys, "report", path, "-o", tmp_path / "page.html")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "page.html").stat().st_size > 9_000


def test_a_student(tmp_path: Path) -> None:
    """Its weights, which anyone can make, are not kept here."""
    config = json.loads((OLD / STUDENT_FILE).read_text())
    made = student(num_classes=10, sparsity=SparsityConfig.from_dict(config["sparsity"]))
    safetensors.torch.save_file(made.model.state_dict(), tmp_path / WEIGHTS_FILE)
    config["weights_sha256"] = sha256(tmp_path / WEIGHTS_FILE)
    (tmp_path / STUDENT_FILE).write_text(json.dumps(config))
    loaded = load_student(tmp_path)
    assert write_record(loaded.provenance) == config["provenance"]
    assert loaded.sparsity.to_dict() == config["sparsity"]
    assert loaded.img_size == 160
    save_student(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / STUDENT_FILE).read_text()) == config | {"host": "timm"}
    x = images(vit())
    assert torch.equal(loaded.model(x), made.model(x))
