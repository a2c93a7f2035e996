"""Bundles of the smallest real model: fixed and dynamic batch, with and without classes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.once import Once
from tests.seal import reseal


@pytest.fixture(scope="session")
def dynamic_bundle(once: Once, feature_weights: Path) -> Path:
    """Features and tokens with dynamic batch; half of the tokens are pruned."""
    from sparsifiner_edge.sparse.student import sparsify
    from tests.flat import export_bundle
    from tests.models import TINY

    def make(folder: Path) -> None:
        student = sparsify(TINY, folder / "student", weights=feature_weights, background_tokens=4)
        export_bundle(student, folder / "bundle", batch="dynamic", token_keep=((2, 0.5),))

    return once("dynamic", make) / "bundle"


@pytest.fixture
def altered(tmp_path: Path) -> Callable[..., Path]:
    """Copy and change a bundle as someone who knows its format: hashes match again."""

    def alter(bundle: Path, model: Callable[[Any], None] | None = None, **changes: Any) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(bundle, folder)
        if model is not None:
            content = onnx.load(folder / "model.onnx")
            model(content)
            onnx.save(content, folder / "model.onnx")
        return reseal(folder, **changes)

    return alter
