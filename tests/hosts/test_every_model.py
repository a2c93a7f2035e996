"""Models of timm and of transformers: dense where everything is read, whole and in raster order where tokens merge,
restored without a trace; what cannot be taken is refused.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import sparsifiner_edge as se
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.sparse.calibrate import observed, sparse_layers
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.outputs import outputs_of
from sparsifiner_edge.sparse.patch import make_model_sparse
from tests.everything import first
from tests.hosts.hugging_face import MODELS, images, model
from tests.models import EVA, TINY, eva, student, vit

Make = Callable[[], Any]
LARGE = {
    "deit_tiny_distilled_patch16_224": {"img_size": 96},
    "deit3_small_patch16_224": {"img_size": 96},
    "vit_small_patch14_reg4_dinov2": {"img_size": 98},
    "vit_medium_patch16_gap_240": {"img_size": 96},
    "vit_small_patch16_dinov3": {"img_size": (112, 64)},
    "eva02_tiny_patch14_224": {"img_size": (70, 126)},
    "vit_medium_patch16_rope_reg1_gap_256": {"img_size": 96},
    "vit_small_patch16_rope_mixed_224": {"img_size": (64, 112)},
    "eva_giant_patch14_224": {"img_size": 98, "embed_dim": 64, "depth": 2, "num_heads": 2},
}
"""As timm configures them."""
SMALL: dict[str, Make] = {
    TINY: functools.partial(vit, img_size=(96, 160)),
    "test_vit3": functools.partial(vit, "test_vit3"),
    **{f"Eva, {name}": functools.partial(eva, img_size=(48, 80), **options) for name, options in EVA.items()},
    **{name: functools.partial(model, name) for name in MODELS},
    "ViT, eager": functools.partial(model, "ViT", attn_implementation="eager"),
}
EVERY: list[Make] = first(
    [*SMALL.values(), *(functools.partial(vit, name, **options) for name, options in LARGE.items())], len(SMALL)
)
NAMES = [*SMALL, *LARGE]


@torch.no_grad()
def states(made: nn.Module, x: Tensor) -> list[Tensor]:
    """What every layer gives, and the final tokens."""
    backbone, found = backbone_of(made), list[Tensor]()
    with contextlib.ExitStack() as stack:
        for layer in backbone.layers:
            stack.callback(layer.register_forward_hook(lambda _, __, out: found.append(out)).remove)
        tokens = backbone.tokens(x)
    return [*found, tokens]


@pytest.mark.parametrize("make", EVERY, ids=NAMES)
def test_everything_read_is_dense_attention(make: Make) -> None:
    made = make()
    x = images(backbone_of(made).image_size)
    before = states(made, x)
    assert se.sparsify_model(made, tile=8, probe=8, channels=8, cells=0) is made
    assert len(sparse_layers(made)) == len(backbone_of(made).layers)
    for layer in sparse_layers(made):
        # Everything listed: sparse attention is then dense attention, and only packing could differ.
        layer.layout = dataclasses.replace(layer.layout, keys=layer.layout.patches, cell=0)
    for got, expected in zip(states(made, x), before, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", EVERY, ids=NAMES)
def test_merged_tokens_come_out_whole_and_in_raster_order(make: Make) -> None:
    made = make()
    backbone = backbone_of(made)
    x = images(backbone.image_size)
    plain = states(made, x)
    make_model_sparse(made, SparsityConfig(keep=1, merge=(1,)))
    patches = slice(backbone.prefix, None)
    for got, expected in zip(states(made, x), plain, strict=True):
        assert got.shape == expected.shape
        here, beside = (
            torch.cosine_similarity(expected[:, patches], got[:, patches].roll(n, 1), dim=-1).mean() for n in (0, 1)
        )
        assert here > 0.6
        assert here > beside + 0.1
    with observed(made, lambda *_: None, densely=True):
        for got, expected in zip(states(made, x), plain, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


SETTINGS: list[dict[str, Any]] = [{"token_keep": ((3, 0.7),), "keep": (1, 0.1, 1, 0.1)}, {"preset": "paper"}]


@pytest.mark.parametrize(
    ("make", "settings"),
    [*((vit, settings) for settings in SETTINGS), *((make, {"keep": 0.3, "merge": 1}) for make in SMALL.values())],
)
def test_restoring_leaves_no_trace(make: Make, settings: dict[str, Any]) -> None:
    made = make()
    untouched, x = copy.deepcopy(made), images(backbone_of(made).image_size)
    tile = {} if "preset" in settings else {"tile": 8, "channels": 8, "cells": 4}
    assert se.sparsify_model(made, **settings, **tile) is made
    learnt = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    assert not torch.equal(states(made, x)[-1], states(untouched, x)[-1])
    assert se.restore_model(made) is made
    for part, before in zip(made.modules(), untouched.modules(), strict=True):
        assert type(part) is type(before)
        assert part.__dict__.keys() == before.__dict__.keys()
    own = untouched.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in made.state_dict().items())
    assert dict(made.named_buffers()).keys() == dict(untouched.named_buffers()).keys()
    assert torch.equal(states(made, x)[-1], states(untouched, x)[-1])
    again = se.sparsify_model(made, **settings, **tile).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in learnt.items())


def test_tokens_are_pruned_where_a_class_token_is() -> None:
    made = model("ViT")
    x = images((160, 160))
    se.sparsify_model(made, keep=0.5, cells=4, channels=8, token_keep=((1, 0.6),))
    outputs = outputs_of(made, x)
    positions = outputs[POSITIONS]
    assert outputs["tokens"].shape == (2, 61, 64)
    assert positions.shape == (2, 60)
    assert (positions.diff(dim=1) > 0).all()
    for name in ("SigLIP", "DINOv3"):
        with pytest.raises(ConfigError, match="requires a class token, and no rotary"):
            se.sparsify_model(model(name), token_keep=((1, 0.6),))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: timm.create_model("resnet18"), "This ResNet contains 0"),
        (lambda: timm.create_model("test_vit", dynamic_img_size=True), "dynamic image size"),
        (
            lambda: vit("test_vit", attn_drop_rate=0.1),
            "layer 0: attention dropout 0.1",
        ),
        (lambda: vit("test_vit", patch_drop_rate=0.5), "patch dropout"),
        (lambda: timm.create_model("vit_small_patch16_18x2_224"), "ParallelThingsBlock"),
        (lambda: timm.create_model("vit_small_resnet26d_224"), "HybridEmbed"),
        (lambda: eva(use_post_norm=True), "it is a EvaBlockPostNorm"),
        (lambda: timm.create_model("vit_base_patch16_rpn_224", depth=1, dynamic_img_size=False), "ResPostBlock"),
        (lambda: eva(attn_type="rope", qkv_fused=False, num_kv_heads=1), "grouped-query attention, 2 query heads"),
        (lambda: student().model, "sparse already"),
        (lambda: transformers.SamVisionModel(transformers.SamVisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, global_attn_indexes=[1],
        )), "contains 0 vision transformers"),
        (lambda: model("ViT", attention_probs_dropout_prob=0.1), "attention dropout 0.1"),
        (lambda: nn.ModuleList([vit(), model("ViT")]), "contains 2 vision transformers: 0, 1"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_the_reason(make: Make, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        se.sparsify_model(make())


def test_masks_and_maps_of_attention_are_refused() -> None:
    made = se.sparsify_model(model("DINOv2"))
    x = images((140, 140))
    with pytest.raises(ConfigError, match="no map of all its weights"):
        made(x, output_attentions=True)
    with pytest.raises(ConfigError, match="takes no attention mask"):
        made(x, attention_mask=torch.tensor([[1] * 100 + [0]] * 2))
    with pytest.raises(ConfigError, match="made sparse for 100 patches"):
        made(images((168, 168)))
    with pytest.raises(ConfigError, match="attention mask"):
        student().model.forward_features(images((160, 160)), attn_mask=torch.ones(1))
