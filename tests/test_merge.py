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
from sparsifiner_edge.bundle.golden import check_golden
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig, merge_text, parse_merge
from sparsifiner_edge.costs import layer_costs, summary
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.export import student_changes
from sparsifiner_edge.export.export import export_bundle, model_shape
from sparsifiner_edge.ops.graph import gets_merged
from sparsifiner_edge.ops.schema import VERSION
from sparsifiner_edge.plan import LEAST_PATCHES, plan_of
from sparsifiner_edge.sparse.calibrate import observed, selection_loss, sparse_layers
from sparsifiner_edge.sparse.defaults import default_cells, default_keep
from sparsifiner_edge.sparse.layer import CarriedTokens
from sparsifiner_edge.sparse.merge import Merging
from sparsifiner_edge.sparse.patch import make_model_sparse, restore_backbone
from sparsifiner_edge.sparse.student import load_student, save_student, sparsify, with_budget
from tests.commands import assert_refused, call, manifest_of
from tests.everything import first
from tests.models import TINY, images, student, vit
from tests.plain import evaluate_student

MERGED = SparsityConfig(keep=0.4, cells=4, channels=8, merge=(12, 2))
ALONE = SparsityConfig(keep=1, merge=(8,))
EVA_MERGED = dataclasses.replace(MERGED, merge=(4, 0))
ROTARY = {"eva02_tiny_patch14_224": 112, "vit_small_patch16_dinov3": 128, "vit_small_patch16_rope_mixed_224": 128}


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


@pytest.mark.parametrize(
    "name", first([TINY, "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", *ROTARY], 2)
)
def test_outputs_are_whole_and_in_raster_order(name: str) -> None:
    size = {TINY: 160, "vit_small_patch14_reg4_dinov2": 112, **ROTARY}.get(name, 128)
    model = vit(name, img_size=size)
    x = images(model)
    with torch.no_grad():
        plain = model.forward_features(x)
        maps = model.forward_intermediates(x, indices=2, intermediates_only=True, norm=True)
        make_model_sparse(model, dataclasses.replace(ALONE, merge=(1,)))
        whole = model.forward_features(x)
        final, items = model.forward_intermediates(x, indices=2, norm=True)
        pairs = model.forward_intermediates(
            x, indices=[0, 1], return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC", stop_early=True
        )
    assert whole.shape == plain.shape
    assert torch.equal(final, whole)
    assert [item.shape for item in items] == [item.shape for item in maps]
    grid = model.patch_embed.grid_size
    assert torch.equal(items[-1].flatten(2).mT, whole[:, model.num_prefix_tokens :])
    assert [(a.shape[1], b.shape[1]) for a, b in pairs] == [(grid[0] * grid[1], model.num_prefix_tokens)] * 2
    patches = slice(model.num_prefix_tokens, None)
    here, beside = (
        torch.cosine_similarity(plain[:, patches], whole[:, patches].roll(n, 1), dim=-1).mean() for n in (0, 1)
    )
    assert here > 0.6
    assert here > beside + 0.1
    with observed(model, lambda *_: None, densely=True), torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), plain, atol=1e-4, rtol=1e-4)
    restore_backbone(model)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), plain)


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


def test_costs_count_the_tokens_that_are_left() -> None:
    shape = model_shape(vit())
    assert plan_of(MERGED, shape.depth, 100).tokens(100) == [100, 88, 78, 70, 64, 60, 58]
    dense, layers = layer_costs(shape, SparsityConfig(keep=1)), layer_costs(shape, ALONE)
    assert layers[0].projections == dense[0].projections
    assert layers[0].mlp == dense[0].mlp * 93 // 101
    assert layers[1].attention == 2 * 93 * 93 * shape.width
    assert layers[0].pruning == 101 * shape.width + 50 * 16 * shape.width // shape.heads
    assert summary(shape, ALONE)["total_macs"] < summary(shape, SparsityConfig(keep=1))["total_macs"]


def test_rates() -> None:
    assert plan_of(SparsityConfig(merge=(8,)), 3, 100).merge == (8, 8, 8)
    assert plan_of(SparsityConfig(merge=(9, 0)), 4, 100).merge == (9, 6, 3, 0)
    assert plan_of(SparsityConfig(merge=(5, 0, 2)), 3, 100).merge == (5, 0, 2)
    assert SparsityConfig(merge=(0, 0)).merge == ()
    assert plan_of(SparsityConfig(merge=(40,)), 4, 100).merge == (25, 18, 14, 10)  # a quarter of what is there at most
    assert parse_merge("80") == (80,)
    assert parse_merge("160..0") == (160, 0)
    assert parse_merge("3, 2,1") == (3, 2, 1)
    assert [merge_text(parse_merge(text)) for text in ("80", "160..0", "3,2,1")] == ["80", "160..0", "3,2,1"]


@pytest.mark.parametrize("text", ["", "x", "-1", "1..2..3", "..", "4..", "1.5", "3,,2", "²", "9999999"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ConfigError, match="merge is"):
        parse_merge(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge": (8,), "token_keep": ((1, 0.5),)}, "cannot be combined"),
        ({"merge": (8,), "merge_window": 0}, "merge_window is 0"),
        ({"merge": (8,), "merge_window": 7}, "merge_window is 7"),
        ({"merge": (-1,)}, r"merge is \(-1,\)"),
        ({"merge": (True,)}, r"merge is \(True,\)"),
        ({"merge": (1, 2, 3)}, "has 3 rates: the model has 6 layers"),
        ({"merge": (25,)}, "merging 25 tokens in layer 5 leaves"),
    ],
)
def test_what_cannot_be_merged(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(SparsityConfig(**settings), 6, 64 if settings["merge"] == (25,) else 100)


def test_the_published_method_merges_nothing() -> None:
    with pytest.raises(ConfigError, match="preset paper"):
        SparsityConfig.for_preset("paper", merge=(8,))


@pytest.mark.parametrize(
    ("name", "size", "sparsity", "batch"),
    first(
        [
            (TINY, 160, MERGED, 1),
            (TINY, (96, 160), MERGED, "dynamic"),
            (TINY, 160, ALONE, "dynamic"),
            ("eva02_tiny_patch14_224", (84, 140), EVA_MERGED, "dynamic"),
        ]
    ),
    ids=["both", "rectangle, dynamic", "alone, dynamic", "eva rectangle, dynamic"],
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
    assert dict(manifest.costs) == summary(manifest.shape, sparsity)
    opsets = {entry.domain: entry.version for entry in bundle.model().opset_import}
    assert opsets["sparsifiner"] == VERSION
    # The first layer's attention sees no merged token.
    model = bundle.model()
    merged = [gets_merged(model, node) for node in model.graph.node if node.op_type.endswith("Attention")]
    assert merged == [False] + [True] * (manifest.shape.depth - 1)
    for kernels in ("portable", "native"):
        with se.open_session(bundle.folder, kernels=kernels) as session:
            check_golden(session, bundle)


@pytest.mark.everything
def test_layers_are_measured_with_the_sizes_of_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, bool]] = []
    right = student_changes.to_onnx

    def watched(*given: Any) -> Any:
        model = right(*given)
        ours = [node for node in model.graph.node if node.domain == "sparsifiner"]
        seen.append({node.op_type: gets_merged(model, node) for node in ours})
        return model

    monkeypatch.setattr(student_changes, "to_onnx", watched)
    folder = save_student(student(sparsity=dataclasses.replace(MERGED, merge=(0, 0, 0, 0, 12, 0))), tmp_path / "s")
    bundle = export_bundle(folder, tmp_path / "b", measure=Execution())
    sized = [[{"KeySelect": x, "SparseAttention": x}, {"DenseAttention": x}] for x in (False, True)]
    assert seen == [*sized[0], *sized[1]]
    assert [c["layers"] for c in manifest_of(bundle)["measured"]["choices"]] == [[0, 1, 2, 3, 4], [5]]


def test_one_student_many_budgets(tmp_path: Path, pictures: Path) -> None:
    folder = save_student(student(sparsity=MERGED), tmp_path / "s")
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


def test_calibration_sees_whole_images_whatever_the_size(tmp_path: Path, tiny_weights: Path, pictures: Path) -> None:
    folder = sparsify(
        TINY, tmp_path / "s", weights=tiny_weights, img_size=320, merge=(60,), cells=4, calibrate=pictures
    )
    assert load_student(folder).sparsity.merge == (60,)


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


@pytest.mark.everything
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions(precision: str, tmp_path: Path, pictures: Path) -> None:
    folder = save_student(student(sparsity=MERGED), tmp_path / "s")
    more = {"calibrate": pictures} if precision == "int8" else {}
    bundle = open_bundle(export_bundle(folder, tmp_path / "b", precision=precision, **more))
    assert bundle.manifest.precision == precision
    with se.open_session(bundle.folder) as session:
        check_golden(session, bundle)


@pytest.mark.everything
def test_the_command_line_merges(tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["sparsify", TINY, "--weights", tiny_weights, "--set", "cells=4", "-o", tmp_path / "s"]
    assert_refused(call(capsys, *plain, "--merge", "many"), "merge is 'many'", "160..0")
    assert_refused(call(capsys, *plain, "--merge", "8", "--set", "merge_window=0"), "merge_window is 0")
    assert_refused(call(capsys, *plain, "--merge", "8", "--token-keep", "1:.5"), "cannot be combined")
    assert_refused(call(capsys, *plain, "--img-size", "96", "--merge", "200"), f"{LEAST_PATCHES} are left")
    assert not (tmp_path / "s").exists()
    made = call(capsys, *plain, "--merge", "12..2")
    assert made.code == 0
    assert "student written, keep 1, 4 cells, merge 12..2." in made.out
    outcome = call(capsys, "export", tmp_path / "s", "--merge", "30..0", "-o", tmp_path / "b")
    assert outcome.code == 0, outcome.err
    assert "25, 18" in outcome.out  # lowered where a layer has too few
    manifest = manifest_of(tmp_path / "b")
    assert manifest["sparsity"]["merge"] == [30, 0]
    assert manifest["plan"]["merge"][:2] == [25, 18]
    assert_refused(call(capsys, "export", TINY, "--merge", "8", "-o", tmp_path / "c"), "require a student")
