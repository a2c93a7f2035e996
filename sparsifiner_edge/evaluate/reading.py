"""Images on their way to models: folders by class, how each image is prepared, and processes that read ahead."""

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
"""Longer to shorter side of an image that timm's resizing makes something of."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images and their classes.

    Attributes:
        labels: of each file the number of its class, int64 [n]. classes: names. name: for results.
    """

    files: tuple[Path, ...]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Labelled:
        """At most `count` of them, evenly taken."""
        taken = evenly(range(len(self)), len(self) if count is None else count)
        files = tuple(self.files[place] for place in taken)
        return dataclasses.replace(self, files=files, labels=self.labels[taken])


def class_set(folder: Path, classes: tuple[str, ...] | None = None, classifier: tuple[str, ...] = ()) -> Labelled:
    """Images of a folder with one folder per class.

    Args:
        classes: names in the order that labels count, if known.
        classifier: labels of the classifier that is evaluated, in its order; see `class_order`.

    Raises:
        ImageError: nothing there. ConfigError: no folder per class, or a class that is not known.
    """
    files = list_images(folder)
    parts = [path.relative_to(folder).parts if folder.is_dir() else () for path in files]
    if any(len(part) < 2 for part in parts):
        raise ConfigError(f"{folder} holds images in no folder of their class.", "Give one folder per class.")
    names = classes or class_order((part[0] for part in parts), classifier)
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted({part[0] for part in parts} - numbers.keys())
    if unknown:
        raise ConfigError(f"{folder} holds the unknown class {unknown[0]!r}.", f"Known: {', '.join(names)}.")
    labels = np.array([numbers[part[0]] for part in parts], dtype=np.int64)
    return Labelled(tuple(files), labels, names, str(folder))


class Feed(NamedTuple):
    """How images reach models.

    Attributes:
        framing: how images become pixels. text: the same for results. transform: timm's resizing and cropping alone, of
            a Pillow image, to uint8 [3,height,width]: models normalise by themselves; None: as `framing` says.
        workers: processes that read ahead; None: one for each core, as far as there are batches for them; 0: this one.
        corruptions, severity: of each image also these; what is drawn follows from its number.
    """

    framing: Framing
    text: str
    transform: Any = None
    workers: int | None = None
    corruptions: tuple[str, ...] = ()
    severity: int = 3

    def load(self, path: Path) -> Pixels:
        """uint8 RGB [height, width, 3]; decoded in full, as timm does it, unless `framing` says how.

        Raises:
            ImageError: as of `load_image`; or it is too long and thin for timm's resizing.
        """
        if self.transform is None:
            return load_image(path, self.framing)
        image = open_image(path)
        if max(image.size) > MOST_RATIO * min(image.size):
            shape = size_text((image.size[1], image.size[0]))
            raise ImageError(f"{path} has {shape} pixels: too long and thin to be resized.", "Remove it.")
        return np.ascontiguousarray(np.asarray(self.transform(image)).transpose(1, 2, 0))


def feed_of(model: str | None, framing: Framing) -> Feed:
    """As timm's configuration of a model says; of None, or where timm has none, as framed."""
    known = get_pretrained_cfg(model) if model is not None and timm.is_model(model) else None
    if known is None:
        return Feed(framing, str(framing))
    config = resolve_data_config(pretrained_cfg=known.to_dict())
    crop = {name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
    said = ", ".join(f"{name} {value}" for name, value in crop.items())
    transform = create_transform(height_width(framing.size), mean=config["mean"], use_prefetcher=True, **crop)
    return Feed(framing, f"as timm validates {model}: {said}, to {size_text(framing.size)} px", transform)


_Prepared: TypeAlias = "tuple[int, Tensor] | SparsifinerError"


class _Files(Dataset[_Prepared]):
    """Images by number, [K,H,W,3]. What cannot be read is returned: a worker that raised it would show its traceback
    instead.
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
    """Images by number, in order, and their pixels uint8 [B*K,H,W,3]: each clean, then under each corruption; some
    `batch` of them at a time, corrupted ones included.

    Raises:
        ImageError: by the iterator: one cannot be read.
        ConfigError: by the iterator: a worker failed, as where shared memory is short.
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
    """Ctrl-C reaches the whole group of processes: the one that has workers ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
