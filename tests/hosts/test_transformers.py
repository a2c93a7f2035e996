"""Models of transformers: dense where everything is read, whole and in raster order, as timm's on the same
weights, restored without a trace; what cannot be taken is refused.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import sparsifiner_edge as se
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError
from sparsifiner_edge.images import load_image
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.sparse.calibrate import observed
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.hosts.timm import create, preprocessing
from sparsifiner_edge.sparse.outputs import outputs_of
from sparsifiner_edge.sparse.weights import normalise
from tests.hosts.hugging_face import images, model, renamed


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


@pytest.fixture(scope="module")
def twins() -> tuple[Any, Any]:
    """The real DINOv2 ViT-S/14 at 224 px, of timm and of transformers."""
    state = {key: torch.from_numpy(value) for key, value in material.dinov2_state().items()}
    ours = create(material.DINOV2, 518)
    ours.load_state_dict(state)
    ours.set_input_size(img_size=224)
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224)
    theirs = transformers.Dinov2Model(config).eval()
    theirs.load_state_dict(renamed(ours.state_dict()))
    return ours, theirs


def test_the_same_weights_are_the_same_model_as_in_timm(twins: tuple[Any, Any]) -> None:
    ours, theirs = (copy.deepcopy(twin) for twin in twins)
    photograph = torch.from_numpy(load_image(split.images("development")[0], 224))[None]
    x = normalise(photograph, preprocessing(ours))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).last_hidden_state, ours.forward_features(x), atol=1e-5, rtol=1e-5)
    lists: list[list[Tensor]] = []
    for twin in (ours, theirs):
        se.sparsify_model(twin, keep=0.25, cells=16, merge=8)
        read: list[Tensor] = []
        lists.append(read)
        with observed(twin, lambda layer, qkv, sizes, read=read: read.append(layer.indices(qkv, sizes))):
            read.append(backbone_of(twin).tokens(x))
    (*keys, tokens), (*others, expected) = lists
    assert len(keys) == 12
    assert all(torch.equal(a, b) for a, b in zip(keys, others, strict=True))
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: transformers.SamVisionModel(transformers.SamVisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, global_attn_indexes=[1],
        )), "contains 0 vision transformers"),
        (lambda: transformers.SwinModel(transformers.SwinConfig(embed_dim=12, depths=[1], num_heads=[1])), "Swin"),
        (lambda: model("ViT", attention_probs_dropout_prob=0.1), "attention dropout 0.1"),
        (lambda: torch.nn.ModuleList([model("ViT"), model("CLIP")]), "contains 2 vision transformers: 0, 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_with_the_reason(make: Any, reason: str) -> None:
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
