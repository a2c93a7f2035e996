"""Preset "paper": the published method, exactly, through the same path as ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.ops import reference, torch_landmarks
from sparsifiner_edge.order import hilbert_order, inverse
from sparsifiner_edge.sparse.calibrate import calibrate_from_images, sparse_layers
from sparsifiner_edge.sparse.student import dense_twin, load_student, save_student
from tests.commands import manifest_of
from tests.models import images, student

PAPER = SparsityConfig.for_preset("paper", keep=0.25, channels=16)
HEADS, TOKENS, WIDTH, CHANNELS, LANDMARKS = 6, 197, 64, 32, 32


def random_inputs(seed: int) -> tuple[torch.Tensor, ...]:
    """qkv and weights of DeiT-S's size, drawn as the published code initialises them, but livelier."""
    torch.manual_seed(seed)
    reduce = [torch.nn.Linear(WIDTH, CHANNELS) for _ in range(2)]
    weights = [p.detach() for layer in reduce for p in (layer.weight, layer.bias)]
    down, up = 0.3 * torch.randn(TOKENS, LANDMARKS), 0.02 * torch.randn(TOKENS, LANDMARKS)
    return (2 * torch.randn(1, TOKENS, 3 * HEADS * WIDTH), *weights, down, up)


def published_mask(inputs: tuple[torch.Tensor, ...], keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and mask [B,H,N-1,N] by the published steps, one at a time, with masks as published."""
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
    folder = save_student(made, tmp_path / "s")
    again = load_student(folder)
    x = images(made.model)
    with torch.no_grad():
        torch.testing.assert_close(again.model(x), made.model(x), rtol=0, atol=0)
        dense = dense_twin(made).model.forward_features(x)
        assert F.cosine_similarity(made.model.forward_features(x), dense, dim=-1).mean() > 0.7
    manifest = manifest_of(export_bundle(folder, tmp_path / "b", batch="dynamic"))
    assert set(manifest["ops"]) == {"sparsifiner::LandmarkKeySelect", "sparsifiner::SparseAttention"}
    assert manifest["sparsity"]["preset"] == "paper"
    assert manifest["check"]["kernels_run"] == ["portable", "native"]
    assert manifest["check"]["selected_indices"] == 2 * 4 * 6 * 2 * 100 * 26


@pytest.mark.parametrize("size", [160, (64, 400)])
def test_landmarks_are_runs_of_the_curve_over_the_images_own_grid(size: int | tuple[int, int]) -> None:
    made = student(sparsity=PAPER, img_size=size)
    curve = torch.from_numpy(inverse(hilbert_order(*made.model.patch_embed.grid_size)))
    for layer in sparse_layers(made.model):
        down = layer.select.down.detach()
        assert torch.equal(down[1:].argmax(1), curve * down.shape[1] // 100)


def test_the_published_predictor_stays_at_its_size(tmp_path: Path) -> None:
    save_student(student(sparsity=PAPER, img_size=(64, 400)), tmp_path / "s")
    assert load_student(tmp_path / "s").img_size == (64, 400)
    for other in ((400, 64), 160, 208):
        with pytest.raises(ConfigError, match="published predictor is tied to its tokens"):
            load_student(tmp_path / "s", img_size=other)


def test_what_does_not_go_with_the_paper() -> None:
    with pytest.raises(ConfigError, match="cells is 4, but the preset 'paper' has 0"):
        SparsityConfig.for_preset("paper", cells=4)
    with pytest.raises(ConfigError, match="requires one class token"):
        student("deit_tiny_distilled_patch16_224", PAPER)
    with pytest.raises(ConfigError, match="6 tokens; this model has 1 prefix tokens of 5"):
        student("test_vit", PAPER, img_size=32)
    with pytest.raises(ConfigError, match="preset is 'none'"):
        SparsityConfig.for_preset("none")
