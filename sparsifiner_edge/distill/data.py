"""Training images from any folder, augmented by timm.

All random numbers follow from the seed, so that a training that was interrupted ends with the same result as one that
was not.
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
    """Seed the random numbers of torch, NumPy and Python inside a `with` block, and restore their state afterwards."""
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
    """Return a transform from a PIL image to a uint8 tensor [3,H,W].

    The aspect ratio of random crops varies by a third around that of `size`.

    Args:
        size: Image size of the model in pixels.
        images: Augmentation settings.
        mean: Mean of the model's images, from 0 to 1, with which RandAugment fills.

    Raises:
        ConfigError: If timm does not know the policy.
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
            'Give a policy such as "rand-m9-mstd0.5-inc1", or "".',
        ) from error
    if images.smallest_crop == 1:
        transform.transforms[0] = functools.partial(fit_image, size=size)
    for step in transform.transforms:
        for operation in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """Posterize as timm does, with at least one bit.

    At the greatest magnitude timm passes 0 bits to Pillow, which recent versions refuse.
    """
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))


class BatchAugmentation:
    """Augmentation of complete batches, which are normalised and on their device."""

    def __init__(self, images: Images, classes: int, batch: int, device: Any) -> None:
        """Create the augmentation.

        Args:
            images: Augmentation settings.
            classes: Number of classes of the labels, or 0 without labels.
            batch: Images per batch.
            device: Device of the batches.

        Raises:
            ConfigError: If the batch size is odd, but timm mixes or smooths in pairs.
        """
        mixes = images.mixup > 0 or images.mixup_cut > 0
        if (mixes or images.smoothing) and batch % 2:
            raise ConfigError(
                f"images.mixup, mixup_cut and smoothing work in pairs, but batch is {batch}.", "Set an even batch."
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
        """Return augmented images [B,3,H,W] and their labels.

        Labels [B] become shares of classes [B,C] where images are mixed or labels smoothed, and None without classes.
        """
        if self._erase is not None:
            images = self._erase(images)
        shares: Tensor | None = labels
        if self._mix is not None:
            images, shares = self._mix(images.clone(), labels.clamp_min(0))
        return images, shares if self._classes else None


class Batch(NamedTuple):
    """Batch of images.

    Attributes:
        images: Images, uint8 [B,3,H,W].
        labels: Class numbers, int64 [B]; -1 without a label.
        files: Path of each image.
        unreadable: Paths of files that could not be read.
    """

    images: Tensor
    labels: Tensor
    files: tuple[str, ...]
    unreadable: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Images of a training.

    Attributes:
        train: Files to train on.
        held_out: Files that are not trained on.
        fingerprint: Digest of names below the folder, file sizes and labels. It shows whether a training resumes with
            the images with which it began, wherever they are now.
        labels: Class number of each file to train on, or empty without labels.
        classes: Class names.
        held_out_labels: Class number of each held-out file, or empty unless all of them are in class folders.
    """

    train: list[Path]
    held_out: tuple[Path, ...]
    fingerprint: str
    labels: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    held_out_labels: tuple[int, ...] = ()


def _fingerprint(root: Path, paths: Sequence[Path], labels: Sequence[int]) -> str:
    """Return a digest of the names, sizes and labels of files."""
    lines = [str(labels)]
    for path in paths:
        try:
            size = path.stat().st_size
        except OSError:  # Deleted since it was listed. Reading it reports the error later.
            size = -1
        lines.append(f"{os.path.relpath(path, root)} {size}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def folder_source(
    folder: Path, count: int, labelled: bool, held_out: Path | None, classifier: tuple[str, ...] = ()
) -> ImageSource:
    """Return the images of a folder, split into files to train on and held-out files.

    Args:
        folder: Folder of images, searched recursively.
        count: Most images to hold out. At most a fifth of the folder is held out.
        labelled: Take the name of the folder directly below `folder` as the class of an image.
        held_out: Folder of held-out images, in place of images of `folder`.
        classifier: Class names of the classifier, in its order; see `class_order`.

    Raises:
        ImageError: If there are no images, or too few.
        ConfigError: If `labelled` is set and an image is not in a class folder.
    """
    files = list_images(folder)
    chosen = list_images(held_out) if held_out is not None else evenly(files, min(count, max(1, len(files) // 5)))
    reserved = {path.resolve() for path in chosen}
    train = [path for path in files if path.resolve() not in reserved]
    chosen = evenly(chosen, count)
    if not train:
        raise ImageError(
            f"{folder} holds {len(files)} images, which are all held out for validation.", "Give more images."
        )
    root = folder if held_out is None else held_out
    classes: tuple[str, ...] = ()
    if labelled:
        if folder in files or any(path.parent == folder for path in files):
            raise ConfigError(
                f"{folder} has images outside of class folders.",
                "Move each image into the folder of its class, or leave --labels out.",
            )
        # Held-out files count, too: their classes may have no other image.
        classes = class_order((_top(path, folder) for path in files), classifier)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = tuple(numbers[_top(path, folder)] for path in train) if labelled else ()
    known = [numbers[top] for path in chosen if (top := _top(path, root)) in numbers]
    fingerprint = _fingerprint(folder, train, labels) + _fingerprint(root, chosen, ())
    return ImageSource(
        train, tuple(chosen), fingerprint, labels, classes, tuple(known) if len(known) == len(chosen) else ()
    )


def _top(path: Path, root: Path) -> str:
    """Return the first part of `path` below `root`, or "" if it is `root` itself."""
    return "".join(path.relative_to(root).parts[:1])


Sample = tuple[Tensor, int, str, tuple[str, ...]]
"""Image uint8 [3,H,W], its label (-1 without one), its file, and the files before it that could not be read."""


class ShuffledBatches(Dataset[Batch | SparsifinerError]):
    """Endless shuffled passes over the images, as a data set of batches.

    Sample n is the n-th image of the training. An index is the list of sample numbers in a batch.
    """

    def __init__(self, source: ImageSource, transform: Any, seed: int) -> None:
        """Store the images, their transform and the seed."""
        self.source, self.transform, self.seed = source, transform, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, numbers: list[int]) -> Batch | SparsifinerError:
        """Return a batch, or the error that ends the training.

        The error is returned because a worker process that raised it would print its traceback.
        """
        try:
            images, labels, files, unreadable = zip(*map(self.sample, numbers), strict=True)
        except SparsifinerError as error:
            return error
        return Batch(torch.stack(images), torch.tensor(labels), files, tuple(itertools.chain(*unreadable)))

    def sample(self, number: int) -> Sample:
        """Return the n-th sample of the training.

        Raises:
            ImageError: If no image can be read.
        """
        count = len(self.source.train)
        unreadable: list[str] = []
        for further in range(count):  # The next image replaces an unreadable one.
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
        raise ImageError(f"None of the {count} images can be read.", f"Check the first one, {unreadable[0]}.")

    def _index(self, epoch: int, place: int) -> int:
        """Return the index of the image at a position in a pass."""
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
    """Yield endless batches for one process.

    Together the processes draw the same samples as a single process with batches as large as all of theirs.

    Args:
        source: Images of the training.
        transform: Transform of an image.
        seed: Seed of the shuffling and the augmentation.
        batch: Images per process and step.
        first: Step at which to start.
        process: Number of this process.
        processes: Number of processes.
        workers: Number of processes that read images. 0 reads them in this process.

    Raises:
        SparsifinerError: If no image can be read, or an image cannot be used. The iterator raises it.
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
