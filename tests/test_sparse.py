"""The in-place patch of timm's models, calibration, students on disk, images of any shape, and the order of tokens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity

from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig, keep_text, parse_keep
from sparsifiner_edge.costs import summary
from sparsifiner_edge.errors import ConfigError, WeightsError
from sparsifiner_edge.export.export import export_bundle, model_shape
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.order import hilbert_order, inverse
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.sparse.calibrate import calibrate_from_weights, sparse_layers
from sparsifiner_edge.sparse.hosts.timm import load_model
from sparsifiner_edge.sparse.patch import make_model_sparse
from sparsifiner_edge.sparse.student import calibrate_student, dense_twin, load_student, save_student
from tests.models import EVA, TINY, TINY_CONFIG, eva, images, student, vit

FULL = SparsityConfig(keep=0.999, cells=4, channels=8)
"""So little left out that the result is nearly dense, through the sparse path."""


@pytest.mark.parametrize("options", EVA.values(), ids=EVA)
def test_projections_from_the_weights_suit_white_noise(options: dict[str, Any]) -> None:
    model = eva(**options)
    make_model_sparse(model, dataclasses.replace(FULL, channels=8))
    calibrate_from_weights(model)
    rope = None if model.rope is None else model._pos_embed(torch.zeros(1, 64, 64))[1]
    torch.manual_seed(1)
    for number, block in enumerate(model.blocks):
        noise = torch.randn(64, 64 + block.attn.num_prefix, 64) * block.norm1.weight + block.norm1.bias
        table = rope[number] if rope is not None and rope.ndim == 4 else rope
        with torch.no_grad():
            q, k, _ = ops.split_heads(block.attn.packed(noise, table), 2)
        q, k = (x[:, :, block.attn.num_prefix :].transpose(0, 1).flatten(1, 2).double() for x in (q, k))
        k = k - k.mean(1, keepdim=True)
        root_q, root_k = (torch.linalg.cholesky(x.mT @ x / x.shape[1]).mT for x in (q, k))
        select = block.attn.select
        kept = select.proj_q.double() @ select.proj_k.double().mT
        error = (root_q @ (torch.eye(32) - kept) @ root_k.mT).square().sum((1, 2))
        least = torch.linalg.svdvals(root_q @ root_k.mT)[:, 8:].square().sum(1)
        assert (error < 1.1 * least).all(), (number, error / least)


def test_weights_and_object_stay_the_same() -> None:
    dense = vit()
    before = {key: value.data_ptr() for key, value in dense.state_dict().items()}
    made = make_model_sparse(dense, TINY_CONFIG)
    assert made is dense
    after = {key: value.data_ptr() for key, value in made.state_dict().items()}
    assert {key: after[key] for key in before} == before
    added = {key.split(".", 2)[2] for key in after.keys() - before.keys()}
    assert added == {"attn.select.proj_q", "attn.select.proj_k"}


def test_shares_of_keys_by_layer(tmp_path: Path) -> None:
    some = dataclasses.replace(FULL, keep=(0.1, 0.25, 1))
    plan = plan_of(some, 5, 100)
    assert (plan.keep, plan.short_keep, plan.sparse_layers) == ((0.1, 0.25, 1, 1, 1), (0.1, 0.25, 1), (0, 1))
    assert SparsityConfig.from_dict(some.to_dict()) == some
    assert dataclasses.replace(FULL, keep=(0.5, 0.5)).keep == 0.5
    assert dataclasses.replace(FULL, keep=(1, 1)).is_dense
    made = student(sparsity=some)
    assert [layer.layout.keys for layer in sparse_layers(made.model)] == [10, 25]
    one = summary(model_shape(made.model), dataclasses.replace(some, keep=0.25))
    assert summary(model_shape(made.model), some)["attention_macs"] > one["attention_macs"]
    folder = save_student(made, tmp_path / "s")
    bundle = open_bundle(export_bundle(folder, tmp_path / "b"))
    assert bundle.manifest.sparsity == some
    assert bundle.manifest.ops == (
        "sparsifiner::DenseAttention", "sparsifiner::KeySelect", "sparsifiner::SparseAttention",
    )  # fmt: skip
    other = load_student(folder, keep=(0.5, 1))
    assert [layer.layout.keys for layer in sparse_layers(other.model)] == [50]
    with pytest.raises(ConfigError, match="layer 2 is dense: it has no predictor"):
        load_student(folder, keep=0.5)
    with pytest.raises(ConfigError, match="keep has 13 shares: the model has"):
        load_student(folder, keep=(0.5,) * 12 + (0.4,))


def test_shares_as_text() -> None:
    assert parse_keep("0.1, .1,1") == (0.1, 0.1, 1)
    assert [keep_text(parse_keep(text)) for text in (".25", "0.1,0.1,1")] == ["0.25", "0.1,0.1,1"]
    for text in ("", ".1,", "x", "1..2", "0,1", "2", ".1,nan", "-1"):
        with pytest.raises(ConfigError, match=r"keep(\[\d\])? is"):
            SparsityConfig(keep=parse_keep(text))


def test_gradient_of_sparse_attention_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1, 21, 12, dtype=torch.float64, requires_grad=True)
    lists = torch.tensor([[[0, 3, 9], [1, 2, 19], [4, 7, 8]]], dtype=torch.int32)[:, None].expand(1, 2, 3, 3)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return ops.sparse_attention(x, lists, num_heads=2, num_prefix=1, tile=8, cell=7, scale=0.5)

    # The operator sums in float32 inside; the step is chosen for that.
    assert torch.autograd.gradcheck(attend, (qkv,), eps=1e-2, atol=2e-2, rtol=1e-2, nondet_tol=0)


def test_calibration_is_recorded_and_repeatable(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    first, second = (calibrate_student(student(), tmp_path) for _ in range(2))
    assert first.provenance.calibration is not None
    assert first.provenance.calibration.files == ["0.png", "1.png", "2.png"]
    assert first.provenance.calibration.img_size == 160
    wide = calibrate_student(student(img_size=(320, 640)), tmp_path).provenance.calibration
    assert wide is not None
    assert wide.img_size == (128, 256)  # at most sixteen patches along the longer side
    for a, b in zip(sparse_layers(first.model), sparse_layers(second.model), strict=True):
        assert torch.equal(a.select.proj_q, b.select.proj_q)


@settings(max_examples=200, deadline=None)
@given(st.floats(0.001, 1), st.integers(1, 5000), st.integers(0, 50), st.sampled_from([1, 4, 8, 16]))
def test_layout_covers_every_patch(keep: float, patches: int, cells: int, tile: int) -> None:
    config = SparsityConfig(keep=keep, tile=tile, probe=1, cells=cells)
    if tile > patches or cells > patches:
        with pytest.raises(ConfigError, match="exceed"):
            config.layout(patches)
        return
    layout = config.layout(patches)
    assert 1 <= layout.keys <= patches
    assert layout.keys >= keep * patches - 1e-6
    assert layout.keys - 1 < keep * patches + 1e-6
    assert (layout.tiles - 1) * tile < patches <= layout.tiles * tile
    assert layout.cells <= cells
    if cells:
        assert (layout.cells - 1) * layout.cell < patches <= layout.cells * layout.cell
    assert SparsityConfig.from_dict(config.to_dict()) == config


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


sides = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(sides, sides)
def test_permutation_with_short_steps(height: int, width: int) -> None:
    order = hilbert_order(height, width)
    assert sorted(order) == list(range(height * width))
    np.testing.assert_array_equal(order[inverse(order)], np.arange(height * width))
    y, x = np.divmod(order, width)
    steps = np.maximum(np.abs(np.diff(y)), np.abs(np.diff(x)))
    # A curve over an odd grid needs a diagonal step now and then, but never a jump.
    assert steps.size == 0 or steps.max() == 1


def test_runs_on_an_odd_grid_are_compact() -> None:
    y, x = np.divmod(hilbert_order(37, 37), 37)
    spans = [max(np.ptp(y[i : i + 16]), np.ptp(x[i : i + 16])) for i in range(0, 37 * 37, 16)]
    assert np.mean(spans) < 5  # A perfect square spans 3, a run along a row 15.
