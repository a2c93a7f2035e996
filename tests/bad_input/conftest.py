"""The smallest of bundles, for tests that damage it or run it wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    shape = {"depth": 1, "heads": 1, "width": 8, "hidden": 8, "prefix": 1, "patches": 15, "patch": 1}
    return make_bundle(tmp_path / "bundle", preprocessing={"size": 4}, shape=shape)
