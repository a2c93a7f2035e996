"""Tests of sparse timm models: in-place patch, calibration, saved models, images of any shape, token order.

Preset "paper" is compared with the published method through the same code path.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig, keep_text, parse_keep
from sparsifiner_edge.costs import summary
from sparsifiner_edge.errors import ConfigError, WeightsError
from sparsifiner_edge.export.export import model_shape
from sparsifiner_edge.ops import reference, torch_landmarks
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.order import hilbert_order
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.sparse.calibrate import calibrate_from_images, calibrate_from_weights, sparse_layers
from sparsifiner_edge.sparse.hosts.timm import load_model
from sparsifiner_edge.sparse.patch import make_model_sparse
from sparsifiner_edge.sparse.student import calibrate_student, dense_twin, save_student
from tests.commands import manifest_of
from tests.flat import export_bundle, load_student
from tests.models import EVA, TINY, eva, images, student, vit

FULL = SparsityConfig(keep=0.999, background_tokens=4, channels=8)
"""Nearly dense configuration that still uses the sparse path."""


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
            q, k, _ = ops.split_heads(block.attn.pack(noise, table), 2)
        q, k = (x[:, :, block.attn.num_prefix :].transpose(0, 1).flatten(1, 2).double() for x in (q, k))
        k = k - k.mean(1, keepdim=True)
        root_q, root_k = (torch.linalg.cholesky(x.mT @ x / x.shape[1]).mT for x in (q, k))
        select = block.attn.select
        kept = select.proj_q.double() @ select.proj_k.double().mT
        error = (root_q @ (torch.eye(32) - kept) @ root_k.mT).square().sum((1, 2))
        least = torch.linalg.svdvals(root_q @ root_k.mT)[:, 8:].square().sum(1)
        assert (error < 1.1 * least).all(), (number, error / least)


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
        "sparsifiner::DenseAttention",
        "sparsifiner::KeySelect",
        "sparsifiner::SparseAttention",
    )
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


def test_calibration_is_recorded_and_repeatable(pictures: Path) -> None:
    first, second = (calibrate_student(student(), pictures) for _ in range(2))
    assert first.provenance.calibration is not None
    assert first.provenance.calibration.files == ["picture0.png", "picture1.png", "picture2.png"]
    assert first.provenance.calibration.img_size == 160
    for a, b in zip(sparse_layers(first.model), sparse_layers(second.model), strict=True):
        assert torch.equal(a.select.proj_q, b.select.proj_q)
    wide = calibrate_student(student(img_size=(320, 640)), pictures).provenance.calibration
    assert wide is not None
    assert wide.img_size == (128, 256)  # at most sixteen patches on the longer side


@settings(max_examples=200, deadline=None)
@given(st.floats(0.001, 1), st.integers(1, 5000), st.integers(0, 50), st.sampled_from([1, 4, 8, 16]))
def test_layout_covers_every_patch(keep: float, patches: int, background_tokens: int, tile: int) -> None:
    config = SparsityConfig(keep=keep, tile=tile, query_pool=1, background_tokens=background_tokens)
    if tile > patches or background_tokens > patches:
        with pytest.raises(ConfigError, match="exceed"):
            config.layout(patches)
        return
    layout = config.layout(patches)
    assert 1 <= layout.keys <= patches
    assert layout.keys >= keep * patches - 1e-6
    assert layout.keys - 1 < keep * patches + 1e-6
    assert (layout.tiles - 1) * tile < patches <= layout.tiles * tile
    assert layout.background_tokens <= background_tokens
    if background_tokens:
        assert (layout.background_tokens - 1) * layout.key_pool < patches <= layout.background_tokens * layout.key_pool
    assert SparsityConfig.from_dict(config.to_dict()) == config


LONG = (64, 400)
"""4 x 25 patches: as many as the 10 x 10 for which timm has these weights."""


def positions(size: ImageSize, new: ImageSize, **options: Any) -> torch.Tensor:
    """Return a model's position embedding at another size, resampled by timm with the grid known."""
    model = vit(img_size=size, **options)
    model.set_input_size(img_size=height_width(new))
    return model.pos_embed.detach()


def test_a_rectangle_survives_the_disk_and_takes_other_sizes(tmp_path: Path) -> None:
    made = student(img_size=LONG, sparsity=FULL)
    save_student(made, tmp_path / "student")
    save_student(student(), tmp_path / "square")
    sizes = [json.loads((tmp_path / name / "config.json").read_text())["img_size"] for name in ("student", "square")]
    assert sizes == [[64, 400], 160]
    again = load_student(tmp_path / "student")
    assert (again.img_size, again.model.patch_embed.grid_size) == (LONG, (4, 25))
    with torch.no_grad():
        x = images(made.model)
        torch.testing.assert_close(again.model(x), made.model(x), rtol=0, atol=0)
        torch.testing.assert_close(dense_twin(again).model(x), vit(img_size=LONG)(x), rtol=0, atol=0)
        for size in ((400, 64), 160, 208):
            found = load_student(tmp_path / "student", img_size=size)
            assert found.img_size == size
            torch.testing.assert_close(found.model.pos_embed.detach(), positions(LONG, size))
            x = images(found.model)
            got, expected = found.model.forward_features(x), dense_twin(found).model.forward_features(x)
            assert F.cosine_similarity(got, expected, dim=-1).min() > 0.999


def test_weights_of_a_square_fit_any_shape_those_of_a_rectangle_that_alone(tmp_path: Path, tiny_weights: Path) -> None:
    for size in (LONG, (96, 160), 208, 160):
        found = load_model(TINY, tiny_weights, size).pos_embed.detach()
        torch.testing.assert_close(found, positions(160, size, num_classes=10))
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
    np.testing.assert_array_equal(order[order.argsort()], np.arange(height * width))
    y, x = np.divmod(order, width)
    steps = np.maximum(np.abs(np.diff(y)), np.abs(np.diff(x)))
    # A curve over an odd grid needs an occasional diagonal step, but never a jump.
    assert steps.size == 0 or steps.max() == 1


PAPER = SparsityConfig.for_preset("paper", keep=0.25, channels=16)
HEADS, TOKENS, WIDTH, CHANNELS, LANDMARKS = 6, 197, 64, 32, 32


def random_inputs(seed: int) -> tuple[torch.Tensor, ...]:
    """Return qkv and weights of DeiT-S's size, initialised as in the published code but with larger values."""
    torch.manual_seed(seed)
    reduce = [torch.nn.Linear(WIDTH, CHANNELS) for _ in range(2)]
    weights = [p.detach() for layer in reduce for p in (layer.weight, layer.bias)]
    down, up = 0.3 * torch.randn(TOKENS, LANDMARKS), 0.02 * torch.randn(TOKENS, LANDMARKS)
    return (2 * torch.randn(1, TOKENS, 3 * HEADS * WIDTH), *weights, down, up)


def published_mask(inputs: tuple[torch.Tensor, ...], keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and mask [B,H,N-1,N] by the published steps, one at a time, with published masking."""
    qkv, proj_q, bias_q, proj_k, bias_k, down, up = inputs
    q, k, _ = qkv.view(-1, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    q, k = F.linear(q, proj_q, bias_q), F.linear(k, proj_k, bias_k)
    coefficients = (q @ (k.transpose(-1, -2) @ down) * HEADS**-0.5)[:, :, 1:].softmax(-1)
    best, where = coefficients.topk(8)
    coefficients = torch.zeros_like(coefficients).scatter(-1, where, best)
    scores = coefficients @ F.threshold(up.abs(), 0.02, 0.0).T
    return scores, torch.zeros_like(scores).scatter(-1, scores.topk(keys).indices, 1.0)


@pytest.mark.parametrize("keep", [0.9, 0.25, 0.05])
def test_lists_are_the_published_ones_where_scores_decide(keep: float) -> None:
    keys = SparsityConfig.for_preset("paper", keep=keep).layout(196).keys
    settings = {"num_heads": HEADS, "scale": HEADS**-0.5, "top_coefficients": 8, "basis_threshold": 0.02}
    inputs = random_inputs(int(100 * keep))
    scores, mask = published_mask(inputs, keys)
    ordered = scores.sort(-1, descending=True).values
    decided = ordered[..., keys - 1] - ordered[..., keys] > 1e-6
    # The published basis is sparse: with many keys kept, zero scores tie in most rows.
    assert decided.float().mean() > (0.05 if keep > 0.4 else 0.9)
    arrays = [x.numpy() for x in inputs]
    for lists in (
        torch_landmarks.landmark_key_select(*inputs, keys=keys, **settings),
        torch.from_numpy(reference.landmark_key_select(*arrays, keys=keys, **settings)),
    ):
        ours = torch.zeros_like(scores).scatter(-1, lists.long(), 1.0)
        assert bool((ours == mask).all(-1)[decided].all())


def test_from_student_to_bundle(tmp_path: Path) -> None:
    made = student(sparsity=PAPER)
    layer = sparse_layers(made.model)[0]
    assert layer.select.down.shape == (101, 101 // 6)
    assert layer.layout.keys == 26  # of 101 tokens, class token included
    calibrate_from_images(made.model, [images(made.model, 1)])
    x = images(made.model)
    with torch.no_grad():
        dense = dense_twin(made).model.forward_features(x)
        assert F.cosine_similarity(made.model.forward_features(x), dense, dim=-1).mean() > 0.7
    manifest = manifest_of(export_bundle(save_student(made, tmp_path / "s"), tmp_path / "b", batch="dynamic"))
    assert set(manifest["ops"]) == {"sparsifiner::LandmarkKeySelect", "sparsifiner::SparseAttention"}
    assert manifest["sparsity"]["preset"] == "paper"
    assert manifest["check"]["kernels_run"] == ["portable", "native"]
    assert manifest["check"]["selected_indices"] == 2 * 4 * 6 * 2 * 100 * 26


@pytest.mark.parametrize("size", [160, (64, 400)])
def test_landmarks_are_runs_of_the_curve_over_the_images_own_grid(size: int | tuple[int, int]) -> None:
    made = student(sparsity=PAPER, img_size=size)
    curve = torch.from_numpy(hilbert_order(*made.model.patch_embed.grid_size).argsort())
    for layer in sparse_layers(made.model):
        down = layer.select.down.detach()
        assert torch.equal(down[1:].argmax(1), curve * down.shape[1] // 100)


def test_the_published_predictor_stays_at_its_size(tmp_path: Path) -> None:
    save_student(student(sparsity=PAPER, img_size=(64, 400)), tmp_path / "s")
    assert load_student(tmp_path / "s").img_size == (64, 400)
    for other in ((400, 64), 160, 208):
        with pytest.raises(ConfigError, match="predictor of preset 'paper' is tied to its image size"):
            load_student(tmp_path / "s", img_size=other)


def test_what_does_not_go_with_the_paper() -> None:
    with pytest.raises(ConfigError, match="background_tokens is 4, but the preset 'paper' has 0"):
        SparsityConfig.for_preset("paper", background_tokens=4)
    with pytest.raises(ConfigError, match="requires exactly one prefix token"):
        student("deit_tiny_distilled_patch16_224", PAPER)
    with pytest.raises(ConfigError, match="6 tokens; this model has 1 prefix tokens and 5 tokens"):
        student("test_vit", PAPER, img_size=32)
    with pytest.raises(ConfigError, match="preset is 'none'"):
        SparsityConfig.for_preset("none")
