"""Token pruning: really removed, in order, in torch and in exported files, on both kinds of kernels."""

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

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig, parse_token_keep, share_of
from sparsifiner_edge.errors import ConfigError, GateError
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.export.sessions import file_session
from sparsifiner_edge.metrics import POSITIONS, aligned
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.sparse.attention import HeadGeometry
from sparsifiner_edge.sparse.layer import CarriedTokens
from sparsifiner_edge.sparse.merge import Pruning
from sparsifiner_edge.sparse.outputs import outputs_of
from sparsifiner_edge.sparse.patch import make_model_sparse, set_budget
from sparsifiner_edge.sparse.student import load_student, save_student, with_budget
from tests.commands import manifest_of
from tests.everything import first
from tests.models import TINY, images, student, vit
from tests.plain import evaluate_student

STAGES = ((1, 0.7), (3, 0.5))
PRUNED = SparsityConfig(keep=0.4, cells=4, channels=8, token_keep=STAGES)
PAPER = SparsityConfig.for_preset("paper", keep=0.3, channels=16, token_keep=STAGES)
ALONE = SparsityConfig(keep=1, token_keep=STAGES)


GEOMETRY = HeadGeometry(2, 4, 0.5)


@given(st.integers(2, 40), st.integers(1, 3), st.integers(1, 39), st.integers(0, 9))
def test_the_best_stay_in_order(patches: int, prefix: int, kept: int, seed: int) -> None:
    kept = min(kept, patches - 1)
    rng = torch.Generator().manual_seed(seed)
    x, qkv = (torch.randn(2, prefix + patches, width, generator=rng) for width in (5, 24))
    pruning, places = Pruning(kept, prefix), torch.arange(patches).expand(2, -1)
    got, _, _, positions = pruning(CarriedTokens(x, None, None, places), qkv, GEOMETRY)
    assert got.shape == (2, prefix + kept, 5)
    q, k, _ = ops.split_heads(qkv, 2)
    scores = (0.5 * q[:, :, :1] @ k.mT).softmax(-1)[:, :, 0].mean(1)[:, prefix:]
    torch.testing.assert_close(pruning.scores(qkv, GEOMETRY), scores)
    assert ops.top_tokens(torch.tensor([[0.5, 0.5, torch.nan, 0.5]]), 2).tolist() == [[0, 1]], "NaN loses"
    for row in range(2):
        wanted = scores[row].sort(descending=True, stable=True).indices[:kept].sort().values
        assert torch.equal(positions[row], wanted)
        assert torch.equal(got[row, :prefix], x[row, :prefix])
        assert torch.equal(got[row, prefix:], x[row, prefix:][wanted])


def test_pruning_alone_is_timms_model_on_fewer_tokens() -> None:
    dense = vit()
    pruned = make_model_sparse(vit(), ALONE)
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


@pytest.mark.parametrize(("sparsity", "batch"), first([(PRUNED, 1), (PAPER, "dynamic"), (ALONE, 1)]))
def test_exported_files_prune_as_torch_does(sparsity: SparsityConfig, batch: Any, tmp_path: Path) -> None:
    # The export itself holds both kinds of kernels to torch, token by token.
    save_student(student(sparsity=sparsity), tmp_path / "student")
    bundle = export_bundle(tmp_path / "student", tmp_path / "bundle", batch=batch, tokens=True)
    manifest = manifest_of(bundle)
    assert manifest["check"]["kernels_run"] == ["portable", "native"]
    assert not any("Score" in name for name in manifest["ops"])
    image = smooth_images(160, 1, seed=5)
    results = []
    for kernels in ("native", "portable"):
        with open_session(bundle, kernels=kernels) as session:
            check_golden(session, open_bundle(bundle))
            results.append(session.infer({"image": image}))
            assert results[-1]["tokens"].shape == (1, 36, 64)
            assert results[-1]["token_positions"].dtype == np.int32
            assert (np.diff(results[-1]["token_positions"]) > 0).all()
    outputs, missing = aligned(results[0], results[1])
    assert missing <= 1
    np.testing.assert_allclose(outputs["features"], results[1]["features"], atol=2e-2)
    # Nothing is masked: the attention of later layers reads fewer tokens.
    model = onnx.load(bundle / "model.onnx")
    attention = [n for n in model.graph.node if n.op_type in ("SparseAttention", "DenseAttention")]
    for node in attention:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    read = file_session(model, "portable").run([node.output[0] for node in attention], {"image": image})
    assert [x.shape[1] for x in read] == [101, 101, 71, 71, 36, 36]


def test_a_file_that_keeps_the_wrong_tokens_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = save_student(student(sparsity=ALONE, num_classes=0), tmp_path / "student")
    right = ops.top_tokens

    def wrong(scores: torch.Tensor, kept: int) -> torch.Tensor:
        return right(-scores if torch.onnx.is_in_onnx_export() else scores, kept)

    monkeypatch.setattr(ops, "top_tokens", wrong)
    with pytest.raises(GateError, match="differs from torch"):
        export_bundle(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_pruned_teacher_is_none(tmp_path: Path, pictures: Path) -> None:
    folder = save_student(student(sparsity=ALONE, num_classes=0), tmp_path / "student")
    bundle = export_bundle(folder, tmp_path / "bundle")
    with pytest.raises(ConfigError, match="teacher prunes"):
        evaluate_student(folder, pictures, against=bundle)


@pytest.mark.everything
def test_one_student_many_budgets(tmp_path: Path, pictures: Path) -> None:
    folder = save_student(student(sparsity=PRUNED), tmp_path / "student")
    whole = export_bundle(folder, tmp_path / "whole", keep=0.2, token_keep=(), tokens=True)
    sparsity = manifest_of(whole)["sparsity"]
    assert (sparsity["keep"], sparsity["token_keep"]) == (0.2, [])
    other = load_student(folder, keep=0.6, token_keep=((2, 0.5),))
    assert [block.pruning is not None for block in other.model.blocks] == [n == 2 for n in range(6)]
    assert other.model.forward_features(images(other.model)).shape == (2, 51, 64)
    with pytest.raises(ConfigError, match="fixed"):
        evaluate_student(whole, pictures, keep=0.5, against=TINY)
    with pytest.raises(ConfigError, match="tied to its tokens"):
        with_budget(student(sparsity=PAPER), token_keep=((2, 0.5),))
    bundle = export_bundle(folder, tmp_path / "int8", precision="int8", calibrate=pictures)
    with open_session(bundle) as session:
        check_golden(session, open_bundle(bundle))


def test_what_cannot_prune_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer 9: the model has 6 layers"):
        student(sparsity=SparsityConfig(keep=0.5, cells=4, channels=8, token_keep=((9, 0.5),)))
    with pytest.raises(ConfigError, match="requires a class token"):
        student(sparsity=PRUNED, class_token=False, global_pool="avg")
    with pytest.raises(ConfigError, match="tile 16 exceeds"):
        student(sparsity=dataclasses.replace(PRUNED, token_keep=((1, 0.1),)))
    for wrong in (((1, 1.0),), ((1, 0.0),), ((3, 0.5), (1, 0.5)), ((-1, 0.5),)):
        with pytest.raises(ConfigError, match=r"token_keep\[|tokens are pruned at"):
            dataclasses.replace(PRUNED, token_keep=wrong)
    for text in ("3", "a:.5", "3=.5"):
        with pytest.raises(ConfigError, match="token_keep holds"):
            parse_token_keep(text)
    assert parse_token_keep(" 3:.7, 6:.5 ") == ((3, 0.7), (6, 0.5))
    with pytest.raises(ConfigError, match="require a student"):
        export_bundle(TINY, tmp_path / "x", keep=0.5)


def test_maps_of_layers_are_refused_while_tokens_are_pruned() -> None:
    made, image = student(sparsity=PRUNED).model, torch.zeros(1, 3, 160, 160)
    with pytest.raises(ConfigError, match="no maps of its layers"):
        made.forward_intermediates(image)
    set_budget(made, dataclasses.replace(PRUNED, token_keep=()))
    assert made.forward_intermediates(image, indices=1)[1][0].shape[-2:] == (10, 10)
