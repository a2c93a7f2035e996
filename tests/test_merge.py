"""Token merging: pairs of what is alike, sizes and places carried along, outputs whole; in torch and in files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsifiner_edge as se
from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig, merge_text, parse_merge
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.ops.graph import gets_merged
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.sparse.calibrate import selection_loss, sparse_layers
from sparsifiner_edge.sparse.defaults import default_cells, default_keep
from sparsifiner_edge.sparse.layer import CarriedTokens
from sparsifiner_edge.sparse.merge import Merging
from sparsifiner_edge.sparse.patch import make_model_sparse
from sparsifiner_edge.sparse.student import load_student, save_student, with_budget
from tests.commands import call
from tests.everything import first
from tests.models import TINY, images, student, vit
from tests.plain import evaluate_student

MERGED = SparsityConfig(keep=0.4, cells=4, channels=8, merge=(12, 2))
ALONE = SparsityConfig(keep=1, merge=(8,))
EVA_MERGED = dataclasses.replace(MERGED, merge=(4, 0))


@given(st.integers(2, 90), st.integers(0, 3), st.sampled_from([2, 8, 16]), st.floats(0, 0.5), st.integers(0, 99))
def test_every_patch_goes_into_one_token(patches: int, prefix: int, window: int, share: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    tokens, merged = prefix + patches, max(1, int(share * patches))
    qkv, x = (torch.randn(2, tokens, width, generator=rng) for width in (3 * 2 * 4, 5))
    before = CarriedTokens(x, None, None, torch.arange(patches).expand(2, -1))
    module = Merging(merged, prefix, window)
    pairs = module.pairs(qkv, torch.ones(2, tokens), 2)
    joined = pairs[0][pairs[0, :, 0] != pairs[0, :, 1]]
    assert len(joined) == merged
    after = module(before, qkv, 2)
    out = after.values
    assert out.shape == (2, tokens - merged, 5)
    assert after.sizes is not None
    assert after.places is not None
    assert after.sizes[:, prefix:].sum(1).tolist() == [patches] * 2
    counts = torch.stack([torch.bincount(row, minlength=patches - merged) for row in after.places])
    assert torch.equal(counts.float(), after.sizes[:, prefix:])
    # What a token is made of is where its patches say that they are.
    means = torch.zeros(2, patches - merged, 5).scatter_add_(
        1, after.places[..., None].expand(-1, -1, 5), x[:, prefix:]
    )
    torch.testing.assert_close(out[:, prefix:], means / after.sizes[:, prefix:, None])
    assert torch.equal(out[:, :prefix], x[:, :prefix])
    assert torch.equal(after.places.gather(1, after.positions), torch.arange(patches - merged).expand(2, -1))


def test_sizes_add_up_and_the_larger_source_gives_its_angle() -> None:
    qkv, x = torch.randn(1, 9, 24), torch.randn(1, 9, 4)
    sizes = torch.tensor([[1.0, 5, 1, 1, 1, 1, 1, 1, 1]])
    before = CarriedTokens(x, sizes, torch.arange(8)[None], torch.arange(8)[None])
    part = Merging(1, 1, 2)
    part.pairs = lambda *_: torch.tensor([[[0, 0], [2, 1], *([i, i] for i in range(3, 9))]], dtype=torch.int32)  # type: ignore[method-assign]
    after = part(before, qkv, 2)
    assert after.sizes is not None
    assert after.sizes[0, 1] == 6
    torch.testing.assert_close(after.values[0, 1], (5 * x[0, 1] + x[0, 2]) / 6)
    assert after.positions[0, 0] == 0  # patch 0 was five times as large


def test_merging_what_is_equal_changes_nothing() -> None:
    """Attention in proportion to sizes: equal tokens may merge without a trace."""
    dense, merged = vit(), vit()
    x = torch.full((1, 3, 160, 160), 0.3)
    for model in (dense, merged):
        with torch.no_grad():
            model.pos_embed[:, 1:] = model.pos_embed[:, 1:2]
    make_model_sparse(merged, ALONE)
    with torch.no_grad():
        torch.testing.assert_close(merged.forward_features(x), dense.forward_features(x), atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_weight_through_merges() -> None:
    made = student(sparsity=MERGED)
    made.model.train()
    made.model.forward_features(images(made.model)).square().mean().backward()
    missing = [name for name, p in made.model.named_parameters() if p.grad is None and "head" not in name]
    assert all("select" in name for name in missing)  # a choice has no gradient


def test_a_predictor_learns_what_merged_tokens_count() -> None:
    settings = dataclasses.replace(MERGED, probe=1, tile=1, cells=0, value_power=0.0)
    layer = sparse_layers(student(sparsity=settings).model)[0]
    qkv, sizes = torch.randn(1, 41, 3 * 64), torch.ones(1, 41)
    plain, single = (selection_loss(layer, qkv, torch.Generator().manual_seed(0), s) for s in (None, sizes))
    torch.testing.assert_close(plain, single)
    sizes[:, 1:20] = 5
    sized = selection_loss(layer, qkv, torch.Generator().manual_seed(0), sizes)
    assert sized.requires_grad
    assert not torch.allclose(sized, plain)


def test_rates() -> None:
    assert plan_of(SparsityConfig(merge=(8,)), 3, 100).merge == (8, 8, 8)
    assert plan_of(SparsityConfig(merge=(9, 0)), 4, 100).merge == (9, 6, 3, 0)
    assert plan_of(SparsityConfig(merge=(5, 0, 2)), 3, 100).merge == (5, 0, 2)
    assert SparsityConfig(merge=(0, 0)).merge == ()
    assert plan_of(SparsityConfig(merge=(40,)), 4, 100).merge == (25, 18, 14, 10)  # a quarter of what is there at most
    assert [parse_merge(text) for text in ("80", "160..0", "3, 2,1")] == [(80,), (160, 0), (3, 2, 1)]
    assert [merge_text(parse_merge(text)) for text in ("80", "160..0", "3,2,1")] == ["80", "160..0", "3,2,1"]
    for text in ("", "x", "-1", "1..2..3", "4..", "1.5", "3,,2", "²", "9999999999"):
        with pytest.raises(ConfigError, match=r"merge(\[0\])? is"):
            SparsityConfig(merge=parse_merge(text))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge": (8,), "token_keep": ((1, 0.5),)}, "cannot be combined"),
        ({"merge": (8,), "preset": "paper", "tile": 1, "probe": 1, "cells": 0, "value_power": 0.0}, "preset paper"),
        ({"merge": (8,), "merge_window": 7}, "merge_window is 7"),
        ({"merge": (-1,)}, r"merge\[0\] is -1"),
        ({"merge": (True,)}, r"merge\[0\] is true"),
        ({"merge": (1, 2, 3)}, "has 3 rates: the model has 6 layers"),
        ({"merge": (25,)}, "merging 25 tokens in layer 5 leaves"),
    ],
)
def test_what_cannot_be_merged(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(SparsityConfig(**settings), 6, 64 if settings["merge"] == (25,) else 100)


@pytest.mark.parametrize(
    ("name", "size", "sparsity", "batch"),
    first(
        [(TINY, 160, MERGED, 1), (TINY, 160, ALONE, 1), ("eva02_tiny_patch14_224", (84, 140), EVA_MERGED, "dynamic")]
    ),
    ids=["both", "alone", "eva rectangle, dynamic"],
)
def test_exported_files_merge_as_torch_does(
    name: str, size: ImageSize, sparsity: SparsityConfig, batch: Any, tmp_path: Path
) -> None:
    folder = save_student(student(name, sparsity, img_size=size), tmp_path / "s")
    bundle = open_bundle(export_bundle(folder, tmp_path / "b", batch=batch))
    manifest = bundle.manifest
    assert manifest.check is not None
    assert manifest.check.kernels_run == ("portable", "native")
    assert manifest.check.differing_indices == 0
    assert "sparsifiner::MatchTokens" in manifest.ops
    assert manifest.plan == plan_of(sparsity, manifest.shape.depth, manifest.shape.patches)
    # The first layer's attention sees no merged token.
    model = bundle.model()
    merged = [gets_merged(model, node) for node in model.graph.node if node.op_type.endswith("Attention")]
    assert merged == [False] + [True] * (manifest.shape.depth - 1)
    for kernels in ("portable", "native"):
        with se.open_session(bundle.folder, kernels=kernels) as session:
            check_golden(session, bundle)


def test_one_student_many_budgets(
    tmp_path: Path, tiny_weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = call(capsys, "sparsify", TINY, "--weights", tiny_weights, "--keep", ".4", "--merge", "12..2", "--calibrate",
                pictures, "-o", tmp_path / "s")  # fmt: skip
    assert "student written, keep 0.4, 15 cells, merge 12..2." in done.out, done
    folder = tmp_path / "s"
    assert load_student(folder).sparsity.merge == (12, 2)
    assert load_student(folder, merge=(4,)).sparsity.merge == (4,)
    assert load_student(folder, merge=(0,)).sparsity.merge == ()
    alone = load_student(folder, keep=1)
    assert sparse_layers(alone.model) == []
    with pytest.raises(ConfigError, match="cannot be made dense"):
        load_student(folder, keep=1, merge=(0,))
    with pytest.raises(ConfigError, match="nor a dense one sparse"):
        with_budget(alone, keep=0.5)
    with pytest.raises(ConfigError, match="in layer 0 leaves 12"):
        load_student(folder, img_size=64, merge=(4,))
    whole = evaluate_student(folder, pictures, merge=(1,))["statistics"]["patches_cosine"]["mean"]["value"]
    assert whole > evaluate_student(folder, pictures, merge=(20,))["statistics"]["patches_cosine"]["mean"]["value"]


def test_what_is_left_open_suits_size_and_depth() -> None:
    assert [default_cells(patches) for patches in (1, 256, 1369, 5476)] == [1, 24, 49, 49]
    assert [default_keep(patches, 12) for patches in (256, 1369)] == [1.0, (0.1, 0.1, 0.2, 1.0)]
    assert default_keep(5476, 12) == (0.05, 0.05, 0.1, 0.35, 0.35, 0.35, 1.0)
    assert default_keep(1369, 24) == (0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 1.0)
    assert default_keep(1369, 3) == (0.1, 1.0)
    for depth in range(1, 49):
        for patches in (16, 1369, 5476):
            plan_of(SparsityConfig(keep=default_keep(patches, depth)), depth, patches)


def test_shares_by_layer_only_where_tokens_merge_and_nothing_was_asked_for() -> None:
    def made(**settings: Any) -> SparsityConfig:
        model = vit(img_size=416)  # 676 patches
        return se.sparsify_model(model, channels=8, **settings).sparsity

    assert (made().keep, made().cells) == (0.25, 39)
    assert made(merge=8).keep == default_keep(676, len(vit().blocks))
    assert made(merge=8, keep=0.3, cells=5).keep == 0.3
    assert made(merge=8, keep=0.3, cells=5).cells == 5
    assert made(preset="paper").keep == 0.25
