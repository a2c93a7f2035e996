"""`sparsify_model` and `restore_model`: in place, on any module, as through a folder, and undone without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import sparsifiner_edge as se
from sparsifiner_edge.errors import ConfigError, SparsifinerError, UnsupportedModelError
from sparsifiner_edge.images import list_images, load_image
from sparsifiner_edge.sparse.hosts.timm import preprocessing
from sparsifiner_edge.sparse.weights import normalise
from tests.models import TINY, images, vit

MEAN = torch.tensor([0.4, 0.5, 0.6])[:, None, None]


class Segmenter(nn.Module):
    """A user's model: pixels of 0 to 1 in, a map out, by way of timm's intermediate layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = vit()
        self.head = nn.Conv2d(64, 3, 1)
        self.register_buffer("mean", MEAN.clone())

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.encoder.forward_intermediates((pixels - self.mean) / 0.25, indices=1, intermediates_only=True)
        return self.head(maps[-1])


def predictors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.state_dict().items() if ".select." in name}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("settings", [{}, {"keep": 0.1, "token_keep": ((3, 0.7),)}, {"preset": "paper"}])
def test_it_is_what_a_folder_holds(
    tmp_path: Path, tiny_weights: Path, pictures: Path, settings: dict[str, Any]
) -> None:
    folder = se.sparsify(TINY, tmp_path / "student", weights=tiny_weights, calibrate=pictures, **settings)
    model = vit(num_classes=10)
    seen = [torch.from_numpy(load_image(path, 160))[None] for path in list_images(pictures)]
    se.sparsify_model(model, calibrate=normalise(torch.cat(seen), preprocessing(model)), **settings)
    assert same(model.state_dict(), safetensors.torch.load_file(folder / "model.safetensors"))
    x = images(model)
    assert torch.equal(model(x), se.load_student(folder).model(x))


def test_a_module_around_it_is_called_with_its_own_images() -> None:
    pixels = torch.rand(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    around, alone = Segmenter(), vit()
    plain = around(pixels)
    se.sparsify_model(around, keep=0.2, cells=4, calibrate=[pixels[:1], pixels[1:]])
    se.sparsify_model(alone, keep=0.2, cells=4, calibrate=(pixels - MEAN) / 0.25)
    assert same(predictors(around.encoder), predictors(alone))
    got = around(pixels)
    assert got.shape == plain.shape == (3, 3, 10, 10)
    assert nn.functional.cosine_similarity(got.flatten(), plain.flatten(), 0) > 0.9
    assert torch.equal(se.restore_model(around)(pixels), plain)


def test_modes_gradients_and_types_stay() -> None:
    model = Segmenter().to(torch.bfloat16).train()
    model.encoder.blocks[0].eval()
    for parameter in model.head.parameters():
        parameter.requires_grad_(False)
    modes = {name: part.training for name, part in model.named_modules()}
    se.sparsify_model(model, calibrate=torch.rand(2, 3, 160, 160, dtype=torch.bfloat16))
    assert {name: part.training for name, part in model.named_modules() if name in modes} == modes
    assert all(parameter.dtype is torch.bfloat16 for parameter in model.parameters())
    assert all(tensor.abs().max() > 0 for tensor in predictors(model).values())
    assert not model.head.weight.requires_grad
    model.encoder(torch.rand(1, 3, 160, 160, dtype=torch.bfloat16)).sum().backward()
    assert model.encoder.blocks[0].attn.qkv.weight.grad is not None


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = vit()

    def forward(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def test_tokens_that_a_hook_changes_between_layers_are_what_the_next_layer_sees() -> None:
    model = se.sparsify_model(vit(), keep=0.3)
    x = images(model)

    def answer(hook: Any) -> Tensor:
        handle = model.blocks[1].register_forward_hook(hook)
        try:
            return cast(Tensor, model(x))
        finally:
            handle.remove()

    anew = answer(lambda _, __, tokens: tokens * 0.5)
    assert not torch.equal(anew, model(x))
    assert torch.equal(answer(lambda _, __, tokens: tokens.mul_(0.5)), anew)
    se.restore_model(model)
    se.sparsify_model(model, keep=1.0, merge=4)
    with pytest.raises(ConfigError, match="or that were changed since"):
        answer(lambda _, __, tokens: tokens.mul_(0.5))


@pytest.mark.parametrize(
    ("make", "settings", "error", "said"),
    [
        (lambda: nn.Linear(2, 2), {}, UnsupportedModelError, "This Linear contains 0 vision transformers"),
        (vit, {"channels": 33}, ConfigError, "exceed the head dimension"),
        (vit, {"keep": (0.1,) * 6 + (1.0,)}, ConfigError, "keep has 7 shares"),
        (lambda: vit("eva02_tiny_patch14_224", depth=2), {"token_keep": ((1, 0.5),)}, ConfigError, "no rotary"),
        (vit, {"calibrate": torch.zeros(2, 160, 160)}, ConfigError, "are float32 [2, 160, 160]"),
        (vit, {"calibrate": torch.zeros(1, 3, 160, 160, dtype=torch.uint8)}, ConfigError, "are uint8"),
        (vit, {"calibrate": torch.full((1, 3, 160, 160), torch.nan)}, ConfigError, "NaN or infinity"),
        (Unused, {"calibrate": torch.zeros(1, 3, 160, 160)}, ConfigError, "did not use its vision transformer"),
    ],
)
def test_what_is_refused_changes_nothing(
    make: Callable[[], nn.Module], settings: dict[str, Any], error: type[SparsifinerError], said: str
) -> None:
    model = make()
    before = copy.deepcopy(model)
    with pytest.raises(error) as caught:
        se.sparsify_model(model, **settings)
    assert said in str(caught.value)
    assert [type(part) for part in model.modules()] == [type(part) for part in before.modules()]
    assert same(model.state_dict(), before.state_dict())
