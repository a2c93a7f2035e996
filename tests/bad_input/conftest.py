"""What is made wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Outcome, call, snapshot
from tests.models import TINY
from tests.tiny import make_bundle

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def sparsify(tmp_path: Path, tiny_weights: Path, capsys: Capsys) -> Callable[..., Outcome]:
    """`sparsify` in this process; afterwards there is no output, and nothing else beside it."""

    def run(*arguments: Any, model: str = TINY, weights: Path = tiny_weights) -> Outcome:
        target = tmp_path / "target"
        target.mkdir()
        outcome = call(capsys, "sparsify", model, "--weights", weights, "-o", target / "student", *arguments)
        assert snapshot(target) == {}
        return outcome

    return run


@pytest.fixture
def student(tmp_path: Path, tiny_student: Path) -> Path:
    return Path(shutil.copytree(tiny_student, tmp_path / "student"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle", preprocessing={"size": 4}, tokens={"prefix": 1})
