"""A whole search on a small model: what is written, gone on from, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sparsifiner_edge as se
from sparsifiner_edge.artifacts import kind_of
from sparsifiner_edge.config import parse_merge
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.search.plan import LayerPlan
from sparsifiner_edge.search.trial import Trial
from sparsifiner_edge.sparse.student import load_student
from tests.commands import process
from tests.models import TINY

ENGINE: dict[str, Any] = {"backends": ["onnxruntime"], "precisions": ["fp32"]}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten smooth images."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(10):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((160, 160), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path, photographs: Path) -> Path:
    """The folder of a search by fidelity."""
    output = tmp_path_factory.mktemp("search") / "found"
    se.search_model(TINY, photographs, output, at_least=0.97, weights=tiny_weights, **ENGINE)
    return output


@pytest.mark.slow
@pytest.mark.long
def test_the_answer_is_what_was_asked_for(found: Path, photographs: Path, tiny_weights: Path) -> None:
    front = json.loads((found / "front.json").read_text())
    answer, check = front["statistics"]["answer"], front["statistics"]["check"]
    assert answer["fidelity"] >= 0.97
    assert check["images"] == 2
    assert kind_of(found / "bundle") == "bundle"
    assert kind_of(found / "student") == "student"
    with Image.open(found / "front.png") as picture:
        assert picture.width == 800
    images = front["method"]["images"]
    assert not set(images["searched"]) & set(images["checked"])
    assert len(images["searched"]) == 8
    # What its own command says of it, on the images that it was judged by.
    judged = [photographs / name for name in images["tried"]]
    again = se.evaluate_student(found / "bundle", judged, against=TINY, weights=tiny_weights)
    assert again.statistics.patches_cosine.mean.value == pytest.approx(answer["fidelity"], abs=1e-4)
    again = se.evaluate_student(found / "student", judged, against=TINY, weights=tiny_weights)
    assert again.statistics.patches_cosine.mean.value == pytest.approx(answer["fidelity"], abs=1e-3)
    assert load_student(found / "student").sparsity.merge == parse_merge(answer["merge"])
    points = front["statistics"]["points"]
    assert any(point["on_front"] for point in points)
    assert all(0 < point["fidelity"] <= 1 for point in points)
    assert len(front["samples"]["check"]) == 2


@pytest.mark.slow
@pytest.mark.long
def test_a_search_goes_on_and_another_is_refused(
    found: Path, tmp_path: Path, photographs: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(found, folder)
    seen = json.loads((folder / "search.json").read_text())["seen"]
    measured_now: list[LayerPlan] = []
    distances = Trial.distances
    monkeypatch.setattr(Trial, "distances", lambda self, plan: measured_now.append(plan) or distances(self, plan))
    result = se.search_model(TINY, photographs, folder, at_most_ms=1e5, weights=tiny_weights, **ENGINE)
    known = {LayerPlan(tuple(row["merge"]), tuple(row["keep"])) for row in seen}
    assert not known & set(measured_now)
    assert result.statistics.answer.fidelity > 0.97
    with pytest.raises(ConfigError, match="holds another search"):
        se.search_model(TINY, photographs, folder, at_least=0.9, metric="class", weights=tiny_weights, **ENGINE)


@pytest.mark.slow
@pytest.mark.long
def test_a_bound_that_nothing_meets_names_the_nearest(tmp_path: Path, photographs: Path, tiny_weights: Path) -> None:
    done = process(
        "search", TINY, "--weights", tiny_weights, "--data", photographs, "--at-most-ms", "0.0001", "--backend",
        "onnxruntime", "--precision", "fp32", "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 1
    assert "no plan meets 0.0001 ms; the nearest has" in done.err
    assert not (tmp_path / "out" / "bundle").exists()
    assert "unavailable" in json.loads((tmp_path / "out" / "front.json").read_text())["statistics"]["answer"]


def test_what_is_refused(tmp_path: Path, photographs: Path, tiny_weights: Path, pictures: Path) -> None:
    given: dict[str, Any] = {"weights": tiny_weights, **ENGINE}
    out = tmp_path / "out"
    for words, options in (
        ("one bound", {}),
        ("one bound", {"at_least": 0.9, "at_most_ms": 3.0}),
        ("between 0 and 1", {"at_least": 98.0}),
        ("more than 0", {"at_most_ms": 0.0}),
        ("metric is", {"at_least": 0.9, "metric": "top1"}),
        ("precision is", {"at_least": 0.9, "precisions": ["fp16"]}),
        ("does not run on the processor", {"at_least": 0.9, "backends": ["tensorrt-rtx"]}),
    ):
        with pytest.raises(ConfigError, match=words):
            se.search_model(TINY, photographs, out, **(given | options))
    with pytest.raises(ConfigError, match="has 3 images"):
        se.search_model(TINY, pictures, out, at_least=0.9, **given)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        se.search_model(TINY, photographs, out, at_least=0.9, **given)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
