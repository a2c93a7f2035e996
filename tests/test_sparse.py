"""The in-place patch of timm's models, calibration, and students on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import cosine_similarity

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig, keep_text, parse_keep
from sparsifiner_edge.costs import summary
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.export.export import export_bundle, model_shape
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.sparse.calibrate import calibrate_from_images, calibrate_from_weights, sparse_layers
from sparsifiner_edge.sparse.patch import make_model_sparse
from sparsifiner_edge.sparse.student import calibrate_student, dense_twin, load_student, save_student
from tests.models import EVA, TINY_CONFIG, eva, images, student, vit

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


def test_calibration_reports_progress_and_leaves_no_trace() -> None:
    made = student()
    before = [layer.select.proj_q.clone() for layer in sparse_layers(made.model)]
    calls: list[tuple[float, ...]] = []
    calibrate_from_images(made.model, [images(made.model, 1, s) for s in range(4)], lambda _, *c: calls.append(c))
    assert calls == [(i + 1, 12) for i in range(12)]
    for layer, old in zip(sparse_layers(made.model), before, strict=True):
        assert not torch.equal(layer.select.proj_q, old)
        assert "attend" not in layer.__dict__
        assert torch.isfinite(layer.select.proj_q).all()


def test_student_at_another_resolution(tmp_path: Path) -> None:
    save_student(student(sparsity=FULL), tmp_path / "student")
    larger = load_student(tmp_path / "student", img_size=208)
    assert larger.model.patch_embed.num_patches == 169
    assert sparse_layers(larger.model)[0].layout.patches == 169
    with torch.no_grad():
        x = images(larger.model)
        got, expected = larger.model.forward_features(x), dense_twin(larger).model.forward_features(x)
    assert cosine_similarity(got, expected, dim=-1).min() > 0.999


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
