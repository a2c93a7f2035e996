"""Images for evaluation: class folders, preparation, and worker processes that read ahead."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.bounds import MOST_WORKERS, height_width, size_text
from sparsifiner_edge.corruptions import corrupt
from sparsifiner_edge.errors import ConfigError, ImageError, SparsifinerError
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import class_order, evenly, list_images, load_image, open_image
from sparsifiner_edge.machine import available_cores

MOST_RATIO = 32
"""Maximum ratio of the longer to the shorter side that timm's resizing can handle."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images and their classes.

    Attributes:
        labels: Class number of each file, int64 [n].
        classes: Class names.
        name: Name for results.
    """

    files: tuple[Path, ...]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Labelled:
        """Return at most `count` images, evenly spaced."""
        taken = evenly(range(len(self)), len(self) if count is None else count)
        files = tuple(self.files[place] for place in taken)
        return dataclasses.replace(self, files=files, labels=self.labels[taken])


def class_set(folder: Path, classes: tuple[str, ...] | None = None, classifier: tuple[str, ...] = ()) -> Labelled:
    """Read a folder with one subfolder per class.

    Args:
        folder: The folder.
        classes: Class names in the order of the labels, if known.
        classifier: Labels of the classifier that is evaluated, in its order; see `class_order`.

    Raises:
        ImageError: There are no images.
        ConfigError: There are no class folders, or a class is unknown.
    """
    files = list_images(folder)
    parts = [path.relative_to(folder).parts if folder.is_dir() else () for path in files]
    if any(len(part) < 2 for part in parts):
        raise ConfigError(f"{folder} has images outside of class folders.", "Give one folder per class.")
    names = classes or class_order((part[0] for part in parts), classifier)
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted({part[0] for part in parts} - numbers.keys())
    if unknown:
        raise ConfigError(f"{folder} holds the unknown class {unknown[0]!r}.", f"Known: {', '.join(names)}.")
    labels = np.array([numbers[part[0]] for part in parts], dtype=np.int64)
    return Labelled(tuple(files), labels, names, str(folder))


class Feed(NamedTuple):
    """Preparation of images for models.

    Attributes:
        framing: How images become pixels.
        text: The same, for results.
        transform: timm's resizing and cropping of a Pillow image to uint8 [3,height,width], without normalisation; None
            follows `framing`.
        workers: Number of processes that read ahead; None takes one per core, as far as there are batches; 0 reads in
            this process.
        corruptions: Corruptions that are also applied to each image; the random parts follow from its number.
        severity: Severity of the corruptions.
    """

    framing: Framing
    text: str
    transform: Any = None
    workers: int | None = None
    corruptions: tuple[str, ...] = ()
    severity: int = 3

    def load(self, path: Path) -> Pixels:
        """Return an image as uint8 RGB [height, width, 3], decoded at full size as timm does unless `framing` says how.

        Raises:
            ImageError: See `load_image`; or the image is too long and thin for timm's resizing.
        """
        if self.transform is None:
            return load_image(path, self.framing)
        image = open_image(path)
        if max(image.size) > MOST_RATIO * min(image.size):
            shape = size_text((image.size[1], image.size[0]))
            raise ImageError(f"{path} has {shape} pixels, which is too narrow to resize.", "Remove it.")
        return np.ascontiguousarray(np.asarray(self.transform(image)).transpose(1, 2, 0))


def feed_of(model: str | None, framing: Framing) -> Feed:
    """Return a feed as timm's configuration of a model says; without one, as `framing` says."""
    pretrained = get_pretrained_cfg(model) if model is not None and timm.is_model(model) else None
    if pretrained is None:
        return Feed(framing, str(framing))
    config = resolve_data_config(pretrained_cfg=pretrained.to_dict())
    crop = {name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
    settings = ", ".join(f"{name} {value}" for name, value in crop.items())
    transform = create_transform(height_width(framing.size), mean=config["mean"], use_prefetcher=True, **crop)
    return Feed(framing, f"preprocessing of timm for {model}: {settings}, to {size_text(framing.size)} px", transform)


_Prepared: TypeAlias = "tuple[int, Tensor] | SparsifinerError"


class _Files(Dataset[_Prepared]):
    """Dataset of images by number, [K,H,W,3].

    An unreadable image is returned as an error: a worker that raised it would print a traceback.
    """

    def __init__(self, files: Sequence[Path], feed: Feed) -> None:
        self.files, self.feed = files, feed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> _Prepared:
        try:
            image = self.feed.load(self.files[number])
            worse = [corrupt(image, name, self.feed.severity, seed=number) for name in self.feed.corruptions]
            return number, torch.from_numpy(np.stack([image, *worse]))
        except SparsifinerError as error:
            return error


def read_images(files: Sequence[Path], feed: Feed, batch: int) -> Iterator[tuple[list[int], Array]]:
    """Yield image numbers and their pixels uint8 [B*K,H,W,3] in order: each image clean, then under each corruption.

    Args:
        files: The images.
        feed: How they are read.
        batch: Approximate number of images per batch, including corrupted ones.

    Raises:
        ImageError: During iteration: an image cannot be read.
        ConfigError: During iteration: a worker failed, for example for lack of shared memory.
    """
    images, workers = max(1, batch // (1 + len(feed.corruptions))), feed.workers
    batches = -(-len(files) // images)
    if workers is None:
        workers = 0 if batches == 1 else min(available_cores(), batches, MOST_WORKERS)
    loader = DataLoader(
        _Files(files, feed),
        batch_size=images,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_sigint,
    )
    try:
        for read in loader:
            if isinstance(read, SparsifinerError):
                raise read
            yield read[0], read[1].numpy()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        why = str(error).strip().splitlines()[-1]
        raise ConfigError(f"A process that reads images failed: {why}", "Use fewer, or none: --workers 0.") from error


def _collate(images: list[_Prepared]) -> tuple[list[int], Tensor] | SparsifinerError:
    good = []
    for image in images:
        if isinstance(image, SparsifinerError):
            return image
        good.append(image)
    numbers, pixels = zip(*good, strict=True)
    return list(numbers), torch.cat(pixels)


def _ignore_sigint(_: int) -> None:
    """Ignore Ctrl-C in a worker: the signal reaches all processes, and the main process ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
