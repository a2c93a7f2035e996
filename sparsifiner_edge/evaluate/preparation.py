"""How a classifier's images are prepared: as timm validates the model, or their centre."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.bounds import MOST_SIDE, ImageSize, height_width, size_text
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.images import centre_text, load_image, open_image


@dataclasses.dataclass(frozen=True)
class Preparation:
    """From an image file to a model's pixels.

    Attributes:
        size: of the pixels. crop_pct: the share of the resized image's sides that is taken; None: `load_image`.
        crop_mode, interpolation, mean: as timm names them; the mean is what "border" pads with, of 1.
        model: timm's name of whose configuration this is; None: of none.
    """

    size: ImageSize
    crop_pct: float | None = None
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    model: str | None = None

    @property
    def text(self) -> str:
        """For results."""
        pixels = f"to {size_text(self.size)} px"
        if self.crop_pct is None:
            return f"{centre_text(self.size)}, {self.interpolation} {pixels}"
        origin = f"as timm validates {self.model}" if self.model else "as timm validates models"
        return f"{origin}: {self.interpolation}, crop_pct {self.crop_pct:g}, crop_mode {self.crop_mode}, {pixels}"

    def load(self, path: Path) -> Pixels:
        """uint8 RGB [height, width, 3]; decoded in full, as timm does it, unless the centre is taken.

        Raises:
            ImageError: as of `load_image`; or it is too long and thin for timm's resizing.
        """
        if self.crop_pct is None:
            return load_image(path, self.size)
        image = open_image(path)
        across, ratio = max(height_width(self.size)) / self.crop_pct, max(image.size) / min(image.size)
        if {"center": across**2 * ratio > Image.MAX_IMAGE_PIXELS, "border": across < ratio}.get(self.crop_mode):
            shape = size_text((image.size[1], image.size[0]))
            raise ImageError(f"{path} has {shape} pixels: too long and thin to be resized.", "Remove it.")
        return np.ascontiguousarray(np.asarray(_transform(self)(image)).transpose(1, 2, 0))


@functools.lru_cache(maxsize=8)
def _transform(preparation: Preparation) -> Any:
    """timm's resizing and cropping alone, to uint8 [3, height, width]: models normalise by themselves."""
    return create_transform(
        height_width(preparation.size),
        interpolation=preparation.interpolation,
        mean=preparation.mean,
        crop_pct=preparation.crop_pct,
        crop_mode=preparation.crop_mode,
        use_prefetcher=True,
    )


def preparation_of(model: str | None, size: ImageSize, crop_pct: float | None = None) -> Preparation:
    """As timm's configuration of a model says; without one the centre square or rectangle.

    Args:
        model: timm's name; None or another: there is no configuration.
        size: of the model's images. crop_pct: above 0 and at most 1; instead of the configuration's own.

    Raises:
        ConfigError: `crop_pct` is so small that images would be huge.
    """
    found = get_pretrained_cfg(model) if model is not None and timm.is_model(model) else None
    made = Preparation(size, crop_pct)
    if found is not None:
        own = resolve_data_config(pretrained_cfg=found.to_dict())
        share = own["crop_pct"] if crop_pct is None else crop_pct
        made = Preparation(size, share, own["crop_mode"], own["interpolation"], tuple(own["mean"]), model)
    if made.crop_pct is not None and math.floor(max(height_width(size)) / made.crop_pct) > MOST_SIDE:
        raise ConfigError(f"crop_pct is {made.crop_pct:g}.", f"Images would get sides of more than {MOST_SIDE} pixels.")
    return made
