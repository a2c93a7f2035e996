"""Tests of models of timm, transformers and another package that are made sparse in memory.

With all keys the model is dense; with merging, outputs are full-size and in raster order. Models are equal after
saving, are restored without a trace, and unsupported ones are rejected.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import timm
import torch
import transformers
from torch import Tensor, nn

import sparsifiner_edge as se
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError
from sparsifiner_edge.images import list_images, load_image
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.sparse.calibrate import observe, sparse_layers
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.hosts.timm import preprocessing
from sparsifiner_edge.sparse.outputs import outputs_of
from sparsifiner_edge.sparse.patch import make_model_sparse
from sparsifiner_edge.sparse.weights import normalise
from tests import flat
from tests.everything import first
from tests.hosts.factories import MODELS, Inside, images, model
from tests.made import install_plugin
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
"""timm models with their default configuration."""
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


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def states(made: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the outputs of every layer, and the final tokens."""
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
    assert se.sparsify_model(made, tile=8, query_pool=8, channels=8, background_tokens=0) is made
    assert len(sparse_layers(made)) == len(backbone_of(made).layers)
    for layer in sparse_layers(made):
        # All keys listed: sparse attention is then dense attention, and only packing could differ.
        layer.layout = dataclasses.replace(layer.layout, keys=layer.layout.patches, key_pool=0)
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
    with observe(made, lambda *_: None, densely=True):
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
    tile = {} if "preset" in settings else {"tile": 8, "channels": 8, "background_tokens": 4}
    assert se.sparsify_model(made, **settings, **tile) is made
    learnt = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    assert not torch.equal(states(made, x)[-1], states(untouched, x)[-1])
    assert se.restore_model(made) is made
    for part, before in zip(made.modules(), untouched.modules(), strict=True):
        assert type(part) is type(before)
        assert part.__dict__.keys() == before.__dict__.keys()
    assert same(made.state_dict(), untouched.state_dict())
    assert dict(made.named_buffers()).keys() == dict(untouched.named_buffers()).keys()
    assert torch.equal(states(made, x)[-1], states(untouched, x)[-1])
    assert same(se.sparsify_model(made, **settings, **tile).state_dict(), learnt)


def test_tokens_are_pruned_where_a_class_token_is() -> None:
    made = model("ViT")
    x = images((160, 160))
    se.sparsify_model(made, keep=0.5, background_tokens=4, channels=8, token_keep=((1, 0.6),))
    outputs = outputs_of(made, x)
    positions = outputs[POSITIONS]
    assert outputs["tokens"].shape == (2, 61, 64)
    assert positions.shape == (2, 60)
    assert (positions.diff(dim=1) > 0).all()


@pytest.mark.parametrize("settings", [{}, {"keep": 0.1, "token_keep": ((3, 0.7),)}, {"preset": "paper"}])
def test_it_is_what_a_folder_holds(
    tmp_path: Path, tiny_weights: Path, pictures: Path, settings: dict[str, Any]
) -> None:
    folder = se.sparsify(TINY, tmp_path / "student", weights=tiny_weights, calibrate=pictures, **settings)
    made = vit(num_classes=10)
    seen = [torch.from_numpy(load_image(path, 160))[None] for path in list_images(pictures)]
    se.sparsify_model(made, calibrate=normalise(torch.cat(seen), preprocessing(made)), **settings)
    assert same(made.state_dict(), safetensors.torch.load_file(folder / "model.safetensors"))
    x = images((160, 160))
    assert torch.equal(made(x), flat.load_student(folder).model(x))


def test_a_module_around_it_is_called_with_its_own_images() -> None:
    pixels = torch.rand(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    around, alone = Inside(), vit(num_classes=0)
    plain = around(pixels)
    se.sparsify_model(around, keep=0.2, background_tokens=4, calibrate=[pixels[:1], pixels[1:]])
    se.sparsify_model(alone, keep=0.2, background_tokens=4, calibrate=(pixels - 0.4) / 0.3)
    assert same(around.encoder.state_dict(), alone.state_dict())
    assert not torch.equal(around(pixels), plain)
    assert torch.equal(se.restore_model(around)(pixels), plain)


def test_modes_gradients_and_types_stay() -> None:
    made = Inside().to(torch.bfloat16).train()
    made.encoder.blocks[0].eval()
    made.head.requires_grad_(False)
    modes = {name: part.training for name, part in made.named_modules()}
    se.sparsify_model(made, calibrate=torch.rand(2, 3, 160, 160, dtype=torch.bfloat16))
    assert {name: part.training for name, part in made.named_modules() if name in modes} == modes
    assert all(parameter.dtype is torch.bfloat16 for parameter in made.parameters())
    assert all(tensor.abs().max() > 0 for name, tensor in made.state_dict().items() if ".select." in name)
    assert not made.head.weight.requires_grad
    made.encoder(torch.rand(1, 3, 160, 160, dtype=torch.bfloat16)).sum().backward()
    assert made.encoder.blocks[0].attn.qkv.weight.grad is not None


@torch.no_grad()
def test_tokens_that_a_hook_changes_between_layers_are_what_the_next_layer_sees() -> None:
    made = se.sparsify_model(vit(), keep=0.3)
    x = images((160, 160))

    def answer(hook: Any) -> Tensor:
        handle = made.blocks[1].register_forward_hook(hook)
        try:
            return cast(Tensor, made(x))
        finally:
            handle.remove()

    anew = answer(lambda _, __, tokens: tokens * 0.5)
    assert not torch.equal(anew, made(x))
    assert torch.equal(answer(lambda _, __, tokens: tokens.mul_(0.5)), anew)
    se.restore_model(made)
    se.sparsify_model(made, keep=1.0, merge=4)
    with pytest.raises(ConfigError, match="or that were changed since"):
        answer(lambda _, __, tokens: tokens.mul_(0.5))


BLANK = torch.zeros(1, 3, 160, 160)


class Unused(Inside):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (lambda: timm.create_model("resnet18"), {}, "This ResNet contains 0"),
        (lambda: timm.create_model("test_vit", dynamic_img_size=True), {}, "dynamic image size"),
        (lambda: vit("test_vit", attn_drop_rate=0.1), {}, "layer 0: attention dropout 0.1"),
        (lambda: vit("test_vit", patch_drop_rate=0.5), {}, "patch dropout"),
        (lambda: timm.create_model("vit_small_patch16_18x2_224"), {}, "ParallelThingsBlock"),
        (lambda: timm.create_model("vit_small_resnet26d_224"), {}, "HybridEmbed"),
        (lambda: eva(use_post_norm=True), {}, "it is a EvaBlockPostNorm"),
        (lambda: timm.create_model("vit_base_patch16_rpn_224", depth=1, dynamic_img_size=False), {}, "ResPostBlock"),
        (lambda: eva(attn_type="rope", qkv_fused=False, num_kv_heads=1), {}, "grouped-query attention, 2 query heads"),
        (lambda: student().model, {}, "sparse already"),
        (
            lambda: transformers.SamVisionModel(
                transformers.SamVisionConfig(
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    image_size=64,
                    global_attn_indexes=[1],
                )
            ),
            {},
            "contains 0 vision transformers",
        ),
        (lambda: model("ViT", attention_probs_dropout_prob=0.1), {}, "attention dropout 0.1"),
        (lambda: nn.ModuleList([vit(), model("ViT")]), {}, "contains 2 vision transformers: 0, 1"),
        (vit, {"keep": (0.1,) * 6 + (1.0,)}, "keep has 7 shares"),
        (lambda: model("SigLIP"), {"token_keep": ((1, 0.6),)}, "requires a class token, and no rotary"),
        (lambda: model("DINOv3"), {"token_keep": ((1, 0.6),)}, "requires a class token, and no rotary"),
        (vit, {"calibrate": BLANK[0]}, r"are float32 \[3, 160, 160\]"),
        (vit, {"calibrate": BLANK.byte()}, "are uint8"),
        (vit, {"calibrate": BLANK * torch.nan}, "NaN or infinity"),
        (Unused, {"calibrate": BLANK}, "did not use its vision transformer"),
    ],
)
def test_what_is_refused_with_the_reason_stays_as_it_was(make: Make, settings: dict[str, Any], said: str) -> None:
    made = make()
    before = copy.deepcopy(made)
    with pytest.raises((UnsupportedModelError, ConfigError), match=said):
        se.sparsify_model(made, **settings)
    assert [type(part) for part in made.modules()] == [type(part) for part in before.modules()]
    assert same(made.state_dict(), before.state_dict())


def test_masks_and_maps_of_attention_are_refused() -> None:
    made = se.sparsify_model(model("DINOv2"))
    x = images((140, 140))
    with pytest.raises(ConfigError, match="cannot return its attention weights"):
        made(x, output_attentions=True)
    with pytest.raises(ConfigError, match="takes no attention mask"):
        made(x, attention_mask=torch.tensor([[1] * 100 + [0]] * 2))
    with pytest.raises(ConfigError, match="made sparse for 100 patches"):
        made(images((168, 168)))
    with pytest.raises(ConfigError, match="attention mask"):
        student().model.forward_features(images((160, 160)), attn_mask=torch.ones(1))


def test_what_another_package_names_and_is_no_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin(tmp_path / "site", monkeypatch, "hosts", foreign="tests.hosts.factories:Inside")
    with pytest.raises(UnsupportedModelError, match="factories:Inside is not a subclass of Backbone"):
        se.sparsify_model(nn.Linear(2, 2))
