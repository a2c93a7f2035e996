"""Pictures for training: any folder, or any data set that timm reads; what is drawn follows from the seed alone."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm.data
import torch
from PIL import Image
from timm.data.dataset import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import v2

from sparsifiner_edge.distill.recipe import Pictures
from sparsifiner_edge.errors import ConfigError, PictureError
from sparsifiner_edge.pictures import class_order, decode_picture, evenly, list_pictures, open_picture


class Batch(NamedTuple):
    """Pictures uint8 [B,3,S,S], labels int64 [B] (-1: none), their files, and files that could not be read."""

    images: Tensor
    labels: Tensor
    files: tuple[str, ...]
    unreadable: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where pictures come from.

    Attributes:
        train: files, or a data set of timm. held_out: files that are not trained on.
        labels: the class of each file, where a folder is labelled. classes: their names.
        labelled: whether labels count. name: of a data set.
    """

    train: Sequence[Path] | Any
    held_out: tuple[Path, ...]
    labels: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    labelled: bool = False
    name: str = ""

    @property
    def fingerprint(self) -> str:
        """Tells whether a training resumes on the pictures that it began with."""
        length = len(self.train) if hasattr(self.train, "__len__") else "endless"
        files = [*self.train, *self.held_out] if isinstance(self.train, list) else [*self.held_out]
        # However the folder was named.
        names = [f"{self.name} {length}", *map(str, self.labels), *map(os.path.abspath, files)]
        text = "\n".join(names)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self.train)


def folder_source(
    folder: Path, count: int, labelled: bool, held_out: Path | None, classifier: tuple[str, ...] = ()
) -> Source:
    """Every picture below a folder, `count` of them evenly taken and held out unless a folder of them is given.

    Args:
        labelled: the name of the folder below `folder` is a picture's class.
        classifier: its labels, in its order; see `class_order`.

    Raises:
        PictureError: no pictures, or too few.
        ConfigError: labelled, and a picture lies in no folder of its own.
    """
    files = list_pictures(folder)
    kept = list_pictures(held_out) if held_out is not None else evenly(files, min(count, max(1, len(files) // 5)))
    taken = {path.resolve() for path in kept}
    train = [path for path in files if path.resolve() not in taken]
    kept = evenly(kept, count)
    if not train:
        raise PictureError(f"{folder} holds {len(files)} pictures, all of which are held out.", "Give more pictures.")
    if not labelled:
        return Source(train, tuple(kept))
    parts = [path.relative_to(folder).parts for path in train]
    if folder.is_file() or any(len(part) < 2 for part in parts):
        raise ConfigError(f"{folder} holds pictures in no folder of their class.", "Sort them, or leave --labels out.")
    classes = class_order((part[0] for part in parts), classifier)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = tuple(numbers[part[0]] for part in parts)
    return Source(train, tuple(kept), labels, classes, labelled=True)


def timm_source(name: str, root: Path, count: int, labelled: bool, held_out: Path | None) -> Source:
    """A data set by timm's name, such as "wds/mine" or "hfds/..."; see timm's `create_dataset`.

    Raises:
        ConfigError: timm cannot make it, nothing is held out, or pictures of the data set itself are.
    """
    try:
        dataset = timm.data.create_dataset(name, root=str(root), split="train", is_training=True, batch_size=1)
    # Each reader raises its own kinds of error; all mean that there is no such data set.
    except Exception as error:
        raise ConfigError(f"timm cannot read the data set {name!r} at {root}: {error}.", "Check both.") from error
    if held_out is None:
        raise ConfigError(f"The data set {name!r} has no pictures held out.", "Give a folder of some: --held-out DIR.")
    kept = evenly(list_pictures(held_out), count)
    reader = getattr(dataset, "reader", None)
    if isinstance(reader, ReaderImageFolder) and any(p.resolve().is_relative_to(_root(reader)) for p in kept):
        raise ConfigError(f"{held_out} lies in the data set itself.", "Hold out pictures that are not trained on.")
    return Source(dataset, tuple(kept), labelled=labelled, name=name)


def _root(reader: Any) -> Path:
    return Path(reader.root).resolve()


def augmentation(size: int, pictures: Pictures) -> v2.Transform:
    """PIL picture -> uint8 [3,S,S]."""
    bicubic = v2.InterpolationMode.BICUBIC
    if pictures.smallest_crop < 1:
        crop: list[Any] = [
            v2.RandomResizedCrop(size, (pictures.smallest_crop, 1.0), interpolation=bicubic, antialias=True)
        ]
    else:
        crop = [v2.Resize(size, bicubic, antialias=True), v2.CenterCrop(size)]
    return v2.Compose([*crop, *([v2.RandomHorizontalFlip()] if pictures.flip else []), v2.PILToTensor()])


class Drawn(Dataset[tuple[Tensor, int, str, tuple[str, ...]]]):
    """Endless passes over the pictures, each in an order of its own: item n is the n-th picture of the training."""

    def __init__(self, source: Source, transform: Any, seed: int, classes: int = 0) -> None:
        self.source, self.transform, self.seed, self.classes = source, transform, seed, classes
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, number: int) -> tuple[Tensor, int, str, tuple[str, ...]]:
        count = len(self.source)
        unreadable: list[str] = []
        for further in range(count):  # an unreadable picture gives its place to the next one
            index = self._index(number // count, (number + further) % count)
            try:
                picture, label, name = self._read(index)
            except PictureError:
                unreadable.append(self._name(index))
                continue
            return apply(self.transform, picture, self.seed + number), label, name, tuple(unreadable)
        raise PictureError(f"None of the {count} pictures can be read.", f"Look at {unreadable[0]}, for instance.")

    def _index(self, epoch: int, place: int) -> int:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (epoch + 1))
            self._order = (epoch, torch.randperm(len(self.source), generator=generator).tolist())
        return self._order[1][place]

    def _name(self, index: int) -> str:
        train: Any = self.source.train
        if isinstance(train, list):
            return str(train[index])
        return str(train.filename(index)) if hasattr(train, "filename") else f"picture {index}"

    def _read(self, index: int) -> tuple[Any, int, str]:
        train: Any = self.source.train
        if isinstance(train, list):
            label = self.source.labels[index] if self.source.labels else -1
            return open_picture(train[index]), label, self._name(index)
        name = self._name(index)
        try:
            # Past timm's own class, which gives the next picture in place of a broken one and does not say so.
            file, label = (train.reader if isinstance(train, ImageDataset) else train)[index][:2]
        except Exception as error:  # whatever timm's reader raises
            raise PictureError(f"{name} cannot be read: {error}.", "Replace or remove it.") from error
        picture = file.convert("RGB") if isinstance(file, Image.Image) else decode_picture(file, name)
        label = -1 if label is None else int(label)
        if self.source.labelled:
            check_label(label, self.classes, name)
        return picture, label, name


def check_label(label: int, classes: int, name: str) -> None:
    """Refuse a label that the student has no class for.

    Raises:
        ConfigError: names the picture.
    """
    if not 0 <= label < classes:
        raise ConfigError(f"{name} has the label {label}; the student knows {classes} classes.", "Leave --labels out.")


def apply(transform: Any, picture: Any, seed: int) -> Tensor:
    """A transform whose draws follow from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(Tensor, transform(picture))


class Streamed(IterableDataset[tuple[Tensor, int, str, tuple[str, ...]]]):
    """A data set that can only be read on, again and again: WebDataset and the like, in timm's order."""

    def __init__(self, source: Source, transform: Any, seed: int, classes: int = 0) -> None:
        self.source, self.transform, self.seed, self.classes = source, transform, seed, classes

    def __iter__(self) -> Iterator[tuple[Tensor, int, str, tuple[str, ...]]]:
        number = before = 0
        while True:
            for picture, label in cast(Any, self.source.train):
                name = f"picture {number} of the stream"
                if self.source.labelled:
                    check_label(int(label), self.classes, name)
                yield apply(self.transform, picture.convert("RGB"), self.seed + number), int(label), name, ()
                number += 1
            if number == before:
                raise PictureError(f"The data set {self.source.name!r} gives no picture.", "Look at its files.")
            before = number


def collate(items: list[tuple[Tensor, int, str, tuple[str, ...]]]) -> Batch:
    """Items -> a batch."""
    images, labels, files, unreadable = zip(*items, strict=True)
    return Batch(
        torch.stack(images), torch.tensor(labels), files, tuple(name for names in unreadable for name in names)
    )


def batches(
    source: Source,
    transform: Any,
    *,
    seed: int,
    batch: int,
    first: int,
    process: int,
    processes: int,
    workers: int,
    classes: int = 0,
) -> Iterator[Batch]:
    """Endless batches of one process, from the `first` pass of all processes on.

    Together the processes draw what one process would with batches as large as all of theirs.
    """
    shared: dict[str, Any] = {"num_workers": workers, "collate_fn": collate, "persistent_workers": workers > 0}
    if isinstance(source.train, IterableDataset):
        # The data set deals its pictures out to the processes by itself.
        stream = Streamed(source, transform, seed + 1_000_003 * process, classes)
        return iter(DataLoader(stream, batch_size=batch, **shared))

    def places() -> Iterator[list[int]]:
        number = first
        while True:
            start = (number * processes + process) * batch
            yield list(range(start, start + batch))
            number += 1

    return iter(DataLoader(Drawn(source, transform, seed, classes), batch_sampler=cast(Any, places()), **shared))
