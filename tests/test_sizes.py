"""Images of any shape: students and weights at other sizes, and what is exported of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity

from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import WeightsError
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.sparse.hosts.timm import load_model
from sparsifiner_edge.sparse.student import dense_twin, load_student, save_student
from tests.commands import manifest_of
from tests.models import TINY, images, student, vit

FULL = SparsityConfig(keep=0.999, cells=4, channels=8)
"""So little left out that the result is nearly dense, through the sparse path."""
LONG = (64, 400)
"""4 x 25 patches: as many as the 10 x 10 that timm knows of its own weights."""


def test_a_rectangle_survives_the_disk(tmp_path: Path) -> None:
    made = student(img_size=LONG)
    save_student(made, tmp_path / "student")
    save_student(student(), tmp_path / "square")
    sizes = [json.loads((tmp_path / name / "config.json").read_text())["img_size"] for name in ("student", "square")]
    assert sizes == [[64, 400], 160]
    again = load_student(tmp_path / "student")
    assert (again.img_size, again.model.patch_embed.grid_size) == (LONG, (4, 25))
    x = images(made.model)
    with torch.no_grad():
        torch.testing.assert_close(again.model(x), made.model(x), rtol=0, atol=0)
        torch.testing.assert_close(dense_twin(again).model(x), vit(img_size=LONG)(x), rtol=0, atol=0)


def positions(size: ImageSize, new: ImageSize, **options: Any) -> torch.Tensor:
    """A model's position embedding at another size, as timm gives it to a model that it knows the grid of."""
    model = vit(img_size=size, **options)
    model.set_input_size(img_size=height_width(new))
    return model.pos_embed.detach()


@pytest.mark.parametrize("size", [(400, 64), 160, 208, (160, 96)])
def test_a_rectangle_at_another_size(size: ImageSize, tmp_path: Path) -> None:
    save_student(student(img_size=LONG, sparsity=FULL), tmp_path / "student")
    found = load_student(tmp_path / "student", img_size=size)
    assert found.img_size == size
    torch.testing.assert_close(found.model.pos_embed.detach(), positions(LONG, size))
    with torch.no_grad():
        x = images(found.model)
        got, expected = found.model.forward_features(x), dense_twin(found).model.forward_features(x)
    assert cosine_similarity(got, expected, dim=-1).min() > 0.999


@pytest.mark.parametrize("size", [LONG, (400, 64), (96, 160), 208, 160])
def test_weights_of_a_square_in_any_shape(size: ImageSize, tiny_weights: Path) -> None:
    found = load_model(TINY, tiny_weights, size).pos_embed.detach()
    torch.testing.assert_close(found, positions(160, size, num_classes=10))


def test_weights_of_a_rectangle_fit_that_rectangle_alone(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_file(vit(img_size=(96, 160)).state_dict(), weights)
    assert torch.equal(load_model(TINY, weights, (96, 160)).pos_embed, vit(img_size=(96, 160)).pos_embed)
    with pytest.raises(WeightsError, match="does not fit this model"):
        load_model(TINY, weights, 160)


@pytest.mark.everything
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_rectangle_in_other_precisions(precision: str, tiny_student: Path, tmp_path: Path, pictures: Path) -> None:
    more = {"calibrate": pictures} if precision == "int8" else {}
    made = export_bundle(tiny_student, tmp_path / "b", precision=precision, img_size=(96, 160), batch="dynamic", **more)
    manifest = manifest_of(made)
    assert (manifest["precision"], manifest["inputs"][0]["shape"]) == (precision, ["batch", 96, 160, 3])
    with open_session(made) as session:
        check_golden(session, open_bundle(made))


def test_both_forms_of_a_square_give_the_same_images() -> None:
    assert np.array_equal(smooth_images(48, 2, seed=3), smooth_images((48, 48), 2, seed=3))
    assert smooth_images((48, 80), 2).shape == (2, 48, 80, 3)
