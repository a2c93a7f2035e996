"""Images for training, from any folder, and what timm does to them; all that is drawn follows from the seed, so that a
training that was killed ends where an unbroken one ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ImageOps
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.distill.recipe import Images
from sparsifiner_edge.errors import ConfigError, ImageError, SparsifinerError
from sparsifiner_edge.images import class_order, evenly, fit_image, list_images, open_image


@contextlib.contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
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


def augmentation(size: ImageSize, images: Images, mean: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> Any:
    """PIL image -> uint8 [3,H,W]; shapes of random crops vary by a third about that of `size`.

    Args:
        mean: of the model's images, 0 to 1: what RandAugment fills with.

    Raises:
        ConfigError: a policy that timm does not know.
    """
    height, width = height_width(size)
    try:
        transform: Any = transforms_imagenet_train(
            (height, width),
            (images.smallest_crop, 1.0),
            (3 / 4 * (width / height), 4 / 3 * (width / height)),
            hflip=0.5 * images.flip,
            color_jitter=None,
            auto_augment=images.auto_augment or None,
            interpolation="bicubic",
            mean=mean,
            normalize=False,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"images.auto_augment is {images.auto_augment!r:.60}, which timm does not know.",
            'Such as "rand-m9-mstd0.5-inc1", or "".',
        ) from error
    if images.smallest_crop == 1:
        transform.transforms[0] = functools.partial(fit_image, size=size)
    for step in transform.transforms:
        for operation in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """timm's, which asks Pillow for no bits at all at the greatest magnitude, which newer ones refuse."""
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))


class BatchAugmentation:
    """What is done to whole batches, normalised and on their device.

    Args:
        classes: of the labels; 0: no labels.

    Raises:
        ConfigError: batches are odd, for timm mixes and smooths by pairs.
    """

    def __init__(self, images: Images, classes: int, batch: int, device: Any) -> None:
        mixes = images.mixup > 0 or images.mixup_cut > 0
        if (mixes or images.smoothing) and batch % 2:
            raise ConfigError(
                f"images.mixup, mixup_cut and smoothing go by pairs, and batch is {batch}.", "Make it even."
            )
        self._classes = classes
        self._erase = RandomErasing(images.erasing, mode="pixel", device=device) if images.erasing else None
        self._mix = (
            Mixup(
                images.mixup,
                images.mixup_cut,
                prob=images.mixed * mixes,
                label_smoothing=images.smoothing,
                num_classes=max(1, classes),
            )
            if mixes or (images.smoothing and classes)
            else None
        )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B,3,H,W] and labels [B]; these come back as shares of classes [B,C] where images are mixed or labels
        smoothed, and as None where there are none.
        """
        if self._erase is not None:
            images = self._erase(images)
        shares: Tensor | None = labels
        if self._mix is not None:
            images, shares = self._mix(images.clone(), labels.clamp_min(0))
        return images, shares if self._classes else None


class Batch(NamedTuple):
    """Images uint8 [B,3,H,W], labels int64 [B] (-1: none), their files, and files that could not be read."""

    images: Tensor
    labels: Tensor
    files: tuple[str, ...]
    unreadable: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Where images come from.

    Attributes:
        train: files. held_out: files that are not trained on.
        fingerprint: tells whether a training resumes on the images that it began with, wherever they lie by now: of
            their names below their folder, their sizes and labels.
        labels: the class of each file, where labels count; else empty. classes: their names.
        held_out_labels: of each file held out, where all of them lie in folders of classes; else empty.
    """

    train: list[Path]
    held_out: tuple[Path, ...]
    fingerprint: str
    labels: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    held_out_labels: tuple[int, ...] = ()


def _fingerprint(root: Path, paths: Sequence[Path], labels: Sequence[int]) -> str:
    lines = [str(labels)]
    for path in paths:
        try:
            size = path.stat().st_size
        except OSError:  # Gone since it was listed: whoever reads it says so.
            size = -1
        lines.append(f"{os.path.relpath(path, root)} {size}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def folder_source(
    folder: Path, count: int, labelled: bool, held_out: Path | None, classifier: tuple[str, ...] = ()
) -> ImageSource:
    """Every image below a folder, `count` of them evenly taken and held out unless a folder of them is given.

    Args:
        labelled: the name of the folder below `folder` is an image's class.
        classifier: its labels, in its order; see `class_order`.

    Raises:
        ImageError: no images, or too few.
        ConfigError: labelled, and an image is not in the folder of a class.
    """
    files = list_images(folder)
    chosen = list_images(held_out) if held_out is not None else evenly(files, min(count, max(1, len(files) // 5)))
    taken = {path.resolve() for path in chosen}
    train = [path for path in files if path.resolve() not in taken]
    chosen = evenly(chosen, count)
    if not train:
        raise ImageError(f"{folder} holds {len(files)} images, all of which are held out.", "Give more images.")
    root = folder if held_out is None else held_out
    classes: tuple[str, ...] = ()
    if labelled:
        if folder in files or any(path.parent == folder for path in files):
            raise ConfigError(
                f"{folder} has images outside the folders of classes.", "Sort them, or leave --labels out."
            )
        classes = class_order((_top(path, folder) for path in files), classifier)  # those held out are of classes too
    numbers = {name: number for number, name in enumerate(classes)}
    labels = tuple(numbers[_top(path, folder)] for path in train) if labelled else ()
    known = [numbers[top] for path in chosen if (top := _top(path, root)) in numbers]
    fingerprint = _fingerprint(folder, train, labels) + _fingerprint(root, chosen, ())
    return ImageSource(
        train, tuple(chosen), fingerprint, labels, classes, tuple(known) if len(known) == len(chosen) else ()
    )


def _top(path: Path, root: Path) -> str:
    """What `path` lies in, or is, directly below `root`; empty where it is `root` itself."""
    return "".join(path.relative_to(root).parts[:1])


Sample = tuple[Tensor, int, str, tuple[str, ...]]
"""An image uint8 [3,H,W], its label (-1: none), its file, and files before it that could not be read."""


class ShuffledBatches(Dataset[Batch | SparsifinerError]):
    """Endless passes over the images, each in an order of its own: sample n is the n-th image of the training.

    Indexed by the numbers of a batch's samples.
    """

    def __init__(self, source: ImageSource, transform: Any, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, numbers: list[int]) -> Batch | SparsifinerError:
        """What ends a training is returned: a worker process that raised it would show its traceback instead."""
        try:
            images, labels, files, unreadable = zip(*map(self.sample, numbers), strict=True)
        except SparsifinerError as error:
            return error
        return Batch(torch.stack(images), torch.tensor(labels), files, tuple(itertools.chain(*unreadable)))

    def sample(self, number: int) -> Sample:
        """The n-th image.

        Raises:
            ImageError: none can be read.
        """
        count = len(self.source.train)
        unreadable: list[str] = []
        for further in range(count):  # an unreadable image gives its place to the next one
            index = self._index(number // count, (number + further) % count)
            path = self.source.train[index]
            try:
                image = open_image(path)
            except ImageError:
                unreadable.append(str(path))
                continue
            label = self.source.labels[index] if self.source.labels else -1
            with fixed_seed(self.seed + number):
                return self.transform(image), label, str(path), tuple(unreadable)
        raise ImageError(f"None of the {count} images can be read.", f"Look at {unreadable[0]}, for instance.")

    def _index(self, epoch: int, place: int) -> int:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (epoch + 1))
            self._order = (epoch, torch.randperm(len(self.source.train), generator=generator).tolist())
        return self._order[1][place]


def batches(
    source: ImageSource,
    transform: Any,
    *,
    seed: int,
    batch: int,
    first: int,
    process: int,
    processes: int,
    workers: int,
) -> Iterator[Batch]:
    """Endless batches of one process, from the `first` pass of all processes on.

    Together the processes draw what one process would with batches as large as all of theirs.

    Raises:
        SparsifinerError: by the iterator: an image, or all of them, cannot be trained on.
    """
    start, step = (first * processes + process) * batch, processes * batch
    numbers: Any = (list(range(n, n + batch)) for n in itertools.count(start, step))
    loader = DataLoader(
        ShuffledBatches(source, transform, seed),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    for drawn in loader:
        if isinstance(drawn, SparsifinerError):
            raise drawn
        yield drawn
