"""Functions of a user's own that make models, good and bad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.hosts.hugging_face import model
from tests.models import vit


class Segmenter(nn.Module):
    """timm's encoder and a decoder."""

    output_names = ("mask", "heat")
    image_mean, image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, img_size: int | tuple[int, int] = 160) -> None:
        super().__init__()
        self.encoder = vit(img_size=img_size)
        torch.manual_seed(1)
        self.head = nn.Sequential(nn.Conv2d(64, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 2, 16, 16))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        early, late = self.encoder.forward_intermediates(pixels, indices=[2, 5], intermediates_only=True)
        return self.head(late), early.mean(1, keepdim=True)


def segmenter(img_size: int | tuple[int, int] = 160) -> nn.Module:
    return Segmenter(img_size)


class Masked(Segmenter):
    """A mask [B,H,W] from 0 to 1, and another map."""

    output_names = None  # type: ignore[assignment]

    def forward(self, pixels: Tensor) -> Any:
        mask, heat = super().forward(pixels)
        return {"mask": mask[:, 0].sigmoid(), "heat": heat}


def masked(img_size: int | tuple[int, int] = 160) -> nn.Module:
    return Masked(img_size)


class Depth(nn.Module):
    """transformers' backbone, which records nothing of pixels."""

    image_mean, image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self) -> None:
        super().__init__()
        self.backbone = model("DINOv2")
        self.head = nn.Linear(64, 1)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"depth": self.head(self.backbone(pixels).last_hidden_state[:, 1:])}


def depth() -> nn.Module:
    return Depth()


class TokensToo(Depth):
    """An output with the name of what the backbone gives."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"tokens": super().forward(pixels)["depth"]}


def tokens_too() -> nn.Module:
    return TokensToo()


class Inside(nn.Module):
    """Normalises inside, and declares nothing; what timm records for its encoder is something else."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = vit(num_classes=0)
        self.head = nn.Linear(64, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.encoder((pixels - 0.4) / 0.3))


def inside() -> nn.Module:
    torch.manual_seed(2)
    return Inside()


class Outside(Inside):
    """Its caller normalises."""

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.encoder(pixels))


def outside() -> nn.Module:
    torch.manual_seed(2)
    return Outside()


def fails() -> nn.Module:
    raise RuntimeError("no such checkpoint")


def number() -> Any:
    return 7


def stubborn(img_size: int) -> nn.Module:
    return Segmenter()
