"""Evaluation against the dense teacher, explanation, and running on stills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.camera.service import run_images
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.outcomes import ScoresResult
from sparsifiner_edge.results import check_result
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.sparse.student import save_student
from tests.models import student, vit
from tests.once import Once
from tests.plain import evaluate_student


@pytest.fixture(scope="module")
def made(once: Once) -> dict[str, Path]:
    """A student, its bundle, its dense teacher as weights and as bundle, and four images."""

    def make(folder: Path) -> None:
        save_file(vit().state_dict(), folder / "weights.safetensors")
        (folder / "pictures").mkdir()
        for number, image in enumerate(smooth_images(200, 4)):
            Image.fromarray(image).save(folder / "pictures" / f"{number}.png")
        save_student(student(), folder / "student")
        export_bundle(folder / "student", folder / "bundle", tokens=True)
        export_bundle("test_vit", folder / "dense", weights=folder / "weights.safetensors", tokens=True)

    folder = once("evaluate", make)
    names = {name: folder / name for name in ("student", "bundle", "dense", "pictures")}
    return names | {"weights": folder / "weights.safetensors"}


def means(result: dict[str, Any]) -> dict[str, float]:
    check_result(result, "test", ScoresResult)
    return {name: found["mean"]["value"] for name, found in result["statistics"].items()}


def test_student_and_bundle_agree_however_the_teacher_is_given(made: dict[str, Path]) -> None:
    results = [
        evaluate_student(made["student"], made["pictures"]),
        evaluate_student(made["student"], made["pictures"], against="test_vit", weights=made["weights"]),
        evaluate_student(made["bundle"], made["pictures"], against="test_vit", weights=made["weights"]),
        evaluate_student(made["bundle"], made["pictures"], against=made["dense"]),
    ]
    for result in results:
        assert result["statistics"]["patches_cosine"]["images"] == 4
        assert means(result) == pytest.approx(means(results[0]), abs=1e-3)
    assert 0.5 < means(results[0])["patches_cosine"] < 0.99999
    assert results[3]["method"]["runtime"]["subject"]["kernels"].startswith("native, ")
    assert results[3]["method"]["runtime"]["teacher"]["kernels"] == "none (standard operators)"


def test_a_model_against_itself_is_one(made: dict[str, Path]) -> None:
    result = evaluate_student(made["dense"], made["pictures"], against="test_vit", weights=made["weights"])
    assert means(result) == pytest.approx({"features_cosine": 1, "patches_cosine": 1}, abs=1e-6)


def test_rectangles(made: dict[str, Path], tmp_path: Path) -> None:
    size, weights = (96, 160), tmp_path / "w.safetensors"
    one = student(img_size=size)
    save_student(one, tmp_path / "student")
    save_file(vit(img_size=size).state_dict(), weights)
    bundle = export_bundle(tmp_path / "student", tmp_path / "bundle", tokens=True)
    own = evaluate_student(tmp_path / "student", made["pictures"])
    other = evaluate_student(bundle, made["pictures"], against="test_vit", weights=weights)
    assert own["method"]["preprocessing"] == other["method"]["preprocessing"]
    assert own["method"]["preprocessing"] == "centre rectangle, bicubic to 96x160 px"
    assert means(other) == pytest.approx(means(own), abs=1e-3)
    assert 0.5 < means(own)["patches_cosine"] < 0.99999
    with pytest.raises(ConfigError, match="The subject takes 96x160 px, the teacher 160 px"):
        evaluate_student(bundle, made["pictures"], against=made["dense"])
    with Model(bundle) as model:
        (record,) = run_images(model, made["pictures"] / "2.png")
    with Image.open(made["pictures"] / "2.png") as image:  # 200 x 200: the middle 120 rows are as the model is shaped
        middle = image.crop((0, 40, 200, 160)).resize((160, 96), Image.Resampling.BICUBIC)
    with open_session(bundle) as session:
        logits = session.infer({"image": np.asarray(middle)[None]})["logits"][0]
    assert record.top is not None
    assert record.top[0].number == logits.argmax()
    assert record.top[0].probability == pytest.approx(np.exp(logits.max()) / np.exp(logits).sum(), abs=1e-4)
