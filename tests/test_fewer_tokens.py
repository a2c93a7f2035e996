"""Tests of token merging and pruning, in torch and in exported files, with function bodies and native kernels.

Merging: pairs of similar tokens, sizes and positions, full-size outputs. Pruning: tokens are removed and keep their
order.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsifiner_edge as se
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig, merge_text, parse_merge, parse_token_keep, share_of
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.sessions import file_runner, results_of, with_outputs
from sparsifiner_edge.metrics import POSITIONS, align
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.sparse.calibrate import sparse_layers
from sparsifiner_edge.sparse.defaults import default_background_tokens, default_keep
from sparsifiner_edge.sparse.layer import CarriedTokens
from sparsifiner_edge.sparse.merge import Merging
from sparsifiner_edge.sparse.outputs import outputs_of
from sparsifiner_edge.sparse.patch import make_model_sparse, set_budget
from sparsifiner_edge.sparse.student import save_student, with_budget
from tests import flat
from tests.commands import manifest_of
from tests.everything import first
from tests.flat import load_student
from tests.models import TINY, images, student, vit
from tests.plain import evaluate_student

MERGED = SparsityConfig(keep=0.4, background_tokens=4, channels=8, merge=(12, 2))
ALONE = SparsityConfig(keep=1, merge=(8,))


@given(st.integers(2, 90), st.integers(0, 3), st.sampled_from([2, 8, 16]), st.floats(0, 0.5), st.integers(0, 99))
def test_every_patch_goes_into_one_token(patches: int, prefix: int, window: int, share: float, seed: int) -> None:
    """The larger source gives the position; a token is the mean of its patches weighted by size."""
    rng = torch.Generator().manual_seed(seed)
    tokens, merged = prefix + patches, max(1, int(share * patches))
    qkv, x = (torch.randn(2, tokens, width, generator=rng) for width in (3 * 2 * 4, 5))
    sizes = torch.randint(1, 6, (2, tokens), generator=rng).float()
    module, left = Merging(merged, prefix, window), patches - merged
    joined = module.pairs(qkv, sizes, 2)[0]
    assert (joined[:, 0] != joined[:, 1]).sum() == merged
    after = module(CarriedTokens(x, sizes, None, torch.arange(patches).expand(2, -1)), qkv, 2)
    assert after.sizes is not None
    assert after.places is not None
    assert torch.equal(after.values[:, :prefix], x[:, :prefix])
    of = sizes[:, prefix:]
    assert torch.equal(torch.zeros(2, left).scatter_add_(1, after.places, of), after.sizes[:, prefix:])
    sums = torch.zeros(2, left, 5).scatter_add_(
        1, after.places[..., None].expand(-1, -1, 5), x[:, prefix:] * of[..., None]
    )
    torch.testing.assert_close(after.values[:, prefix:], sums / after.sizes[:, prefix:, None])
    assert torch.equal(after.places.gather(1, after.positions), torch.arange(left).expand(2, -1))
    assert torch.equal(of.gather(1, after.positions), torch.zeros(2, left).scatter_reduce_(1, after.places, of, "amax"))


@pytest.mark.parametrize("sparsity", [MERGED, ALONE], ids=["and read sparsely", "alone"])
def test_torch_exports_what_merges(sparsity: SparsityConfig) -> None:
    """No shape depends on values, as runtimes such as ExecuTorch require."""
    model: Any = student(sparsity=sparsity).model.eval()
    x = images(model)
    exported = torch.export.export(model, (x,))
    shapes = [node.meta["val"].shape for node in exported.graph.nodes if hasattr(node.meta.get("val"), "shape")]
    assert len(shapes) > 100
    assert all(type(length) is int for shape in shapes for length in shape)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x))


def test_merging_what_is_equal_changes_nothing() -> None:
    """Attention is proportional to sizes, so equal tokens merge without any effect."""
    dense, merged = vit(), vit()
    x = torch.full((1, 3, 160, 160), 0.3)
    for model in (dense, merged):
        with torch.no_grad():
            model.pos_embed[:, 1:] = model.pos_embed[:, 1:2]
    make_model_sparse(merged, ALONE)
    with torch.no_grad():
        torch.testing.assert_close(merged.forward_features(x), dense.forward_features(x), atol=1e-4, rtol=1e-4)


def test_rates() -> None:
    assert plan_of(SparsityConfig(merge=(8,)), 3, 100).merge == (8, 8, 8)
    assert plan_of(SparsityConfig(merge=(9, 0)), 4, 100).merge == (9, 6, 3, 0)
    assert plan_of(SparsityConfig(merge=(5, 0, 2)), 3, 100).merge == (5, 0, 2)
    assert SparsityConfig(merge=(0, 0)).merge == ()
    assert plan_of(SparsityConfig(merge=(40,)), 4, 100).merge == (25, 18, 14, 10)  # at most a quarter of the tokens
    assert [parse_merge(text) for text in ("80", "160..0", "3, 2,1")] == [(80,), (160, 0), (3, 2, 1)]
    assert [merge_text(parse_merge(text)) for text in ("80", "160..0", "3,2,1")] == ["80", "160..0", "3,2,1"]
    for text in ("", "-1", "1..2..3", "4..", "3,,2", "²", "9999999999"):
        with pytest.raises(ConfigError, match=r"merge(\[0\])? is"):
            SparsityConfig(merge=parse_merge(text))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge": (8,), "token_keep": ((1, 0.5),)}, "cannot be combined"),
        (
            {"merge": (8,), "preset": "paper", "tile": 1, "query_pool": 1, "background_tokens": 0, "value_power": 0.0},
            "preset paper",
        ),
        ({"merge": (8,), "merge_window": 7}, "merge_window is 7"),
        ({"merge": (-1,)}, r"merge\[0\] is -1"),
        ({"merge": (1, 2, 3)}, "has 3 rates: the model has 6 layers"),
        ({"merge": (25,)}, "merging 25 tokens in layer 5 leaves"),
    ],
)
def test_what_cannot_be_merged(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(SparsityConfig(**settings), 6, 64 if settings["merge"] == (25,) else 100)


def test_one_student_many_budgets(tmp_path: Path, tiny_weights: Path, pictures: Path) -> None:
    folder = se.sparsify(TINY, tmp_path / "s", weights=tiny_weights, keep=0.4, merge=(12, 2), calibrate=pictures)
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
    assert [default_background_tokens(patches) for patches in (1, 256, 1369, 5476)] == [1, 24, 49, 49]
    assert [default_keep(patches, 12) for patches in (256, 1369)] == [1.0, (0.1, 0.1, 0.2, 1.0)]
    assert default_keep(5476, 12) == (0.05, 0.05, 0.1, 0.35, 0.35, 0.35, 1.0)
    assert default_keep(1369, 24) == (0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 1.0)
    assert default_keep(1369, 3) == (0.1, 1.0)
    for depth in range(1, 49):
        plan_of(SparsityConfig(keep=default_keep(1369, depth)), depth, 1369)

    def made(**settings: Any) -> Any:
        """Layers have shares of their own only if tokens merge and no share was given."""
        sparsity = se.sparsify_model(vit(img_size=416), channels=8, **settings).sparsity  # 676 patches
        return sparsity.keep, sparsity.background_tokens

    assert made() == (0.25, 39)
    assert made(merge=8)[0] == default_keep(676, len(vit().blocks))
    assert made(merge=8, keep=0.3, background_tokens=5) == (0.3, 5)
    assert made(preset="paper")[0] == 0.25


STAGES = ((1, 0.7), (3, 0.5))
PRUNED = SparsityConfig(keep=0.4, background_tokens=4, channels=8, token_keep=STAGES)
PAPER = SparsityConfig.for_preset("paper", keep=0.3, channels=16, token_keep=STAGES)
PRUNED_ALONE = SparsityConfig(keep=1, token_keep=STAGES)


def test_pruning_alone_is_timms_model_on_fewer_tokens() -> None:
    assert ops.top_tokens(torch.tensor([[0.5, 0.5, torch.nan, 0.5]]), 2).tolist() == [[0, 1]], "NaN loses"
    dense = vit()
    pruned = make_model_sparse(vit(), PRUNED_ALONE)
    x, order = images(dense, 1), pruned.blocks[0].curve.order
    tokens = dense._pos_embed(dense.patch_embed(x))[:, torch.cat([torch.zeros(1), order + 1]).long()]
    kept = torch.arange(100)
    for number, block in enumerate(dense.blocks):
        q, k, _ = ops.split_heads(block.attn.qkv(block.norm1(tokens)), block.attn.num_heads)
        attention = (block.attn.scale * q[:, :, :1] @ k.mT).softmax(-1)[0, :, 0].mean(0)
        tokens = tokens + block.ls1(block.attn(block.norm1(tokens)))
        if number in dict(STAGES):
            best = attention[1:].topk(share_of(dict(STAGES)[number], len(kept))).indices.sort().values
            tokens, kept = torch.cat([tokens[:, :1], tokens[:, 1 + best]], 1), kept[best]
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    tokens, places = dense.norm(tokens), order[kept]
    got = outputs_of(pruned, x)
    assert torch.equal(got[POSITIONS][0], places.sort().values)
    torch.testing.assert_close(got["tokens"][:, 1:], tokens[:, 1 + places.argsort()], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pruned(x), dense.forward_head(tokens), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("sparsity", "batch"), first([(PRUNED, 1), (PAPER, "dynamic"), (PRUNED_ALONE, 1)]))
def test_exported_files_prune_as_torch_does(sparsity: SparsityConfig, batch: Any, tmp_path: Path) -> None:
    # The export itself compares both kinds of kernels with torch, token by token.
    saved = save_student(student(sparsity=sparsity), tmp_path / "student")
    bundle = flat.export_bundle(saved, tmp_path / "bundle", batch=batch, tokens=True)
    manifest = manifest_of(bundle)
    assert manifest["check"]["kernels_run"] == ["portable", "native"]
    assert not any("Score" in name for name in manifest["ops"])
    image = smooth_images(160, 1, seed=5)
    results = []
    for kernels in ("native", "portable"):
        with flat.open_session(bundle, kernels=kernels) as session:
            check_golden(session, open_bundle(bundle))
            results.append(session.infer({"image": image}))
            assert results[-1]["tokens"].shape == (1, 36, 64)
            assert results[-1]["token_positions"].dtype == np.int32
            assert (np.diff(results[-1]["token_positions"]) > 0).all()
    outputs, missing = align(results[0], results[1])
    assert missing <= 1
    np.testing.assert_allclose(outputs["features"], results[1]["features"], atol=2e-2)
    # There is no mask: attention of later layers reads fewer tokens.
    model = onnx.load(bundle / "model.onnx")
    attended = results_of(model, "Attention")
    read = file_runner(with_outputs(model, attended), "portable")(image)
    assert [read[name].shape[1] for name in attended] == [101, 101, 71, 71, 36, 36]


def test_what_cannot_prune_is_refused(tmp_path: Path, pictures: Path) -> None:
    folder = save_student(student(sparsity=PRUNED_ALONE, num_classes=0), tmp_path / "student")
    with pytest.raises(ConfigError, match="teacher prunes"):
        evaluate_student(folder, pictures, against=flat.export_bundle(folder, tmp_path / "bundle"))
    with pytest.raises(ConfigError, match="layer 9: the model has 6 layers"):
        student(sparsity=SparsityConfig(keep=0.5, background_tokens=4, channels=8, token_keep=((9, 0.5),)))
    with pytest.raises(ConfigError, match="requires a class token"):
        student(sparsity=PRUNED, class_token=False, global_pool="avg")
    with pytest.raises(ConfigError, match="tile 16 exceeds"):
        student(sparsity=dataclasses.replace(PRUNED, token_keep=((1, 0.1),)))
    for wrong in (((1, 1.0),), ((1, 0.0),), ((3, 0.5), (1, 0.5)), ((-1, 0.5),)):
        with pytest.raises(ConfigError, match=r"token_keep\[|tokens are pruned at"):
            dataclasses.replace(PRUNED, token_keep=wrong)
    assert parse_token_keep(" 3:.7, 6:.5 ") == ((3, 0.7), (6, 0.5))
    with pytest.raises(ConfigError, match="require a sparse model"):
        flat.export_bundle(TINY, tmp_path / "x", keep=0.5)
    made, image = student(sparsity=PRUNED).model, torch.zeros(1, 3, 160, 160)
    with pytest.raises(ConfigError, match="no intermediate feature maps"):
        made.forward_intermediates(image)
    set_budget(made, dataclasses.replace(PRUNED, token_keep=()))
    assert made.forward_intermediates(image, indices=1)[1][0].shape[-2:] == (10, 10)
