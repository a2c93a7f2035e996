"""What is made wrong, and how."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape
from tests.commands import Outcome, call, snapshot
from tests.models import TINY
from tests.tiny import make_bundle

Capsys = pytest.CaptureFixture[str]


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


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
    shape = dataclasses.asdict(ModelShape(1, 1, 8, 8, 1, 15, 1))
    return make_bundle(tmp_path / "bundle", preprocessing={"size": 4}, shape=shape)


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """A small bundle whose manifest says what a sparse ViT-S costs."""
    shape, sparsity = ModelShape(12, 6, 384, 1536, 1, 256, 14), SparsityConfig(keep=0.1, cells=16)
    return make_bundle(
        tmp_path / "counted", batch=1, shape=dataclasses.asdict(shape), sparsity=sparsity.to_dict(),
        ops=["sparsifiner::KeySelect"],
    )  # fmt: skip
