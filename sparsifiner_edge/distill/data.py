"""Images for training, from any folder; what is drawn follows from the seed alone."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsifiner_edge.distill.augment import seeded
from sparsifiner_edge.errors import ConfigError, ImageError, SparsifinerError
from sparsifiner_edge.images import class_order, evenly, list_images, open_image


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
        root, held_out_root: the folders that they lie in.
        labels: the class of each file, where labels count; else empty. classes: their names.
        held_out_labels: of each file held out, where all of them lie in folders of classes; else empty.
    """

    train: list[Path]
    held_out: tuple[Path, ...]
    root: Path
    held_out_root: Path
    labels: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    held_out_labels: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Tells whether a training resumes on the images that it began with, wherever they lie by now.

        Of their names below their folder, and their sizes.
        """
        lines = [f" {len(self.train)} {bool(self.labels)} []", *map(str, self.labels)]
        lines += [_name_and_size(path, self.root) for path in self.train]
        lines += [_name_and_size(path, self.held_out_root) for path in self.held_out]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _name_and_size(path: Path, root: Path) -> str:
    """A file's name below a folder, and its size; a folder may be named in many ways, and moved."""
    try:
        size = path.stat().st_size
    except OSError:  # Gone since it was listed: whoever reads it says so.
        size = -1
    return f"{os.path.relpath(path, root)} {size}"


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
    kept = list_images(held_out) if held_out is not None else evenly(files, min(count, max(1, len(files) // 5)))
    taken = {path.resolve() for path in kept}
    train = [path for path in files if path.resolve() not in taken]
    kept = evenly(kept, count)
    if not train:
        raise ImageError(f"{folder} holds {len(files)} images, all of which are held out.", "Give more images.")
    roots = (folder, folder if held_out is None else held_out)
    if not labelled:
        return ImageSource(train, tuple(kept), *roots)
    parts = {path: path.relative_to(folder).parts for path in files}
    if folder.is_file() or any(len(part) < 2 for part in parts.values()):
        raise ConfigError(f"{folder} has images outside the folders of classes.", "Sort them, or leave --labels out.")
    classes = class_order((part[0] for part in parts.values()), classifier)  # those held out are of classes too
    numbers = {name: number for number, name in enumerate(classes)}
    labels = tuple(numbers[parts[path][0]] for path in train)
    found = [numbers.get(path.relative_to(roots[1]).parts[0], -1) for path in kept]
    return ImageSource(train, tuple(kept), *roots, labels, classes, () if -1 in found else tuple(found))


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
        return _batch(map(self.sample, numbers))

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
            return seeded(self.transform, image, self.seed + number), label, str(path), tuple(unreadable)
        raise ImageError(f"None of the {count} images can be read.", f"Look at {unreadable[0]}, for instance.")

    def _index(self, epoch: int, place: int) -> int:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (epoch + 1))
            self._order = (epoch, torch.randperm(len(self.source.train), generator=generator).tolist())
        return self._order[1][place]


def _batch(samples: Iterable[Sample]) -> Batch | SparsifinerError:
    """A batch; what ends a training is returned: a worker process that raised it would show its traceback instead."""
    try:
        images, labels, files, unreadable = zip(*samples, strict=True)
    except SparsifinerError as error:
        return error
    return Batch(torch.stack(images), torch.tensor(labels), files, tuple(itertools.chain(*unreadable)))


def _unchanged(batch: Any) -> Any:
    return batch


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
        collate_fn=_unchanged,
        persistent_workers=workers > 0,
    )
    for found in loader:
        if isinstance(found, SparsifinerError):
            raise found
        yield found
