"""A model like the demonstration's, without its weights and a hundred times smaller."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models import vit


class Saliency(nn.Module):
    """Images [B,3,H,W] -> a map [B,H,W], 0 to 1."""

    image_mean, image_std, output_names = (0.5,) * 3, (0.25,) * 3, ("saliency",)

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.backbone = vit(img_size=img_size, num_classes=0, depth=2, embed_dim=32, num_heads=1)
        torch.manual_seed(1)
        self.decoder = nn.ConvTranspose2d(32, 1, 16, 16)

    def forward(self, pixels: Tensor) -> Tensor:
        (patches,) = self.backbone.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)
        return self.decoder(patches)[:, 0].sigmoid()


def saliency(img_size: int = 160) -> nn.Module:
    return Saliency(img_size).eval()
