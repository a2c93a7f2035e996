"""What is done to training images: crops, flips, corruptions of our own; RandAugment, random erasing, mixup, CutMix and
label smoothing by timm, as the published recipes name them.

All that is drawn follows from a seed, so that a training that was killed ends where an unbroken one ends.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.corruptions import COMMON, SEVERITIES, corrupt
from sparsifiner_edge.distill.recipe import Images
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.images import centred


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Meanwhile all that torch, NumPy and Python draw follows from `seed`; afterwards they draw on as before."""
    numpy, python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy)
            random.setstate(python)


def seeded(transform: Any, image: Any, seed: int) -> Tensor:
    """A transform whose draws follow from `seed` alone."""
    with drawn_from(seed):
        return cast(Tensor, transform(image))


def augmentation(size: ImageSize, images: Images, mean: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> v2.Transform:
    """PIL image -> uint8 [3,H,W]; shapes of random crops vary by a third about that of `size`.

    Args:
        mean: of the model's images, 0 to 1: what RandAugment fills with.

    Raises:
        ConfigError: a policy that timm does not know.
    """
    height, width = height_width(size)
    crop: Any = functools.partial(centred, size=size)
    if images.smallest_crop < 1:
        shapes = (3 / 4 * (width / height), 4 / 3 * (width / height))
        crop = v2.RandomResizedCrop(
            (height, width), (images.smallest_crop, 1.0), shapes, v2.InterpolationMode.BICUBIC, antialias=True
        )
    flip = [v2.RandomHorizontalFlip()] if images.flip else []
    auto = [_policy(images.auto_augment, min(height, width), mean)] if images.auto_augment else []
    worse = [functools.partial(sometimes_corrupted, share=images.corrupted)] if images.corrupted else []
    return v2.Compose([crop, *flip, *auto, *worse, v2.PILToTensor()])


def _policy(name: str, side: int, mean: tuple[float, float, float]) -> Any:
    """As timm's own transforms call it: shifts up to .45 of the shorter side, filled with the mean colour."""
    fill = tuple(min(255, round(255 * x)) for x in mean)
    params = {"translate_const": int(side * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    kinds = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    make = kinds.get(name.partition("-")[0], auto_augment_transform)
    try:
        found: Any = make(name, params)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"images.auto_augment is {name!r:.60}, which timm does not know.", 'Such as "rand-m9-mstd0.5-inc1", or "".'
        ) from error
    for operation in (*getattr(found, "ops", ()), *itertools.chain(*getattr(found, "policy", ()))):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return found


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """timm's, which asks Pillow for no bits at all at the greatest magnitude, which newer ones refuse."""
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))


def sometimes_corrupted(image: Any, share: float) -> Any:
    """A Pillow image, or with a probability of `share` one of `COMMON` of it, at any severity."""
    if torch.rand(()) >= share:
        return image
    kind, level, seed = (int(torch.randint(most, ())) for most in (len(COMMON), len(SEVERITIES), 1 << 31))
    return Image.fromarray(corrupt(np.asarray(image), COMMON[kind], SEVERITIES[level], seed))


class BatchAugmentation:
    """What is done to whole batches, normalised and on their device.

    Args:
        classes: of the labels; 0: there are none.

    Raises:
        ConfigError: batches are mixed in two ways; or are odd, for timm mixes and smooths by pairs.
    """

    def __init__(self, images: Images, classes: int, batch: int, device: Any) -> None:
        mixes = images.mixup > 0 or images.mixup_cut > 0
        if mixes and images.cut_mix:
            raise ConfigError(
                "images.cut_mix and images.mixup, images.mixup_cut mix the same images.", "Set one of them to 0."
            )
        if (mixes or images.smoothing) and batch % 2:
            raise ConfigError(
                f"images.mixup, mixup_cut and smoothing go by pairs, and batch is {batch}.", "Make it even."
            )
        self._cut_mix, self._classes = images.cut_mix, classes
        self._erase = RandomErasing(images.erasing, mode="pixel", device=device) if images.erasing else None
        self._mix = Mixup(
            images.mixup, images.mixup_cut, prob=float(mixes), label_smoothing=images.smoothing,
            num_classes=max(1, classes),
        ) if mixes or (images.smoothing and classes) else None  # fmt: skip

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B,3,H,W] and labels [B]; these come back as shares of classes [B,C] where images are mixed or labels
        smoothed, and as None where there are none, or where a rectangle of another image says something else.
        """
        if self._erase is not None:
            images = self._erase(images)
        if self._cut_mix and float(torch.rand(())) < self._cut_mix:
            return v2.CutMix(num_classes=1)(images, torch.zeros(len(images), dtype=torch.long))[0], None
        if self._mix is not None:
            images, mixed = self._mix(images.clone(), labels.clamp_min(0))
            return images, mixed if self._classes else None
        return images, labels if self._classes else None
