"""Any module that contains a vision transformer, exported whole: named outputs, dense maps, sparse layers inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparsifiner_edge as se
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError
from sparsifiner_edge.export.deployed_model import DeployedModel
from sparsifiner_edge.export.sessions import file_runner
from sparsifiner_edge.images import Normalisation
from sparsifiner_edge.profiles.measure.layers import node_place
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.sparse.hosts import backbone_of
from tests.everything import first
from tests.hosts.hugging_face import MODELS, depth_anything, images, model
from tests.models import vit

SEEN: Any = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MERGED = {"keep": 0.4, "cells": 4, "channels": 8, "merge": 4}
OTHERS = [name for name in MODELS if name != "DINOv2"]


class Segmenter(nn.Module):
    """Pixels normalised by itself, intermediate layers of timm, two maps out."""

    def __init__(self, answer: str = "dict", **options: Any) -> None:
        super().__init__()
        self.encoder = vit(**options)
        self.decoder = nn.Sequential(nn.Conv2d(64, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 2, 16, 16))
        self.answer = answer

    def forward(self, pixels: Tensor) -> Any:
        early, late = self.encoder.forward_intermediates((pixels - 0.5) / 0.25, indices=[2, 5], intermediates_only=True)
        maps = self.decoder(late), early.mean(1, keepdim=True)
        return {"mask": maps[0], "heat": maps[1]} if self.answer == "dict" else maps


@pytest.mark.parametrize(
    ("name", "settings"),
    first([("DINOv2", MERGED), ("DINOv2", {}), ("SigLIP", {}), *((name, MERGED) for name in OTHERS)]),
)
def test_models_of_transformers(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    made = model(name)
    size = backbone_of(made).image_size
    if settings:
        se.sparsify_model(made, **settings)
    bundle = open_bundle(se.export_model(made, images(size), tmp_path / "bundle", normalise=SEEN))
    manifest = bundle.manifest
    assert [output.name for output in manifest.outputs] == ["features", "tokens"]
    assert manifest.shape is not None
    assert (manifest.shape.depth, manifest.shape.width, manifest.shape.heads) == (4, 64, 2)
    assert manifest.plan is not None
    assert manifest.plan.merge == ((4,) * 4 if settings else (0,) * 4)
    places = [node_place(node.name) for node in bundle.model().graph.node]
    assert {layer for layer, _, _ in places} == {None, 0, 1, 2, 3}
    assert {"projections", "mlp", "norms"} <= {kind for layer, kind, _ in places if layer == 3}
    with open_session(bundle.folder) as session:
        assert check_golden(session, bundle)


@pytest.mark.everything
def test_depth_anything(tmp_path: Path) -> None:
    made = depth_anything()
    x = images((140, 140), 1)
    se.sparsify_model(made, **MERGED)
    bundle = open_bundle(se.export_model(made, x, tmp_path / "bundle", normalise=SEEN))
    assert [(output.name, output.shape) for output in bundle.manifest.outputs] == [("predicted_depth", (1, 140, 140))]
    places = {node.name: node_place(node.name) for node in bundle.model().graph.node}
    assert {kind for layer, kind, _ in places.values() if layer is None} == {"decoder", "other"}
    assert any(name.startswith("decoder.neck.") for name in places)
    assert {layer for layer, _, _ in places.values()} == {None, 0, 1, 2, 3}
    pixels = np.random.default_rng(0).integers(0, 256, (1, 140, 140, 3), dtype=np.uint8)
    wanted = DeployedModel(made, Normalisation(*SEEN))(torch.from_numpy(pixels))[0].detach().numpy()
    np.testing.assert_allclose(file_runner(bundle.model())(pixels)["predicted_depth"], wanted, atol=1e-3)


@pytest.mark.parametrize("precision", first(["fp32", "fp16", "int8"]))
def test_a_users_decoder(tmp_path: Path, pictures: Path, precision: str) -> None:
    made = se.sparsify_model(Segmenter(), **MERGED)
    given = {"calibrate": pictures} if precision == "int8" else {}
    bundle = open_bundle(
        se.export_model(
            made, torch.zeros(1, 3, 160, 160), tmp_path / "bundle", normalise=False, precision=precision,
            **given,
        )
    )  # fmt: skip
    assert {output.name: output.shape for output in bundle.manifest.outputs} == {
        "mask": (1, 2, 160, 160), "heat": (1, 1, 10, 10),
    }  # fmt: skip
    assert bundle.manifest.name == "Segmenter"
    assert bundle.manifest.precision == precision
    with open_session(bundle.folder) as session:
        assert check_golden(session, bundle)


@pytest.mark.everything
@pytest.mark.parametrize("batch", ["dynamic", 2])
def test_batches_and_names(tmp_path: Path, batch: int | str) -> None:
    made = Segmenter("tuple")
    where = tmp_path / "bundle"
    example = torch.zeros(1, 3, 160, 160)
    unit: Any = {"normalise": False}
    bundle = open_bundle(se.export_model(made, example, where, outputs=["m", "h"], batch=batch, name="mine", **unit))
    assert [output.name for output in bundle.manifest.outputs] == ["m", "h"]
    assert bundle.manifest.name == "mine"
    assert bundle.manifest.sparsity is None
    bundle = open_bundle(se.export_model(Segmenter(), example, where, outputs=["heat"], **unit))
    assert [output.name for output in bundle.manifest.outputs] == ["heat"]


def test_normalisation_is_folded_where_nothing_else_reads_the_pixels() -> None:
    pre = Normalisation(*SEEN)
    assert DeployedModel(vit(), pre).folded
    assert DeployedModel(depth_anything(), pre).folded
    assert not DeployedModel(Segmenter(), pre).folded


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = vit()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other


class Wordy(Failing):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return "a mask", self.encoder(x)


@pytest.mark.parametrize(
    ("make", "settings", "error", "said"),
    [
        (lambda: nn.Linear(2, 2), {}, UnsupportedModelError, "contains 0 vision transformers"),
        (Failing, {}, ConfigError, "Failing failed when it was called"),
        (Wordy, {}, ConfigError, "returns 2 values (str, Tensor)"),
        (Segmenter, {"outputs": ["masks"]}, ConfigError, "gives no tensor 'masks'"),
        (lambda: Segmenter("tuple"), {"outputs": ["a"]}, ConfigError, "for 1 outputs a"),
        (Segmenter, {"example": torch.zeros(1, 3, 96, 96)}, ConfigError, "of 96 pixels, the model of 160"),
    ],
)
def test_what_is_refused_writes_nothing(
    tmp_path: Path, make: Any, settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    given = {"example": torch.zeros(1, 3, 160, 160), "normalise": False} | settings
    with pytest.raises(error) as caught:
        se.export_model(make(), given.pop("example"), tmp_path / "bundle", **given)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())
