"""Small transformers models with random weights, and valid and invalid models of a user: classes and functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.models import vit

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
SIXTEEN = {**SIZES, "intermediate_size": 128, "image_size": 160, "patch_size": 16}
PROCESSOR = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_rescale": True, "rescale_factor": 1 / 255}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTModel", SIXTEEN),
    "DINOv2": ("Dinov2Model", {**SIZES, "image_size": 140}),
    "DINOv2-registers": ("Dinov2WithRegistersModel", {**SIZES, "image_size": 140}),
    "DINOv2-gated": ("Dinov2Model", {**SIZES, "image_size": 140, "use_swiglu_ffn": True}),
    "DINOv3": ("DINOv3ViTModel", {**SIXTEEN, "num_register_tokens": 4}),
    "SigLIP": ("SiglipVisionModel", SIXTEEN),
    "CLIP": ("CLIPVisionModel", SIXTEEN),
}


def model(name: str, seed: int = 0, **options: Any) -> Any:
    """Return one of `MODELS` with scaled queries and keys: attention of fresh weights is nearly uniform."""
    kind, own = MODELS[name]
    torch.manual_seed(seed)
    cls = getattr(transformers, kind)
    made = cls(cls.config_class(**own | options)).eval()
    if name != "SigLIP":  # its fresh weights are sharp
        sharpen(made)
    return made


def depth_anything(seed: int = 0) -> Any:
    """Return a small Depth Anything V2: reads four layers of DINOv2, outputs depth [B,H,W]."""
    backbone = transformers.Dinov2Config(
        **SIZES, image_size=140, out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=64,
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
        patch_size=14,
        depth_estimation_type="metric",
    )
    torch.manual_seed(seed)
    made = transformers.DepthAnythingForDepthEstimation(config).eval()
    for part in [*made.neck.modules(), *made.head.modules()]:
        if isinstance(part, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            torch.nn.init.kaiming_normal_(part.weight)  # fresh ones give a constant
    sharpen(made)
    return made


@torch.no_grad()
def sharpen(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.mul_(8)


def saved(made: Any, folder: Path, processor: dict[str, Any] | None = None) -> Path:
    """Save a model's folder as transformers does."""
    made.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR if processor is None else processor))
    return folder


def images(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


class Segmenter(nn.Module):
    """timm's encoder and a decoder."""

    output_names: tuple[str, ...] | None = ("mask", "heat")
    image_mean, image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, img_size: int | tuple[int, int] = 160) -> None:
        super().__init__()
        self.encoder = vit(img_size=img_size)
        torch.manual_seed(1)
        self.head = nn.Sequential(nn.Conv2d(64, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 2, 16, 16))

    def forward(self, pixels: Tensor) -> Any:
        early, late = self.encoder.forward_intermediates(pixels, indices=[2, 5], intermediates_only=True)
        return self.head(late), early.mean(1, keepdim=True)


class Masked(Segmenter):
    """Outputs a mask [B,H,W] from 0 to 1, and another map."""

    output_names = None

    def forward(self, pixels: Tensor) -> Any:
        mask, heat = super().forward(pixels)
        return {"mask": mask[:, 0].sigmoid(), "heat": heat}


class Depth(nn.Module):
    """The backbone of transformers, which records no normalisation."""

    image_mean, image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self) -> None:
        super().__init__()
        self.backbone = model("DINOv2")
        self.head = nn.Linear(64, 1)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"depth": self.head(self.backbone(pixels).last_hidden_state[:, 1:])}


class TokensToo(Depth):
    """Has an output with the name of a backbone output."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"tokens": super().forward(pixels)["depth"]}


class Inside(nn.Module):
    """Normalises inside and declares nothing; timm records another normalisation for its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = vit(num_classes=0)
        torch.manual_seed(2)
        self.head = nn.Linear(64, 3)

    def forward(self, pixels: Tensor) -> Any:
        return self.head(self.encoder((pixels - 0.4) / 0.3))


class Outside(Inside):
    """Expects normalised input."""

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.encoder(pixels))


def fails() -> nn.Module:
    raise RuntimeError("no such checkpoint")


def number() -> Any:
    return 7


def stubborn(img_size: int) -> nn.Module:
    return Segmenter()
