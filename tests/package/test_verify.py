"""`bundle verify`: what passes, each check failing alone, and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsifiner_edge.bundle.sign import sign_bundle
from sparsifiner_edge.bundle.store import bundle_hash
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.ops.schema import VERSION
from sparsifiner_edge.runtime.verify import verify_bundle
from tests.commands import assert_refused, call
from tests.package.reseal import reseal

NAMES = ["files", "signature", "model", "inputs, outputs", "operators", "engines", "golden pair"]


def failed(folder: Path) -> dict[str, str]:
    result = verify_bundle(folder)
    found = {check.name: check.details for check in result.checks if not check.passed}
    assert result.passed is (not found)
    names = [check.name for check in result.checks]
    assert names == (NAMES[:3] if "model" in found else NAMES)  # Nothing is asked of a file that is no valid ONNX.
    return found


def test_real_bundles_pass(tiny_bundle: Path, dynamic_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(dynamic_bundle) == {}
    outcome = call(capsys, "bundle", "verify", tiny_bundle)
    assert (outcome.code, outcome.err) == (0, "")
    assert all(f" {name} " in outcome.out for name in NAMES)
    result = json.loads(call(capsys, "bundle", "verify", tiny_bundle, "--kernels", "portable", "--json").out)
    assert (result["passed"], result["hash"]) == (True, bundle_hash(tiny_bundle))
    assert "logits" in result["checks"][-1]["details"]


def other_operator_version(model: Any) -> None:
    next(entry for entry in model.opset_import if entry.domain == "sparsifiner").version = VERSION + 1


@pytest.mark.parametrize(
    ("change", "check", "said"),
    [
        (other_operator_version, "operators", f"of version [{VERSION + 1}]"),
        (lambda m: m.opset_import.add(domain="com.example", version=1), "model", "foreign domains: com.example"),
        ({"ops": []}, "operators", "the manifest says []"),
        ({"outputs": []}, "inputs, outputs", "outputs: manifest and model differ in logits float32 [1, 10]"),
        ({"inputs": []}, "inputs, outputs", "inputs: manifest and model differ in image uint8 [1, 160, 160, 3]"),
        ("in another order", "inputs, outputs", "their order"),
    ],
)
def test_manifest_and_model_differ(
    change: Any, check: str, said: str, tiny_bundle: Path, altered: Callable[..., Path]
) -> None:
    if isinstance(change, str):
        change = {"outputs": json.loads((tiny_bundle / "manifest.json").read_text())["outputs"][::-1]}
    found = failed(altered(tiny_bundle, **change) if isinstance(change, dict) else altered(tiny_bundle, change))
    assert list(found) == [check]
    assert said in found[check]


def test_other_weights_fail_golden(
    tiny_bundle: Path, altered: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def change(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "model.patch_embed.proj.weight")
        tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.2)).tobytes()

    folder = altered(tiny_bundle, change)
    outcome = call(capsys, "bundle", "verify", folder)
    assert outcome.code == 1
    assert "[0, " in outcome.out  # What is in brackets is no markup.
    assert outcome.err.startswith("error: 1 of 7 checks failed.\n  Do not use")
    assert "differs from golden by" in " ".join(outcome.out.replace("│", "").split())
    outcome = call(capsys, "bundle", "verify", folder, "--json")
    assert (outcome.code, json.loads(outcome.out)["passed"]) == (1, False)
    (folder / "notes.txt").write_text("mine")
    assert failed(folder)["files"] == "not in the manifest: notes.txt"


def test_signatures(
    tiny_bundle: Path, altered: Callable[..., Path], keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = altered(tiny_bundle)
    verify = ["bundle", "verify", folder, "--public-key", keys / "key.pub"]
    outcome = call(capsys, *verify)
    assert (outcome.code, "is not signed" in outcome.out) == (1, True)
    sign_bundle(folder, keys / "key.pem")
    assert call(capsys, *verify).code == 0


def test_unusable_bundles_are_no_failed_checks(
    tiny_bundle: Path, altered: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(call(capsys, "bundle", "verify", tmp_path / "none"), "is not a folder")
    assert_refused(call(capsys, "bundle", "verify", tiny_bundle, "--backend", "abacus"), "Unknown backend")
    folder = altered(tiny_bundle)
    with pytest.raises(ArtifactError, match=r"ops\[0\] is 1, not str"):
        verify_bundle(reseal(folder, ops=[1]))
    (folder / "model.onnx").write_bytes(b"\xff" * 100)
    reseal(folder, ops=[])
    assert_refused(call(capsys, "bundle", "verify", folder), "is not an ONNX file")
    assert_refused(call(capsys, "package", folder, "--for", "deepstream", "-o", tmp_path / "out"))
