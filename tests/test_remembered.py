"""What a bundle remembers of what it was found for, and what runs it then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sparsifiner_edge.bundle.manifest import FoundFor
from sparsifiner_edge.bundle.sign import require_signature, sign_bundle
from sparsifiner_edge.bundle.store import open_bundle, remember_execution
from sparsifiner_edge.errors import ArtifactError, ConfigError
from tests.commands import snapshot
from tests.made import plain
from tests.once import Once


@pytest.fixture
def bundle(once: Once, tmp_path: Path) -> Path:
    """Two classes, of 8 pixels."""
    return Path(shutil.copytree(once("two classes", lambda folder: plain(folder / "b")) / "b", tmp_path / "bundle"))


def test_a_bundle_remembers_and_a_signature_holds_no_longer(bundle: Path, keys: Path) -> None:
    sign_bundle(bundle, keys / "key.pem")
    before = open_bundle(bundle).manifest.files
    remember_execution(bundle, "onnxruntime")
    remember_execution(bundle, "openvino", "bf16")
    assert open_bundle(bundle).manifest.found_for == FoundFor("openvino", "bf16")
    assert open_bundle(bundle).manifest.files == before
    with pytest.raises(ArtifactError, match="was changed after it was signed"):
        require_signature(bundle, keys / "key.pub")


@pytest.mark.parametrize("wrong", [("openvino", "int1"), ("../evil", "auto"), ("", "auto"), ("a" * 65, "auto")])
def test_what_no_manifest_can_hold_is_not_remembered(wrong: tuple[str, str], bundle: Path) -> None:
    before = snapshot(bundle)
    with pytest.raises(ConfigError, match=r"Found for: (backend|precision) is"):
        remember_execution(bundle, *wrong)
    assert snapshot(bundle) == before
